"""The properties of a store that a disk reports, and the limits of commands."""

from __future__ import annotations

from typing import Protocol

MAX_TRANSFER_BLOCKS = 0xFFFF
"""The limit of commands that read, write or verify blocks: the most that READ(10) can name."""

MAX_WRITE_SAME_BLOCKS = 0x7FFFFF
"""The limit of WRITE SAME: what Linux uses if it does not read the limits (over Bulk-Only Transport)."""

MAX_UNMAP_BLOCKS = 0x7FFFFF
"""The limit of UNMAP, for the sum of its extents."""

MAX_UNMAP_EXTENTS = 256
"""The limit of UNMAP."""

OPTIMAL_TRANSFER = 1 << 20
"""Bytes. Linux reads ahead twice this length."""

PHYSICAL_BLOCK_SIZE = 4096
"""Bytes to which hosts should align: the page and file system block of this machine."""


class Medium(Protocol):
    """The properties of a store. Its size may change between two commands; the block size does not."""

    @property
    def block_count(self) -> int:
        """Return the number of blocks, at least 1."""
        ...

    @property
    def block_size(self) -> int:
        """Return the bytes in a block, 512 to 4096."""
        ...

    @property
    def read_only(self) -> bool:
        """Return whether writes end with DATA PROTECT."""
        ...

    @property
    def write_cache(self) -> bool:
        """Return whether writes are durable only after a flush. Otherwise they are durable when they are done."""
        ...

    @property
    def serial_number(self) -> str:
        """Return the serial number, in ASCII."""
        ...

    @property
    def unmaps(self) -> bool:
        """Return whether space can be released: with UNMAP, and with the UNMAP bit of WRITE SAME."""
        ...


def blocks_per_physical_block(medium: Medium) -> int:
    """Return the logical blocks in a physical block: 8 for 512e, 1 if the size is not a multiple of 4096 bytes."""
    if medium.block_count * medium.block_size % PHYSICAL_BLOCK_SIZE:
        return 1
    return PHYSICAL_BLOCK_SIZE // medium.block_size
