from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farplug.app import commands
from farplug.app.codec import MAX_STRING, decode, encode
from farplug.app.commands import COMMANDS, Attach, Command, Eject, Insert, Quit, Status
from farplug.app.settings import (
    DeviceRules,
    GuestSettings,
    Names,
    Source,
    SourceKind,
    StorageSettings,
    TargetSettings,
)
from farplug.errors import Reason, UsageError
from farplug.text import without_credentials

# The names of files of Linux: any bytes but NUL, as Python decodes them.
NAMES = st.binary(max_size=50).map(lambda name: name.replace(b"\0", b"/").decode(errors="surrogateescape"))

_PATHS = {Names.NOTHING: st.just(""), Names.FILE: NAMES.filter(bool), Names.OTHER: NAMES}

SECRETS: dict[str, Any] = {"password": "hunter2", "fallback_password": "hunter3"}


def everything(kind: type[Any]) -> st.SearchStrategy[Any]:
    """All values of a dataclass."""
    if kind is Source:
        return st.sampled_from(SourceKind).flatmap(
            lambda kind: st.builds(Source, st.just(kind), _PATHS[kind.names], st.none() | NAMES)
        )
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: _values(hints[field.name]) for field in fields(kind)})


def _values(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is UnionType:
        return st.one_of([_values(one) for one in get_args(kind)])
    if get_origin(kind) is tuple:
        return st.lists(_values(get_args(kind)[0]), max_size=5).map(tuple)
    if is_dataclass(kind):
        return everything(kind)  # type: ignore[arg-type]
    if kind is float:
        return st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
    return NAMES if kind is str else st.from_type(kind)


def without_secrets(target: TargetSettings) -> TargetSettings:
    return replace(target, password=None, fallback_password="", command=None)


@pytest.mark.parametrize("kind", [Source, StorageSettings, DeviceRules])
def test_json_in_and_out_is_the_identity(kind: type[Any]) -> None:
    @given(everything(kind))
    def check(value: Any) -> None:
        data = json.loads(json.dumps(value.to_json(), allow_nan=False))
        assert kind.from_json(data) == value
        assert set(data) == {field.name for field in fields(kind)}

    check()


@given(everything(GuestSettings))
def test_json_in_and_out_is_the_identity_but_for_secrets(value: GuestSettings) -> None:
    target = replace(value.target, target=value.target.target.replace("@", ""), proxy=None)
    value = replace(value, target=replace(target, target=target.target.replace("password=", "")))
    text = json.dumps(value.to_json(), allow_nan=False)
    again = GuestSettings.from_json(json.loads(text))
    assert again == replace(value, target=without_secrets(value.target))
    assert again.to_json() == value.to_json()


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_every_command_comes_from_json(kind: type[Command]) -> None:
    @given(everything(kind))
    def check(value: Command) -> None:
        data = json.loads(json.dumps(encode(value)))
        assert commands.from_json(kind.name, data) == value

    check()


def test_the_least_of_each_command() -> None:
    assert commands.from_json("attach", {}) == Attach()
    assert commands.from_json("insert", {"path": "a.iso"}) == Insert("a.iso")
    assert commands.from_json("eject", {}) == Eject()
    assert commands.from_json("status", {}) == Status()
    assert commands.from_json("quit", {}) == Quit()
    for name, missing in (("detach", "device"), ("insert", "path")):
        with pytest.raises(UsageError, match=f"^{missing} is missing$"):
            commands.from_json(name, {})


@pytest.mark.parametrize("name", ["", "Attach", "help", "force", "x" * 1_000_000, "\x1b[2J", None, 1, [], {}])
def test_unknown_commands(name: object) -> None:
    with pytest.raises(UsageError, match="is not a command") as caught:
        commands.from_json(name, {})
    assert caught.value.reason is Reason.UNKNOWN_COMMAND
    assert len(caught.value.message) < 120
    assert caught.value.message.isprintable()
    assert caught.value.remedy == (
        "commands: attach, detach, insert, eject, capture, stop-capture, screenshot, screen-text, type, press, click, "
        "layouts, check-text, presence, list, devices, status, reconnect, quit"
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("extra", ["name", "help", "z", "__class__"])
def test_a_command_has_no_other_fields(name: str, extra: str) -> None:
    with pytest.raises(UsageError, match=f"^'{extra}' is not a known setting$") as caught:
        commands.from_json(name, {extra: "z"})
    assert caught.value.reason is Reason.BAD_SETTING
    with pytest.raises(UsageError, match="is not an object"):
        commands.from_json(name, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "target is missing"),
        ({"target": "vm.vv"}, "target: 'vm.vv' is not an object"),
        ({"target": {}}, "target.target is missing"),
        (
            {"target": {"target": "a\0"}},
            r"target.target: the value is not a string without NUL characters and surrogates",
        ),
        ({"target": {"target": "a"}, "sources": [{"kind": "disk"}]}, "sources[0].path is missing"),
        (
            {"target": {"target": "a"}, "sources": [{"kind": "disk", "path": "a"}, {"kind": "floppy", "path": ""}]},
            "sources[1].kind: 'floppy' is not one of disk, read-only-disk, cdrom, folder, usb-device, "
            "remote-device, keyboard, tablet, mouse, touchscreen, gamepad, serial, network, fido, camera",
        ),
        (
            {"target": {"target": "a"}, "storage": {"block_size": True}},
            "storage.block_size: True is not one of 512, 4096",
        ),
        (
            {"target": {"target": "a"}, "storage": {"cache": "WRITEBACK"}},
            "storage.cache: 'WRITEBACK' is not one of writeback, writethrough, unsafe",
        ),
        ({"target": {"target": "a"}, "rules": {"wait": 1}}, "rules.wait: 1 is not true or false"),
        ({"target": {"target": "a"}, "rules": {"follow": None}}, "rules.follow: None is not one of device, port"),
    ],
)
def test_refused_settings(data: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        GuestSettings.from_json(data)
    assert caught.value.reason is Reason.BAD_SETTING
    assert caught.value.message == message


def test_secrets_are_left_out() -> None:
    settings = TargetSettings("spice://:hunter1@h:1?password=hunter4&tls-port=2", proxy="http://u:hunter5@p", **SECRETS)
    assert "hunter" not in json.dumps(settings.to_json())
    assert "hunter" not in repr(settings)
    assert settings.to_json() == {
        "target": "spice://h:1?tls-port=2",
        "ca_file": None,
        "host_subject": None,
        "proxy": "http://p",
        "allow_plain": False,
    }
    assert TargetSettings.from_json({"target": "vm.vv", **SECRETS}) == TargetSettings("vm.vv", **SECRETS)


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("spice://h:1", "spice://h:1"),
        ("spice://h?port=1&tls-port=2", "spice://h?port=1&tls-port=2"),
        ("spice://h?", "spice://h?"),
        ("spice://:p@h:1", "spice://h:1"),
        ("spice+tls://:p/@#@h:1", "spice+tls://h:1"),
        ("spice://h:1?password=a;b?c@d", "spice://h:1"),
        ("spice://h?password=x&port=1", "spice://h?port=1"),
        ("spice://h?port=1&password=x", "spice://h?port=1"),
        ("spice://h?port=1;PASSWORD=x", "spice://h?port=1"),
        ("tcp://:p@h:1", "tcp://h:1"),
        ("spice+unix:///run/a@b", "spice+unix:///run/a@b"),
        ("unix:/run/a@b", "unix:/run/a@b"),
        ("a@b.vv", "a@b.vv"),
        ("", ""),
    ],
)
def test_a_target_without_its_password(url: str, public: str) -> None:
    assert without_credentials(url) == public
    assert TargetSettings(url).public_target == public


@pytest.mark.parametrize(
    ("proxy", "public"),
    [
        ("http://u:p@h:1", "http://h:1"),
        ("u:p@@h", "h"),
        ("HTTP://u:/p\n@h", "HTTP://h"),
        ("h:3128", "h:3128"),
        (None, None),
    ],
)
def test_a_proxy_without_its_password(proxy: str | None, public: str | None) -> None:
    assert TargetSettings("spice://h:1", proxy=proxy).to_json()["proxy"] == public


def test_sources() -> None:
    assert Source.disk(Path("a"), snapshot=Path("s")) == Source(SourceKind.DISK, "a", "s")
    assert Source.disk("a", read_only=True) == Source(SourceKind.READ_ONLY_DISK, "a")
    assert Source.cdrom(Path("a")) == Source(SourceKind.CDROM, "a")
    assert Source.folder(Path("a")) == Source(SourceKind.FOLDER, "a")
    assert Source.usb_device("1-1") == Source(SourceKind.USB_DEVICE, "1-1")


def test_a_path_of_any_length_that_linux_has_is_taken() -> None:
    path = "/" + "ä" * 4094
    assert len(path) < MAX_STRING
    assert decode(Source, {"kind": "disk", "path": path}).path == path
