"""Folders of a run: deleted at its end, or by the next run if it was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from farplug.testing.scratch import PREFIX, Scratch

WAIT = """
import sys
from farplug.testing.scratch import Scratch
scratch = Scratch()
(scratch.path / "memory").write_bytes(bytes(4096))
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_folder_is_deleted_at_the_end(tmp_path: Path) -> None:
    scratch = Scratch()
    assert scratch.path.parent == tmp_path
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    (scratch.path / "memory").write_bytes(b"1")
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    assert run.stdout is not None
    left = Path(run.stdout.readline().strip())
    first = Scratch()
    assert (left / "memory").exists(), "its process runs"
    run.kill()
    run.communicate()
    second = Scratch()
    assert not left.exists()
    assert first.path.exists()
    first.close()
    second.close()


def test_what_is_not_a_folder_of_a_run_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".lock").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    begun = tmp_path / f"{PREFIX}begun"
    begun.mkdir()
    Scratch().close()
    assert elsewhere.exists()
    assert begun.exists(), "its process may have just made it"
