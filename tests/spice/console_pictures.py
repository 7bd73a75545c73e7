"""Pictures of text consoles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

GREY, BLACK = 0xAAAAAA, 0


def shapes(glyphs: Mapping[bytes, str]) -> dict[str, bytes]:
    """Return the glyphs by their characters; a space is empty."""
    height = len(next(iter(glyphs)))
    return {" ": bytes(height), **{name: glyph for glyph, name in glyphs.items()}}


def runs(lines: Sequence[str], glyphs: Mapping[bytes, str]) -> Iterator[tuple[int, int, int]]:
    """Yield left, row and right of all runs of pixels that are set, in cells of 8 pixels."""
    font = shapes(glyphs)
    for number, line in enumerate(lines):
        for column, name in enumerate(line):
            for row, bits in enumerate(font[name]):
                for at in range(8):
                    if bits >> (7 - at) & 1:
                        left = 8 * column + at
                        yield left, number * len(font[" "]) + row, left + 1


def console_picture(
    lines: Sequence[str],
    glyphs: Mapping[bytes, str],
    *,
    columns: int = 80,
    cell: int = 8,
    text: int = GREY,
    ground: int = BLACK,
) -> tuple[bytearray, int, int]:
    """Return pixels, width and height of a console; the byte without a meaning differs from pixel to pixel."""
    height = len(next(iter(glyphs)))
    width, rows = columns * cell, height * len(lines)
    pixels = bytearray(b"".join((ground | (at % 251) << 24).to_bytes(4, "little") for at in range(width * rows)))
    for left, row, _ in runs(lines, glyphs):
        at = 4 * (row * width + left // 8 * cell + left % 8)
        pixels[at : at + 3] = text.to_bytes(3, "little")
    return pixels, width, rows
