"""The base class of functions that are connected to an end on this machine: serial lines, network adapters."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import ClassVar

from farplug.ends.base import End
from farplug.virtual.async_function import AsyncFunction
from farplug.virtual.endpoints import InterruptIn
from farplug.virtual.events import EndChanged


class EndFunction(AsyncFunction):
    """A function that passes what the guest sends to an end, and back.

    The end is opened when the device is plugged in for the first time. It stays open, with its peer, until the device
    is disposed of: also while the guest reboots, or is lost and returns.

    Attributes:
        end: what is at the other end; None: nothing, the program uses the endpoints itself.
        kind: for messages.
        states: the endpoint that shows the guest whether a peer is there.
        dropped: bytes of the guest that were lost, because no peer was there.
    """

    kind: ClassVar[str]
    states: InterruptIn

    def __init__(self, end: End | None = None) -> None:
        self.end = end
        self.dropped = 0

    async def open(self) -> None:
        await super().open()
        if self.end is not None:
            await self.end.open()
            self.end.on_change = self._end_changed
            if self.end.peer is not None:
                self._end_changed(f"{self.end.peer.name} is connected")

    async def dispose(self) -> None:
        await super().dispose()
        if self.end is not None:
            await self.end.close()

    def _end_changed(self, text: str) -> None:
        assert self.end is not None
        self.host.report(EndChanged(self.kind, self.end.address, self.end.peer is not None, text))

    async def run(self) -> None:
        """Connect the guest with the end, if there is one."""
        if self.end is None:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(self.end))
            group.create_task(self.to_guest(self.end))
            group.create_task(self.from_guest(self.end))

    async def _follow(self, end: End) -> None:
        """Show the guest whether a peer is there."""
        shown: bool | None = None
        while True:
            await self.states.read_by_guest()
            if shown is (now := end.peer is not None):
                await end.changed()
            else:
                await self.show_connected(now)
                shown = now

    @abstractmethod
    async def show_connected(self, connected: bool) -> None:
        """Show the guest whether a peer is there. Waits while the guest does not receive states."""

    @abstractmethod
    async def to_guest(self, end: End) -> None:
        """Pass what the peers send to the guest."""

    @abstractmethod
    async def from_guest(self, end: End) -> None:
        """Pass what the guest sends to the peers; drop it without one."""
