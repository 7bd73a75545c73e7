"""Keys, their names, and keyboard layouts: which keys type a character. No I/O but the tables of the package."""

from farplug.keymap.keys import MAX_CHORD, Key, chord, key_named
from farplug.keymap.layout import Layout, Missing, Stroke, find_layout, layouts_with, packaged_layouts

__all__ = [
    "MAX_CHORD",
    "Key",
    "Layout",
    "Missing",
    "Stroke",
    "chord",
    "find_layout",
    "key_named",
    "layouts_with",
    "packaged_layouts",
]
