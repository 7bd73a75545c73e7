from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.store.support import CONTENT

from farplug.errors import ImageError, Reason
from farplug.store import image as image_module
from farplug.store.image import Image, serial_number


def test_locks(image: Path, tmp_path: Path) -> None:
    for first, second in [(False, False), (False, True), (True, False)]:
        opened = Image.open(image, read_only=first)
        with pytest.raises(ImageError, match=r"disk\.raw is in use") as caught:
            Image.open(image, read_only=second)
        assert caught.value.reason is Reason.IN_USE
        assert caught.value.remedy
        opened.close()
    link = tmp_path / "link.raw"
    link.hardlink_to(image)
    several = [Image.open(path, read_only=True) for path in (image, image, link)]
    for opened in several:
        opened.close()


def test_qemu_has_the_image(image: Path) -> None:
    """QEMU takes shared locks on single bytes from 100 on of an image that it writes to."""
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_RDLCK, 0, 101, 1, 0))
        with pytest.raises(ImageError) as caught:
            Image.open(image)
        assert caught.value.reason is Reason.IN_USE
        Image.open(image, read_only=True).close()
    finally:
        os.close(fd)


def test_a_file_system_without_locks(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    opened = Image.open(image)
    assert "cannot be locked (No locks available)" in caplog.text
    opened.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("missing", Reason.NOT_FOUND, "cannot be opened: no such file or directory"),
        ("below a file", Reason.NOT_FOUND, "cannot be opened: not a directory"),
        ("loop", Reason.NOT_FOUND, "cannot be opened: too many levels of symbolic links"),
        ("nul", Reason.NOT_FOUND, "is not a valid path"),
        ("folder", Reason.NOT_A_FILE, "is a folder, not an image"),
        ("pipe", Reason.NOT_A_FILE, "is a device or a pipe, not an image"),
        ("socket", Reason.NOT_A_FILE, "is a device or a pipe, not an image"),
        ("device", Reason.NOT_A_FILE, "is a device or a pipe, not an image"),
        ("empty", Reason.EMPTY, "is empty"),
        ("small", Reason.EMPTY, "has 511 bytes, less than a block of 512"),
    ],
)
def test_paths_that_are_not_an_image(tmp_path: Path, kind: str, reason: Reason, message: str, read_only: bool) -> None:
    path = tmp_path / "thing"
    match kind:
        case "below a file":
            path.write_bytes(b"x")
            path = path / "image"
        case "loop":
            path.symlink_to(path)
        case "nul":
            path = Path("a\0b")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "device":
            path = Path("/dev/null")
        case "empty":
            path.touch()
        case "small":
            path.write_bytes(bytes(511))
    before = open_descriptors()
    with pytest.raises(ImageError) as caught:
        Image.open(path, read_only=read_only)
    assert caught.value.reason is reason
    assert caught.value.message.endswith(message)
    assert "\n" not in caught.value.message
    assert open_descriptors() <= before


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, Reason.NO_PERMISSION),
        (errno.EROFS, Reason.NO_PERMISSION),
        (errno.ETXTBSY, Reason.IN_USE),
        (errno.EIO, Reason.IO_ERROR),
    ],
)
def test_opening_fails(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason, read_only: bool
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageError) as caught:
        Image.open(image, read_only=read_only)
    assert caught.value.reason is reason
    assert bool(caught.value.remedy) is (reason is not Reason.IO_ERROR)
    if reason is Reason.NO_PERMISSION:
        assert ("read-only" in caught.value.remedy) is not read_only


def test_a_folder_without_search_permission(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", denied)
        patch.setattr(os, "open", denied)
        patch.setattr(os, "access", lambda path, mode: path not in (image.parent, image))
        with pytest.raises(ImageError) as caught:
            Image.open(image)
    assert caught.value.reason is Reason.NO_PERMISSION
    assert f"permission to search {image.parent} (x)" in caught.value.remedy


def test_an_error_while_opening(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", refuse)
    before = open_descriptors()
    with pytest.raises(ImageError, match="cannot be opened: input/output error") as caught:
        Image.open(image)
    assert caught.value.reason is Reason.IO_ERROR
    assert open_descriptors() <= before


@pytest.mark.parametrize(
    ("read_only", "force", "exclusive"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_a_block_device_that_is_in_use(
    image: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool, force: bool, exclusive: bool
) -> None:
    def busy(path: Path, flags: int) -> int:
        assert bool(flags & os.O_EXCL) is exclusive
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "is_block_device", lambda self: True)
    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(ImageError, match="device or resource busy") as caught:
        Image.open(image, read_only=read_only, force=force)
    assert caught.value.reason is Reason.IN_USE
    assert "container" in caught.value.remedy


@pytest.mark.parametrize(("read_only", "access"), [(False, "u:$USER:rw"), (True, "u:$USER:r ")])
def test_a_block_device_without_permission(
    image: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool, access: str
) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_block_device", lambda self: True)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageError, match="permission denied") as caught:
        Image.open(image, read_only=read_only)
    assert caught.value.reason is Reason.NO_PERMISSION
    assert f"sudo setfacl -m {access}" in caught.value.remedy.command


def test_access_time_is_left_alone_where_that_is_allowed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    seen: list[int] = []

    def only_the_owner(path: Path, flags: int) -> int:
        seen.append(flags & os.O_NOATIME)
        if flags & os.O_NOATIME:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(path, flags)

    monkeypatch.setattr(os, "open", only_the_owner)
    opened = Image.open(image, read_only=True)
    assert seen == [os.O_NOATIME, 0]
    data = bytearray(512)
    opened.read(memoryview(data), 0)
    assert data == CONTENT[:512]
    opened.close()


def test_serial_number(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serial = serial_number(image)
    assert len(serial) == 16
    assert set(serial) <= set("0123456789ABCDEF")
    link = tmp_path / "link.raw"
    link.symlink_to(image)
    assert serial_number(link) == serial
    image.unlink()
    image.write_bytes(b"another")
    assert serial_number(image) == serial
    assert serial_number(tmp_path / "other.raw") != serial

    def missing(self: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", missing)
    assert len(serial_number(image)) == 16


def test_after_a_failed_flush_all_flushes_fail(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux marks what it could not write as clean, and the next fdatasync succeeds."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    opened = Image.open(image)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="broken"):
        opened.sync()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(OSError, match=r"disk\.raw: an earlier flush failed") as caught:
            opened.sync()
        assert caught.value.errno == errno.EIO
    opened.close()
    opened = Image.open(image)
    opened.sync()
    opened.close()
    opened.close()


@pytest.mark.parametrize(("protected", "read_only"), [(1, False), (0, False), (1, True)])
def test_a_block_device_that_is_write_protected(
    image: Path, monkeypatch: pytest.MonkeyPatch, protected: int, read_only: bool
) -> None:
    def ioctl(fd: int, request: int, data: bytes) -> bytes:
        assert (request, data) == (0x125E, bytes(4))
        return struct.pack("@i", protected)

    def every(mode: int) -> bool:
        return True

    monkeypatch.setattr(image_module, "stat", SimpleNamespace(S_ISREG=every, S_ISBLK=every))
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    if protected and not read_only:
        with pytest.raises(ImageError, match=r"disk\.raw is write-protected") as caught:
            Image.open(image)
        remedy = caught.value.remedy
        assert (caught.value.reason, remedy.setting, remedy.value) == (
            Reason.NO_PERMISSION,
            "usb_disk_ro",
            str(image),
        )
    else:
        Image.open(image, read_only=read_only).close()
