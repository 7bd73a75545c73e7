from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farplug.errors import ImageError, Reason
from farplug.store import FileStore, holes
from farplug.store.file import serial_number
from farplug.usb import Buffer

CONTENT = random.Random(7).randbytes(64 * 512)


def content(path: Path) -> bytes:
    return path.read_bytes()


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


async def read(store: FileStore, offset: int, length: int) -> bytes:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(data: Buffer, error: OSError | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        future.set_result(bytes(data)) if error is None else future.set_exception(error)

    store.read(offset, length, done)
    return await future


async def settle(call: Callable[[Callable[[OSError | None], None]], None]) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: OSError | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        future.set_result(None) if error is None else future.set_exception(error)

    call(done)
    await future


async def write(store: FileStore, offset: int, data: Buffer) -> None:
    await settle(lambda done: store.write(offset, data, done))


async def test_read_write_flush(image: Path) -> None:
    store = FileStore.open(image)
    assert (store.block_count, store.ignored, store.name) == (64, 0, str(image))
    assert await read(store, 0, len(CONTENT)) == CONTENT
    await write(store, 1000, b"x" * 700)
    await settle(store.flush)
    assert await read(store, 999, 702) == CONTENT[999:1000] + b"x" * 700 + CONTENT[1700:1701]
    await store.close()
    await store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await read(store, 0, 512)
    assert content(image) == CONTENT[:1000] + b"x" * 700 + CONTENT[1700:]


Preadv = Callable[..., int]


@pytest.fixture(params=["nothing cached", "half cached", "unsupported"])
def preadv(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What RWF_NOWAIT does where the pages are not cached, or where the file system does not know it."""
    real = os.preadv
    flags_seen: list[int] = []

    def fake(fd: int, buffers: list[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        if flags and request.param == "nothing cached":
            raise BlockingIOError(errno.EAGAIN, "not now")
        if flags and request.param == "half cached":
            return real(fd, [memoryview(buffers[0])[: len(buffers[0]) // 2]], offset)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "never")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fake)
    yield flags_seen
    assert flags_seen.count(os.RWF_NOWAIT) == (1 if request.param == "unsupported" else 3)


async def test_reads_that_must_wait(image: Path, preadv: list[int]) -> None:
    store = FileStore.open(image)
    for _ in range(3):
        assert await read(store, 512, 5000) == CONTENT[512:5512]
    await store.close()


async def test_cached_reads_complete_inside_the_call(image: Path) -> None:
    store = FileStore.open(image)
    try:
        os.preadv(store._fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not know RWF_NOWAIT")
    answers: list[Buffer] = []
    store.read(0, 4096, lambda data, error: answers.append(data))
    assert answers == [CONTENT[:4096]]
    await store.close()


async def test_many_at_once_and_large(tmp_path: Path) -> None:
    path = tmp_path / "large.raw"
    content = random.Random(3).randbytes(5 << 20)
    path.write_bytes(bytes(len(content)))
    store = FileStore.open(path)
    step = 3 << 19
    await asyncio.gather(*(write(store, at, content[at : at + step]) for at in range(0, len(content), step)))
    assert await read(store, 0, len(content)) == content
    await store.close()


async def test_overlapping_writes_keep_their_order(image: Path) -> None:
    """Also when nobody waits: each read sees what was written before it was called."""
    store = FileStore.open(image)
    source = random.Random(5)
    shadow = bytearray(CONTENT)
    writes: list[OSError | None] = []
    for _ in range(300):
        at = source.randrange(60) * 512
        if source.random() < 0.7:
            data = source.randbytes(2048)
            store.write(at, data, writes.append)
            shadow[at : at + 2048] = data
        else:
            assert await read(store, at, 2048) == shadow[at : at + 2048]
    await settle(store.flush)
    assert set(writes) == {None}
    await store.close()
    assert content(image) == shadow


async def test_a_flush_comes_after_the_writes_before_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = os.pwrite

    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        order.append("write")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", lambda fd: order.append("sync"))
    store = FileStore.open(image)
    for index in range(10):
        store.write(index * 512, bytes(512), lambda error: None)
    await settle(store.flush)
    assert order == ["write"] * 10 + ["sync"]
    await store.close()


async def test_errors_reach_the_caller(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore.open(image)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    for name in ("preadv", "pwrite", "fdatasync"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="broken"):
        await read(store, 0, 512)
    with pytest.raises(OSError, match="broken"):
        await write(store, 0, b"x")
    with pytest.raises(OSError, match="broken"):
        await settle(store.flush)
    monkeypatch.undo()
    assert not store._writing
    await store.close()


async def test_a_file_that_shrank(image: Path) -> None:
    store = FileStore.open(image)
    os.truncate(image, 1024)
    assert await read(store, 0, 1024) == CONTENT[:1024]
    with pytest.raises(OSError, match="ends at byte 1024, it has shrunk"):
        await read(store, 512, 1024)
    with pytest.raises(OSError, match="ends before byte 1025, it has shrunk"):
        await write(store, 513, bytes(512))
    await write(store, 512, bytes(512))
    assert size(image) == 1024
    await store.close()


async def zero(store: FileStore, offset: int, length: int, *, unmap: bool) -> None:
    await settle(lambda done: store.zero(offset, length, done, unmap=unmap))


@pytest.mark.parametrize("holes_work", [True, False])
@pytest.mark.parametrize("unmap", [True, False])
async def test_zero(image: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, holes_work: bool) -> None:
    if not holes_work:
        monkeypatch.setattr(holes, "zero_range", lambda *_, **__: False)
    store = FileStore.open(image)
    await zero(store, 1536, 5120, unmap=unmap)
    assert await read(store, 0, len(CONTENT)) == CONTENT[:1536] + bytes(5120) + CONTENT[6656:]
    await zero(store, 0, len(CONTENT), unmap=unmap)
    await store.close()
    assert content(image) == bytes(len(CONTENT))


async def test_zeros_are_a_write_like_others(image: Path) -> None:
    store = FileStore.open(image)
    errors: list[OSError | None] = []
    for turn in range(50):
        store.write(0, bytes((turn + 1,)) * 4096, errors.append)
        store.zero(1024, 1024, errors.append, unmap=bool(turn & 1))
        data = await read(store, 0, 4096)
        assert data == bytes((turn + 1,)) * 1024 + bytes(1024) + bytes((turn + 1,)) * 2048
    await settle(store.flush)
    assert errors == [None] * 100
    os.truncate(image, 1024)
    with pytest.raises(OSError, match="ends before byte 2048, it has shrunk"):
        await zero(store, 1024, 1024, unmap=True)
    assert size(image) == 1024
    await store.close()


async def test_large_zeros_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.raw"
    path.write_bytes(b"\xaa" * (3 << 20))
    monkeypatch.setattr(holes, "zero_range", lambda *_, **__: False)
    store = FileStore.open(path)
    await zero(store, 512, (2 << 20) + 512, unmap=True)
    await store.close()
    assert content(path) == b"\xaa" * 512 + bytes((2 << 20) + 512) + b"\xaa" * ((1 << 20) - 1024)


async def test_unmap_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "large.raw"
    path.write_bytes(b"\xaa" * (1 << 20))
    store = FileStore.open(path)
    if not store.unmaps:
        pytest.skip("this file system has no holes")
    await settle(store.flush)
    before = os.stat(path).st_blocks
    await zero(store, 0, 1 << 20, unmap=False)
    assert os.stat(path).st_blocks >= before
    await zero(store, 0, 1 << 20, unmap=True)
    assert os.stat(path).st_blocks < before // 2
    assert size(path) == 1 << 20
    await store.close()


async def test_the_size_is_looked_at_again(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FileStore.open(image)
    for new, count in ((128 * 512 + 5, 128), (16 * 512, 128), (100, 128), (200 * 512, 200)):
        os.truncate(image, new)
        store.refresh()
        store.refresh()
        await settle(store.flush)
        assert store.block_count == count
    await write(store, 63 * 512, bytes(512))
    await store.close()


@pytest.mark.parametrize("size", [1 << 40, 3 << 40])
async def test_a_large_sparse_image(tmp_path: Path, size: int) -> None:
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        try:
            file.truncate(size)
        except OSError:
            pytest.skip("this file system has no such large files")
    store = FileStore.open(path)
    assert store.block_count == size // 512
    await write(store, size - 512, b"\xaa" * 512)
    assert await read(store, size - 1024, 1024) == bytes(512) + b"\xaa" * 512
    await store.close()
    assert os.stat(path).st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("sector", [512, 4096])
async def test_a_real_block_device(image: Path, sector: int) -> None:
    """A loop device. With sectors of 4096 bytes the kernel makes no zeros in parts of them: they are written."""
    image.write_bytes(b"\xaa" * 65536)
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(image)]
    try:
        device = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop devices for us here")
    try:
        store = FileStore.open(device)
        assert (store.block_count, store.unmaps) == (128, True)
        await zero(store, 512, 1024, unmap=True)
        await zero(store, 8192, 8192, unmap=True)
        await zero(store, 32768, 4096, unmap=False)
        await settle(store.flush)
        expected = bytearray(b"\xaa" * 65536)
        for begin, length in ((512, 1024), (8192, 8192), (32768, 4096)):
            expected[begin : begin + length] = bytes(length)
        assert await read(store, 0, 65536) == expected
        os.truncate(image, 131072)
        subprocess.run(["losetup", "--set-capacity", device], check=True, timeout=10)
        store.refresh()
        await settle(store.flush)
        assert store.block_count == 256
        await store.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=10)
    assert content(image)[:65536] == expected


async def test_block_size(image: Path) -> None:
    with image.open("ab") as file:
        file.write(bytes(512))
    store = FileStore.open(image, block_size=4096)
    assert (store.block_size, store.block_count, store.ignored) == (4096, 8, 512)
    await store.close()
    os.truncate(image, 4095)
    with pytest.raises(ImageError, match="has 4095 bytes, less than a block of 4096"):
        FileStore.open(image, block_size=4096)


async def test_read_only(image: Path) -> None:
    store = FileStore.open(image, read_only=True)
    with pytest.raises(OSError, match="read-only") as caught:
        await write(store, 0, b"x")
    assert caught.value.errno == errno.EROFS
    with pytest.raises(OSError, match="read-only"):
        await zero(store, 0, 512, unmap=False)
    assert not store.unmaps
    await settle(store.flush)
    assert await read(store, 0, 512) == CONTENT[:512]
    await store.close()
    assert content(image) == CONTENT


async def test_trailing_part_of_a_block(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    with image.open("ab") as file:
        file.write(b"tail")
    with caplog.at_level(logging.WARNING):
        store = FileStore.open(image)
    assert (store.block_count, store.ignored) == (64, 4)
    assert "the last 4 bytes are no whole block" in caplog.text
    await store.close()


async def test_locks(image: Path, tmp_path: Path) -> None:
    for first, second in [(False, False), (False, True), (True, False)]:
        store = FileStore.open(image, read_only=first)
        with pytest.raises(ImageError, match=r"disk\.raw is in use") as caught:
            FileStore.open(image, read_only=second)
        assert caught.value.reason is Reason.IN_USE
        assert caught.value.remedy
        await store.close()
    link = tmp_path / "link.raw"
    link.hardlink_to(image)
    stores = [FileStore.open(path, read_only=True) for path in (image, image, link)]
    for store in stores:
        await store.close()


async def test_qemu_has_the_image(image: Path) -> None:
    """QEMU takes shared locks on single bytes from 100 on of an image that it writes to."""
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_RDLCK, 0, 101, 1, 0))
        with pytest.raises(ImageError) as caught:
            FileStore.open(image)
        assert caught.value.reason is Reason.IN_USE
        await FileStore.open(image, read_only=True).close()
    finally:
        os.close(fd)


async def test_a_file_system_without_locks(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    store = FileStore.open(image)
    assert "cannot be locked (No locks available)" in caplog.text
    await store.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("missing", Reason.NOT_FOUND, "cannot be opened: no such file or directory"),
        ("below a file", Reason.NOT_FOUND, "cannot be opened: not a directory"),
        ("loop", Reason.NOT_FOUND, "cannot be opened: too many levels of symbolic links"),
        ("nul", Reason.NOT_FOUND, "is no path"),
        ("folder", Reason.NOT_A_FILE, "is a folder, not a disk image"),
        ("pipe", Reason.NOT_A_FILE, "is a device or a pipe, not a disk image"),
        ("socket", Reason.NOT_A_FILE, "is a device or a pipe, not a disk image"),
        ("device", Reason.NOT_A_FILE, "is a device or a pipe, not a disk image"),
        ("empty", Reason.EMPTY, "is empty"),
        ("small", Reason.EMPTY, "has 511 bytes, less than a block of 512"),
    ],
)
def test_what_is_no_image(tmp_path: Path, kind: str, reason: Reason, message: str, read_only: bool) -> None:
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
        FileStore.open(path, read_only=read_only)
    assert caught.value.reason is reason
    assert caught.value.message.endswith(message)
    assert "\n" not in caught.value.message
    assert open_descriptors() == before


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
        FileStore.open(image, read_only=read_only)
    assert caught.value.reason is reason
    assert bool(caught.value.remedy) is (reason is not Reason.IO_ERROR)
    if reason is Reason.NO_PERMISSION:
        assert ("read-only" in caught.value.remedy) is not read_only


def test_opening_breaks_off(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", refuse)
    before = open_descriptors()
    with pytest.raises(ImageError, match="cannot be opened: input/output error") as caught:
        FileStore.open(image)
    assert caught.value.reason is Reason.IO_ERROR
    assert open_descriptors() == before


@pytest.mark.parametrize(("read_only", "exclusive"), [(False, True), (True, False)])
def test_a_block_device_that_is_mounted(
    image: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool, exclusive: bool
) -> None:
    def mounted(path: Path, flags: int) -> int:
        assert bool(flags & os.O_EXCL) is exclusive
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "is_block_device", lambda self: True)
    monkeypatch.setattr(os, "open", mounted)
    with pytest.raises(ImageError, match="device or resource busy") as caught:
        FileStore.open(image, read_only=read_only)
    assert caught.value.reason is Reason.IN_USE


async def test_access_time_is_left_alone_where_that_is_allowed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    seen: list[int] = []

    def only_the_owner(path: Path, flags: int) -> int:
        seen.append(flags & os.O_NOATIME)
        if flags & os.O_NOATIME:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(path, flags)

    monkeypatch.setattr(os, "open", only_the_owner)
    store = FileStore.open(image, read_only=True)
    assert seen == [os.O_NOATIME, 0]
    assert await read(store, 0, 512) == CONTENT[:512]
    await store.close()


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


def test_the_loop_may_be_gone_before_the_write(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()
    real = os.pwrite

    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        gone.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)

    async def leave() -> FileStore:
        store = FileStore.open(image)
        store.write(0, b"\xaa" * len(CONTENT), lambda error: None)
        return store

    store = asyncio.run(leave())
    gone.set()
    asyncio.run(store.close())
    assert content(image) == b"\xaa" * len(CONTENT)


async def test_close_that_is_given_up_does_not_close_the_file_under_a_write(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 16))
    store = FileStore.open(path)
    gate = threading.Event()

    def wait() -> None:
        gate.wait(5)

    store._write_thread().run(wait, lambda error: None)
    results: list[OSError | None] = []
    store.write(0, b"y" * 4096, results.append)
    for _ in range(2):
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0.01)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    gate.set()
    await store.close()
    await asyncio.sleep(0)
    assert results == [None]
    assert path.read_bytes()[:4096] == b"y" * 4096


async def test_a_system_without_threads_is_an_error_of_the_medium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 16))
    store = FileStore.open(path)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = asyncio.get_running_loop().create_future()
    store.write(0, bytes(512), done.set_result)
    error = await done
    assert error.errno == errno.EAGAIN
    monkeypatch.undo()
    await store.close()
