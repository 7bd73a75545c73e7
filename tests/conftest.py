"""For all tests."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from farplug import rate_limit


def pytest_configure(config: pytest.Config) -> None:
    """Make the tests independent of the environment."""
    # In the background, or with nohup, these signals are ignored, and child processes would ignore them too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # With one of these pytest prints the whole difference of two byte strings, which takes minutes for images.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    # Many tests start Python, also in guests that read the files of this machine: let it find compiled modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Sockets and logs of sessions. Not below tmp_path: the path of a socket has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="farplug-")
    os.environ |= {"XDG_RUNTIME_DIR": folder, "XDG_STATE_HOME": folder}
    os.environ.pop("FARPLUG_SESSION", None)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True)
def _log_limits() -> None:
    """Let no test have log lines counted that an earlier one caused."""
    for limit in rate_limit._log_limits.values():
        limit.release()
        limit._limit._kinds.clear()


class Files(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Runs each file in one process, and all tests with nested guests in the same one: their guests are slow."""

    def _split_scope(self, nodeid: str) -> str:
        scope = str(super()._split_scope(nodeid))
        return "nested" if scope.startswith("tests/guest/test_nested_") else scope


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files | None:
    """For ``--dist loadfile``."""
    return Files(config, log) if config.getoption("dist") == "loadfile" else None
