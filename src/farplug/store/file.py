"""A store in a RAW image file or a block device."""

from __future__ import annotations

import logging
import os
from typing import Self

from farplug.store import holes
from farplug.store.base import BLOCK_SIZE, CacheMode, Stopped
from farplug.store.image import Check, Image, check_raw, image_error, serial_number
from farplug.store.threaded import ThreadedStore

log = logging.getLogger(__name__)


class FileStore(ThreadedStore):
    """A RAW image file, or a block device. Opened by :meth:`open`.

    If the file shrinks while it is open, reads and writes of the lost blocks fail, and the store keeps its size.

    Attributes:
        path: as the caller gave it.
        ignored: bytes after the last whole block, which are not part of the disk.
    """

    def __init__(self, image: Image, *, block_size: int, read_only: bool, cache: CacheMode) -> None:
        super().__init__()
        self.path = image.path
        self.name = str(image.path)
        self.read_only = read_only
        self.block_size = block_size
        self.block_count, self.ignored = divmod(image.size, block_size)
        self.unmaps = not read_only and holes.can_unmap(image.fd)
        self.write_cache = cache is not CacheMode.WRITETHROUGH
        self.serial_number = serial_number(image.path)
        self._image = image
        self._unsafe = cache is CacheMode.UNSAFE
        self._refreshing = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        block_size: int = BLOCK_SIZE,
        cache: CacheMode = CacheMode.WRITEBACK,
        force: bool = False,
        check: Check = check_raw,
    ) -> Self:
        """Open and lock an image, as :meth:`Image.open` does.

        Raises:
            ImageError: as :meth:`Image.open`.
        """
        image = Image.open(path, read_only=read_only, block_size=block_size, force=force, check=check)
        try:
            store = cls(image, block_size=block_size, read_only=read_only, cache=cache)
        except OSError as error:
            image.close()
            raise image_error(image.path, error, read_only) from error
        if store.ignored:
            log.warning(
                "%s: the size is not a multiple of the block size: the VM does not see the last %d bytes",
                path,
                store.ignored,
            )
        return store

    def refresh(self) -> None:
        if self._refreshing:
            return
        self._refreshing = True
        size = 0

        def read_size() -> None:
            nonlocal size
            size = self._image.size

        def finish(error: OSError | None) -> None:
            self._refreshing = False
            block_count = size // self.block_size
            # Blocks that a file lost by shrinking are medium errors: the disk keeps its size.
            if block_count > self.block_count:
                log.info("%s: grew from %d to %d blocks", self.name, self.block_count, block_count)
                self.block_count = block_count

        self._write_pool().run(read_size, finish)

    def abandon(self) -> None:
        """Close the image at once. Only before the first read or write."""
        self._close_files()

    def _read_cached(self, data: memoryview, offset: int) -> int:
        return self._image.read_cached(data, offset)

    def _read_blocking(self, data: memoryview, offset: int) -> None:
        self._image.read(data, offset)

    def _write_blocking(self, data: memoryview, offset: int) -> None:
        self._image.write(data, offset)

    def _zero_blocking(self, offset: int, length: int, unmap: bool, stopped: Stopped) -> None:
        self._image.zero(offset, length, unmap=unmap, stopped=stopped)

    def zero_step(self, *, unmap: bool) -> int:
        return self._image.zero_step(unmap=unmap)

    def _flush_blocking(self) -> None:
        if not self._unsafe:
            self._image.sync()

    def _free_space(self) -> int:
        return self._image.free_space

    def _close_files(self) -> None:
        self._image.close()
