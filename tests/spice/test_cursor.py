from __future__ import annotations

import random
import struct

import pytest
from tests.spice.test_display import vectors

from farplug.errors import RemoteProtocolError
from farplug.spice.channel import Message
from farplug.spice.cursor import Cursor, Shape

INIT, RESET, SET, MOVE, HIDE, INVAL_ONE, INVAL_ALL = 101, 102, 103, 104, 105, 107, 108


def handle(cursor: Cursor, kind: int, body: bytes = b"") -> None:
    cursor.handle(Message(kind, memoryview(body)))


def shape(flags: int, kind: int, width: int, height: int, data: bytes, number: int = 7) -> bytes:
    return struct.pack("<hhBHQBHHHH", 5, 6, 1, flags, number, kind, width, height, 1, 2) + data


def test_real_messages() -> None:
    cursor = Cursor()
    for kind in (INIT, RESET, MOVE, INVAL_ALL):
        for body in vectors("cursor", kind):
            handle(cursor, kind, body)
    assert (cursor.x, cursor.y, cursor.visible, cursor.shape) == (512, 384, True, None)


def test_shapes() -> None:
    cursor = Cursor()
    handle(cursor, SET, shape(0, 0, 2, 1, b"abcdefgh"))
    assert (cursor.x, cursor.y, cursor.visible) == (5, 6, True)
    assert cursor.shape == Shape(2, 1, 1, 2, b"abcdefgh")
    handle(cursor, HIDE)
    assert not cursor.visible
    handle(cursor, SET, shape(0, 1, 4, 1, bytes([0b00110000, 0b01010000])))
    assert cursor.shape is not None
    assert cursor.shape.pixels.hex() == "000000ff" + "ffffffff" + "00000000" + "000000ff"
    handle(cursor, SET, shape(0, 6, 2, 1, b"abc?def?" + bytes([0b01000000])))
    assert cursor.shape.pixels == b"abc\xff" + bytes(4)
    handle(cursor, SET, shape(0, 3, 2, 1, bytes(2000)))
    assert cursor.shape is None, "a palette"


def _slow_pixels(kind: int, width: int, height: int, data: bytes) -> bytes:
    """Return the pixels of a pointer with a mask, made one by one."""
    pitch, pixels = (width + 7) // 8, bytearray()

    def bit(start: int, x: int, y: int) -> bool:
        return bool(data[start + y * pitch + x // 8] & 0x80 >> x % 8)

    for y in range(height):
        for x in range(width):
            if kind == 6:
                colour = data[4 * (y * width + x) :][:3] + b"\xff"
                pixels += bytes(4) if bit(4 * width * height, x, y) else colour
            else:
                keeps, inverts = bit(0, x, y), bit(pitch * height, x, y)
                white = b"\xff" * 4 if inverts and not keeps else b"\0\0\0\xff"
                pixels += bytes(4) if keeps and not inverts else white
    return bytes(pixels)


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (8, 2), (9, 5), (32, 32), (65, 4)])
def test_pointers_with_a_mask(kind: int, width: int, height: int) -> None:
    pitch = (width + 7) // 8
    size = 2 * pitch * height if kind == 1 else 4 * width * height + pitch * height
    data = random.Random(f"{kind} {width}").randbytes(size)
    cursor = Cursor()
    handle(cursor, SET, shape(0, kind, width, height, data + b"more"))
    assert cursor.shape is not None
    assert cursor.shape.pixels == _slow_pixels(kind, width, height, data)


def test_the_cache_counts_its_bytes() -> None:
    cursor = Cursor()
    large = bytes(4 * 512 * 512)
    for number in range(16):
        handle(cursor, SET, shape(2, 0, 512, 512, large, number=number))
    handle(cursor, SET, shape(2, 0, 512, 512, large, number=3))  # again
    handle(cursor, INVAL_ONE, struct.pack("<Q", 3))
    handle(cursor, INVAL_ONE, struct.pack("<Q", 99))
    handle(cursor, SET, shape(2, 0, 512, 512, large, number=16))
    handle(cursor, INVAL_ALL)
    for number in range(16):
        handle(cursor, SET, shape(2, 0, 512, 512, large, number=number))
    with pytest.raises(RemoteProtocolError, match=f"to cache: 17 of {(16 << 20) + 4} bytes"):
        handle(cursor, SET, shape(2, 0, 1, 1, b"abcd", number=16))


def test_the_cache() -> None:
    cursor = Cursor()
    handle(cursor, SET, shape(2, 0, 1, 1, b"abcd"))
    handle(cursor, SET, shape(0, 0, 1, 1, b"efgh", number=8))
    handle(cursor, SET, shape(4, 0, 0, 0, b""))
    assert cursor.shape is not None
    assert cursor.shape.pixels == b"abcd"
    handle(cursor, INVAL_ONE, struct.pack("<Q", 7))
    with pytest.raises(RemoteProtocolError, match="does not have it"):
        handle(cursor, SET, shape(4, 0, 0, 0, b""))
    for number in range(256):
        handle(cursor, SET, shape(2, 0, 1, 1, b"abcd", number=number))
    with pytest.raises(RemoteProtocolError, match="to cache: 257"):
        handle(cursor, SET, shape(2, 0, 1, 1, b"abcd", number=256))


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (SET, b"", "not complete"),
        (INIT, bytes(9), "not complete"),
        (MOVE, bytes(3), "not complete"),
        (SET, shape(0, 0, 513, 1, b""), "513x1"),
        (SET, shape(0, 0, 0, 1, b""), "0x1"),
        (SET, shape(0, 0, 2, 2, bytes(15)), "16 bytes, of which 15"),
        (SET, shape(0, 1, 9, 2, bytes(7)), "8 bytes, of which 7"),
    ],
)
def test_invalid_messages(kind: int, body: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        handle(Cursor(), kind, body)
