"""The types in the comments of the page's modules, where the TypeScript compiler is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def test_types() -> None:
    compiler = shutil.which("tsc")
    if compiler is None:
        pytest.skip("tsc is not installed")
    command = [compiler, "--pretty", "false", "-p", str(Path(__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout == ""
    assert found.returncode == 0
