"""One run of ``farplug connect``: plug in, show what happens, leave cleanly."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from farplug.app.guest import Attachment, Hub, Place
from farplug.app.sources import Media
from farplug.cli import log
from farplug.cli.commands import obey
from farplug.cli.exit_codes import ExitCode
from farplug.cli.output import Output, SilentOutput, unfinished_writes
from farplug.errors import FarplugError, InternalError
from farplug.redirection import events
from farplug.redirection.events import PortEvent
from farplug.target import TargetOptions, open_session, parse_target
from farplug.usb.device import Device
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.device import VirtualDevice
from farplug.virtual.events import MediumEvent
from farplug.virtual.storage import MAX_UNITS

if TYPE_CHECKING:
    from farplug.app.auto import Keeper
    from farplug.app.policy import Wishes
    from farplug.machine.found import Found

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a session: Ctrl-C, kill, a terminal that is closed."""

ONE_CLIENT = (
    "SPICE serves one client at a time: farplug has taken the VM from any other client, and a console "
    "(virt-viewer) that connects now takes it from farplug"
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing to a file fails with that is full."""


@dataclass(frozen=True, slots=True)
class Name:
    """What a device is called in the output.

    Attributes:
        units: the names of its logical units; the device's own name if it has none.
        titles: the same, with what is in them.
    """

    units: tuple[str, ...]
    titles: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.units)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        target: where to, as it was written.
        options: what was said about it besides.
        media: what to plug in.
        wishes: which devices of this machine to plug in; None: none, and never.
        places: where each of the named ones (``wishes.choices``) was named among all devices of the command line.
        commands: read commands from standard input.
        force: leave at the first interrupt, also while the VM may have more to write.
    """

    target: str
    options: TargetOptions
    media: Media
    wishes: Wishes | None = None
    places: Sequence[int] = ()
    commands: bool = False
    force: bool = False


async def run(plan: Plan, output: Output) -> ExitCode:
    """Run until a signal comes, or raise what went wrong.

    Returns:
        OK; INTERRUPTED if the signal came before any device was plugged in.
    """
    return await _Session(plan, output).run()


class _Session:
    def __init__(self, plan: Plan, output: Output) -> None:
        self._plan = plan
        self._output = output
        self._names: dict[Device, Name] = {}
        self._keeper: Keeper | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[None] | None = None
        self._interrupted = False
        self._signalled = False
        self._served = False
        """A device was plugged in, or the session waits for one as it was asked to."""
        self._bug: InternalError | None = None
        self._leaving = False
        self._warned: dict[str, int] = {}
        """The disks of the last warning about unfinished writes, and the run of writes that it was about."""

    async def run(self) -> ExitCode:
        loop = self._loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._callback_failed)
        self._work = loop.create_task(self._plug_and_leave())
        for number in SIGNALS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._interrupt, number)
        try:
            self._show(lambda output: output.start())
            await self._work
            self._raise_bug()
        except asyncio.CancelledError:
            self._raise_bug()
            if not self._interrupted:
                raise
        except FarplugError as error:
            failure = error
            self._show(lambda output: output.failed(failure))
            raise
        finally:
            self._show(lambda output: output.stop())
        return ExitCode.INTERRUPTED if self._signalled and not self._served else ExitCode.OK

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Leave after an exception in a callback of the event loop, which is a bug: asyncio would only log it."""
        error = context.get("exception")
        if not isinstance(error, Exception) or isinstance(error, (FarplugError, OSError)):
            loop.default_exception_handler(context)
        elif self._bug is None:
            self._bug = InternalError(error)
            self._leave()

    def _raise_bug(self) -> None:
        if self._bug is not None:
            raise self._bug

    def _interrupt(self, number: signal.Signals) -> None:
        if self._interrupted:
            self._leave_at_once()
        unwarned = self._unfinished()
        asks = number is signal.SIGINT and not self._plan.force and _on_terminal()
        if unwarned and asks and not self._leaving:
            self._warned |= unwarned
            self._show(lambda output: output.unfinished(list(unwarned), leaving=False))
            return
        self._interrupted = self._signalled = True
        self._leave()
        if unwarned:
            self._show(lambda output: output.unfinished(list(unwarned), leaving=True))
        self._show(lambda output: output.note("leaving; interrupt again to leave at once"))

    def _unfinished(self) -> dict[str, int]:
        """Return the disks that the VM may not have finished writing to; none if all of them were warned about."""
        unfinished = self._plan.media.unfinished()
        return unfinished if unfinished.items() - self._warned.items() else {}

    def _leave_at_once(self) -> NoReturn:
        self._show(lambda output: output.stop())
        log.say("farplug: left at once, without waiting for the VM")
        if self._keeper is not None:
            from farplug.physical.device_thread import finish

            finish()  # this machine's devices get their drivers again
        os._exit(ExitCode.INTERRUPTED)

    def _leave(self) -> None:
        if self._work is not None and not self._leaving:
            self._leaving = True
            self._work.cancel()

    def _show(self, what: Callable[[Output], None]) -> None:
        """Say something. When nobody reads it any more (a closed pipe or terminal), that is the end of the session.

        A log for which there is no more room is no reason to pull disks out of a VM.
        """
        try:
            what(self._output)
        except OSError as error:
            self._output = SilentOutput()
            log.discard(sys.stdout)
            if error.errno in _NO_ROOM:
                log.say(f"farplug: warning: nothing more is told on standard output: {os.strerror(error.errno)}")
                return
            if not self._leaving and (unwarned := self._unfinished()):
                log.say(f"farplug: warning: {unfinished_writes(list(unwarned), leaving=True)}")
            self._interrupted = True
            self._leave()

    async def _plug_and_leave(self) -> None:
        try:
            named = await self._prepare_devices()
            await self._plan.media.open(self._copying, self.note)
            # Only now: reading a .vv file may delete it.
            target = parse_target(self._plan.target, self._plan.options)
            session = await open_session(target, lambda stage, text: self._show(lambda o: o.stage(str(stage), text)))
            hub = Hub(session)
            try:
                await self._stay(hub, named)
            finally:
                self._leaving = True
                await hub.close()
        finally:
            self._leaving = True
            for device in self._names:
                if isinstance(device, VirtualDevice):
                    await device.dispose()
            await self._plan.media.close()
            if self._keeper is not None:
                await self._keeper.close()

    async def _prepare_devices(self) -> int:
        """Choose among the devices of this machine; how many of them were named."""
        if self._plan.wishes is None:
            return 0
        from farplug.app.auto import Keeper  # libusb comes with it, which images do not need
        from farplug.app.policy import Policy

        self._keeper = Keeper(Policy(self._plan.wishes), self)
        return await self._keeper.prepare()

    # KeeperListener

    def plugging(self, device: Device, found: Found) -> None:
        label = found.name or found.id
        if label in map(str, self._names.values()):
            label = f"{label} ({found.port})"
        self._names[device] = Name((label,), (label,))

    def parted(self, device: Device) -> None:
        self._names.pop(device, None)

    def note(self, text: str) -> None:
        self._show(lambda output: output.note(text))

    def skipped(self, error: FarplugError) -> None:
        self._show(lambda output: output.skipped(error))

    def _copying(self, label: str, done: int, total: int) -> None:
        """How far the copy of a folder is; called from another thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._show, lambda output: output.copying(label, done, total))

    async def _stay(self, hub: Hub, named: int) -> None:
        """Plug everything in, side by side, and stay until all devices have left, or the guest is gone."""
        hub.subscribe(self._happened)
        if hub.session.reached:
            self._show(lambda output: output.reached())
        if hub.session.exclusive:
            self._show(lambda output: output.note(ONE_CLIENT))
            if hub.session.name:
                self._show(lambda output: output.note(f"the VM is called {hub.session.name}"))
        ports, count = len(hub.session.ports), len(self._plan.media.wishes)
        hub.check_room(max(1, named + (min(count, 1) if count <= MAX_UNITS else count)))
        if count and ports - named < count:
            free = ports - named
            has = "1 port" if free == 1 else f"{free} ports"
            note = f"the VM has {has} for {count} devices: they are plugged as {count} logical units of one device"
            self._show(lambda output: output.note(note))
        media = self._plan.media.devices(ports - named)
        for device, units in media.items():
            self._names[device] = Name(tuple(unit.label for unit in units), tuple(unit.title for unit in units))
        first = {device: units[0].place for device, units in media.items()}
        order = sorted([*first.values(), *self._plan.places])
        places = dict(zip(order, hub.reserve(len(order)), strict=True))
        ticker = asyncio.ensure_future(self._tick(hub))
        commands = asyncio.ensure_future(self._obey())
        gone = asyncio.ensure_future(hub.session.closed())
        staying: list[asyncio.Future[FarplugError | None]] = []
        if media:
            plugging = {device: places[place] for device, place in first.items()}
            staying.append(asyncio.ensure_future(self._plug_all(hub, plugging)))
        if self._keeper is not None:
            kept = [places[place] for place in self._plan.places]
            staying.append(asyncio.ensure_future(self._keeper.run(hub, kept)))
            self._served = self._plan.wishes is not None and self._plan.wishes.stays
        try:
            await asyncio.wait((gone, *staying), return_when=asyncio.FIRST_COMPLETED)
            error = next((future for future in staying if future.done()), gone).result()
        finally:
            for task in (ticker, commands, gone):
                task.cancel()
            for future in staying:
                future.cancel()
            await asyncio.gather(*staying, return_exceptions=True)
        if error is not None:
            raise error

    async def _plug_all(self, hub: Hub, devices: Mapping[VirtualDevice, Place]) -> FarplugError | None:
        """Plug devices in, and wait until they have left; why, if nobody here wanted it."""
        errors = await asyncio.gather(*(self._plug(hub, device, place) for device, place in devices.items()))
        return next((error for error in errors if error is not None), None)

    async def _obey(self) -> None:
        if self._plan.commands:
            await obey(self)

    # Host of commands

    def drives(self) -> Sequence[tuple[str, CdromDrive]]:
        return self._plan.media.drives()

    def listed(self, name: str, drive: CdromDrive) -> None:
        self._show(lambda output: output.drive(name, drive))

    def refused(self, error: FarplugError) -> None:
        self._show(lambda output: output.refused(error))

    def quit(self) -> None:
        self._interrupt(signal.SIGINT)

    async def _plug(self, hub: Hub, device: VirtualDevice, place: Place) -> FarplugError | None:
        """The same for one."""
        return await (await hub.plug(device, place)).ended()

    def _happened(self, attachment: Attachment, event: PortEvent) -> None:
        name = self._name(attachment)
        match event:
            case events.Opened():
                self._show(lambda output: output.reached())
                self._show(lambda output: output.opened(str(name), name.titles, event))
            case events.DeviceReport(event=MediumEvent(lun=lun)):
                self._show(lambda output: output.happened(name.units[lun], attachment, event))
            case _:
                self._served = self._served or isinstance(event, events.Attached)
                self._show(lambda output: output.happened(str(name), attachment, event))

    async def _tick(self, hub: Hub) -> None:
        while True:
            self._show(lambda output: output.figures([(str(self._name(a)), a) for a in hub.attachments]))
            await asyncio.sleep(self._output.interval)

    def _name(self, attachment: Attachment) -> Name:
        return next(name for device, name in self._names.items() if device is attachment.device)


def _on_terminal() -> bool:
    """Return whether a person sees what is printed and can interrupt again: no script, no pipe."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
