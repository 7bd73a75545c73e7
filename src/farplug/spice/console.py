"""Text of a text console, read exactly from its picture: each cell is compared with the glyphs of a font.

Sources: the VGA BIOS, whose font has 256 glyphs of 8x16 pixels in the order of code page 437; and PC Screen Font files,
version 1 and 2 (https://www.win.tue.nl/~aeb/linux/kbd/font-formats-1.html).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

Glyph: TypeAlias = bytes
"""A byte for each row, the top one first; the highest bit is the left pixel."""

WIDTH: Final = 8
"""Pixels of a glyph."""
HEIGHTS: Final = range(8, 33)
"""Pixels of a glyph, from top to bottom."""
MAX_GLYPHS: Final = 512
MAX_SIZE: Final = 1 << 20
"""Glyphs of a font, and bytes of the file."""
UNKNOWN: Final = "\N{REPLACEMENT CHARACTER}"
"""Stands for a cell with something that is not a glyph."""
KNOWN_PART: Final = 0.9
"""Of the cells that are not empty: with fewer known ones the picture is not a text console."""
MAX_UNKNOWN: Final = 100
"""Cells without a glyph, after which the rest of a picture is not read if they are more than the others."""
USUAL_HEIGHT: Final = 16
"""Pixels of a glyph; other heights are tried later, the nearest one first."""
CURSOR_ROWS: Final = 3
"""Rows at the bottom of a cell in which a console draws its cursor, or a part of them."""

_LETTER_A: Final = bytes.fromhex("000010386cc6c6fec6c6c6c600000000")
_GRAPHIC: Final = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
_PSF1, _PSF2 = b"\x36\x04", b"\x72\xb5\x4a\x86"


def vga_glyphs(image: bytes) -> dict[Glyph, str]:
    """Return the glyphs of the font in the image of a VGA BIOS; none if it has no such font."""
    start = image.find(_LETTER_A) - 16 * ord("A")
    font = image[start : start + 16 * 256] if start >= 0 else b""
    if len(font) < 16 * 256 or any(font[16 * 32 : 16 * 33]):
        return {}
    names = [*_GRAPHIC, *(bytes((code,)).decode("cp437") for code in range(32, 256))]
    names[127] = "⌂"
    return _by_glyph((font[16 * code : 16 * code + 16], name) for code, name in enumerate(names))


def psf_glyphs(data: bytes) -> dict[Glyph, str]:
    """Return the glyphs of a PC Screen Font, as far as a table names their characters.

    Raises:
        ValueError: it is not such a font, or its glyphs are not 8 pixels wide.
    """
    try:
        if data[:2] == _PSF1:
            mode, height = data[2], data[3]
            count, start, size, width, has_table = 512 if mode & 1 else 256, 4, height, 8, bool(mode & 6)
        elif data[:4] == _PSF2:
            _, start, flags, count, size, height, width = struct.unpack_from("<7I", data, 4)
            has_table = bool(flags & 1)
        else:
            raise ValueError("it is not a PC Screen Font")
    except (IndexError, struct.error):
        raise ValueError("its header is not complete") from None
    if width != WIDTH or height not in HEIGHTS or size != height or not 0 < count <= MAX_GLYPHS or not has_table:
        raise ValueError(
            "it has no table of characters, or its glyphs have another size than 8 pixels and 8 to 32 rows"
        )
    end = start + count * size
    if end > len(data):
        raise ValueError("its glyphs are not complete")
    names = _psf1_names(data[end:]) if data[:2] == _PSF1 else _psf2_names(data[end:])
    glyphs = (data[at : at + size] for at in range(start, end, size))
    return _by_glyph((glyph, name) for glyph, name in zip(glyphs, names, strict=False) if name)


def _psf1_names(table: bytes) -> list[str]:
    """Return a character for each glyph: UCS-2, 0xFFFE begins sequences, 0xFFFF ends a glyph."""
    names, own = [], ""
    for (code,) in struct.iter_unpack("<H", table[: len(table) & ~1]):
        if code == 0xFFFF:
            names.append(own.partition("\ufffe")[0])
            own = ""
        else:
            own += chr(code)
    return [best_character(name) for name in names]


def _psf2_names(table: bytes) -> list[str]:
    """Return a character for each glyph: UTF-8, 0xFE begins sequences, 0xFF ends a glyph."""
    return [best_character(one.partition(b"\xfe")[0].decode("utf-8", "ignore")) for one in table.split(b"\xff")]


def best_character(characters: str) -> str:
    """Return the character that stands for a glyph which several have."""
    return min(characters, key=lambda one: (not " " <= one <= "~", ord(one)), default="")


def _by_glyph(pairs: Iterable[tuple[Glyph, str]]) -> dict[Glyph, str]:
    found: dict[Glyph, str] = {}
    for glyph, name in pairs:
        if any(glyph):
            found[glyph] = best_character(name + found.get(glyph, ""))
    return found


@dataclass(frozen=True, slots=True)
class ConsoleText:
    """What a text console shows.

    Attributes:
        lines: from the top; without spaces at their ends.
        columns: characters of a line.
        unknown: cells with something that is not a glyph; they are :data:`UNKNOWN` in the lines.
    """

    lines: tuple[str, ...]
    columns: int
    unknown: int

    def __str__(self) -> str:
        return "\n".join(self.lines).rstrip("\n")


def read_console(pixels: bytes | bytearray, width: int, height: int, glyphs: Mapping[Glyph, str]) -> ConsoleText | None:
    """Return the text of a console.

    Args:
        pixels: 4 bytes each: blue, green, red, and one that has no meaning.
        width: of the picture.
        height: of the picture.
        glyphs: the characters by their glyphs, of fonts of any height.

    Returns:
        the text; None: the picture is not that of a text console in one of these fonts, or is empty.
    """
    heights = {len(glyph) for glyph in glyphs}
    for rows in sorted(heights, key=lambda rows: abs(rows - USUAL_HEIGHT)):
        for columns in (WIDTH, WIDTH + 1) if width == 720 else (WIDTH,):  # VGA has a column between the glyphs
            text = _read(pixels, width, height, columns, rows, glyphs)
            if text is not None:
                return text
    return None


def _read(
    pixels: bytes | bytearray, width: int, height: int, columns: int, rows: int, glyphs: Mapping[Glyph, str]
) -> ConsoleText | None:
    """Return the text, for cells of a size; None: too few cells have glyphs."""
    cells: dict[bytes, str] = {}
    lines: list[str] = []
    known = unknown = 0
    stride, length = 4 * width, 4 * columns
    for top in range(0, height - rows + 1, rows):
        starts = [stride * row for row in range(top, top + rows)]
        line: list[str] = []
        for left in range(0, 4 * (width - width % columns), length):
            key = b"".join([pixels[start + left : start + left + length] for start in starts])
            character = cells.get(key)
            if character is None:
                character = cells[key] = _character(key, columns, glyphs)
            line.append(character)
        text = "".join(line)
        unknown += text.count(UNKNOWN)
        known += len(text) - text.count(UNKNOWN) - text.count(" ")
        lines.append(text.rstrip())
        if unknown > MAX_UNKNOWN and unknown > known:
            return None
    if known == 0 or known < KNOWN_PART * (known + unknown):
        return None
    return ConsoleText(tuple(lines), width // columns, unknown)


def _character(cell: bytes, columns: int, glyphs: Mapping[Glyph, str]) -> str:
    """Return the character in a cell: two colours, either of which may be the text's. With one it is a space."""
    colours = [pixel & 0xFFFFFF for (pixel,) in struct.iter_unpack("<I", cell)]
    counts = Counter(colours)
    if len(counts) == 1:
        return " "
    if len(counts) > 2:
        return UNKNOWN
    for ground in [colour for colour, _ in counts.most_common()]:
        bits = [colour != ground for colour in colours]
        glyph = bytes(
            sum(bit << (WIDTH - 1 - at) for at, bit in enumerate(bits[start : start + WIDTH]))
            for start in range(0, len(bits), columns)
        )
        if (character := glyphs.get(glyph) or _under_cursor(glyph, glyphs)) is not None:
            is_cursor = character > "~" and not any(glyph[:-CURSOR_ROWS])
            return " " if is_cursor else character
    return UNKNOWN


def _under_cursor(glyph: Glyph, glyphs: Mapping[Glyph, str]) -> str | None:
    """Return the character above a cursor, which fills rows at the bottom; None: there is none."""
    rows = len(glyph)
    full = [row for row in range(rows - CURSOR_ROWS, rows) if glyph[row] == 0xFF]
    if not full:
        return None
    without = bytes(0 if row in full else bits for row, bits in enumerate(glyph))
    if not any(without):
        return " "
    found = [
        name
        for other, name in glyphs.items()
        if len(other) == rows and all(bits == without[row] for row, bits in enumerate(other) if row not in full)
    ]
    return best_character("".join(found)) or None
