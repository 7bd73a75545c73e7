"""An end that clients of the session open: a terminal of the page, a program that uses the control protocol."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from farplug.ends.base import MAX_UNSENT, End, Peer
from farplug.usb.types import Buffer

BACKLOG: Final = 256 << 10
"""Bytes of the guest that are kept for a client that opens the line later: the last ones."""


class ClientEnd(End):
    """An end that any number of clients have open, or none.

    The guest sees a peer all the time, so a page that is loaded again hangs up nothing. While a client has the line
    open and does not read, the guest waits. What it sends without a client is kept up to :data:`BACKLOG`.
    """

    def __init__(self) -> None:
        super().__init__("client")
        self._kept = bytearray()
        self._end = 0
        """Bytes that the guest has sent."""
        self._readers: set[Reader] = set()
        self._typed: deque[bytes] = deque()
        self._moved = asyncio.Event()

    async def _open(self) -> None:
        self.came(_Clients(self))

    async def _close(self) -> None:
        readers, self._readers = self._readers, set()
        for reader in readers:
            reader.on_change()
        self._moved.set()

    # Clients

    def read_from_start(self, on_change: Callable[[], None]) -> Reader:
        """Return a new reader, at the oldest byte that is kept.

        Args:
            on_change: called when there is more to read, and when the end is closed.
        """
        reader = Reader(self, self._end - len(self._kept), on_change)
        self._readers.add(reader)
        return reader

    async def type(self, data: bytes) -> bool:
        """Send bytes to the guest; wait while it has not read what was sent before.

        Returns:
            Whether the end is still open.
        """
        while self.is_open and sum(map(len, self._typed)) >= MAX_UNSENT:
            await self._move()
        if self.is_open and data:
            self._typed.append(data)
            self._moved.set()
        return self.is_open

    async def _move(self) -> None:
        """Wait until something was read or written."""
        self._moved.clear()
        await self._moved.wait()

    # The guest

    async def next_typed(self) -> bytes:
        """Return what clients have sent, as soon as there is something; nothing if the end is closed."""
        while self.is_open and not self._typed:
            await self._move()
        data = b"".join(self._typed)
        self._typed.clear()
        self._moved.set()
        return data

    async def keep(self, data: memoryview) -> None:
        """Keep what the guest sends; wait while a reader is far behind."""
        for start in range(0, len(data), MAX_UNSENT):
            while any(self._end - reader.position > MAX_UNSENT for reader in self._readers):
                await self._move()
            part = data[start : start + MAX_UNSENT]
            self._kept += part
            self._end += len(part)
            del self._kept[:-BACKLOG]  # no reader is that far behind
            for reader in tuple(self._readers):
                reader.on_change()


class Reader:
    """A client that has the line open. Made by :meth:`ClientEnd.read_from_start`.

    Attributes:
        position: of the next byte, counted from the first one that the guest has sent.
        on_change: called when there is more to read, and when the end is closed.
    """

    def __init__(self, end: ClientEnd, position: int, on_change: Callable[[], None]) -> None:
        self.position = position
        self.on_change = on_change
        self._of = end

    @property
    def is_open(self) -> bool:
        """Return whether the line still has the reader."""
        return self in self._of._readers

    def take(self, limit: int) -> bytes:
        """Return the next bytes; none if there are no more now, or the reader is closed."""
        end = self._of
        start = self.position - (end._end - len(end._kept))
        data = bytes(end._kept[start : start + limit]) if self.is_open else b""
        self.position += len(data)
        end._moved.set()
        return data

    def close(self) -> None:
        """Let the line forget the reader. A second call has no effect."""
        self._of._readers.discard(self)
        self._of._moved.set()


class _Clients(Peer):
    """The clients of the session, whether one has the line open or not."""

    name = "the session"

    def __init__(self, end: ClientEnd) -> None:
        self._end = end

    async def read(self) -> Sequence[bytes]:
        data = await self._end.next_typed()
        return (data,) if data else ()

    async def write(self, items: Sequence[Buffer]) -> None:
        for item in items:
            await self._end.keep(memoryview(item))
