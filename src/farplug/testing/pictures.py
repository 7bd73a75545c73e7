"""Pictures of screens: reference pictures that a screen is compared with, and a strip of several screens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from farplug.app.png import decode_png, encode_png
from farplug.app.screen import Frame
from farplug.errors import ImageError, Reason, from_oserror

PIXEL: Final = 4
STRIP_SIDE: Final = 1280
"""Pixels of a picture in a strip, in each direction, at most: larger ones lose rows and columns."""
GAP: Final = 4
"""White rows between two pictures of a strip."""


class Reference:
    """A picture that a screen is compared with. Transparent pixels are not compared.

    Args:
        path: of a PNG file.

    Attributes:
        width: in pixels.
        height: in pixels.
        compared: the number of pixels that are not transparent.

    Raises:
        ImageError: the file cannot be read, or is not a PNG file that :func:`~farplug.app.png.decode_png` reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise from_oserror(
                path,
                error,
                as_=ImageError,
                remedy="save the screen when it looks as it should, and check the picture: farplug_screen.save(path)",
            ) from error
        try:
            self.width, self.height, pixels = decode_png(data)
        except ImageError as error:
            raise ImageError(f"{path}: {error.message}", reason=error.reason, remedy=error.remedy) from error
        opaque = bytearray(len(pixels))
        for colour in range(3):
            opaque[colour::PIXEL] = pixels[3::PIXEL].translate(bytes(255) + b"\xff")  # 255 stays, all others are 0
        self._opaque = bytes(opaque)
        self._pixels = _masked(pixels, self._opaque)
        self.compared = self._opaque.count(0xFF) // 3
        if not self.compared:
            raise ImageError(f"{path} has no opaque pixel to compare", reason=Reason.EMPTY)

    def differing(self, frame: Frame, x: int = 0, y: int = 0) -> int:
        """Return the number of compared pixels that differ from a screen, with the reference's corner at a position.

        Pixels outside of the screen differ.
        """
        outside = max(0, x + self.width - frame.width), max(0, y + self.height - frame.height)
        if x < 0 or y < 0 or any(outside):
            return self.compared
        size = PIXEL * self.width
        start = PIXEL * (y * frame.width + x)
        cut = b"".join(
            frame.pixels[at : at + size]
            for at in range(start, start + PIXEL * frame.width * self.height, PIXEL * frame.width)
        )
        return count_differing(_masked(cut, self._opaque), self._pixels)

    def find(self, frame: Frame) -> tuple[int, int] | None:
        """Return the position of the first place of a screen that equals the reference; None: there is none."""
        row, left, key = self._key
        haystack = _masked(frame.pixels, b"\xff\xff\xff\0" * (frame.width * frame.height))
        pitch = PIXEL * frame.width
        for y in range(frame.height - self.height + 1):
            start = (y + row) * pitch
            at = haystack.find(key, start, start + pitch)
            while at >= 0:
                x, rest = divmod(at - start, PIXEL)
                if rest == 0 and x >= left and not self.differing(frame, x - left, y):
                    return x - left, y
                at = haystack.find(key, at + 1, start + pitch)
        return None

    @cached_property
    def _key(self) -> tuple[int, int, bytes]:
        """Return a part of a row that is opaque, with as many colours as possible: its row, its first column, pixels.

        A row of one colour would be found at many places.
        """
        best: tuple[int, int, int, bytes] = (-1, 0, 0, b"")
        pitch = PIXEL * self.width
        for row in range(self.height):
            opaque = self._opaque[row * pitch : (row + 1) * pitch : PIXEL]
            longest = max(opaque.split(b"\0"), key=len)
            left = opaque.find(longest)
            start = row * pitch + PIXEL * left
            key = self._pixels[start : start + PIXEL * len(longest)]
            colours = len({*memoryview(key).cast("I")})
            if colours > best[0]:
                best = (colours, row, left, key)
        return best[1:]


def count_differing(one: bytes, other: bytes) -> int:
    """Return the number of pixels that differ in two pictures of the same size, whose fourth bytes are 0."""
    lanes = len(one) // PIXEL
    difference = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    # In each lane of 32 bits: a difference of up to 2^24 - 1 plus 2^24 - 1 sets bit 24 unless it is 0.
    full = int.from_bytes(b"\xff\xff\xff\0" * lanes, "little")
    return (difference + full & int.from_bytes(b"\0\0\0\1" * lanes, "little")).bit_count()


def colours_only(frame: Frame) -> bytes:
    """Return the pixels of a frame with 0 in place of the fourth bytes, which have no meaning."""
    pixels = bytearray(frame.pixels)
    pixels[3::PIXEL] = bytes(len(pixels) // PIXEL)
    return bytes(pixels)


def _masked(pixels: bytes, mask: bytes) -> bytes:
    size = len(pixels)
    return (int.from_bytes(pixels, "little") & int.from_bytes(mask, "little")).to_bytes(size, "little")


def reduced(frame: Frame) -> Frame:
    """Return a picture with every n-th row and column, so that no side has more than :data:`STRIP_SIDE`."""
    step = -(-max(frame.width, frame.height) // STRIP_SIDE)
    if step == 1:
        return frame
    pixels = memoryview(frame.pixels).cast("I")
    rows = [
        pixels[start : start + frame.width : step].tobytes()
        for start in range(0, frame.width * frame.height, step * frame.width)
    ]
    return Frame(len(rows[0]) // PIXEL, len(rows), b"".join(rows), frame.serial)


def strip(frames: Sequence[Frame]) -> bytes:
    """Return a PNG file with pictures below each other, the first one at the top."""
    width = max(frame.width for frame in frames)
    gap = b"\xff" * (PIXEL * width * GAP)
    parts = []
    for frame in frames:
        size = PIXEL * frame.width
        fill = b"\xff" * (PIXEL * width - size)
        parts.append(
            b"".join(frame.pixels[at : at + size] + fill for at in range(0, size * frame.height, size))
            if fill
            else frame.pixels
        )
    pixels = gap.join(parts)
    return encode_png(width, len(pixels) // (PIXEL * width), pixels)
