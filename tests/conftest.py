"""For all tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling


def pytest_configure() -> None:
    """The same tests, whoever starts them."""
    # In the background, or with nohup, these are ignored; what the tests start would ignore them, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # With one of these pytest writes out the whole difference of two byte strings: minutes, if they are images.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)


class Files(LoadFileScheduling):  # type: ignore[misc]  # xdist tells no types
    """Each file's tests run in one process, and all that need nested guests in the same one: these are dear."""

    def _split_scope(self, nodeid: str) -> str:
        scope = str(super()._split_scope(nodeid))
        return "nested" if scope.startswith("tests/guest/test_nested_") else scope


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files | None:
    """For ``--dist loadfile``."""
    return Files(config, log) if config.getoption("dist") == "loadfile" else None
