"""Serial lines that a client has open: what their guests send, no faster than the client takes it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from farplug.app.outlet import ClientEvent, Outlet
from farplug.errors import Reason, UsageError

if TYPE_CHECKING:
    from farplug.ends.client import ClientEnd

MAX_CHUNK: Final = 32 << 10
"""Bytes of the guest in one event ``serial``."""
MAX_UNACKNOWLEDGED: Final = 128 << 10
"""Bytes of a line that a client has not acknowledged; then no more are sent, and the guest waits."""


class OpenLine:
    """A serial line that a client has open.

    Args:
        number: of the line, for the client.
        end: of the line.
        outlet: the connection of the client.
    """

    def __init__(self, number: int, end: ClientEnd, outlet: Outlet) -> None:
        self._number = number
        self._end = end
        self._outlet = outlet
        self._closed = False
        self._reader = end.read_from_start(self._changed)
        self._acknowledged = self._reader.position
        asyncio.get_running_loop().call_soon(self._changed)  # the reply, with the number of the line, comes first

    @property
    def position(self) -> int:
        """Return the position of the next byte that is sent to the client, counted from the line's first one."""
        return self._reader.position

    async def write(self, data: bytes) -> None:
        """Send bytes to the guest; wait while it has not read what was sent before.

        Raises:
            UsageError: the line is not plugged in any more.
        """
        if not await self._end.type(data):
            raise UsageError("the serial line is not plugged in any more", reason=Reason.NOT_FOUND)

    def acknowledge(self, position: int) -> None:
        """Take note that the client has processed the bytes before a position.

        Raises:
            UsageError: they were not sent.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"position {position}: the line was sent up to {self.position}", reason=Reason.BAD_SETTING)
        self._acknowledged = max(self._acknowledged, position)
        self._changed()

    def close(self) -> None:
        """Send no more. A second call has no effect."""
        self._closed = True
        self._reader.close()

    def _changed(self) -> None:
        self._outlet.post(("serial", self), self._make)

    def _make(self) -> ClientEvent | None:
        if self._closed:
            return None
        data = {"line": self._number, "position": self.position}
        if not self._reader.is_open:
            self.close()
            return ClientEvent("serial", {**data, "ended": True}, b"")
        room = MAX_UNACKNOWLEDGED - (self.position - self._acknowledged)
        payload = self._reader.take(min(MAX_CHUNK, room))
        if not payload:
            return None
        self._changed()
        return ClientEvent("serial", {**data, "ended": False}, payload)
