"""What a camera offers: encodings, sizes, and what one frame of them occupies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_SIDE: Final = 8192
"""Pixels of a side of a frame."""
MAX_FRAME: Final = 16 << 20
"""Bytes of one frame."""


class Encoding(StrEnum):
    """How the pixels of a frame are stored."""

    MJPEG = "mjpeg"
    """Each frame is a baseline JPEG image."""
    YUY2 = "yuy2"
    """Two bytes a pixel: Y0 U Y1 V for each two pixels of a row."""


@dataclass(frozen=True, slots=True)
class Mode:
    """An encoding and a size of the frames of a camera.

    Attributes:
        encoding: how pixels are stored.
        width: pixels in a row; an even number for YUY2.
        height: rows.
        frame_size: bytes of the largest frame; 0: those of an uncompressed frame.

    Raises:
        ValueError: a side is too small or too large, or the frame is too large.
    """

    encoding: Encoding
    width: int
    height: int
    frame_size: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE):
            raise ValueError(f"a frame of {self.width}x{self.height} pixels: a side has 1 to {MAX_SIDE}")
        if self.encoding is Encoding.YUY2 and self.width % 2:
            raise ValueError(f"a YUY2 frame has an even width, not {self.width}")
        if self.largest_frame > MAX_FRAME:
            raise ValueError(f"a frame of {self.largest_frame} bytes: at most {MAX_FRAME >> 20} MiB")

    @property
    def largest_frame(self) -> int:
        """Return the bytes of the largest frame."""
        return self.frame_size or self.width * self.height * 2

    def __str__(self) -> str:
        return f"{self.encoding} {self.width}x{self.height}"
