"""A boot keyboard: it works in firmware, boot loaders and operating systems.

Source: HID 1.11, appendices B.1 and F.3.
"""

from __future__ import annotations

import asyncio
from enum import IntFlag
from typing import Final

from farplug.usb.types import Speed
from farplug.virtual.async_function import Setting, interrupt_out
from farplug.virtual.hid.function import CLASS_HID, PROTOCOL_KEYBOARD, REPORT_SIZE, SUBCLASS_BOOT, HidFunction
from farplug.virtual.hid.keys import US_LAYOUT, Key

MAX_KEYS: Final = 6
"""Keys in a report besides the modifiers."""

FIRMWARE_PACE: Final = 0.06
"""Seconds for a report while the guest uses the boot protocol: SeaBIOS takes one at each tick of its timer (55 ms)."""

CONFIRM_EVERY: Final = 100
"""Characters after which :meth:`Keyboard.type_text` waits until the guest has processed them, where it can."""


_ATTEMPTS, _ATTEMPT_TIMEOUT = 5, 2.0


class Led(IntFlag):
    """The LEDs of a keyboard: bits of its output report (HID Usage Tables, LED page)."""

    NUM_LOCK = 1
    CAPS_LOCK = 2
    SCROLL_LOCK = 4
    COMPOSE = 8
    KANA = 16


class ReportsLost(Exception):
    """The guest may have lost reports: it stopped to receive, and QEMU then drops what it has queued.

    Attributes:
        confirmed: the number of characters that the guest has certainly processed.
    """

    def __init__(self, confirmed: int, total: int) -> None:
        super().__init__(f"the guest may have lost keys: {confirmed} of {total} characters are certain")
        self.confirmed = confirmed


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
        self._leds_set = 0

    async def run(self) -> None:
        """Take the LEDs that the guest sets by interrupt transfer."""
        async for data in self.output:
            self.output_report(data)

    def configured(self, speed: Speed) -> None:
        self.leds = Led(0)
        self._pressed.clear()
        super().configured(speed)

    def output_report(self, data: bytes) -> None:
        self.leds = Led(data[0] & 0x1F) if data else Led(0)
        self._leds_set += 1
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

    async def type_text(self, text: str, *, confirm: bool | None = None) -> None:
        """Type a text on a US keyboard. The guest's layout must be US, too.

        A guest that reflects Num Lock (Linux, Windows) confirms what it has processed, from time to time and at the
        end: see :meth:`confirm`. Firmware does not; reports are then sent slowly.

        Args:
            text: letters, digits and signs of ASCII, newlines and tabs.
            confirm: whether to wait for confirmations; None: unless the guest uses the boot protocol.

        Raises:
            ValueError: a US keyboard does not have one of the characters. No key was pressed.
            ReportsLost: the guest may have lost keys, or does not confirm them.
            Detached: the guest has not configured the device, or resets or unplugs it.
        """
        for place, character in enumerate(text):
            if character not in US_LAYOUT:
                raise ValueError(f"a US keyboard does not have {character!a} (character {place + 1} of the text)")
        await self.reports.read_by_guest()
        confirm = not self.boot_protocol if confirm is None else confirm
        confirmed, restarts = 0, self.reports.restarts
        if confirm and text and not await self._is_taken():
            raise ReportsLost(0, len(text))
        for place, character in enumerate(text, 1):
            key, shift = US_LAYOUT[character]
            if character.isalpha() and Led.CAPS_LOCK in self.leds:
                shift = not shift
            if self.boot_protocol:
                for report in (_report([Key.LEFT_SHIFT, key] if shift else [key]), _report([])):
                    await self.report(report)
                    await asyncio.sleep(FIRMWARE_PACE)
            else:
                await self.tap(*((Key.LEFT_SHIFT, key) if shift else (key,)))
            if confirm and (place == len(text) or place % CONFIRM_EVERY == 0):
                if not await self.confirm() or self.reports.restarts != restarts:
                    raise ReportsLost(confirmed, len(text))
                confirmed = place
        if self.reports.restarts != restarts:
            raise ReportsLost(confirmed, len(text))

    async def _is_taken(self) -> bool:
        """Return whether the guest takes reports. A driver that has just begun may drop the first ones."""
        for _ in range(_ATTEMPTS):
            if await self.confirm(_ATTEMPT_TIMEOUT):
                return True
        return False

    async def confirm(self, timeout: float = 5) -> bool:
        """Wait until the guest has processed all reports. Return False if it does not confirm that.

        Num Lock is pressed twice: a guest that reflects the lock sets the LEDs each time, after all that came before.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
        """
        return await self._answers(timeout) and await self._answers(timeout)

    async def _answers(self, timeout: float) -> bool:
        """Press Num Lock, and return whether the guest sets the LEDs within ``timeout`` seconds."""
        before = self._leds_set
        await self.tap(Key.NUM_LOCK)
        try:
            async with asyncio.timeout(timeout):
                await self.until(lambda: self._leds_set != before)
        except TimeoutError:
            return False
        return True


def _report(keys: list[Key]) -> bytes:
    """Make the input report of pressed keys (appendix B.1): modifiers, a reserved byte, six usages."""
    modifiers = 0
    for key in keys:
        modifiers |= key.modifier
    others = [key for key in keys if not key.modifier]
    if len(others) > MAX_KEYS:
        raise ValueError(f"{len(others)} keys are pressed: a report has at most {MAX_KEYS}, besides modifiers")
    return bytes((modifiers, 0, *others)).ljust(REPORT_SIZE, b"\0")
