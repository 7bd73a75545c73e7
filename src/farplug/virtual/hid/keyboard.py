"""A boot keyboard: it works in firmware, boot loaders and operating systems.

Source: HID 1.11, appendices B.1 and F.3.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import IntFlag
from typing import Final, TypeAlias

from farplug.errors import Reason, TargetError
from farplug.keymap import Key, Stroke, find_layout
from farplug.keymap.layout import DEFAULT
from farplug.threads import off_loop
from farplug.usb.types import Speed
from farplug.virtual.async_function import Setting, interrupt_out
from farplug.virtual.endpoints import Detached
from farplug.virtual.hid.function import CLASS_HID, PROTOCOL_KEYBOARD, REPORT_SIZE, SUBCLASS_BOOT, HidFunction

MAX_KEYS: Final = 6
"""Keys in a report besides the modifiers."""

FIRMWARE_PACE: Final = 0.06
"""Seconds for a report while the guest confirms nothing: SeaBIOS takes one at each tick of its timer (55 ms), and a
report a time is what OVMF needs on an EHCI controller."""

CONFIRM_EVERY: Final = 250
"""Keys after which a text waits for a confirmation, once the guest is trusted. QEMU queues 2000 reports at most."""

TRUSTED_AFTER: Final = 300
"""Keys that are confirmed one by one, before more are sent at a time."""

READ_TIMEOUT: Final = 10.0
"""Seconds in which a guest begins to read from a keyboard or a pointer. Firmware does only while it starts."""

_ATTEMPTS, _ATTEMPT_TIMEOUT = 5, 1.0
"""How often, and for how many seconds each, a guest is asked whether it confirms what it takes."""
_TAKEN_TIMEOUT = 15.0
"""Seconds in which a guest confirms what it has taken."""
_SETTLE_TIME = 0.3
"""Seconds without a change of the locks after which no answer to earlier reports is expected any more."""
_ARRIVAL_TIME = 0.01
"""Seconds in which this process takes what has arrived while it stood still."""
_LOCKS = 0x03
"""Num Lock and Caps Lock, as LEDs."""

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of characters that were typed, and confirmed if the guest confirms them."""


class Led(IntFlag):
    """The LEDs of a keyboard: bits of its output report (HID Usage Tables, LED page)."""

    NUM_LOCK = 1
    CAPS_LOCK = 2
    SCROLL_LOCK = 4
    COMPOSE = 8
    KANA = 16


class ReportsLost(Exception):
    """The guest may have lost reports: it stopped to receive, and QEMU then drops what it has queued; or it does not
    confirm them.

    Attributes:
        confirmed: the number of characters that the guest has certainly taken, each once.
        total: the number of characters of the text.
    """

    def __init__(self, confirmed: int, total: int) -> None:
        super().__init__(f"the guest may have lost keys: {confirmed} of {total} characters are certain")
        self.confirmed = confirmed
        self.total = total


class Keyboard(HidFunction):
    """A keyboard with six keys and eight modifiers at a time, and five LEDs.

    Reports have the same format in the boot protocol and in the report protocol. The guest sets the LEDs by control
    transfer or by interrupt transfer.

    Attributes:
        leds: the LEDs that the guest has switched on.
    """

    settings = (Setting(0, 0, CLASS_HID, SUBCLASS_BOOT, PROTOCOL_KEYBOARD),)
    report_descriptor = bytes.fromhex(
        "0501 0906 a101"  # Generic Desktop, Keyboard: application collection
        "0507 19e0 29e7 1500 2501 7501 9508 8102"  # 8 modifiers of one bit
        "9501 7508 8101"  # a reserved byte
        "9505 7501 0508 1901 2905 9102 9501 7503 9101"  # output: 5 LEDs, 3 bits of padding
        "9506 7508 1500 26ff00 0507 1900 29ff 8100"  # 6 usages
        "c0"
    )
    output = interrupt_out(REPORT_SIZE)

    def __init__(self) -> None:
        self.leds = Led(0)
        self._pressed: list[Key] = []
        self._changed_at = 0.0
        """When the guest has changed a lock, in the time of the event loop."""
        self._turn = asyncio.Lock()
        self._configurations = self._typing_in = 0
        """How often the guest has configured the device, and when the text began that is being typed."""
        self._confirmed_alone = 0
        """Keys that were confirmed one by one."""
        self._is_reliable = True
        """The guest has not stopped to receive while something was typed."""
        self._is_silent = False
        """The guest did not confirm anything."""
        self._is_asked = False
        """Num Lock was pressed, and the guest has not changed its LED since."""
        self._is_in_step = False
        """The LEDs show all that the guest has taken: their next change is the answer to the next question."""
        self._toggled = False
        """Num Lock was pressed an odd number of times since the text began."""

    async def run(self) -> None:
        """Take the LEDs that the guest sets by interrupt transfer."""
        async for data in self.output:
            self.output_report(data)

    def configured(self, speed: Speed) -> None:
        self.leds = Led(0)
        self._pressed.clear()
        self._configurations += 1
        self._confirmed_alone, self._is_reliable, self._is_silent = 0, True, False
        self._is_asked = self._is_in_step = False
        super().configured(speed)

    def output_report(self, data: bytes) -> None:
        before, self.leds = self.leds, Led(data[0] & 0x1F) if data else Led(0)
        changed = (self.leds ^ before) & _LOCKS
        if changed:
            self._changed_at = asyncio.get_running_loop().time()
        if changed & Led.NUM_LOCK:
            self._is_in_step &= self._is_asked  # otherwise a user, or another keyboard, has pressed it
            self._is_asked = False
        self.notify()

    async def press(self, *keys: Key) -> None:
        """Press keys, and keep them pressed.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: more than six keys are pressed then, besides modifiers.
        """
        pressed = [*self._pressed, *(key for key in dict.fromkeys(keys) if key not in self._pressed)]
        report = _report(pressed)
        self._pressed = pressed
        await self.report(report)

    async def release(self, *keys: Key) -> None:
        """Release keys; without arguments all that are pressed. Raises :class:`Detached`."""
        self._pressed = [key for key in self._pressed if keys and key not in keys]
        await self.report(_report(self._pressed))

    async def tap(self, *keys: Key) -> None:
        """Press keys together and release them: ``tap(Key.LEFT_CTRL, Key.LEFT_ALT, Key.DELETE)``.

        Both reports are sent at once, so no key repeats however busy the machine is.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: more than six keys are pressed then, besides modifiers.
        """
        await self.report(_report([*self._pressed, *keys]), _report(self._pressed))

    # Text

    async def type_text(
        self,
        text: str,
        layout: str = DEFAULT,
        *,
        confirm: bool | None = None,
        progress: Progress = lambda _: None,
        timeout: float = READ_TIMEOUT,
    ) -> bool:
        """Type a text; return whether the guest has confirmed that it took all of it.

        The keyboard sends keys, not characters: the guest's layout must be the same. A guest that reflects Num Lock
        (Linux, Windows) confirms what it has taken, and sets the pace. Firmware does not: reports are then sent slowly.
        Caps Lock is turned off meanwhile; the locks are as before at the end. Several texts are typed one after the
        other.

        Until :data:`TRUSTED_AFTER` keys have arrived without an interruption, each key is pressed together with Num
        Lock, in one report, so that the guest confirms each alone. If the guest stops to receive, as it does now and
        then on EHCI and UHCI controllers, a key that was not taken is typed again.

        Args:
            text: what to type; a newline is the Enter key.
            layout: the name of the guest's keyboard layout: see :func:`farplug.keymap.find_layout`.
            confirm: whether to wait for confirmations; None: where the guest confirms, unless it uses the boot
                protocol, with which firmware confirms what its driver has taken, and loses it later.
            progress: called as the text proceeds.
            timeout: seconds in which the guest must begin to read from the keyboard, if it does not yet.

        Raises:
            UsageError: there is no such layout, or it lacks a character (``BAD_KEY``). No key was pressed.
            TargetError: the guest does not read from the keyboard (``TIMED_OUT``). No key was pressed.
            ReportsLost: the guest may have lost keys, or does not confirm them although ``confirm`` is true.
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: more than four keys are pressed, besides modifiers.
        """
        characters = await off_loop(find_layout(layout).type, text)
        if not characters:
            return True
        if sum(not key.modifier for key in self._pressed) > MAX_KEYS - 2:
            raise ValueError(f"a text is typed with at most {MAX_KEYS - 2} keys that are pressed, besides modifiers")
        async with self._turn:
            self._typing_in = self._configurations
            await self._read_by_guest(timeout)
            wanted = not self.boot_protocol if confirm is None else confirm
            self._toggled = capitals = answers = False
            done = 0

            def proceed(count: int) -> None:
                nonlocal done
                done = count
                progress(count)

            try:
                answers = wanted and await self._answers()
                if confirm and not answers:
                    raise ReportsLost(0, len(characters))
                capitals = Led.CAPS_LOCK in self.leds
                if capitals:
                    await self._toggle_caps_lock()
                if answers:
                    await self._type_confirmed(characters, proceed)
                else:
                    await self._type_slowly(characters, proceed)
            except _Uncertain:
                self._is_reliable = False
                raise ReportsLost(done if answers else 0, len(characters)) from None
            finally:
                await self._restore_locks(capitals)
            return answers

    async def _read_by_guest(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.reports.read_by_guest()
        except TimeoutError:
            raise TargetError(
                f"the guest did not read from the keyboard within {timeout:g} s",
                reason=Reason.TIMED_OUT,
                remedy="plug the keyboard in before the guest starts: firmware looks for it only then; a guest that is "
                "paused reads from none",
            ) from None

    async def _type_confirmed(self, characters: Sequence[Sequence[Stroke]], progress: Progress) -> None:
        for done, strokes in enumerate(characters):
            if self._is_reliable and self._confirmed_alone >= TRUSTED_AFTER:
                await self._type_runs(characters, done, progress)
                return
            for stroke in strokes:
                await self._be_in_step()
                await self._type_key(stroke)
            progress(done + 1)

    async def _be_in_step(self) -> None:
        """Wait until the locks are at rest, if one has changed without a question."""
        if not self._is_in_step:
            if not await self._settle():
                raise _Uncertain
            self._is_in_step = True

    async def _type_runs(self, characters: Sequence[Sequence[Stroke]], done: int, progress: Progress) -> None:
        """Type the characters from the number ``done`` on, many keys before each confirmation.

        The first key of each run is pressed together with Num Lock, as in :meth:`_type_key`: the answer confirms it and
        all that came before, because the guest takes reports in their order, and nothing was dropped. The next run is
        sent then, while the guest takes the rest of this one. A run ends before a key that follows itself.
        """
        restarts = self.reports.restarts
        strokes = [(stroke, number) for number in range(done, len(characters)) for stroke in characters[number]]
        begin = 0
        while begin < len(strokes):
            end = begin + 1
            while end < min(begin + CONFIRM_EVERY, len(strokes)) and strokes[end][0].key != strokes[end - 1][0].key:
                end += 1
            await self._be_in_step()
            echo = self._ask()
            await self._emit(*self._reports_of([stroke for stroke, _ in strokes[begin:end]]))
            self._toggled = not self._toggled
            await self._is_taken(echo, restarts)
            progress(strokes[begin + 1][1] if begin + 1 < len(strokes) else len(characters))
            begin = end
        await self._be_in_step()
        await self._is_taken(await self._toggle(), restarts)
        progress(len(characters))

    async def _is_taken(self, echo: _Echo, restarts: int) -> None:
        """Wait for an answer. Raise :class:`_Uncertain` if it does not come, or the guest has restarted to receive."""
        if not await echo.comes(_TAKEN_TIMEOUT) or self.reports.restarts != restarts:
            raise _Uncertain

    async def _type_key(self, stroke: Stroke) -> None:
        """Type a key together with Num Lock, and wait until the guest has taken both; again if it has not."""
        while True:
            before, restarts = self.leds, self.reports.restarts
            echo = await self._toggle(stroke)
            in_step = self._is_in_step
            taken = await echo.comes(_TAKEN_TIMEOUT, restarts)
            self._is_reliable &= self.reports.restarts == restarts
            if taken:
                self._confirmed_alone += 1
                return
            if self.reports.restarts == restarts or not in_step:
                raise _Uncertain
            taken = await self._has_taken_num_lock(before)
            self._is_in_step = True
            if taken:
                return
            self._toggled = not self._toggled

    async def _has_taken_num_lock(self, before: Led) -> bool:
        """Return whether the guest has taken Num Lock before it restarted to receive, although it has not shown that.

        Once it shows another lock, which is pressed after the restart, it shows all that came before.
        """
        locks = self.leds & Led.CAPS_LOCK
        for attempt in range(_ATTEMPTS):
            if await self._toggle_caps_lock():
                if attempt:
                    await self._settle()
                break
        else:
            raise _Uncertain
        taken = bool((self.leds ^ before) & Led.NUM_LOCK)
        for _ in range(_ATTEMPTS):
            if self.leds & Led.CAPS_LOCK == locks:
                return taken
            if not await self._toggle_caps_lock():
                await self._settle()
        raise _Uncertain

    async def _type_slowly(self, characters: Sequence[Sequence[Stroke]], progress: Progress) -> None:
        restarts = self.reports.restarts
        for number, strokes in enumerate(characters, 1):
            for stroke in strokes:
                try:
                    await self._emit(self._report_of(stroke))
                    await asyncio.sleep(FIRMWARE_PACE)
                except asyncio.CancelledError:
                    if self._is_same_configuration:
                        await self._emit(_report(self._pressed))  # no key stays pressed
                    raise
                await self._emit(_report(self._pressed))
                await asyncio.sleep(FIRMWARE_PACE)
            progress(number)
        if self.reports.restarts != restarts and not self.boot_protocol:  # OVMF restarts after each report
            raise ReportsLost(0, len(characters))

    def _reports_of(self, strokes: Sequence[Stroke]) -> Iterator[bytes]:
        """Make reports that press keys one after the other, the first one with Num Lock, and release the last one.

        No key follows itself.

        A report with another key releases the one before. That halves the number of reports, which set the pace. The
        other key has an earlier place in the array, so Linux sees its press before the release, and the release of any
        key ends the repetition of keys there: the other key is not repeated, however late the next report is. The first
        key has no such release: Linux sees the press of Num Lock after it, repeats that, and ignores it.
        """
        others = [key for key in self._pressed if not key.modifier]
        room = MAX_KEYS - len(others)

        def placed(stroke: Stroke, place: int, *with_it: int) -> bytes:
            keys = (*bytes(place), stroke.key, *with_it)
            report = bytearray(self._report_of(stroke))
            report[2:] = bytes((*keys, *bytes(room - len(keys)), *others))
            return bytes(report)

        held, place = strokes[0], room - 2
        yield placed(held, place, Key.NUM_LOCK)
        for stroke in strokes[1:]:
            if not place:
                place = room - 1
                yield placed(held, place)
            place -= 1
            yield placed(stroke, place)
            held = stroke
        yield _report(self._pressed)

    def _report_of(self, stroke: Stroke, *others: Key) -> bytes:
        report = _report([*self._pressed, Key(stroke.key), *others])
        return bytes((report[0] | stroke.modifiers,)) + report[1:]

    async def _emit(self, *reports: bytes) -> None:
        """Send reports of a text, unless the guest has reset the device since the text began."""
        self._check_configuration()
        try:
            async with asyncio.timeout(_TAKEN_TIMEOUT):
                await self.report(*reports)
        except TimeoutError:
            raise _Uncertain from None

    def _check_configuration(self) -> None:
        """Raise :class:`Detached` if the guest has reset the device since the text began."""
        if not self._is_same_configuration:
            raise Detached("the guest has reset the keyboard while a text was typed")

    @property
    def _is_same_configuration(self) -> bool:
        return self._configurations == self._typing_in and self._current is not None

    @property
    def _is_listened_to(self) -> bool:
        return self._is_same_configuration and self.reports.is_read

    # Confirmations

    async def confirm(self, timeout: float = _TAKEN_TIMEOUT) -> bool:
        """Wait until the guest has taken all reports. Return False if it does not confirm that.

        Num Lock is pressed, twice: a guest that reflects the lock sets the LED after all that came before.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
        """
        async with self._turn:
            self._typing_in = self._configurations
            self._toggled = False
            try:
                async with asyncio.timeout(timeout):
                    return await (await self._toggle()).comes(timeout) if self._is_in_step else await self._answers()
            except (TimeoutError, _Uncertain):
                return False
            finally:
                await self._restore_locks()

    async def _answers(self) -> bool:
        """Return whether the guest confirms what it takes.

        A driver that has just begun may drop the first reports, and it shows the locks of the guest once, late if the
        guest is busy, which answers nothing. So the locks must be at rest before a question, and after the answer.
        """
        before = None
        for _ in range(1 if self._is_silent else _ATTEMPTS):
            if not self._is_in_step and not await self._settle():
                break
            if before is None:
                before = self.leds & Led.NUM_LOCK
            echo = await self._toggle()
            if await echo.comes(_ATTEMPT_TIMEOUT):
                at_rest = self._is_in_step or await self._settle()
                if at_rest and echo.is_there:
                    self._toggled = self.leds & Led.NUM_LOCK != before  # whatever became of earlier questions
                    self._is_silent, self._is_in_step = False, True
                    return True
                if at_rest:
                    before ^= Led.NUM_LOCK  # the first change was the guest's own, the second one the answer
            self._is_in_step = False
        self._is_silent = True
        return False

    async def _toggle(self, stroke: Stroke | None = None) -> _Echo:
        """Press Num Lock, with another key in the same report if there is one; return what waits for the answer."""
        pressed = _report([*self._pressed, Key.NUM_LOCK]) if stroke is None else self._report_of(stroke, Key.NUM_LOCK)
        echo = self._ask()
        await self._emit(pressed, _report(self._pressed))
        self._toggled = not self._toggled
        return echo

    def _ask(self) -> _Echo:
        """Return what waits for the answer to Num Lock, which is pressed next."""
        self._is_asked = True
        return _Echo(self, self.leds & Led.NUM_LOCK)

    async def _restore_locks(self, capitals: bool = False) -> None:
        """Press Num Lock if it was pressed an odd number of times, and Caps Lock if it was turned off.

        Do nothing if the guest has reset the device, or does not receive.
        """
        with suppress(_Uncertain):
            if capitals and self._is_listened_to:
                await self._toggle_caps_lock()
            if self._toggled and self._is_listened_to:
                await (await self._toggle()).comes(_ATTEMPT_TIMEOUT)  # no answer to the next text

    async def _toggle_caps_lock(self) -> bool:
        """Press Caps Lock, and wait until the guest shows it; return whether it does."""
        before = self.leds & Led.CAPS_LOCK
        await self._emit(_report([*self._pressed, Key.CAPS_LOCK]), _report(self._pressed))
        return await self.within(_ATTEMPT_TIMEOUT, lambda: self.leds & Led.CAPS_LOCK != before)

    async def _settle(self) -> bool:
        """Wait until the locks have not changed for :data:`_SETTLE_TIME`; return False if they change again and again.

        Raises:
            Detached: the guest has reset the device.
        """
        loop = asyncio.get_running_loop()
        for _ in range(_ATTEMPTS):
            await asyncio.sleep(_ARRIVAL_TIME)
            self._check_configuration()
            rest = max(self._changed_at, self.reports.read_since) + _SETTLE_TIME - loop.time()
            if rest <= 0:
                return True
            await asyncio.sleep(rest)
        return False

    async def within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Wait until a condition is true, as :meth:`until`, for some seconds at most; return whether it is."""
        try:
            async with asyncio.timeout(seconds):
                await self.until(condition)
        except TimeoutError:
            await asyncio.sleep(_ARRIVAL_TIME)
            return condition()
        return True


class _Echo:
    """What a guest does when it has taken Num Lock: it changes the LED."""

    def __init__(self, keyboard: Keyboard, before: Led) -> None:
        self._keyboard = keyboard
        self._before = before

    @property
    def is_there(self) -> bool:
        return self._keyboard.leds & Led.NUM_LOCK != self._before

    async def comes(self, timeout: float, restarts: int | None = None) -> bool:
        """Return whether the answer comes in time.

        Args:
            timeout: in seconds.
            restarts: wait no longer than :data:`_SETTLE_TIME` once the guest has restarted to receive more often.
        """
        keyboard = self._keyboard

        def has_restarted() -> bool:
            return restarts is not None and keyboard.reports.restarts != restarts

        await keyboard.within(timeout, lambda: self.is_there or has_restarted())
        if has_restarted():
            await keyboard.within(_SETTLE_TIME, lambda: self.is_there)
        if not self.is_there:
            keyboard._is_in_step = False
        return self.is_there


class _Uncertain(Exception):
    """It cannot be determined whether the guest has taken a key."""


def _report(keys: list[Key]) -> bytes:
    """Make the input report of pressed keys (appendix B.1): modifiers, a reserved byte, six usages."""
    modifiers = 0
    for key in keys:
        modifiers |= key.modifier
    others = [key for key in keys if not key.modifier]
    if len(others) > MAX_KEYS:
        raise ValueError(f"{len(others)} keys are pressed: a report has at most {MAX_KEYS}, besides modifiers")
    return bytes((modifiers, 0, *others)).ljust(REPORT_SIZE, b"\0")
