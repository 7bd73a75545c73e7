"""The terminal of ``farplug attach --usb-serial -``: this command's, while the serial line is that of a session."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from farplug.ends.base import End
from farplug.ends.sockets import UnixListenEnd
from farplug.ends.stdio import StdioEnd


class Console:
    """A socket for a session, and what connects it with standard input and output.

    Attributes:
        end: the end of the serial line, for the session.
    """

    def __init__(self, socket: UnixListenEnd) -> None:
        self.end = f"unix:{socket.address}"
        self._socket = socket

    async def relay(self) -> None:
        """Connect the session with standard input and output, until Ctrl-], or until the session takes the line out."""
        stdio = StdioEnd()
        await stdio.open()
        loop = asyncio.get_running_loop()
        left = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, left.set)
        tasks = [
            asyncio.ensure_future(left.wait()),
            asyncio.ensure_future(_copy(stdio, self._socket)),
            asyncio.ensure_future(_copy(self._socket, stdio)),
            asyncio.ensure_future(self._gone()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stdio.close()

    async def _gone(self) -> None:
        while self._socket.peer is None:
            await self._socket.changed()
        while self._socket.peer is not None:
            await self._socket.changed()


@asynccontextmanager
async def console() -> AsyncIterator[Console]:
    """Return a context manager that listens for the session on a socket of this user."""
    with tempfile.TemporaryDirectory(prefix="farplug-") as folder:
        path = str(Path(folder) / "console")
        socket = UnixListenEnd(path, path)
        await socket.open()
        try:
            yield Console(socket)
        finally:
            await socket.close()


async def _copy(source: End, destination: End) -> None:
    while True:
        await destination.write(await source.read())
