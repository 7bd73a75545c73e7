"""Pictures of a screen: kept current, compared, cut, and made smaller. Pixels have 4 bytes: blue, green, red."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from farplug.app.png import encode_png
from farplug.control.messages import Buffer
from farplug.errors import RemoteProtocolError
from farplug.text import shown

PIXEL: Final = 4
"""Bytes of a pixel."""
MAX_EDGE: Final = 1280
MAX_PIXELS: Final = 1280 * 800
"""Of an image for a model. Models make larger ones smaller by themselves, and then miss what they click at."""
MAX_SIDE: Final = 1 << 14
MAX_AREA: Final = 1 << 26
"""Of a screen: more than any display of SPICE."""


class Box(NamedTuple):
    """A rectangle; ``right`` and ``bottom`` are behind it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Return the number of rows."""
        return self.bottom - self.top

    def union(self, other: Box | None) -> Box:
        """Return the smallest rectangle with both."""
        if other is None:
            return self
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )


@dataclass(slots=True, eq=False)
class Mark:
    """Collects what changes in a picture after a moment.

    Attributes:
        changed: a rectangle with all that has changed; None: nothing has.
    """

    changed: Box | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that does not change.

    Attributes:
        width: in pixels.
        height: in pixels.
        pixels: the top row first.
    """

    width: int
    height: int
    pixels: bytes = field(repr=False)

    def cut(self, box: Box) -> Picture:
        """Return a part of the picture. The rectangle must be inside."""
        rows = memoryview(self.pixels)
        return Picture(box.width, box.height, b"".join(_rows(rows, self.width, box)))

    def fitted(self) -> Picture:
        """Return the picture in a size for models: see :func:`fitted_size`."""
        width, height = fitted_size(self.width, self.height)
        return self.scaled(width, height)

    def scaled(self, width: int, height: int) -> Picture:
        """Return the picture in a smaller size. Each pixel is the mean of pixels that cover its place."""
        if (width, height) == (self.width, self.height):
            return self
        rows = memoryview(self.pixels)
        stride = PIXEL * self.width
        tall = array("I")  # with all columns, and only the rows of the result
        for tops in zip(*_samples(self.height, height), strict=True):
            tall.frombytes(_mean([rows[top * stride : (top + 1) * stride] for top in tops]))
        # The columns repeat: slices with a step take them from all rows at once.
        period = math.gcd(self.width, width)
        old, new = self.width // period, width // period
        samples = []
        for columns in _samples(old, new):
            sample = array("I", bytes(PIXEL * width * height))
            for to, column in enumerate(columns):
                sample[to::new] = tall[column::old]
            samples.append(sample.tobytes())
        return Picture(width, height, _mean(samples))

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        return encode_png(self.width, self.height, self.pixels)


def fitted_size(width: int, height: int) -> tuple[int, int]:
    """Return the size of an image of a screen: at most MAX_EDGE wide and high, with MAX_PIXELS, and never larger."""
    factor = min(1.0, MAX_EDGE / width, MAX_EDGE / height, (MAX_PIXELS / (width * height)) ** 0.5)
    return max(1, int(width * factor + 1e-6)), max(1, int(height * factor + 1e-6))


def _samples(old: int, new: int) -> list[list[int]]:
    """Return lists with a position in ``old`` for each of ``new`` places: all lists together have every position.

    The number of lists is a power of two.
    """
    count = 1
    while count * new < old:
        count *= 2
    return [[(2 * (count * at + one) + 1) * old // (2 * count * new) for at in range(new)] for one in range(count)]


def _mean(rows: Sequence[bytes | memoryview]) -> bytes:
    """Return the means of the bytes of 2ⁿ rows, rounded down: (a & b) + ((a ^ b) >> 1) has no carries between bytes."""
    size = len(rows[0])
    if len(rows) == 1:
        return bytes(rows[0])
    numbers = [int.from_bytes(row, "little") for row in rows]
    mask = int.from_bytes(b"\x7f" * size, "little")
    while len(numbers) > 1:
        pairs = iter(numbers)
        numbers = [(a & b) + (((a ^ b) >> 1) & mask) for a, b in zip(pairs, pairs, strict=True)]
    return numbers[0].to_bytes(size, "little")


def _rows(pixels: memoryview, width: int, box: Box) -> list[memoryview]:
    return [
        pixels[PIXEL * (row * width + box.left) : PIXEL * (row * width + box.right)]
        for row in range(box.top, box.bottom)
    ]


class Screen:
    """The picture of a display, kept current with events ``screen``.

    Attributes:
        width: in pixels; 0: there is no picture yet.
        height: in pixels.
        complete: whether all of the last change is there.
    """

    def __init__(self) -> None:
        self.width = self.height = 0
        self.complete = False
        self._pixels = bytearray()
        self._marks: list[Mark] = []

    def apply(self, data: Any, payload: Buffer | None) -> None:
        """Draw what an event ``screen`` has.

        Raises:
            RemoteProtocolError: it does not fit.
        """
        width, height, rects = data.get("width"), data.get("height"), data.get("rects")
        if not (_is_side(width) and _is_side(height) and width * height <= MAX_AREA and isinstance(rects, list)):
            raise RemoteProtocolError(f"{shown(data)} is not a picture")
        if (width, height) != (self.width, self.height):
            self.width, self.height = width, height
            self._pixels = bytearray(PIXEL * width * height)
            self._changed(Box(0, 0, width, height))
        source, at = memoryview(payload or b""), 0
        for rect in rects:
            box = self._box(rect)
            size = PIXEL * box.width
            if at + size * box.height > len(source):
                raise RemoteProtocolError("a picture has fewer pixels than its rectangles")
            differs: Box | None = None
            for row in range(box.top, box.bottom):
                start = PIXEL * (row * width + box.left)
                line = source[at : at + size]
                at += size
                if self._pixels[start : start + size] != line:
                    self._pixels[start : start + size] = line
                    differs = Box(box.left, row, box.right, row + 1).union(differs)
            if differs is not None:
                self._changed(differs)
        if at != len(source):
            raise RemoteProtocolError("a picture has more pixels than its rectangles")
        self.complete = data.get("last") is True

    def clear(self) -> None:
        """Forget the picture: the VM shows none, or another one."""
        self.complete = False

    def mark(self) -> Mark:
        """Return a mark that collects what changes from now on, until :meth:`drop`."""
        mark = Mark()
        self._marks.append(mark)
        return mark

    def drop(self, mark: Mark) -> None:
        """Let a mark collect nothing more."""
        self._marks.remove(mark)

    def picture(self) -> Picture:
        """Return the picture as it is now."""
        return Picture(self.width, self.height, bytes(self._pixels))

    def same(self, other: Picture, box: Box) -> bool:
        """Return whether a rectangle looks as in another picture of the same screen."""
        if (self.width, self.height) != (other.width, other.height):
            return False
        ours, theirs = memoryview(self._pixels), memoryview(other.pixels)
        return _rows(ours, self.width, box) == _rows(theirs, self.width, box)

    def _changed(self, box: Box) -> None:
        for mark in self._marks:
            mark.changed = box.union(mark.changed)

    def _box(self, rect: Any) -> Box:
        if isinstance(rect, list) and len(rect) == 4 and all(type(value) is int for value in rect):
            left, top, width, height = rect
            if 0 <= left < left + width <= self.width and 0 <= top < top + height <= self.height:
                return Box(left, top, left + width, top + height)
        raise RemoteProtocolError(f"{shown(rect)} is not a rectangle of a picture")


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIDE
