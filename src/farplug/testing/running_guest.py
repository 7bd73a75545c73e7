"""A QEMU guest with farplug connected to it, for the time of one test, and what shows why the test failed."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from farplug.app.attachment import Attachment
from farplug.app.events import Event, EventStream, Level
from farplug.app.guest import Guest
from farplug.app.screen import Frame, Screen
from farplug.app.settings import CaptureSettings, GuestSettings, Source, StorageSettings, TargetSettings
from farplug.errors import FarplugError, PortError, Reason, Remedy, StateError, TargetError
from farplug.redirection.events import DeviceFault, DeviceReport
from farplug.testing.pictures import colours_only, count_differing, reduced, strip
from farplug.usb.device import Device
from farplug.virtual.device import VirtualDevice
from farplug.virtual.events import FunctionRaised
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import Boot

FRAMES: Final = 10
"""Screens that are kept for a test that fails."""
FRAME_INTERVAL: Final = 0.25
"""Seconds between two of them, at least."""
CURSOR: Final = 128
"""Pixels: a change of no more, such as a cursor that blinks, does not make another screen."""
EVENTS: Final = 1000
"""Lines about what happened that are kept."""
EVIDENCE_TIMEOUT: Final = 20.0
"""Seconds for the last screen, of a VM that may be stuck."""
DISCONNECT_TIMEOUT: Final = 30.0
"""Seconds in which a guest lets its devices go at the end of a test."""


@dataclass(slots=True)
class Evidence:
    """What shows why a test failed.

    Attributes:
        console: the text of the serial console since the test began.
        stderr: QEMU's standard output and standard error.
        firmware: the firmware's debug messages.
        events: what happened to devices, a line each.
        screen: the last screen, a PNG file; empty: there is none.
        screens: the last screens below each other, a PNG file; empty: there is none.
        captures: the pcapng files of the USB traffic; they are complete.
    """

    console: str
    stderr: str
    firmware: str
    events: Sequence[str]
    screen: bytes = b""
    screens: bytes = b""
    captures: list[Path] = field(default_factory=list)


class RunningGuest:
    """A QEMU guest for the time of one test. All methods are called on the event loop that started it.

    farplug connects when something is plugged in, or the screen or the keyboard is used: until then other programs can
    use the ports.

    Args:
        vm: the guest.
        captures: the folder for captures of the USB traffic; None: nothing is captured.

    Attributes:
        vm: as above.
        is_paused: the guest was started with stopped processors, and :meth:`start` was not called yet.
        is_closed: the guest was released.
        faults: exceptions of devices.
    """

    def __init__(self, vm: QemuGuest, captures: Path | None = None) -> None:
        self.vm = vm
        self.is_paused = vm.config.paused
        self.faults: list[Exception] = []
        self._captures = captures
        self._captured: list[Path] = []
        # A guest that other tests have used has printed before.
        self._console_start = len(vm.console) if vm.config.boot is Boot.KERNEL else 0
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._stream = EventStream()
        self._stream.subscribe(self._happened)
        self._links: list[Guest] = []
        self._connecting = asyncio.Lock()
        self._pending: list[asyncio.Task[Attachment]] = []
        self._devices: list[VirtualDevice] = []
        self._frames: deque[Frame] = deque(maxlen=FRAMES)
        self._recording: asyncio.Task[None] | None = None
        self.is_closed = False
        self._kept_evidence: Evidence | None = None

    # State

    @property
    def console(self) -> str:
        """Return the text of the serial console since the test began."""
        return self.vm.console[self._console_start :]

    @property
    def events(self) -> list[str]:
        """Return what happened to devices, a line each, the oldest first."""
        return [*self._events]

    def check_open(self) -> None:
        """Raise ``StateError`` if the guest was released."""
        if self.is_closed:
            raise StateError("this guest was released: its test has ended, or its with block")

    def _happened(self, event: Event) -> None:
        source = event.source
        if isinstance(source, DeviceFault):
            self.faults.append(source.error)
        elif isinstance(source, DeviceReport) and isinstance(source.event, FunctionRaised):
            self.faults.append(source.event.error)
        if event.level is not Level.DETAIL and event.name != "stage":
            clock = time.strftime("%H:%M:%S", time.localtime(event.time))
            self._events.append(f"{clock} {event.device or 'guest'}: {event.message}")

    # Processors and console

    async def start(self) -> None:
        """Start the processors of a paused guest, and wait until it was offered what is plugged in.

        Raises:
            StateError: they run.
            FarplugError: a device could not be plugged in.
        """
        self.check_open()
        if not self.is_paused:
            raise StateError("the guest is not paused: its configuration starts it at once")
        await self.vm.qmp.execute("cont")
        self.is_paused = False
        pending, self._pending = self._pending, []
        await asyncio.gather(*pending)

    async def wait_for_text(self, pattern: re.Pattern[str], timeout: float) -> re.Match[str]:
        """Wait until the serial console has shown a text since the test began.

        Raises:
            GuestTimeout: the text did not appear in time.
            GuestCrashed: QEMU ended.
        """
        self.check_open()
        return await self.vm.wait_for_console(pattern, timeout, since=self._console_start)

    # Devices

    async def links(self) -> Sequence[Guest]:
        """Return farplug's connections to the guest: one to its SPICE server, and one to each other port.

        Raises:
            StateError: the test has ended.
            FarplugError: a connection failed.
        """
        self.check_open()
        async with self._connecting:
            if not self._links:
                try:
                    await self._connect(self._targets())
                except BaseException:
                    await self._disconnect()
                    raise
        return self._links

    def _targets(self) -> list[str]:
        """Return the targets that farplug connects to; that of the SPICE server is the first one."""
        targets = [self.vm.spice.target] if self.vm.config.spice_server is not None else []
        return [*dict.fromkeys([*targets, *self.vm.targets])]

    async def _connect(self, targets: Sequence[str]) -> None:
        for number, target in enumerate(targets):
            address = TargetSettings(target, ca_file=self._ca_file(target))
            link = Guest(GuestSettings(address), stream=self._stream, id=f"g{number + 1}")
            self._links.append(link)
            if self._captures is not None:
                path = self._captures / (f"usb-{number + 1}.pcapng" if number else "usb.pcapng")
                await link.start_capture(CaptureSettings(str(path)))
                self._captured.append(path)
            await link.connect()
        screen = await self._screen()
        if screen is not None:
            self._recording = asyncio.create_task(self._record(screen))

    def _ca_file(self, target: str) -> str | None:
        if not target.startswith("spice+tls:"):
            return None
        ca_file = self.vm.spice.ca_file
        return None if ca_file is None else str(ca_file)

    async def spice(self) -> Guest:
        """Return the connection to the guest's SPICE server.

        Raises:
            TargetError: it has none.
        """
        if self.vm.config.spice_server is None:
            raise TargetError(
                "the guest has no SPICE server, which shows its screen and has its keyboard",
                reason=Reason.NO_DISPLAY,
                remedy=Remedy("add a SpicePort to its ports", setting="ports"),
            )
        return (await self.links())[0]

    async def plug(self, what: Source | Device, storage: StorageSettings | None) -> asyncio.Task[Attachment]:
        """Plug a device in; return a task that ends when the guest is offered the device: later, if it is paused.

        Raises:
            FarplugError: the device cannot be plugged in.
        """
        await self.links()
        if isinstance(what, VirtualDevice) and what not in self._devices:
            self._devices.append(what)
        plugging = asyncio.create_task(self._plug(what, storage))
        if self.is_paused:
            self._pending.append(plugging)
        else:
            await plugging
        return plugging

    async def _plug(self, what: Source | Device, storage: StorageSettings | None) -> Attachment:
        full: PortError | None = None
        for link in self._links:
            try:
                return await link.plug(what, storage=storage)
            except PortError as error:
                full = error
        raise full or PortError("the guest has no ports", reason=Reason.NO_FREE_PORT)

    async def unplug(self, plugging: asyncio.Task[Attachment]) -> None:
        """Take a device out, also one that was not offered yet.

        Raises:
            DeviceError: written data could not be made durable.
        """
        if not plugging.done():
            self._pending = [one for one in self._pending if one is not plugging]
            plugging.cancel()
            await asyncio.wait([plugging])
            return
        if plugging.cancelled():
            return
        attachment = plugging.result()
        for link in self._links:
            if attachment in link.attachments:
                await link.unplug(attachment)

    # The screen

    async def _screen(self) -> Screen | None:
        """Return the first display; None: the guest has none."""
        if not self._links:
            return None
        screen = self._links[0].screen
        try:
            screen.shown()
        except FarplugError:
            return None
        return screen

    async def _record(self, screen: Screen) -> None:
        """Keep the last screens that differ, until the guest is gone."""
        with suppress(FarplugError):
            async with screen.used():
                frame = await screen.frame()
                while True:
                    self._keep(frame)
                    await asyncio.sleep(FRAME_INTERVAL)
                    frame = await screen.wait_for_change(frame.serial)

    def _keep(self, frame: Frame) -> None:
        last = self._frames[-1] if self._frames else None
        frame = reduced(frame)
        if (
            last is None
            or (last.width, last.height) != (frame.width, frame.height)
            or count_differing(colours_only(last), colours_only(frame)) > CURSOR
        ):
            self._frames.append(frame)

    # The end

    async def evidence(self) -> Evidence:
        """Return what shows why the test failed: that which was kept, if it was. Captures end here."""
        if self._kept_evidence is not None:
            return self._kept_evidence
        evidence = Evidence(self.console, self.vm.stderr, self.vm.firmware_log, self.events)
        if self.vm.alive and self.vm.config.spice_server is not None and not self.is_closed:
            with suppress(FarplugError, TimeoutError):
                async with asyncio.timeout(EVIDENCE_TIMEOUT):
                    frame = await self._last_frame()
                    self._keep(frame)
                    evidence.screen = frame.png()
        if self._frames:
            evidence.screens = await asyncio.to_thread(strip, [*self._frames])
        evidence.captures = await self.end_captures()
        evidence.events = self.events
        return evidence

    async def _last_frame(self) -> Frame:
        """Return the screen. A test that used the ports itself may still use those on sockets: they stay with it."""
        async with self._connecting:
            if not self._links:
                await self._connect(self._targets()[:1])
        return await self._links[0].screen.frame()

    async def keep_evidence(self) -> None:
        """Keep what shows why a test failed, for the report: the guest is released before."""
        self._kept_evidence = await self.evidence()

    async def end_captures(self) -> list[Path]:
        """End the captures; return their files, which are complete."""
        for link in self._links:
            if link.captures.path is not None:
                with suppress(FarplugError):
                    await link.stop_capture()
        return [path for path in self._captured if path.exists()]

    async def close(self) -> list[Exception]:
        """Unplug everything, and disconnect. Return what failed: written data that could not be made durable.

        A second call has no effect. The QEMU guest keeps running.
        """
        if self.is_closed:
            return []
        self.is_closed = True
        errors = await self._disconnect()
        for device in self._devices:
            await _collect(errors, device.dispose)
        return errors

    async def _disconnect(self) -> list[Exception]:
        errors: list[Exception] = []
        tasks = [*self._pending, *([] if self._recording is None else [self._recording])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pending = []
        for link in self._links:
            for attachment in list(link.attachments):
                if self.vm.alive:
                    await _collect(errors, partial(link.unplug, attachment))
            await _collect(errors, link.close)
        self._links = []
        return errors


async def _collect(errors: list[Exception], call: Callable[[], Awaitable[None]]) -> None:
    """Call something that may fail or hang, and keep its error."""
    try:
        async with asyncio.timeout(DISCONNECT_TIMEOUT):
            await call()
    except Exception as error:
        errors.append(error)
