from __future__ import annotations

from pathlib import Path

import pytest
from tests.store.support import CONTENT


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path
