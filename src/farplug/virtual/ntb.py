"""NCM transfer blocks (NTB): several Ethernet frames in one transfer. Sans-IO; the 16-bit format only.

Source: Subclass Specification for Network Control Model Devices 1.0 (Errata 1), chapter 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from farplug.usb.types import Buffer

MIN_FRAME: Final = 14
"""Bytes of an Ethernet header."""

ALIGNMENT: Final = 4
"""What the offsets in a block are multiples of. Windows refuses an adapter with less."""

_HEADER: Final = struct.Struct("<4sHHHH")
"""NTH16 (table 3-1): signature, length of the header, sequence, length of the block, offset of the first NDP16."""
_TABLE: Final = struct.Struct("<4sHH")
"""NDP16 (table 3-3): signature, length, offset of the next one. Entries of offset and length follow."""
_ENTRY: Final = struct.Struct("<HH")
_BLOCK_SIGNATURE, _TABLE_SIGNATURE = b"NCMH", b"NCM0"
_MIN_TABLE: Final = _TABLE.size + 2 * _ENTRY.size


class BlockReader:
    """Takes the blocks of a guest apart.

    What a block describes is bounded by its size: its frames together are not longer than the block, and its tables
    neither. So frames that overlap and tables that lead to each other are refused.
    """

    def __init__(self, max_frame: int) -> None:
        self._max_frame = max_frame

    def frames(self, block: bytes) -> list[memoryview]:
        """Return the frames of a block: views of it.

        Raises:
            ValueError: the block is not valid. None of its frames are used.
        """
        if len(block) < _HEADER.size:
            raise ValueError(f"it has {len(block)} bytes")
        signature, header, _, length, table = _HEADER.unpack_from(block)
        if signature != _BLOCK_SIGNATURE or header != _HEADER.size:
            raise ValueError("it does not begin with a header of the 16-bit format")
        if length > len(block):
            raise ValueError(f"its header has a length of {length} bytes, and it has {len(block)}")
        data = memoryview(block)[: length or len(block)]
        frames: list[memoryview] = []
        tables = total = 0
        while table:
            table, size = self._table(data, table, frames)
            tables += size
            if tables > len(data):
                raise ValueError("its tables lead to each other")
        for frame in frames:
            total += len(frame)
        if total > len(data):
            raise ValueError("its frames overlap")
        return frames

    def _table(self, data: memoryview, start: int, frames: list[memoryview]) -> tuple[int, int]:
        """Add the frames of a table. Return the offset of the next table, 0 for none, and the size of this one."""
        if start % ALIGNMENT or start < _HEADER.size or start + _MIN_TABLE > len(data):
            raise ValueError(f"a table begins at byte {start}")
        signature, size, following = _TABLE.unpack_from(data, start)
        if signature != _TABLE_SIGNATURE:
            raise ValueError("a table has another signature")
        if size < _MIN_TABLE or size % ALIGNMENT or start + size > len(data):
            raise ValueError(f"a table has {size} bytes")
        for index, length in _ENTRY.iter_unpack(data[start + _TABLE.size : start + size]):
            if not index or not length:
                break
            if index < _HEADER.size or index + length > len(data):
                raise ValueError(f"a frame of {length} bytes begins at byte {index}")
            if not MIN_FRAME <= length <= self._max_frame:
                raise ValueError(f"a frame has {length} bytes")
            frames.append(data[index : index + length])
        return following, size


class BlockWriter:
    """Puts frames into blocks for a guest."""

    def __init__(self) -> None:
        self._sequence = 0

    def blocks(self, frames: Sequence[Buffer], max_size: int) -> Iterator[bytes]:
        """Yield as few blocks as the frames need.

        Args:
            frames: each fits a block.
            max_size: bytes of a block, at most 65535.
        """
        part: list[Buffer] = []
        size = 0
        for frame in frames:
            needed = _ENTRY.size + _aligned(len(frame))
            if part and size + needed > max_size:
                yield self._block(part)
                part = []
            if not part:
                size = _HEADER.size + _TABLE.size + _ENTRY.size
            part.append(frame)
            size += needed
        if part:
            yield self._block(part)

    def _block(self, frames: Sequence[Buffer]) -> bytes:
        table = _TABLE.size + (len(frames) + 1) * _ENTRY.size
        index = _HEADER.size + table
        parts: list[Buffer] = []
        entries = []
        for number, frame in enumerate(frames, 1):
            entries.append(_ENTRY.pack(index, len(frame)))
            padding = _aligned(len(frame)) - len(frame) if number < len(frames) else 0
            parts += (frame, bytes(padding))
            index += len(frame) + padding
        header = _HEADER.pack(_BLOCK_SIGNATURE, _HEADER.size, self._sequence, index, _HEADER.size)
        self._sequence = (self._sequence + 1) & 0xFFFF
        entries.append(bytes(_ENTRY.size))
        return b"".join((header, _TABLE.pack(_TABLE_SIGNATURE, table, 0), *entries, *parts))


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
