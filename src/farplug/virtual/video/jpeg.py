"""JPEG images: where one ends and the next one begins, and how large it is. Nothing is decoded.

Source: ITU-T T.81, annex B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from farplug.virtual.video.modes import MAX_FRAME, MAX_SIDE

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_BASELINE: Final = 0xC0
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers (SOFn): DHT, JPG and DAC have other meanings."""
_RESTARTS: Final = range(0xD0, 0xD8)
_TEM: Final = 0x01


class Content(Protocol):
    """The content of a file: ``bytes``, or an object that reads parts of the file."""

    def __getitem__(self, place: slice, /) -> bytes: ...

    def find(self, part: bytes, start: int, /) -> int:
        """Return where a part is, at an offset or behind it; -1: nowhere."""
        ...


class JpegError(ValueError):
    """The data is not a JPEG image that a camera sends."""


@dataclass(frozen=True, slots=True)
class Jpeg:
    """An image within data.

    Attributes:
        start: its offset.
        end: the offset behind it.
        width: pixels in a row.
        height: rows.
    """

    start: int
    end: int
    width: int
    height: int


class Finder:
    """Finds images in the content of a file."""

    def __init__(self, data: Content) -> None:
        self._data = data

    def image(self, start: int) -> Jpeg:
        """Return the image that begins at an offset.

        Raises:
            JpegError: there is no image, or not a baseline one, or it is damaged or too large.
        """
        data = self._data
        if data[start : start + 2] != bytes((0xFF, _SOI)):
            raise JpegError("it does not begin as a JPEG image")
        at = start + 2
        size: tuple[int, int] | None = None
        while True:
            marker, at = self._marker(at, start)
            if marker == _EOI:
                break
            if marker in _RESTARTS or marker in (_TEM, _SOI, 0):
                raise JpegError("it is damaged: a marker is in a wrong place")
            length = int.from_bytes(data[at : at + 2], "big")
            segment = data[at + 2 : at + length]
            if length < 2 or len(segment) != length - 2:
                raise JpegError("it is truncated")
            at += length
            if marker in _FRAMES:
                if marker != _BASELINE:
                    raise JpegError("it is a progressive or lossless JPEG image; cameras send baseline ones")
                if size is not None or length < 8:
                    raise JpegError("it is damaged: its size is missing, or there twice")
                size = int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big")
            elif marker == _SOS:
                at = self._entropy_end(at)
            if at - start > MAX_FRAME:
                raise JpegError(f"it has more than {MAX_FRAME >> 20} MiB")
        if size is None or not all(0 < side <= MAX_SIDE for side in size):
            raise JpegError(f"its sides are not 1 to {MAX_SIDE} pixels")
        return Jpeg(start, at, *size)

    def next_start(self, at: int) -> int:
        """Return where the next image begins; -1: there is none. Bytes between images are skipped."""
        return self._data.find(bytes((0xFF, _SOI)), at)

    def _marker(self, at: int, start: int) -> tuple[int, int]:
        """Return a marker, and the offset behind it; bytes FF in front of it are fill bytes."""
        data = self._data
        if data[at : at + 1] != b"\xff":
            raise JpegError("it is truncated or damaged: a marker is missing")
        while data[at : at + 1] == b"\xff":
            at += 1
            if at - start > MAX_FRAME:
                raise JpegError(f"it has more than {MAX_FRAME >> 20} MiB")
        if not (marker := data[at : at + 1]):
            raise JpegError("it is truncated")
        return marker[0], at + 1

    def _entropy_end(self, at: int) -> int:
        """Return where the next marker after entropy-coded data is."""
        begin = at
        while True:
            at = self._data.find(b"\xff", at)
            if at < 0 or at - begin > MAX_FRAME or not (pair := self._data[at + 1 : at + 2]):
                raise JpegError("it is truncated, or too large")
            following = pair[0]
            if following and following not in _RESTARTS and following != 0xFF:
                return at
            at += 1 if following == 0xFF else 2
