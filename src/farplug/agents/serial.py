"""A serial line into the VM: a USB device whose other end is in this process."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias

from farplug.errors import DeviceError, FarplugError, GuestGoneError, Reason

MAX_KEPT: Final = 256 << 10
"""Bytes of the VM that are kept until they are read; of more the oldest are dropped, and counted."""
MAX_UNSENT: Final = 64 << 10
"""Bytes that wait for the VM to take them."""
CONNECT_TIMEOUT: Final = 15.0
"""Seconds in which the session connects the line."""

Attach: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[list[dict[str, Any]]]]
"""Plugs sources in, with the parameters of the method ``attach``; returns their attachments."""


class SerialLine:
    """A serial line, from :meth:`open` to :meth:`close`.

    Attributes:
        attachment: the id of its device; empty: it is not plugged in.
        lost: bytes that were dropped since the last read.
    """

    def __init__(self) -> None:
        self.attachment = ""
        self.lost = 0
        self._kept = bytearray()
        self._transport: asyncio.Transport | None = None
        self._changed = asyncio.Event()
        self._stack = AsyncExitStack()

    async def open(self, folder: Path, attach: Attach) -> None:
        """Plug the device in, and wait until the line is connected. Also after an error the line must be closed.

        Args:
            folder: a private folder with a short path, for a socket.
            attach: plugs it in.

        Raises:
            FarplugError: it cannot be plugged in.
        """
        try:
            place = self._stack.enter_context(tempfile.TemporaryDirectory(prefix=".serial-", dir=folder))
            path = f"{place}/line"
            server = await asyncio.get_running_loop().create_unix_server(lambda: _End(self), path)
            self._stack.callback(server.close)
            plugged = await attach({"sources": [{"kind": "serial", "path": f"unix:{path}"}]})
            self.attachment = str(plugged[0].get("id", "")) if plugged else ""
            async with asyncio.timeout(CONNECT_TIMEOUT):
                while self._transport is None:
                    await self._change()
        except TimeoutError:
            raise DeviceError("the session did not connect the serial line", reason=Reason.TIMED_OUT) from None

    async def close(self) -> None:
        """End the line here. The device is the caller's to unplug. A second call has no effect."""
        if self._transport is not None:
            self._transport.abort()
        self._transport = None
        await self._stack.aclose()

    @property
    def is_of_use(self) -> bool:
        """Return whether the line is connected, or has something to read."""
        return self._transport is not None or bool(self._kept)

    def read(self, count: int) -> bytes:
        """Return the oldest ``count`` bytes that have arrived, or fewer."""
        data = bytes(self._kept[:count])
        del self._kept[:count]
        self.lost = 0
        return data

    def peek(self) -> bytes:
        """Return all bytes that have arrived; they stay."""
        return bytes(self._kept)

    async def wait(self) -> None:
        """Wait until a byte is there to read.

        Raises:
            GuestGoneError: the line was unplugged.
        """
        while not self._kept:
            await self._next()

    async def wait_for(self, text: bytes) -> int:
        """Wait until a text has arrived; return the number of bytes up to its end.

        Raises:
            GuestGoneError: the line was unplugged.
        """
        while (place := self._kept.find(text)) < 0:
            await self._next()
        return place + len(text)

    def write(self, data: bytes) -> None:
        """Send bytes to the VM.

        Raises:
            GuestGoneError: the line was unplugged.
            DeviceError: the VM takes nothing.
        """
        if self._transport is None:
            raise _unplugged()
        if self._transport.get_write_buffer_size() + len(data) > MAX_UNSENT:
            raise DeviceError(
                "the VM does not read what was sent before: nothing more was sent",
                reason=Reason.TIMED_OUT,
                remedy="a program in the VM must read from the line, such as a shell or a login on /dev/ttyACM0",
            )
        self._transport.write(data)

    async def _next(self) -> None:
        if self._transport is None:
            raise _unplugged()
        await self._change()

    async def _change(self) -> None:
        await self._changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _connected(self, transport: asyncio.Transport) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._transport = transport
        self._wake()

    def _received(self, data: bytes) -> None:
        self._kept += data
        over = max(0, len(self._kept) - MAX_KEPT)
        del self._kept[:over]
        self.lost += over
        self._wake()

    def _disconnected(self, transport: asyncio.Transport) -> None:
        if self._transport is transport:
            self._transport = None
            self._wake()


class _End(asyncio.Protocol):
    """The session's connection to a line. There is another one after the VM was lost and is back."""

    def __init__(self, line: SerialLine) -> None:
        self._line = line
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._line._connected(transport)

    def data_received(self, data: bytes) -> None:
        self._line._received(data)

    def connection_lost(self, error: Exception | None) -> None:
        assert self._transport is not None
        self._line._disconnected(self._transport)


def _unplugged() -> FarplugError:
    return GuestGoneError("the serial line was unplugged, or the session has ended")
