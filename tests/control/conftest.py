from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """The environment variables of a user whose sessions are in a folder of the test, with a short path."""
    runtime = tempfile.mkdtemp(prefix="farplug-", dir="/tmp")
    yield {"XDG_RUNTIME_DIR": runtime}
    shutil.rmtree(runtime)


@pytest.fixture
def folder(environment: dict[str, str]) -> Path:
    return Path(environment["XDG_RUNTIME_DIR"]) / "farplug"
