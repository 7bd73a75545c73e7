from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.store.support import CONTENT, content, read, settle, write, zero

from farplug.store import CacheMode, FileStore
from farplug.store.threaded import FREE_SPACE, MAX_BEHIND, MAX_BYTES_BEHIND
from farplug.usb import Buffer

Preadv = Callable[..., int]


@pytest.fixture(params=["nothing cached", "half cached", "unsupported"])
def preadv(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """RWF_NOWAIT where pages are not cached, or where the file system does not support it."""
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
        os.preadv(store._image.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not support RWF_NOWAIT")
    answers: list[Buffer] = []
    store.read(0, 4096, lambda data, error: answers.append(data))
    assert answers == [CONTENT[:4096]]
    await store.close()


async def test_overlapping_writes_keep_their_order(image: Path) -> None:
    """Also of writes that are not awaited: each read returns the writes that were called before it."""
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


class Pwrite:
    """Replaces os.pwrite; records what was written, and waits for ``open``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.error: OSError | ValueError | None = None
        self._real = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd: int, data: Buffer, offset: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert self.open.wait(100)
        if self.error is not None:
            raise self.error
        self.written.append(offset)
        return self._real(fd, data, offset)


@pytest.fixture
def pwrite(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pwrite]:
    pwrite = Pwrite(monkeypatch)
    yield pwrite
    pwrite.open.set()


async def roomy(image: Path) -> FileStore:
    """Return a store that has found free space."""
    store = FileStore.open(image)
    await write(store, 0, CONTENT[:512])
    assert store._room_until > 0
    store._room_until = float("inf")
    return store


async def test_a_small_write_is_done_before_it_is_made(image: Path, pwrite: Pwrite) -> None:
    """Reads, large writes and flushes that are called later come after it."""
    store = await roomy(image)
    pwrite.open.clear()
    results: list[OSError | None] = []
    for block in range(1, 5):
        store.write(block * 512, b"a" * 512, results.append)
    assert results == [None] * 4
    later = [
        asyncio.ensure_future(read(store, 0, 2560)),
        asyncio.ensure_future(zero(store, 512, 512, unmap=False)),
        asyncio.ensure_future(read(store, 512, 1024)),
        asyncio.ensure_future(settle(store.flush)),
    ]
    assert await read(store, 8192, 512) == CONTENT[8192:8704]  # not overlapping: not delayed
    assert pwrite.written == [0]
    assert not any(task.done() for task in later)
    pwrite.open.set()
    before, _, after, _ = await asyncio.gather(*later)
    assert before == CONTENT[:512] + b"a" * 2048
    assert after == bytes(512) + b"a" * 512
    assert pwrite.written[:5] == [0, 512, 1024, 1536, 2048]
    await store.close()


async def test_small_writes_that_are_done_are_made_by_close(image: Path) -> None:
    store = await roomy(image)
    store.write(512, b"b" * 512, lambda error: None)
    await store.close()
    assert content(image)[512:1024] == b"b" * 512


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("a bug")])
async def test_the_error_of_a_write_that_is_done_is_that_of_the_next_flush(
    image: Path, pwrite: Pwrite, error: OSError | ValueError
) -> None:
    store = await roomy(image)
    pwrite.error = error
    for _ in range(2):
        await write(store, 512, bytes(512))
    with pytest.raises(OSError, match=str(error).rpartition("] ")[2]):
        await settle(store.flush)
    with pytest.raises(OSError, match=str(error).rpartition("] ")[2]):
        await write(store, 512, bytes(512))  # errors are those of the write itself now
    pwrite.error = None
    await settle(store.flush)
    await write(store, 512, bytes(512))
    assert store._room_until > 0
    await store.close()


async def test_writes_wait_for_the_thread_without_free_space(
    image: Path, pwrite: Pwrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileStore, "_free_space", lambda store: FREE_SPACE - 1)
    store = FileStore.open(image)
    await write(store, 0, bytes(512))
    pwrite.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        await write(store, 512, bytes(512))
    await store.close()


async def test_the_bytes_that_are_not_made_are_bounded(tmp_path: Path, pwrite: Pwrite) -> None:
    path = tmp_path / "large.raw"
    count = 2 * MAX_BYTES_BEHIND // MAX_BEHIND
    path.touch()
    os.truncate(path, count * MAX_BEHIND)
    store = await roomy(path)
    pwrite.open.clear()
    results: list[OSError | None] = []
    for number in range(count):
        store.write(number * MAX_BEHIND, bytes(MAX_BEHIND), results.append)
    assert len(results) == count // 2
    pwrite.open.set()
    await settle(store.flush)
    assert results == [None] * count
    assert not store._overlaps(0, count * MAX_BEHIND)
    assert not store._bytes_behind
    await store.close()


async def test_a_store_without_a_write_cache_makes_writes_first(image: Path, pwrite: Pwrite) -> None:
    store = FileStore.open(image, cache=CacheMode.WRITETHROUGH)
    store._room_until = float("inf")
    pwrite.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        await write(store, 0, bytes(512))
    await store.close()


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


def test_the_loop_may_be_gone_before_the_write(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()
    real = os.pwrite

    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        gone.wait(100)
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


async def test_a_cancelled_close_does_not_close_the_file_during_a_write(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 16))
    store = FileStore.open(path)
    gate = threading.Event()

    def wait() -> None:
        gate.wait(100)

    store._write_pool().run(wait, lambda error: None)
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
