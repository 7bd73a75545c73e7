"""Keys: X keysym names and characters as scancodes of a PC keyboard with the US layout. No I/O.

Sources: the scancodes of set 1 (IBM PC AT); the names of X11's ``keysymdef.h``, without ``XK_``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.text import shown

MAX_CHORD: Final = 4
"""The most keys that are pressed together: with their releases they fill the 16 bytes of QEMU's PS/2 queue."""
_BREAK: Final = 0x80

_ROWS: Final = (
    (0x02, "1234567890-="),
    (0x10, "qwertyuiop[]"),
    (0x1E, "asdfghjkl;'`"),
    (0x2B, "\\zxcvbnm,./"),
)
_SHIFTED: Final = dict(zip('~!@#$%^&*()_+{}:"|<>?', "`1234567890-=[];'\\,./", strict=True))
_PLAIN: Final = {char: bytes([first + at]) for first, row in _ROWS for at, char in enumerate(row)} | {
    " ": b"\x39",
    "\n": b"\x1c",
    "\t": b"\x0f",
    "\b": b"\x0e",
    "\x1b": b"\x01",
}

_NAMES: Final[dict[str, bytes]] = {
    "Escape": b"\x01",
    "BackSpace": b"\x0e",
    "Tab": b"\x0f",
    "Return": b"\x1c",
    "Control_L": b"\x1d",
    "Shift_L": b"\x2a",
    "Shift_R": b"\x36",
    "KP_Multiply": b"\x37",
    "Alt_L": b"\x38",
    "space": b"\x39",
    "Caps_Lock": b"\x3a",
    **{f"F{number}": bytes([0x3A + number]) for number in range(1, 11)},
    "Num_Lock": b"\x45",
    "Scroll_Lock": b"\x46",
    "KP_7": b"\x47",
    "KP_8": b"\x48",
    "KP_9": b"\x49",
    "KP_Subtract": b"\x4a",
    "KP_4": b"\x4b",
    "KP_5": b"\x4c",
    "KP_6": b"\x4d",
    "KP_Add": b"\x4e",
    "KP_1": b"\x4f",
    "KP_2": b"\x50",
    "KP_3": b"\x51",
    "KP_0": b"\x52",
    "KP_Decimal": b"\x53",
    "Sys_Req": b"\x54",
    "less": b"\x56",
    "F11": b"\x57",
    "F12": b"\x58",
    "KP_Enter": b"\xe0\x1c",
    "Control_R": b"\xe0\x1d",
    "KP_Divide": b"\xe0\x35",
    "Print": b"\xe0\x37",
    "Alt_R": b"\xe0\x38",
    "Break": b"\xe0\x46",
    "Home": b"\xe0\x47",
    "Up": b"\xe0\x48",
    "Prior": b"\xe0\x49",
    "Left": b"\xe0\x4b",
    "Right": b"\xe0\x4d",
    "End": b"\xe0\x4f",
    "Down": b"\xe0\x50",
    "Next": b"\xe0\x51",
    "Insert": b"\xe0\x52",
    "Delete": b"\xe0\x53",
    "Super_L": b"\xe0\x5b",
    "Super_R": b"\xe0\x5c",
    "Menu": b"\xe0\x5d",
    # Names of characters
    "minus": b"\x0c",
    "equal": b"\x0d",
    "bracketleft": b"\x1a",
    "bracketright": b"\x1b",
    "semicolon": b"\x27",
    "apostrophe": b"\x28",
    "grave": b"\x29",
    "backslash": b"\x2b",
    "comma": b"\x33",
    "period": b"\x34",
    "slash": b"\x35",
}
_OTHER_NAMES: Final = {
    "ctrl": "Control_L",
    "control": "Control_L",
    "alt": "Alt_L",
    "altgr": "Alt_R",
    "iso_level3_shift": "Alt_R",
    "shift": "Shift_L",
    "super": "Super_L",
    "win": "Super_L",
    "meta": "Super_L",
    "enter": "Return",
    "esc": "Escape",
    "del": "Delete",
    "ins": "Insert",
    "page_up": "Prior",
    "pageup": "Prior",
    "page_down": "Next",
    "pagedown": "Next",
    "plus": "KP_Add",
}
_BY_LOWER_NAME: Final = {name.lower(): code for name, code in _NAMES.items()} | {
    name: _NAMES[target] for name, target in _OTHER_NAMES.items()
}
_SHIFT: Final = _NAMES["Shift_L"]


def key_code(name: str) -> bytes:
    """Return the scancode of a key, 1 or 2 bytes.

    Args:
        name: the name of an X keysym in any case (``Delete``, ``F1``, ``Page_Up``), a modifier (``ctrl``, ``alt``,
            ``shift``, ``super``), or the character on the key (``a``).

    Raises:
        UsageError: there is no such key (``BAD_KEY``).
    """
    code = _PLAIN.get(name.lower()) if len(name) == 1 else _BY_LOWER_NAME.get(name.lower())
    if code is None:
        raise UsageError(
            f"{shown(name)} is not a key",
            reason=Reason.BAD_KEY,
            remedy="name it as X does (Return, Delete, F1, Page_Up), or by the character on a US keyboard (a, 1, /)",
        )
    return code


def chord_codes(keys: str) -> list[bytes]:
    """Return the scancodes of keys that are pressed together: ``ctrl+alt+Delete``.

    Raises:
        UsageError: a key does not exist, or there are none, or too many (``BAD_KEY``).
    """
    names = keys.split("+")
    if len(names) > MAX_CHORD:
        raise UsageError(
            f"{shown(keys)}: {len(names)} keys at a time, more than {MAX_CHORD}",
            reason=Reason.BAD_KEY,
            remedy="press fewer keys together",
        )
    return [key_code(name) for name in names]


def text_strokes(text: str, *, caps_lock: bool = False) -> list[bytes]:
    """Return the scancodes that type a text, for each character the presses and releases of its keys.

    Args:
        text: characters of the US layout; a newline is the Return key. ``\\r\\n`` is one newline.
        caps_lock: the lock key for capitals is on.

    Raises:
        UsageError: a character is on no key of the layout (``BAD_KEY``); the message lists them.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    missing = sorted(
        {char for char in text if (char.lower() not in _PLAIN and char not in _SHIFTED) or not char.isascii()}
    )
    if missing:
        some = ", ".join(shown(char) for char in missing[:8])
        raise UsageError(
            f"the US keyboard layout has no key for {some}{' and others' if len(missing) > 8 else ''}",
            reason=Reason.BAD_KEY,
            remedy="leave these characters out; the VM must use the US layout, too",
        )
    strokes = []
    for char in text:
        shifted = char in _SHIFTED or char.isupper()
        if caps_lock and char.isalpha():
            shifted = not shifted
        code = _PLAIN[_SHIFTED.get(char, char.lower())]
        strokes.append(stroke([_SHIFT, code] if shifted else [code]))
    return strokes


def stroke(codes: Sequence[bytes]) -> bytes:
    """Return the scancodes that press keys in their order, and release them in the other one."""
    return b"".join(codes) + b"".join(map(release, reversed(codes)))


def release(code: bytes) -> bytes:
    """Return the scancode for the release of a key."""
    return code[:-1] + bytes([code[-1] | _BREAK])
