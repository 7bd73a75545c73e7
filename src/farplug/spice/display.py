"""A SPICE display channel: surfaces and drawing operations, drawn into a framebuffer. No I/O.

A server draws for a client without optional capabilities with few operations: it puts images, fills, copies and
inverts rectangles. After anything else (:class:`~farplug.spice.images.Unsupported`) the channel is linked again: the
server then sends the whole picture, which it has drawn itself.

Sources: ``spice.proto`` of spice-common; spice-protocol 0.14.3, ``spice/enums.h``; libspice-server 0.15.1,
``server/dcc.cpp``, ``server/dcc-send.cpp``.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from farplug.errors import RemoteProtocolError
from farplug.spice.channel import Channel, Message
from farplug.spice.framebuffer import PIXEL, Framebuffer, Picture, Rect
from farplug.spice.images import Unsupported, check_size, decode_image, image_pixels
from farplug.spice.types import has_capability

if TYPE_CHECKING:
    from farplug.spice.link import LinkResult

MAX_DISPLAY_MESSAGE = (64 << 20) + (64 << 10)
"""The largest message of a display channel that we accept, in bytes: an image of MAX_PIXELS, uncompressed."""
MAX_CLIP = 4096
"""The most rectangles of a clip region that we accept."""
MAX_ROWS = 128 << 10
"""The most rows of pixels, of all rectangles of a clip region together, that we draw."""
LARGE = 1 << 20
"""Pixels of an image that is decoded in a thread, at least."""
MAX_MONITORS = 16
"""The most monitors of a MONITORS_CONFIG that we accept."""

PREF_COMPRESSION_CAPABILITY: Final = 6
MESSAGE_WORK: Final = 16 << 10
"""What drawing a message takes besides its pixels, as bytes of pixels that are drawn in that time."""
CLIP_WORK: Final = 1 << 10
"""The same for each rectangle of a clip region."""
ROW_WORK: Final = 256
"""The same for each row of a rectangle that is drawn."""
CAPABILITIES: Final = (1, 5, 6, 8)
"""SPICE_DISPLAY_CAP_* that a client has: MONITORS_CONFIG, LZ4_COMPRESSION, PREF_COMPRESSION, MULTI_CODEC.

With MULTI_CODEC and without a codec, the server sends no video streams. Without COMPOSITE and A8_SURFACE, drivers of
guests draw such operations themselves.
"""
_PREF_OFF, _PREF_LZ4 = 1, 7
_INIT = struct.pack("<BqBi", 0, 0, 0, 0)
"""No cache of images, no dictionary of GLZ: the server sends each image whole."""
_CLIENT_INIT, _CLIENT_PREF_COMPRESSION = 101, 103


class DisplayMessage(IntEnum):
    """SPICE_MSG_DISPLAY_*: messages from servers."""

    MODE = 101
    MARK = 102
    RESET = 103
    COPY_BITS = 104
    DRAW_FILL = 302
    DRAW_OPAQUE = 303
    DRAW_COPY = 304
    DRAW_BLEND = 305
    DRAW_BLACKNESS = 306
    DRAW_WHITENESS = 307
    DRAW_INVERS = 308
    DRAW_ROP3 = 309
    DRAW_STROKE = 310
    DRAW_TEXT = 311
    DRAW_TRANSPARENT = 312
    DRAW_ALPHA_BLEND = 313
    SURFACE_CREATE = 314
    SURFACE_DESTROY = 315
    MONITORS_CONFIG = 317
    DRAW_COMPOSITE = 318


_MESSAGES: dict[int, int] = dict.fromkeys(DisplayMessage, MAX_DISPLAY_MESSAGE)
_SURFACE = struct.Struct("<5I")
_BASE = struct.Struct("<IiiiiB")
_U32 = struct.Struct("<I")
_RECT = struct.Struct("<iiii")
_COPY = struct.Struct("<IiiiiHBBiiI")
_SOLID_FILL = struct.Struct("<BIHBiiI")
_MASK = struct.Struct("<BiiI")
_POINT = struct.Struct("<ii")
_MONITOR = struct.Struct("<7I")
_PRIMARY = 1
_FORMATS = (32, 96)
"""SPICE_SURFACE_FMT_32_xRGB and _32_ARGB."""
_PUT = 8
_CLIP_NONE, _CLIP_RECTS = 0, 1
_SOLID = 1
_BLACK, _WHITE = bytes(PIXEL), b"\xff\xff\xff\x00"


class DisplayChannel(Channel):
    """The messages of a display channel. Draw them with a :class:`Display`.

    :meth:`data_to_send` has the messages with which the channel begins: send them at once. Between the ticket and the
    first byte from the server, the connection must not be closed: QEMU would crash.
    """

    capabilities = CAPABILITIES

    def __init__(self, name: str, link: LinkResult) -> None:
        super().__init__(name, mini_header=link.mini_header, stored=_MESSAGES, largest=MAX_DISPLAY_MESSAGE)
        if has_capability(link.channel_caps, PREF_COMPRESSION_CAPABILITY):
            # A server without LZ4 ignores the second one.
            for preference in (_PREF_OFF, _PREF_LZ4):
                self.send(_CLIENT_PREF_COMPRESSION, bytes([preference]))
        self.send(_CLIENT_INIT, _INIT)


class Display:
    """What a display shows.

    Attributes:
        shown: the picture; None before the first one. While the VM changes its mode, it is the last one.
        complete: the server has sent the whole picture since the link.
        monitors: the rectangles of the monitors on the picture; empty: it is one monitor.
        work: bytes of pixels that were decoded and drawn, and MESSAGE_WORK for each message, for the caller, who may
            set it to 0.
    """

    def __init__(self) -> None:
        self.shown: Framebuffer | None = None
        self.complete = False
        self.monitors: tuple[Rect, ...] = ()
        self.work = 0
        self._drawn: Framebuffer | None = None
        self._primary = 0

    def begin(self) -> None:
        """Take note that the channel is linked again. The picture stays until the server has sent the new one."""
        self.complete = False
        self._drawn = None

    def handle(self, message: Message, *, decode: bool = True) -> int | None:
        """Draw a message.

        Args:
            message: the message.
            decode: also decode large images.

        Returns:
            Where the message has an image of LARGE pixels or more that is not decoded and drawn: decode it with
            :func:`~farplug.spice.images.decode_image`, and pass it to :meth:`draw`. None: all is done.

        Raises:
            RemoteProtocolError: the message is not valid.
            Unsupported: we do not have the operation: link the channel again.
        """
        kind, body = message.kind, message.body
        self.work += MESSAGE_WORK
        try:
            match kind:
                case DisplayMessage.DRAW_COPY:
                    return self._draw_copy(body, decode=decode)
                case DisplayMessage.COPY_BITS:
                    self._copy_bits(body)
                case DisplayMessage.DRAW_FILL:
                    self._draw_fill(body)
                case DisplayMessage.DRAW_BLACKNESS | DisplayMessage.DRAW_WHITENESS | DisplayMessage.DRAW_INVERS:
                    self._draw_plain(kind, body)
                case DisplayMessage.SURFACE_CREATE:
                    self._create(body)
                case DisplayMessage.SURFACE_DESTROY:
                    if self._drawn is not None and _U32.unpack_from(body)[0] == self._primary:
                        self._drawn = None
                case DisplayMessage.MONITORS_CONFIG:
                    self._configure(body)
                case DisplayMessage.MARK:
                    self.complete = True
                    self._show()
                case DisplayMessage.RESET:
                    if self._drawn is not None:
                        self._drawn.fill(self._drawn.bounds, _BLACK)
                case _:
                    raise Unsupported(DisplayMessage(kind).name)
        except struct.error:
            name = DisplayMessage(kind).name
            raise RemoteProtocolError(f"SPICE {name} of {len(body)} bytes: it is not complete") from None
        return None

    def draw(self, message: Message, picture: Picture) -> None:
        """Draw a message for which :meth:`handle` returned where its image is.

        Args:
            message: the message.
            picture: the image.

        Raises:
            RemoteProtocolError: the message is not valid.
        """
        self._draw_copy(message.body, picture)

    def _create(self, body: memoryview) -> None:
        number, width, height, surface_format, flags = _SURFACE.unpack_from(body)
        if not flags & _PRIMARY:
            return  # what a guest draws there is seen only in an image of type SURFACE, which is unsupported
        check_size(width, height, "surface")
        if surface_format not in _FORMATS:
            raise RemoteProtocolError(f"SPICE surface of format {surface_format}: only 32 bits a pixel are supported")
        self._drawn = None  # its memory
        self._drawn = Framebuffer(width, height)
        self.work += width * height * PIXEL
        self._primary = number
        if self.complete:
            self._show()

    def _show(self) -> None:
        if self._drawn is not None and self.shown is not self._drawn:
            self.shown = self._drawn
            self.shown.touch_all()

    def _configure(self, body: memoryview) -> None:
        number, _ = struct.unpack_from("<HH", body)
        if number > MAX_MONITORS:
            raise RemoteProtocolError(f"SPICE MONITORS_CONFIG of {number} monitors, more than {MAX_MONITORS}")
        monitors = []
        for index in range(number):
            _, _, width, height, x, y, _ = _MONITOR.unpack_from(body, 4 + index * _MONITOR.size)
            monitors.append(Rect(x, y, x + width, y + height))
        self.monitors = tuple(monitors)

    # Drawing

    def _base(self, body: memoryview) -> tuple[int, Rect, list[Rect]]:
        """Return where the rest of a drawing operation is, its box, and the visible parts of it."""
        surface, top, left, bottom, right, clip = _BASE.unpack_from(body)
        position = _BASE.size
        box = Rect(left, top, right, bottom)
        if left > right or top > bottom:
            raise RemoteProtocolError(f"SPICE box with the corners {left},{top} and {right},{bottom}")
        clips: list[Rect] | None = None
        if clip == _CLIP_RECTS:
            (number,) = _U32.unpack_from(body, position)
            position += _U32.size
            if number > MAX_CLIP:
                raise RemoteProtocolError(f"SPICE clip region of {number} rectangles, more than {MAX_CLIP}")
            rects = body[position : position + number * _RECT.size]
            position += number * _RECT.size
            if len(rects) < number * _RECT.size:
                raise RemoteProtocolError(f"SPICE clip region of {number} rectangles: it is not complete")
            clips = [Rect(x1, y1, x2, y2) for y1, x1, y2, x2 in _RECT.iter_unpack(rects)]
        elif clip != _CLIP_NONE:
            raise RemoteProtocolError(f"SPICE clip region of type {clip}")
        drawn = self._drawn
        if drawn is None or surface != self._primary:
            return position, box, []
        inside = box.intersection(drawn.bounds)
        parts = [inside] if clips is None else [inside.intersection(rect) for rect in clips]
        visible = [rect for rect in parts if not rect.is_empty]
        area = sum([rect.area for rect in visible])
        rows = sum([rect.bottom - rect.top for rect in visible])
        self.work += area * PIXEL + rows * ROW_WORK + len(parts) * CLIP_WORK
        if area > drawn.width * drawn.height:
            raise Unsupported("a clip region that overlaps itself")
        if rows > MAX_ROWS:
            raise Unsupported("a clip region of many narrow parts")
        return position, box, visible

    def _draw_copy(self, body: memoryview, picture: Picture | None = None, *, decode: bool = True) -> int | None:
        """Draw an image; return where it is if it is large, and neither decoded nor to be decoded now."""
        position, box, visible = self._base(body)
        offset, top, left, bottom, right, rop, _, _, _, _, mask = _COPY.unpack_from(body, position)
        if not visible:
            return None
        if rop != _PUT or mask:
            raise Unsupported(f"DRAW_COPY with the raster operation {rop}{' and a mask' if mask else ''}")
        if (right - left, bottom - top) != (box.right - box.left, box.bottom - box.top):
            raise Unsupported("DRAW_COPY of another size")
        if picture is None:
            if not decode and image_pixels(body, offset) >= LARGE:
                return int(offset)
            picture = decode_image(body, offset)
        self.work += picture.width * picture.height * PIXEL
        if left < 0 or top < 0 or right > picture.width or bottom > picture.height:
            raise RemoteProtocolError(
                f"SPICE DRAW_COPY of {left},{top} to {right},{bottom} of an image of {picture.width}x{picture.height}"
            )
        assert self._drawn is not None
        for rect in visible:
            self._drawn.put(rect, picture, left + rect.left - box.left, top + rect.top - box.top)
        return None

    def _copy_bits(self, body: memoryview) -> None:
        position, box, visible = self._base(body)
        x, y = _POINT.unpack_from(body, position)
        if not visible:
            return
        if len(visible) > 1:
            raise Unsupported("COPY_BITS with a clip region")  # the parts could overwrite each other's source
        assert self._drawn is not None
        move_x, move_y = x - box.left, y - box.top
        (rect,) = visible
        source = Rect(rect.left + move_x, rect.top + move_y, rect.right + move_x, rect.bottom + move_y)
        inside = source.intersection(self._drawn.bounds)
        if inside.is_empty:
            return
        target = Rect(inside.left - move_x, inside.top - move_y, inside.right - move_x, inside.bottom - move_y)
        self._drawn.copy(target, inside.left, inside.top)

    def _draw_fill(self, body: memoryview) -> None:
        position, _, visible = self._base(body)
        if body[position : position + 1] != bytes([_SOLID]):
            raise Unsupported("DRAW_FILL with a pattern")
        _, colour, rop, _, _, _, mask = _SOLID_FILL.unpack_from(body, position)
        if rop != _PUT or mask:
            raise Unsupported(f"DRAW_FILL with the raster operation {rop}{' and a mask' if mask else ''}")
        self._fill(visible, _U32.pack(colour & 0xFFFFFF))

    def _draw_plain(self, kind: int, body: memoryview) -> None:
        position, _, visible = self._base(body)
        if _MASK.unpack_from(body, position)[3]:
            raise Unsupported(f"{DisplayMessage(kind).name} with a mask")
        if kind != DisplayMessage.DRAW_INVERS:
            self._fill(visible, _BLACK if kind == DisplayMessage.DRAW_BLACKNESS else _WHITE)
        elif self._drawn is not None:
            for rect in visible:
                self._drawn.invert(rect)

    def _fill(self, visible: list[Rect], pixel: bytes) -> None:
        if self._drawn is not None:
            for rect in visible:
                self._drawn.fill(rect, pixel)
