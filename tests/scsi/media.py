from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeMedium:
    """A medium with properties that tests change."""

    block_count: int = 1000
    block_size: int = 512
    read_only: bool = False
    serial_number: str = "0123456789ABCDEF"
    unmaps: bool = True
    write_cache: bool = True
