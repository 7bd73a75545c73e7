"""One run of ``farplug connect``: plug in, show what happens, leave cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from farplug import events
from farplug.cli.commands import obey
from farplug.cli.media import Media
from farplug.cli.output import Output, SilentOutput, discard_standard_output
from farplug.errors import ExitCode, FarplugError
from farplug.events import PortEvent
from farplug.guest import connect
from farplug.hub import Attachment, Hub
from farplug.target import TargetOptions, parse_target
from farplug.virtual.device import VirtualDevice
from farplug.virtual.storage import MAX_UNITS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a session: Ctrl-C, kill, a terminal that is closed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        target: where to, as it was written.
        options: what was said about it besides.
        media: what to plug in.
        commands: read commands from standard input.
    """

    target: str
    options: TargetOptions
    media: Media
    commands: bool = False


async def run(plan: Plan, output: Output) -> ExitCode:
    """Run until a signal comes (0), or raise what went wrong."""
    return await _Session(plan, output).run()


class _Session:
    def __init__(self, plan: Plan, output: Output) -> None:
        self._plan = plan
        self._output = output
        self._labels: Mapping[VirtualDevice, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[None] | None = None
        self._interrupted = False
        self._leaving = False

    async def run(self) -> ExitCode:
        loop = self._loop = asyncio.get_running_loop()
        self._work = loop.create_task(self._plug_and_leave())
        for number in SIGNALS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._interrupt)
        try:
            self._show(lambda output: output.start())
            await self._work
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
        except FarplugError as error:
            failure = error
            self._show(lambda output: output.failed(failure))
            raise
        finally:
            self._show(lambda output: output.stop())
        return ExitCode.OK

    def _interrupt(self) -> None:
        if self._interrupted:
            self._show(lambda output: output.stop())
            sys.stderr.write("farplug: left at once, without waiting for the VM\n")
            sys.stderr.flush()
            os._exit(ExitCode.INTERRUPTED)
        self._interrupted = True
        self._leave()
        self._show(lambda output: output.note("leaving; interrupt again to leave at once"))

    def _leave(self) -> None:
        if self._work is not None and not self._leaving:
            self._leaving = True
            self._work.cancel()

    def _show(self, what: Callable[[Output], None]) -> None:
        """Say something. When nobody reads it any more (a closed pipe or terminal), that is the end of the session."""
        try:
            what(self._output)
        except OSError:
            self._output = SilentOutput()
            discard_standard_output()
            self._interrupted = True
            self._leave()

    async def _plug_and_leave(self) -> None:
        try:
            await self._plan.media.open(self._copying)
            # Only now: reading a .vv file may delete it.
            target = parse_target(self._plan.target, self._plan.options)
            guest = await connect(target, lambda stage, text: self._show(lambda o: o.stage(str(stage), text)))
            hub = Hub(guest)
            try:
                await self._stay(hub)
            finally:
                self._leaving = True
                await hub.close()
        finally:
            self._leaving = True
            for device in self._labels:
                await device.dispose()
            await self._plan.media.close()

    def _copying(self, label: str, done: int, total: int) -> None:
        """How far the copy of a folder is; called from another thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._show, lambda output: output.copying(label, done, total))

    async def _stay(self, hub: Hub) -> None:
        """Plug everything in, side by side, and stay until all devices have left, or the guest is gone."""
        hub.subscribe(self._happened)
        if hub.guest.is_spice:
            self._show(lambda output: output.reached())
            if hub.guest.name:
                self._show(lambda output: output.note(f"the VM is called {hub.guest.name}"))
        ports, count = len(hub.guest.ports), len(self._plan.media.wishes)
        hub.check_room(1 if count <= MAX_UNITS else count)
        if ports < count:
            has = "1 port" if ports == 1 else f"{ports} ports"
            note = f"the VM has {has} for {count} devices: they are plugged as {count} logical units of one device"
            self._show(lambda output: output.note(note))
        self._labels = self._plan.media.devices(ports)
        ticker = asyncio.ensure_future(self._tick(hub))
        commands = asyncio.ensure_future(self._obey())
        gone = asyncio.ensure_future(hub.guest.closed())
        staying = asyncio.gather(*(self._plug(hub, device) for device in self._labels))
        try:
            await asyncio.wait((gone, staying), return_when=asyncio.FIRST_COMPLETED)
            if staying.done():
                errors = staying.result()
            else:
                errors = [gone.result()]
        finally:
            ticker.cancel()
            commands.cancel()
            gone.cancel()
            staying.cancel()
            await asyncio.gather(staying, return_exceptions=True)
        for error in errors:
            if error is not None:
                raise error

    async def _obey(self) -> None:
        if self._plan.commands:
            await obey(self._plan.media.drives, lambda error: self._show(lambda output: output.refused(error)))

    async def _plug(self, hub: Hub, device: VirtualDevice) -> FarplugError | None:
        """Plug a device in, and wait until it has left; why, if nobody here wanted it."""
        return await (await hub.plug(device)).ended()

    def _happened(self, attachment: Attachment, event: PortEvent) -> None:
        if isinstance(event, events.Opened):
            self._show(lambda output: output.reached())
        self._show(lambda output: output.happened(self._label(attachment), attachment, event))

    async def _tick(self, hub: Hub) -> None:
        while True:
            self._show(lambda output: output.figures([(self._label(a), a) for a in hub.attachments]))
            await asyncio.sleep(self._output.interval)

    def _label(self, attachment: Attachment) -> str:
        """What a device is called in the output."""
        return next(label for device, label in self._labels.items() if device is attachment.device)
