"""A SPICE inputs channel: keys, pointer, lock keys. No I/O.

Sources: ``spice.proto`` of spice-common (InputsChannel); libspice-server 0.15.1, ``server/inputs-channel.cpp``.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from farplug.errors import LocalProtocolError, RemoteProtocolError
from farplug.spice.channel import Channel, Event, Message
from farplug.spice.types import has_capability

if TYPE_CHECKING:
    from farplug.spice.link import LinkResult

MAX_UNACKNOWLEDGED = 8
"""The most messages about the pointer that the server has not acknowledged; later positions wait, and only the newest
is sent."""
_ACKNOWLEDGED = 4
"""SPICE_INPUT_MOTION_ACK_BUNCH: the messages that one MOTION_ACK acknowledges."""
MAX_STEP = 127
"""The largest distance of one MOTION: that of a PS/2 mouse, into which QEMU would divide it."""
SCANCODE_CAPABILITY = 0
"""SPICE_INPUTS_CAP_KEY_SCANCODE"""

_INIT, _MODIFIERS, _MOTION_ACK = 101, 102, 111
_KEY_DOWN, _KEY_UP, _KEY_MODIFIERS, _KEY_SCANCODE = 101, 102, 103, 104
_MOTION, _POSITION, _PRESS, _RELEASE = 111, 112, 113, 114
_MESSAGES: dict[int, int] = {_INIT: 64, _MODIFIERS: 64, _MOTION_ACK: 64}
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_MOTION_BODY = struct.Struct("<iiH")
_POSITION_BODY = struct.Struct("<IIHB")
_BUTTON_BODY = struct.Struct("<BH")


class Locks(IntFlag):
    """SPICE_KEYBOARD_MODIFIER_FLAGS_*: lock keys whose light is on."""

    SCROLL = 1
    NUM = 2
    CAPS = 4


class Button(IntEnum):
    """SPICE_MOUSE_BUTTON_*."""

    LEFT = 1
    MIDDLE = 2
    RIGHT = 3
    UP = 4
    """a step of the wheel, away from the user"""
    DOWN = 5
    SIDE = 6
    EXTRA = 7

    @property
    def mask(self) -> int:
        """Return the bit of a button in SPICE_MOUSE_BUTTON_MASK_*."""
        return 1 << (self - 1)


class MouseMode(IntEnum):
    """SPICE_MOUSE_MODE_*."""

    SERVER = 1
    """the pointer is moved by distances"""
    CLIENT = 2
    """the pointer is moved to positions"""


class InputsChannel(Channel):
    """The messages of an inputs channel.

    Attributes:
        locks: the lock keys whose light is on, as the server reported them; None before the first report.
        held: the scancodes of keys that are held down, in their order.
        buttons: the mask of the buttons that are held down.
    """

    def __init__(self, name: str, link: LinkResult) -> None:
        super().__init__(name, mini_header=link.mini_header, stored=_MESSAGES)
        self.locks: Locks | None = None
        self.held: list[bytes] = []
        self.buttons = 0
        self._has_scancode = has_capability(link.channel_caps, SCANCODE_CAPABILITY)
        self._unacknowledged = 0
        self._waiting: tuple[int, int, int] | None = None
        """The newest position, which is sent when the server has acknowledged others."""

    def next_event(self) -> Event | None:
        """Return the next event; None if more bytes are needed. Messages of the channel itself are processed here."""
        while True:
            event = super().next_event()
            if type(event) is not Message:
                return event
            self._handle_inputs(event)

    def _handle_inputs(self, message: Message) -> None:
        if message.kind == _MOTION_ACK:
            self._unacknowledged = max(0, self._unacknowledged - _ACKNOWLEDGED)
            self._send_position()
            return
        if len(message.body) < _U16.size:
            raise RemoteProtocolError(f"SPICE INPUTS message {message.kind} of {len(message.body)} bytes, fewer than 2")
        self.locks = Locks(_U16.unpack_from(message.body)[0] & 7)

    # Keys

    def stroke(self, scancodes: bytes) -> None:
        """Send presses and releases of keys in one message, which the server never divides: none remains pressed."""
        if self._has_scancode:
            self.send(_KEY_SCANCODE, scancodes)
            return
        position = 0
        while position < len(scancodes):
            size = 2 if scancodes[position] == 0xE0 else 1
            code = scancodes[position : position + size]
            self.send(_KEY_UP if code[-1] & 0x80 else _KEY_DOWN, code.ljust(4, b"\0"))
            position += size

    def press(self, code: bytes) -> None:
        """Press a key, and hold it. A key that is held already repeats."""
        if code not in self.held:
            self.held.append(code)
        self.stroke(code)

    def release(self, code: bytes) -> None:
        """Release a key. Does nothing if it is not held."""
        if code in self.held:
            self.held.remove(code)
            self.stroke(code[:-1] + bytes([code[-1] | 0x80]))

    def set_locks(self, locks: Locks) -> None:
        """Turn the lights of lock keys on, and the others off: the server presses the keys that differ."""
        self.send(_KEY_MODIFIERS, _U16.pack(locks))

    # The pointer

    def move_to(self, x: int, y: int, display: int) -> None:
        """Move the pointer to a position on the surface of a display, in the mode CLIENT."""
        if x < 0 or y < 0:
            raise LocalProtocolError(f"position {x},{y}: it is outside of the display")
        self._waiting = (x, y, display)
        self._send_position()

    def _send_position(self) -> None:
        if self._waiting is not None and self._unacknowledged < MAX_UNACKNOWLEDGED:
            self._flush_position()

    def _flush_position(self) -> None:
        if self._waiting is not None:
            x, y, display = self._waiting
            self._waiting = None
            self._unacknowledged += 1
            self.send(_POSITION, _POSITION_BODY.pack(x, y, self.buttons, display))

    def move_by(self, x: int, y: int) -> None:
        """Move the pointer by a distance, of up to MAX_STEP in each direction, in the mode SERVER."""
        self._unacknowledged += 1
        self.send(_MOTION, _MOTION_BODY.pack(x, y, self.buttons))

    @property
    def ready_for_motion(self) -> bool:
        """Return whether the server has acknowledged enough for another :meth:`move_by`."""
        return self._unacknowledged < MAX_UNACKNOWLEDGED

    def press_button(self, button: Button) -> None:
        """Press a button where the pointer was moved last, and hold it."""
        self._flush_position()
        self.buttons |= button.mask
        self.send(_PRESS, _BUTTON_BODY.pack(button, self.buttons))

    def release_button(self, button: Button) -> None:
        """Release a button. Does nothing if it is not held."""
        if self.buttons & button.mask:
            self._flush_position()
            self.buttons &= ~button.mask
            self.send(_RELEASE, _BUTTON_BODY.pack(button, self.buttons))

    def release_all(self) -> None:
        """Release all keys and buttons that are held."""
        for code in reversed([*self.held]):
            self.release(code)
        for button in Button:
            self.release_button(button)
