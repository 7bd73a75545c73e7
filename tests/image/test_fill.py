from __future__ import annotations

import asyncio
import io
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.image.support import MIB, ODD, PLAIN, WHEN, contents, make_folder
from tests.leaks import descriptors

from farplug.errors import ImageError, Reason, SetupError
from farplug.image import fill
from farplug.image.fill import fill_in_guest
from farplug.image.tools import ImageBuild
from farplug.image.tree import Tree, scan
from farplug.image.volume import Format, Partition, Volume
from farplug.vm.agent import CommandFailed, CommandResult
from farplug.vm.qemu_config import GuestConfig


def volume(format: Format = Format.EXFAT, block_size: int = 512) -> Volume:
    return Volume(
        format=format,
        partition=Partition.MBR,
        label="it's",
        block_size=block_size,
        length=40 * MIB,
        disk_size=41 * MIB,
    )


class FakeQmp:
    """Replaces QEMU's monitor, which sends events before a reply."""

    def __init__(self, coming: list[dict[str, Any]]) -> None:
        self._coming = coming
        self._events: list[dict[str, Any]] = []

    async def execute(self, command: str) -> None:
        self._events += self._coming

    async def event(self, name: str, timeout: float) -> dict[str, Any]:
        assert (name, timeout) == ("BLOCK_IO_ERROR", 0)
        if not self._events:
            raise TimeoutError
        return self._events.pop(0)


class FakeGuest:
    """Replaces QEMU: receives the tar stream as its guest would."""

    events: list[dict[str, Any]]

    received = b""
    output: str | None = None
    """Output of the script before it fails; None: it succeeds."""
    reads = True
    script = ""
    config: GuestConfig

    def __init__(self, config: GuestConfig) -> None:
        FakeGuest.config = config
        (chardev,) = (word for word in config.extra_arguments if word.startswith("socket,"))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(chardev.partition("path=")[2])
        self._thread: threading.Thread | None = None
        self.qmp = FakeQmp(self.events)

    async def __aenter__(self) -> FakeGuest:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    async def booted(self, timeout: float) -> None:
        await asyncio.sleep(0)

    async def check(self, script: str, *, timeout: float) -> str:
        FakeGuest.script = script
        if self.reads:
            FakeGuest.received = await asyncio.to_thread(self._read)
        if self.output is not None:
            raise CommandFailed(script, CommandResult(1, self.output.encode()))
        return ""

    def _read(self) -> bytes:
        with self._socket.makefile("rb") as stream:
            return stream.read()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeGuest]:
    values: dict[str, Any] = {"received": b"", "output": None, "reads": True, "script": "", "events": []}
    for name, value in values.items():
        monkeypatch.setattr(FakeGuest, name, value, raising=False)
    monkeypatch.setattr(fill, "QemuGuest", FakeGuest)
    monkeypatch.setattr(fill, "_check_programs", lambda format: None)
    return FakeGuest


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    before = descriptors()
    descriptor = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    yield descriptor
    os.close(descriptor)
    assert descriptors() <= before


def build_of(fd: int, tree: Tree | None) -> ImageBuild:
    return ImageBuild(fd, tree, lambda done, total: None)


def test_the_stream_is_the_tree(fake: type[FakeGuest], fd: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", {**PLAIN, **ODD})
    fill_in_guest(build_of(fd, scan(folder)), volume())
    with tarfile.open(fileobj=io.BytesIO(fake.received)) as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [entry.path for entry in scan(folder).entries]
        assert {member.mtime for member in members if member.isfile()} == {WHEN}
        # An attribute, because the Python of Debian 12 (3.11.2) lacks extractall's argument "filter".
        archive.extraction_filter = lambda member, path: member
        archive.extractall(tmp_path / "copied")
    assert contents(tmp_path / "copied") == contents(folder)


@pytest.mark.parametrize(
    ("format", "block_size", "make", "mount"),
    [
        (Format.EXFAT, 512, "mkfs.exfat -c 4096 -L 'it'\"'\"'s' /dev/vda1", "mount -t exfat"),
        (Format.NTFS, 4096, "mkntfs -q -F -f -c 4096 -L 'it'\"'\"'s' -p 256 ", "ntfs-3g"),
        (Format.FAT32, 512, "\n:\n", "mount -t vfat"),
    ],
)
def test_what_the_guest_runs(
    fake: type[FakeGuest], fd: int, tmp_path: Path, format: Format, block_size: int, make: str, mount: str
) -> None:
    folder = make_folder(tmp_path / "folder", {"sub/a": b"", "b": b""})
    fill_in_guest(build_of(fd, scan(folder)), volume(format, block_size))
    assert make in fake.script
    assert mount in fake.script
    assert '[ "$count" = 3 ]' in fake.script
    assert f"virtio-blk-pci,drive=image,logical_block_size={block_size},physical_block_size={block_size}" in (
        fake.config.extra_arguments
    )


def test_an_empty_image_needs_no_stream(fake: type[FakeGuest], fd: int) -> None:
    fill_in_guest(build_of(fd, None), volume())
    assert fake.received == b""
    assert "[ 0 -gt 0 ] || exit 0" in fake.script


@pytest.mark.parametrize(
    ("output", "reason", "text"),
    [
        ("tar: write error: No space left on device\n", Reason.TOO_LARGE, "the folder does not fit"),
        ("first\nmount: I/O error\n", Reason.IO_ERROR, "the guest cannot fill the image: mount: I/O error"),
        ("", Reason.IO_ERROR, "no output"),
    ],
)
@pytest.mark.parametrize("reads", [True, False])
def test_a_guest_that_fails(
    fake: type[FakeGuest], fd: int, tmp_path: Path, output: str, reason: Reason, text: str, reads: bool
) -> None:
    fake.output, fake.reads = output, reads
    folder = make_folder(tmp_path / "folder", PLAIN)
    with pytest.raises(ImageError, match=text) as caught:
        fill_in_guest(build_of(fd, scan(folder)), volume())
    assert caught.value.reason is reason


def test_an_error_while_the_host_is_full(
    fake: type[FakeGuest], fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.output = "mount: I/O error"
    monkeypatch.setattr(fill, "_MIN_HOST_SPACE", 1 << 60)
    with pytest.raises(ImageError, match="no space left for the image") as caught:
        fill_in_guest(build_of(fd, None), volume())
    assert caught.value.reason is Reason.NO_SPACE


@pytest.mark.parametrize(
    ("data", "reason", "text"),
    [
        ({"reason": "No space left on device"}, Reason.NO_SPACE, "no space left for the image"),
        ({"reason": "Disk quota exceeded"}, Reason.IO_ERROR, "written .*: Disk quota exceeded"),
        ({}, Reason.IO_ERROR, "I/O error"),
    ],
)
def test_write_errors_that_the_guest_does_not_report(
    fake: type[FakeGuest], fd: int, tmp_path: Path, data: dict[str, Any], reason: Reason, text: str
) -> None:
    fake.events = [{"event": "BLOCK_IO_ERROR", "data": data}]
    with pytest.raises(ImageError, match=text) as caught:
        fill_in_guest(build_of(fd, scan(make_folder(tmp_path / "folder", {"a": b"12345"}))), volume())
    assert caught.value.reason is reason


@pytest.mark.parametrize("change", ["shrink", "remove", "folder"])
def test_a_file_that_changes(fake: type[FakeGuest], fd: int, tmp_path: Path, change: str) -> None:
    fake.output = "tar: short read"
    folder = make_folder(tmp_path / "folder", {"a": b"12345"})
    tree = scan(folder)
    (folder / "a").unlink()
    if change == "shrink":
        (folder / "a").write_bytes(b"123")
    elif change == "folder":
        (folder / "a").mkdir()
    with pytest.raises(ImageError, match="changed while it was copied: a") as caught:
        fill_in_guest(build_of(fd, tree), volume())
    assert caught.value.reason is Reason.CHANGED


def test_a_file_that_cannot_be_read(
    fake: type[FakeGuest], fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.output = "tar: short read"
    tree = scan(make_folder(tmp_path / "folder", {"a": b"12345"}))
    # The memory of a process cannot be read at address 0: an I/O error.
    monkeypatch.setattr(fill, "open_file", lambda *_: os.open("/proc/self/mem", os.O_RDONLY))
    with pytest.raises(ImageError, match="a cannot be read: input/output error"):
        fill_in_guest(build_of(fd, tree), volume())


def test_a_cancelled_build(fake: type[FakeGuest], fd: int, tmp_path: Path) -> None:
    fake.reads = False
    folder = make_folder(tmp_path / "folder", PLAIN)  # more than a socket holds: the sender waits

    def progress(done: int, total: int) -> None:
        raise InterruptedError

    before = set(threading.enumerate())
    with pytest.raises(InterruptedError):
        fill_in_guest(ImageBuild(fd, scan(folder), progress), volume())
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("format", "text"), [(Format.NTFS, "NTFS is made"), (Format.FAT32, "FAT32 with some of these names is made")]
)
def test_one_error_names_all_missing_programs(
    fd: int, monkeypatch: pytest.MonkeyPatch, format: Format, text: str
) -> None:
    monkeypatch.setattr(
        "shutil.which", lambda name, **_: None if name in ("qemu-system-x86_64", "mkntfs", "ntfs-3g") else "/x"
    )
    with pytest.raises(SetupError, match=f"{text} in a throw-away virtual machine, which needs qemu") as caught:
        fill_in_guest(build_of(fd, None), volume(format))
    packages = "ntfs-3g qemu-system-x86" if format is Format.NTFS else "qemu-system-x86"
    assert caught.value.remedy.command == f"sudo apt-get install {packages}"
