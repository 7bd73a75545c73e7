"""Names of keys, as X has them, as the codes of physical keys that a session holds down.

Sources: the names of X11's ``keysymdef.h`` without ``XK_``; W3C UI Events KeyboardEvent code Values.
"""

from __future__ import annotations

from typing import Final

from farplug.errors import Reason, UsageError
from farplug.text import shown

MAX_KEYS: Final = 6
"""Keys that are held down together."""

_CODES: Final[dict[str, str]] = {
    **{letter: f"Key{letter.upper()}" for letter in "abcdefghijklmnopqrstuvwxyz"},
    **{digit: f"Digit{digit}" for digit in "0123456789"},
    **{f"f{number}": f"F{number}" for number in range(1, 25)},
    **{f"kp_{digit}": f"Numpad{digit}" for digit in "0123456789"},
    **dict.fromkeys(("ctrl", "control", "control_l"), "ControlLeft"),
    "control_r": "ControlRight",
    **dict.fromkeys(("shift", "shift_l"), "ShiftLeft"),
    "shift_r": "ShiftRight",
    **dict.fromkeys(("alt", "alt_l"), "AltLeft"),
    **dict.fromkeys(("altgr", "alt_r", "iso_level3_shift"), "AltRight"),
    **dict.fromkeys(("super", "super_l", "win", "meta", "cmd"), "MetaLeft"),
    "super_r": "MetaRight",
    **dict.fromkeys(("return", "enter"), "Enter"),
    **dict.fromkeys(("escape", "esc"), "Escape"),
    **dict.fromkeys(("space", " "), "Space"),
    "tab": "Tab",
    "backspace": "Backspace",
    **dict.fromkeys(("delete", "del"), "Delete"),
    **dict.fromkeys(("insert", "ins"), "Insert"),
    "home": "Home",
    "end": "End",
    **dict.fromkeys(("page_up", "pageup", "prior"), "PageUp"),
    **dict.fromkeys(("page_down", "pagedown", "next"), "PageDown"),
    **{name: f"Arrow{name.capitalize()}" for name in ("up", "down", "left", "right")},
    "caps_lock": "CapsLock",
    "num_lock": "NumLock",
    "scroll_lock": "ScrollLock",
    "print": "PrintScreen",
    **dict.fromkeys(("pause", "break"), "Pause"),
    "menu": "ContextMenu",
    **dict.fromkeys(("minus", "-"), "Minus"),
    **dict.fromkeys(("equal", "="), "Equal"),
    **dict.fromkeys(("bracketleft", "["), "BracketLeft"),
    **dict.fromkeys(("bracketright", "]"), "BracketRight"),
    **dict.fromkeys(("semicolon", ";"), "Semicolon"),
    **dict.fromkeys(("apostrophe", "'"), "Quote"),
    **dict.fromkeys(("grave", "`"), "Backquote"),
    **dict.fromkeys(("backslash", "\\"), "Backslash"),
    **dict.fromkeys(("comma", ","), "Comma"),
    **dict.fromkeys(("period", "."), "Period"),
    **dict.fromkeys(("slash", "/"), "Slash"),
    "less": "IntlBackslash",
    **dict.fromkeys(("kp_add", "plus"), "NumpadAdd"),
    "kp_subtract": "NumpadSubtract",
    "kp_multiply": "NumpadMultiply",
    "kp_divide": "NumpadDivide",
    "kp_decimal": "NumpadDecimal",
    "kp_enter": "NumpadEnter",
}


def physical_codes(keys: str) -> list[str]:
    """Return the codes of keys that are held down together: ``ctrl+shift``.

    Raises:
        UsageError: a key does not exist, or there are too many (``BAD_KEY``).
    """
    names = keys.split("+")
    if len(names) > MAX_KEYS:
        raise UsageError(f"{shown(keys)}: more than {MAX_KEYS} keys at a time", reason=Reason.BAD_KEY)
    codes = []
    for name in names:
        code = _CODES.get(name.lower())
        if code is None:
            raise UsageError(
                f"{shown(name)} is not a key",
                reason=Reason.BAD_KEY,
                remedy="name it as X does: Return, Delete, F1, Page_Up, ctrl+alt+Delete",
            )
        codes.append(code)
    return codes
