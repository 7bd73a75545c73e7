from __future__ import annotations

import pytest
from tests.scsi.media import FakeMedium

from farplug.scsi.medium import blocks_per_physical_block


@pytest.mark.parametrize(
    ("blocks", "size", "expected"),
    [(8, 512, 8), (1, 512, 1), (1001, 512, 1), (1000, 512, 8), (1, 4096, 1), (7, 4096, 1)],
)
def test_physical_blocks(blocks: int, size: int, expected: int) -> None:
    assert blocks_per_physical_block(FakeMedium(blocks, size)) == expected
