"""The application's model: a guest, the devices plugged into it, and one stream of what happens.

The command line and later a page are thin clients of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeAlias

from farplug.errors import FarplugError, GuestGoneError, LocalProtocolError, PortError, Reason, RefusedError
from farplug.redirection import Redirection, events
from farplug.redirection.events import PortEvent
from farplug.transport.port import Port
from farplug.transport.session import Session
from farplug.usb.device import Device
from farplug.usb.figures import EndpointFigures

TURN_TIMEOUT = 1.5
"""Seconds that a device whose port is ready waits for the devices of earlier places to be offered."""


class AttachmentState(StrEnum):
    """How far a device has come, as a user sees it."""

    OPENING = "connecting"
    """its port is being opened"""
    WAITING = "waiting"
    """for the guest to say hello"""
    ATTACHED = "attached"
    """offered to the guest"""
    CONFIGURED = "in use"
    """the guest's driver works with it"""
    REFUSED = "refused"
    DETACHED = "detached"


_STATES: dict[type, AttachmentState] = {
    events.Opened: AttachmentState.WAITING,
    events.Attached: AttachmentState.ATTACHED,
    events.FellBack: AttachmentState.ATTACHED,
    events.WasReset: AttachmentState.ATTACHED,
    events.Refused: AttachmentState.REFUSED,
}


class Place:
    """A port that is kept for one device, and the device's turn. Made by :meth:`Hub.reserve`.

    Attributes:
        port: the port.
    """

    def __init__(self, port: Port) -> None:
        self.port = port
        self._turn = asyncio.Event()

    def give_way(self) -> None:
        """Let the devices of later places be offered: the device of this one was offered, or is not there yet."""
        self._turn.set()

    async def passed(self) -> None:
        """Wait until later places have their turn."""
        await self._turn.wait()

    @property
    def is_passed(self) -> bool:
        """Whether later places have their turn."""
        return self._turn.is_set()


class Attachment:
    """A device plugged into a port, as a user sees it. Made by :meth:`Hub.plug`.

    Attributes:
        device: what is plugged.
        port: where.
        state: how far it has come.
        error: why it was refused or detached, if nobody here wanted it.
    """

    def __init__(self, hub: Hub, device: Device, port: Port) -> None:
        self.device = device
        self.port = port
        self.state = AttachmentState.OPENING
        self.error: FarplugError | None = None
        self._hub = hub
        self._redirection = Redirection(port, self._happened)
        self._ready = asyncio.Event()
        self._configured = asyncio.Event()
        self._ended = asyncio.Event()
        self._plugging: asyncio.Task[object] | None = None
        self._leaving: asyncio.Task[None] | None = None

    @property
    def figures(self) -> tuple[EndpointFigures, ...]:
        """What moved since the device was attached."""
        return self._redirection.figures

    @property
    def over(self) -> bool:
        """Whether the device has left the guest."""
        return self._ended.is_set()

    async def configured(self) -> None:
        """Wait until the guest's driver works with the device; for as long as it takes.

        Raises:
            FarplugError: it was refused or detached first.
        """
        ended = asyncio.ensure_future(self._ended.wait())
        configured = asyncio.ensure_future(self._configured.wait())
        try:
            await asyncio.wait((ended, configured), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            configured.cancel()
        if not self._configured.is_set():
            raise self.error or PortError(
                f"{self.device.identity} was detached before the guest configured it", reason=Reason.REJECTED
            )

    async def ended(self) -> FarplugError | None:
        """Wait until the device has left the guest; why, if nobody here wanted it."""
        await self._ended.wait()
        return self.error

    async def unplug(self) -> None:
        """Take the device out of the guest, and close the port; give up if it is still being opened.

        Raises:
            DeviceError: what was written could not be made durable.
        """
        plugging = self._plugging
        if plugging is not None and not plugging.done() and plugging is not asyncio.current_task():
            plugging.cancel()
            await asyncio.wait([plugging])
            return
        try:
            await self._redirection.close()
        finally:
            self._finish()

    async def _plug(self, earlier: Sequence[Place]) -> None:
        self._plugging = asyncio.current_task()
        try:
            await self._redirection.open()
        except BaseException:
            self._finish()
            raise
        try:
            self._opened()
            await self._wait_for_turn(earlier)
            await self._redirection.attach(self.device)
        except BaseException as error:
            if isinstance(error, RefusedError) and self.state is not AttachmentState.REFUSED:
                self._happened(events.Refused(self.port.name, error))
            await self.unplug()
            raise

    async def _wait_for_turn(self, earlier: Sequence[Place]) -> None:
        """Wait until the devices of these places were offered, or their time is up, or the port is closed."""
        if all(place.is_passed for place in earlier):
            return
        turn = asyncio.gather(*(place.passed() for place in earlier))
        ready = asyncio.ensure_future(self._ready.wait())
        closed = asyncio.ensure_future(self._redirection.closed())
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
            self.state = AttachmentState.WAITING
            number = [port is self.port for port in self._hub.session.ports].index(True)
            self._hub._happened(self, events.Opened(self.port.name, number))

    def _happened(self, event: PortEvent) -> None:
        self._opened()  # a guest may speak before open() returns
        if isinstance(event, events.Configured):
            configured = event.configuration != 0
            self.state = AttachmentState.CONFIGURED if configured else AttachmentState.ATTACHED
            if configured:
                self._configured.set()
        else:
            self.state = _STATES.get(type(event), self.state)
        if isinstance(event, events.GuestReady):
            self._ready.set()
        if isinstance(event, (events.Refused, events.Detached)):
            self.error = self.error or event.error
        self._hub._happened(self, event)
        if isinstance(event, events.Detached):
            self._leaving = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        """The device has left by itself: the port is free for another one."""
        try:
            await self._redirection.close()
        finally:
            self._finish()

    def _finish(self) -> None:
        if self.state is not AttachmentState.REFUSED:
            self.state = AttachmentState.DETACHED
        self._ended.set()


Listener: TypeAlias = Callable[[Attachment, PortEvent], None]


class Hub:
    """A guest and what is plugged into it.

    ::

        async with Hub(await connect(target)) as hub:
            attachment = await hub.plug(device)
            await attachment.configured()

    At the end of the block every device is unplugged and the guest is left (:meth:`close`).

    Attributes:
        session: the connection to the VM.
        attachments: what is plugged in, or being plugged in, or has left by itself, in the order of plugging. One that
            has left stays until its device is plugged again.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.attachments: list[Attachment] = []
        self._listeners: list[Listener] = []
        self._plugging: set[asyncio.Task[Attachment]] = set()
        self._places: list[Place] = []
        self._closing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Be called with everything that happens, on the event loop; returns how to end that. It must not raise."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _happened(self, attachment: Attachment, event: PortEvent) -> None:
        for listener in list(self._listeners):
            listener(attachment, event)

    def check_room(self, count: int) -> None:
        """Check that the guest has ports for ``count`` devices, whoever uses them now.

        Raises:
            PortError: it has fewer.
        """
        ports = len(self.session.ports)
        if not ports:
            raise PortError(
                "the VM has no usbredir channel", reason=Reason.NO_USBREDIR_CHANNEL, remedy=self.session.no_port_remedy
            )
        if ports < count:
            raise PortError(
                f"{count} devices, but the VM has {ports} port{'s' if ports > 1 else ''} for them",
                reason=Reason.NO_FREE_PORT,
                remedy=f"plug fewer, or {self.session.no_port_remedy}",
            )

    def reserve(self, count: int) -> Sequence[Place]:
        """Keep the first ``count`` ports of the guest for devices that are plugged with their place.

        The devices are offered in the order of their places, as far as each is ready in time: a guest names disks in
        the order in which it sees them.

        Raises:
            PortError: the guest has fewer ports.
        """
        if count:
            self.check_room(count)
        self._places = [Place(port) for port in self.session.ports[:count]]
        return tuple(self._places)

    async def plug(self, device: Device, place: Place | None = None) -> Attachment:
        """Plug ``device`` into a free port; wait for the guest's hello for as long as it takes.

        Cancelling it, as :meth:`close` does, leaves the device unplugged.

        Args:
            device: what to plug in.
            place: its port. If something else uses the port, and without a place: the first free port that is not kept.

        Raises:
            PortError: there is no free port.
            TargetError: a port cannot be reached.
            RefusedError: the guest rules the device out.
            DeviceError: the device cannot be taken.
            GuestGoneError: the guest went away, or the hub was closed meanwhile.
        """
        if self._closing:
            raise GuestGoneError("the guest was left")
        plugging = asyncio.ensure_future(self._plug(device, place))
        self._plugging.add(plugging)
        try:
            return await plugging
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or not caller.cancelling():
                raise GuestGoneError(f"the guest was left before {device.identity} was plugged in") from None
            raise
        finally:
            self._plugging.discard(plugging)
            if place is not None:
                place.give_way()

    async def _plug(self, device: Device, place: Place | None) -> Attachment:
        if any(attachment.device is device and not attachment.over for attachment in self.attachments):
            raise LocalProtocolError(f"{device.identity} is plugged in already")
        self.attachments = [attachment for attachment in self.attachments if attachment.device is not device]
        self.check_room(1)
        in_use: PortError | None = None
        kept = [place.port for place in self._places]
        ports = [port for port in self.session.ports if not any(port is other for other in kept)]
        if place is not None:
            ports.insert(0, place.port)
        earlier = self._places if place is None else self._places[: self._places.index(place)]
        for port in ports:
            if any(attachment.port is port and not attachment.over for attachment in self.attachments):
                continue
            attachment = Attachment(self, device, port)
            self.attachments.append(attachment)
            try:
                await attachment._plug(earlier)
            except PortError as error:  # somebody else's: the next one may be free
                in_use = error
            except BaseException:
                self.attachments.remove(attachment)
                raise
            else:
                return attachment
            self.attachments.remove(attachment)
        raise in_use or self._no_free_port(device)

    def forget(self, attachment: Attachment) -> None:
        """Drop one that has left from :attr:`attachments`: its device will not be plugged again."""
        if attachment.over and attachment in self.attachments:
            self.attachments.remove(attachment)

    def _no_free_port(self, device: Device) -> PortError:
        count = len(self.session.ports)
        ports = "its only port is" if count == 1 else f"all of its {count} ports are"
        taken = "taken, or kept for a device that was named" if self._places else "taken"
        return PortError(
            f"the VM has no free port for {device.identity}: {ports} {taken}",
            reason=Reason.NO_FREE_PORT,
            remedy=self.session.no_port_remedy,
        )

    async def close(self) -> None:
        """Unplug everything, side by side, and leave the guest.

        Raises:
            DeviceError: what was written to a device could not be made durable (the first one that failed).
        """
        self._closing = True
        plugging = list(self._plugging)
        for task in plugging:
            task.cancel()
        await asyncio.gather(*plugging, return_exceptions=True)
        current = [attachment for attachment in self.attachments if not attachment.over]
        try:
            results = await asyncio.gather(*(a.unplug() for a in current), return_exceptions=True)
        finally:
            await self.session.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result
