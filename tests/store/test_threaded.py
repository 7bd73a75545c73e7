from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.store.support import CONTENT, content, read, settle

from farplug.store import FileStore
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


async def test_a_cancelled_close_does_not_close_the_file_during_a_write(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 16))
    store = FileStore.open(path)
    gate = threading.Event()

    def wait() -> None:
        gate.wait(5)

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
