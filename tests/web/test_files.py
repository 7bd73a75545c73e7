"""The files below the web root."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.web.support import Served

from farplug.errors import Reason, UsageError
from farplug.web import files
from farplug.web.files import WebRoot


def names(listing: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in listing["entries"]]


def test_a_listing(root: Path) -> None:
    (root / ".hidden").write_text("x")
    listing = WebRoot.of(root).list("")
    assert (listing["path"], listing["more"], names(listing)) == ("", False, ["iso", "disk.raw"])
    assert listing["free"] > 0
    folder, disk = listing["entries"]
    assert (folder["kind"], folder["as"], folder["size"]) == ("folder", None, 0)
    found = (root / "disk.raw").stat()
    expected = {"name": "disk.raw", "kind": "file", "size": 1024, "modified": int(found.st_mtime), "as": "disk"}
    assert disk == expected
    listing = WebRoot.of(root).list("iso/")
    assert (listing["path"], names(listing), listing["entries"][0]["as"]) == ("iso", ["debian.iso"], "cdrom")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.img", bytes(32769) + b"CD001" + bytes(506), "cdrom"),
        ("a.iso", bytes(512), "disk"),
        ("A.RAW", bytes(512), "disk"),
        ("a.raw", bytes(513), "multiple of 512"),
        ("a.raw", b"", "empty"),
        ("a.qcow2", b"QFI\xfb" + bytes(508), "QCOW2"),
        ("a.img", b"QFI\xfb" + bytes(508), "QCOW2"),
        ("a.img.xz", b"\xfd7zXZ\0" + bytes(506), "compressed"),
        ("a.iso.gz", b"\x1f\x8b" + bytes(510), "compressed"),
        ("notes.txt", bytes(512), "not an image"),
        ("a.mjpeg", b"\xff\xd8\xff\xe0", "clip"),
    ],
)
def test_what_a_file_can_be_plugged_in_as(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    (entry,) = WebRoot.of(tmp_path).list("")["entries"]
    if expected in ("cdrom", "disk", "clip"):
        assert entry["as"] == expected
        assert "problem" not in entry
    else:
        assert entry["as"] is None
        assert expected in entry["problem"]["message"]


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.img")
    (tmp_path / "dangling.img").symlink_to("none")
    (tmp_path / "loop.img").symlink_to("loop.img")
    (tmp_path / "a\\b.img").write_bytes(bytes(512))
    (tmp_path / "a\nb.img").write_bytes(bytes(512))
    (tmp_path / os.fsdecode(b"\xff.img")).write_bytes(bytes(512))
    (tmp_path / "denied").mkdir()
    listing = WebRoot.of(tmp_path).list("")
    problems = {entry["name"]: entry.get("problem", {}).get("message") for entry in listing["entries"]}
    assert problems.pop("denied") is None
    assert len(problems) == 6
    assert all(problems.values())


def test_links(root: Path) -> None:
    outside = root.parent / "secret.img"
    (root / "in.raw").symlink_to("disk.raw")
    (root / "up.raw").symlink_to("iso/../disk.raw")
    (root / "folder").symlink_to("iso")
    (root / "out.img").symlink_to(outside)
    (root / "parent").symlink_to("..")
    web = WebRoot.of(root)
    assert web.existing("in.raw") == web.existing("up.raw") == str(root / "disk.raw")
    assert web.existing("folder/debian.iso") == str(root / "iso/debian.iso")
    assert names(web.list("folder")) == ["debian.iso"]
    found = {entry["name"]: entry for entry in web.list("")["entries"]}
    assert found["folder"]["kind"] == "folder"
    for name in ("out.img", "parent"):
        assert "outside" in found[name]["problem"]["message"]
        assert (found[name]["size"], found[name]["modified"]) == (0, 0)
    for path in ("out.img", "parent", "parent/secret.img", "parent/root/disk.raw/../../secret.img"):
        with pytest.raises(UsageError) as caught:
            web.existing(path)
        assert caught.value.reason in (Reason.OUTSIDE_WEB_ROOT, Reason.NOT_FOUND)
        assert "secret" not in caught.value.message or "secret" in path
    with pytest.raises(UsageError):
        web.list("parent")


def test_a_folder_beside_the_root_with_its_name_as_a_prefix(root: Path) -> None:
    other = root.with_name("root-private")
    other.mkdir()
    (other / "x.img").write_bytes(bytes(512))
    (root / "x").symlink_to(other)
    with pytest.raises(UsageError):
        WebRoot.of(root).existing("x/x.img")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/etc",
        "..",
        "iso/..",
        "./iso",
        "../root/iso",
        "iso\\..",
        "C:\\",
        "\\\\host\\share",
        "a\0",
        "x/" * 3000,
        "\ud800",
    ],
)
def test_paths_that_leave(root: Path, path: str) -> None:
    for take in (WebRoot.of(root).existing, WebRoot.of(root).new, WebRoot.of(root).list):
        with pytest.raises(UsageError) as caught:
            take(path)
        assert caught.value.reason is Reason.OUTSIDE_WEB_ROOT
        assert len(caught.value.message) < 200


@pytest.mark.parametrize("path", ["none", "none/none", "disk.raw/x", "%2e%2e", "%2f", "…", "x" * 300])
def test_paths_that_are_not_there(root: Path, path: str) -> None:
    with pytest.raises(UsageError) as caught:
        WebRoot.of(root).existing(path)
    assert caught.value.reason is Reason.NOT_FOUND


def test_new_files(root: Path) -> None:
    web = WebRoot.of(root)
    assert web.new("iso/new.snap") == str(root / "iso/new.snap")
    assert web.new("disk.raw") == str(root / "disk.raw")
    (root / "dangling").symlink_to("/etc/new")
    (root / "out").symlink_to(root.parent)
    for path in ("dangling", "out/new", "none/new", ""):
        with pytest.raises(UsageError):
            web.new(path)


def test_a_large_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ENTRIES", 20)
    for number in range(25):
        (tmp_path / f"{number:03}{'ä' * 100}").write_bytes(b"")
    listing = WebRoot.of(tmp_path).list("")
    assert (len(listing["entries"]), listing["more"]) == (20, True)
    monkeypatch.setattr(files, "MAX_LISTING", 5000)
    listing = WebRoot.of(tmp_path).list("")
    assert 0 < len(listing["entries"]) < 10
    assert listing["more"]


@pytest.mark.parametrize("path", ["none", "disk.raw"])
def test_a_web_root_that_is_not_a_folder(root: Path, path: str) -> None:
    with pytest.raises(UsageError):
        WebRoot.of(root / path)


def test_the_root_of_the_file_system_can_be_the_web_root() -> None:
    assert WebRoot.of("/").existing("dev/null") == "/dev/null"


async def test_over_the_websocket(environment: dict[str, str], root: Path) -> None:
    async with Served.serve(environment, web_root=str(root)) as served, served.browser() as browser:
        assert names(await browser.call("files", {"path": ""})) == ["iso", "disk.raw"]
        assert await browser.refused("files", {"path": "none"}) == "not-found"
        assert await browser.refused("files", {"path": "disk.raw"}) == "not-found"
        assert await browser.refused("files", {"path": "../"}) == "outside-web-root"
        assert await browser.refused("files", {"path": 3}) == "bad-setting"
    async with Served.serve(environment) as served, served.browser() as browser:
        assert await browser.refused("files", {"path": ""}) == "outside-web-root"
