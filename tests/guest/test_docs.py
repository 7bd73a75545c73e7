"""The documentation's test in a real guest runs as printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs import ROOT, write_project


def test_the_linux_test_of_the_testing_page_runs_as_printed(tmp_path: Path) -> None:
    write_project(ROOT / "docs/testing.md", tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_in_linux.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout
