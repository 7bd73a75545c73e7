"""A store in memory: for tests, and for disks whose content may be lost."""

from __future__ import annotations

import errno
import secrets

from farplug.store.base import BLOCK_SIZE, ReadDone, Stopped, Store, WriteDone, never_stopped
from farplug.usb.types import Buffer


class MemoryStore(Store):
    """Blocks in a bytearray, lost when the process ends.

    Args:
        content: the initial bytes, whole blocks; or a number of bytes, all zero.
        block_size: bytes.
        read_only: refuse writes.
        serial_number: of the store; empty: a random one.

    Raises:
        ValueError: the content is not a positive number of blocks.
    """

    name = "memory"

    def __init__(
        self,
        content: bytes | int,
        *,
        block_size: int = BLOCK_SIZE,
        read_only: bool = False,
        serial_number: str = "",
    ) -> None:
        self.content = bytearray(content)
        if not self.content or len(self.content) % block_size:
            raise ValueError(f"{len(self.content)} bytes are not a positive number of {block_size}-byte blocks")
        self.block_size = block_size
        self.block_count = len(self.content) // block_size
        self.read_only = read_only
        self.serial_number = serial_number or secrets.token_hex(8).upper()

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        done(self.content[offset : offset + length], None)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        if self.read_only:
            done(OSError(errno.EROFS, "the store is read-only"))
            return
        self.content[offset : offset + len(data)] = data
        done(None)

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self.write(offset, bytes(length), done)

    def flush(self, done: WriteDone) -> None:
        done(None)

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""
