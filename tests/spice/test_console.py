"""Text that is read from pictures of consoles."""

from __future__ import annotations

import gzip
import random
import struct
from pathlib import Path

import pytest
from tests.spice.console_pictures import console_picture

from farplug.app.console_fonts import VGA_FOLDERS, load_glyphs
from farplug.spice.console import UNKNOWN, psf_glyphs, read_console, vga_glyphs

VGA = load_glyphs(VGA_FOLDERS, ())
"""The font of the VGA BIOS that the Debian package seabios has."""
LINES = ("login: root", "  $ ls -l | grep '[a-z]{3}' > \"~/x\" && echo @%^`\\", "", "┌─║╬░é", "qgy_,;")


def font(height: int = 14) -> dict[bytes, str]:
    """Return a font with a random glyph for each ASCII character."""
    rng = random.Random(3)
    return {rng.randbytes(height): chr(code) for code in range(33, 127)}


def psf(version: int, glyphs: dict[bytes, str], *, table: bool = True, width: int = 8) -> bytes:
    """Return a PC Screen Font of 256 glyphs, whose table also has a second character and a sequence for each."""
    height = len(next(iter(glyphs)))
    padded = [*glyphs.items(), *[(bytes(height), "")] * (256 - len(glyphs))]
    body = b"".join(glyph for glyph, _ in padded)
    if version == 1:
        names = b"".join(f"\u0416{name}\ufffea\u0301".encode("utf-16-le") + b"\xff\xff" for _, name in padded)
        return bytes((0x36, 4, 2 if table else 0, height)) + body + (names if table else b"")
    names = b"".join(f"\u0416{name}".encode() + b"\xfea\xcc\x81\xff" for _, name in padded)
    header = struct.pack("<8I", 0x864AB572, 0, 32, int(table), 256, height, height, width)
    return header + body + (names if table else b"")


def test_the_font_of_the_vga_bios() -> None:
    assert {VGA[glyph] for glyph in VGA} >= {chr(code) for code in range(33, 127)} | set("é█─│░")
    assert {len(glyph) for glyph in VGA} == {16}
    assert vga_glyphs(b"") == vga_glyphs(bytes(40_000)) == {}
    letter = next(glyph for glyph, name in VGA.items() if name == "A")
    assert vga_glyphs(letter) == vga_glyphs(b"\xff" * 5000 + letter + b"\xff" * 5000) == {}


@pytest.mark.parametrize("colours", [(0xAAAAAA, 0), (0, 0xFFFFFF), (0x55FF55, 0x0000AA)])
@pytest.mark.parametrize("cell", [8, 9])
def test_each_character_is_read(colours: tuple[int, int], cell: int) -> None:
    picture = console_picture(LINES, VGA, cell=cell, text=colours[0], ground=colours[1])
    text = read_console(*picture, VGA)
    assert text is not None
    assert (text.lines, text.columns, text.unknown) == (LINES, 80, 0)
    assert str(text) == "\n".join(LINES)


def test_fonts_of_other_heights() -> None:
    glyphs = {**VGA, **font(14)}
    lines = ("The quick brown fox", "jumps over", "the lazy dog")
    text = read_console(*console_picture(lines, font(14)), glyphs)
    assert text is not None
    assert text.lines == lines


@pytest.mark.parametrize("rows", [(14, 15), (13, 14), (15,), (13, 14, 15)])
def test_a_cursor(rows: tuple[int, ...]) -> None:
    lines = ("$ ls", "abg")
    pixels, width, height = console_picture(lines, VGA)
    for column, line in ((4, 0), (0, 1), (70, 1)):  # behind the text, on a character, alone
        for row in rows:
            at = 4 * ((16 * line + row) * width + 8 * column)
            pixels[at : at + 32] = b"\xaa\xaa\xaa\0" * 8
    text = read_console(pixels, width, height, VGA)
    assert text is not None
    assert text.lines == lines


def test_a_cursor_that_is_a_glyph_too() -> None:
    glyphs = {**VGA, bytes(14) + b"\xff\xff": "⎽"}
    text = read_console(*console_picture(("$ ⎽",), glyphs), glyphs)
    assert text is not None
    assert text.lines == ("$",)


def test_cells_with_something_else() -> None:
    pixels, width, height = console_picture(("boot: linux", "a" * 40), VGA)
    pixels[4 * 8 : 4 * 8 + 12] = bytes(range(12))
    text = read_console(pixels, width, height, VGA)
    assert text is not None
    assert text.lines == (f"b{UNKNOWN}ot: linux", "a" * 40)
    assert text.unknown == 1


def test_what_is_not_a_console() -> None:
    assert read_console(random.Random(1).randbytes(4 * 640 * 480), 640, 480, VGA) is None
    assert read_console(bytes(4 * 640 * 480), 640, 480, VGA) is None, "an empty screen"
    assert read_console(b"", 0, 0, VGA) is None
    assert read_console(bytes(4 * 7 * 5), 7, 5, VGA) is None
    assert read_console(*console_picture(LINES, VGA), {}) is None
    pixels, width, height = console_picture(("x" * 80,) * 10, VGA)
    shifted = bytes(12) + bytes(pixels[:-12])
    assert read_console(shifted, width, height, VGA) is None, "the cells are elsewhere"


@pytest.mark.parametrize("version", [1, 2])
def test_psf_fonts(version: int) -> None:
    glyphs = font()
    assert psf_glyphs(psf(version, glyphs)) == glyphs, "ASCII comes before other characters of a glyph"
    whole = psf(version, glyphs)
    for end in range(0, len(whole), 97):
        try:
            part = psf_glyphs(whole[:end])
        except ValueError:
            continue
        assert part.items() <= glyphs.items() | {(glyph, "Ж") for glyph in part}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x36\x04",
        b"\x36\x04\0\x10" + bytes(5000),
        b"\x72\xb5\x4a\x86",
        psf(2, font(), table=False),
        psf(2, font(), width=12),
        struct.pack("<8I", 0x864AB572, 0, 32, 1, 0xFFFFFFFF, 16, 16, 8) + bytes(5000),
        struct.pack("<8I", 0x864AB572, 0, 0xFFFFFFFF, 1, 256, 16, 16, 8) + bytes(5000),
        b"PNG" * 100,
    ],
)
def test_what_is_not_a_psf_font(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"its|it is not"):
        psf_glyphs(data)


def test_fonts_in_folders(tmp_path: Path) -> None:
    fonts, bios = tmp_path / "fonts", tmp_path / "bios"
    for folder in (fonts, bios):
        folder.mkdir()
    (fonts / "Lat15-Fixed14.psf.gz").write_bytes(gzip.compress(psf(2, font())))
    (fonts / "Lat15-VGA14.psf.gz").write_bytes(b"no gzip")
    (fonts / "Lat2-VGA14.psf").write_bytes(b"no font")
    (fonts / "readme").write_bytes(psf(1, font(12)))
    (bios / "vgabios-a.bin").write_bytes(bytes(100))
    assert load_glyphs((), ()) == {}
    assert load_glyphs((str(tmp_path / "none"), str(bios)), (str(fonts),)) == font()
