"""For all tests."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from farplug import rate_limit
from farplug.app import typing as typing_module
from farplug.errors import SetupError
from farplug.programs import find_program

# A busy machine takes longer than Hypothesis permits an example, and its making, by default.
settings.register_profile("farplug", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("farplug")


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
def _log() -> Iterator[None]:
    """Let no test have log lines counted that an earlier one caused, or the level that a command has set."""
    for limit in rate_limit._log_limits.values():
        limit.release()
        limit._limit._kinds.clear()
    logger = logging.getLogger("farplug")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _unread_input_devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a real guest reads from a keyboard that is plugged in for it: with others the wait is short."""
    if request.node.get_closest_marker("guest") is None:
        monkeypatch.setattr(typing_module, "READ_TIMEOUT", 0.3)


GROUPS = (
    ("tests/guest/test_nested_",),
    (
        "tests/guest/test_integrity",
        "tests/guest/test_bulk_only",
        "tests/guest/test_chapter9",
        "tests/guest/test_killed",
        "tests/guest/test_power_loss",
        "tests/guest/test_stress",
        "tests/guest/test_usbtest",
    ),
    ("tests/guest/test_survival", "tests/guest/test_disk", "tests/guest/test_cli"),
    ("tests/guest/test_run", "tests/guest/test_kerbside_service"),
    ("tests/guest/",),
)
"""Beginnings of the names of files whose tests use the same guests: nested ones, the one of the long tests, the usual
one; and of those that wait most of the time. Of other files with guests each is a group of its own. The group that
takes longest comes first."""


class Groups(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Runs the tests of a group of files in one process, so that it boots their guests once; other files one by one.

    The groups begin in the order of :data:`GROUPS`, and what takes seconds last: no process is left alone with a group.
    One process begins at the end and runs tests without guests only: they use the processor while guests wait.
    """

    def _split_scope(self, nodeid: str) -> str:
        scope = str(super()._split_scope(nodeid))
        return scope if (index := group_of(nodeid)) >= len(GROUPS) - 1 else str(index)

    @cached_property
    def _without_guests(self) -> Any:
        """The process that runs no test with a guest; None if all tests are of one kind."""
        kinds = {group_of(nodeid) == len(GROUPS) for nodeid in self.collection}
        return self.nodes[-1] if len(kinds) == 2 and len(self.nodes) > 1 else None

    def _assign_work_unit(self, node: Any) -> None:
        if node is self._without_guests:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        if self.workqueue and node is self._without_guests:
            last = next(iter(self.workqueue[next(reversed(self.workqueue))]))
            if group_of(last) < len(GROUPS):
                if not node.shutting_down:
                    node.shutdown()
                return
        super()._reschedule(node)


def group_of(nodeid: str) -> int:
    """Return the index of a test's group; the number of groups for a test without a guest."""
    return next((index for index, group in enumerate(GROUPS) if nodeid.startswith(group)), len(GROUPS))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from the tests themselves: it looks at millions of objects that stay until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by their groups: the scheduler takes them in this order."""
    items.sort(key=lambda item: group_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups | None:
    """For ``--dist loadfile``."""
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.fixture
def passt() -> None:
    """Skip the test where passt is missing."""
    try:
        find_program("passt")
    except SetupError as error:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            raise
        pytest.skip(error.message)
