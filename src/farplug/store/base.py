"""The interface of a disk to the storage of its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

from farplug.usb.types import Buffer

ReadDone: TypeAlias = Callable[[Buffer, OSError | None], None]
"""Called once with all the bytes and None, or with no bytes and the error."""

WriteDone: TypeAlias = Callable[[OSError | None], None]
"""Called once: None, or the error."""

ProgressCallback: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total. An exception that it raises interrupts the work: the function that
was called cleans up, and raises it.
"""

CompareDone: TypeAlias = Callable[[bool, OSError | None], None]
"""Called once: whether the bytes are equal, and None; or False and the error."""

Stopped: TypeAlias = Callable[[], bool]
"""Returns whether an operation is no longer needed. Called in any thread."""

BLOCK_SIZE = 512

ZERO_STEP = 4 << 20
"""Bytes that :meth:`Store.zero` should zero at most where zeros have to be written: other writes wait for them."""


class CacheMode(StrEnum):
    """When written data is durable. The values are those of QEMU's cache option."""

    WRITEBACK = "writeback"
    """When the guest asks for it. The page cache of this machine is the disk's write cache."""
    WRITETHROUGH = "writethrough"
    """Before a write is done: the disk has no write cache."""
    UNSAFE = "unsafe"
    """When the kernel writes it back; no flush has an effect, not even at a detach. Written data survives the end of
    farplug, but not a crash of this machine: for disks that can be thrown away."""


def never_stopped() -> bool:
    """Return False: the operation is needed."""
    return False


class Store(ABC):
    """Blocks that can be read and written.

    Offsets and lengths are in bytes and inside the store: callers check the range. ``done`` may be called before the
    method returns (the blocks are in memory) or later, always on the event loop's thread, in any order. The caller does
    not change ``data``, also after ``done`` was called.

    Writes that overlap happen in the order of the calls, and a read returns the data of all writes that were called
    before it, completed or not.

    Attributes:
        name: text for a user: a path.
        block_count: number of blocks, at least 1. It may change at any time (:meth:`refresh`).
        block_size: bytes.
        read_only: writes are an error.
        unmaps: :meth:`zero` can release space.
        write_cache: a write may be done before it is durable.
        temporary: written data is lost when the store is closed.
        serial_number: upper-case hex digits, the same each time this image is opened, and different for each image.
    """

    name: str
    block_count: int
    block_size: int = BLOCK_SIZE
    read_only: bool = False
    unmaps: bool = False
    write_cache: bool = True
    temporary: bool = False
    serial_number: str

    @abstractmethod
    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read ``length`` bytes."""

    @abstractmethod
    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        """Write ``data``. With a write cache, the data may not be durable yet when ``done`` is called.

        If it cannot be written later, the next flush fails.
        """

    @abstractmethod
    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        """Write zeros to a range, with the guarantees of :meth:`write`.

        Args:
            offset: of the range.
            length: bytes; a caller zeroes a long range in steps of :meth:`zero_step`.
            done: called without an error also if the operation was stopped.
            unmap: release the space of the range if possible.
            stopped: once it returns True, the rest of the range may stay as it is.
        """

    def zero_step(self, *, unmap: bool) -> int:
        """Return the number of bytes that one :meth:`zero` should have."""
        return ZERO_STEP

    def verify(self, offset: int, length: int, done: WriteDone) -> None:
        """Check that a range can be read."""
        self.read(offset, length, lambda data, error: done(error))

    def compare(self, offset: int, data: Buffer, done: CompareDone) -> None:
        """Compare ``data`` with what :meth:`read` would return."""
        self.read(offset, len(data), lambda found, error: done(error is None and found == data, error))

    def fill(self, offset: int, block: bytes, count: int, done: WriteDone) -> None:
        """Write ``block`` ``count`` times, with the guarantees of :meth:`write`."""
        self.write(offset, block * count, done)

    @abstractmethod
    def flush(self, done: WriteDone) -> None:
        """Make all writes that were called before this call durable (:attr:`CacheMode.UNSAFE`: wait for them only)."""

    def refresh(self) -> None:
        """Check the size of the medium again. If it grew, ``block_count`` is updated soon after."""

    @abstractmethod
    async def close(self) -> None:
        """Wait for pending operations, then release the store, without a flush. The second call does nothing."""
