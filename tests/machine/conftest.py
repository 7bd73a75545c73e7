from __future__ import annotations

from pathlib import Path

import pytest
from tests.machine.trees import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without devices."""
    return Machine(tmp_path)
