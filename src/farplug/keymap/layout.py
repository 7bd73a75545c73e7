"""Keyboard layouts: which keys type a text.

The package has tables of many layouts, made from xkb-data by ``scripts/layouts.py``; others are those of this machine
(:mod:`farplug.keymap.xkb`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.keymap.keys import Key
from farplug.keymap.table import ALTGR, Table, read_table
from farplug.text import shown

DEFAULT: Final = "us"
MAX_TEXT: Final = 1 << 20
"""Characters of a text that is typed: more than an hour."""
MAX_MARKS: Final = 30
"""Combining characters that are composed with the one before them: further ones are characters of their own.

NFC sorts them, which takes a time that grows with the square of their number: minutes for 1 Mi. No text of a language
has more (Unicode Standard Annex #15, Stream-Safe Text Format).
"""
MAX_MISSING: Final = 1000
"""Characters that a layout lacks and that :meth:`Layout.missing` returns of one text."""

_FIRST_MARK: Final = "\u0300"
"""The first combining character. Each one before it is in the form NFC."""
_FOLDER: Final = "layouts"
_NAME: Final = re.compile("[a-z0-9_]{1,32}(-[A-Za-z0-9_-]{1,32})?", re.ASCII)

_COMBINING: Final = {
    "dead_grave": "\u0300",
    "dead_acute": "\u0301",
    "dead_circumflex": "\u0302",
    "dead_tilde": "\u0303",
    "dead_macron": "\u0304",
    "dead_breve": "\u0306",
    "dead_abovedot": "\u0307",
    "dead_diaeresis": "\u0308",
    "dead_hook": "\u0309",
    "dead_abovering": "\u030a",
    "dead_doubleacute": "\u030b",
    "dead_caron": "\u030c",
    "dead_horn": "\u031b",
    "dead_belowdot": "\u0323",
    "dead_cedilla": "\u0327",
    "dead_ogonek": "\u0328",
}
_SPACING: Final = {"dead_grave": "`", "dead_circumflex": "^", "dead_tilde": "~"}
"""What dead keys type before a space in every system."""


@dataclass(frozen=True, slots=True)
class Stroke:
    """A key that is pressed with modifiers, and released.

    Attributes:
        key: its usage.
        modifiers: :data:`~farplug.keymap.table.SHIFT`, :data:`~farplug.keymap.table.ALTGR`, both or none.
    """

    key: int
    modifiers: int = 0


_NOT_EVERYWHERE: Final = frozenset({Key.NON_US_BACKSLASH, Key.INTERNATIONAL_1, Key.INTERNATIONAL_3})
_EVERYWHERE: Final = {"\n": Stroke(Key.ENTER), "\t": Stroke(Key.TAB), " ": Stroke(Key.SPACE)}


@dataclass(frozen=True, slots=True)
class Missing:
    """A character of a text that a layout lacks.

    Attributes:
        index: of the character in the text, from 0.
        character: the character, in Unicode's form NFC.
        layouts: the names of the packaged layouts that have it.
    """

    index: int
    character: str
    layouts: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A keyboard layout.

    Attributes:
        name: ``de``, or with a variant ``us-intl``.
        description: for people; the name if it has none.
        strokes: for each character the strokes that type it: one, or a dead key and another one.
    """

    name: str
    description: str
    strokes: Mapping[str, Sequence[Stroke]]

    def missing(self, text: str) -> list[Missing]:
        """Return the characters of a text that the layout lacks, at most :data:`MAX_MISSING`."""
        found: list[Missing] = []
        for index, character in characters(text):
            if character not in self.strokes:
                found.append(Missing(index, character, layouts_with(character)))
                if len(found) == MAX_MISSING:
                    break
        return found

    def type(self, text: str) -> list[Sequence[Stroke]]:
        """Return the strokes of each character of a text.

        Raises:
            UsageError: the text is too long (``BAD_SETTING``), or the layout lacks a character (``BAD_KEY``), which the
                message names, with its place.
        """
        check_length(text)
        strokes = []
        for index, character in characters(text):
            found = self.strokes.get(character)
            if found is None:
                raise self._lacks(text, index, character)
            strokes.append(found)
        return strokes

    def _lacks(self, text: str, index: int, character: str) -> UsageError:
        line, column = text.count("\n", 0, index) + 1, index - (text.rfind("\n", 0, index) + 1) + 1
        where = f"character {index + 1} of the text" if line == 1 else f"line {line}, character {column}"
        names = layouts_with(character)
        if names:
            listed = ", ".join(names[:12]) + (" and others" if len(names) > 12 else "")
            remedy = f"layouts that have it: {listed}; the VM must use the same layout"
        elif unicodedata.category(character[0]) in ("Cc", "Cs"):
            remedy = "leave control characters out; press keys such as Escape and BackSpace by their names"
        else:
            remedy = "leave it out: no layout that farplug has can type it"
        return UsageError(
            f"the keyboard layout {self.name} has no key for {shown(character)} ({_code(character)}, {where})",
            reason=Reason.BAD_KEY,
            remedy=remedy,
        )


def check_length(text: str) -> None:
    """Check that a text is not too long to be typed.

    Raises:
        UsageError: it is (``BAD_SETTING``).
    """
    if len(text) > MAX_TEXT:
        raise UsageError(
            f"a text of {len(text)} characters: at most {MAX_TEXT} are typed",
            reason=Reason.BAD_SETTING,
            remedy="plug the text in as a file instead: on a disk, or in a folder",
        )


def characters(text: str) -> Iterator[tuple[int, str]]:
    r"""Yield the characters of a text that are typed, in Unicode's form NFC, each with its index in the text.

    ``\r\n`` and ``\r`` are newlines.
    """
    index = 0
    while index < len(text):
        end = index + 1
        if text[index] == "\r":
            end += text[end : end + 1] == "\n"
            yield index, "\n"
        else:
            while end < len(text) and text[end] >= _FIRST_MARK and unicodedata.combining(text[end]):
                end += 1
                if end - index > MAX_MARKS:
                    break
            if end == index + 1 and text[index] < _FIRST_MARK:
                yield index, text[index]
            else:
                for character in unicodedata.normalize("NFC", text[index:end]):
                    yield index, character
        index = end


def packaged_layouts() -> Mapping[str, str]:
    """Return the descriptions of the layouts in the package, by their names, in the order of the names."""
    return MappingProxyType({name: _packaged(name).description for name in _names()})


def layouts_with(character: str) -> tuple[str, ...]:
    """Return the names of the packaged layouts that have a character; first those where it is the easiest to type."""
    having = [layout for layout in map(_packaged, _names()) if character in layout.strokes]

    def effort(layout: Layout) -> tuple[int, int]:
        strokes = layout.strokes[character]
        return len(strokes), max(stroke.modifiers for stroke in strokes)

    return tuple(layout.name for layout in sorted(having, key=effort))


def find_layout(name: str) -> Layout:
    """Return a layout by its name: one of the package, or of this machine.

    Args:
        name: of the layout as XKB names it, in any case, and after a hyphen of its variant: ``de``, ``us-intl``.

    Raises:
        UsageError: there is no such layout (``NOT_FOUND``).
    """
    wanted = name.lower()
    if wanted in _names():
        return _packaged(wanted)
    layout = _of_machine(name) if _NAME.fullmatch(name) else None
    if layout is None:
        raise UsageError(
            f"{shown(name)} is not a keyboard layout",
            reason=Reason.NOT_FOUND,
            remedy=f"layouts: {', '.join(_names())}; others are those of XKB on this machine, through libxkbcommon",
        )
    return layout


@cache
def _names() -> tuple[str, ...]:
    folder = resources.files("farplug.keymap") / _FOLDER
    return tuple(sorted(file.name[:-4] for file in folder.iterdir() if file.name.endswith(".txt")))


@cache
def _packaged(name: str) -> Layout:
    file = resources.files("farplug.keymap") / _FOLDER / f"{name}.txt"
    description, table = read_table(file.read_text("utf-8").splitlines())
    return Layout(name, description, _strokes(table))


_machine: dict[str, Layout | None] = {}
_MAX_MACHINE: Final = 64


def _of_machine(name: str) -> Layout | None:
    """Return a layout of this machine; the answer is kept."""
    if name not in _machine:
        from farplug.keymap.xkb import read_layout

        layout, _, variant = name.partition("-")
        table = read_layout(layout, variant)
        if len(_machine) >= _MAX_MACHINE:
            _machine.clear()
        _machine[name] = None if not table else Layout(name, name, _strokes(table))
    return _machine[name]


def _strokes(table: Table) -> Mapping[str, Sequence[Stroke]]:
    """Return the strokes of all characters: those that most systems know, dead keys only where they are needed."""
    strokes: dict[str, Sequence[Stroke]] = {character: (stroke,) for character, stroke in _EVERYWHERE.items()}
    dead: dict[str, Stroke] = {}
    for usage, modifiers in sorted(table, key=_cost):
        text = table[usage, modifiers]
        if len(text) == 1:
            strokes.setdefault(text, (Stroke(usage, modifiers),))
        else:
            dead.setdefault(text, Stroke(usage, modifiers))
    direct = {character: found[0] for character, found in strokes.items() if character not in _EVERYWHERE}
    for name, stroke in dead.items():
        if name in _SPACING:
            strokes.setdefault(_SPACING[name], (stroke, Stroke(Key.SPACE)))
        if name in _COMBINING:
            for base, second in direct.items():
                composed = unicodedata.normalize("NFC", base + _COMBINING[name])
                if len(composed) == 1 and base.isalpha():
                    strokes.setdefault(composed, (stroke, second))
    return MappingProxyType(strokes)


def _cost(place: tuple[int, int]) -> tuple[int, bool, int, int]:
    """Return how far a key is from what every system and every keyboard has: AltGr, then keys that some lack."""
    usage, modifiers = place
    return modifiers & ALTGR, usage in _NOT_EVERYWHERE, modifiers, usage


def _code(character: str) -> str:
    return f"U+{ord(character[0]):04X}"
