"""A store in a file of a peer, read-only: its blocks are asked for in chunks, and a part of them is cached.

The peer is a client of a session, a browser for example, that answers each question with bytes or an error.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from farplug.errors import ImageError, Reason, Remedy
from farplug.store.base import BLOCK_SIZE, ReadDone, Stopped, Store, WriteDone, never_stopped
from farplug.store.content import BEGIN_SIZE, CD_BLOCK_SIZE, END_SIZE, Content
from farplug.store.image import check_raw
from farplug.store.iso import check_iso, check_iso_size
from farplug.usb.types import Buffer

log = logging.getLogger(__name__)

CHUNK: Final = 1 << 20
"""Bytes that are asked for at a time, from a multiple of them on."""
CACHE_CHUNKS: Final = 64
"""Chunks of all files of a cache; of more, those that were not used for the longest time are dropped."""
MAX_ASKED: Final = 4
"""Questions about a file that are not answered."""
MAX_AHEAD: Final = 8
"""Chunks behind sequential reads that are asked for, at most. The first read asks for one, and each chunk that a guest
reaches doubles the number. They wait until fewer than MAX_ASKED questions are open, and no read of a guest waits."""
TIMEOUT: Final = 20.0
"""Seconds from the read of a guest until it fails without an answer."""
FAILURE_TIME: Final = 5.0
"""Seconds in which a chunk that failed fails again, without a question: a guest repeats a read that failed."""
SLICES: Final = 256
"""Parts of a file of which a progress says whether the guest has read there."""
_EXPIRED: Final = 16
"""Questions whose late answers are still useful."""

Ask: TypeAlias = Callable[[int, int, int], None]
"""Asks the peer: the number of the question, an offset, a length. The answer is :meth:`RemoteFile.answer`."""


class ChunkCache:
    """Chunks of files, the least recently used of which are dropped."""

    def __init__(self, size: int = CACHE_CHUNKS) -> None:
        self._size = size
        self._chunks: OrderedDict[tuple[object, int], bytes] = OrderedDict()

    def get(self, file: object, number: int) -> bytes | None:
        """Return a chunk of a file; None: it is not here."""
        chunk = self._chunks.get((file, number))
        if chunk is not None:
            self._chunks.move_to_end((file, number))
        return chunk

    def put(self, file: object, number: int, chunk: bytes) -> None:
        """Add a chunk of a file."""
        self._chunks[file, number] = chunk
        if len(self._chunks) > self._size:
            self._chunks.popitem(last=False)

    def drop(self, file: object) -> None:
        """Drop all chunks of a file."""
        for key in [key for key in self._chunks if key[0] is file]:
            del self._chunks[key]


class _Read:
    """A read of a guest, until all its chunks are there."""

    def __init__(self, file: RemoteFile, offset: int, length: int, done: ReadDone, *, counted: bool) -> None:
        self._file = file
        self._counted = counted
        self._offset = offset
        self._length = length
        self._done: ReadDone | None = done
        self._chunks: dict[int, bytes] = {}
        self.numbers = range(offset // CHUNK, (offset + length - 1) // CHUNK + 1)

    def take(self, number: int, chunk: bytes) -> None:
        """Take a chunk."""
        self._chunks[number] = chunk
        if len(self._chunks) == len(self.numbers) and self._done is not None:
            start = self._offset - self.numbers[0] * CHUNK
            if len(self.numbers) == 1:
                data: Buffer = memoryview(chunk)[start : start + self._length]
            else:
                views = [memoryview(self._chunks[number]) for number in self.numbers]
                views[0] = views[0][start:]
                views[-1] = views[-1][: self._offset + self._length - self.numbers[-1] * CHUNK]
                data = b"".join(views)
            done, self._done = self._done, None
            if self._counted:
                self._file.has_read(self._offset, self._length)
            done(data, None)

    def fail(self, error: OSError) -> None:
        """Fail, unless the read has failed already."""
        if self._done is not None:
            done, self._done = self._done, None
            done(b"", error)


class RemoteFile:
    """A file of a peer.

    Args:
        name: of the file, without a folder.
        size: in bytes, at least 1.
        version: a text that changes when the file does, such as its time of modification; empty: unknown.
        ask: asks the peer.
        cache: where chunks are stored.
        failed: called with the error of the peer, or a timeout, when a read of a guest fails; once until one succeeds.
        progress: called when a guest has read.

    Attributes:
        name: as above.
        size: as above.
        version: as above.
        is_open: the peer has the file, and answers.
        users: the stores that use the file.
        bytes_read: by guests, in all.
        last_offset: of the last read of a guest.
    """

    def __init__(
        self,
        name: str,
        size: int,
        version: str,
        ask: Ask,
        cache: ChunkCache,
        failed: Callable[[OSError], None] = lambda error: None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.size = size
        self.version = version
        self.is_open = True
        self.users: set[RemoteStore] = set()
        self.bytes_read = self.last_offset = 0
        self._ask = ask
        self._cache = cache
        self._failed = failed
        self._progress = progress
        self._reports_failure = True
        self._waiting: dict[int, list[_Read]] = {}
        """The reads that wait for a chunk; none: it is read ahead."""
        self._queue: deque[int] = deque()
        """The chunks that reads wait for, and that were not asked for yet."""
        self._asked: dict[int, int] = {}
        """The chunks that were asked for, by the number of the question."""
        self._expired: OrderedDict[int, int] = OrderedDict()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._failures: dict[int, tuple[OSError, float]] = {}
        self._next_question = 1
        self._next_offset = 0
        """Where a sequential read would begin."""
        self._following = 0
        """The chunk behind the last read."""
        self._window = 0
        """Chunks that are asked for behind sequential reads."""
        self._ahead = range(0)
        """Those of them that were not asked for yet."""
        self._touched = bytearray(SLICES // 8)

    @property
    def touched(self) -> bytes:
        """Return a bit for each of SLICES parts of the file, the first one the highest bit of the first byte."""
        return bytes(self._touched)

    def read(self, offset: int, length: int, done: ReadDone, *, counted: bool = True) -> None:
        """Read bytes of the file; see :meth:`farplug.store.base.Store.read`.

        Args:
            offset: in the file.
            length: at least 1.
            done: called with the bytes or the error.
            counted: it is a read of a guest.
        """
        if not self.is_open:
            done(b"", OSError(errno.ENODEV, f"{self.name} is not offered any more"))
            return
        read = _Read(self, offset, length, done, counted=counted)
        for number in read.numbers:
            chunk = self._cache.get(self, number)
            if chunk is not None:
                read.take(number, chunk)
            elif (error := self._failure(number)) is not None:
                read.fail(error)
                break
            else:
                self._want(number).append(read)
        self._look_ahead(offset, length)
        self._ask_next()

    def _look_ahead(self, offset: int, length: int) -> None:
        """Determine which chunks are asked for before a guest reads them."""
        gap = offset - self._next_offset
        if -CHUNK <= gap < 0:
            return  # the guest reads a block again, or has changed the order of its reads
        self._next_offset = offset + length
        following = (offset + length - 1) // CHUNK + 1
        if not 0 <= gap <= CHUNK:  # a file system leaves out a few blocks
            self._window, self._ahead = 0, range(0)
        elif following > self._following or not self._window:
            self._window = min(max(2 * self._window, 1), MAX_AHEAD)
            end = min(following + self._window, -(-self.size // CHUNK))
            self._ahead = range(max(following, self._ahead.start), end)
        self._following = following

    def _failure(self, number: int) -> OSError | None:
        error, until = self._failures.get(number, (None, 0.0))
        if error is not None and asyncio.get_running_loop().time() >= until:
            del self._failures[number]
            return None
        return error

    def _knows(self, number: int) -> bool:
        return number in self._waiting or self._cache.get(self, number) is not None or number in self._failures

    def _want(self, number: int) -> list[_Read]:
        """Ask for a chunk when it is its turn; return the reads that wait for it."""
        if number not in self._waiting:
            self._waiting[number] = []
            self._queue.append(number)
            self._timers[number] = asyncio.get_running_loop().call_later(TIMEOUT, self._timed_out, number)
        return self._waiting[number]

    def _ask_next(self) -> None:
        while len(self._asked) < MAX_ASKED:
            if not self._queue:
                if not self._ahead:
                    break
                following, self._ahead = self._ahead.start, self._ahead[1:]
                if self._knows(following):
                    continue
                self._want(following)
            number = self._queue.popleft()
            question = self._next_question
            self._next_question += 1
            self._asked[question] = number
            self._ask(question, number * CHUNK, self._length(number))

    def _length(self, number: int) -> int:
        return min(CHUNK, self.size - number * CHUNK)

    def is_asked(self, question: int) -> bool:
        """Return whether an answer to a question is awaited."""
        return question in self._asked

    def answer(self, question: int, data: Buffer, error: str | None) -> None:
        """Take the answer to a question. A late one is used, too; one that comes twice has no effect.

        Args:
            question: its number.
            data: the bytes that were asked for; empty if there is an error.
            error: why the peer cannot read them, for people; None: it can.

        Raises:
            ValueError: the question was never asked, or the data has another length. In the latter case the reads of
                the chunk have failed.
        """
        if not 0 < question < self._next_question:
            raise ValueError(f"{question} is not the number of a read")
        number = self._asked.pop(question, None)
        if number is None:
            number = self._expired.pop(question, None)
        if number is None:
            return
        wrong = error is None and len(data) != self._length(number)
        if wrong:
            error = f"{len(data)} bytes instead of {self._length(number)}"
        if error is None:
            self._arrived(number, bytes(data))
        else:
            self._fail(number, OSError(errno.EIO, error))
        self._ask_next()
        if wrong:
            raise ValueError(f"the read {question} needs {self._length(number)} bytes, not {len(data)}")

    def _arrived(self, number: int, chunk: bytes) -> None:
        self._failures.pop(number, None)
        self._cache.put(self, number, chunk)
        self._reports_failure = True
        for read in self._no_longer_wanted(number):
            read.take(number, chunk)

    def _no_longer_wanted(self, number: int) -> list[_Read]:
        timer = self._timers.pop(number, None)
        if timer is not None:
            timer.cancel()
        return self._waiting.pop(number, [])

    def _timed_out(self, number: int) -> None:
        for question in [question for question, asked in self._asked.items() if asked == number]:
            del self._asked[question]
            self._expired[question] = number
            if len(self._expired) > _EXPIRED:
                self._expired.popitem(last=False)
        if number in self._queue:
            self._queue.remove(number)
        self._fail(number, OSError(errno.ETIMEDOUT, f"no answer within {TIMEOUT:g} s"))
        self._ask_next()

    def _fail(self, number: int, error: OSError) -> None:
        if number in self._waiting:
            self._failures[number] = error, asyncio.get_running_loop().time() + FAILURE_TIME
            if len(self._failures) > CACHE_CHUNKS:
                del self._failures[next(iter(self._failures))]
        reads = self._no_longer_wanted(number)
        if reads and self._reports_failure:
            self._reports_failure = False
            self._failed(error)
        for read in reads:
            read.fail(error)

    def has_read(self, offset: int, length: int) -> None:
        """Count a read of a guest that succeeded."""
        self.bytes_read += length
        self.last_offset = offset
        first, last = offset * SLICES // self.size, (offset + length - 1) * SLICES // self.size
        for part in range(first, last + 1):
            self._touched[part // 8] |= 0x80 >> part % 8
        self._progress()

    # Users and the end

    def forget(self) -> None:
        """Drop the chunks that are cached: no store uses the file now."""
        self._cache.drop(self)

    def close(self) -> None:
        """Fail all reads: the peer has gone, or does not offer the file any more. A second call has no effect."""
        if not self.is_open:
            return
        self.is_open = False
        self._asked.clear()
        self._expired.clear()
        self._queue.clear()
        self._ahead = range(0)
        self._cache.drop(self)
        for number in list(self._waiting):
            for read in self._no_longer_wanted(number):
                read.fail(OSError(errno.ENODEV, f"{self.name} is not offered any more"))
        for store in list(self.users):
            store.lost()


class RemoteStore(Store):
    """The blocks of a file of a peer. Made by :func:`open_remote_iso` and :func:`open_remote_disk`.

    Args:
        file: the file.
        name: for people.
        block_size: bytes.

    Attributes:
        file: as above.
        removable: the medium is ejected when the peer has gone.
        lost: called when the file is closed, unless the store is before.
    """

    read_only = True
    write_cache = False

    def __init__(self, file: RemoteFile, name: str, block_size: int) -> None:
        self.name = name
        self.file = file
        self.block_size = block_size
        self.block_count = file.size // block_size
        what = f"{file.name}\0{file.size}\0{file.version}"
        self.serial_number = hashlib.sha256(b"farplug file\0" + what.encode(errors="replace")).hexdigest()[:16].upper()
        self.removable = False
        self.lost: Callable[[], None] = lambda: None
        file.users.add(self)

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        self.file.read(offset, length, done)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        done(OSError(errno.EROFS, f"{self.name} is read-only"))

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self.write(offset, b"", done)

    def flush(self, done: WriteDone) -> None:
        done(None)

    async def close(self) -> None:
        self.file.users.discard(self)
        if not self.file.users:
            self.file.forget()


async def open_remote_iso(file: RemoteFile, name: str, *, force: bool = False) -> RemoteStore:
    """Return the blocks of an ISO image, of 2048 bytes.

    Args:
        file: the image.
        name: for people, of the store.
        force: also an image without a volume of ISO 9660, High Sierra or UDF.

    Raises:
        ImageError: NOT_AN_ISO, TOO_LARGE, EMPTY; IO_ERROR: the peer cannot read the file, or does not answer.
    """
    content = await _content(file, CD_BLOCK_SIZE)
    path = Path(file.name)
    if not force:
        check_iso(path, content)
    check_iso_size(path, file.size // CD_BLOCK_SIZE)
    return RemoteStore(file, name, CD_BLOCK_SIZE)


async def open_remote_disk(
    file: RemoteFile, name: str, *, block_size: int = BLOCK_SIZE, force: bool = False
) -> RemoteStore:
    """Return the blocks of a RAW image.

    Args:
        file: the image.
        name: for people, of the store.
        block_size: bytes.
        force: also an image of another format.

    Raises:
        ImageError: NOT_RAW, EMPTY; IO_ERROR: the peer cannot read the file, or does not answer.
    """
    content = await _content(file, block_size)
    if not force:
        check_raw(Path(file.name), content)
    return RemoteStore(file, name, block_size)


async def _content(file: RemoteFile, block_size: int) -> Content:
    """Return the first and the last bytes of a file, which has a block at least."""
    if file.size < block_size:
        raise ImageError(
            f"{file.name} has {file.size} bytes: not a block of {block_size} bytes",
            reason=Reason.EMPTY,
            remedy="check that it was copied or downloaded completely",
        )
    begin = await _read(file, 0, min(BEGIN_SIZE, file.size))
    end = await _read(file, max(file.size - END_SIZE, 0), min(END_SIZE, file.size))
    return Content(file.size, begin, end)


async def _read(file: RemoteFile, offset: int, length: int) -> bytes:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(data: Buffer, error: OSError | None) -> None:
        if future.done():
            return  # the caller was cancelled
        if error is None:
            future.set_result(bytes(data))
        else:
            future.set_exception(error)

    file.read(offset, length, done, counted=False)
    try:
        return await future
    except OSError as error:
        raise ImageError(
            f"{file.name} cannot be read: {error.strerror}",
            reason=Reason.IO_ERROR,
            remedy=Remedy("check that the client still has the file, and offer it again"),
        ) from error
