"""Fixtures for guests: those of the pytest plugin, for coroutines.

All tests in this folder run on the event loop of the session. The fixture ``guest`` is the usual guest; ``guests``
lends guests by configuration to a test, ``session_guests`` to a fixture of a module. A test unplugs what it has plugged
in.
"""

from __future__ import annotations

import asyncio
import compileall
import inspect
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio
from tests.guest import command
from tests.guest.nested import REAL_DEVICES, Machine, Plugger
from tests.guest.plugging import LABORATORY, SCRIPTS

import farplug
from farplug.testing import GuestConfig, GuestFactory, GuestFixture, QemuGuest, SpicePort, TcpPort, UnixPort

TEST_TIMEOUT = 600
"""Seconds for a test in this folder: the first one may have to download the kernel."""

USUAL = replace(
    LABORATORY, ports=(SpicePort(), SpicePort(), TcpPort(), UnixPort(), TcpPort(properties=("streams=off",)))
)


@pytest.fixture(scope="session", autouse=True)
def _quick_start() -> Iterator[None]:
    """``farplug`` commands that asyncio starts are copies of a process: these tests are not about their start."""
    with pytest.MonkeyPatch.context() as patch:
        programs = SimpleNamespace(Popen=command.start, PIPE=subprocess.PIPE)
        patch.setattr("asyncio.unix_events.subprocess", programs)
        yield


class Guests:
    """Lends guests. The test's event loop runs while a guest boots or ends."""

    def __init__(self, lend: GuestFactory) -> None:
        self._lend = lend

    async def get(self, config: GuestConfig) -> QemuGuest:
        """Return a guest with this configuration, which other tests use too."""
        return (await asyncio.to_thread(self._lend, config)).vm

    @asynccontextmanager
    async def lent(self, config: GuestConfig, *, fresh: bool = False) -> AsyncIterator[QemuGuest]:
        """Lend a guest for the time of a block."""
        guest = await asyncio.to_thread(self._lend, config, fresh=fresh)
        try:
            yield guest.vm
        finally:
            await asyncio.to_thread(guest.__exit__, *sys.exc_info())

    def fresh(self, config: GuestConfig) -> AbstractAsyncContextManager[QemuGuest]:
        """Lend a guest that no other test uses, for the time of a block."""
        return self.lent(config, fresh=True)


@pytest.fixture(scope="session")
def farplug_guest_config() -> GuestConfig:
    """Return the usual guest's: two SPICE ports, a TCP, a UNIX, and a TCP port without streams, in this order."""
    return USUAL


@pytest.fixture
def guest(farplug_guest: GuestFixture) -> QemuGuest:
    """Return the usual guest."""
    return farplug_guest.vm


@pytest.fixture
def guests(farplug_guest_factory: GuestFactory) -> Guests:
    """Return what lends guests to a test: ``await guests.get(…)`` is shared, ``async with guests.fresh(…)`` is not."""
    return Guests(farplug_guest_factory)


@pytest.fixture(scope="session")
def session_guests(farplug_session_guest_factory: GuestFactory) -> Guests:
    """Return what lends guests to fixtures of a module: ``async with session_guests.lent(…)``."""
    return Guests(farplug_session_guest_factory)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def plugger(session_guests: Guests) -> AsyncIterator[Plugger]:
    """Run farplug in the near guest, a machine with real devices (``plugger.machine``)."""
    # Else the near guest, which is emulated, compiles the modules that have changed.
    await asyncio.to_thread(compileall.compile_dir, str(Path(farplug.__file__).parent), quiet=1)
    machine = Machine(await session_guests.get(REAL_DEVICES))
    await machine.check(f"ln -sfn {SCRIPTS} /scripts")
    async with Plugger.started(machine) as plugger:
        yield plugger


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
        config.option.farplug_require = True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test in this folder."""
    item.add_marker(pytest.mark.guest)
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
        item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
