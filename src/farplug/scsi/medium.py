"""What a disk tells of the place where its blocks live, and the largest things that it takes at once."""

from __future__ import annotations

from typing import Protocol

MAX_TRANSFER_BLOCKS = 0xFFFF
"""Of one command whose data or blocks are read, written or verified: what a READ(10) can ask for."""

MAX_WRITE_SAME_BLOCKS = 0x7FFFFF
"""Of one WRITE SAME: what Linux asks for where it does not know the limits (over Bulk-Only Transport)."""

MAX_UNMAP_BLOCKS = 0x7FFFFF
"""Of one UNMAP, all its extents together."""

MAX_UNMAP_EXTENTS = 256
"""Of one UNMAP."""

OPTIMAL_TRANSFER = 1 << 20
"""Bytes. Linux reads ahead twice as much."""

PHYSICAL_BLOCK_SIZE = 4096
"""What hosts are asked to align to: the page and file system block of the machine that has the image."""


class Medium(Protocol):
    """The figures of a store. Its size may change between two commands, the block size does not."""

    @property
    def block_count(self) -> int:
        """How many blocks, 1 at least."""
        ...

    @property
    def block_size(self) -> int:
        """Bytes: 512 to 4096."""
        ...

    @property
    def read_only(self) -> bool:
        """Writes end with DATA PROTECT."""
        ...

    @property
    def write_cache(self) -> bool:
        """What was written is durable after a flush only. Without one it is as soon as the write is done."""
        ...

    @property
    def serial_number(self) -> str:
        """In ASCII."""
        ...

    @property
    def unmaps(self) -> bool:
        """Space can be given back: UNMAP is known, and WRITE SAME takes the bit of this name."""
        ...


def blocks_per_physical_block(medium: Medium) -> int:
    """Tell how many logical blocks make a physical one: 8 for 512e, 1 where the size is no multiple of 4096 bytes."""
    if medium.block_count * medium.block_size % PHYSICAL_BLOCK_SIZE:
        return 1
    return PHYSICAL_BLOCK_SIZE // medium.block_size
