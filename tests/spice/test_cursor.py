from __future__ import annotations

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
