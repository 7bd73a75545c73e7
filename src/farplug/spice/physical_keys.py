"""Physical keys: the codes of browsers as scancodes of a PC keyboard. No I/O.

Sources: W3C UI Events KeyboardEvent code Values; keycodemapdb, the table of QEMU's key numbers, whose bit 8 is the
prefix E0 of a scancode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.text import shown

_LETTERS: Final = ((0x10, "QWERTYUIOP"), (0x1E, "ASDFGHJKL"), (0x2C, "ZXCVBNM"))
_NUMPAD: Final = ((0x47, "789"), (0x4B, "456"), (0x4F, "1230"))

_PLAIN: Final[dict[str, int]] = {
    # Writing system keys
    **{f"Key{letter}": first + at for first, row in _LETTERS for at, letter in enumerate(row)},
    **{f"Digit{digit}": 0x02 + at for at, digit in enumerate("1234567890")},
    "Backquote": 0x29,
    "Backslash": 0x2B,
    "BracketLeft": 0x1A,
    "BracketRight": 0x1B,
    "Comma": 0x33,
    "Equal": 0x0D,
    "IntlBackslash": 0x56,
    "IntlRo": 0x73,
    "IntlYen": 0x7D,
    "Minus": 0x0C,
    "Period": 0x34,
    "Quote": 0x28,
    "Semicolon": 0x27,
    "Slash": 0x35,
    # Functional keys
    "AltLeft": 0x38,
    "Backspace": 0x0E,
    "CapsLock": 0x3A,
    "ControlLeft": 0x1D,
    "Enter": 0x1C,
    "ShiftLeft": 0x2A,
    "ShiftRight": 0x36,
    "Space": 0x39,
    "Tab": 0x0F,
    "Convert": 0x79,
    "KanaMode": 0x70,
    "Lang1": 0x72,
    "Lang2": 0x71,
    "Lang3": 0x78,
    "Lang4": 0x77,
    "Lang5": 0x76,
    "Katakana": 0x78,
    "Hiragana": 0x77,
    "NonConvert": 0x7B,
    # Numpad
    "NumLock": 0x45,
    **{f"Numpad{digit}": first + at for first, row in _NUMPAD for at, digit in enumerate(row)},
    "NumpadAdd": 0x4E,
    "NumpadComma": 0x7E,
    "NumpadDecimal": 0x53,
    "NumpadEqual": 0x59,
    "NumpadMultiply": 0x37,
    "NumpadStar": 0x37,
    "NumpadSubtract": 0x4A,
    # Function keys
    "Escape": 0x01,
    **{f"F{number}": 0x3A + number for number in range(1, 11)},
    "F11": 0x57,
    "F12": 0x58,
    "F13": 0x5D,
    "F14": 0x5E,
    "F15": 0x5F,
    "F16": 0x55,
    "F20": 0x5A,
    "F21": 0x74,
    "F23": 0x6D,
    "F24": 0x6F,
    "ScrollLock": 0x46,
    # Media and legacy keys
    "Eject": 0x6C,
    "Open": 0x64,
    "Paste": 0x65,
}
_PREFIXED: Final[dict[str, int]] = {
    "AltRight": 0x38,
    "ContextMenu": 0x5D,
    "ControlRight": 0x1D,
    "MetaLeft": 0x5B,
    "MetaRight": 0x5C,
    "OSLeft": 0x5B,
    "OSRight": 0x5C,
    "Delete": 0x53,
    "End": 0x4F,
    "Help": 0x75,
    "Home": 0x47,
    "Insert": 0x52,
    "PageDown": 0x51,
    "PageUp": 0x49,
    "ArrowDown": 0x50,
    "ArrowLeft": 0x4B,
    "ArrowRight": 0x4D,
    "ArrowUp": 0x48,
    "NumpadDivide": 0x35,
    "NumpadEnter": 0x1C,
    "NumpadParenLeft": 0x76,
    "NumpadParenRight": 0x7B,
    "F17": 0x03,
    "F18": 0x77,
    "F19": 0x04,
    "F22": 0x79,
    "Pause": 0x46,
    "PrintScreen": 0x37,
    "BrowserBack": 0x6A,
    "BrowserFavorites": 0x66,
    "BrowserForward": 0x69,
    "BrowserHome": 0x32,
    "BrowserRefresh": 0x67,
    "BrowserSearch": 0x65,
    "BrowserStop": 0x68,
    "LaunchApp1": 0x6B,
    "LaunchApp2": 0x21,
    "LaunchMail": 0x6C,
    "MediaPlayPause": 0x22,
    "MediaSelect": 0x6D,
    "MediaStop": 0x24,
    "MediaTrackNext": 0x19,
    "MediaTrackPrevious": 0x10,
    "Power": 0x5E,
    "Sleep": 0x5F,
    "WakeUp": 0x63,
    "AudioVolumeDown": 0x2E,
    "AudioVolumeMute": 0x20,
    "AudioVolumeUp": 0x30,
    "VolumeDown": 0x2E,
    "VolumeMute": 0x20,
    "VolumeUp": 0x30,
    "Again": 0x05,
    "Copy": 0x78,
    "Cut": 0x3C,
    "Find": 0x41,
    "Props": 0x06,
    "Undo": 0x07,
}
PHYSICAL_KEYS: Final[Mapping[str, bytes]] = {
    **{name: bytes([code]) for name, code in _PLAIN.items()},
    **{name: bytes([0xE0, code]) for name, code in _PREFIXED.items()},
}
"""The scancode of each key, by its code in browsers. The names that older browsers use are among them."""


def physical_key(code: str) -> bytes:
    """Return the scancode of a physical key, 1 or 2 bytes.

    Args:
        code: as browsers report it in ``KeyboardEvent.code``: ``KeyA``, ``ControlLeft``, ``NumpadEnter``. It names the
            place of the key, whatever the layout.

    Raises:
        UsageError: a PC keyboard has no such key (``BAD_KEY``).
    """
    scancode = PHYSICAL_KEYS.get(code)
    if scancode is None:
        raise UsageError(
            f"{shown(code)} is not a key of a PC keyboard",
            reason=Reason.BAD_KEY,
            remedy="name it as browsers do in KeyboardEvent.code: KeyA, ControlLeft, NumpadEnter",
        )
    return scancode
