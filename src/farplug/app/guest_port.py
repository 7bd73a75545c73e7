"""A port of a guest, with the engine on it: opened once, and used by one device after another.

The port stays open while no device uses it. A SPICE server checks the life of its ticket whenever a channel is linked,
so a port that is opened only for a later device may be refused. A port that other clients can use, too, is opened when
the first device needs it (:attr:`farplug.transport.session.Session.shares_ports`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from farplug.errors import FarplugError, GuestGoneError
from farplug.redirection import Redirection, events
from farplug.redirection.events import PortEvent
from farplug.redirection.port_protocol import PacketObserver
from farplug.transport.port import Port
from farplug.usb.device import Device
from farplug.usb.figures import EndpointFigures


class PortState(StrEnum):
    """How far a port has come, as a user sees it."""

    CLOSED = "closed"
    """not open: it is being opened, the guest cannot be reached, or another client uses the port"""
    WAITING = "waiting"
    """open; the guest has not sent its hello"""
    READY = "ready"
    """the guest takes devices"""


class GuestPort:
    """A port of a guest, with the engine on it.

    Args:
        number: of the port in its guest, from 0.
        port: the byte stream.
        changed: called when the state has changed.
        unclaimed: called with events of the engine while no device uses the port.

    Attributes:
        number: as above.
        port: as above.
        state: how far it has come.
        error: why the port is closed; None: it is not, or nothing went wrong.
    """

    def __init__(
        self,
        number: int,
        port: Port,
        changed: Callable[[GuestPort], None],
        unclaimed: Callable[[GuestPort, PortEvent], None],
    ) -> None:
        self.number = number
        self.port = port
        self.state = PortState.CLOSED
        self.error: FarplugError | None = None
        self._changed = changed
        self._unclaimed = unclaimed
        self._user: Callable[[PortEvent], None] | None = None
        self._redirection = Redirection(port, self._happened)
        self._opening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Return the port's name: ``usbredir 0``."""
        return self.port.name

    @property
    def in_use(self) -> bool:
        """Return whether a device uses the port, or is about to."""
        return self._user is not None

    @property
    def ready(self) -> events.GuestReady | None:
        """Return what the guest announced in its hello; None: the hello has not arrived."""
        return self._redirection.ready

    @property
    def endpoints(self) -> tuple[EndpointFigures, ...]:
        """Return what moved through each endpoint since the last device was attached."""
        return self._redirection.figures

    @property
    def memory(self) -> int:
        """Return the bytes that the guest occupies for the device."""
        return self._redirection.memory

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the port as JSON's types."""
        return {
            "name": self.name,
            "state": str(self.state),
            "error": None if self.error is None else self.error.as_dict(),
        }

    async def open(self) -> None:
        """Open the port, unless it is open. Concurrent calls share one attempt, which goes on if they are cancelled.

        Raises:
            TargetError: the port cannot be reached.
            PortError: another client uses the port.
            GuestGoneError: the port was closed meanwhile.
        """
        if self.state is not PortState.CLOSED:
            return
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())
            self._opening.add_done_callback(retrieve)
        opening = self._opening
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if opening.cancelled() and (caller is None or not caller.cancelling()):
                raise GuestGoneError(f"{self.name} was closed before it was open") from None
            raise

    async def _open(self) -> None:
        try:
            await self._redirection.open()
        except FarplugError as error:
            self._set(PortState.CLOSED, error)
            raise
        else:
            self._watching = asyncio.ensure_future(self._watch())
            if self.state is PortState.CLOSED:  # the guest's hello may have come already
                self._set(PortState.WAITING)
        finally:
            self._opening = None

    async def _watch(self) -> None:
        self._set(PortState.CLOSED, await self._redirection.closed())

    def claim(self, user: Callable[[PortEvent], None]) -> None:
        """Let ``user`` have the port's events, until :meth:`release`. A second call for the same user has no effect."""
        assert self._user in (None, user)
        self._user = user

    def release(self) -> None:
        """Let another device have the port."""
        self._user = None

    def observe(self, observer: PacketObserver | None) -> None:
        """Show the packets of the port to an observer; None: to none any more."""
        self._redirection.observer = observer

    async def attach(self, device: Device) -> None:
        """Offer a device to the guest; see :meth:`farplug.redirection.engine.Redirection.attach`."""
        await self._redirection.attach(device)

    async def detach(self) -> None:
        """Take the device out of the guest; see :meth:`farplug.redirection.engine.Redirection.detach`."""
        await self._redirection.detach()

    async def closed(self) -> FarplugError | None:
        """Wait until the port is closed; return why, or None if this side closed it."""
        return await self._redirection.closed()

    async def close(self) -> None:
        """Detach the device, and close the port.

        Raises:
            DeviceError: written data of the device could not be made durable.
        """
        opening = self._opening
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        await self._redirection.close()
        if self._watching is not None:
            await self._watching

    def _happened(self, event: PortEvent) -> None:
        if isinstance(event, events.GuestReady):
            self._set(PortState.READY)
        if self._user is not None:
            self._user(event)
        elif not isinstance(event, events.GuestReady):
            self._unclaimed(self, event)

    def _set(self, state: PortState, error: FarplugError | None = None) -> None:
        if (state, error) != (self.state, self.error):
            self.state, self.error = state, error
            self._changed(self)


def retrieve(call: asyncio.Future[Any]) -> None:
    """Mark the error of a call as retrieved, as a done callback: it is reported otherwise; perhaps no caller waits."""
    if not call.cancelled():
        call.exception()
