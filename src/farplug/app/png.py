"""PNG files of BGRX pixels. Source: the PNG specification (ISO/IEC 15948), sections 5, 7, 9 and 11."""

from __future__ import annotations

import os
import secrets
import stat
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from farplug.errors import ImageError, Reason, UsageError, from_oserror

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 3
"""Of zlib: for a console the file is small and made in some 20 ms; higher levels only take longer."""

MAX_PIXELS: Final = 16 << 20
"""Of a picture that is read; screens have no more."""
_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by colour type: grey, RGB, palette, grey with alpha, RGB with alpha."""
_GREY, _PALETTE = 0, 3


def encode_png(width: int, height: int, pixels: bytes | memoryview) -> bytes:
    """Return a PNG file of ``width * height`` BGRX pixels: 8 bits a colour, RGB, no filter."""
    row = 3 * width
    colours = bytearray(row * height)
    for target, source in ((0, 2), (1, 1), (2, 0)):
        colours[target::3] = pixels[source::4]
    packer = zlib.compressobj(LEVEL)
    packed = bytearray()
    for start in range(0, len(colours), row):
        packed += packer.compress(b"\0" + colours[start : start + row])
    packed += packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", bytes(packed)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def decode_png(data: bytes) -> tuple[int, int, bytes]:
    """Return width, height and BGRA pixels of a PNG file: 4 bytes each, the top row first; A is 255 where it is opaque.

    Any colour type and filter, with samples of up to 8 bits, and without interlacing.

    Raises:
        ImageError: the data is not such a file, is damaged, or has more than :data:`MAX_PIXELS`.
    """
    try:
        return _decode(data)
    except (struct.error, zlib.error, IndexError, ValueError) as error:
        raise _damaged(str(error)) from error


def _damaged(why: str) -> ImageError:
    return ImageError(f"the PNG file is damaged: {why}", reason=Reason.DAMAGED)


def _decode(data: bytes) -> tuple[int, int, bytes]:
    if not data.startswith(SIGNATURE):
        raise ImageError("not a PNG file", reason=Reason.WRONG_FORMAT, remedy="save the picture as PNG")
    chunks: dict[bytes, bytes] = {}
    packed = bytearray()
    at = len(SIGNATURE)
    while b"IEND" not in chunks:
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        if zlib.crc32(kind + body) != struct.unpack_from(">I", data, at + 8 + size)[0]:
            raise _damaged(f"the checksum of a chunk {kind!r} is wrong")
        if kind == b"IDAT":
            packed += body
        else:
            chunks[kind] = body
        at += size + 12
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunks.get(b"IHDR", b""))
    if not (width and height and width * height <= MAX_PIXELS):
        raise ImageError(f"the PNG file has {width}x{height} pixels, not 1 to {MAX_PIXELS}", reason=Reason.TOO_LARGE)
    if (
        colour not in _SAMPLES
        or depth not in (1, 2, 4, 8)
        or (depth < 8 and colour not in (_GREY, _PALETTE))
        or interlace
    ):
        raise ImageError(
            "the PNG file is interlaced, or has samples of 16 bits",
            reason=Reason.WRONG_FORMAT,
            remedy="save the picture with 8 bits a sample, and without interlacing",
        )
    bits = _SAMPLES[colour] * depth
    pitch = (width * bits + 7) // 8
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(bytes(packed), height * (1 + pitch) + 1)
    if len(raw) != height * (1 + pitch):
        raise _damaged("its pixels are not complete")
    rows = _unfilter(raw, pitch, max(1, bits // 8))
    if depth < 8:
        rows = [_spread(row, depth, width) for row in rows]
    samples = b"".join(rows)
    pixels = bytearray(b"\xff" * (4 * width * height))
    if colour == _PALETTE:
        palette, alpha = chunks.get(b"PLTE", b""), chunks.get(b"tRNS", b"")
        if samples and max(samples) >= len(palette) // 3:
            raise _damaged("a pixel is not in the palette")
        for target, source in ((0, 2), (1, 1), (2, 0)):
            pixels[target::4] = samples.translate(palette[source::3].ljust(256, b"\0"))
        pixels[3::4] = samples.translate(alpha[:256].ljust(256, b"\xff"))
        return width, height, bytes(pixels)
    if colour == _GREY and depth < 8:
        scale = 255 // ((1 << depth) - 1)
        samples = samples.translate(bytes(min(255, value * scale) for value in range(256)))
    count = _SAMPLES[colour]
    for target, source in ((0, 2), (1, 1), (2, 0)):
        pixels[target::4] = samples[source if count > 2 else 0 :: count]
    if count in (2, 4):
        pixels[3::4] = samples[count - 1 :: count]
    return width, height, bytes(pixels)


def _unfilter(raw: bytes, pitch: int, step: int) -> list[bytes]:
    """Return the rows of an image without their filters (section 9). ``step`` is the number of bytes of a pixel."""
    rows: list[bytes] = []
    above = bytes(pitch)
    for start in range(0, len(raw), 1 + pitch):
        row = bytearray(raw[start + 1 : start + 1 + pitch])
        match raw[start]:
            case 0:
                pass
            case 1:
                for at in range(step, pitch):
                    row[at] = (row[at] + row[at - step]) & 0xFF
            case 2:
                row = bytearray((value + up) & 0xFF for value, up in zip(row, above, strict=True))
            case 3:
                for at in range(pitch):
                    left = row[at - step] if at >= step else 0
                    row[at] = (row[at] + (left + above[at]) // 2) & 0xFF
            case 4:
                for at in range(pitch):
                    left, corner = (row[at - step], above[at - step]) if at >= step else (0, 0)
                    row[at] = (row[at] + _paeth(left, above[at], corner)) & 0xFF
            case other:
                raise _damaged(f"{other} is not a valid filter")
        above = bytes(row)
        rows.append(above)
    return rows


def _paeth(left: int, up: int, corner: int) -> int:
    """Return the neighbour that is nearest to ``left + up - corner`` (section 9.4)."""
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    if to_left <= to_up and to_left <= to_corner:
        return left
    return up if to_up <= to_corner else corner


def _spread(row: Sequence[int], depth: int, width: int) -> bytes:
    """Return the samples of a row, which have fewer than 8 bits, in a byte each."""
    mask = (1 << depth) - 1
    samples = bytes(byte >> shift & mask for byte in row for shift in range(8 - depth, -1, -depth))
    return samples[:width]


def check_path(path: str) -> None:
    """Check that a path can become a PNG file: there is no file, an empty one, or a PNG file.

    Raises:
        UsageError: there is something else, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path} is not a file", reason=Reason.NOT_A_FILE, remedy="name a new file")
        with open(path, "rb") as file:
            first = file.read(len(SIGNATURE))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise from_oserror(path, error, as_=UsageError) from error
    if first not in (b"", SIGNATURE):
        raise UsageError(
            f"{path} exists, and is not a PNG file", reason=Reason.WRONG_FORMAT, remedy="name a new file, or remove it"
        )


def write_png(path: str, data: bytes) -> None:
    """Write a PNG file, in place of one that is there; a reader finds the old one or the new one.

    Raises:
        UsageError: the file cannot be written, or there is something else.
    """
    check_path(path)
    target = os.path.realpath(path)
    new = f"{target}.{secrets.token_hex(4)}"
    try:
        with open(new, "xb") as file:
            file.write(data)
        os.replace(new, target)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.unlink(new)
        raise from_oserror(path, error, as_=UsageError, problem="cannot be written") from error
