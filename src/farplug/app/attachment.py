"""An attachment: a device plugged into a port of a guest, as a user sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from farplug.app.events import EventReader
from farplug.app.guest_port import GuestPort
from farplug.errors import DeviceError, FarplugError, PortError, Reason, RefusedError
from farplug.redirection import events
from farplug.redirection.events import DeviceReport, PortEvent, plain_fields
from farplug.usb.device import Device
from farplug.usb.figures import EndpointFigures, Figures
from farplug.virtual.fido.events import PresenceAnswered, PresenceAsked

TURN_TIMEOUT = 5.0
"""Seconds that a device whose port is ready waits for the devices of earlier places to be offered."""


class AttachmentState(StrEnum):
    """How far a device has come, as a user sees it."""

    OPENING = "connecting"
    """its port is being opened"""
    WAITING = "waiting"
    """for the guest's hello"""
    ATTACHED = "attached"
    """offered to the guest"""
    CONFIGURED = "in use"
    """the guest's driver works with it"""
    REFUSED = "refused"
    DETACHED = "detached"
    LOST = "lost"
    """its VM is gone; it is attached again when the VM is back"""


_STATES: dict[type, AttachmentState] = {
    events.Opened: AttachmentState.WAITING,
    events.Attached: AttachmentState.ATTACHED,
    events.OfferChanged: AttachmentState.ATTACHED,
    events.PortReset: AttachmentState.ATTACHED,
    events.Refused: AttachmentState.REFUSED,
}


class Place:
    """A port that is kept for one device, and the device's turn. Made by :meth:`farplug.app.guest.Guest.reserve`.

    Attributes:
        number: of the port.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._turn = asyncio.Event()

    def give_way(self) -> None:
        """Let the devices of later places be offered: the device of this one was offered, or is not there yet."""
        self._turn.set()

    async def passed(self) -> None:
        """Wait until later places have their turn."""
        await self._turn.wait()

    @property
    def is_passed(self) -> bool:
        """Return whether later places have their turn."""
        return self._turn.is_set()


class Owner(Protocol):
    """What an attachment needs of its guest."""

    def precede(self, attachment: Attachment, event: type[PortEvent]) -> None:
        """Publish what comes before an event of this type. The attachment's state is still that before the event."""

    def happened(self, attachment: Attachment, event: PortEvent) -> None:
        """Publish an event of the attachment."""

    def comes_back(self, error: FarplugError | None) -> bool:
        """Return whether the guest is gone with this error, and will be contacted again."""

    def finished(self, attachment: Attachment) -> None:
        """Take note that the attachment is over."""

    def left(self, attachment: Attachment) -> None:
        """Release the attachment's device, which has left the guest, if the guest opened it."""

    def events_of(self, attachment: Attachment) -> EventReader:
        """Return an iterator over the attachment's events."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a part of a device was made of, without its path.

    Attributes:
        kind: a :class:`~farplug.app.settings.SourceKind`.
        snapshot: what the guest writes goes to a snapshot: the image stays as it is.
    """

    kind: str
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What a device is for people.

    Attributes:
        label: the name of a file, ``cdrom0``, a device's name.
        titles: its parts, such as logical units, with what is in them: ``cdrom0 (installer.iso)``; empty: the label.
        units: the labels of its parts; empty: the label.
        details: for each part what a user must know to use its other end here, such as the path of a terminal, or
            nothing; empty: nothing for any.
        sources: what the device was made of, as users name it: paths, ids; empty: unknown.
        origins: for each part what it was made of; empty: unknown.
    """

    label: str
    titles: Sequence[str] = ()
    units: Sequence[str] = ()
    details: Sequence[str] = ()
    sources: Sequence[str] = ()
    origins: Sequence[Origin] = ()


class Attachment:
    """A device plugged into a port of a guest, as a user sees it. Made by :meth:`farplug.app.guest.Guest.plug`.

    Attributes:
        id: unique in the application: ``a1``.
        label: unique in its guest.
        titles: see :class:`Description`.
        units: see :class:`Description`.
        details: see :class:`Description`; as many as units.
        device: what is plugged.
        port: where.
        sources: see :class:`Description`.
        origins: see :class:`Description`.
        identity: of the device, as it was last offered to the guest.
        state: how far it has come.
        error: why the guest refused the device, or why the device left, if no user asked for that.
        questions: what programs in the guest ask the user of the device: the touch of a security key.
    """

    def __init__(
        self,
        owner: Owner,
        id: str,
        description: Description,
        device: Device,
        port: GuestPort,
    ) -> None:
        self.id = id
        self.label = description.label
        self.titles = tuple(description.titles) or (self.label,)
        self.units = tuple(description.units) or (self.label,)
        self.details = tuple(description.details) or ("",) * len(self.units)
        self.device = device
        self.identity = device.identity
        self.port = port
        self.sources = tuple(description.sources)
        self.origins = tuple(description.origins)
        self.state = AttachmentState.OPENING
        self.error: FarplugError | None = None
        self.questions: list[PresenceAsked] = []
        self._owner = owner
        self._ready = asyncio.Event()
        self._attached = asyncio.Event()
        self._configured = asyncio.Event()
        self._ended = asyncio.Event()
        self._plugging: asyncio.Task[object] | None = None
        self._unplugged = False
        self._rate = Rate()
        self._measured: tuple[str, Figures, int] | None = None
        self._published: dict[str, int] = {"read": 0, "written": 0, "commands": 0, "errors": 0, "rate": 0, "memory": 0}
        """The figures of the last event ``figures``."""

    @property
    def figures(self) -> Figures:
        """Return what the device has moved: its own counters where it has them, else those of its endpoints."""
        own = self.device.figures
        if own is not None:
            return own
        data = [one for one in self.endpoints if one.endpoint]
        return Figures(
            read=sum(one.bytes for one in data if one.endpoint & 0x80),
            written=sum(one.bytes for one in data if not one.endpoint & 0x80),
            commands=sum(one.transfers for one in data),
            errors=sum(one.errors for one in data),
        )

    @property
    def endpoints(self) -> tuple[EndpointFigures, ...]:
        """Return what moved through each endpoint since the device was attached."""
        return self.port.endpoints

    @property
    def memory(self) -> int:
        """Return the bytes that the guest occupies for the device, at most 64 MiB and the steps of jobs."""
        return self.port.memory

    @property
    def over(self) -> bool:
        """Return whether the device has left the guest."""
        return self._ended.is_set()

    @property
    def offered(self) -> bool:
        """Return whether the guest has the device, with or without a driver."""
        return self.state in (AttachmentState.ATTACHED, AttachmentState.CONFIGURED)

    async def attached(self) -> None:
        """Wait until the device is offered to the guest.

        Raises:
            FarplugError: the guest refused the device, or it left before.
        """
        await self._reached(self._attached, "offered to the guest")

    async def configured(self) -> None:
        """Wait until the guest's driver works with the device.

        Raises:
            FarplugError: the guest refused the device, or it left before.
        """
        await self._reached(self._configured, "configured by the guest")

    async def _reached(self, state: asyncio.Event, what: str) -> None:
        ended = asyncio.ensure_future(self._ended.wait())
        reached = asyncio.ensure_future(state.wait())
        try:
            await asyncio.wait((ended, reached), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            reached.cancel()
        if not state.is_set():
            raise self.error or PortError(
                f"{self.device.identity} was detached before it was {what}", reason=Reason.REJECTED
            )

    async def ended(self) -> FarplugError | None:
        """Wait until the device has left the guest; return why, or None if a user asked for that."""
        await self._ended.wait()
        return self.error

    def events(self) -> EventReader:
        """Return an iterator over what happens to the attachment from now on, until it has left the guest.

        The last event is ``removed``. There is none for an attachment that is over.
        """
        events = self._owner.events_of(self)
        if self.over:
            events.close()
        return events

    @property
    def unplugged(self) -> bool:
        """Return whether :meth:`unplug` was called."""
        return self._unplugged

    async def unplug(self) -> None:
        """Take the device out of the guest; give up while it is being plugged in. Its port stays open.

        Raises:
            DeviceError: written data could not be made durable.
        """
        self._unplugged = True
        plugging = self._plugging
        if plugging is not None and not plugging.done() and plugging is not asyncio.current_task():
            plugging.cancel()
            await asyncio.wait([plugging])
            return
        try:
            if self.state is not AttachmentState.LOST:
                await self.port.detach()
        finally:
            self._finish()

    def give_up(self, error: FarplugError) -> None:
        """End, with an error: the VM is not back, or has no port for the device any more. Only while it is lost."""
        self.error = error
        self._finish()
        self._owner.left(self)

    def snapshot(self) -> dict[str, Any]:
        """Return the attachment's state as JSON's types."""
        return {
            "id": self.id,
            "label": self.label,
            "units": list(self.units),
            "details": list(self.details),
            "sources": [{"kind": one.kind, "snapshot": one.snapshot} for one in self.origins],
            "port": self.port.name,
            "state": str(self.state),
            "error": None if self.error is None else self.error.as_dict(),
            "identity": str(self.identity),
            "speed": str(self.identity.speed),
            "figures": dict(self._published),
            "questions": [plain_fields(question) for question in self.questions],
        }

    def measure(self) -> dict[str, int] | None:
        """Return the figures, with the bytes a second since the last call, and :attr:`memory`.

        Returns:
            None if they and the state are the same as at the last call.
        """
        figures = self.figures
        rate = self._rate.measure(figures.read + figures.written)
        memory = self.memory
        now = (str(self.state), figures, memory)
        if now == self._measured:
            return None
        self._measured = now
        self._published = {
            "read": figures.read,
            "written": figures.written,
            "commands": figures.commands,
            "errors": figures.errors,
            "rate": round(rate),
            "memory": memory,
        }
        return dict(self._published)

    def begin_again(self, port: GuestPort) -> None:
        """Prepare another :meth:`plug`: the VM is back, with new ports. No other device gets the port until then."""
        self.port = port
        port.claim(self._happened)
        self.state = AttachmentState.OPENING
        self.error = None

    async def plug(self, earlier: Sequence[Place] = ()) -> None:
        """Open the port and offer the device, after the devices of earlier places.

        The guest calls this once, and after :meth:`begin_again` each time that it is back after it was lost.
        """
        self._plugging = asyncio.current_task()
        self.port.claim(self._happened)
        try:
            await self.port.open()
            self._opened()
            if self.port.ready is not None and not self._ready.is_set():  # the hello came before the device
                self._happened(self.port.ready)
            await self._wait_for_turn(earlier)
            await self.port.attach(self.device)
        except BaseException as error:
            if isinstance(error, RefusedError) and self.state is not AttachmentState.REFUSED:
                self._happened(events.Refused(self.port.name, error))
            if isinstance(error, FarplugError) and not self._unplugged and self._owner.comes_back(error):
                self.error = error
                self._lost()
                self._owner.happened(self, events.Detached(self.port.name, error, ()))
            else:
                await self._give_up(error)
            raise
        finally:
            self._plugging = None

    async def _give_up(self, error: BaseException) -> None:
        try:
            await self.port.detach()
        except DeviceError:
            if not isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._finish()

    def _lost(self) -> None:
        """Free the port; the device is attached again when the guest is back."""
        self.state = AttachmentState.LOST
        self._ready.clear()
        self._attached.clear()
        self._configured.clear()
        self.port.release()

    async def _wait_for_turn(self, earlier: Sequence[Place]) -> None:
        """Wait until the devices of these places were offered, or their time is up, or the port is closed."""
        if all(place.is_passed for place in earlier):
            return
        turn = asyncio.gather(*(place.passed() for place in earlier))
        ready = asyncio.ensure_future(self._ready.wait())
        closed = asyncio.ensure_future(self.port.closed())
        try:
            done, _ = await asyncio.wait((turn, ready, closed), return_when=asyncio.FIRST_COMPLETED)
            if done == {ready}:
                await asyncio.wait((turn, closed), timeout=TURN_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in (turn, ready, closed):
                future.cancel()
            await asyncio.gather(turn, ready, closed, return_exceptions=True)

    def _opened(self) -> None:
        if self.state is AttachmentState.OPENING:
            self._owner.precede(self, events.Opened)
            self.state = AttachmentState.WAITING
            self._owner.happened(self, events.Opened(self.port.name, self.port.number))

    def _happened(self, event: PortEvent) -> None:
        self._opened()  # a guest may send its hello before open() returns
        self._owner.precede(self, type(event))
        if isinstance(event, events.Configured):
            configured = event.configuration != 0
            self.state = AttachmentState.CONFIGURED if configured else AttachmentState.ATTACHED
            if configured:
                self._configured.set()
        else:
            self.state = _STATES.get(type(event), self.state)
        match event:
            case events.GuestReady():
                self._ready.set()
            case events.Attached(identity=identity):
                self.identity, self.error = identity, None
                self._attached.set()
            case events.Refused(error=error):
                self.error = self.error or error
            case events.Detached(error=error):
                self._detached(error)
            case DeviceReport(event=PresenceAsked() as asked):
                self.questions = [*self._others(asked.interface), asked]
            case DeviceReport(event=PresenceAnswered(interface=interface)):
                self.questions = self._others(interface)
        self._owner.happened(self, event)
        if isinstance(event, events.Detached) and self.state is not AttachmentState.LOST:
            self._finish()
            self._owner.left(self)

    def _others(self, interface: int) -> list[PresenceAsked]:
        """Return the questions of the device's other interfaces."""
        return [one for one in self.questions if one.interface != interface]

    def _detached(self, error: FarplugError | None) -> None:
        self.questions = []
        self.error = self.error or error
        if self.state is AttachmentState.REFUSED:
            return
        if not self._unplugged and self._owner.comes_back(error):
            self._lost()
        else:
            self.state = AttachmentState.DETACHED

    def _finish(self) -> None:
        if self.state is not AttachmentState.REFUSED:
            self.state = AttachmentState.DETACHED
        if not self._ended.is_set():
            self.port.release()
            self._ended.set()
            self._owner.finished(self)


class Rate:
    """Bytes a second between two calls; 0 at the first call, and when a count begins again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[int, float] | None = None

    def measure(self, moved: int) -> float:
        """Return the rate since the last call.

        Args:
            moved: bytes in all.
        """
        now = self._clock()
        before, when = self._last or (moved, now)
        self._last = moved, now
        return max(moved - before, 0) / max(now - when, 1e-3)
