"""The screen, the keyboard and the mouse of a guest, over SPICE."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from farplug.app.console_fonts import console_glyphs
from farplug.app.png import encode_png
from farplug.errors import FarplugError, Reason, RefusedError, StateError, TargetError, UsageError
from farplug.keymap import find_layout
from farplug.keymap.layout import DEFAULT
from farplug.spice.console import read_console
from farplug.spice.framebuffer import MAX_SIDE
from farplug.spice.inputs import MAX_STEP, Button, Locks, MouseMode
from farplug.spice.keys import chord_codes, key_code, stroke, text_strokes
from farplug.threads import off_loop
from farplug.transport.session import Session

if TYPE_CHECKING:
    from farplug.spice.console import ConsoleText
    from farplug.spice.cursor import Cursor
    from farplug.spice.framebuffer import Framebuffer, Rect
    from farplug.spice.inputs import InputsChannel
    from farplug.transport.spice_side import SpiceCursor, SpiceDisplay, SpiceInputs

KEY_INTERVAL = 0.02
"""Seconds from one key to the next: at 10 ms a USB keyboard of QEMU loses keys."""
STILL_TIME = 0.5
"""Seconds without a change after which a picture is still, by default."""
ARRIVAL_TIME = 0.01
"""Seconds in which this process takes what has arrived while it stood still."""
LOCKS_TIMEOUT = 1.0
"""Seconds in which a VM reports lights of lock keys that were changed. A system that ignores the keys never does."""
INPUTS_TIMEOUT = 5.0
"""Seconds for the first report of the lock keys, for a change of the mouse mode, and for acknowledgements."""

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of characters that were typed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a screen, which does not change.

    Attributes:
        width: in pixels.
        height: in pixels.
        pixels: ``width * height`` pixels of 4 bytes, the top row first: blue, green, red, and one that has no meaning.
        serial: of the last change in it.
    """

    width: int
    height: int
    pixels: bytes = field(repr=False)
    serial: int

    def pixel(self, x: int, y: int) -> tuple[int, int, int]:
        """Return red, green and blue of a pixel."""
        blue, green, red = self.pixels[4 * (y * self.width + x) :][:3]
        return red, green, blue

    def png(self) -> bytes:
        """Return the picture as a PNG file. This takes tens of milliseconds."""
        return encode_png(self.width, self.height, self.pixels)

    def text(self) -> ConsoleText:
        """Return the text of the console in the picture, each cell compared with fonts. Takes tens of milliseconds.

        Raises:
            TargetError: it is not that of a text console in a font that is installed here (``NO_TEXT``).
            SetupError: no such font is installed here (``MISSING_PROGRAM``).
        """
        text = read_console(self.pixels, self.width, self.height, console_glyphs())
        if text is None:
            raise TargetError(
                "the screen shows no text console, or one in a font that is not installed here",
                reason=Reason.NO_TEXT,
                remedy="use its picture; fonts of Linux consoles are in the packages console-setup-linux and kbd",
            )
        return text


class Screen:
    """A display of a guest.

    The display's channel is linked at the first use, and closed 30 s after the last one. Use :meth:`used` to keep it
    linked.

    Args:
        session: returns the connection to the VM.
        number: of the display, from 0; each display device of a VM has one, or each of its outputs.
    """

    def __init__(self, session: Callable[[], Session], number: int) -> None:
        self.number = number
        self._session = session

    def _display(self) -> SpiceDisplay:
        session = self._session()
        displays = session.displays
        if self.number in displays:
            return displays[self.number]
        if not session.carries_screen:
            message = "only SPICE shows a screen, and this target carries USB and nothing else"
            remedy = session.no_screen_remedy
        elif not displays:
            message = "the VM has no display"
            remedy = "add one to the VM (QEMU: -device virtio-vga); a SPICE proxy may not permit the channel"
        else:
            message = f"the VM has no display {self.number}"
            remedy = f"its displays are: {', '.join(map(str, sorted(displays)))}"
        raise TargetError(message, reason=Reason.NO_DISPLAY, remedy=remedy)

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Return a context manager that keeps the display linked.

        Raises:
            TargetError: the VM has no such display (``NO_DISPLAY``), or its channel cannot be linked.
            GuestGoneError: the VM is gone.
        """
        async with self._display().used():
            yield

    async def frame(self) -> Frame:
        """Return the picture as it is now.

        Raises:
            TargetError: there is no display, or it sends no picture.
            GuestGoneError: the VM is gone.
        """
        display = self._display()
        async with display.used():
            return _frame(await display.picture())

    async def text(self) -> ConsoleText:
        """Return the text of the console that is shown now. Raises as :meth:`frame` and :meth:`Frame.text`."""
        return await asyncio.to_thread((await self.frame()).text)

    async def size(self) -> tuple[int, int]:
        """Return the width and the height of the picture, in pixels. Raises as :meth:`frame`."""
        display = self._display()
        async with display.used():
            picture = await display.picture()
            return picture.width, picture.height

    async def changes(self, since: int) -> list[Rect]:
        """Return rectangles with all that has changed after the serial of a frame. Raises as :meth:`frame`."""
        display = self._display()
        async with display.used():
            return [*(await display.picture()).changed_since(since)]

    async def wait_for_change(self, since: int | None = None) -> Frame:
        """Wait until the picture differs from an earlier frame, and return it.

        Args:
            since: the serial of that frame; None: from now on.

        Raises as :meth:`frame`. There is no timeout.
        """
        display = self._display()
        async with display.used():
            picture = await display.picture()
            if since is None:
                since = picture.serial
            while picture.serial <= since:
                await display.changed()
                picture = await display.picture()
            return _frame(picture)

    async def wait_until_still(self, seconds: float = STILL_TIME, *, cells: int = 0) -> Frame:
        """Wait until the picture has not changed for a time, and return it.

        Args:
            seconds: the time.
            cells: changes in up to this number of cells of 64x64 pixels do not count: the cursor of a text console
                blinks in one.

        Raises as :meth:`frame`. There is no timeout.
        """
        display = self._display()
        loop = asyncio.get_running_loop()
        async with display.used():
            picture = await display.picture()
            serial, since = picture.serial, loop.time()
            while True:
                left = since + seconds - loop.time()
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(left, ARRIVAL_TIME)):
                        await display.changed()
                picture = await display.picture()
                if picture.cells_changed_since(serial) > cells:
                    serial, since = picture.serial, loop.time()
                elif left <= 0:
                    return _frame(picture)

    def shown(self) -> Framebuffer | None:
        """Return the picture as far as the VM has sent it; None: the display is not linked, or has none yet.

        Raises:
            TargetError: the VM has no such display (``NO_DISPLAY``).
            StateError: the VM was not reached yet.
        """
        return self._display().display.shown

    async def follow(self, changed: Callable[[Framebuffer | None, FarplugError | None], None]) -> NoReturn:
        """Call a function with the picture at once and after each change, until the VM is gone.

        The picture is complete, and is drawn on afterwards. None and an error: the VM has sent no picture for a time.

        Raises as :meth:`frame`.
        """
        display = self._display()
        async with display.used():
            while True:
                try:
                    changed(await display.picture(), None)
                except TargetError as error:
                    if error.reason is not Reason.TIMED_OUT:
                        raise
                    changed(None, error)
                await display.changed()

    @asynccontextmanager
    async def pointer(self) -> AsyncIterator[Cursor]:
        """Return a context manager for the pointer of the display, which is kept current.

        Raises:
            TargetError: the VM has no such display, or its channel cannot be linked.
            GuestGoneError: the VM is gone.
        """
        cursor = self._cursor()
        async with cursor.used():
            yield cursor.cursor

    async def follow_pointer(self, changed: Callable[[Cursor], None]) -> NoReturn:
        """Call a function with the pointer at once and after each change, until the VM is gone.

        Raises as :meth:`pointer`.
        """
        cursor = self._cursor()
        async with cursor.used():
            while True:
                changed(cursor.cursor)
                await cursor.changed()

    def _cursor(self) -> SpiceCursor:
        self._display()
        cursor = self._session().cursors.get(self.number)
        if cursor is None:
            raise TargetError(f"the VM's display {self.number} has no pointer", reason=Reason.NO_DISPLAY)
        return cursor


def _frame(picture: Framebuffer) -> Frame:
    return Frame(picture.width, picture.height, bytes(picture.pixels), picture.serial)


class Inputs:
    """The keyboard and the mouse of a guest.

    No key remains pressed: a key and its modifiers are one message; what :meth:`hold` presses is released at the end of
    its block, however the block ends.

    Args:
        session: returns the connection to the VM.
        screen: returns a display by its number: positions are limited to its size.
    """

    def __init__(self, session: Callable[[], Session], screen: Callable[[int], Screen]) -> None:
        self._session = session
        self._screen = screen
        self._turn = asyncio.Lock()
        """Held while keys are sent, and KEY_INTERVAL afterwards: the VM loses keys that come faster."""
        self._text = asyncio.Lock()
        """One call types at a time. Keys of others come between its characters."""

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Return a context manager that keeps the channel linked.

        Raises:
            TargetError: the VM has no inputs (``NO_INPUTS``), or their channel cannot be linked.
            GuestGoneError: the VM is gone.
        """
        async with self._inputs().used():
            yield

    @property
    def are_there(self) -> bool:
        """Return whether SPICE reaches a keyboard and a mouse of the VM."""
        return self._session().inputs is not None

    def _inputs(self) -> SpiceInputs:
        session = self._session()
        if session.inputs is None:
            raise TargetError(
                "the VM has no keyboard and mouse that SPICE reaches",
                reason=Reason.NO_INPUTS,
                remedy="a SPICE proxy may not permit the channel"
                if session.carries_screen
                else session.no_screen_remedy,
            )
        return session.inputs

    # Keys

    async def press(self, keys: str) -> None:
        """Press keys together, and release them.

        Args:
            keys: up to 4 names of X keysyms with ``+`` between them: ``ctrl+alt+Delete``, ``F1``, ``a``.

        Raises:
            UsageError: there is no such key (``BAD_KEY``).
            TargetError: the VM has no inputs.
            GuestGoneError: the VM is gone.
        """
        strokes = [stroke(chord_codes(keys))]
        async with self._text:
            await self._send(strokes)

    async def type(self, text: str, progress: Progress = lambda done: None, *, layout: str = DEFAULT) -> None:
        """Type a text on the keyboard of the VM; a newline is the Return key. Nothing is confirmed.

        The lock key for capitals is turned off meanwhile. Each character takes 20 ms.

        Args:
            text: what to type.
            layout: the keyboard layout of the guest: see :func:`farplug.keymap.find_layout`.
            progress: called with the number of characters that were typed.

        Raises:
            UsageError: the layout lacks a character (``BAD_KEY``), or there is no such layout; nothing was typed.
            TargetError: the VM has no inputs.
            GuestGoneError: the VM is gone.
        """
        found = find_layout(layout)
        strokes = await off_loop(lambda text: text_strokes(text, found), text)
        inputs = self._inputs()
        async with inputs.used(), self._text:
            locks = await self._locks(inputs)
            if Locks.CAPS not in locks:
                await self._send(strokes, progress)
                return
            try:
                await self._change_locks(inputs, locks & ~Locks.CAPS)
                await self._send(strokes, progress)
            finally:
                if inputs.is_linked:
                    await self._change_locks(inputs, locks)

    async def _send(self, strokes: list[bytes], progress: Progress = lambda done: None) -> None:
        inputs = self._inputs()
        async with inputs.used():
            for number, scancodes in enumerate(strokes, start=1):
                async with self._turn:
                    _channel(inputs).stroke(scancodes)
                    inputs.flush()
                    progress(number)
                    await asyncio.sleep(KEY_INTERVAL)

    @asynccontextmanager
    async def hold(self, *keys: str) -> AsyncIterator[None]:
        """Return a context manager that holds keys down.

        Raises:
            UsageError: there is no such key (``BAD_KEY``).
            TargetError: the VM has no inputs.
            GuestGoneError: the VM is gone.
        """
        codes = [key_code(name) for name in keys]
        inputs = self._inputs()
        async with inputs.used():
            pressed: list[bytes] = []
            try:
                async with self._turn:
                    for code in codes:
                        pressed.append(code)
                        _channel(inputs).press(code)
                        inputs.flush()
                        await asyncio.sleep(KEY_INTERVAL)
                yield
            finally:
                if inputs.is_linked:  # otherwise the server has released them
                    for code in reversed(pressed):
                        _channel(inputs).release(code)
                    inputs.flush()

    @property
    def held(self) -> list[bytes]:
        """Return the scancodes of the keys that are held down; none if the channel is not linked."""
        try:
            return [*_channel(self._inputs()).held]
        except FarplugError:
            return []

    async def hold_down(self, code: bytes) -> None:
        """Press a key, and hold it, until :meth:`release`, or until the channel is not used any more.

        Args:
            code: the key's scancode.

        Raises as :meth:`press`.
        """
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            _channel(inputs).press(code)
            inputs.flush()
            await asyncio.sleep(KEY_INTERVAL)

    async def release(self, codes: Sequence[bytes]) -> None:
        """Release keys that are held, the last one first. Does nothing if the channel is not linked.

        Raises:
            GuestGoneError: the VM is gone.
        """
        inputs = self._inputs()
        if not codes or not inputs.is_linked:  # the server has released them
            return
        async with inputs.used():
            for code in reversed(codes):
                async with self._turn:
                    _channel(inputs).release(code)
                    inputs.flush()
                    await asyncio.sleep(KEY_INTERVAL)

    async def locks(self) -> Locks:
        """Return the lock keys whose light is on. Raises as :meth:`press`."""
        inputs = self._inputs()
        async with inputs.used():
            return await self._locks(inputs)

    async def follow(self, changed: Callable[[Locks, bool], None]) -> NoReturn:
        """Call a function at once and after each change, until the VM is gone. Raises as :meth:`press`.

        Args:
            changed: gets the lock keys whose light is on, and whether the pointer is moved to positions.
        """
        inputs = self._inputs()
        async with inputs.used():
            while True:
                changed(_channel(inputs).locks or Locks(0), inputs.is_absolute)
                await inputs.changed()

    async def set_locks(self, locks: Locks) -> None:
        """Turn the lights of lock keys on, and the others off. Raises as :meth:`press`."""
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            _channel(inputs).set_locks(locks)
            inputs.flush()
            await asyncio.sleep(KEY_INTERVAL)

    async def _locks(self, inputs: SpiceInputs) -> Locks:
        await _until(inputs, lambda: _channel(inputs).locks is not None, "the server did not report the lock keys")
        return _channel(inputs).locks or Locks(0)

    async def _change_locks(self, inputs: SpiceInputs, locks: Locks) -> None:
        """Change the lights of lock keys, and wait until the VM reports that, for LOCKS_TIMEOUT at most."""
        await self.set_locks(locks)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOCKS_TIMEOUT):
                while inputs.is_linked and _channel(inputs).locks != locks:
                    await inputs.changed()

    # The mouse

    async def move(self, x: int, y: int, *, display: int = 0) -> None:
        """Move the pointer to a position on a display, which is limited to its size.

        Raises:
            RefusedError: the VM has no pointer that can be moved to a position (``NO_TABLET``).
            TargetError: the VM has no inputs, or no such display.
            GuestGoneError: the VM is gone.
        """
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            await self._move(inputs, x, y, display)

    async def click(self, x: int, y: int, button: Button = Button.LEFT, *, display: int = 0) -> None:
        """Click at a position on a display. Raises as :meth:`move`."""
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            await self._move(inputs, x, y, display)
            await asyncio.sleep(KEY_INTERVAL)
            await self._click(inputs, button)

    async def move_by(self, x: int, y: int) -> None:
        """Move the pointer by a distance, which the VM's driver may scale.

        Raises:
            UsageError: the pointer of the VM is moved to positions (``BAD_SETTING``): use :meth:`move`.
            TargetError: the VM has no inputs.
            GuestGoneError: the VM is gone.
        """
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            await _preferred_mode(inputs)
            if inputs.is_absolute:
                raise UsageError(
                    "the pointer of this VM is moved to positions, not by distances",
                    reason=Reason.BAD_SETTING,
                    remedy="give a position",
                )
            for step_x, step_y in _steps(x, y):
                await _until(inputs, lambda: _channel(inputs).ready_for_motion, "the server took no more motions")
                _channel(inputs).move_by(step_x, step_y)
                inputs.flush()

    async def press_button(self, button: Button = Button.LEFT) -> None:
        """Press and release a button where the pointer is. Raises as :meth:`press`."""
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            await self._click(inputs, button)

    async def change_buttons(self, pressed: Sequence[Button], released: Sequence[Button]) -> None:
        """Release buttons, and press others, where the pointer is, and hold them. Raises as :meth:`press`."""
        inputs = self._inputs()
        if not pressed and (not released or not inputs.is_linked):
            return
        async with inputs.used(), self._turn:
            for button in released:
                _channel(inputs).release_button(button)
            for button in pressed:
                _channel(inputs).press_button(button)
            inputs.flush()

    async def wheel(self, steps: int) -> None:
        """Turn the wheel: away from the user if the number is negative, towards the user otherwise.

        Raises as :meth:`press`.
        """
        if abs(steps) > MAX_STEP:
            raise UsageError(f"{steps} steps of the wheel: at most {MAX_STEP}", reason=Reason.BAD_SETTING)
        inputs = self._inputs()
        async with inputs.used(), self._turn:
            for _ in range(abs(steps)):
                await self._click(inputs, Button.UP if steps < 0 else Button.DOWN)

    async def _move(self, inputs: SpiceInputs, x: int, y: int, display: int) -> None:
        await _preferred_mode(inputs)
        if not inputs.is_absolute:
            raise RefusedError(
                "the VM has no pointer that can be moved to a position",
                reason=Reason.NO_TABLET,
                remedy="add a tablet to the VM (QEMU: -device usb-tablet), which its system must use: firmware does "
                "not; SPICE serves it in VMs with one display only",
            )
        width, height = await self._screen(display).size()
        _channel(inputs).move_to(min(max(x, 0), width - 1), min(max(y, 0), height - 1), display)
        inputs.flush()

    async def _click(self, inputs: SpiceInputs, button: Button) -> None:
        _channel(inputs).press_button(button)
        inputs.flush()
        try:
            await asyncio.sleep(KEY_INTERVAL)
        finally:
            if inputs.is_linked:  # otherwise the server has released it
                _channel(inputs).release_button(button)
                inputs.flush()
        await asyncio.sleep(KEY_INTERVAL)


def check_distances(*values: int) -> None:
    """Check positions and distances of the pointer.

    Raises:
        UsageError: one has more pixels than a display (``BAD_SETTING``).
    """
    for value in values:
        if abs(value) > MAX_SIDE:
            raise UsageError(f"{value}: at most {MAX_SIDE} pixels", reason=Reason.BAD_SETTING)


def check_text(text: str, layout: str = DEFAULT, *, secret: bool = False) -> None:
    """Check that a text can be typed.

    Args:
        text: the text.
        layout: the name of the keyboard layout.
        secret: the error does not quote the text.

    Raises:
        UsageError: there is no such layout, it lacks a character (``BAD_KEY``), or the text is too long.
    """
    found = find_layout(layout)
    if secret and (missing := found.missing(text)):
        raise UsageError(
            f"the keyboard layout {found.name} has no key for character {missing[0].index + 1} of the secret",
            reason=Reason.BAD_KEY,
            remedy="choose the layout that the VM uses, if it has the character",
        )
    found.type(text)


def _channel(inputs: SpiceInputs) -> InputsChannel:
    if inputs.channel is None or not inputs.is_linked:
        raise inputs.error or StateError("the inputs are not in use")
    return inputs.channel


async def _preferred_mode(inputs: SpiceInputs) -> None:
    """Wait until the mouse is in the mode CLIENT, if the VM supports that. The channel has asked for it."""
    if inputs.mouse_modes & MouseMode.CLIENT:
        await _until(inputs, lambda: inputs.is_absolute, "the server did not change the mode of the mouse")


async def _until(inputs: SpiceInputs, condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(INPUTS_TIMEOUT):
            while not condition():
                await inputs.changed()
    except TimeoutError:
        raise TargetError(
            f"{inputs.name}: {what} within {INPUTS_TIMEOUT:g} s",
            reason=Reason.TIMED_OUT,
            remedy="check that the VM's host responds",
        ) from None


def _steps(x: int, y: int) -> Iterator[tuple[int, int]]:
    """Yield a distance in steps of up to MAX_STEP."""
    number = max(1, -(-max(abs(x), abs(y)) // MAX_STEP))
    for step in range(number):
        yield x * (step + 1) // number - x * step // number, y * (step + 1) // number - y * step // number
