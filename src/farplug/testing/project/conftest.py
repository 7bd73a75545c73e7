"""What the tests share: a boot sector, in place of a firmware image or an operating system of yours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# 16-bit code at 0000:7C00: prints the text behind it on the screen and on the first serial port, then stops.
CODE = bytes.fromhex("31C0 31DB 8ED8 BE1B7C AC 84C0 740A B40E CD10 BAF803 EE EBF1 F4 EBFD")


@pytest.fixture
def bootable(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a disk image of 1 MiB, which prints a text when it is booted."""

    def make(text: str) -> Path:
        sector = (CODE + text.encode() + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"
        image = tmp_path / "bootable.raw"
        image.write_bytes(sector.ljust(1 << 20, b"\0"))
        return image

    return make
