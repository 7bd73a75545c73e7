"""Who may use which method, and what becomes of the paths in parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.docs import ROOT
from typer.main import get_command

from farplug.app.settings import Names, SourceKind
from farplug.cli.tree import app
from farplug.control.methods import METHODS
from farplug.errors import Reason, UsageError
from farplug.web import methods
from farplug.web.files import NoFiles, WebRoot
from farplug.web.security import Role
from farplug.web.shell import SOURCES

ALLOWED_TO_WATCHERS = {
    *("hello", "sessions", "watch-sessions", "unwatch-sessions", "open", "close"),
    *("subscribe", "unsubscribe", "status", "layouts", "watch-screen", "unwatch-screen", "screen-ack"),
}


def test_every_method_of_sessions_is_passed_on_or_left_out_on_purpose() -> None:
    # The other ends of plug-shell are sockets of this machine.
    assert set(METHODS) ^ methods.RELAYED == {"hello", "screenshot", "plug-shell"}


def test_methods_with_paths_are_those_that_take_them() -> None:
    page = (ROOT / "docs/control.md").read_text()
    sections = re.split(r"^### ", page.partition("\n## Methods\n")[2].partition("\n## ")[0], flags=re.MULTILINE)
    with_paths = {text.split("\n")[0] for text in sections if re.search(r"^\| `(path|sources)`", text, re.MULTILINE)}
    assert with_paths - {"screenshot"} == methods.WITH_PATHS


@pytest.mark.parametrize("method", sorted({*methods.OWN, *methods.RELAYED}))
def test_what_a_watcher_may_do(method: str) -> None:
    methods.check(Role.FULL, method)
    if method in ALLOWED_TO_WATCHERS:
        methods.check(Role.VIEW, method)
    else:
        with pytest.raises(UsageError) as caught:
            methods.check(Role.VIEW, method)
        assert caught.value.reason is Reason.VIEW_ONLY
        assert method not in methods.methods(Role.VIEW)


@pytest.mark.parametrize("method", ["screenshot", "", "Attach", "__init__", "x" * 64])
@pytest.mark.parametrize("role", Role)
def test_other_methods_do_not_exist(role: Role, method: str) -> None:
    with pytest.raises(UsageError) as caught:
        methods.check(role, method)
    assert caught.value.reason is Reason.UNKNOWN_COMMAND


def sources(*items: dict[str, Any]) -> dict[str, Any]:
    return {"sources": list(items), "wait": False}


def test_paths_become_absolute(root: Path) -> None:
    places = WebRoot.of(root)
    asked = sources(
        {"kind": "cdrom", "path": "iso/debian.iso"},
        {"kind": "disk", "path": "disk.raw", "snapshot": "disk.snap"},
        {"kind": "folder", "path": "iso"},
        {"kind": "read-only-disk", "path": "client:m1"},
        {"kind": "usb-device", "path": "1-4"},
        {"kind": "keyboard"},
    )
    assert methods.with_absolute_paths("attach", asked, places) == sources(
        {"kind": "cdrom", "path": f"{root}/iso/debian.iso"},
        {"kind": "disk", "path": f"{root}/disk.raw", "snapshot": f"{root}/disk.snap"},
        {"kind": "folder", "path": f"{root}/iso"},
        {"kind": "read-only-disk", "path": "client:m1"},
        {"kind": "usb-device", "path": "1-4"},
        {"kind": "keyboard"},
    )
    assert asked["sources"][0]["path"] == "iso/debian.iso"  # the request itself does not change
    insert = {"path": "iso/debian.iso", "drive": "cdrom0"}
    changed = {"path": f"{root}/iso/debian.iso", "drive": "cdrom0"}
    assert methods.with_absolute_paths("insert", insert, places) == changed
    assert methods.with_absolute_paths("insert", {"path": "client:m1"}, places) == {"path": "client:m1"}
    capture = {"path": "new.pcapng", "bytes": 3}
    assert methods.with_absolute_paths("capture", capture, places) == {"path": f"{root}/new.pcapng", "bytes": 3}


def test_every_kind_of_source_is_known_with_its_option() -> None:
    kinds = {*methods.OF_FILES, *methods.WITHOUT_FILES, *methods.OF_ENDS}
    assert {*kinds, *methods.NOT_FROM_BROWSERS} == set(SourceKind)
    assert set(methods.OF_FILES) == {kind for kind in SourceKind if kind.names is Names.FILE}
    assert set(SOURCES) == kinds
    options = {option for parameter in get_command(app).commands["attach"].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert set(SOURCES.values()) <= options


ESCAPES = ("../secret.img", "iso/../../secret.img", "/etc/passwd", "out", "..\\secret.img", "a\0b", "C:\\x", "", ".")


@pytest.mark.parametrize("path", ESCAPES)
@pytest.mark.parametrize("kind", ["disk", "read-only-disk", "cdrom", "fido", "camera"])
def test_a_source_is_below_the_web_root(root: Path, kind: str, path: str) -> None:
    (root / "out").symlink_to(root.parent / "secret.img")
    with pytest.raises(UsageError) as caught:
        methods.with_absolute_paths("attach", sources({"kind": kind, "path": path}), WebRoot.of(root))
    assert caught.value.reason in (Reason.OUTSIDE_WEB_ROOT, Reason.BAD_SETTING)


def test_the_test_picture_of_a_camera_is_not_a_file(root: Path) -> None:
    params = sources({"kind": "camera", "path": "pattern"})
    assert methods.with_absolute_paths("attach", params, WebRoot.of(root)) == params


def test_the_file_of_a_security_key_may_be_new(root: Path) -> None:
    for path in ("keys.json", "iso/keys.json", "disk.raw"):
        params = sources({"kind": "fido", "path": path, "presence": "ask"})
        changed = sources({"kind": "fido", "path": f"{root}/{path}", "presence": "ask"})
        assert methods.with_absolute_paths("attach", params, WebRoot.of(root)) == changed


def test_a_folder_of_the_name_of_the_test_picture(root: Path) -> None:
    (root / "pattern").mkdir()
    params = sources({"kind": "camera", "path": "pattern/"})
    changed = sources({"kind": "camera", "path": f"{root}/pattern"})
    assert methods.with_absolute_paths("attach", params, WebRoot.of(root)) == changed


ENDS = (
    "pty:/tmp/link",
    "PTY",
    "pty ",
    "pty\0",
    "client:m1",
    "-",
    "tcp-listen://:4000",
    "unix:/run/x",
    "file:/etc/x",
    "passt",
    "",
    None,
)


@pytest.mark.parametrize("end", ["pty", "client"])
def test_a_serial_line_has_a_new_terminal_or_the_page_for_its_end(root: Path, end: str) -> None:
    params = sources({"kind": "serial", "path": end})
    assert methods.with_absolute_paths("attach", params, WebRoot.of(root)) == params
    assert methods.with_absolute_paths("attach", params, NoFiles()) == params


@pytest.mark.parametrize("path", [*ENDS, ["pty"]])
def test_other_ends_are_not_for_browsers(root: Path, path: object) -> None:
    with pytest.raises(UsageError) as caught:
        methods.with_absolute_paths("attach", sources({"kind": "serial", "path": path}), WebRoot.of(root))
    assert caught.value.reason is Reason.BAD_SETTING


@pytest.mark.parametrize("kind", methods.NOT_FROM_BROWSERS)
@pytest.mark.parametrize("path", ["passt", "pty", "usbip://host/1-2", "tap:tap0", ""])
def test_networks_and_remote_devices_are_not_for_browsers(root: Path, kind: str, path: str) -> None:
    with pytest.raises(UsageError) as caught:
        methods.with_absolute_paths("attach", sources({"kind": kind, "path": path}), WebRoot.of(root))
    assert caught.value.reason is Reason.BAD_SETTING


@pytest.mark.parametrize("path", [*ESCAPES[:-1], "none/new.snap"])
def test_what_is_written_is_below_the_web_root(root: Path, path: str) -> None:
    (root / "out").symlink_to(root.parent / "secret.img")
    disk = {"kind": "disk", "path": "disk.raw", "snapshot": path}
    for method, params in (("attach", sources(disk)), ("capture", {"path": path})):
        with pytest.raises(UsageError):
            methods.with_absolute_paths(method, params, WebRoot.of(root))


@pytest.mark.parametrize(
    "source",
    [
        None,
        "disk",
        {},
        {"kind": "disk"},
        {"kind": ["disk"], "path": "disk.raw"},
        {"kind": "serial", "path": "unix:/run/x"},
        {"kind": "network", "path": "passt"},
        {"kind": "x", "path": "/etc/passwd"},
        {"kind": "disk", "path": ["disk.raw"]},
        {"kind": "disk", "path": "client:m1"},
        {"kind": "folder", "path": "client:m1"},
        {"kind": "cdrom", "path": "iso/debian.iso", "snapshot": "/etc/new"},
        {"kind": "usb-device", "path": "1-4", "snapshot": "/etc/new"},
        {"kind": "disk", "path": "disk.raw", "snapshot": 3},
    ],
)
def test_a_source_that_is_not_valid(root: Path, source: object) -> None:
    with pytest.raises(UsageError) as caught:
        methods.with_absolute_paths("attach", {"sources": [source]}, WebRoot.of(root))
    assert caught.value.reason is Reason.BAD_SETTING


@pytest.mark.parametrize("value", [None, {}, "disk", [{}] * 1001])
def test_sources_are_an_array(root: Path, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        methods.with_absolute_paths("attach", {"sources": value}, WebRoot.of(root))
    assert caught.value.reason is Reason.BAD_SETTING


def test_without_a_web_root_there_are_no_files() -> None:
    with pytest.raises(UsageError) as caught:
        methods.with_absolute_paths("insert", {"path": "a.iso"}, NoFiles())
    assert caught.value.reason is Reason.OUTSIDE_WEB_ROOT
    assert caught.value.remedy.setting == "web_root"
