"""Where the frames of a camera come from."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from farplug.errors import ImageError, Reason, Remedy, from_oserror
from farplug.shell import shell_word
from farplug.usb.types import Buffer
from farplug.virtual.video.jpeg import Finder, Jpeg, JpegError
from farplug.virtual.video.modes import MAX_FRAME, Encoding, Mode

MAX_FRAMES: Final = 1_000_000
"""Frames of a clip."""
MAX_IMAGES: Final = 10_000
"""Images of a folder."""
_SUFFIXES: Final = (".jpg", ".jpeg")


class FrameSource(ABC):
    """Makes the frames of a camera. A program of its own implements :attr:`modes` and :meth:`frame`."""

    @property
    @abstractmethod
    def modes(self) -> Sequence[Mode]:
        """Return what the guest can choose from, the default first: 1 to 64."""

    @abstractmethod
    async def frame(self, mode: Mode, number: int) -> Buffer:
        """Return a frame. An exception is reported, and the frame before is sent once more.

        Args:
            mode: one of :attr:`modes`.
            number: how many frames the guest got before, since it began to read.
        """

    async def close(self) -> None:
        """Release what is open. Closing a source twice has no effect."""


class MjpegFile(FrameSource):
    """A clip: JPEG images one after the other in a file, which is repeated. Made by :meth:`open`."""

    def __init__(self, path: Path, file: IO[bytes], frames: Sequence[Jpeg]) -> None:
        self._path = path
        self._file = file
        self._frames = frames
        first = frames[0]
        largest = max(frame.end - frame.start for frame in frames)
        self._modes = (Mode(Encoding.MJPEG, first.width, first.height, largest),)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MjpegFile:
        """Open a clip, and find its images.

        Raises:
            ImageError: the file cannot be read, or is not a sequence of baseline JPEG images of one size.
        """
        if sys.platform == "win32":
            raise ImageError(
                f"{os.fspath(path)}: farplug cannot read clips on this system", reason=Reason.UNSUPPORTED_SYSTEM
            )
        target = Path(path)
        file = _open(target)
        try:
            if not os.fstat(file.fileno()).st_size:
                raise ImageError(f"{target} is empty", reason=Reason.EMPTY, remedy="name a clip with an image or more")
            return cls(target, file, _index(target, Finder(_Parts(file.fileno()))))
        except OSError as error:
            file.close()
            raise from_oserror(path, error, as_=ImageError, problem="cannot be read") from error
        except BaseException:
            file.close()
            raise

    @property
    def modes(self) -> Sequence[Mode]:
        return self._modes

    async def frame(self, mode: Mode, number: int) -> Buffer:
        found = self._frames[number % len(self._frames)]
        data = await asyncio.to_thread(os.pread, self._file.fileno(), found.end - found.start, found.start)
        if len(data) != found.end - found.start or not data.startswith(b"\xff\xd8"):
            raise ImageError(f"{self._path} was changed while it was in use", reason=Reason.CHANGED)
        return data

    async def close(self) -> None:
        self._file.close()


class MjpegFolder(FrameSource):
    """A folder of JPEG images, in the order of their names, which is repeated. Made by :meth:`open`."""

    def __init__(self, images: Sequence[Path], mode: Mode) -> None:
        self._images = images
        self._mode = mode

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MjpegFolder:
        """Read the images of a folder.

        Raises:
            ImageError: the folder has no images, an image cannot be read, or the images have different sizes.
        """
        folder = Path(path)
        try:
            real = folder.resolve()
            images = [  # a link out of the folder would show what the folder does not have
                image
                for one in sorted(folder.iterdir())
                if one.suffix.lower() in _SUFFIXES and (image := one.resolve()).is_relative_to(real)
            ]
        except (OSError, ValueError) as error:
            raise from_oserror(path, error, as_=ImageError, problem="cannot be read") from error
        if not images:
            raise ImageError(
                f"{folder} has no JPEG images", reason=Reason.EMPTY, remedy="put images named *.jpg into the folder"
            )
        if len(images) > MAX_IMAGES:
            raise ImageError(
                f"{folder} has {len(images)} images: at most {MAX_IMAGES}",
                reason=Reason.TOO_LARGE,
                remedy="make a clip",
            )
        first: Jpeg | None = None
        largest = 0
        for one in images:
            data = _read(one)
            try:
                found = Finder(data).image(0)
            except JpegError as error:
                raise _not_jpeg(one, error) from error
            first = first or found
            _check_size(one, found, first)
            largest = max(largest, len(data))
        assert first is not None
        return cls(images, Mode(Encoding.MJPEG, first.width, first.height, largest))

    @property
    def modes(self) -> Sequence[Mode]:
        return (self._mode,)

    async def frame(self, mode: Mode, number: int) -> Buffer:
        path = self._images[number % len(self._images)]
        data = await asyncio.to_thread(_read, path)
        try:
            found = Finder(data).image(0)
        except JpegError as error:
            raise _not_jpeg(path, error) from error
        if (found.width, found.height) != (mode.width, mode.height) or len(data) > mode.largest_frame:
            raise ImageError(f"{path} was changed while it was in use", reason=Reason.CHANGED)
        return data


def open_frames(path: str | os.PathLike[str]) -> FrameSource:
    """Open a clip or a folder of images.

    Raises:
        ImageError: it cannot be used.
    """
    return MjpegFolder.open(path) if os.path.isdir(path) else MjpegFile.open(path)


def _open(path: Path) -> IO[bytes]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise from_oserror(path, error, as_=ImageError) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{path} is not a file", reason=Reason.NOT_A_FILE, remedy="name a clip, or a folder of images")
    return open(descriptor, "rb")


class _Parts:
    """The content of an open file, of which a part is in memory: a memory map ends the process if the file is cut."""

    SIZE: Final = 1 << 20

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._start = 0
        self._part = b""

    def __getitem__(self, place: slice, /) -> bytes:
        start, stop, _ = place.indices(self._size)
        if not self._start <= start <= stop <= self._start + len(self._part):
            self._load(start, max(self.SIZE, stop - start))
        return self._part[start - self._start : max(0, stop - self._start)]

    def find(self, part: bytes, start: int, /) -> int:
        while start < self._size:
            if not self._start <= start < self._start + len(self._part) - len(part) + 1:
                self._load(start, self.SIZE)
                if len(self._part) < len(part):
                    return -1
            found = self._part.find(part, start - self._start)
            if found >= 0:
                return found + self._start
            start = self._start + len(self._part) - len(part) + 1
        return -1

    def _load(self, start: int, size: int) -> None:
        self._start, self._part = start, os.pread(self._descriptor, size, start)


def _read(path: Path) -> bytes:
    """Return the content of an image."""
    with _open(path) as file:
        try:
            data = file.read(MAX_FRAME + 1)
        except OSError as error:
            raise from_oserror(path, error, as_=ImageError, problem="cannot be read") from error
    if len(data) > MAX_FRAME:
        raise ImageError(f"{path} has more than {MAX_FRAME >> 20} MiB", reason=Reason.TOO_LARGE)
    return data


def _index(path: Path, finder: Finder) -> list[Jpeg]:
    """Return the images of a clip."""
    frames: list[Jpeg] = []
    at = 0
    while at >= 0:
        try:
            found = finder.image(at)
        except JpegError as error:
            if not frames:
                raise _not_jpeg(path, error) from error
            raise ImageError(
                f"{path}: image {len(frames)}: {error}", reason=Reason.DAMAGED, remedy=_remedy(path)
            ) from error
        if frames:
            _check_size(path, found, frames[0], f": image {len(frames)}")
        frames.append(found)
        if len(frames) > MAX_FRAMES:
            raise ImageError(
                f"{path} has more than {MAX_FRAMES} images", reason=Reason.TOO_LARGE, remedy="name a shorter clip"
            )
        at = finder.next_start(found.end)
    return frames


def _check_size(path: Path, found: Jpeg, first: Jpeg, which: str = "") -> None:
    if (found.width, found.height) != (first.width, first.height):
        raise ImageError(
            f"{path}{which} has {found.width}x{found.height} pixels, the first image {first.width}x{first.height}",
            reason=Reason.WRONG_FORMAT,
            remedy="give all images the same size",
        )


def _not_jpeg(path: Path, error: JpegError) -> ImageError:
    return ImageError(f"{path}: {error}", reason=Reason.WRONG_FORMAT, remedy=_remedy(path))


def _remedy(path: Path) -> Remedy:
    new = f"{path.stem}.mjpeg" if path.suffix != ".mjpeg" else f"{path.stem}-new.mjpeg"
    command = f"ffmpeg -i {shell_word(str(path))} -c:v mjpeg -pix_fmt yuvj420p -f mjpeg {shell_word(new)}"
    return Remedy("to make a clip of a video:", command=command)
