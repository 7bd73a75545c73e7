"""What the fixtures of the pytest plugin are: a guest, its devices, keyboard, screen and serial lines.

Their methods wait, and run on the plugin's own event loop: they work in plain tests, and in those of pytest-asyncio and
anyio, whose loops stand still meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from farplug.app.attachment import Attachment
from farplug.app.commands import Via
from farplug.app.guest import Guest
from farplug.app.png import write_png
from farplug.app.screen import STILL_TIME, Frame, Screen
from farplug.app.settings import Source, SourceKind, StorageSettings
from farplug.app.typing import Typed
from farplug.errors import DeviceError, Reason
from farplug.keymap.layout import DEFAULT
from farplug.spice.inputs import Button
from farplug.testing.loop_thread import LoopThread
from farplug.testing.pictures import Reference
from farplug.testing.running_guest import RunningGuest
from farplug.usb.device import Device
from farplug.virtual.endpoints import Detached
from farplug.virtual.serial import SerialLine, serial_device
from farplug.vm.agent import CommandFailed, CommandResult, GuestTimeout
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import Boot, GuestConfig

T = TypeVar("T")

MAX_RECEIVED: Final = 16 << 20
"""Bytes from a guest that a serial line keeps for a reader; then the guest waits."""
RETRY_INTERVAL: Final = 0.2
"""Seconds between two executions of a command that is to succeed."""

# The command is standard input, so that it needs no quotes. The output is that of the last execution.
_UNTIL: Final = """
command=$(cat; echo x)
command=${{command%x}}
output=$(mktemp /tmp/farplug-XXXXXX)
read -r now rest </proc/uptime
end=$((${{now%%.*}} + {seconds}))
while :; do
    sh -c "$command" >"$output" 2>&1 </dev/null
    code=$?
    [ $code {wanted} 0 ] && break
    read -r now rest </proc/uptime
    [ "${{now%%.*}}" -ge $end ] && break
    sleep {interval}
done
cat "$output"
rm -f "$output"
exit $code
"""


class ScreenMismatch(AssertionError):
    """The screen did not show a reference picture in time."""


class _Caller:
    """Runs coroutines of a guest on the plugin's loop, and limits their time."""

    def __init__(self, thread: LoopThread, running: RunningGuest, timeout: float) -> None:
        self.running = running
        self.timeout = timeout
        self._thread = thread

    def seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None, what: str = "") -> T:
        """Return what a coroutine returns. With ``what``: raise ``GuestTimeout`` after the timeout."""
        __tracebackhide__ = True
        return self._thread.call(self._limited(coroutine, self.seconds(timeout), what) if what else coroutine)

    async def _limited(self, coroutine: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
        try:
            self.running.check_open()
        except BaseException:
            coroutine.close()
            raise
        try:
            async with asyncio.timeout(seconds):
                return await coroutine
        except TimeoutError:
            raise GuestTimeout(f"{what} within {seconds:g} s") from None


class PluggedDevice:
    """A device in a guest. Use it with ``with`` to unplug it at the end of the block; the end of the test does it too.

    Attributes:
        device: what was plugged in; None: it was not opened yet, in a guest that is paused.
    """

    def __init__(self, caller: _Caller, name: str, plugging: asyncio.Task[Attachment]) -> None:
        self._caller = caller
        self._name = name
        self._plugging = plugging

    @property
    def device(self) -> Device | None:
        """Return the device; None: the guest is paused, and was not offered it yet."""
        return self._plugging.result().device if self._plugging.done() else None

    @property
    def attachment(self) -> Attachment:
        """Return the attachment of the application's model: its state, figures and events.

        Raises:
            asyncio.InvalidStateError: the guest is paused, and was not offered the device yet.
        """
        return self._plugging.result()

    def configured(self, timeout: float | None = None) -> None:
        """Wait until the guest's driver works with the device.

        Raises:
            FarplugError: the guest refused the device, it was unplugged, or the guest did not configure it in time.
        """
        __tracebackhide__ = True
        self._caller.call(self._configured(), timeout, f"the guest did not configure {self._name}")

    async def _configured(self) -> None:
        attachment = await asyncio.shield(self._plugging)
        await attachment.configured()

    def unplug(self) -> None:
        """Take the device out of the guest. A second call has no effect.

        Raises:
            DeviceError: written data could not be made durable.
        """
        __tracebackhide__ = True
        self._caller.call(self._caller.running.unplug(self._plugging))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unplug()


class PlugFixture(Protocol):
    """The fixture ``farplug_plug``: :meth:`GuestFixture.plug`."""

    def __call__(
        self,
        what: Device | Source | str | Path = ...,
        kind: SourceKind | str | None = None,
        *,
        storage: StorageSettings | None = None,
        wait: bool | None = None,
        timeout: float | None = None,
    ) -> PluggedDevice:
        """Plug something in."""


class KeyboardFixture:
    """The fixture ``farplug_keyboard``: types in a guest.

    A guest with a kernel gets a USB keyboard in a free port, which confirms what the guest has taken. Firmware
    looks for one only while it starts: its keys go through SPICE.
    """

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller

    def type(
        self, text: str, layout: str = DEFAULT, *, via: Via | str | None = None, timeout: float | None = None
    ) -> Typed:
        """Type a text; a newline is the Return key. Return whether the guest has confirmed it.

        Args:
            text: what to type.
            layout: the name of the guest's keyboard layout.
            via: ``usb`` or ``spice``; None: what suits the guest.
            timeout: seconds; None: the plugin's.

        Raises:
            UsageError: the layout lacks a character. Nothing was typed.
            DeviceError: the guest may have lost a part of the text.
            GuestTimeout: the guest did not take the text in time.
        """
        __tracebackhide__ = True
        return self._caller.call(self._type(text, layout, via), timeout, "the guest did not take the text")

    async def _type(self, text: str, layout: str, via: Via | str | None) -> Typed:
        link = await self._link()
        return await link.typing.type(text, layout, self._via(via))

    def press(self, *keys: str, via: Via | str | None = None, timeout: float | None = None) -> None:
        """Press keys, one chord after the other: ``press("Down", "Return")``, ``press("ctrl+alt+Delete")``.

        Raises as :meth:`type`.
        """
        __tracebackhide__ = True
        self._caller.call(self._press(keys, via), timeout, "the guest did not take the keys")

    async def _press(self, keys: tuple[str, ...], via: Via | str | None) -> None:
        link = await self._link()
        for chord in keys:
            await link.typing.press(chord, self._via(via))

    async def _link(self) -> Guest:
        return (await self._caller.running.links())[0]

    def _via(self, via: Via | str | None) -> Via:
        if via is not None:
            return Via(via)
        return Via.AUTO if self._caller.running.vm.config.boot is Boot.KERNEL else Via.SPICE


class ScreenFixture:
    """The fixture ``farplug_screen``: the first display of a guest."""

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller

    async def _screen(self) -> Screen:
        return (await self._caller.running.spice()).screen

    def frame(self) -> Frame:
        """Return the picture as it is now: ``width``, ``height``, ``pixel(x, y)``, ``png()``.

        Raises:
            TargetError: the guest has no display.
        """
        __tracebackhide__ = True
        return self._caller.call(self._frame(), None, "the guest sent no picture")

    async def _frame(self) -> Frame:
        return await (await self._screen()).frame()

    def save(self, path: str | os.PathLike[str]) -> Frame:
        """Write the picture as it is now to a PNG file, as a reference for :meth:`shows`; return it."""
        __tracebackhide__ = True
        frame = self.frame()
        write_png(os.fspath(path), frame.png())
        return frame

    def still(self, seconds: float = STILL_TIME, *, cells: int = 1, timeout: float | None = None) -> Frame:
        """Wait until the picture has not changed for a time; return it.

        Args:
            seconds: the time.
            cells: changes in up to this number of cells of 64x64 pixels do not count: a cursor blinks in one.
            timeout: seconds; None: the plugin's.

        Raises:
            GuestTimeout: the picture kept changing.
        """
        __tracebackhide__ = True
        return self._caller.call(self._still(seconds, cells), timeout, "the screen did not become still")

    async def _still(self, seconds: float, cells: int) -> Frame:
        return await (await self._screen()).wait_until_still(seconds, cells=cells)

    @contextmanager
    def changed(self, timeout: float | None = None) -> Iterator[None]:
        """Wait at the end of the block until the picture differs from that at its beginning.

        ::

            with farplug_screen.changed():
                farplug_keyboard.press("Return")

        Raises:
            GuestTimeout: the picture is the same.
        """
        __tracebackhide__ = True
        serial = self.frame().serial
        yield
        self._caller.call(self._changed(serial), timeout, "the screen did not change")

    async def _changed(self, serial: int) -> Frame:
        return await (await self._screen()).wait_for_change(serial)

    def shows(
        self,
        reference: str | os.PathLike[str],
        *,
        at: tuple[int, int] | None = None,
        differing: float = 0.0,
        timeout: float | None = None,
    ) -> tuple[int, int]:
        """Wait until the screen shows a reference picture; return the position of its corner.

        A picture of the screen's size is compared where it is, a smaller one is searched for on the whole screen,
        unless ``at`` is given. Transparent pixels are not compared: make transparent what changes, such as a clock.

        Args:
            reference: of a PNG file, which :meth:`save` has written.
            at: column and row of its corner; None: anywhere.
            differing: the share of the compared pixels that may differ, from 0 to 1; more than 0 needs a position.
            timeout: seconds; None: the plugin's.

        Raises:
            ScreenMismatch: the screen did not show it in time.
            ImageError: there is no such file, or it is not a PNG file.
            ValueError: ``differing`` is not valid.
        """
        __tracebackhide__ = True
        picture = Reference(Path(reference))
        seconds = self._caller.seconds(timeout)
        return self._caller.call(self._shows(picture, at, differing, seconds))

    async def _shows(
        self, picture: Reference, at: tuple[int, int] | None, differing: float, seconds: float
    ) -> tuple[int, int]:
        self._caller.running.check_open()
        screen = await self._screen()
        deadline = time.monotonic() + seconds
        async with screen.used():
            frame = await screen.frame()
            while True:
                found, how = await asyncio.to_thread(_look, picture, frame, at, differing)
                if found is not None:
                    return found
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        frame = await screen.wait_for_change(frame.serial)
                except TimeoutError:
                    raise ScreenMismatch(
                        f"the screen did not show {picture.path} within {seconds:g} s: {how}"
                    ) from None

    def matches(
        self, reference: str | os.PathLike[str], *, at: tuple[int, int] | None = None, differing: float = 0.0
    ) -> bool:
        """Return whether the screen shows a reference picture now; the arguments are those of :meth:`shows`."""
        __tracebackhide__ = True
        return _look(Reference(Path(reference)), self.frame(), at, differing)[0] is not None

    def click(self, x: int, y: int, button: Button | str = Button.LEFT, *, timeout: float | None = None) -> None:
        """Click at a position of the picture.

        Raises:
            TargetError: the guest does not use the USB tablet that is plugged in for it.
        """
        __tracebackhide__ = True
        pressed = button if isinstance(button, Button) else Button[button.upper()]
        self._caller.call(self._click(x, y, pressed), timeout, "the guest did not take the click")

    async def _click(self, x: int, y: int, button: Button) -> None:
        await (await self._caller.running.spice()).typing.click(x, y, button)


def _look(
    picture: Reference, frame: Frame, at: tuple[int, int] | None, differing: float
) -> tuple[tuple[int, int] | None, str]:
    """Return where a screen shows a picture, or None and why the screen does not."""
    if at is None and (picture.width, picture.height) == (frame.width, frame.height):
        at = (0, 0)
    if not 0 <= differing <= 1 or (differing and at is None):
        raise ValueError(f"differing={differing}: from 0 to 1, and above 0 only with at=(column, row)")
    if at is None:
        found = picture.find(frame)
        return found, f"no place of the screen, {frame.width}x{frame.height} pixels, equals it"
    count = picture.differing(frame, *at)
    how = f"{count} of {picture.compared} pixels differ"
    if (picture.width, picture.height) != (frame.width, frame.height) and at == (0, 0):
        how += f"; the screen has {frame.width}x{frame.height} pixels, the picture {picture.width}x{picture.height}"
    return (at if count <= differing * picture.compared else None), how


class SerialFixture:
    """The fixture ``farplug_serial``: a USB serial line between a program in the guest and the test.

    Attributes:
        line: the function: ``coding``, ``dtr``, ``breaks`` and so on.
        plugged: the device in the guest.
    """

    def __init__(self, caller: _Caller, line: SerialLine, plugged: PluggedDevice, serial_number: str) -> None:
        self.line = line
        self.plugged = plugged
        self._caller = caller
        self._serial_number = serial_number
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._path = ""
        caller.call(self._begin())

    async def _begin(self) -> None:
        self._pump = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            try:
                data = await self.line.received.read()
            except Detached:
                if self.plugged.attachment.over:
                    return
                await asyncio.sleep(0.05)
                continue
            self._received += data
            self._arrived.set()
            while len(self._received) >= MAX_RECEIVED:
                self._room.clear()
                await self._room.wait()

    def path(self, timeout: float | None = None) -> str:
        """Return the guest's name of the line, such as ``/dev/ttyACM0``, once it is there.

        Raises:
            GuestTimeout: the guest made no terminal in time: its kernel has no ``cdc_acm``.
            StateError: the guest boots firmware.
        """
        __tracebackhide__ = True
        if not self._path:
            what = "the guest made no terminal of the serial line: its configuration needs the module cdc_acm"
            self._path = self._caller.call(self._find(), timeout, what)
        return self._path

    async def _find(self) -> str:
        script = f"""
            for tty in /sys/class/tty/ttyACM*; do
                read -r serial 2>/dev/null <$tty/device/../serial && [ "$serial" = {self._serial_number} ] || continue
                [ -c /dev/${{tty##*/}} ] && echo /dev/${{tty##*/}} && exit 0
            done
            exit 1"""
        while True:
            result = await self._caller.running.vm.run(script)
            if not result.exit_code:
                return result.output.strip()
            await asyncio.sleep(RETRY_INTERVAL)

    def write(self, data: bytes | str, timeout: float | None = None) -> None:
        """Send data to the guest, which has taken it at the end. Text is sent as UTF-8.

        Raises:
            GuestTimeout: no program of the guest reads from the line.
            Detached: the guest has reset or unplugged the line.
        """
        __tracebackhide__ = True
        encoded = data.encode() if isinstance(data, str) else data
        self._caller.call(self.line.sent.write(encoded), timeout, "the guest did not read from the serial line")

    def expect(self, pattern: str | bytes | re.Pattern[bytes], timeout: float | None = None) -> bytes:
        """Wait until the guest has sent a text, and return what it has sent up to the end of that text.

        What comes later stays for the next call.

        Args:
            pattern: a text, as it is; or a compiled pattern.
            timeout: seconds; None: the plugin's.

        Raises:
            GuestTimeout: the text did not come; the error has the end of what came.
            DeviceError: 16 MiB came without the text.
        """
        __tracebackhide__ = True
        if isinstance(pattern, str):
            pattern = pattern.encode()
        compiled = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        try:
            return self._caller.call(self._expect(compiled), timeout, f"the guest did not send {compiled.pattern!r}")
        except GuestTimeout as error:
            error.add_note(f"the serial line ends: {bytes(self._received[-1000:])!r}")
            raise

    async def _expect(self, pattern: re.Pattern[bytes]) -> bytes:
        while not (found := pattern.search(self._received)):
            if len(self._received) >= MAX_RECEIVED:
                raise DeviceError(
                    f"the guest sent {len(self._received)} bytes without {pattern.pattern!r}", reason=Reason.TOO_LARGE
                )
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._received[: found.end()])
        del found  # it holds the buffer
        del self._received[: len(data)]
        self._room.set()
        return data


class Release(Protocol):
    """Releases a guest."""

    def __call__(self, *, failed: bool = ...) -> None:
        """Unplug all its devices before."""


class GuestFixture:
    """The fixture ``farplug_guest``: a throw-away VM, for the time of one test.

    Every method waits, ``timeout`` seconds at most: None is the plugin's timeout. With ``with`` the VM is released
    at the end of the block, not of the test.

    Attributes:
        vm: the guest below: its configuration, targets, QMP monitor and logs. Its coroutines may be awaited on any
            event loop, which runs meanwhile.
        keyboard: types in the guest.
        screen: the first display of the guest.
    """

    def __init__(self, thread: LoopThread, running: RunningGuest, timeout: float, release: Release) -> None:
        self._running = running
        self._release = release
        self._caller = _Caller(thread, running, timeout)
        self.keyboard = KeyboardFixture(self._caller)
        self.screen = ScreenFixture(self._caller)

    @property
    def vm(self) -> QemuGuest:
        """Return the guest below."""
        return self._running.vm

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the target of each port, for other programs: ``farplug connect`` and so on."""
        return self.vm.targets

    @property
    def console(self) -> str:
        """Return what the first serial port has shown since the test began: messages of the kernel or firmware."""
        return self._running.console

    @property
    def faults(self) -> list[Exception]:
        """Return the exceptions of devices: one that stays here fails the test. Clear the list if it was provoked."""
        return self._running.faults

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the event loop of the guest and its devices, and return what it returns.

        A device that was plugged in belongs to that loop: use its coroutines with this method.

        Raises:
            GuestTimeout: the coroutine did not end in time.
        """
        __tracebackhide__ = True
        return self._caller.call(coroutine, timeout, "the coroutine did not end")

    def close(self) -> None:
        """Unplug all devices, and release the VM. The end of the test does it too; a second call has no effect.

        Raises:
            Exception: a device failed, or could not be closed.
        """
        __tracebackhide__ = True
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self._release(failed=error is not None)

    # Commands

    def execute(self, command: str, *, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        """Run a script with the guest's shell, as root; return its exit code and output.

        Raises:
            GuestTimeout: the command did not end in time.
            GuestCrashed: QEMU ended.
            StateError: the guest boots firmware.
        """
        __tracebackhide__ = True
        self._running.check_open()
        return self._caller.call(self.vm.run(command, stdin=stdin, timeout=self._caller.seconds(timeout)))

    def succeed(self, *commands: str, timeout: float | None = None) -> str:
        """Run commands that must succeed; return their output, standard error included.

        Raises:
            CommandFailed: the exit code of a command is not 0; later commands were not run.
            GuestTimeout, GuestCrashed, StateError: as :meth:`execute`.
        """
        __tracebackhide__ = True
        output = []
        for command in commands:
            result = self.execute(command, timeout=timeout)
            if result.exit_code:
                raise CommandFailed(command, result)
            output.append(result.output)
        return "".join(output)

    def fail(self, *commands: str, timeout: float | None = None) -> str:
        """Run commands that must fail; return their output.

        Raises:
            AssertionError: a command succeeded.
            GuestTimeout, GuestCrashed, StateError: as :meth:`execute`.
        """
        __tracebackhide__ = True
        output = []
        for command in commands:
            result = self.execute(command, timeout=timeout)
            if not result.exit_code:
                raise AssertionError(f"the guest's command {command!r} succeeded: {result.output.strip()[-2000:]}")
            output.append(result.output)
        return "".join(output)

    def wait_until_succeeds(self, command: str, timeout: float | None = None) -> str:
        """Run a command again and again until it succeeds; return the output of its last execution.

        Raises:
            CommandFailed: the command did not succeed in time; the error has the output of its last execution.
            GuestTimeout: an execution did not end in time.
        """
        __tracebackhide__ = True
        result = self._until(command, "-eq", timeout)
        if result.exit_code:
            raise CommandFailed(command, result)
        return result.output

    def wait_until_fails(self, command: str, timeout: float | None = None) -> str:
        """Run a command again and again until it fails; return the output of its last execution.

        Raises:
            AssertionError: the command still succeeded at the end.
            GuestTimeout: an execution did not end in time.
        """
        __tracebackhide__ = True
        result = self._until(command, "-ne", timeout)
        if not result.exit_code:
            raise AssertionError(f"the guest's command {command!r} still succeeds: {result.output.strip()[-2000:]}")
        return result.output

    def _until(self, command: str, wanted: str, timeout: float | None) -> CommandResult:
        __tracebackhide__ = True
        seconds = self._caller.seconds(timeout)
        script = _UNTIL.format(seconds=max(1, round(seconds)), wanted=wanted, interval=RETRY_INTERVAL)
        # The loop runs in the guest, which needs 50 ms of processor time to begin a command: it ends by itself.
        return self.execute(script, stdin=command.encode(), timeout=2 * seconds + 1)

    def wait_for_text(self, pattern: str | re.Pattern[str], timeout: float | None = None) -> str:
        """Wait until the serial console has shown a text since the test began; return the text.

        The text of a graphical screen is not read: see :meth:`ScreenFixture.shows`.

        Args:
            pattern: a regular expression.
            timeout: seconds; None: the plugin's.

        Raises:
            GuestTimeout: the text did not appear in time.
            GuestCrashed: QEMU ended.
        """
        __tracebackhide__ = True
        compiled = re.compile(pattern)
        return self._caller.call(self._running.wait_for_text(compiled, self._caller.seconds(timeout)))[0]

    # Keys and screen

    def send_keys(self, *keys: str) -> None:
        """Press keys, one chord after the other: see :meth:`KeyboardFixture.press`."""
        __tracebackhide__ = True
        self.keyboard.press(*keys)

    def screenshot(self, path: str | os.PathLike[str] | None = None) -> Frame:
        """Return the picture of the first display; write it to a PNG file as well if a path is given."""
        __tracebackhide__ = True
        return self.screen.frame() if path is None else self.screen.save(path)

    # Devices

    def start(self, timeout: float | None = None) -> None:
        """Start the processors of a guest that is ``paused``: it finds what was plugged in before.

        Raises:
            StateError: they run.
            FarplugError: a device could not be plugged in.
        """
        __tracebackhide__ = True
        self._caller.call(self._running.start(), timeout, "the guest was not offered its devices")

    def plug(
        self,
        what: Device | Source | str | Path = "",
        kind: SourceKind | str | None = None,
        *,
        storage: StorageSettings | None = None,
        wait: bool | None = None,
        timeout: float | None = None,
    ) -> PluggedDevice:
        """Plug a device in; it is unplugged at the end of the test, and disposed of if it is a ``VirtualDevice``.

        ::

            farplug_plug(my_device())
            farplug_plug("installer.iso")
            farplug_plug(tmp_path / "disk.raw")
            farplug_plug(kind="keyboard")
            with farplug_plug("1050:0407", kind="usb-device"):
                ...

        Args:
            what: a device; a source; or the path of a source.
            kind: what a path becomes; None: a folder a copy of it, a file whose name ends with ``.iso`` a CD-ROM, and
                any other file a disk that the guest may write to.
            storage: how images and folders are plugged; None: the defaults.
            wait: wait until the guest has configured the device; None: if it boots a kernel, and is not paused.
            timeout: seconds; None: the plugin's.

        Raises:
            FarplugError: the device cannot be plugged in, or the guest refused it.
            GuestTimeout: the guest did not configure it in time.
            ValueError: ``kind`` is not a kind of source, or fits no device.
        """
        __tracebackhide__ = True
        source = _source(what, kind)
        name = source.name if isinstance(source, Source) else str(source.identity)
        plugging = self._caller.call(self._running.plug(source, storage), timeout, f"the guest was not offered {name}")
        plugged = PluggedDevice(self._caller, name, plugging)
        if wait is None:
            wait = self.vm.config.boot is Boot.KERNEL and not self._running.is_paused
        if wait:
            plugged.configured(timeout)
        return plugged

    def serial(self) -> SerialFixture:
        """Plug a USB serial line in, and return it."""
        __tracebackhide__ = True
        serial_number = f"farplug-{secrets.token_hex(4)}"
        device = serial_device(serial_number=serial_number)
        line = device.functions[0]
        assert isinstance(line, SerialLine)
        return SerialFixture(self._caller, line, self.plug(device), serial_number)


def _source(what: Device | Source | str | Path, kind: SourceKind | str | None) -> Device | Source:
    if isinstance(what, (Device, Source)):
        if kind is not None:
            raise ValueError(f"kind={str(kind)!r} has no meaning for a {type(what).__name__}: it is for paths")
        return what
    path = os.fspath(what)
    if kind is None:
        if not path:
            raise ValueError("plug what? a device, a source, a path, or kind=")
        if os.path.isdir(path):
            kind = SourceKind.FOLDER
        else:
            kind = SourceKind.CDROM if path.lower().endswith(".iso") else SourceKind.DISK
    return Source(SourceKind(kind), path)


class GuestFactory(Protocol):
    """The fixtures ``farplug_guest_factory`` and ``farplug_session_guest_factory``: they lend guests.

    Each guest is lent until the end of the test, or of the session, or until :meth:`GuestFixture.close`.
    """

    def __call__(self, config: GuestConfig | None = None, *, fresh: bool = False, **fields: Any) -> GuestFixture:
        """Return a guest that has booted; one that boots firmware, or that is paused, was only started.

        Args:
            config: its configuration; None: that of ``farplug_guest_config``.
            fresh: a guest that no other test uses. Firmware guests and paused ones are always fresh.
            fields: other values for fields of the configuration; ``ports`` may be a number of SPICE ports.
        """
