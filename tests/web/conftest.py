from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.web.support import Served


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment variables of a user whose sessions are in a folder of the test, with a short path."""
    runtime = tempfile.mkdtemp(prefix="farplug-", dir="/tmp")
    yield {"XDG_RUNTIME_DIR": runtime, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    shutil.rmtree(runtime)


@pytest.fixture
async def served(environment: dict[str, str]) -> AsyncIterator[Served]:
    """A page for all sessions."""
    async with Served.serve(environment, view_only=True) as served:
        yield served


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A web root, with something outside of it."""
    path = tmp_path / "root"
    (path / "iso").mkdir(parents=True)
    (tmp_path / "secret.img").write_bytes(bytes(512))
    (path / "disk.raw").write_bytes(bytes(1024))
    (path / "iso" / "debian.iso").write_bytes(bytes(32769) + b"CD001" + bytes(2042))
    return path
