"""A guest: a VM, and what is plugged into it.

:meth:`Guest.run` does all that settings ask for, as ``farplug connect`` does. :meth:`Guest.connect`, :meth:`Guest.plug`
and :meth:`Guest.close` are the steps.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from farplug.app.attachment import Attachment, AttachmentState, Description, Origin, Place
from farplug.app.capture import Captures
from farplug.app.events import EventReader, EventStream, Level, level_of
from farplug.app.finding import find, find_key
from farplug.app.guest_port import GuestPort, retrieve
from farplug.app.holdings import Holdings
from farplug.app.kinds import KINDS, Parts
from farplug.app.link import AskPassword, Link, error_fields
from farplug.app.media import Media
from farplug.app.seat import Seat
from farplug.app.settings import CaptureSettings, DeviceRules, GuestSettings, Source, SourceKind, StorageSettings
from farplug.app.sharing import least_ports, share
from farplug.app.sources import OpenSource, Sources, device_of, open_source, wait_for_all
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    PortError,
    Reason,
    Remedy,
    StateError,
    UsageError,
)
from farplug.redirection import events as port_events
from farplug.redirection.events import PortEvent, fields_of
from farplug.text import shown
from farplug.transport.session import Session
from farplug.usb.device import Device
from farplug.usb.types import Speed
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.device import VirtualDevice
from farplug.virtual.events import MediumEvent
from farplug.virtual.fido.presence import Question

if TYPE_CHECKING:
    from farplug.app.auto import AutoPlugger
    from farplug.app.screen import Inputs, Screen
    from farplug.app.typing import Typing
    from farplug.ends.client import ClientEnd

T = TypeVar("T")

log = logging.getLogger(__name__)

ALL = "all"
"""Names all devices, in a command."""
_USB_DEVICE = Origin(str(SourceKind.USB_DEVICE))
REFUSAL_TIME = 2.0
"""Seconds in which a guest refuses a device, if it does: an operating system that runs has configured it by then."""
SHELL_LINES = 3
"""Serial lines of a device for commands in the guest."""
FIGURES_INTERVAL = 1.0
"""Seconds between two events ``figures`` of an attachment."""


class Guest:
    """A VM and what is plugged into it.

    ::

        async with Guest(session=await open_session(target)) as guest:
            attachment = await guest.plug(device)
            await attachment.configured()

    At the end of the block the guest is closed (:meth:`close`).

    Args:
        settings: where the VM is, and what to plug; None: ``session`` is given.
        session: a connection to the VM that is open already.
        stream: takes the events; None: a stream of the guest's own.
        id: unique in the application.
        ask_password: asks a user for a password; None: there is no user.
        media: the files that clients offer; None: there are no clients.

    Attributes:
        id: as above.
        settings: as above.
        stream: as above.
        attachments: what is plugged in, or being plugged in, or has left by itself, in the order of plugging. One that
            has left stays until its device is plugged again.
        served: a device was attached, or :meth:`run` waits for one as it was asked to.
        captures: the capture of what moves between the guest and its devices.
        seat: which client holds the keyboard and the mouse.
    """

    def __init__(
        self,
        settings: GuestSettings | None = None,
        *,
        session: Session | None = None,
        stream: EventStream | None = None,
        id: str = "g1",
        ask_password: AskPassword | None = None,
        media: Media | None = None,
    ) -> None:
        self.id = id
        self.settings = settings
        self.stream = EventStream() if stream is None else stream
        self.attachments: list[Attachment] = []
        self.served = False
        self.captures = Captures(self)
        self._link = Link(self, settings, session, ask_password, lambda: self.captures.wire)
        self.seat = Seat(self)
        self._sources = Sources("" if settings is None else settings.target.public_target, media=media)
        self._holdings = Holdings(self._sources)
        self._autos: list[AutoPlugger] = []
        self._calls: set[asyncio.Task[Any]] = set()
        """Running calls that :meth:`close` cancels."""
        self._returning: asyncio.Future[Any] | None = None
        """Devices are being plugged again: the VM is back."""
        self._places: list[Place] = []
        self._on_demand: list[Attachment] = []
        """What is unplugged when something else needs its port."""
        self._count = 0
        self._expected: int | None = None
        """Devices that must be plugged in, or wait for the guest, before :meth:`run` is ready; None: it is."""
        self._listening = False
        self._settled: set[str] = set()
        """The ids of attachments that were plugged in, or waited for the guest."""
        self._ticker: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        if not self._link.is_connected:
            await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Events -------------------------------------------------------------------------------------------------------

    def publish(self, name: str, message: str, /, *, level: Level = Level.INFO, **details: Any) -> None:
        """Publish an event of the guest; see :meth:`EventStream.publish`."""
        self.stream.publish(name, message, level=level, guest=self.id, **details)

    def note(self, text: str, remedy: Remedy | None = None) -> None:
        """Publish something that a user may want to know, and what can be done about it."""
        self.publish("note", text, **({} if remedy is None else remedy.as_dict()))

    def skipped(self, error: FarplugError) -> None:
        """Publish that a device is not plugged in; nothing else changes."""
        self._check_ready(f"skipped {len(self._settled)}")
        self.publish("skipped", error.message, level=Level.BAD, **error_fields(error))

    def events(self) -> EventReader:
        """Return an iterator over what happens to the guest from now on, until it is closed.

        The last event is ``closed``. See :meth:`EventStream.iterate`.
        """
        return self.stream.iterate(lambda event: event.guest == self.id, lambda event: event.name == "closed")

    def events_of(self, attachment: Attachment) -> EventReader:
        """Return an iterator over what happens to an attachment from now on, until it is over."""
        wanted = attachment.id
        return self.stream.iterate(lambda event: event.attachment == wanted, lambda event: event.name == "removed")

    def refused(self, error: FarplugError) -> None:
        """Publish that a command of a user could not be carried out; nothing else changes."""
        self.publish("command-refused", error.message, level=Level.BAD, **error_fields(error))

    def precede(self, attachment: Attachment, event: type[PortEvent]) -> None:
        """Publish what comes before an event of an attachment. The attachment calls this."""
        if event is port_events.Detached:
            self._figures(attachment)

    def happened(self, attachment: Attachment, event: PortEvent) -> None:
        """Publish an event of an attachment. The attachment calls this."""
        fields = {**fields_of(event), "state": str(attachment.state)}
        device, message = attachment.label, str(event)
        match event.last if isinstance(event, port_events.Repeated) else event:
            case port_events.Opened(number=number):
                fields["units"] = list(attachment.titles)
                message = _port_line(number, attachment.titles, self._holdings.media(attachment))
            case port_events.DeviceReport(event=MediumEvent(lun=lun)) if lun < len(attachment.units):
                device = attachment.units[lun]
            case port_events.Attached(identity=identity):
                self.served = True
                fields["device_name"] = str(identity)
        self.publish(
            event.name,
            message,
            level=level_of(event),
            attachment=attachment.id,
            device=device,
            source=event,
            **fields,
        )
        match event:
            case port_events.Configured() | port_events.WaitingForGuest():
                self._check_ready(attachment.id)
            case port_events.Attached():
                if use := attachment.port.port.use:
                    self.note(f"{attachment.label} waits for a client", Remedy("to attach it there", command=use))
                asyncio.get_running_loop().call_later(REFUSAL_TIME, self._check_ready, attachment.id)

    # Connecting ---------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """Return the connection to the VM.

        Raises:
            StateError: there is none yet.
        """
        return self._link.session

    @property
    def reached(self) -> bool:
        """Return whether there is, or was, a connection to the VM."""
        return self._link.is_connected

    def screen_of(self, display: int) -> Screen:
        """Return a display of the VM by its number, from 0."""
        from farplug.app.screen import Screen  # screens and input devices are large imports

        return Screen(lambda: self.session, display)

    @cached_property
    def screen(self) -> Screen:
        """Return the first display of the VM."""
        return self.screen_of(0)

    @cached_property
    def inputs(self) -> Inputs:
        """Return the keyboard and the mouse of the VM, through SPICE."""
        from farplug.app.screen import Inputs

        return Inputs(lambda: self.session, self.screen_of)

    @cached_property
    def typing(self) -> Typing:
        """Return what types and clicks, on USB devices where that is better."""
        from farplug.app.typing import Typing

        return Typing(self)

    async def connect(self) -> None:
        """Connect to the VM, and open its ports, which stay open until the guest is closed.

        A plain socket is still being connected at the end: :meth:`plug` waits for it, and raises its error. Where the
        server wants another password, the user is asked for it, up to three times. A VM that moves to another host is
        followed; :attr:`GuestSettings.reconnect` says what happens when it is lost.

        Raises:
            UsageError: the target or a setting of it is not valid.
            TargetError: the VM, or none of its ports, can be reached; the reason says at which stage.
            PortError: other clients use all ports.
            StateError: the guest is connected, or is being connected, or has no settings.
            GuestGoneError: the guest is closed, or was closed meanwhile.
        """
        self._check_open()
        capture = None if self.settings is None or self._link.is_connected else self.settings.capture
        if capture is not None and not self.captures.has_begun:
            await self.start_capture(capture)
        await self._until_closed(self._link.connect(), "the VM was reached")

    async def closed(self) -> FarplugError | None:
        """Wait until the guest is gone for good; return why, or None if :meth:`close` closed it."""
        self._link.session  # noqa: B018  (raises StateError)
        return await self._link.closed()

    def reconnect(self, *, give_up: bool = False) -> None:
        """Connect to a VM that is lost at once, without the delay before the next attempt; or make no more attempts.

        If the VM is not lost, there is nothing to do: the event ``note`` has its state.

        Args:
            give_up: make no more attempts: the guest is gone.

        Raises:
            StateError: the attempts are to end, and there are none: the VM is not lost.
        """
        self._link.reconnect(give_up=give_up)

    def comes_back(self, error: FarplugError | None) -> bool:
        """Return whether the VM is gone with this error, and will be contacted again."""
        return self._closing is None and self._link.comes_back(error)

    def listens(self) -> None:
        """Take note that nothing can be plugged in before the VM connects. The link calls this."""
        self._listening = True
        self._check_ready()

    async def was_lost(self) -> None:
        """Take note that the VM is gone, and is contacted again: the ports are closed. The link calls this."""
        if self._returning is not None:
            await self._returning  # ends by itself: the ports are closed

    def is_gone(self, error: FarplugError) -> None:
        """Take the devices out that would have been plugged again. The link calls this."""
        for attachment in self._lost():
            attachment.give_up(error)

    def is_back(self) -> None:
        """Plug the devices in again, in the order and into the ports that they had. The link calls this."""
        lost = sorted(self._lost(), key=lambda attachment: attachment.port.number)
        ports = self._ports_again(lost)
        places: list[Place] = []
        calls = []
        for attachment in lost:
            port = ports.get(attachment)
            if port is None:
                error = self._no_free_port(str(attachment.device.identity))
                self.skipped(error)
                attachment.give_up(error)
                continue
            attachment.begin_again(port)
            self._publish_attaching(attachment)
            place = Place(port.number)
            calls.append(self._plug_again(attachment, place, tuple(places)))
            places.append(place)
        self._returning = asyncio.gather(*calls, return_exceptions=True)
        self._returning.add_done_callback(retrieve)

    def _ports_again(self, lost: Sequence[Attachment]) -> dict[Attachment, GuestPort]:
        """Return the ports of devices that come back.

        A device gets another free port if another one has taken its own since it was lost, or if the VM has it no more.
        """
        free = {port.number: port for port in self._link.ports if not port.in_use}
        found = {}
        for attachment in lost:
            if (port := free.pop(attachment.port.number, None)) is not None:
                found[attachment] = port
        others = (port for port in self._ports_not_kept() if port.number in free)
        return found | dict(zip((one for one in lost if one not in found), others, strict=False))

    def _lost(self) -> list[Attachment]:
        return [attachment for attachment in self.attachments if attachment.state is AttachmentState.LOST]

    async def _plug_again(self, attachment: Attachment, place: Place, earlier: Sequence[Place]) -> None:
        try:
            await attachment.plug(earlier)
        except FarplugError as error:
            if attachment.over:
                self.skipped(error)
                self.left(attachment)
        finally:
            place.give_way()

    # Ports --------------------------------------------------------------------------------------------------------

    @property
    def ports(self) -> Sequence[GuestPort]:
        """Return the ports of the VM, in their order; none before the VM is connected."""
        return self._link.ports

    def check_room(self, count: int) -> None:
        """Check that the guest has ports for ``count`` devices, also those in use.

        Raises:
            PortError: it has fewer.
        """
        session = self.session
        ports = len(self._link.ports)
        if not ports:
            raise PortError(
                "the VM has no usbredir channel", reason=Reason.NO_USBREDIR_CHANNEL, remedy=session.no_port_remedy
            )
        if ports < count:
            raise PortError(
                f"{count} devices, but the VM has {ports} port{'s' if ports > 1 else ''} for them",
                reason=Reason.NO_FREE_PORT,
                remedy=Remedy(f"plug fewer, or {session.no_port_remedy}"),
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
        self._places = [Place(port.number) for port in self._link.ports[:count]]
        return tuple(self._places)

    def _ports_not_kept(self) -> list[GuestPort]:
        """Return the ports that are not kept for a named device."""
        kept = [place.number for place in self._places]
        return [port for port in self._link.ports if port.number not in kept]

    def _free_ports(self) -> int:
        return sum(not port.in_use for port in self._ports_not_kept())

    # Plugging -----------------------------------------------------------------------------------------------------

    def _current(self) -> list[Attachment]:
        """Return the attachments that are not over."""
        return [attachment for attachment in self.attachments if not attachment.over]

    @property
    def _storage(self) -> StorageSettings:
        """Return how a source becomes a device, where a call does not say that."""
        return StorageSettings() if self.settings is None else self.settings.storage

    def plug(
        self,
        what: Source | Device,
        place: Place | None = None,
        *,
        storage: StorageSettings | None = None,
        label: str = "",
        titles: Sequence[str] = (),
        units: Sequence[str] = (),
        sources: Sequence[str] = (),
    ) -> Plugging:
        """Plug a device, or what a source becomes, into a free port; wait for the guest's hello.

        ::

            attachment = await guest.plug(device)

            async with guest.plug(Source.disk("a.raw")) as attachment:
                ...  # unplugged at the end of the block

        Cancelling the call, as :meth:`close` does, leaves the device unplugged.

        Args:
            what: a device; or a source, which is opened now, and closed when it is unplugged.
            place: its port. If something else uses the port, and without a place: the first free port that is not kept.
            storage: how a source becomes a device; None: the guest's settings, or the defaults.
            label: for people; empty: the source's or the device's name. A number is added if the label is in use.
            titles: see :class:`~farplug.app.attachment.Description`.
            units: see :class:`~farplug.app.attachment.Description`.
            sources: see :class:`~farplug.app.attachment.Description`.

        Raises:
            ImageError: the source cannot be used.
            PortError: there is no free port.
            TargetError: a port cannot be reached.
            RefusedError: the guest rules the device out.
            DeviceError: the device cannot be taken.
            GuestGoneError: the guest went away, or was closed meanwhile.
        """
        description = Description(label, titles, units, sources=sources)
        return Plugging(self, lambda: self._plug(what, place, storage, description))

    async def _plug(
        self,
        what: Source | Device,
        place: Place | None,
        storage: StorageSettings | None,
        description: Description,
    ) -> Attachment:
        if isinstance(what, Source):
            name, call = what.name, self._plug_source(what, place, storage, description.label)
        else:
            name = str(what.identity)
            description = replace(description, label=description.label or _name_of(what))
            call = self._plug_device(what, place, description)
        try:
            return await self._until_closed(call, f"{name} was plugged in", self.unplug)
        finally:
            if place is not None:
                place.give_way()

    async def plug_on_demand(self, source: Source) -> Attachment:
        """Plug a source that is unplugged when something else needs its port. Raises as :meth:`plug`."""
        attachment = await self.plug(source)
        self._on_demand.append(attachment)
        return attachment

    @property
    def only_used_make_room(self) -> bool:
        """Return whether a free port would cost the device of a call that runs: one that was plugged in on demand."""
        left = [attachment for attachment in self._on_demand if not attachment.over]
        return not self._free_ports() and bool(left) and all(map(self.typing.uses, left))

    async def plug_shell(self, lines: str, serial_number: str) -> Attachment:
        """Plug in three serial lines and a keyboard, as one device; return when the guest has configured it.

        The control interfaces of the lines have the numbers 0, 2 and 4.

        Args:
            lines: the absolute path of UNIX sockets without its last digit: ``0`` is the end of the first line.
            serial_number: of the device: letters and digits.

        Raises:
            UsageError: the path or the serial number is not valid.
            FarplugError: as :meth:`plug`.
        """
        if not os.path.isabs(lines) or not re.fullmatch(r"[0-9A-Za-z]{1,32}", serial_number):
            raise UsageError(
                "plug-shell needs an absolute path, and a serial number of 1 to 32 letters and digits",
                reason=Reason.BAD_SETTING,
            )
        return await self._until_closed(self._plug_shell(lines, serial_number), "the shell was plugged in", self.unplug)

    async def _plug_shell(self, lines: str, serial_number: str) -> Attachment:
        from farplug.ends import parse_serial_end
        from farplug.virtual.hid import Keyboard
        from farplug.virtual.serial import SerialLine

        await self._link.connected()
        while not self._free_ports() and await self._make_room():
            pass
        device = VirtualDevice(
            *(SerialLine(parse_serial_end(f"unix:{lines}{number}")) for number in range(SHELL_LINES)),
            Keyboard(),
            product="Keyboard and Serial Lines",
            serial_number=serial_number,
            speeds=(Speed.HIGH,),
        )
        self._holdings.hold(device, ())
        try:
            attachment = await self._plug_device(device, None, Description("shell"))
        except BaseException:
            await self._holdings.release(device)
            raise
        try:
            await attachment.configured()
        except BaseException:
            await self.unplug(attachment)
            raise
        return attachment

    async def _make_room(self, number: int | None = None) -> bool:
        """Unplug something that was plugged on demand, first what no call uses; return False if there is nothing.

        Args:
            number: of the port that is needed; None: any.
        """
        self._on_demand = [attachment for attachment in self._on_demand if not attachment.over]
        found = [attachment for attachment in self._on_demand if number in (None, attachment.port.number)]
        if not found:
            return False
        attachment = min(found, key=self.typing.uses)
        self._on_demand.remove(attachment)
        self.note(f"{attachment.label} is unplugged: its port is needed")
        await self.unplug(attachment)
        return True

    async def plug_usb(self, device: Device, label: str, place: Place | None) -> Attachment:
        """Plug a USB device of this machine; see :meth:`plug`."""
        return await self._plug(device, place, None, Description(label, origins=[_USB_DEVICE]))

    async def _plug_source(
        self, source: Source, place: Place | None, storage: StorageSettings | None, label: str
    ) -> Attachment:
        if storage is None:
            storage = self._storage
        if source.kind is SourceKind.USB_DEVICE:
            from farplug.app.auto import choose_device

            device, lock = await choose_device(source.path, force=storage.force)
            self._holdings.hold_lock(device, lock)
            try:
                description = Description(label or _name_of(device), sources=[source.name], origins=[_USB_DEVICE])
                return await self._plug_device(device, place, description)
            except BaseException:
                await self._holdings.release(device)
                raise
        opened = await open_source(source, storage, self._sources, self._copying)
        try:
            virtual = device_of([opened], storage)
        except BaseException:
            await self._holdings.close_sources([opened])
            raise
        self._holdings.hold(virtual, [opened])
        try:
            description = self._holdings.describe(virtual)
            return await self._plug_device(virtual, place, replace(description, label=label or description.label))
        except BaseException:
            await self._holdings.release(virtual)
            raise

    async def _plug_device(
        self,
        device: Device,
        place: Place | None,
        description: Description,
    ) -> Attachment:
        if any(attachment.device is device for attachment in self._current()):
            raise StateError(f"{device.identity} is plugged in already")
        self.attachments = [attachment for attachment in self.attachments if attachment.device is not device]
        await self._link.connected()
        self.check_room(1)
        in_use: PortError | None = None
        ports = self._ports_not_kept()
        if place is not None and place.number < len(self._link.ports):
            ports.insert(0, self._link.ports[place.number])
        earlier = self._places[: self._places.index(place)] if place in self._places else self._places
        for port in ports:
            if port.in_use:
                continue
            attachment = self._attachment(device, port, description)
            try:
                await attachment.plug(earlier)
            except PortError as error:  # another client uses this port: the next one may be free
                in_use = error
            except BaseException as error:
                if attachment.over or not isinstance(error, FarplugError):
                    self._remove(attachment)
                    raise
                await attachment.attached()  # the VM was lost meanwhile, and comes back
                return attachment
            else:
                return attachment
            self._remove(attachment)
        if await self._make_room():
            return await self._plug_device(device, place, description)
        raise in_use or self._no_free_port(str(device.identity))

    def _attachment(
        self,
        device: Device,
        port: GuestPort,
        description: Description,
    ) -> Attachment:
        self._count += 1
        label = unique(description.label, [attachment.label for attachment in self.attachments])
        id = f"{self.id}.a{self._count}"
        attachment = Attachment(self, id, replace(description, label=label), device, port)
        self.attachments.append(attachment)
        self._publish_attaching(attachment)
        if self._ticker is None:
            self._ticker = asyncio.ensure_future(self._tick())
        return attachment

    def _publish_attaching(self, attachment: Attachment) -> None:
        self.captures.watch(attachment)
        snapshot = {name: value for name, value in attachment.snapshot().items() if name != "id"}
        self.publish(
            "attaching",
            f"connecting to {attachment.port.name}",
            level=Level.DETAIL,
            attachment=attachment.id,
            device=attachment.label,
            **snapshot,
        )

    def _remove(self, attachment: Attachment) -> None:
        if attachment in self.attachments:
            self.attachments.remove(attachment)

    def finished(self, attachment: Attachment) -> None:
        """Publish that an attachment is over. The attachment calls this."""
        self.publish(
            "removed",
            "no longer plugged in",
            level=Level.DETAIL,
            attachment=attachment.id,
            device=attachment.label,
            state=str(attachment.state),
        )

    def forget(self, attachment: Attachment) -> None:
        """Drop an attachment that is over from :attr:`attachments`: its device will not be plugged again."""
        if attachment.over:
            self._remove(attachment)

    async def unplug(self, attachment: Attachment) -> None:
        """Take a device out of the guest. A source that :meth:`plug` opened is closed. Does nothing if it is over.

        Raises:
            DeviceError: written data could not be made durable.
        """
        try:
            if not attachment.over:
                await attachment.unplug()
        finally:
            self.forget(attachment)
            await self._holdings.release(attachment.device)

    def left(self, attachment: Attachment) -> None:
        """Close what :meth:`plug` opened for a device that has left the guest. The attachment calls this.

        While the guest is closed, :meth:`close` does that, after the session.
        """
        if self._closing is None and attachment.device in self._holdings:
            self.forget(attachment)
            self._holdings.start_release(attachment.device)

    def find(self, name: str) -> Attachment | None:
        """Return the attachment that a user names, or None; see :func:`farplug.app.finding.find`."""
        return find(self._current(), name)

    def _no_free_port(self, device: str) -> PortError:
        session = self.session
        count = len(self._link.ports)
        ports = "its only port is" if count == 1 else f"all of its {count} ports are"
        taken = "taken, or kept for a device that was named" if self._places else "taken"
        return PortError(
            f"the VM has no free port for {device}: {ports} {taken}",
            reason=Reason.NO_FREE_PORT,
            remedy=f"take a device out, or {session.no_port_remedy}",
        )

    # All that settings ask for ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Do all that the settings ask for: plug everything in, and stay until all devices have left.

        USB devices of this machine are chosen and images are opened before the VM is contacted: what cannot be plugged
        is an error before anything else is touched. Cancelling the call ends the stay, and so does :meth:`close`.
        The guest is closed in any case.

        Raises:
            FarplugError: something cannot be plugged; or a device, or the guest, has left although no user asked.
        """
        if self.settings is None:
            raise StateError("the guest has no settings")
        self._check_open()
        try:
            await self._until_closed(self._run(self.settings), "everything was plugged in")
        except GuestGoneError:
            if self._closing is None:
                raise
        finally:
            await self.close()

    async def _run(self, settings: GuestSettings) -> None:
        auto = await self._choose_devices(settings.sources, settings.rules)
        await self._sources.open(settings.sources, settings.storage, self._copying, self.note)
        await self.connect()  # only now: reading a .vv file may delete it
        await self._stay(settings, auto)

    async def _choose_devices(self, sources: Sequence[Source], rules: DeviceRules) -> AutoPlugger | None:
        """Choose among the USB devices of this machine; None: the user asked for none of them."""
        devices = [source.path for source in sources if source.kind is SourceKind.USB_DEVICE]
        if not devices and rules.auto_connect is None and rules.redirect_on_connect is None:
            return None
        from farplug.app.auto import AutoPlugger  # libusb comes with it, which images do not need
        from farplug.app.policy import Policy, Rules

        auto = AutoPlugger(Policy(Rules.parse(rules, devices)), self)
        self._autos.append(auto)
        await auto.prepare()
        return auto

    async def _stay(self, settings: GuestSettings, auto: AutoPlugger | None) -> None:
        """Plug everything in, side by side, and stay until all devices have left, or the guest is gone."""
        count, named = len(self._sources.opened), 0 if auto is None else auto.named
        self.check_room(max(1 if count or named or not settings.stay else 0, named + least_ports(self._sources.opened)))
        groups = self._groups(self._sources.opened, len(self._link.ports) - named, separate=settings.separate)
        devices: dict[Device, Sequence[OpenSource]] = {device_of(group, settings.storage): group for group in groups}
        for device, group in devices.items():
            self._holdings.hold(device, group)
        first = {device: min(one.place for one in group) for device, group in devices.items()}
        usb = [place for place, source in enumerate(settings.sources) if source.kind is SourceKind.USB_DEVICE]
        order = sorted([*first.values(), *usb])
        places = dict(zip(order, self.reserve(len(order)), strict=True))
        self._expected = len(devices) + (0 if auto is None else auto.present)
        gone = asyncio.ensure_future(self.closed())
        staying: list[asyncio.Future[FarplugError | None]] = []
        if devices:
            plugging = self._plug_all({device: places[first[device]] for device in devices}, stay=settings.stay)
            staying.append(asyncio.ensure_future(plugging))
        if auto is not None:
            auto.lenient = lambda: settings.stay and self.is_ready
            staying.append(asyncio.ensure_future(auto.run(self, [places[place] for place in usb])))
            self.served = settings.rules.wait or settings.rules.auto_connect is not None
        if not self._expected:
            staying.append(asyncio.ensure_future(self._ready_without_devices()))
        elif self._listening:
            self._check_ready()
        try:
            await asyncio.wait((gone, *staying), return_when=asyncio.FIRST_COMPLETED)
            error = next((future for future in staying if future.done()), gone).result()
            if isinstance(error, GuestGoneError) and self.session.over:
                error = await gone or error  # devices report that the session ended, the guest why
        finally:
            gone.cancel()
            for future in staying:
                future.cancel()
            await asyncio.gather(*staying, return_exceptions=True)
        if error is not None:
            raise error

    def _groups(self, opened: Sequence[OpenSource], ports: int, *, separate: bool) -> list[list[OpenSource]]:
        """Return the sources in groups of one device each, and note it if they share a port.

        Raises:
            PortError: there are fewer ports, and each source must be ``separate``.
        """
        groups, note = share(opened, ports, separate=separate, remedy=self.session.no_port_remedy)
        if note:
            self.note(note)
        return groups

    async def _plug_all(self, devices: Mapping[Device, Place], *, stay: bool) -> FarplugError | None:
        """Plug devices in, and wait until all devices have left; return why, if no user asked for that.

        Devices that a command plugs meanwhile are waited for, too; why they leave matters to no other device.

        Args:
            devices: what to plug, and where.
            stay: do not return because devices have left.
        """
        plugging = (self._plug_and_wait(device, place, stay=stay) for device, place in devices.items())
        errors = await asyncio.gather(*plugging)
        if stay:
            await asyncio.Event().wait()
        while current := [attachment for attachment in self._current() if attachment not in self._on_demand]:
            await current[0].ended()
        return next((error for error in errors if error is not None), None)

    async def _plug_and_wait(self, device: Device, place: Place, *, stay: bool) -> FarplugError | None:
        try:
            attachment = await self._plug(device, place, None, self._holdings.describe(device))
        except FarplugError as error:
            if not stay or not self.is_ready:
                raise
            self.skipped(error)
            return None
        why = await attachment.ended()
        if stay and not self.is_ready and why is not None:
            raise why
        self._places.remove(place)  # unlike a USB device of this machine, this one does not come back
        return why

    # Readiness ----------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Return whether :meth:`run` has done what it can: each device is plugged in, and not refused, or waits for the
        guest.
        """
        return self._expected is None

    def _check_ready(self, settled: str = "") -> None:
        """Publish ``ready`` once all devices of the settings are plugged in, or wait for the guest."""
        if settled:
            self._settled.add(settled)
        if self._closing is not None:
            return
        if self._expected is not None and (self._listening or len(self._settled) >= self._expected):
            self._expected = None
            if self.settings is not None and self.settings.stay:
                self.served = True
            self.publish("ready", "everything is plugged in, or waits for the VM", level=Level.DETAIL)

    async def _ready_without_devices(self) -> FarplugError | None:
        await self._link.opened()
        self._check_ready()
        await asyncio.Event().wait()
        return None

    # Later --------------------------------------------------------------------------------------------------------

    async def attach(
        self,
        sources: Sequence[Source],
        storage: StorageSettings | None = None,
        rules: DeviceRules | None = None,
        *,
        separate: bool = False,
        wait: bool = True,
        port: int | None = None,
    ) -> list[Attachment]:
        """Plug sources in, as those of the settings; return their attachments.

        If an image cannot be opened, or there are too few ports, nothing is plugged in. What is plugged in already
        stays as it is, and is noted.

        Args:
            sources: what to plug, in this order.
            storage: how images and folders are plugged; None: as those of the settings.
            rules: which USB devices of this machine are plugged besides the sources, and how they come back.
            separate: each source has a port of its own; otherwise they share one if there are too few.
            wait: wait until the guest has configured the devices, or until USB/IP clients can attach them; otherwise
                only until they are being plugged in.
            port: the number of the port for the only source, from 0; None: the first free one.

        Raises:
            FarplugError: a source cannot be plugged; the others of the call stay plugged in.
        """
        rules = rules or DeviceRules()
        if not sources and rules.auto_connect is None and rules.redirect_on_connect is None:
            raise UsageError("no device to attach is named", reason=Reason.BAD_SETTING)
        if any(source.uses_stdio for source in sources):
            raise UsageError(
                "standard input and output belong to the command that started the session",
                reason=Reason.BAD_SETTING,
                remedy="name another end, such as pty",
            )
        if port is not None and len(sources) != 1:
            raise UsageError(f"port {port}: a port is chosen for one source", reason=Reason.BAD_SETTING)
        what = ", ".join(source.name for source in sources) or "everything"
        call = self._attach(sources, storage, rules, separate, wait, port)
        return await self._until_closed(call, f"{shown(what)} was plugged in")

    async def _attach(
        self,
        sources: Sequence[Source],
        storage: StorageSettings | None,
        rules: DeviceRules,
        separate: bool,
        wait: bool,
        port: int | None,
    ) -> list[Attachment]:
        if storage is None:
            storage = self._storage
        plugged = [(source, self._plugged(source)) for source in sources]
        already = list(dict.fromkeys(attachment for _, attachment in plugged if attachment is not None))
        for source, attachment in plugged:
            if attachment is not None:
                self.note(f"{shown(source.name)} is plugged in already, as {attachment.label}")
        wanted = [source for source, attachment in plugged if attachment is None]
        await self._holdings.settle()
        auto = await self._choose_devices(wanted, rules)
        opened: list[OpenSource] = []
        try:
            for source in [one for one in wanted if one.kind is not SourceKind.USB_DEVICE]:
                opened += [await open_source(source, storage, self._sources, self._copying)]
            await self._link.connected()
            if port is not None and wanted:
                await self._make_room(port)
            places = () if port is None or not wanted else (self._chosen(port),)
            named = 0 if auto is None else auto.present
            while (free := self._free_ports()) < named + len(opened) and await self._make_room():
                pass
            if free < named + least_ports(opened):
                raise self._no_free_port(f"{len(wanted)} devices" if len(wanted) > 1 else shown(wanted[0].name))
            groups = self._groups(opened, free - named, separate=separate)
            devices = [device_of(group, storage) for group in groups]
        except BaseException:
            await self._holdings.close_sources(opened)
            if auto is not None:
                await self._end_auto(auto)
            raise
        for device, group in zip(devices, groups, strict=True):
            self._holdings.hold(device, group)
        plugging = [self._keep_call(self._plug_new(device, *places)) for device in devices]
        if auto is not None:
            auto.lenient = lambda: True
            named_places = places if wanted and wanted[0].kind is SourceKind.USB_DEVICE else ()
            running = self._keep_call(self._run_auto(auto, named_places))
            plugging += [self._keep_call(_first_of(call, running)) for call in auto.initial]
        if not wait:
            await asyncio.sleep(0)  # the attachments exist now, unless the VM is lost
            return [*already, *(one for one in self.attachments if one.device in devices and one not in already)]
        results = await asyncio.gather(*plugging, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        new = [result for result in results if isinstance(result, Attachment)]
        for attachment in new:
            if attachment.port.port.use:  # a client may attach it much later
                await attachment.attached()
            else:
                await attachment.configured()
        return [*already, *new]

    def _plugged(self, source: Source) -> Attachment | None:
        """Return the attachment that a source has; None: it has none."""
        if source.kind is not SourceKind.USB_DEVICE and KINDS[source.kind].repeatable:
            return None
        return next((one for one in self._current() if source.name in one.sources), None)

    def _chosen(self, number: int) -> Place:
        """Return the place that a user chose for a device.

        Raises:
            UsageError: the guest has no such port.
            PortError: the port is in use.
        """
        ports = self._link.ports
        if not 0 <= number < len(ports):
            last = f"0 to {len(ports) - 1}" if ports else "none"
            raise UsageError(f"port {number} does not exist", reason=Reason.BAD_SETTING, remedy=f"ports: {last}")
        if ports[number].in_use:
            raise PortError(
                f"port {number} is in use", reason=Reason.NO_FREE_PORT, remedy="detach its device, or use another port"
            )
        return Place(number)

    async def _plug_new(self, device: Device, place: Place | None = None) -> Attachment:
        """Plug a device of new sources; publish its error too, since perhaps no call waits."""
        description = self._holdings.describe(device)
        try:
            return await self._plug_device(device, place, description)
        except asyncio.CancelledError:
            await self._holdings.release(device)
            raise self._cancelled(f"{description.label} was plugged in") from None
        except FarplugError as error:
            await self._holdings.release(device)
            self.skipped(error)
            raise

    async def _run_auto(self, auto: AutoPlugger, places: Sequence[Place]) -> None:
        """Keep USB devices of this machine plugged in, until the guest is closed or one that was named fails."""
        try:
            await auto.run(self, places)
        finally:
            await self._end_auto(auto)

    async def _end_auto(self, auto: AutoPlugger) -> None:
        if auto in self._autos:
            self._autos.remove(auto)
            await auto.close()

    def _keep_call(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a call that :meth:`close` cancels. Its errors are published, or raised by who waits for it."""
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(retrieve)
        return task

    async def detach(self, name: str) -> list[str]:
        """Take devices out of the guest; return their labels. What is not plugged in is noted.

        Args:
            name: see :meth:`find`; ``all``: all of them.

        Raises:
            UsageError: the name fits several devices.
            DeviceError: written data of a device could not be made durable (the first one that failed).
        """
        current = self._current()
        found = current if name == ALL else [one for one in (self.find(name),) if one is not None]
        if not found:
            labels = ", ".join(one.label for one in current) or "nothing"
            self.note(
                "nothing is plugged in" if name == ALL else f"{shown(name)} is not plugged in; plugged in: {labels}"
            )
        await wait_for_all(self.unplug(attachment) for attachment in found)
        return [attachment.label for attachment in found]

    def _copying(self, label: str, done: int, total: int) -> None:
        """Publish how far the copy of a folder is, in bytes."""
        self.publish(
            "copying", f"{done} of {total} bytes copied", level=Level.PROGRESS, device=label, done=done, total=total
        )

    # Media --------------------------------------------------------------------------------------------------------

    def line(self, name: str) -> ClientEnd:
        """Return the end of a serial line that clients open.

        Args:
            name: the label of the serial line.

        Raises:
            UsageError: there is no such line, or its end is another one.
        """
        from farplug.ends.client import ClientEnd

        lines: dict[str, ClientEnd] = {}
        for one in self._holdings.sources():
            for function in one.content.functions if isinstance(one.content, Parts) else ():
                if isinstance(end := getattr(function, "end", None), ClientEnd):
                    lines[one.label] = end
        if name not in lines:
            raise UsageError(
                f"{shown(name)} is not a serial line with the end client",
                reason=Reason.NOT_FOUND,
                remedy=f"lines: {', '.join(lines) or 'none'}",
            )
        return lines[name]

    @property
    def uses_usb(self) -> bool:
        """Return whether USB devices of this machine may be in use."""
        return bool(self._autos) or self._holdings.has_locks

    def drives(self) -> Mapping[str, CdromDrive]:
        """Return the CD-ROM drives, by their labels: ``cdrom0``, ``cdrom1`` and so on."""
        return {label: unit for label, unit in self._holdings.units() if isinstance(unit, CdromDrive)}

    def answer(self, allow: bool, name: str | None = None, request: int | None = None) -> tuple[Attachment, Question]:
        """Answer for the user of a security key that a program in the VM waits for.

        Args:
            allow: allow what the program asks for.
            name: the key, by its label, id or path; None: the one that asks.
            request: the number of the question; None: the one that waits.

        Returns:
            The attachment of the key, and the question.

        Raises:
            UsageError: there is no such key, several ask, or (``not-asked``) no question waits, or another one.
        """
        attachment, key = find_key(self._current(), name)
        return attachment, key.answer(allow, request)

    def unfinished(self) -> dict[str, int]:
        """Return the labels of the disks that the VM may not have finished writing to.

        The value differs for each run of writes (:attr:`farplug.virtual.unit.LogicalUnit.unfinished`).
        """
        return {label: run for label, unit in self._holdings.units() if (run := unit.unfinished)}

    # Capture ------------------------------------------------------------------------------------------------------

    async def start_capture(self, settings: CaptureSettings) -> None:
        """Begin to capture what moves between the guest and its devices, those too that are plugged in already.

        Connections that exist already are not captured; the transfers of their devices are.

        Raises:
            UsageError: a capture runs already (``IN_USE``); the settings are not valid (``BAD_SETTING``); the file
                cannot be used, or holds something else.
            GuestGoneError: the guest is closed, or was closed meanwhile.
        """
        self._check_open()
        await self._until_closed(self.captures.start(settings), "the capture began", lambda _: self.captures.end())

    async def stop_capture(self) -> None:
        """End the capture: the file is complete then.

        Raises:
            UsageError: no capture runs (``NOT_FOUND``); the file could not be written to its end.
        """
        await self.captures.stop()

    # State --------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return the guest's state as JSON's types."""
        return {
            "id": self.id,
            "target": None if self.settings is None else self.settings.target.public_target,
            **self._link.snapshot(),
            "capture": self.captures.path,
            "attachments": {one.id: one.snapshot() for one in self._current()},
        }

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(FIGURES_INTERVAL)
            for attachment in self._current():
                self._figures(attachment)

    def _figures(self, attachment: Attachment) -> None:
        """Publish what an attachment has moved, if that has changed."""
        changed = attachment.measure()
        if changed is None:
            return
        self.publish(
            "figures",
            f"{changed['read']} bytes read, {changed['written']} bytes written",
            level=Level.DETAIL,
            attachment=attachment.id,
            device=attachment.label,
            state=str(attachment.state),
            **changed,
        )

    # The end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Unplug everything, side by side, close the connection, then the images, and release the USB devices.

        Running calls are cancelled first. A second call waits until the first one has ended.

        Raises:
            DeviceError: written data of a device could not be made durable (the first one that failed).
        """
        if self._closing is not None:
            await asyncio.shield(self._closing)
            return
        self._closing = asyncio.get_running_loop().create_future()
        try:
            async with AsyncExitStack() as steps:  # from the last one to the first one, each in any case
                steps.callback(self._link.publish_closed)
                steps.push_async_callback(self.captures.end)
                steps.push_async_callback(self._release_usb)
                steps.push_async_callback(self._holdings.close_images)
                steps.push_async_callback(self._link.close)
                steps.push_async_callback(self._unplug_all)
                steps.push_async_callback(self._cancel_calls)
        finally:
            self._closing.set_result(None)

    async def _cancel_calls(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        if self._returning is not None:
            self._returning.cancel()
        calls = [call for call in self._calls if call is not asyncio.current_task()]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _unplug_all(self) -> None:
        await wait_for_all(attachment.unplug() for attachment in self._current())

    async def _release_usb(self) -> None:
        await self._holdings.release_locks()
        await wait_for_all(auto.close() for auto in self._autos)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise GuestGoneError("the guest is closed")

    def _cancelled(self, what: str) -> GuestGoneError:
        """Return the error for a call that was cancelled before something happened."""
        who = "the device was unplugged" if self._closing is None else "the guest was closed"
        return GuestGoneError(f"{who} before {what}")

    async def _until_closed(
        self, call: Coroutine[Any, Any, T], what: str, undo: Callable[[T], Awaitable[object]] | None = None
    ) -> T:
        """Return what a call returns, which :meth:`close` cancels.

        Args:
            call: runs in a task of its own.
            what: would have happened, for the message: "the VM was reached".
            undo: is called with the result if the caller is cancelled when the call is done.

        Raises:
            GuestGoneError: the guest is closed, or was closed meanwhile.
        """
        if self._closing is not None:
            call.close()
            self._check_open()
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or not caller.cancelling():
                raise self._cancelled(what) from None
            if undo is not None and not task.cancelled() and task.exception() is None:
                await undo(task.result())
            raise
        finally:
            self._calls.discard(task)


async def _first_of(wanted: asyncio.Future[T], running: asyncio.Future[None]) -> T:
    """Return what ``wanted`` becomes, or raise why ``running`` ended before."""
    await asyncio.wait((wanted, running), return_when=asyncio.FIRST_COMPLETED)
    if not wanted.done():
        running.result()
        raise GuestGoneError("the guest is closed")
    return wanted.result()


class Plugging:
    """A device that is being plugged: await it, or use it with ``async with``. Made by :meth:`Guest.plug`."""

    def __init__(self, guest: Guest, plug: Callable[[], Coroutine[Any, Any, Attachment]]) -> None:
        self._guest = guest
        self._plug = plug
        self._attachment: Attachment | None = None

    def __await__(self) -> Generator[Any, None, Attachment]:
        return self._plug().__await__()

    async def __aenter__(self) -> Attachment:
        self._attachment = await self._plug()
        return self._attachment

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        await self._guest.unplug(self._attachment)


def unique(label: str, taken: Sequence[str]) -> str:
    """Return a label that is not taken: ``a.raw``, then ``a.raw-2`` and so on."""
    if label not in taken:
        return label
    return next(text for number in range(2, len(taken) + 3) if (text := f"{label}-{number}") not in taken)


def _name_of(device: Device) -> str:
    identity = device.identity
    return identity.product or f"{identity.vendor_id:04x}:{identity.product_id:04x}"


def _port_line(number: int, titles: Sequence[str], media: int) -> str:
    """Return what is in a port: the first titles, if they are several media, with their logical unit numbers."""
    numbered = media if media > 1 else 0
    units = [f"LUN {lun} {title}" for lun, title in enumerate(titles[:numbered])]
    return f"port {number}: {', '.join([*units, *titles[numbered:]])}"
