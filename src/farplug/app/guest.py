"""A guest: a VM, and what is plugged into it.

:meth:`Guest.run` does all that settings ask for, as ``farplug connect`` does. :meth:`Guest.connect`, :meth:`Guest.plug`
and :meth:`Guest.close` are the steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from farplug.app.attachment import Attachment, Place
from farplug.app.events import EventReader, EventStream, Level, level_of
from farplug.app.settings import GuestSettings, Source, SourceKind, StorageSettings
from farplug.app.sources import OpenSource, Sources, device_of, open_source
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    PortError,
    Reason,
    Remedy,
    StateError,
    TargetError,
    UsageError,
)
from farplug.redirection import events as port_events
from farplug.redirection.events import PortEvent, fields_of
from farplug.target import Target, open_session
from farplug.text import shown
from farplug.transport.dialer import SpiceTarget, Stage
from farplug.transport.port import Port
from farplug.transport.session import Session
from farplug.usb.device import Device
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.device import VirtualDevice
from farplug.virtual.events import MediumEvent
from farplug.virtual.storage import MAX_UNITS

if TYPE_CHECKING:
    from farplug.app.auto import AutoPlugger
    from farplug.machine.lock import DeviceLock

T = TypeVar("T")

log = logging.getLogger(__name__)

PASSWORD_ATTEMPTS = 3
"""Passwords that a user is asked for when the server does not accept the one that it was given."""
FIGURES_INTERVAL = 1.0
"""Seconds between two events ``figures`` of an attachment."""

ONE_CLIENT = (
    "SPICE serves one client at a time: farplug has taken the VM from any other client, and a console "
    "(virt-viewer) that connects now takes it from farplug"
)

AskPassword: TypeAlias = Callable[[FarplugError], Awaitable[str | None]]
"""Asks a user for a password; called with the server's refusal. None: there is none."""


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

    Attributes:
        id: as above.
        settings: as above.
        stream: as above.
        attachments: what is plugged in, or being plugged in, or has left by itself, in the order of plugging. One that
            has left stays until its device is plugged again.
        served: a device was attached, or :meth:`run` waits for one as it was asked to.
    """

    def __init__(
        self,
        settings: GuestSettings | None = None,
        *,
        session: Session | None = None,
        stream: EventStream | None = None,
        id: str = "g1",
        ask_password: AskPassword | None = None,
    ) -> None:
        self.id = id
        self.settings = settings
        self.stream = EventStream() if stream is None else stream
        self._session = session
        self.attachments: list[Attachment] = []
        self.served = False
        self._ask_password = ask_password
        self._stages = _Stages(self)
        self._sources = Sources()
        self._owned: dict[Device, Sequence[OpenSource]] = {}
        """Devices made of sources that :meth:`plug` opened: disposed of when the guest is closed, or before."""
        self._locks: dict[Device, DeviceLock] = {}
        self._releasing: dict[Device, asyncio.Task[None]] = {}
        self._auto: AutoPlugger | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        """Running calls that :meth:`close` cancels."""
        self._connecting = False
        self._places: list[Place] = []
        self._count = 0
        self._ticker: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        if self._session is None:
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
        """Publish that a USB device of this machine is not plugged in; nothing else changes."""
        self.publish("skipped", error.message, level=Level.BAD, **_error_fields(error))

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
        self.publish("command-refused", error.message, level=Level.BAD, **_error_fields(error))

    def precede(self, attachment: Attachment, event: type[PortEvent]) -> None:
        """Publish what comes before an event of an attachment. The attachment calls this."""
        if event is port_events.Opened:
            self._stages.reached()
        elif event is port_events.Detached:
            self._figures(attachment)

    def happened(self, attachment: Attachment, event: PortEvent) -> None:
        """Publish an event of an attachment. The attachment calls this."""
        fields = {**fields_of(event), "state": str(attachment.state)}
        device, message = attachment.label, str(event)
        match event:
            case port_events.Opened(number=number):
                fields["units"] = list(attachment.titles)
                message = _port_line(number, attachment.titles)
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

    def number_of(self, port: Port) -> int:
        """Return the number of a port of the guest, from 0."""
        return [port is other for other in self.session.ports].index(True)

    # Connecting ---------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """Return the connection to the VM.

        Raises:
            StateError: there is none yet.
        """
        if self._session is None:
            raise StateError("the guest is not connected")
        return self._session

    async def connect(self) -> None:
        """Connect to the VM. A plain socket is connected only when a device is plugged into its port.

        Where the server wants another password, the user is asked for it, up to :data:`PASSWORD_ATTEMPTS` times.

        Raises:
            UsageError: the target or a setting of it is not valid.
            TargetError: the VM cannot be reached; the reason says at which stage.
            StateError: the guest is connected, or is being connected, or has no settings.
            GuestGoneError: the guest is closed, or was closed meanwhile.
        """
        if self.settings is None:
            raise StateError("the guest has no target")
        self._check_open()
        if self._session is not None or self._connecting:
            raise StateError("the guest is connected already, or is being connected")
        self._connecting = True
        try:
            await self._until_closed(self._connect(self.settings.target.parse()), "the VM was reached")
        finally:
            self._connecting = False

    async def _connect(self, target: Target) -> None:
        attempts = PASSWORD_ATTEMPTS
        while True:
            try:
                session = await open_session(target, self._stages.begin)
                break
            except TargetError as error:
                password = await self._password(target, error) if attempts else None
                if password is None or not isinstance(target, SpiceTarget):
                    self._stages.failed(error)
                    raise
                attempts -= 1
                target = replace(target, password=password)
            except BaseException as error:
                self._stages.failed(error)
                raise
        if session.reached:
            self._stages.reached()
        self._session = session
        self.publish(
            "connected",
            f"the VM has {len(session.ports)} port{'' if len(session.ports) == 1 else 's'}",
            level=Level.DETAIL,
            name=session.name,
            uuid=session.uuid,
            exclusive=session.exclusive,
            ports=[port.name for port in session.ports],
        )
        if session.exclusive:
            self.note(ONE_CLIENT)
        if session.name:
            self.note(f"the VM is called {session.name}")

    async def _password(self, target: Target, error: TargetError) -> str | None:
        """Return another password for a server that wants one; None if no user can be asked."""
        if error.reason not in (Reason.WRONG_PASSWORD, Reason.NO_PASSWORD) or self._ask_password is None:
            return None
        self._stages.failed(error)
        return await self._ask_password(error)

    async def closed(self) -> FarplugError | None:
        """Wait until the guest is gone as a whole; return why, or None if :meth:`close` closed it."""
        return await self.session.closed()

    # Ports --------------------------------------------------------------------------------------------------------

    def check_room(self, count: int) -> None:
        """Check that the guest has ports for ``count`` devices, also those in use.

        Raises:
            PortError: it has fewer.
        """
        session = self.session
        ports = len(session.ports)
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
        self._places = [Place(port) for port in self.session.ports[:count]]
        return tuple(self._places)

    # Plugging -----------------------------------------------------------------------------------------------------

    def plug(
        self,
        what: Source | Device,
        place: Place | None = None,
        *,
        storage: StorageSettings | None = None,
        label: str = "",
        titles: Sequence[str] = (),
        units: Sequence[str] = (),
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
            titles: the logical units of the device with what is in them; empty: its label.
            units: the labels of the logical units; empty: its label.

        Raises:
            ImageError: the source cannot be used.
            PortError: there is no free port.
            TargetError: a port cannot be reached.
            RefusedError: the guest rules the device out.
            DeviceError: the device cannot be taken.
            GuestGoneError: the guest went away, or was closed meanwhile.
        """
        return Plugging(self, lambda: self._plug(what, place, storage, label, titles, units))

    async def _plug(
        self,
        what: Source | Device,
        place: Place | None,
        storage: StorageSettings | None,
        label: str,
        titles: Sequence[str],
        units: Sequence[str],
    ) -> Attachment:
        if isinstance(what, Source):
            name, call = what.path, self._plug_source(what, place, storage, label)
        else:
            name, call = str(what.identity), self._plug_device(what, place, label or _name_of(what), titles, units)
        try:
            return await self._until_closed(call, f"{name} was plugged in", self.unplug)
        finally:
            if place is not None:
                place.give_way()

    async def plug_usb(self, device: Device, label: str, place: Place | None) -> Attachment:
        """Plug a USB device of this machine; see :meth:`plug`."""
        return await self.plug(device, place, label=label)

    async def _plug_source(
        self, source: Source, place: Place | None, storage: StorageSettings | None, label: str
    ) -> Attachment:
        if storage is None:
            storage = StorageSettings() if self.settings is None else self.settings.storage
        if source.kind is SourceKind.USB_DEVICE:
            from farplug.app.auto import choose_device

            device, lock = await choose_device(source.path, force=storage.force)
            self._locks[device] = lock
            try:
                return await self._plug_device(device, place, label or _name_of(device), (), ())
            except BaseException:
                await self._release(device)
                raise
        opened = await open_source(source, storage, self._sources, self._copying)
        virtual = device_of([opened], storage)
        self._owned[virtual] = [opened]
        try:
            return await self._plug_device(virtual, place, label or opened.label, [opened.title], [opened.label])
        except BaseException:
            await self._release(virtual)
            raise

    async def _plug_device(
        self, device: Device, place: Place | None, label: str, titles: Sequence[str], units: Sequence[str]
    ) -> Attachment:
        try:
            return await self._into_port(device, place, label, titles, units)
        except TargetError as error:
            self._stages.failed(error)  # of a plain socket, which is connected only now
            raise

    async def _into_port(
        self, device: Device, place: Place | None, label: str, titles: Sequence[str], units: Sequence[str]
    ) -> Attachment:
        if any(attachment.device is device and not attachment.over for attachment in self.attachments):
            raise StateError(f"{device.identity} is plugged in already")
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
            attachment = self._attachment(device, port, label, titles, units)
            try:
                await attachment.plug(earlier)
            except PortError as error:  # another client uses this port: the next one may be free
                in_use = error
            except BaseException:
                self._remove(attachment)
                raise
            else:
                return attachment
            self._remove(attachment)
        raise in_use or self._no_free_port(device)

    def _attachment(
        self, device: Device, port: Port, label: str, titles: Sequence[str], units: Sequence[str]
    ) -> Attachment:
        self._count += 1
        label = unique(label, [attachment.label for attachment in self.attachments])
        attachment = Attachment(self, f"{self.id}.a{self._count}", label, titles, units, device, port)
        self.attachments.append(attachment)
        snapshot = {name: value for name, value in attachment.snapshot().items() if name != "id"}
        self.publish(
            "attaching",
            f"connecting to {port.name}",
            level=Level.DETAIL,
            attachment=attachment.id,
            device=attachment.label,
            **snapshot,
        )
        if self._ticker is None:
            self._ticker = asyncio.ensure_future(self._tick())
        return attachment

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
            await self._release(attachment.device)

    def left(self, attachment: Attachment) -> None:
        """Close what :meth:`plug` opened for a device that has left the guest. The attachment calls this.

        While the guest is closed, :meth:`close` does that, after the session.
        """
        if self._closing is None and self._opened_here(attachment.device):
            self.forget(attachment)
            self._start_release(attachment.device)

    def _opened_here(self, device: Device) -> bool:
        return device in self._owned or device in self._locks

    async def _release(self, device: Device) -> None:
        """Close what :meth:`plug` opened for a device: images, or a lock."""
        if self._opened_here(device):
            self._start_release(device)
        if device in self._releasing:
            await asyncio.shield(self._releasing[device])

    def _start_release(self, device: Device) -> None:
        sources, lock = self._owned.pop(device, ()), self._locks.pop(device, None)
        task = self._releasing[device] = asyncio.ensure_future(self._release_now(device, sources, lock))

        def released(task: asyncio.Task[None]) -> None:
            del self._releasing[device]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("what was opened for %s cannot be closed", device.identity, exc_info=error)

        task.add_done_callback(released)

    async def _release_now(self, device: Device, sources: Sequence[OpenSource], lock: DeviceLock | None) -> None:
        try:
            if sources and isinstance(device, VirtualDevice):
                await device.dispose()
        finally:
            for opened in sources:
                self._sources.release(opened)
            if lock is not None:
                await asyncio.to_thread(lock.release)

    def find(self, name: str) -> Attachment:
        """Return the attachment with a label or an id.

        Raises:
            UsageError: there is none.
        """
        current = [attachment for attachment in self.attachments if not attachment.over]
        for attachment in current:
            if name in (attachment.label, attachment.id, *attachment.units):
                return attachment
        labels = ", ".join(attachment.label for attachment in current) or "nothing"
        remedy = f"what is plugged in: {labels}"
        raise UsageError(f"{shown(name)} is not plugged in", reason=Reason.NOT_FOUND, remedy=remedy)

    def _no_free_port(self, device: Device) -> PortError:
        session = self.session
        count = len(session.ports)
        ports = "its only port is" if count == 1 else f"all of its {count} ports are"
        taken = "taken, or kept for a device that was named" if self._places else "taken"
        return PortError(
            f"the VM has no free port for {device.identity}: {ports} {taken}",
            reason=Reason.NO_FREE_PORT,
            remedy=session.no_port_remedy,
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
        named = await self._choose_devices(settings)
        await self._sources.open(settings.sources, settings.storage, self._copying, self.note)
        await self.connect()  # only now: reading a .vv file may delete it
        await self._stay(settings, named)

    async def _choose_devices(self, settings: GuestSettings) -> int:
        """Choose among the USB devices of this machine; return how many of them were named."""
        devices = [source.path for source in settings.sources if source.kind is SourceKind.USB_DEVICE]
        rules = settings.rules
        if not devices and rules.auto_connect is None and rules.redirect_on_connect is None:
            return 0
        from farplug.app.auto import AutoPlugger  # libusb comes with it, which images do not need
        from farplug.app.policy import Policy, Rules

        self._auto = AutoPlugger(Policy(Rules.parse(rules, devices)), self)
        return await self._auto.prepare()

    async def _stay(self, settings: GuestSettings, named: int) -> None:
        """Plug everything in, side by side, and stay until all devices have left, or the guest is gone."""
        ports, count = len(self.session.ports), len(self._sources.opened)
        self.check_room(max(1, named + (min(count, 1) if count <= MAX_UNITS else count)))
        if count and ports - named < count:
            free = ports - named
            has = "1 port" if free == 1 else f"{free} ports"
            self.note(f"the VM has {has} for {count} devices: they are plugged as {count} logical units of one device")
        groups = self._sources.groups(ports - named)
        devices: dict[Device, Sequence[OpenSource]] = {device_of(group, settings.storage): group for group in groups}
        self._owned |= devices
        first = {device: group[0].place for device, group in devices.items()}
        usb = [place for place, source in enumerate(settings.sources) if source.kind is SourceKind.USB_DEVICE]
        order = sorted([*first.values(), *usb])
        places = dict(zip(order, self.reserve(len(order)), strict=True))
        gone = asyncio.ensure_future(self.closed())
        staying: list[asyncio.Future[FarplugError | None]] = []
        if devices:
            staying.append(asyncio.ensure_future(self._plug_all({d: places[first[d]] for d in devices})))
        if self._auto is not None:
            staying.append(asyncio.ensure_future(self._auto.run(self, [places[place] for place in usb])))
            self.served = settings.rules.wait or settings.rules.auto_connect is not None
        try:
            await asyncio.wait((gone, *staying), return_when=asyncio.FIRST_COMPLETED)
            error = next((future for future in staying if future.done()), gone).result()
        finally:
            gone.cancel()
            for future in staying:
                future.cancel()
            await asyncio.gather(*staying, return_exceptions=True)
        if error is not None:
            raise error

    async def _plug_all(self, devices: Mapping[Device, Place]) -> FarplugError | None:
        """Plug devices in, and wait until all devices have left; return why, if no user asked for that.

        Devices that a command plugs meanwhile are waited for, too; why they leave matters to no other device.
        """
        errors = await asyncio.gather(*(self._plug_and_wait(device, place) for device, place in devices.items()))
        while current := [attachment for attachment in self.attachments if not attachment.over]:
            await current[0].ended()
        return next((error for error in errors if error is not None), None)

    async def _plug_and_wait(self, device: Device, place: Place) -> FarplugError | None:
        group = self._owned[device]
        attachment = await self.plug(
            device,
            place,
            label=", ".join(one.label for one in group),
            titles=[one.title for one in group],
            units=[one.label for one in group],
        )
        error = await attachment.ended()
        self._places.remove(place)  # unlike a USB device of this machine, this one does not come back
        return error

    def _copying(self, label: str, done: int, total: int) -> None:
        """Publish how far the copy of a folder is, in bytes."""
        self.publish(
            "copying", f"{done} of {total} bytes copied", level=Level.PROGRESS, device=label, done=done, total=total
        )

    # Media --------------------------------------------------------------------------------------------------------

    @property
    def uses_usb(self) -> bool:
        """Return whether USB devices of this machine may be in use."""
        return self._auto is not None or bool(self._locks)

    def drives(self) -> Mapping[str, CdromDrive]:
        """Return the CD-ROM drives, by their labels: ``cdrom0``, ``cdrom1`` and so on."""
        return {label: unit for label, unit in self._units() if isinstance(unit, CdromDrive)}

    def unfinished(self) -> dict[str, int]:
        """Return the labels of the disks that the VM may not have finished writing to.

        The value differs for each run of writes (:attr:`farplug.virtual.unit.LogicalUnit.unfinished`).
        """
        return {label: run for label, unit in self._units() if (run := unit.unfinished)}

    def _units(self) -> list[tuple[str, Any]]:
        return [(one.label, one.unit) for group in self._owned.values() for one in group if one.unit is not None]

    # State --------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return the guest's state as JSON's types."""
        session = self._session
        return {
            "id": self.id,
            "target": None if self.settings is None else self.settings.target.public_target,
            "name": "" if session is None else session.name,
            "uuid": "" if session is None else session.uuid,
            "ports": [] if session is None else [port.name for port in session.ports],
            "attachments": {one.id: one.snapshot() for one in self.attachments if not one.over},
        }

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(FIGURES_INTERVAL)
            for attachment in self.attachments:
                if not attachment.over:
                    self._figures(attachment)

    def _figures(self, attachment: Attachment) -> None:
        """Publish what an attachment has moved, if that has changed."""
        changed = attachment.measure()
        if changed is None:
            return
        figures, rate = changed
        self.publish(
            "figures",
            f"{figures.read} bytes read, {figures.written} bytes written",
            level=Level.DETAIL,
            attachment=attachment.id,
            device=attachment.label,
            state=str(attachment.state),
            read=figures.read,
            written=figures.written,
            commands=figures.commands,
            rate=round(rate),
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
                steps.callback(self.publish, "closed", "the guest is closed", level=Level.DETAIL)
                steps.push_async_callback(self._release_devices)
                steps.push_async_callback(self._close_images)
                steps.push_async_callback(self._close_session)
                steps.push_async_callback(self._unplug_all)
                steps.push_async_callback(self._cancel_calls)
        finally:
            self._closing.set_result(None)

    async def _cancel_calls(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        calls = [call for call in self._calls if call is not asyncio.current_task()]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _unplug_all(self) -> None:
        await _all(attachment.unplug() for attachment in self.attachments if not attachment.over)

    async def _close_session(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _close_images(self) -> None:
        devices = {*self._owned, *self._releasing}
        await _all([*(self._release(device) for device in devices), self._sources.close()])

    async def _release_devices(self) -> None:
        await _all(self._release(device) for device in list(self._locks))
        if self._auto is not None:
            await self._auto.close()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise GuestGoneError("the guest is closed")

    async def _until_closed(
        self, call: Coroutine[Any, Any, T], what: str, undo: Callable[[T], Awaitable[None]] | None = None
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
                who = "the device was unplugged" if self._closing is None else "the guest was closed"
                raise GuestGoneError(f"{who} before {what}") from None
            if undo is not None and not task.cancelled() and task.exception() is None:
                await undo(task.result())
            raise
        finally:
            self._calls.discard(task)


async def _all(calls: Iterable[Awaitable[object]]) -> None:
    """Wait for all calls, side by side; raise the first error when all have ended."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


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


class _Stages:
    """Publishes the stages on the way to the guest: when each begins, and how it ends."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._pending: tuple[str, str] | None = None

    def begin(self, stage: Stage, text: str) -> None:
        """Publish that a stage begins: the one before it is reached."""
        self.reached()
        self._pending = (str(stage), text)
        self._publish("begun", Level.PROGRESS)

    def reached(self) -> None:
        """Publish that the pending stage is reached. Does nothing if there is none."""
        self._publish("reached", Level.GOOD)
        self._pending = None

    def failed(self, error: BaseException) -> None:
        """Publish that the pending stage failed. Does nothing if there is none."""
        fields = _error_fields(error) if isinstance(error, FarplugError) else {}
        self._publish("failed", Level.BAD, **fields)
        self._pending = None

    def _publish(self, state: str, level: Level, **fields: Any) -> None:
        if self._pending is not None:
            stage, text = self._pending
            self._guest.publish("stage", text, level=level, stage=stage, state=state, **fields)


def unique(label: str, taken: Sequence[str]) -> str:
    """Return a label that is not taken: ``a.raw``, then ``a.raw-2`` and so on."""
    if label not in taken:
        return label
    return next(text for number in range(2, len(taken) + 3) if (text := f"{label}-{number}") not in taken)


def _name_of(device: Device) -> str:
    identity = device.identity
    return identity.product or f"{identity.vendor_id:04x}:{identity.product_id:04x}"


def _port_line(number: int, titles: Sequence[str]) -> str:
    units = titles if len(titles) == 1 else [f"LUN {lun} {title}" for lun, title in enumerate(titles)]
    return f"port {number}: {', '.join(units)}"


def _error_fields(error: FarplugError) -> dict[str, Any]:
    return {"reason": str(error.reason), **error.remedy.as_dict()}
