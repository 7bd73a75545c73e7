"""Images in the messages of a SPICE display channel: bitmaps, and pixels compressed with LZ4. No I/O.

Sources: ``spice.proto`` of spice-common (Image, BitmapData, LZ4Data); libspice-server 0.15.1,
``server/image-encoders.cpp``.

Other encodings are :class:`Unsupported`: servers do not use them for a client that prefers LZ4 and has no image cache,
except for images that a driver of the guest made.
"""

from __future__ import annotations

import struct

import lz4.block

from farplug.errors import RemoteProtocolError
from farplug.spice.framebuffer import MAX_SIDE, PIXEL, Picture

MAX_PIXELS = 16 << 20
"""The most pixels of a surface or an image that we accept."""

MAX_BLOCKS = 4096
"""The most blocks of an LZ4 image that we accept."""

_IMAGE = struct.Struct("<QBBII")
_BITMAP = struct.Struct("<BBIIII")
_LZ4 = struct.Struct("<IBB")
_BLOCK = struct.Struct(">I")
_BITMAP_TYPE, _LZ4_TYPE = 0, 109
_TOP_DOWN, _PALETTE_FROM_CACHE = 4, 2
_FORMAT_24, _FORMAT_32, _FORMAT_ARGB = 7, 8, 9
_DICTIONARY = 64 << 10
"""The most bytes of earlier blocks that an LZ4 block can refer to."""


class Unsupported(Exception):
    """The server sent a drawing operation that we do not have. Its picture is complete again after a new link."""


def image_pixels(body: memoryview, offset: int) -> int:
    """Return the number of pixels to decode for the image at an offset of a message; 0: none, or it is not valid."""
    if offset + _IMAGE.size + 1 > len(body):
        return 0
    _, kind, _, width, height = _IMAGE.unpack_from(body, offset)
    plain = kind == _BITMAP_TYPE and body[offset + _IMAGE.size] != _FORMAT_24
    return 0 if plain else width * height


def decode_image(body: memoryview, offset: int) -> Picture:
    """Return the pixels of the image at an offset of a message. Uncompressed pixels are not copied.

    Raises:
        RemoteProtocolError: the image is not valid.
        Unsupported: it has another encoding.
    """
    if offset + _IMAGE.size > len(body):
        raise RemoteProtocolError(f"SPICE image at offset {offset}: outside its message of {len(body)} bytes")
    _, kind, _, width, height = _IMAGE.unpack_from(body, offset)
    check_size(width, height, "image")
    data = body[offset + _IMAGE.size :]
    if kind == _BITMAP_TYPE:
        return _bitmap(data, width, height)
    if kind == _LZ4_TYPE:
        return _lz4(data, width, height)
    raise Unsupported(f"an image of type {kind}")


def check_size(width: int, height: int, what: str) -> None:
    """Check the size of a surface or an image, in pixels.

    Raises:
        RemoteProtocolError: it is empty, or larger than we accept.
    """
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise RemoteProtocolError(
            f"SPICE {what} of {width}x{height} pixels: at most {MAX_SIDE} a side and {MAX_PIXELS} in all are accepted"
        )


def _bitmap(data: memoryview, width: int, height: int) -> Picture:
    if len(data) < _BITMAP.size:
        raise RemoteProtocolError(f"SPICE bitmap of {len(data)} bytes, fewer than {_BITMAP.size}")
    pixel_format, flags, columns, rows, stride, palette = _BITMAP.unpack_from(data)
    if pixel_format not in (_FORMAT_24, _FORMAT_32, _FORMAT_ARGB) or flags & _PALETTE_FROM_CACHE or palette:
        raise Unsupported(f"a bitmap of format {pixel_format}")
    size = 3 if pixel_format == _FORMAT_24 else PIXEL
    if (columns, rows) != (width, height):
        raise RemoteProtocolError(f"SPICE bitmap of {columns}x{rows} pixels in an image of {width}x{height}")
    if not width * size <= stride <= MAX_SIDE * PIXEL + 64:
        raise RemoteProtocolError(f"SPICE bitmap of {width} columns with rows of {stride} bytes")
    pixels = data[_BITMAP.size : _BITMAP.size + stride * height]
    if len(pixels) < stride * height:
        raise RemoteProtocolError(f"SPICE bitmap of {stride * height} bytes, of which {len(pixels)} are there")
    picture = Picture(width, height, stride, bool(flags & _TOP_DOWN), pixels)
    return _from_24(picture) if size == 3 else picture


def _lz4(data: memoryview, width: int, height: int) -> Picture:
    if len(data) < _LZ4.size:
        raise RemoteProtocolError(f"SPICE LZ4 image of {len(data)} bytes, fewer than {_LZ4.size}")
    size, top_down, pixel_format = _LZ4.unpack_from(data)
    if pixel_format not in (_FORMAT_24, _FORMAT_32, _FORMAT_ARGB):
        raise Unsupported(f"an LZ4 image of format {pixel_format}")
    # The size counts the two bytes after it.
    if size < 2 or 4 + size > len(data):
        raise RemoteProtocolError(f"SPICE LZ4 image of {size} bytes, of which {len(data) - 4} are there")
    stride = width * (3 if pixel_format == _FORMAT_24 else PIXEL)
    pixels = _decompress(data[_LZ4.size : 4 + size], stride * height)
    picture = Picture(width, height, stride, bool(top_down), pixels)
    return _from_24(picture) if pixel_format == _FORMAT_24 else picture


def _decompress(data: memoryview, total: int) -> bytes | bytearray:
    """Return the bytes of LZ4 blocks, each behind its size; a block may refer to the bytes of those before it."""
    whole: bytes | bytearray = b""
    position = blocks = 0
    while len(whole) < total:
        blocks += 1
        if blocks > MAX_BLOCKS:
            raise RemoteProtocolError(f"SPICE LZ4 image of more than {MAX_BLOCKS} blocks")
        if position + _BLOCK.size > len(data):
            raise RemoteProtocolError(f"SPICE LZ4 image with {len(whole)} bytes of pixels, fewer than {total}")
        (size,) = _BLOCK.unpack_from(data, position)
        position += _BLOCK.size
        if size > len(data) - position:
            raise RemoteProtocolError(f"SPICE LZ4 block of {size} bytes, of which {len(data) - position} are there")
        left = total - len(whole)
        block = data[position : position + size]
        position += size
        try:
            piece = lz4.block.decompress(block, uncompressed_size=left, dict=bytes(whole[-_DICTIONARY:]))
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise RemoteProtocolError(f"SPICE LZ4 image is damaged: {error}") from None
        if not piece:
            raise RemoteProtocolError("SPICE LZ4 block without pixels")
        if not whole and len(piece) == total:
            return bytes(piece)
        if not whole:
            whole = bytearray()
        whole += piece
    return whole


def _from_24(picture: Picture) -> Picture:
    """Return a picture of BGR pixels as one of BGRX pixels."""
    width, height, stride, top_down, source = picture
    pixels = bytearray(width * height * PIXEL)
    packed = source
    if stride != width * 3:
        packed = b"".join(source[at : at + width * 3] for at in range(0, stride * height, stride))
    for colour in range(3):
        pixels[colour::PIXEL] = bytes(packed)[colour::3]
    return Picture(width, height, width * PIXEL, top_down, pixels)
