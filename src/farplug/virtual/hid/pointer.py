"""Pointers: a tablet with absolute positions, and a mouse.

Sources: HID 1.11, appendix B.2; HID Usage Tables 1.5, chapters 4 and 12.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import Final

from farplug.usb.types import Speed
from farplug.virtual.async_function import Setting
from farplug.virtual.hid.function import CLASS_HID, PROTOCOL_MOUSE, SUBCLASS_BOOT, HidFunction

MAX_POSITION: Final = 0x7FFF
"""The coordinates of the right and of the lower edge of the screen."""

_MAX_STEP: Final = 127
"""The largest relative value of a report."""


class Button(IntFlag):
    """The buttons of a pointer: bits of its input report."""

    LEFT = 1
    RIGHT = 2
    MIDDLE = 4
    SIDE = 8
    EXTRA = 16


class _Pointer(HidFunction):
    """What a tablet and a mouse have in common: five buttons and a wheel."""

    _buttons = Button(0)

    def configured(self, speed: Speed) -> None:
        self._buttons = Button(0)
        super().configured(speed)

    def _state(self, wheel: int = 0) -> bytes:
        """Return the report of the current state."""
        raise NotImplementedError

    async def press(self, buttons: Button = Button.LEFT) -> None:
        """Press buttons, and keep them pressed. Raises :class:`Detached`."""
        self._buttons |= buttons
        await self.report(self._state())

    async def release(self, buttons: Button = Button.LEFT) -> None:
        """Release buttons. Raises :class:`Detached`."""
        self._buttons &= ~buttons
        await self.report(self._state())

    async def click(self, buttons: Button = Button.LEFT) -> None:
        """Press and release buttons. Raises :class:`Detached`."""
        self._buttons |= buttons
        pressed = self._state()
        self._buttons &= ~buttons
        await self.report(pressed, self._state())

    async def scroll(self, steps: int) -> None:
        """Turn the wheel: positive steps away from the user, which scrolls up. Raises :class:`Detached`."""
        await self.report(*(self._state(step) for step in _pieces(steps)), self._state())


class Tablet(_Pointer):
    """A pointer with absolute positions: it moves to a place of the screen, whatever the guest's acceleration is.

    It is a mouse to the guest (usage Mouse): Linux and Windows need no other driver. Firmware does not use it.
    """

    report_descriptor = bytes.fromhex(
        "0501 0902 a101 0901 a100"  # Generic Desktop, Mouse: application collection; Pointer: physical collection
        "0509 1901 2905 1500 2501 9505 7501 8102 9501 7503 8101"  # 5 buttons, 3 bits of padding
        "0501 0930 0931 1500 26ff7f 3500 46ff7f 7510 9502 8102"  # X, Y: 0 to 32767
        "0501 0938 1581 257f 3500 4500 7508 9501 8106"  # wheel, relative
        "c0 c0"
    )
    _x = _y = 0

    async def move_to(self, x: int, y: int) -> None:
        """Move to a place: 0 to 32767 from the left to the right, and from the upper to the lower edge.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: the place is outside the screen.
        """
        if not (0 <= x <= MAX_POSITION and 0 <= y <= MAX_POSITION):
            raise ValueError(f"({x}, {y}) is not a valid position: 0 to {MAX_POSITION}")
        self._x, self._y = x, y
        await self.report(self._state())

    def _state(self, wheel: int = 0) -> bytes:
        return struct.pack("<BHHb", self._buttons, self._x, self._y, wheel)


class Mouse(_Pointer):
    """A boot mouse with a wheel. Its first three bytes are the boot report (appendix B.2)."""

    settings = (Setting(0, 0, CLASS_HID, SUBCLASS_BOOT, PROTOCOL_MOUSE),)
    report_descriptor = bytes.fromhex(
        "0501 0902 a101 0901 a100"  # Generic Desktop, Mouse: application collection; Pointer: physical collection
        "0509 1901 2905 1500 2501 9505 7501 8102 9501 7503 8101"  # 5 buttons, 3 bits of padding
        "0501 0930 0931 0938 1581 257f 7508 9503 8106"  # X, Y, wheel, relative
        "c0 c0"
    )

    async def move(self, x: int, y: int) -> None:
        """Move by a number of counts, to the right and down. Raises :class:`Detached`."""
        count = max(1, len(_pieces(x)), len(_pieces(y)))
        steps = [(x * (i + 1) // count - x * i // count, y * (i + 1) // count - y * i // count) for i in range(count)]
        moves = (struct.pack("<Bbbb", self._buttons, step_x, step_y, 0) for step_x, step_y in steps)
        await self.report(*moves, self._state())

    def _state(self, wheel: int = 0) -> bytes:
        return struct.pack("<Bbbb", self._buttons, 0, 0, wheel)


def _pieces(value: int) -> list[int]:
    """Cut a relative value into pieces that fit a report; none for 0."""
    sign = -1 if value < 0 else 1
    whole, rest = divmod(abs(value), _MAX_STEP)
    return [sign * _MAX_STEP] * whole + ([sign * rest] if rest else [])
