"""Write a capture in a thread: a slow disk, or a slow reader of a pipe, never delays a guest.

Blocks are queued, up to a limit. The thread passes what is queued to the kernel, several blocks in a system call: what
was written is complete when farplug is killed, except perhaps the last block. An error ends the capture, and nothing
else.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Final

from farplug.capture.pcapng import is_capture
from farplug.errors import Reason, Remedy, UsageError, from_oserror
from farplug.shell import shell_word
from farplug.usb.types import Buffer

STANDARD_OUTPUT: Final = "-"
"""The path of a capture that goes to standard output."""
QUEUE_LIMIT: Final = 16 << 20
"""Bytes that wait for the thread; above, payloads are left out."""
HEADERS_LIMIT: Final = 17 << 20
"""Bytes that wait for the thread; above, whole packets are left out."""
MAX_BUFFERS: Final = 512
"""Buffers of one system call; the kernel's limit is IOV_MAX, 1024."""
MAX_WRITE: Final = 1 << 20
"""Bytes of one system call, unless a single block is larger."""
CLOSE_TIMEOUT: Final = 3.0
"""Seconds for what is queued when a capture is closed; the reader of a pipe may have stopped reading."""
READER_TIMEOUT: Final = 30.0
"""Seconds to wait for a program that reads from a named pipe."""
READER_INTERVAL: Final = 0.1
"""Seconds between two looks for this program."""

_HEAD_SIZE = 12


async def open_capture(path: str, waiting: Callable[[], None] = lambda: None) -> int:
    """Open the file of a capture; return its descriptor.

    A new file can be read by its owner only. An existing one is replaced if it is empty or a capture.

    Args:
        path: of a file or a named pipe; ``-``: standard output.
        waiting: called once if no program reads from the named pipe yet.

    Raises:
        UsageError: the path cannot be used, holds something else, or is being written by another capture; no program
            reads from the pipe.
    """
    if path == STANDARD_OUTPUT:
        return _standard_output()
    loop = asyncio.get_running_loop()
    end = loop.time() + READER_TIMEOUT
    waited = False
    while (descriptor := _open(path)) is None:
        if loop.time() > end:
            raise UsageError(
                f"no program reads from the pipe {path}",
                reason=Reason.TIMED_OUT,
                remedy=Remedy("start the reader first", command=f"wireshark -k -i {shell_word(path)}"),
            )
        if not waited:
            waited = True
            waiting()
        await asyncio.sleep(READER_INTERVAL)
    return descriptor


def is_pipe(descriptor: int) -> bool:
    """Return whether a file is read while it is written: a pipe, a socket or a terminal."""
    return not stat.S_ISREG(os.fstat(descriptor).st_mode)


def _standard_output() -> int:
    try:
        if os.isatty(1):
            raise UsageError(
                "standard output is a terminal: a capture is binary data",
                reason=Reason.BAD_OPTION,
                remedy="redirect standard output to a program that reads captures, or to a file",
            )
        return os.dup(1)
    except OSError as error:
        raise from_oserror("standard output", error, as_=UsageError) from error


def _open(path: str) -> int | None:
    """Return the descriptor; None if it is a named pipe without a reader."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        if os.path.lexists(path):
            mode = os.stat(path, follow_symlinks=False).st_mode
            if stat.S_ISFIFO(mode):
                return _open_pipe(path)
            if not stat.S_ISREG(mode):
                raise _not_a_file(path, mode)
        descriptor = os.open(path, flags, 0o600)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    try:
        _take(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_pipe(path: str) -> int | None:
    if sys.platform == "win32":
        raise AssertionError("Windows has no such files")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    os.set_blocking(descriptor, True)
    return descriptor


def _not_a_file(path: str, mode: int) -> UsageError:
    kind = "something else than a file"
    if stat.S_ISDIR(mode):
        kind = "a folder"
    elif stat.S_ISLNK(mode):
        kind = "a symbolic link"
    return UsageError(
        f"{path} is {kind}: a capture is written to a file or a named pipe",
        reason=Reason.NOT_A_FILE,
        remedy="name a new file, such as trace.pcapng",
    )


def _take(path: str, descriptor: int) -> None:
    """Lock a file, and make it empty. Raise if it holds something else than a capture, or is locked."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another capture is being written to {path}", reason=Reason.IN_USE, remedy="name another file"
            ) from error
        except OSError:
            pass  # a file system without locks
    try:
        with open(descriptor, "rb", closefd=False) as file:
            head = file.read(_HEAD_SIZE)
        if head and not is_capture(head):
            raise UsageError(
                f"{path} exists, and is not a capture in the format pcapng: it is left as it is",
                reason=Reason.WRONG_FORMAT,
                remedy="name a new file, or delete this one first",
            )
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str, error: OSError | ValueError) -> UsageError:
    remedy = "name a file in a folder that exists, and that you may write to"
    return from_oserror(path, error, as_=UsageError, problem="cannot be written", remedy=remedy)


class Writer:
    """The thread, and what waits for it. All methods are called on the event loop.

    Args:
        descriptor: of the file; the writer closes it.
        on_error: called once, on the event loop, when writing has failed.

    Attributes:
        blocks: the number of blocks that were queued.
        error: why writing has failed; None: it has not.
    """

    def __init__(self, descriptor: int, on_error: Callable[[OSError], None]) -> None:
        self.blocks = 0
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Sequence[Buffer] | None] = SimpleQueue()
        self._put = 0
        """Bytes that were queued: only the event loop changes this number."""
        self._done = 0
        """Bytes that the thread has written or dropped: only the thread changes this number."""
        self._closing = False
        """The thread has taken the end from the queue."""
        self._ended = self._loop.create_future()
        Thread(target=self._run, name="farplug capture", daemon=True).start()

    def has_room(self, size: int, limit: int = QUEUE_LIMIT) -> bool:
        """Return whether ``size`` bytes can be queued."""
        return self.error is None and self._put - self._done + size <= limit

    def write(self, block: Sequence[Buffer]) -> None:
        """Queue a block. Its buffers must not change any more."""
        if self.error is None:
            self.blocks += 1
            self._put += sum(map(len, block))
            self._queue.put(block)

    async def close(self) -> None:
        """Write what is queued, for at most :data:`CLOSE_TIMEOUT` seconds, and close the file."""
        self._queue.put(None)
        await asyncio.wait([self._ended], timeout=CLOSE_TIMEOUT)

    # The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._write_some()
        except OSError as error:
            failure = error  # the name of an exception ends with its clause
            self._notify(lambda: self._failed(failure))
            while not self._closing:
                self._done += sum(map(len, self._take()))
        finally:
            with suppress(OSError):
                os.close(self._descriptor)
            self._notify(lambda: None if self._ended.done() else self._ended.set_result(None))

    def _take(self) -> Sequence[Buffer]:
        """Wait for the next block; at the end, return an empty one."""
        block = self._queue.get()
        self._closing = block is None
        return block or ()

    def _write_some(self) -> None:
        """Write the next block, and those that wait behind it."""
        buffers = [*self._take()]
        size = sum(map(len, buffers))
        while not self._closing and len(buffers) < MAX_BUFFERS and size < MAX_WRITE and not self._queue.empty():
            block = self._take()
            buffers += block
            size += sum(map(len, block))
        try:
            _write_all(self._descriptor, buffers)
        finally:
            self._done += size

    def _notify(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)

    def _failed(self, error: OSError) -> None:
        self.error = error
        self._on_error(error)


def _write_all(descriptor: int, buffers: list[Buffer]) -> None:
    while buffers:
        written = os.writev(descriptor, buffers) if hasattr(os, "writev") else os.write(descriptor, b"".join(buffers))
        count = 0
        while count < len(buffers) and written >= len(buffers[count]):
            written -= len(buffers[count])
            count += 1
        del buffers[:count]
        if written:
            buffers[0] = memoryview(buffers[0])[written:]
