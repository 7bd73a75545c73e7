"""Keyboard layouts of this machine, through libxkbcommon.

Sources: ``xkbcommon/xkbcommon.h`` of libxkbcommon 1.0; the key codes of Linux for HID usages
(``drivers/hid/hid-input.c``, ``hid_keyboard[]``), to which XKB adds 8.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from functools import cache
from typing import Any, Final

from farplug.keymap.keys import Key
from farplug.keymap.table import ALTGR, SHIFT, Table

LIBRARY: Final = "libxkbcommon.so.0"

_LETTERS: Final = (
    30,
    48,
    46,
    32,
    18,
    33,
    34,
    35,
    23,
    36,
    37,
    38,
    50,
    49,
    24,
    25,
    16,
    19,
    31,
    20,
    22,
    47,
    17,
    45,
    21,
    44,
)
_CODES: Final = (
    {Key.A + number: code for number, code in enumerate(_LETTERS)}
    | {Key.DIGIT_1 + number: 2 + number for number in range(10)}
    | {Key.SPACE: 57, Key.MINUS: 12, Key.EQUAL: 13, Key.LEFT_BRACKET: 26, Key.RIGHT_BRACKET: 27, Key.BACKSLASH: 43}
    | {Key.SEMICOLON: 39, Key.APOSTROPHE: 40, Key.GRAVE: 41, Key.COMMA: 51, Key.PERIOD: 52, Key.SLASH: 53}
    | {Key.NON_US_BACKSLASH: 86, Key.INTERNATIONAL_1: 89, Key.INTERNATIONAL_3: 124}
)
"""The key codes of the keys that type characters. The Enter key, Tab and Backspace are the same in every layout."""

_XKB_OFFSET: Final = 8
_MAX_MASKS: Final = 8
_MODIFIERS: Final = {"Shift": SHIFT, "Mod5": ALTGR}
"""The modifiers that a keyboard has: XKB's names. A level that needs another one cannot be typed."""
_LOG_LEVEL_CRITICAL: Final = 10


class _Names(Structure):
    _fields_ = [(name, c_char_p) for name in ("rules", "model", "layout", "variant", "options")]


def read_layout(layout: str, variant: str = "") -> Table | None:
    """Return the table of a layout of this machine.

    Args:
        layout: its name in XKB: ``de``.
        variant: the name of its variant: ``neo``.

    Returns:
        None if this machine has no libxkbcommon, or no such layout.
    """
    library = _library()
    if library is None:
        return None
    context = library.xkb_context_new(0)
    if not context:
        return None
    library.xkb_context_set_log_level(context, _LOG_LEVEL_CRITICAL)
    try:
        names = _Names(b"evdev", b"pc105", layout.encode(), variant.encode(), b"")
        keymap = library.xkb_keymap_new_from_names(context, byref(names), 0)
        if not keymap:
            return None
        try:
            return _read(library, keymap)
        finally:
            library.xkb_keymap_unref(keymap)
    finally:
        library.xkb_context_unref(context)


def _read(library: Any, keymap: int) -> Table:
    count = library.xkb_keymap_num_mods(keymap)
    modifier_names = [library.xkb_keymap_mod_get_name(keymap, index).decode() for index in range(count)]
    table: dict[tuple[int, int], str] = {}
    for usage, code in _CODES.items():
        key = code + _XKB_OFFSET
        for level in range(library.xkb_keymap_num_levels_for_key(keymap, key, 0)):
            symbols = POINTER(c_uint32)()
            if library.xkb_keymap_key_get_syms_by_level(keymap, key, 0, level, byref(symbols)) != 1:
                continue
            text = _text(library, symbols[0])
            masks = (c_uint32 * _MAX_MASKS)()
            found = library.xkb_keymap_key_get_mods_for_level(keymap, key, 0, level, masks, _MAX_MASKS)
            for mask in masks[:found]:
                pressed = [name for index, name in enumerate(modifier_names) if mask >> index & 1]
                if text and all(name in _MODIFIERS for name in pressed):
                    table.setdefault((int(usage), sum(_MODIFIERS[name] for name in pressed)), text)
    return table


def _text(library: Any, symbol: int) -> str:
    """Return the character of a keysym, or the name of a dead key; empty: neither."""
    code = library.xkb_keysym_to_utf32(symbol)
    if code >= 0x20 and code != 0x7F:
        return chr(code)
    name = ctypes.create_string_buffer(64)
    library.xkb_keysym_get_name(symbol, name, len(name))
    return name.value.decode() if name.value.startswith(b"dead_") else ""


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, result, arguments in (
            ("xkb_context_new", c_void_p, [c_int]),
            ("xkb_context_set_log_level", None, [c_void_p, c_int]),
            ("xkb_context_unref", None, [c_void_p]),
            ("xkb_keymap_new_from_names", c_void_p, [c_void_p, POINTER(_Names), c_int]),
            ("xkb_keymap_unref", None, [c_void_p]),
            ("xkb_keymap_num_mods", c_uint32, [c_void_p]),
            ("xkb_keymap_mod_get_name", c_char_p, [c_void_p, c_uint32]),
            ("xkb_keymap_num_levels_for_key", c_uint32, [c_void_p, c_uint32, c_uint32]),
            (
                "xkb_keymap_key_get_syms_by_level",
                c_int,
                [c_void_p, c_uint32, c_uint32, c_uint32, POINTER(POINTER(c_uint32))],
            ),
            (
                "xkb_keymap_key_get_mods_for_level",
                c_size_t,
                [c_void_p, c_uint32, c_uint32, c_uint32, POINTER(c_uint32), c_size_t],
            ),
            ("xkb_keysym_to_utf32", c_uint32, [c_uint32]),
            ("xkb_keysym_get_name", c_int, [c_uint32, c_char_p, c_size_t]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):  # it is missing, or older than 1.0
        return None
    return library
