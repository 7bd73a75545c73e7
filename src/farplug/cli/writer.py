"""Standard output and standard error through threads: a reader that does not read stops nothing.

A pipe that is full, Ctrl-S on a terminal and a pager block a write. So :func:`install` puts a bounded queue, which a
thread of its own writes, before both streams, and :func:`finish` waits a bounded time for the threads.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TextIO, cast

MAX_QUEUED: Final = 1 << 20
"""Bytes that wait for the reader of a stream; what is written then is left out, and counted, until half of them are
written."""
FINISH_TIMEOUT: Final = 2.0
"""Seconds that :func:`finish` waits for the readers."""
_PIECE: Final = 64 << 10
"""Bytes of one write."""


class _Writer:
    """Writes queued bytes to a file descriptor, in a thread.

    Args:
        descriptor: blocking or not.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._chunks: deque[bytes] = deque()
        self._queued = 0
        self._overflowed = False
        self._error: OSError | None = None
        self._failed: Callable[[OSError], None] | None = None
        self._closed = False
        self.bounded = True
        self.streams: list[QueuedStream] = []
        threading.Thread(target=self._run, name="farplug output", daemon=True).start()

    @property
    def full(self) -> bool:
        """Return whether nothing more is queued for now."""
        return self._overflowed and self.bounded

    @property
    def idle(self) -> bool:
        """Return whether everything is written."""
        return not self._queued

    def put(self, stream: QueuedStream, data: bytes) -> None:
        """Queue what one write to a stream wrote; count it as left out if the queue is full."""
        with self._changed:
            if self._error is not None:
                return
            if self.full:
                stream.leave_out()
                return
            self._put_note(stream)
            self._put(data)

    def _put_note(self, stream: QueuedStream) -> None:
        if note := stream.take_note():
            self._put(note)

    def _put(self, data: bytes) -> None:
        self._chunks.append(data)
        self._queued += len(data)
        self._overflowed = self._overflowed or self._queued >= MAX_QUEUED
        self._changed.notify_all()

    def on_failure(self, failed: Callable[[OSError], None]) -> None:
        """Call ``failed``, in the thread, with the error that ends the output, now if it has occurred."""
        with self._changed:
            self._failed = failed
            error = self._error
        if error is not None:
            failed(error)

    def drain(self, deadline: float) -> bool:
        """Wait until everything is written or cannot be written; return False if that lasts too long.

        Args:
            deadline: of :func:`time.monotonic`.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.idle, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End the thread once everything is written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._chunks or self._closed)
                    if not self._chunks:
                        return
                    data = b"".join(self._chunks)
                    self._chunks.clear()
                self._write(memoryview(data))
        except OSError as error:
            with self._changed:
                self._error = error
                self._chunks.clear()
                self._queued = 0
                self._changed.notify_all()
                failed = self._failed
            if failed is not None:
                failed(error)

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                count = os.write(self._descriptor, data[:_PIECE])
            except BlockingIOError:  # another program that has the file made it non-blocking
                select.select([], [self._descriptor], [])
                continue
            data = data[count:]
            with self._changed:
                self._queued -= count
                if self._queued <= MAX_QUEUED // 2:
                    self._overflowed = False
                if not self._queued:
                    for stream in self.streams:
                        self._put_note(stream)
                self._changed.notify_all()


class QueuedStream(io.TextIOBase):
    """A text stream whose writes do not block. What is written between two flushes, or line ends, is one unit.

    Args:
        stream: a standard stream.
        writer: writes to its file.

    Attributes:
        newline: ends a line.
        note: returns the text that stands in the place of a number of units that were left out; called when one is.
    """

    def __init__(self, stream: TextIO, writer: _Writer) -> None:
        self.note: Callable[[int], str] = left_out_line
        self._left_out = 0
        self._note = b""
        self._stream = stream
        self._writer = writer
        self._text = ""
        self._lock = threading.Lock()
        self.newline = "\n"
        writer.streams.append(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    @property
    def full(self) -> bool:
        """Return whether what is written now is left out."""
        return self._writer.full

    @property
    def idle(self) -> bool:
        """Return whether everything is written."""
        return self._writer.idle

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        with self._lock:
            self._text += text
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            text, self._text = self._text, ""
            if text:
                self._writer.put(self, self._encoded(text))

    def leave_out(self) -> None:
        """Count a unit that is left out. The writer calls this."""
        self._left_out += 1
        self._note = self._encoded(self.note(self._left_out))

    def take_note(self) -> bytes:
        """Return what stands in the place of the units that were left out; empty if there are none."""
        note, self._note, self._left_out = self._note, b"", 0
        return note

    def _encoded(self, text: str) -> bytes:
        return text.replace("\n", self.newline).encode(self.encoding, self.errors or "strict")

    def on_failure(self, failed: Callable[[OSError], None]) -> None:
        """Call ``failed``, in another thread, with the error that ends the output: its reader is gone, for example."""
        self._writer.on_failure(failed)


def left_out_line(count: int) -> str:
    """Return the line that stands in the place of lines that were left out."""
    return f"farplug: {count} line{'' if count == 1 else 's'} left out: the output was not read\n"


_writers: list[_Writer] = []
_replaced: list[tuple[str, TextIO]] = []


def install() -> None:
    """Put a queue before standard output and standard error. If both are the same file, they keep their order."""
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        if isinstance(stream, QueuedStream):
            continue
        try:
            descriptor = stream.fileno()
            shared = next((one for one in _writers if _same_file(one._descriptor, descriptor)), None)
            stream.flush()
        except (OSError, ValueError):  # not a file, or closed
            continue
        if shared is None:
            _writers.append(shared := _Writer(descriptor))
        _replaced.append((name, stream))
        setattr(sys, name, cast(TextIO, QueuedStream(stream, shared)))


def use_carriage_returns() -> None:
    """End lines on terminals with a carriage return, too: a guest uses the terminal, which does not add it then."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, QueuedStream) and stream.isatty():
            stream.newline = "\r\n"


def _same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def drain(timeout: float = FINISH_TIMEOUT) -> None:
    """Wait until everything is written, up to ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    for writer in _writers:
        writer.drain(deadline)


def lift_bound() -> None:
    """Leave out nothing more: only the last lines of the process follow."""
    for writer in _writers:
        writer.bounded = False


def finish(timeout: float = FINISH_TIMEOUT) -> None:
    """Wait until everything is written, up to ``timeout`` seconds, and remove the queues.

    What is not written then is lost. Ctrl-C ends the waiting.
    """
    with suppress(KeyboardInterrupt):
        drain(timeout)
    while _replaced:
        name, stream = _replaced.pop()
        setattr(sys, name, stream)
    while _writers:
        _writers.pop().close()
