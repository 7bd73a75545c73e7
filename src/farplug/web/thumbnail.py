"""Make small pictures of the PNG files that a session writes. Source: the PNG specification (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import zlib
from typing import Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_RGB8: Final = b"\x08\x02\x00\x00\x00"
"""Of IHDR: 8 bits a sample, RGB, deflate, adaptive filters, not interlaced."""
MAX_PIXELS: Final = 1 << 24
"""Pixels of a picture, as of a display."""


def scaled(png: bytes, width: int) -> bytes:
    """Return a PNG file with the picture at a fraction of its size, at most ``width`` pixels wide.

    Pixels are means of up to four of the picture's. A picture that is small enough is returned as it is.

    Raises:
        ValueError: it is not a PNG file as sessions write them: 8 bits a colour, RGB, rows without filter.
    """
    columns, rows, packed = _parse(png)
    step = -(-columns // width)
    if step <= 1:
        return png
    stride = 3 * columns + 1
    try:
        pixels = zlib.decompressobj().decompress(packed, stride * rows + 1)
    except zlib.error as error:
        raise ValueError(f"the pixels cannot be decompressed: {error}") from None
    if len(pixels) != stride * rows or any(pixels[::stride]):
        raise ValueError("the picture has other rows than its header says, or rows with a filter")
    new_columns, new_rows = columns // step, max(1, rows // step)
    half = step // 2
    result = bytearray()
    for row in range(new_rows):
        top = min(row * step, rows - 1)
        lines = [pixels[at * stride + 1 : (at + 1) * stride] for at in (top, min(top + half, rows - 1))]
        colours = []
        for colour in range(3):
            first, second = (
                _mean(
                    line[colour :: 3 * step][:new_columns],
                    line[colour + 3 * half :: 3 * step][:new_columns],
                )
                for line in lines
            )
            colours.append(_mean(first, second))
        whole = bytearray(3 * new_columns)
        for colour in range(3):
            whole[colour::3] = colours[colour]
        result += b"\0" + whole
    header = struct.pack(">II", new_columns, new_rows) + _RGB8
    return (
        _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(result), 3)) + _chunk(b"IEND", b"")
    )


def _mean(first: bytes, second: bytes) -> bytes:
    """Return the means of bytes, rounded down: (a & b) + ((a ^ b) >> 1), without carries between bytes."""
    size = len(first)
    a, b = int.from_bytes(first, "big"), int.from_bytes(second, "big")
    mask = int.from_bytes(b"\x7f" * size, "big")
    return ((a & b) + (((a ^ b) >> 1) & mask)).to_bytes(size, "big")


def _parse(png: bytes) -> tuple[int, int, bytes]:
    """Return the width, the height and the compressed rows of a PNG file."""
    if not png.startswith(_SIGNATURE):
        raise ValueError("it is not a PNG file")
    at = len(_SIGNATURE)
    size: tuple[int, int] | None = None
    packed = b""
    while at + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        data = png[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"IHDR":
            if len(data) != 13 or data[8:] != _RGB8:
                raise ValueError("the picture has another format")
            size = struct.unpack_from(">II", data)
        elif kind == b"IDAT":
            packed += data
    if size is None or not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise ValueError("the picture has no valid size")
    return size[0], size[1], packed


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
