"""The pytest plugin: throw-away VMs as fixtures.

pytest loads this module in every run of an environment that has farplug: it imports nothing but pytest, and the rest
when the first test asks for a guest. :mod:`farplug.testing.lending` is that rest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from farplug.testing.fixtures import (
        GuestFactory,
        GuestFixture,
        KeyboardFixture,
        PlugFixture,
        ScreenFixture,
        SerialFixture,
    )
    from farplug.testing.lending import Lender, Loans, Record
    from farplug.testing.scratch import Scratch
    from farplug.vm.qemu_config import GuestConfig

LENDER: pytest.StashKey[Lender] = pytest.StashKey()
LOANS: pytest.StashKey[Loans] = pytest.StashKey()
"""The guests that a test has, or the fixtures of the session."""
RECORD: pytest.StashKey[Record] = pytest.StashKey()
"""The files of a test that has guests."""
FAILED: pytest.StashKey[bool] = pytest.StashKey()
"""A test that has guests has failed."""
SLOW: pytest.StashKey[set[str]] = pytest.StashKey()
"""Why guests of this run, and of its other processes, had no KVM."""

CHOICES = {"accel": ("auto", "kvm", "tcg"), "capture": ("off", "on", "retain-on-failure")}
"""The values of the options that have few."""
DEFAULTS = {"accel": "auto", "capture": "retain-on-failure"}

SNAPSHOTS = "farplug_snapshots"
"""The folder for snapshots of guests that all processes of pytest-xdist share, in what a process is started with."""
_SHARED: pytest.StashKey[Scratch] = pytest.StashKey()

_WORKER_KEY = "farplug_slow"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, and an entry of the configuration file for each."""
    group = parser.getgroup("farplug", "farplug: throw-away VMs")

    def add(name: str, text: str, default: str | bool, **options: Any) -> None:
        group.addoption(f"--farplug-{name}", default=None, help=text, **options)
        kind: Literal["bool", "string"] = "bool" if isinstance(default, bool) else "string"
        parser.addini(f"farplug_{name}", f"as --farplug-{name}", type=kind, default=default)

    for name, text in (
        ("accel", "what runs the VMs: KVM if this machine has it (auto), KVM, or TCG"),
        ("capture", "which tests leave a capture of the USB traffic in --farplug-artifacts"),
    ):
        add(name, f"{text} (default: {DEFAULTS[name]})", DEFAULTS[name], choices=CHOICES[name])
    add(
        "artifacts",
        "write console, QEMU's standard error, last screens and USB capture of tests that fail below this folder",
        default="",
        metavar="DIR",
    )
    add(
        "timeout",
        "what a guest may take for what a test waits for (default: 60)",
        default="60",
        metavar="SECONDS",
        type=float,
    )
    add(
        "keep",
        "after a test that fails keep its VM, print how to reach it, and wait for Enter",
        default=False,
        action="store_true",
    )
    add(
        "require",
        "fail, not skip, tests with VMs where QEMU or another program is missing",
        default=False,
        action="store_true",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "farplug(fresh=False, **fields): the VM of the fixture farplug_guest: fields of farplug.testing.GuestConfig, "
        "such as boot='uefi', paused=True, memory=512; ports may be a number. fresh: no other test uses it.",
    )
    slow: set[str] = set()
    config.stash[SLOW] = slow


@pytest.fixture(scope="session")
def farplug_guest_config() -> GuestConfig:
    """Return the configuration of guests: a Linux with four ports and a screen. Override the fixture for another."""
    from farplug.testing.lending import USUAL

    return USUAL


@pytest.fixture
def farplug_guest_factory(request: pytest.FixtureRequest, farplug_guest_config: GuestConfig) -> Iterator[GuestFactory]:
    """Return a function that lends guests to the test: ``farplug_guest_factory(boot="uefi", paused=True)``."""
    from farplug.testing.lending import Loans

    item = request.node
    loans = item.stash[LOANS] = Loans(_lender(item.config), _record(item), farplug_guest_config)
    yield loans.lend
    loans.end()


@pytest.fixture(scope="session")
def farplug_session_guest_factory(
    request: pytest.FixtureRequest, farplug_guest_config: GuestConfig
) -> Iterator[GuestFactory]:
    """Return a function that lends guests to fixtures of a module or of the session, until its end or ``close()``."""
    from farplug.testing.lending import Loans, Record

    lender = _lender(request.config)
    loans = request.config.stash[LOANS] = Loans(
        lender, Record(lender, "session", []), farplug_guest_config, forgets=True
    )
    yield loans.lend
    loans.end()


def _lender(config: pytest.Config) -> Lender:
    from farplug.testing.lending import Lender

    if LENDER not in config.stash:
        config.stash[LENDER] = Lender(config)
    return config.stash[LENDER]


def _record(item: pytest.Item) -> Record:
    from farplug.testing.lending import Record

    if RECORD not in item.stash:
        item.stash[RECORD] = Record(_lender(item.config), item.nodeid, item.user_properties)
    return item.stash[RECORD]


def _loans_of(item: pytest.Item) -> list[Loans]:
    """Return what was lent to a test, and to the fixtures that it uses."""
    stashes = [item.stash]
    if "farplug_session_guest_factory" in getattr(item, "fixturenames", ()):
        stashes.append(item.config.stash)
    return [loans for stash in stashes if (loans := stash.get(LOANS, None)) is not None and loans.running]


@pytest.fixture
def farplug_guest(request: pytest.FixtureRequest, farplug_guest_factory: GuestFactory) -> GuestFixture:
    """Return a guest that has booted. Other tests have used it, unless it is fresh; nothing is plugged into it."""
    fields: dict[str, Any] = {}
    for marker in reversed([*request.node.iter_markers("farplug")]):  # the closest one wins
        if marker.args:
            raise pytest.UsageError("the marker farplug takes fields by name: farplug(ports=2, memory=512)")
        fields |= marker.kwargs
    return farplug_guest_factory(**fields)


@pytest.fixture
def farplug_plug(farplug_guest: GuestFixture) -> PlugFixture:
    """Return a function that plugs a device, an image, a folder or a kind of device into ``farplug_guest``."""
    return farplug_guest.plug


@pytest.fixture
def farplug_keyboard(farplug_guest: GuestFixture) -> KeyboardFixture:
    """Return the keyboard of ``farplug_guest``."""
    return farplug_guest.keyboard


@pytest.fixture
def farplug_screen(farplug_guest: GuestFixture) -> ScreenFixture:
    """Return the screen of ``farplug_guest``."""
    return farplug_guest.screen


@pytest.fixture
def farplug_serial(farplug_guest: GuestFixture) -> SerialFixture:
    """Plug a USB serial line into ``farplug_guest``, and return it."""
    return farplug_guest.serial()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin anew: pytest-rerunfailures runs a test again."""
    if FAILED in item.stash:
        del item.stash[FAILED]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the guests of a failed test show to its report."""
    report = yield
    if report.failed and FAILED not in item.stash and (loans := _loans_of(item)):
        from farplug.testing.lending import add_evidence

        item.stash[FAILED] = True
        add_evidence(_lender(item.config), _record(item), loans, item, report)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep the guests of a failed test until the user presses Enter."""
    if FAILED in item.stash and (lender := _lender(item.config)).keep:
        from farplug.testing.lending import wait_for_user

        wait_for_user(lender, item, _loans_of(item))


@pytest.hookimpl(trylast=True)  # after the end of the session's fixtures
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop all guests."""
    config = session.config
    lender = config.stash.get(LENDER, None)
    if lender is not None:
        config.stash[SLOW].update(lender.slow)
        lender.close()
        del config.stash[LENDER]
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist
        slow = config.stash[SLOW]
        config.workeroutput[_WORKER_KEY] = sorted(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give the processes of pytest-xdist one folder for snapshots of guests."""
    config = node.config
    if _SHARED not in config.stash:
        from farplug.testing.scratch import Scratch

        config.stash[_SHARED] = scratch = Scratch()
        config.add_cleanup(scratch.close)
    node.workerinput[SNAPSHOTS] = str(config.stash[_SHARED].path)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of pytest-xdist has found."""
    node.config.stash[SLOW].update(getattr(node, "workeroutput", {}).get(_WORKER_KEY, ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print once that guests were emulated."""
    slow = config.stash[SLOW]
    for why in sorted(slow):
        terminalreporter.write_line(f"farplug: the VMs ran without KVM, which is slower: {why}")
