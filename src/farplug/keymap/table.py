"""The table of a layout: for each key what it types without and with Shift, AltGr and both. Text in, text out.

A file has a description in its first line, after ``#``, then a line for each key::

    04<TAB>a<TAB>A<TAB>æ<TAB>Æ

The usage of the key in hexadecimal, then what it types without a modifier, with Shift, with AltGr, with both: a
character, ``U+00A0`` for one that cannot be seen, ``dead_acute`` for a dead key, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

SHIFT: Final = 0x02
ALTGR: Final = 0x40
"""The right Alt key."""
MODIFIERS: Final = (0, SHIFT, ALTGR, SHIFT | ALTGR)
"""The modifiers of each column, as in the first byte of a keyboard's report."""

Table: TypeAlias = Mapping[tuple[int, int], str]
"""What a key types, by its usage and modifiers: a character, or the name of a dead key."""

_HIDDEN: Final = re.compile("U\\+([0-9A-F]{4,6})", re.ASCII)


def write_table(description: str, table: Table) -> str:
    """Return the text of a table."""
    lines = [f"# {description}"]
    for usage in sorted({usage for usage, _ in table}):
        cells = [_cell(table.get((usage, modifiers), "")) for modifiers in MODIFIERS]
        lines.append("\t".join((f"{usage:02x}", *cells)).rstrip("\t"))
    return "\n".join(lines) + "\n"


def read_table(lines: Iterable[str]) -> tuple[str, Table]:
    """Return the description, and the table."""
    description, table = "", {}
    for line in lines:
        if line.startswith("# "):
            description = line[2:].strip()
            continue
        usage, *cells = line.rstrip("\n").split("\t")
        for modifiers, cell in zip(MODIFIERS, cells, strict=False):
            if cell:
                match = _HIDDEN.fullmatch(cell)
                table[int(usage, 16), modifiers] = cell if match is None else chr(int(match[1], 16))
    return description, table


def _cell(text: str) -> str:
    return f"U+{ord(text):04X}" if len(text) == 1 and (not text.isprintable() or text.isspace()) else text
