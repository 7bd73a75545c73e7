"""What a disk needs of the place where its blocks live."""

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

BLOCK_SIZE = 512


class CacheMode(StrEnum):
    """When what was written is durable. The values are those of QEMU's cache option."""

    WRITEBACK = "writeback"
    """When the guest asks for it. The page cache of this machine is the disk's write cache."""
    WRITETHROUGH = "writethrough"
    """Before a write is done: the disk has no write cache."""
    UNSAFE = "unsafe"
    """When the kernel pleases, whatever the guest asks for, at a detach too. What was written survives the end of
    farplug, but not that of this machine: for disks that can be thrown away."""


class Store(ABC):
    """Blocks that can be read and written.

    Offsets and lengths are bytes, inside the store: callers check the range. ``done`` may be called before the method
    returns (the blocks are in memory) or later, always on the event loop's thread, in any order. Whoever passes
    ``data`` no longer changes it until ``done`` is called.

    Writes that overlap happen in the order of the calls, and a read sees what was written before it was called, also if
    nobody waits for the answers any more.

    Attributes:
        name: for people: a path.
        block_count: how many blocks there are, 1 at least. It may change at any time (:meth:`refresh`).
        block_size: bytes.
        read_only: writes are an error.
        unmaps: :meth:`zero` can give space back.
        write_cache: a write may be done before it is durable.
        temporary: what is written is lost when the store is closed.
        serial_number: upper-case hex digits, the same each time that this image is opened; two images differ.
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
        """Write ``data``. With a write cache it need not be durable yet when it is done."""

    @abstractmethod
    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool) -> None:
        """Make a range read as zeros: a write in every respect. With ``unmap`` its space is given back if possible."""

    @abstractmethod
    def flush(self, done: WriteDone) -> None:
        """Make everything durable whose write was done (or called) before this call (:attr:`CacheMode.UNSAFE`: wait for
        the writes).
        """

    def refresh(self) -> None:  # noqa: B027
        """Look at the size of the medium again: if it grew, ``block_count`` follows soon."""

    @abstractmethod
    async def close(self) -> None:
        """Wait for what is under way and give the store back. Does nothing the second time. It does not flush."""
