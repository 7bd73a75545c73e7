"""Files of a peer: what is asked for, cached, read ahead, and what happens without an answer."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from functools import partial
from typing import Any

import pytest
from tests.app.test_run import ISO

from farplug.errors import ImageError, Reason
from farplug.store import remote
from farplug.store.base import never_stopped
from farplug.store.remote import (
    CHUNK,
    MAX_ASKED,
    SLICES,
    ChunkCache,
    RemoteFile,
    RemoteStore,
    open_remote_disk,
    open_remote_iso,
)
from farplug.usb.types import Buffer


class Peer:
    """A peer that answers at once, or when the test calls :meth:`answer`."""

    def __init__(self, content: bytes, cache: ChunkCache | None = None, *, answers: bool = True) -> None:
        self.content = content
        self.answers = answers
        self.asked: list[tuple[int, int, int]] = []
        self.errors: list[str] = []
        self.file = RemoteFile(
            "a.iso", len(content), "1", self._ask, cache or ChunkCache(), lambda error: self.errors.append(str(error))
        )

    def _ask(self, question: int, offset: int, length: int) -> None:
        self.asked.append((question, offset, length))
        if self.answers:
            asyncio.get_running_loop().call_soon(self.answer, question, offset, length)

    def answer(self, question: int, offset: int, length: int) -> None:
        self.file.answer(question, self.content[offset : offset + length], None)

    async def settled(self) -> list[int]:
        """Return the chunks that were asked for when nothing more is."""
        count = -1
        while count != len(self.asked):
            count = len(self.asked)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return self.offsets

    @property
    def offsets(self) -> list[int]:
        return [offset // CHUNK for _, offset, _ in self.asked]


async def read(file: RemoteFile | RemoteStore, offset: int, length: int) -> bytes:
    """Return what is read, or raise the error."""
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(data: Buffer, error: OSError | None) -> None:
        if error is None:
            future.set_result(bytes(data))
        else:
            future.set_exception(error)

    file.read(offset, length, done)
    async with asyncio.timeout(60):
        return await future


CONTENT = random.Random(1).randbytes(6 * CHUNK + 12345)


async def test_any_range_is_read() -> None:
    peer = Peer(CONTENT)
    rng = random.Random(2)
    for _ in range(100):
        offset = rng.randrange(len(CONTENT))
        length = rng.randrange(1, min(3 * CHUNK, len(CONTENT) - offset) + 1)
        assert await read(peer.file, offset, length) == CONTENT[offset : offset + length]
    assert len(peer.asked) == 7, "each chunk once"
    assert {length for _, _, length in peer.asked} == {CHUNK, 12345}
    results = await asyncio.gather(*(read(Peer(CONTENT).file, at * 1000, 5000) for at in range(50)))
    assert results == [CONTENT[at * 1000 : at * 1000 + 5000] for at in range(50)]


async def test_sequential_reads_are_read_ahead() -> None:
    peer = Peer(bytes(40 * CHUNK + 5))
    await read(peer.file, 0, 2048)
    assert await peer.settled() == [0, 1]
    await read(peer.file, 2048, 2048)
    assert await peer.settled() == [0, 1], "it does not go on to another chunk"
    await read(peer.file, CHUNK, 2048)
    assert await peer.settled() == [0, 1, 2, 3], "a few blocks were left out"
    await read(peer.file, 2 * CHUNK, 2048)
    assert await peer.settled() == [*range(7)]
    await read(peer.file, 2 * CHUNK - 4096, 2048)
    await read(peer.file, 3 * CHUNK, 2048)
    assert await peer.settled() == [*range(12)], "an earlier block does not end it"
    await read(peer.file, 30 * CHUNK, 2048)
    assert await peer.settled() == [*range(12), 30], "not sequential"
    for at in range(5, 2048 * 50, 2048):
        await read(peer.file, 30 * CHUNK + at, 2048)
    assert await peer.settled() == [*range(12), 30, 31], "one chunk, once"
    for at in range(31, 40):
        await read(peer.file, at * CHUNK, CHUNK)
    await read(peer.file, 40 * CHUNK, 5)
    assert await peer.settled() == [*range(12), *range(30, 41)], "there is nothing behind the end"


async def test_reads_of_a_guest_come_before_those_ahead_of_it() -> None:
    peer = Peer(bytes(40 * CHUNK), answers=False)

    async def answered(*numbers: int) -> None:
        for number in numbers:
            peer.answer(*peer.asked[peer.offsets.index(number)])
        await asyncio.sleep(0)

    reading = [asyncio.ensure_future(read(peer.file, at * CHUNK, CHUNK)) for at in range(3)]
    await asyncio.sleep(0)
    assert peer.offsets == [0, 1, 2, 3], "no more than MAX_ASKED"
    far = asyncio.ensure_future(read(peer.file, 30 * CHUNK, 10))
    await asyncio.sleep(0)
    await answered(0)
    assert peer.offsets[4:] == [30]
    await answered(1, 2, 3)
    assert peer.offsets[5:] == [], "what is far from the last read is not read ahead any more"
    await answered(30)
    await asyncio.gather(*reading, far)


async def test_a_chunk_that_was_dropped_is_not_read_ahead_again() -> None:
    peer = Peer(bytes(40 * CHUNK), ChunkCache(2))
    for at in range(20):
        await read(peer.file, at * CHUNK, CHUNK)
    for at in range(40):
        assert peer.offsets.count(at) <= 2, "once ahead, once when it is read"


async def test_few_questions_are_open() -> None:
    peer = Peer(CONTENT, answers=False)
    reading = [asyncio.ensure_future(read(peer.file, at * CHUNK, 10)) for at in (3, 0, 6, 1, 5, 2)]
    await asyncio.sleep(0)
    assert len(peer.asked) == MAX_ASKED
    peer.answer(*peer.asked[2])
    assert await reading[2] == CONTENT[6 * CHUNK :][:10], "answers come in any order"
    assert len(peer.asked) == MAX_ASKED + 1
    while len(peer.asked) < 6 or not all(one.done() for one in reading):
        for question in list(peer.asked):
            peer.answer(*question)  # answers that come twice have no effect
        await asyncio.sleep(0)


async def test_the_cache_is_bounded_and_shared() -> None:
    cache = ChunkCache(3)
    one, other = Peer(CONTENT, cache), Peer(CONTENT[::-1], cache)
    for file in (one.file, other.file):
        await read(file, 5 * CHUNK, 10)
        await read(file, 3 * CHUNK, 10)
    assert len(cache._chunks) == 3
    assert (one.offsets, other.offsets) == ([5, 3], [5, 3])
    await read(one.file, 3 * CHUNK, 10)
    assert one.offsets == [5, 3]
    await read(one.file, 5 * CHUNK, 10)
    assert one.offsets == [5, 3, 5]
    store = RemoteStore(one.file, "x", 512)
    await store.close()
    await store.close()
    assert {file for file, _ in cache._chunks} == {other.file}
    other.file.close()
    assert not cache._chunks


async def test_errors_of_the_peer() -> None:
    peer = Peer(CONTENT, answers=False)
    reading = asyncio.ensure_future(read(peer.file, CHUNK - 5, 10))
    await asyncio.sleep(0)
    peer.file.answer(1, b"", "the file has changed")
    with pytest.raises(OSError, match="the file has changed"):
        await reading
    assert peer.errors == ["[Errno 5] the file has changed"]
    asked = len(peer.asked)
    with pytest.raises(OSError, match="the file has changed"):
        await read(peer.file, 0, 10)  # the guest repeats the read
    assert (len(peer.asked), len(peer.errors)) == (asked, 1), "no question, and no second event"
    peer.file._failures.clear()  # time passes
    peer.answers = True
    assert await read(peer.file, 0, 10) == CONTENT[:10]
    peer.answers = False
    reading = asyncio.ensure_future(read(peer.file, 5 * CHUNK, 10))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match=f"needs {CHUNK} bytes, not 3"):
        peer.file.answer(peer.asked[-1][0], b"abc", None)
    with pytest.raises(OSError, match=f"3 bytes instead of {CHUNK}"):
        await reading
    assert len(peer.errors) == 2
    for question in (0, -1, 10**30):
        with pytest.raises(ValueError, match="is not the number of a read"):
            peer.file.answer(question, b"", None)


async def test_a_peer_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.01)
    peer = Peer(CONTENT, answers=False)
    results = await asyncio.gather(*(read(peer.file, at * CHUNK, 10) for at in range(7)), return_exceptions=True)
    assert all(isinstance(result, OSError) and result.errno == errno.ETIMEDOUT for result in results)
    assert len(peer.asked) >= MAX_ASKED
    assert len(peer.errors) == 1
    late = peer.asked[0]
    peer.answer(*late)
    peer.file._failures.clear()
    assert await read(peer.file, 0, 10) == CONTENT[:10], "the late answer is used"
    peer.file.close()
    assert not peer.file._timers


async def test_a_peer_that_goes() -> None:
    peer = Peer(CONTENT, answers=False)
    reading = asyncio.ensure_future(read(peer.file, 0, 10))
    await asyncio.sleep(0)
    closed: list[str] = []
    for name in ("open", "closed"):
        store = RemoteStore(peer.file, name, 512)
        store.lost = partial(closed.append, name)
    await store.close()
    peer.file.close()
    peer.file.close()
    with pytest.raises(OSError, match="is not offered any more"):
        await reading
    with pytest.raises(OSError, match="is not offered any more"):
        await read(peer.file, 0, 10)
    assert closed == ["open"]
    assert not peer.file._timers


async def test_what_was_read() -> None:
    peer = Peer(bytes(SLICES * 4096))
    assert peer.file.touched == bytes(SLICES // 8)
    await read(peer.file, 0, 1)
    await read(peer.file, 4095 + 8 * 4096, 2)
    assert peer.file.touched == b"\x80\x00\xc0"[:1] + b"\xc0" + bytes(SLICES // 8 - 2)
    assert (peer.file.bytes_read, peer.file.last_offset) == (3, 4095 + 8 * 4096)
    await read(peer.file, 0, SLICES * 4096)
    assert peer.file.touched == b"\xff" * (SLICES // 8)


async def test_images_are_checked() -> None:
    iso = ISO + os.urandom(CHUNK)
    store = await open_remote_iso(Peer(iso).file, "client:m1/a.iso")
    assert (store.block_size, store.block_count, store.name) == (2048, len(iso) // 2048, "client:m1/a.iso")
    assert (store.file.bytes_read, store.read_only) == (0, True)
    other = await open_remote_iso(Peer(iso).file, "x")
    assert other.serial_number == store.serial_number
    cases: list[tuple[bytes, Any, Reason, str]] = [
        (bytes(100000), open_remote_iso, Reason.NOT_AN_ISO, "a.iso is not an ISO image"),
        (b"QFI\xfb\0\0\0\3".ljust(100000, b"\0"), open_remote_disk, Reason.NOT_RAW, "a.iso is a qcow2 image"),
        (bytes(2047), open_remote_iso, Reason.EMPTY, "a.iso has 2047 bytes"),
        (bytes(511), open_remote_disk, Reason.EMPTY, "a.iso has 511 bytes"),
    ]
    for content, opener, reason, text in cases:
        with pytest.raises(ImageError, match=text) as caught:
            await opener(Peer(content).file, "x")
        assert caught.value.reason is reason
    await open_remote_iso(Peer(bytes(100000)).file, "x", force=True)
    disk = await open_remote_disk(Peer(bytes(8192)).file, "x", block_size=4096)
    assert disk.block_count == 2
    failed = Peer(iso, answers=False)
    opening = asyncio.ensure_future(open_remote_iso(failed.file, "x"))
    await asyncio.sleep(0)
    failed.file.answer(1, b"", "no such file")
    with pytest.raises(ImageError, match="cannot be read: no such file") as caught:
        await opening
    assert caught.value.reason is Reason.IO_ERROR


async def test_nothing_is_written() -> None:
    store = RemoteStore(Peer(CONTENT).file, "x", 512)
    errors: list[OSError | None] = []
    store.write(0, bytes(512), errors.append)
    store.zero(0, 512, errors.append, unmap=True, stopped=never_stopped)
    store.flush(errors.append)
    assert [error and error.errno for error in errors] == [errno.EROFS, errno.EROFS, None]
