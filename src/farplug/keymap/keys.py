"""Keys, and their names.

Sources: HID Usage Tables 1.5, chapter 10 (Keyboard/Keypad page); the names of X11's ``keysymdef.h``, without ``XK_``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.text import shown

MAX_CHORD: Final = 6
"""The most keys that are pressed together, modifiers among them."""


class Key(IntEnum):
    """Usages of the Keyboard/Keypad page, named after the legends of a US keyboard."""

    A = 0x04
    B = 0x05
    C = 0x06
    D = 0x07
    E = 0x08
    F = 0x09
    G = 0x0A
    H = 0x0B
    I = 0x0C  # noqa: E741
    J = 0x0D
    K = 0x0E
    L = 0x0F
    M = 0x10
    N = 0x11
    O = 0x12  # noqa: E741
    P = 0x13
    Q = 0x14
    R = 0x15
    S = 0x16
    T = 0x17
    U = 0x18
    V = 0x19
    W = 0x1A
    X = 0x1B
    Y = 0x1C
    Z = 0x1D
    DIGIT_1 = 0x1E
    DIGIT_2 = 0x1F
    DIGIT_3 = 0x20
    DIGIT_4 = 0x21
    DIGIT_5 = 0x22
    DIGIT_6 = 0x23
    DIGIT_7 = 0x24
    DIGIT_8 = 0x25
    DIGIT_9 = 0x26
    DIGIT_0 = 0x27
    ENTER = 0x28
    ESCAPE = 0x29
    BACKSPACE = 0x2A
    TAB = 0x2B
    SPACE = 0x2C
    MINUS = 0x2D
    EQUAL = 0x2E
    LEFT_BRACKET = 0x2F
    RIGHT_BRACKET = 0x30
    BACKSLASH = 0x31
    NON_US_HASH = 0x32
    SEMICOLON = 0x33
    APOSTROPHE = 0x34
    GRAVE = 0x35
    COMMA = 0x36
    PERIOD = 0x37
    SLASH = 0x38
    CAPS_LOCK = 0x39
    F1 = 0x3A
    F2 = 0x3B
    F3 = 0x3C
    F4 = 0x3D
    F5 = 0x3E
    F6 = 0x3F
    F7 = 0x40
    F8 = 0x41
    F9 = 0x42
    F10 = 0x43
    F11 = 0x44
    F12 = 0x45
    PRINT_SCREEN = 0x46
    SCROLL_LOCK = 0x47
    PAUSE = 0x48
    INSERT = 0x49
    HOME = 0x4A
    PAGE_UP = 0x4B
    DELETE = 0x4C
    END = 0x4D
    PAGE_DOWN = 0x4E
    RIGHT = 0x4F
    LEFT = 0x50
    DOWN = 0x51
    UP = 0x52
    NUM_LOCK = 0x53
    KEYPAD_DIVIDE = 0x54
    KEYPAD_MULTIPLY = 0x55
    KEYPAD_SUBTRACT = 0x56
    KEYPAD_ADD = 0x57
    KEYPAD_ENTER = 0x58
    KEYPAD_1 = 0x59
    KEYPAD_2 = 0x5A
    KEYPAD_3 = 0x5B
    KEYPAD_4 = 0x5C
    KEYPAD_5 = 0x5D
    KEYPAD_6 = 0x5E
    KEYPAD_7 = 0x5F
    KEYPAD_8 = 0x60
    KEYPAD_9 = 0x61
    KEYPAD_0 = 0x62
    KEYPAD_DECIMAL = 0x63
    NON_US_BACKSLASH = 0x64
    MENU = 0x65
    POWER = 0x66
    KEYPAD_EQUAL = 0x67
    F13 = 0x68
    F14 = 0x69
    F15 = 0x6A
    F16 = 0x6B
    F17 = 0x6C
    F18 = 0x6D
    F19 = 0x6E
    F20 = 0x6F
    F21 = 0x70
    F22 = 0x71
    F23 = 0x72
    F24 = 0x73
    EXECUTE = 0x74
    HELP = 0x75
    PROPS = 0x76
    SELECT = 0x77
    STOP = 0x78
    AGAIN = 0x79
    UNDO = 0x7A
    CUT = 0x7B
    COPY = 0x7C
    PASTE = 0x7D
    FIND = 0x7E
    MUTE = 0x7F
    VOLUME_UP = 0x80
    VOLUME_DOWN = 0x81
    LOCKING_CAPS_LOCK = 0x82
    LOCKING_NUM_LOCK = 0x83
    LOCKING_SCROLL_LOCK = 0x84
    KEYPAD_COMMA = 0x85
    KEYPAD_EQUAL_AS400 = 0x86
    INTERNATIONAL_1 = 0x87
    INTERNATIONAL_2 = 0x88
    INTERNATIONAL_3 = 0x89
    INTERNATIONAL_4 = 0x8A
    INTERNATIONAL_5 = 0x8B
    INTERNATIONAL_6 = 0x8C
    INTERNATIONAL_7 = 0x8D
    INTERNATIONAL_8 = 0x8E
    INTERNATIONAL_9 = 0x8F
    LANG_1 = 0x90
    LANG_2 = 0x91
    LANG_3 = 0x92
    LANG_4 = 0x93
    LANG_5 = 0x94
    LANG_6 = 0x95
    LANG_7 = 0x96
    LANG_8 = 0x97
    LANG_9 = 0x98
    ALTERNATE_ERASE = 0x99
    ATTENTION = 0x9A
    CANCEL = 0x9B
    CLEAR = 0x9C
    KEYBOARD_PRIOR = 0x9D
    KEYBOARD_RETURN = 0x9E
    SEPARATOR = 0x9F
    OUT = 0xA0
    OPER = 0xA1
    CLEAR_AGAIN = 0xA2
    CRSEL = 0xA3
    EXSEL = 0xA4
    KEYPAD_00 = 0xB0
    KEYPAD_000 = 0xB1
    THOUSANDS_SEPARATOR = 0xB2
    DECIMAL_SEPARATOR = 0xB3
    CURRENCY_UNIT = 0xB4
    CURRENCY_SUBUNIT = 0xB5
    KEYPAD_LEFT_PARENTHESIS = 0xB6
    KEYPAD_RIGHT_PARENTHESIS = 0xB7
    KEYPAD_LEFT_BRACE = 0xB8
    KEYPAD_RIGHT_BRACE = 0xB9
    KEYPAD_TAB = 0xBA
    KEYPAD_BACKSPACE = 0xBB
    KEYPAD_A = 0xBC
    KEYPAD_B = 0xBD
    KEYPAD_C = 0xBE
    KEYPAD_D = 0xBF
    KEYPAD_E = 0xC0
    KEYPAD_F = 0xC1
    KEYPAD_XOR = 0xC2
    KEYPAD_CARET = 0xC3
    KEYPAD_PERCENT = 0xC4
    KEYPAD_LESS = 0xC5
    KEYPAD_GREATER = 0xC6
    KEYPAD_AMPERSAND = 0xC7
    KEYPAD_DOUBLE_AMPERSAND = 0xC8
    KEYPAD_BAR = 0xC9
    KEYPAD_DOUBLE_BAR = 0xCA
    KEYPAD_COLON = 0xCB
    KEYPAD_HASH = 0xCC
    KEYPAD_SPACE = 0xCD
    KEYPAD_AT = 0xCE
    KEYPAD_EXCLAMATION = 0xCF
    KEYPAD_MEMORY_STORE = 0xD0
    KEYPAD_MEMORY_RECALL = 0xD1
    KEYPAD_MEMORY_CLEAR = 0xD2
    KEYPAD_MEMORY_ADD = 0xD3
    KEYPAD_MEMORY_SUBTRACT = 0xD4
    KEYPAD_MEMORY_MULTIPLY = 0xD5
    KEYPAD_MEMORY_DIVIDE = 0xD6
    KEYPAD_SIGN = 0xD7
    KEYPAD_CLEAR = 0xD8
    KEYPAD_CLEAR_ENTRY = 0xD9
    KEYPAD_BINARY = 0xDA
    KEYPAD_OCTAL = 0xDB
    KEYPAD_DECIMAL_BASE = 0xDC
    KEYPAD_HEXADECIMAL = 0xDD
    LEFT_CTRL = 0xE0
    LEFT_SHIFT = 0xE1
    LEFT_ALT = 0xE2
    LEFT_META = 0xE3
    RIGHT_CTRL = 0xE4
    RIGHT_SHIFT = 0xE5
    RIGHT_ALT = 0xE6
    RIGHT_META = 0xE7

    @property
    def modifier(self) -> int:
        """Return the bit of a modifier in the first byte of a report; 0 for other keys."""
        return 1 << self - Key.LEFT_CTRL if self >= Key.LEFT_CTRL else 0


_BY_CHARACTER: Final[Mapping[str, Key]] = {
    character: Key(first + number)
    for first, row in (
        (Key.A, "abcdefghijklmnopqrstuvwxyz"),
        (Key.DIGIT_1, "1234567890"),
        (Key.SPACE, " -=[]\\"),
        (Key.SEMICOLON, ";'`,./"),
    )
    for number, character in enumerate(row)
} | {"\n": Key.ENTER, "\t": Key.TAB}
"""The keys of a US keyboard by what is on them."""

_X_NAMES: Final = {
    "return": Key.ENTER,
    "esc": Key.ESCAPE,
    "prior": Key.PAGE_UP,
    "pageup": Key.PAGE_UP,
    "next": Key.PAGE_DOWN,
    "pagedown": Key.PAGE_DOWN,
    "del": Key.DELETE,
    "ins": Key.INSERT,
    "print": Key.PRINT_SCREEN,
    "printscreen": Key.PRINT_SCREEN,
    "sys_req": Key.PRINT_SCREEN,  # the key on which it is printed
    "break": Key.PAUSE,
    "ctrl": Key.LEFT_CTRL,
    "control": Key.LEFT_CTRL,
    "control_l": Key.LEFT_CTRL,
    "control_r": Key.RIGHT_CTRL,
    "shift": Key.LEFT_SHIFT,
    "shift_l": Key.LEFT_SHIFT,
    "shift_r": Key.RIGHT_SHIFT,
    "alt": Key.LEFT_ALT,
    "alt_l": Key.LEFT_ALT,
    "alt_r": Key.RIGHT_ALT,
    "altgr": Key.RIGHT_ALT,
    "iso_level3_shift": Key.RIGHT_ALT,
    "super": Key.LEFT_META,
    "super_l": Key.LEFT_META,
    "super_r": Key.RIGHT_META,
    "win": Key.LEFT_META,
    "windows": Key.LEFT_META,
    "gui": Key.LEFT_META,
    "meta": Key.LEFT_META,
    "cmd": Key.LEFT_META,
    "app": Key.MENU,
    "less": Key.NON_US_BACKSLASH,
    "minus": Key.MINUS,
    "equal": Key.EQUAL,
    "plus": Key.KEYPAD_ADD,
    "bracketleft": Key.LEFT_BRACKET,
    "bracketright": Key.RIGHT_BRACKET,
    "semicolon": Key.SEMICOLON,
    "apostrophe": Key.APOSTROPHE,
    "grave": Key.GRAVE,
    "backslash": Key.BACKSLASH,
    "comma": Key.COMMA,
    "period": Key.PERIOD,
    "slash": Key.SLASH,
    "kp_prior": Key.KEYPAD_9,
    "kp_next": Key.KEYPAD_3,
    "kp_home": Key.KEYPAD_7,
    "kp_end": Key.KEYPAD_1,
    "kp_up": Key.KEYPAD_8,
    "kp_down": Key.KEYPAD_2,
    "kp_left": Key.KEYPAD_4,
    "kp_right": Key.KEYPAD_6,
    "kp_begin": Key.KEYPAD_5,
    "kp_insert": Key.KEYPAD_0,
    "kp_delete": Key.KEYPAD_DECIMAL,
    "hangul": Key.LANG_1,
    "hangul_hanja": Key.LANG_2,
    "henkan": Key.INTERNATIONAL_4,
    "muhenkan": Key.INTERNATIONAL_5,
    "hiragana_katakana": Key.INTERNATIONAL_2,
    "zenkaku_hankaku": Key.LANG_5,
    "xf86audiomute": Key.MUTE,
    "xf86audioraisevolume": Key.VOLUME_UP,
    "xf86audiolowervolume": Key.VOLUME_DOWN,
}
_BY_NAME: Final[Mapping[str, Key]] = (
    {key.name.lower(): key for key in Key}
    | {key.name.lower().replace("keypad", "kp", 1): key for key in Key if key.name.startswith("KEYPAD")}
    | _X_NAMES
)
_USAGES: Final = frozenset(map(int, Key))
_USAGE: Final = re.compile("0x[0-9a-f]{2}", re.ASCII)


def key_named(name: str) -> Key:
    """Return a key by its name.

    Args:
        name: the name of an X keysym in any case (``Delete``, ``F1``, ``Page_Up``), a modifier (``ctrl``, ``alt``,
            ``shift``, ``super``), the name of a member of :class:`Key`, a usage (``0x87``), or the character on a key
            of a US keyboard (``a``).

    Raises:
        UsageError: there is no such key (``BAD_KEY``).
    """
    lower = name.lower()
    key = _BY_CHARACTER.get(lower) if len(name) == 1 else _BY_NAME.get(lower)
    if key is None and _USAGE.fullmatch(lower) and int(lower, 16) in _USAGES:
        key = Key(int(lower, 16))
    if key is None or (len(name) == 1 and not name.isascii()):
        raise UsageError(
            f"{shown(name)} is not a key",
            reason=Reason.BAD_KEY,
            remedy="name it as X does (Return, Delete, F1, Page_Up), or by the character on a US keyboard (a, 1, /)",
        )
    return key


def chord(keys: str, most: int = MAX_CHORD) -> list[Key]:
    """Return keys that are pressed together: ``ctrl+alt+Delete``.

    Args:
        keys: their names with ``+`` between them.
        most: how many they may be.

    Raises:
        UsageError: a key does not exist, or there are none, or too many (``BAD_KEY``).
    """
    names = keys.split("+")
    if len(names) > most:
        raise UsageError(
            f"{shown(keys)}: {len(names)} keys at a time, more than {most}",
            reason=Reason.BAD_KEY,
            remedy="press fewer keys together",
        )
    return [key_named(name) for name in names]
