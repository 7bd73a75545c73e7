"""Keys and characters as scancodes of a PC keyboard. No I/O.

Sources: the scancodes of set 1 (IBM PC AT); "USB HID to PS/2 Scan Code Translation Table" (Microsoft, 2004).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.keymap import Key, Layout, Stroke, chord, key_named
from farplug.keymap.table import ALTGR, SHIFT
from farplug.text import shown

MAX_CHORD: Final = 4
"""The most keys that are pressed together: with their releases they fill the 16 bytes of QEMU's PS/2 queue."""
_BREAK: Final = 0x80

_PLAIN: Final[Mapping[int, str]] = {
    Key.A: "1e302e2012212223172425263231181910131f14162f112d152c",
    Key.DIGIT_1: "02030405060708090a0b",
    Key.ENTER: "1c010e0f390c0d1a1b2b2b272829333435",  # up to SLASH
    Key.CAPS_LOCK: "3a",
    Key.F1: "3b3c3d3e3f40414243445758",
    Key.SCROLL_LOCK: "46",
    Key.NUM_LOCK: "45",
    Key.KEYPAD_MULTIPLY: "374a4e",
    Key.KEYPAD_1: "4f50514b4c4d47484952535659",
    Key.KEYPAD_EQUAL: "59",
    Key.F13: "6465666768696a6b6c6d6e76",
    Key.KEYPAD_COMMA: "7e",
    Key.INTERNATIONAL_1: "73707d797b5c",
    Key.LEFT_CTRL: "1d2a38",
    Key.RIGHT_SHIFT: "36",
}
_EXTENDED: Final[Mapping[int, str]] = {
    Key.PRINT_SCREEN: "37",
    Key.PAUSE: "46",  # Break, which is Pause together with Ctrl
    Key.INSERT: "524749534f514d4b5048",  # up to UP
    Key.KEYPAD_DIVIDE: "35",
    Key.KEYPAD_ENTER: "1c",
    Key.MENU: "5d5e",
    Key.MUTE: "20302e",
    Key.LEFT_META: "5b1d",  # and the right Ctrl key
    Key.RIGHT_ALT: "385c",
}


def _codes() -> dict[int, bytes]:
    codes: dict[int, bytes] = {}
    for prefix, rows in ((b"", _PLAIN), (b"\xe0", _EXTENDED)):
        for first, row in rows.items():
            codes |= {first + number: prefix + bytes([code]) for number, code in enumerate(bytes.fromhex(row))}
    return codes


_SCANCODES: Final = _codes()
_SYS_REQ: Final = b"\x54"
"""What the key Print sends together with Alt."""
_MODIFIERS: Final = ((SHIFT, _SCANCODES[Key.LEFT_SHIFT]), (ALTGR, _SCANCODES[Key.RIGHT_ALT]))


def key_code(name: str) -> bytes:
    """Return the scancode of a key, 1 or 2 bytes.

    Args:
        name: of the key, as :func:`farplug.keymap.key_named` takes it.

    Raises:
        UsageError: there is no such key, or it has no scancode (``BAD_KEY``).
    """
    key = key_named(name)
    if name.lower() == "sys_req":
        return _SYS_REQ
    code = _SCANCODES.get(key)
    if code is None:
        raise UsageError(
            f"{shown(name)} has no scancode of a PC keyboard, which SPICE needs",
            reason=Reason.BAD_KEY,
            remedy="press it on a USB keyboard",
        )
    return code


def chord_codes(keys: str) -> list[bytes]:
    """Return the scancodes of keys that are pressed together: ``ctrl+alt+Delete``.

    Raises:
        UsageError: a key does not exist, or there are none, or too many (``BAD_KEY``).
    """
    chord(keys, MAX_CHORD)
    return [key_code(name) for name in keys.split("+")]


def text_strokes(text: str, layout: Layout) -> list[bytes]:
    """Return the scancodes that type a text, for each character the presses and releases of its keys.

    Raises:
        UsageError: the layout lacks a character (``BAD_KEY``), or the text is too long.
    """
    return [b"".join(map(_stroke_codes, strokes)) for strokes in layout.type(text)]


def _stroke_codes(one: Stroke) -> bytes:
    modifiers = [code for modifier, code in _MODIFIERS if one.modifiers & modifier]
    return stroke([*modifiers, _SCANCODES[one.key]])


def stroke(codes: Sequence[bytes]) -> bytes:
    """Return the scancodes that press keys in their order, and release them in the other one."""
    return b"".join(codes) + b"".join(map(release, reversed(codes)))


def release(code: bytes) -> bytes:
    """Return the scancode for the release of a key."""
    return code[:-1] + bytes([code[-1] | _BREAK])
