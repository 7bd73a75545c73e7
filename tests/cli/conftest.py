from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests import starter
from tests.cli.support import Cli, blank

from farplug.cli.log import LOGGER


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line."""
    monkeypatch.delenv("FARPLUG_PASSWORD", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capfd)


@pytest.fixture(autouse=True)
def _no_other_sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions that an earlier test left are not found."""
    with tempfile.TemporaryDirectory(prefix="farplug-", ignore_cleanup_errors=True) as folder:  # short: for sockets
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    yield
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    LOGGER.setLevel(0)


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions in the background start as copies of a process: the test is not about their start."""
    programs = SimpleNamespace(Popen=starter.Popen, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("farplug.cli.background.subprocess", programs)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of zeros."""
    return blank(tmp_path / "disk.raw")
