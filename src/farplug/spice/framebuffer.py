"""The picture of a display: rows of BGRX pixels, and which cells of the picture changed when. No I/O."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from farplug.usb.types import Buffer

CELL = 64
"""The width and height of a cell, in pixels: changes are counted for each cell."""
PIXEL = 4
"""The bytes of a pixel: blue, green, red, and one that has no meaning."""
MAX_SIDE = 16384
"""The largest width and height of a surface or an image that we accept, in pixels."""

_serials = count(1)
"""Numbers of changes. All pictures of this process share them, so that the number of one is never valid in another."""


class Rect(NamedTuple):
    """A rectangle of pixels: the right column and the bottom row are outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def is_empty(self) -> bool:
        """Return whether the rectangle has no pixel."""
        return self.left >= self.right or self.top >= self.bottom

    @property
    def area(self) -> int:
        """Return the number of pixels."""
        return 0 if self.is_empty else (self.right - self.left) * (self.bottom - self.top)

    def intersection(self, other: Rect) -> Rect:
        """Return the pixels of both rectangles; the result may be empty."""
        left, top, right, bottom = self
        first, upper, last, lower = other
        if left >= first and top >= upper and right <= last and bottom <= lower:
            return self
        return Rect(max(left, first), max(top, upper), min(right, last), min(bottom, lower))


class Picture(NamedTuple):
    """Decoded pixels of an image, BGRX, as rows of ``stride`` bytes.

    Attributes:
        width: in pixels.
        height: in pixels.
        stride: bytes from one row to the next.
        top_down: the first row is the top one.
        pixels: ``height`` rows.
    """

    width: int
    height: int
    stride: int
    top_down: bool
    pixels: Buffer


class Framebuffer:
    """The pixels of one surface. A new one is black.

    The rectangles of its methods must be inside the surface, and not empty.

    Args:
        width: in pixels, at least 1.
        height: in pixels, at least 1.

    Attributes:
        width: as above.
        height: as above.
        bounds: the rectangle of the whole surface.
        serial: the number of the last change.
        pixels: ``width * height`` BGRX pixels, the top row first.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self.bounds = Rect(0, 0, width, height)
        self.serial = next(_serials)
        self.pixels = memoryview(bytearray(width * height * PIXEL))
        self._columns = -(-width // CELL)
        self._cells = array("Q", [self.serial]) * (self._columns * -(-height // CELL))

    def changed_since(self, serial: int) -> Iterator[Rect]:
        """Yield rectangles that hold all changes after a number, which may be that of another surface.

        The rectangles do not overlap: each has the changed cells of one row of cells that are side by side.
        """
        columns, cells = self._columns, self._cells
        for start in range(0, len(cells), columns):
            top = start // columns * CELL
            bottom = min(top + CELL, self.height)
            first: int | None = None
            for column, changed in enumerate(cells[start : start + columns]):
                if changed > serial:
                    first = column if first is None else first
                elif first is not None:
                    yield Rect(first * CELL, top, column * CELL, bottom)
                    first = None
            if first is not None:
                yield Rect(first * CELL, top, self.width, bottom)

    def cells_changed_since(self, serial: int) -> int:
        """Return the number of cells with a change after a number."""
        return sum(changed > serial for changed in self._cells)

    def rows(self, box: Rect) -> Iterator[memoryview]:
        """Yield the pixels of a rectangle from its top: parts of the picture, which change with it."""
        pitch = self.width * PIXEL
        size = (box.right - box.left) * PIXEL
        start = box.top * pitch + box.left * PIXEL
        if size == pitch:
            yield self.pixels[start : start + (box.bottom - box.top) * pitch]
            return
        for at in range(start, start + (box.bottom - box.top) * pitch, pitch):
            yield self.pixels[at : at + size]

    def touch_all(self) -> None:
        """Count the whole surface as changed: it takes the place of another one."""
        self._touch(self.bounds)

    def put(self, box: Rect, picture: Picture, left: int, top: int) -> None:
        """Copy pixels of a picture, which has all of them.

        Args:
            box: where to.
            picture: where from.
            left: the column of the picture that comes to the left side of the box.
            top: the row of the picture that comes to the top of the box.
        """
        target, source = self.pixels, picture.pixels
        size = (box.right - box.left) * PIXEL
        pitch, stride = self.width * PIXEL, picture.stride
        at = box.top * pitch + box.left * PIXEL
        rows = box.bottom - box.top
        if picture.top_down:
            position = top * stride + left * PIXEL
        else:
            position, stride = (picture.height - 1 - top) * stride + left * PIXEL, -stride
        if size == pitch == stride:
            target[at : at + rows * size] = source[position : position + rows * size]
        else:
            for start in range(at, at + rows * pitch, pitch):
                target[start : start + size] = source[position : position + size]
                position += stride
        self._touch(box)

    def fill(self, box: Rect, pixel: bytes) -> None:
        """Set all pixels of a rectangle to a BGRX value of 4 bytes."""
        size = (box.right - box.left) * PIXEL
        pitch = self.width * PIXEL
        row = pixel * (box.right - box.left)
        start = box.top * pitch + box.left * PIXEL
        for at in range(start, start + (box.bottom - box.top) * pitch, pitch):
            self.pixels[at : at + size] = row
        self._touch(box)

    def copy(self, box: Rect, left: int, top: int) -> None:
        """Copy pixels to a rectangle from another one, which may overlap and has its left top corner at a point."""
        pixels = self.pixels
        size = (box.right - box.left) * PIXEL
        pitch = self.width * PIXEL
        rows = range(box.bottom - box.top)
        for row in reversed(rows) if top < box.top else rows:
            at = (box.top + row) * pitch + box.left * PIXEL
            position = (top + row) * pitch + left * PIXEL
            pixels[at : at + size] = pixels[position : position + size]  # memmove: the two may overlap
        self._touch(box)

    def invert(self, box: Rect) -> None:
        """Invert all pixels of a rectangle."""
        size = (box.right - box.left) * PIXEL
        pitch = self.width * PIXEL
        start = box.top * pitch + box.left * PIXEL
        for at in range(start, start + (box.bottom - box.top) * pitch, pitch):
            self.pixels[at : at + size] = bytes(self.pixels[at : at + size]).translate(_INVERTED)
        self._touch(box)

    def _touch(self, box: Rect) -> None:
        serial = self.serial = next(_serials)
        first, last = box.left // CELL, (box.right - 1) // CELL
        top, bottom = box.top // CELL, (box.bottom - 1) // CELL
        if first == last:
            for index in range(top * self._columns + first, bottom * self._columns + first + 1, self._columns):
                self._cells[index] = serial
            return
        row = array("Q", [serial]) * (last - first + 1)
        for start in range(top * self._columns + first, bottom * self._columns + first + 1, self._columns):
            self._cells[start : start + len(row)] = row


_INVERTED = bytes(255 - value for value in range(256))
