from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import subprocess
from pathlib import Path

import pytest
from tests.store.support import CONTENT, content, read, settle, size, write, zero

from farplug.errors import ImageError
from farplug.store import CacheMode, FileStore, OverlayStore, holes
from farplug.usb import Buffer


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


async def test_many_at_once_and_large(tmp_path: Path) -> None:
    path = tmp_path / "large.raw"
    content = random.Random(3).randbytes(5 << 20)
    path.write_bytes(bytes(len(content)))
    store = FileStore.open(path)
    step = 3 << 19
    await asyncio.gather(*(write(store, at, content[at : at + step]) for at in range(0, len(content), step)))
    assert await read(store, 0, len(content)) == content
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
    with pytest.raises(OSError, match="ends at byte 1024: it has shrunk"):
        await read(store, 512, 1024)
    with pytest.raises(OSError, match="ends before byte 1025: it has shrunk"):
        await write(store, 513, bytes(512))
    await write(store, 512, bytes(512))
    assert size(image) == 1024
    await store.close()


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
    with pytest.raises(OSError, match="ends before byte 2048: it has shrunk"):
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


async def test_unmap_releases_space(tmp_path: Path) -> None:
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


async def test_the_size_is_checked_again(image: Path, caplog: pytest.LogCaptureFixture) -> None:
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
            pytest.skip("this file system does not support files of this size")
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
        device = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("loop devices are not available here")
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
        subprocess.run(["losetup", "--set-capacity", device], check=True, timeout=100)
        store.refresh()
        await settle(store.flush)
        assert store.block_count == 256
        await store.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=100)
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
    assert "the VM does not see the last 4 bytes" in caplog.text
    await store.close()


@pytest.mark.parametrize(
    ("cache", "order"),
    [
        (CacheMode.WRITEBACK, "write zero write sync"),
        (CacheMode.WRITETHROUGH, "write sync zero sync write sync"),
        (CacheMode.UNSAFE, "write zero write"),
    ],
)
async def test_cache_modes(image: Path, monkeypatch: pytest.MonkeyPatch, cache: CacheMode, order: str) -> None:
    log: list[str] = []
    pwrite = os.pwrite

    def write_logged(fd: int, data: Buffer, offset: int) -> int:
        log.append("write")
        return pwrite(fd, data, offset)

    def zero_logged(*_: object, **__: object) -> bool:
        log.append("zero")
        return True

    monkeypatch.setattr(os, "pwrite", write_logged)
    monkeypatch.setattr(os, "fdatasync", lambda fd: log.append("sync"))
    monkeypatch.setattr(holes, "zero_range", zero_logged)
    store = FileStore.open(image, cache=cache)
    assert store.write_cache is (cache is not CacheMode.WRITETHROUGH)
    await write(store, 0, bytes(512))
    await zero(store, 0, 512, unmap=True)
    answered: list[str] = []
    store.write(512, bytes(512), lambda error: answered.append("write"))
    await settle(store.flush)
    assert answered == ["write"]
    await store.close()
    assert " ".join(log) == order


async def test_without_a_write_cache_a_write_that_is_not_durable_fails(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    store = FileStore.open(image, cache=CacheMode.WRITETHROUGH)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="full"):
        await write(store, 0, bytes(512))
    await store.close()


@pytest.mark.parametrize("snapshot", [False, True])
def test_an_image_that_fails_while_it_is_opened(image: Path, monkeypatch: pytest.MonkeyPatch, snapshot: bool) -> None:
    def fail(fd: int) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(holes, "can_unmap", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match=r"disk\.raw cannot be opened: input/output error"):
        OverlayStore.open(image) if snapshot else FileStore.open(image)
    assert len(os.listdir("/proc/self/fd")) <= before
