"""Fixtures for guests, which are booted once and shared.

All tests in this folder run on the event loop of the session, so that they can share a guest. The fixture ``guest`` is
the usual guest; ``guests`` returns guests by configuration. A test unplugs what it has plugged in.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from tests.guest.nested import REAL_DEVICES, Machine, Plugger
from tests.guest.plugging import GUEST_TIMEOUT, NO_SCAN_DELAY, SCRIPTS

from farplug.errors import SetupError
from farplug.testing import Boot, CommandResult, GuestConfig, QemuGuest, SpicePort, TcpPort, UnixPort

HERE = Path(__file__).parent

MAX_GUESTS = 3
"""Maximum number of guests that a test process keeps running; the least recently used one is closed."""

TEST_TIMEOUT = 600
"""Seconds for a test in this folder: the first one may have to download the kernel."""

USUAL = GuestConfig(
    ports=(SpicePort(), SpicePort(), TcpPort(), UnixPort(), TcpPort(properties=("streams=off",))),
    kernel_arguments=NO_SCAN_DELAY,
    programs=("usbreset",),
)

CONSOLE_TAIL = 6000


class LongTimeoutGuest(QemuGuest):
    """A guest with timeouts for a busy machine."""

    async def booted(self, timeout: float = GUEST_TIMEOUT) -> None:
        await super().booted(timeout)

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float = GUEST_TIMEOUT) -> CommandResult:
        return await super().run(command, stdin=stdin, timeout=timeout)

    async def check(self, command: str, *, stdin: bytes = b"", timeout: float = GUEST_TIMEOUT) -> str:
        return await super().check(command, stdin=stdin, timeout=timeout)

    async def wait_for_console(
        self, text: str | re.Pattern[str], timeout: float = GUEST_TIMEOUT, *, since: int = 0
    ) -> re.Match[str]:
        return await super().wait_for_console(text, timeout, since=since)


class GuestPool:
    """Booted guests by configuration."""

    def __init__(self) -> None:
        self.handed_out: set[QemuGuest] = set()
        self._guests: dict[GuestConfig, QemuGuest] = {}
        self._kept: set[GuestConfig] = set()

    async def get(self, config: GuestConfig, *, keep: bool = False) -> QemuGuest:
        """Return a running guest with this configuration, or start one; boot it unless it is paused.

        With ``keep`` the guest is never closed for another one: it has state that tests share.
        """
        if keep:
            self._kept.add(config)
        guest = self._guests.pop(config, None)
        if guest is not None and not guest.alive:
            await guest.close()
            guest = None
        if guest is None:
            while len(idle := [one for one in self._guests if one not in self._kept]) >= MAX_GUESTS:
                await self._guests.pop(idle[0]).close()
            guest = await self._boot(config)
        self._guests[config] = guest
        self.handed_out.add(guest)
        return guest

    @asynccontextmanager
    async def fresh(self, config: GuestConfig) -> AsyncIterator[QemuGuest]:
        """Start a guest for one test; boot it unless it is paused or boots from firmware."""
        guest = await self._boot(config)
        try:
            yield guest
        finally:
            await guest.close()

    async def close(self) -> None:
        for guest in self._guests.values():
            await guest.close()

    async def _boot(self, config: GuestConfig) -> QemuGuest:
        try:
            guest = await LongTimeoutGuest(config).__aenter__()
        except SetupError as error:
            if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
                raise
            pytest.skip(f"{error.message} ({error.remedy})")
        self.handed_out.add(guest)
        try:
            if config.boot is Boot.KERNEL and not config.paused:
                await guest.booted()
        except BaseException:
            await guest.close()
            raise
        return guest


POOL = pytest.StashKey[GuestPool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[POOL] = GuestPool()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guests(pytestconfig: pytest.Config) -> AsyncIterator[GuestPool]:
    """Return the pool: ``await guests.get(GuestConfig(…))`` is shared, ``async with guests.fresh(…)`` is not."""
    pool = pytestconfig.stash[POOL]
    yield pool
    await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def guest(guests: GuestPool) -> QemuGuest:
    """Return the usual guest: on xHCI two SPICE ports, a TCP, a UNIX, and a TCP port without streams, in this order."""
    return await guests.get(USUAL)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def plugger(guests: GuestPool) -> AsyncIterator[Plugger]:
    """Run farplug in the near guest, a machine with real devices (``plugger.machine``)."""
    machine = Machine(await guests.get(REAL_DEVICES, keep=True))
    await machine.check(f"ln -sfn {SCRIPTS} /scripts")
    async with Plugger.started(machine) as plugger:
        yield plugger


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.guest)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[POOL].handed_out.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for guest in item.config.stash[POOL].handed_out:
            report.sections.append((f"console of guest {guest.pid}", guest.console[-CONSOLE_TAIL:]))
            report.sections.append((f"standard error of QEMU {guest.pid}", guest.stderr[-CONSOLE_TAIL:]))
    return report
