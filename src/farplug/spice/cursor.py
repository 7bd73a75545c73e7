"""A SPICE cursor channel: the shape of the pointer, and where it is. No I/O.

Sources: ``spice.proto`` of spice-common (CursorChannel); libspice-server 0.15.1, ``server/cursor-channel.cpp``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING

from farplug.errors import RemoteProtocolError
from farplug.spice.channel import Channel, Message

if TYPE_CHECKING:
    from farplug.spice.link import LinkResult

MAX_SIDE = 512
"""The largest width and height of a pointer that we accept, in pixels."""
MAX_CACHED = 256
"""The most shapes that we store for the server, as in libspice-server."""
MAX_CACHED_BYTES = 16 << 20
"""The most bytes of the shapes that we store for the server."""


class CursorMessage(IntEnum):
    """SPICE_MSG_CURSOR_*: messages from servers."""

    INIT = 101
    RESET = 102
    SET = 103
    MOVE = 104
    HIDE = 105
    INVAL_ONE = 107
    INVAL_ALL = 108


_MAX_SET = 64 + 2 * 4 * MAX_SIDE * MAX_SIDE
_MESSAGES: dict[int, int] = dict.fromkeys(CursorMessage, _MAX_SET)
_INIT = struct.Struct("<hhHHB")
_SET = struct.Struct("<hhB")
_POINT = struct.Struct("<hh")
_FLAGS = struct.Struct("<H")
_HEADER = struct.Struct("<QBHHHH")
_U64 = struct.Struct("<Q")
_NONE, _CACHE_ME, _FROM_CACHE = 1, 2, 4
_ALPHA, _MONO, _COLOUR_32 = 0, 1, 6


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a pointer.

    Attributes:
        width: in pixels.
        height: in pixels.
        hot_x: the column that points.
        hot_y: the row that points.
        pixels: ``width * height`` BGRA pixels, premultiplied, the top row first. Where a monochrome pointer inverts the
            screen, it is black.
    """

    width: int
    height: int
    hot_x: int
    hot_y: int
    pixels: bytes


class CursorChannel(Channel):
    """The messages of a cursor channel. Pass them to a :class:`Cursor`."""

    def __init__(self, name: str, link: LinkResult) -> None:
        super().__init__(name, mini_header=link.mini_header, stored=_MESSAGES)


class Cursor:
    """The pointer of a display.

    Attributes:
        shape: its shape; None: there is none, or one with a palette, which is not supported.
        x: the column of its hot spot on the surface.
        y: the row of its hot spot.
        visible: the VM shows it.
    """

    def __init__(self) -> None:
        self.shape: Shape | None = None
        self.x = self.y = 0
        self.visible = False
        self._cache: dict[int, Shape | None] = {}
        self._cached_bytes = 0

    def handle(self, message: Message) -> None:
        """Process a message.

        Raises:
            RemoteProtocolError: the message is not valid.
        """
        body = message.body
        try:
            match message.kind:
                case CursorMessage.INIT:
                    self._uncache_all()
                    self.x, self.y, _, _, visible = _INIT.unpack_from(body)
                    self._set(body[_INIT.size :], bool(visible))
                case CursorMessage.SET:
                    self.x, self.y, visible = _SET.unpack_from(body)
                    self._set(body[_SET.size :], bool(visible))
                case CursorMessage.MOVE:
                    self.x, self.y = _POINT.unpack_from(body)
                    self.visible = True
                case CursorMessage.HIDE:
                    self.visible = False
                case CursorMessage.RESET:
                    self.shape, self.visible = None, False
                    self._uncache_all()
                case CursorMessage.INVAL_ONE:
                    self._uncache(_U64.unpack_from(body)[0])
                case CursorMessage.INVAL_ALL:
                    self._uncache_all()
        except struct.error:
            name = CursorMessage(message.kind).name
            raise RemoteProtocolError(f"SPICE CURSOR_{name} of {len(body)} bytes: it is not complete") from None

    def _set(self, body: memoryview, visible: bool) -> None:
        self.visible = visible
        (flags,) = _FLAGS.unpack_from(body)
        if flags & _NONE:
            self.shape = None
            return
        number, kind, width, height, hot_x, hot_y = _HEADER.unpack_from(body, _FLAGS.size)
        if flags & _FROM_CACHE:
            if number not in self._cache:
                raise RemoteProtocolError(f"SPICE cursor {number:#x} from the cache, which does not have it")
            self.shape = self._cache[number]
            return
        if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE:
            raise RemoteProtocolError(f"SPICE cursor of {width}x{height} pixels: at most {MAX_SIDE} a side")
        pixels = _pixels(kind, width, height, body[_FLAGS.size + _HEADER.size :])
        self.shape = None if pixels is None else Shape(width, height, hot_x, hot_y, pixels)
        if flags & _CACHE_ME:
            self._uncache(number)
            self._cache[number] = self.shape
            size = self._cached_bytes = self._cached_bytes + len(pixels or b"")
            if len(self._cache) > MAX_CACHED or size > MAX_CACHED_BYTES:
                raise RemoteProtocolError(f"SPICE cursors to cache: {len(self._cache)} of {size} bytes")

    def _uncache(self, number: int) -> None:
        shape = self._cache.pop(number, None)
        if shape is not None:
            self._cached_bytes -= len(shape.pixels)

    def _uncache_all(self) -> None:
        self._cache.clear()
        self._cached_bytes = 0


def _pixels(kind: int, width: int, height: int, data: memoryview) -> bytes | None:
    """Return BGRA pixels; None for a kind that is not supported."""
    size = width * height
    pitch = (width + 7) // 8
    needed = {_ALPHA: 4 * size, _MONO: 2 * pitch * height, _COLOUR_32: 4 * size + pitch * height}.get(kind)
    if needed is None:
        return None
    if len(data) < needed:
        raise RemoteProtocolError(f"SPICE cursor of {needed} bytes, of which {len(data)} are there")
    if kind == _ALPHA:
        return bytes(data[:needed])
    opaque = int.from_bytes(b"\0\0\0\xff" * size, "little")
    every = (1 << 32 * size) - 1
    if kind == _MONO:
        keeps, inverts = _mask(data, width, height), _mask(data[pitch * height :], width, height)
        changes = every ^ keeps
        pixels = (inverts & changes & ~opaque) | ((changes | inverts) & opaque)
    else:
        pixels = (int.from_bytes(data[: 4 * size], "little") | opaque) & (
            every ^ _mask(data[4 * size :], width, height)
        )
    return pixels.to_bytes(4 * size, "little")


def _mask(data: memoryview, width: int, height: int) -> int:
    """Return rows of bits, each from a byte on, as an integer with the bits of BGRA pixels: 32 for each."""
    pitch, rows = (width + 7) // 8, _expanded()
    parts = [
        b"".join([rows[byte] for byte in data[at : at + pitch]])[: 4 * width] for at in range(0, pitch * height, pitch)
    ]
    return int.from_bytes(b"".join(parts), "little")


@cache
def _expanded() -> tuple[bytes, ...]:
    """Return the BGRA pixels of each byte of a mask: all bits of a pixel are equal."""
    return tuple(b"".join(b"\xff" * 4 if byte & 0x80 >> bit else bytes(4) for bit in range(8)) for byte in range(256))
