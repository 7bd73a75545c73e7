"""A test picture with a counter, in several sizes and both encodings.

The picture is a grid of blocks of 16x16 pixels, each of one colour:

* The first row has the number of the frame as 16 bits, the highest first: white is 1, black is 0.
* In the middle the number has five decimal digits, white on black.
* In the last row a white block moves one place with each frame.
* The rest are eight vertical bars: white, yellow, cyan, green, magenta, red, blue, black.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Final, TypeAlias

from farplug.usb.types import Buffer
from farplug.virtual.video.frames import FrameSource
from farplug.virtual.video.modes import Encoding, Mode

BLOCK: Final = 16
"""Pixels of a side of a block."""
SIZES: Final = ((640, 480), (320, 240), (1280, 720))
COUNTER_BITS: Final = 16

_WHITE, _BLACK = (235, 128, 128), (16, 128, 128)
_BARS: Final = (
    *(_WHITE, (210, 16, 146), (170, 166, 16), (145, 54, 34)),
    *((106, 202, 222), (81, 90, 240), (41, 240, 110), _BLACK),
)
"""Y, Cb, Cr of the bars (ITU-R BT.601)."""
_GLYPHS: Final = (
    *("75557", "26227", "71747", "71717", "55711"),
    *("74717", "74757", "71111", "75757", "75717"),
)
"""The rows of each digit: 3 bits each."""
_DIGIT_COUNT, _DIGIT_WIDTH, _DIGIT_HEIGHT = 5, 3, 5

Colour: TypeAlias = tuple[int, int, int]
"""Y, Cb, Cr."""


class Pattern(FrameSource):
    """The test picture."""

    def __init__(self) -> None:
        sizes = [(width, height, len(_HEADER) + width * height // 8) for width, height in SIZES]
        self._modes = (
            *(Mode(Encoding.MJPEG, width, height, size) for width, height, size in sizes),
            *(Mode(Encoding.YUY2, width, height) for width, height in SIZES),
        )

    @property
    def modes(self) -> Sequence[Mode]:
        return self._modes

    async def frame(self, mode: Mode, number: int) -> Buffer:
        return picture(mode, number)


def picture(mode: Mode, number: int) -> bytes:
    """Return the picture with a number."""
    grid = _grid(mode.width // BLOCK, mode.height // BLOCK, number)
    return _yuy2(grid) if mode.encoding is Encoding.YUY2 else _jpeg(mode.width, mode.height, grid)


def _grid(columns: int, rows: int, number: int) -> list[list[Colour]]:
    bars = [_BARS[column * len(_BARS) // columns] for column in range(columns)]
    grid = [bars.copy() for _ in range(rows)]
    for bit in range(COUNTER_BITS):
        grid[0][bit] = _WHITE if number >> (COUNTER_BITS - 1 - bit) & 1 else _BLACK
    left = (columns - _DIGIT_COUNT * (_DIGIT_WIDTH + 1) + 1) // 2
    top = (rows - _DIGIT_HEIGHT) // 2
    for place, digit in enumerate(f"{number % 10**_DIGIT_COUNT:0{_DIGIT_COUNT}}"):
        for row, bits in enumerate(_GLYPHS[int(digit)]):
            for column in range(_DIGIT_WIDTH):
                lit = int(bits) >> (_DIGIT_WIDTH - 1 - column) & 1
                grid[top + row][left + place * (_DIGIT_WIDTH + 1) + column] = _WHITE if lit else _BLACK
    grid[-1][number % columns] = _WHITE
    return grid


def _yuy2(grid: Sequence[Sequence[Colour]]) -> bytes:
    return b"".join(b"".join(map(_yuy2_pixels, row)) * BLOCK for row in grid)


@cache
def _yuy2_pixels(colour: Colour) -> bytes:
    y, cb, cr = colour
    return bytes((y, cb, y, cr)) * (BLOCK // 2)


# JPEG: ITU-T T.81. Blocks of one colour have only a DC coefficient, so that each colour is exact ---------------------


def _segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(data) + 2).to_bytes(2, "big") + data


_DC_COUNTS: Final = bytes((0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0))
"""How many codes have 1 bit, 2 bits, and so on (table K.3)."""
_DC_CODES: Final = ("00", "010", "011", "100", "101", "110", "1110", "11110", "111110", "1111110", "11111110")
"""The codes of the categories 0, 1, and so on."""
_END_OF_BLOCK: Final = "0"
"""The only code of the table of AC coefficients."""
_DC_STEP: Final = 8
"""The DC coefficient of a block of one value is 8 times the value less 128."""

_QUANTIZATION: Final = _segment(0xDB, bytes((0, _DC_STEP)) + b"\1" * 63)
_HUFFMAN: Final = _segment(0xC4, b"\x00" + _DC_COUNTS + bytes(range(sum(_DC_COUNTS)))) + _segment(
    0xC4, b"\x10\1" + bytes(15) + b"\0"
)
_SCAN: Final = _segment(0xDA, bytes((3, 1, 0, 2, 0, 3, 0, 0, 63, 0)))
_HEADER: Final = b"\xff\xd8" + _QUANTIZATION + bytes(19) + _HUFFMAN + _SCAN
"""Everything before the data of the scan, with room for the frame header."""


def _jpeg(width: int, height: int, grid: Sequence[Sequence[Colour]]) -> bytes:
    """Return a baseline image with 4:2:0 sampling: one MCU for each block of the grid."""
    components = bytes((1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0))
    frame = _segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + components)
    before: Colour = (128, 128, 128)
    units = []
    for row in grid:
        for colour in row:
            units.append(_unit(before, colour))
            before = colour
    bits = "".join(units)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + _QUANTIZATION + frame + _HUFFMAN + _SCAN + data + b"\xff\xd9"


@cache
def _unit(before: Colour, colour: Colour) -> str:
    """Return the bits of an MCU: four blocks of Y, one of Cb, one of Cr."""
    y, cb, cr = (_difference(new - old) for old, new in zip(before, colour, strict=True))
    return y + _difference(0) * 3 + cb + cr


def _difference(value: int) -> str:
    """Return the bits of a block whose DC coefficient differs from that of the block before."""
    category = abs(value).bit_length()
    extra = value if value > 0 else value + (1 << category) - 1
    return _DC_CODES[category] + (f"{extra:0{category}b}" if category else "") + _END_OF_BLOCK
