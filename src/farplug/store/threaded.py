"""The base of stores in files: calls that may block run in threads, in an order that a disk can rely on."""

from __future__ import annotations

import asyncio
import errno
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial

from farplug.rate_limit import limited_logger
from farplug.store.base import CompareDone, ReadDone, Stopped, Store, WriteDone, never_stopped
from farplug.store.thread_pool import ThreadPool, attempt
from farplug.usb.types import Buffer

READER_THREADS = 4
"""How many reads may wait for the medium at the same time."""

MAX_INLINE = 1 << 20
"""Bytes of a read that may complete in the call."""

MAX_BEHIND = 1 << 20
"""Bytes of a write that may be done before it is in the page cache."""

MAX_BYTES_BEHIND = 4 << 20
"""Bytes of all writes that may be done before they are in the page cache."""

FREE_SPACE = 1 << 30
"""Free bytes of the file system below which each write is done when it is in the page cache."""

ROOM_CHECKED_FOR = 1.0
"""Seconds in which a file system with FREE_SPACE will not become so full that MAX_BYTES_BEHIND fail."""

PIECE = 256 << 10
"""Bytes of the buffer that a thread uses where no data goes to or comes from the caller."""

log = limited_logger(__name__)


class ThreadedStore(Store):
    """A store whose operations may block.

    Reads of cached pages complete in the call if that takes a bounded time, other reads in a few threads; a buffer is
    allocated in the thread, when the read begins. Writes and flushes run in one thread, in
    order: on most file systems a write may block for long (dirty throttling, a journal). So a flush covers every write
    before it, and overlapping writes keep their order. A read that overlaps a pending write is queued behind it.

    With a write cache, a write of up to MAX_BEHIND is done before it is made, as in a real disk; the next flush reports
    its error. So that a full file system remains an error of the write itself, this needs FREE_SPACE.

    A subclass implements the methods that block; they are called in the threads.
    """

    def __init__(self) -> None:
        self._readers: ThreadPool | None = None
        self._writer: ThreadPool | None = None
        self._writing: dict[int, tuple[int, int]] = {}
        """Ranges (start, end) of the pending writes, by an arbitrary key."""
        self._next_key = 0
        self._behind: list[tuple[int, int, Buffer]] = []
        """Writes that are done, and that the thread gets after this turn of the event loop: key, offset, data."""
        self._bytes_behind = 0
        """Bytes of all writes that are done and not made."""
        self._made: deque[int] = deque()
        """Keys of writes that were done before, which the thread has made."""
        self._room_until = 0.0
        """The time, of time.monotonic, until which the file system has room. Set by the thread for writes."""
        self._late_error: OSError | None = None
        """The first error of a write that was done before. Set by the thread for writes; a flush reports it."""
        self._closing: asyncio.Future[None] | None = None

    @abstractmethod
    def _read_cached(self, data: memoryview, offset: int) -> int:
        """Read what the page cache has; return the number of bytes, from the start of ``data``.

        Called on the event loop: 0 if that would take more than a few system calls.
        """

    @abstractmethod
    def _read_blocking(self, data: memoryview, offset: int) -> None:
        """Fill ``data``. Called in a thread."""

    @abstractmethod
    def _write_blocking(self, data: memoryview, offset: int) -> None:
        """Write all of ``data``. Called in the thread for writes."""

    @abstractmethod
    def _zero_blocking(self, offset: int, length: int, unmap: bool, stopped: Stopped) -> None:
        """Write zeros to a range, until ``stopped`` returns True. Called in the thread for writes."""

    @abstractmethod
    def _flush_blocking(self) -> None:
        """Flush the completed writes. Called in the thread for writes."""

    def _free_space(self) -> int:
        """Return the free bytes of the file system that grows with writes; 0: each write is made before it is done.

        Called in the thread for writes.
        """
        return 0

    @abstractmethod
    def _close_files(self) -> None:
        """Close all files; nothing is pending. Called in a thread."""

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        data: Buffer = b""
        pool = self._read_pool(offset, length)
        if length <= MAX_INLINE and pool is not self._writer:
            buffer = bytearray(length)
            try:
                got = self._read_cached(memoryview(buffer), offset)
            except OSError as error:
                done(b"", error)
                return
            if got == length:
                done(buffer, None)
                return
            del buffer  # free while the read waits for a thread

        def read() -> None:
            nonlocal data
            data = bytearray(length)
            self._read_blocking(memoryview(data), offset)

        pool.run(read, lambda error: done(b"" if error else data, error))

    def verify(self, offset: int, length: int, done: WriteDone) -> None:
        def verify() -> None:
            buffer = memoryview(bytearray(min(length, PIECE)))
            for begin in range(0, length, PIECE):
                self._read_blocking(buffer[: length - begin], offset + begin)

        self._read_pool(offset, length).run(verify, done)

    def compare(self, offset: int, data: Buffer, done: CompareDone) -> None:
        length = len(data)
        equal = False

        def compare() -> None:
            nonlocal equal
            view = memoryview(data)
            for begin in range(0, length, PIECE):
                found = bytearray(min(PIECE, length - begin))  # compared in one call, unlike a memoryview
                self._read_blocking(memoryview(found), offset + begin)
                if found != view[begin : begin + PIECE]:
                    return
            equal = True

        self._read_pool(offset, length).run(compare, lambda error: done(equal, error))

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        length = len(data)
        if length > MAX_BEHIND or not self.write_cache:
            self._change(offset, length, lambda: self._write_blocking(memoryview(data), offset), done)
            return
        self._forget_made()
        if self._bytes_behind + length > MAX_BYTES_BEHIND or time.monotonic() >= self._room_until:
            self._change(offset, length, lambda: self._write_checked(data, offset), done)
            return
        if not self._behind:
            # Not at once: the thread would compete with this one for the interpreter before the answer is sent.
            asyncio.get_running_loop().call_soon(self._post_behind)
        self._behind.append((self._pending_write(offset, length), offset, data))
        self._bytes_behind += length
        done(None)

    def _pending_write(self, offset: int, length: int) -> int:
        """Note a write of a range as pending. Returns its key."""
        key = self._next_key
        self._next_key += 1
        self._writing[key] = (offset, offset + length)
        return key

    def _forget_made(self) -> None:
        """Forget the writes that were done before the thread has made them."""
        while self._made:
            start, end = self._writing.pop(self._made.popleft())
            self._bytes_behind -= end - start

    def _post_behind(self) -> None:
        """Pass the writes that are done to the thread: before anything that was called after them."""
        if self._behind and self._writer is not None:
            behind, self._behind = self._behind, []
            self._writer.post(lambda: self._write_behind(behind))

    def _write_behind(self, writes: list[tuple[int, int, Buffer]]) -> None:
        for key, offset, data in writes:
            error = attempt(partial(self._write_checked, data, offset))
            if error is not None:
                log.warning("%s: writing failed: %s", self.name, error)
                self._room_until = 0.0
                self._late_error = self._late_error or error
            self._made.append(key)

    def _write_checked(self, data: Buffer, offset: int) -> None:
        """Write, and check once in a while whether later writes may be done before they are made."""
        self._write_blocking(memoryview(data), offset)
        now = time.monotonic()
        if now >= self._room_until and self._late_error is None and self._free_space() >= FREE_SPACE:
            self._room_until = now + ROOM_CHECKED_FOR

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self._change(offset, length, lambda: self._zero_blocking(offset, length, unmap, stopped), done)

    def fill(self, offset: int, block: bytes, count: int, done: WriteDone) -> None:
        length = len(block) * count

        def fill() -> None:
            data = memoryview(block * min(count, max(1, PIECE // len(block))))
            for begin in range(0, length, len(data)):
                self._write_blocking(data[: length - begin], offset + begin)

        self._change(offset, length, fill, done)

    def _change(self, offset: int, length: int, change: Callable[[], None], done: WriteDone) -> None:
        """Call ``change`` for a range in the thread for writes."""
        if self.read_only:
            done(OSError(errno.EROFS, f"{self.name} is read-only"))
            return
        key = self._pending_write(offset, length)

        def durable_change() -> None:
            change()
            if not self.write_cache:
                self._flush_blocking()

        def finish(error: OSError | None) -> None:
            del self._writing[key]
            done(error)

        self._write_pool().run(change if self.write_cache else durable_change, finish)

    def flush(self, done: WriteDone) -> None:
        if self.read_only:
            done(None)
            return
        # Without a write cache, each write before this flush was made durable by itself.
        self._write_pool().run(self._flush_all if self.write_cache else lambda: None, done)

    def _flush_all(self) -> None:
        """Flush, and report the error of a write that was done before."""
        self._flush_blocking()
        if self._late_error is not None:
            error, self._late_error = self._late_error, None
            raise error

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        # When the caller is cancelled, the files must not be closed during a write.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._post_behind()
        running = [pool for pool in (self._writer, self._readers) if pool is not None]
        self._writer = self._readers = None
        for pool in running:
            await asyncio.to_thread(pool.stop)
        await asyncio.to_thread(self._close_files)

    def _overlaps(self, start: int, end: int) -> bool:
        self._forget_made()
        return any(start < other_end and other_start < end for other_start, other_end in self._writing.values())

    def _read_pool(self, offset: int, length: int) -> ThreadPool:
        """Return the threads for a read of a range: after the pending writes to it."""
        if self._writing and self._overlaps(offset, offset + length):
            return self._write_pool()
        if self._readers is None:
            self._readers = ThreadPool(READER_THREADS, "farplug-read")
        return self._readers

    def _write_pool(self) -> ThreadPool:
        if self._writer is None:
            self._writer = ThreadPool(1, "farplug-write")
        self._post_behind()
        return self._writer
