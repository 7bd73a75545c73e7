"""Peers behind a file descriptor that does not block."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from farplug.ends.base import Peer


class DescriptorPeer(Peer):
    """A peer behind a non-blocking file descriptor, which its end owns.

    Attributes:
        descriptor: the file descriptor.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.descriptor = descriptor
        self._closed = asyncio.get_running_loop().create_future()

    def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    async def readable(self) -> None:
        """Wait until the descriptor can be read, or is hung up. Raises OSError if the peer is closed."""
        loop = asyncio.get_running_loop()
        await self._until_ready(loop.add_reader, loop.remove_reader)

    async def writable(self) -> None:
        """Wait until the descriptor can be written, or is hung up. Raises OSError if the peer is closed."""
        loop = asyncio.get_running_loop()
        await self._until_ready(loop.add_writer, loop.remove_writer)

    async def _until_ready(self, add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], bool]) -> None:
        ready = asyncio.get_running_loop().create_future()

        def set_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        add(self.descriptor, set_ready)
        try:
            await asyncio.wait([ready, self._closed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            remove(self.descriptor)
        if self._closed.done():
            raise OSError(errno.EPIPE, "it was closed")
