"""A gamepad, a touchscreen and the keys of a media keyboard.

Sources: HID Usage Tables 1.5, chapters 4 (Generic Desktop), 9 (Buttons), 15 (Consumer) and 16 (Digitizers).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from farplug.usb.types import Recipient, RequestType, Setup, Speed
from farplug.virtual.async_function import Stall, control_in
from farplug.virtual.hid.function import HidFunction
from farplug.virtual.hid.pointer import MAX_POSITION

BUTTONS: Final = 16
"""Buttons of a gamepad."""
MAX_AXIS: Final = 127
"""The largest value of a gamepad's axis; the smallest is its negative."""

_FEATURE: Final = 3
_TOUCH: Final = 1
"""The report id of the touchscreen: Linux 6.1 warns of one without."""
_MAX_CONTACTS: Final = 10


class Hat(IntEnum):
    """The position of a gamepad's hat switch."""

    UP = 0
    UP_RIGHT = 1
    RIGHT = 2
    DOWN_RIGHT = 3
    DOWN = 4
    DOWN_LEFT = 5
    LEFT = 6
    UP_LEFT = 7
    CENTRED = 8


class Gamepad(HidFunction):
    """A gamepad with 16 buttons, two sticks and a hat switch."""

    report_descriptor = bytes.fromhex(
        "0501 0905 a101 a100"  # Generic Desktop, Gamepad: application collection; physical collection
        "0509 1901 2910 1500 2501 7501 9510 8102"  # 16 buttons
        "0501 0930 0931 0932 0935 1581 257f 7508 9504 8102"  # X, Y, Z, Rz
        "0939 1500 2507 3500 463b01 6514 7504 9501 8142 6500 9501 8103"  # hat switch in degrees, with a null state
        "c0 c0"
    )

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pressed = 0
        self._left = self._right = (0, 0)
        self._hat = Hat.CENTRED

    def configured(self, speed: Speed) -> None:
        self._reset()
        super().configured(speed)

    async def press(self, *buttons: int) -> None:
        """Press buttons by their numbers from 1, and keep them pressed.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: there is no such button.
        """
        self._pressed |= _mask(buttons)
        await self.report(self._state())

    async def release(self, *buttons: int) -> None:
        """Release buttons; without arguments all of them. Raises as :meth:`press`."""
        self._pressed &= ~_mask(buttons) if buttons else 0
        await self.report(self._state())

    async def move(
        self,
        *,
        left: tuple[int, int] | None = None,
        right: tuple[int, int] | None = None,
        hat: Hat | None = None,
    ) -> None:
        """Move sticks and the hat switch, and keep them there.

        Args:
            left: the left stick, to the right and down, -127 to 127 each; None: as it is.
            right: the right stick.
            hat: the hat switch.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: a value is out of range.
        """
        for value in (*(left or ()), *(right or ())):
            if abs(value) > MAX_AXIS:
                raise ValueError(f"{value} is not a valid position of a stick: -{MAX_AXIS} to {MAX_AXIS}")
        self._left, self._right = left or self._left, right or self._right
        self._hat = self._hat if hat is None else hat
        await self.report(self._state())

    def _state(self) -> bytes:
        return struct.pack("<HbbbbB", self._pressed, *self._left, *self._right, self._hat)


def _mask(buttons: tuple[int, ...]) -> int:
    mask = 0
    for button in buttons:
        if not 1 <= button <= BUTTONS:
            raise ValueError(f"{button} is not a button: 1 to {BUTTONS}")
        mask |= 1 << button - 1
    return mask


class Touchscreen(HidFunction):
    """A touchscreen with one finger at a time."""

    report_descriptor = bytes.fromhex(
        "050d 0904 a101 8501"  # Digitizers, Touch Screen: application collection, report 1
        "0922 a102"  # Finger: logical collection
        "0942 1500 2501 7501 9501 8102 9507 8103"  # tip switch
        "0951 257f 7508 9501 8102"  # contact identifier
        "0501 26ff7f 7510 0930 3500 46ff7f 9501 8102 0931 8102"  # X, Y: 0 to 32767
        "c0"
        "050d 0954 250a 7508 9501 8102"  # contact count
        "0955 250a b102"  # feature: most contacts
        "c0"
    )
    _x = _y = 0

    async def touch(self, x: int, y: int) -> None:
        """Put the finger to a place, or move it there: 0 to 32767 from the left, and from the upper edge.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: the place is outside the screen.
        """
        await self.report(self._place(x, y))

    async def lift(self) -> None:
        """Lift the finger. Raises :class:`Detached`."""
        await self.report(self._state(touches=False))

    async def tap(self, x: int, y: int) -> None:
        """Put the finger to a place, and lift it. Raises as :meth:`touch`."""
        await self.report(self._place(x, y), self._state(touches=False))

    def _place(self, x: int, y: int) -> bytes:
        if not (0 <= x <= MAX_POSITION and 0 <= y <= MAX_POSITION):
            raise ValueError(f"({x}, {y}) is not a valid position: 0 to {MAX_POSITION}")
        self._x, self._y = x, y
        return self._state(touches=True)

    def _state(self, *, touches: bool) -> bytes:
        return struct.pack("<BBBHHB", _TOUCH, touches, 0, self._x, self._y, 1)

    @control_in(0x01, RequestType.CLASS, Recipient.INTERFACE)
    def _get_report(self, setup: Setup) -> bytes:
        match divmod(setup.value, 256):
            case (kind, report) if (kind, report) == (_FEATURE, _TOUCH):
                return bytes((_TOUCH, _MAX_CONTACTS))
            case (1, report) if report == _TOUCH:
                return self._state(touches=False)
        raise Stall


class MediaKey(IntEnum):
    """Usages of the Consumer page."""

    POWER = 0x30
    SLEEP = 0x32
    BRIGHTNESS_UP = 0x6F
    BRIGHTNESS_DOWN = 0x70
    NEXT_TRACK = 0xB5
    PREVIOUS_TRACK = 0xB6
    STOP = 0xB7
    EJECT = 0xB8
    PLAY_PAUSE = 0xCD
    MUTE = 0xE2
    VOLUME_UP = 0xE9
    VOLUME_DOWN = 0xEA
    MEDIA_PLAYER = 0x183
    MAIL = 0x18A
    CALCULATOR = 0x192
    FILES = 0x194
    SEARCH = 0x221
    HOME = 0x223
    BACK = 0x224
    FORWARD = 0x225
    REFRESH = 0x227


class MediaKeys(HidFunction):
    """The keys of a media keyboard, one at a time."""

    report_descriptor = bytes.fromhex(
        "050c 0901 a101"  # Consumer, Consumer Control: application collection
        "1500 26ff03 1900 2aff03 7510 9501 8100"  # one usage
        "c0"
    )

    async def press(self, key: int) -> None:
        """Press and release a key: a :class:`MediaKey`, or another usage of the Consumer page, 1 to 0x3ff.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
            ValueError: there is no such key.
        """
        if not 1 <= key <= 0x3FF:
            raise ValueError(f"{key} is not a usage of the Consumer page: 1 to 0x3ff")
        await self.report(struct.pack("<H", key), bytes(2))
