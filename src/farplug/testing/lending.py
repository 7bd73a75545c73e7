"""Lends guests to tests, for the pytest plugin, and adds what shows why a test failed to its report."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from farplug.errors import SetupError
from farplug.testing.fixtures import GuestFixture
from farplug.testing.guest_pool import GuestPool
from farplug.testing.loop_thread import LoopThread
from farplug.testing.plugin import CHOICES, SNAPSHOTS
from farplug.testing.running_guest import Evidence, RunningGuest
from farplug.testing.scratch import Scratch
from farplug.vm.agent import GuestTimeout
from farplug.vm.qemu import GuestCrashed, QemuGuest
from farplug.vm.qemu_config import Boot, Controller, GuestConfig, SpicePort

TAIL: Final = 6000
"""Characters of a console in the report of a test."""
EVENTS_TAIL: Final = 20
_MAX_NAME: Final = 120
"""Characters of the name of a test's folder."""


def spice_ports(count: int) -> tuple[SpicePort, ...]:
    """Return ports of a SPICE server; firmware boots from them in their order."""
    return tuple(SpicePort(bootindex=1 + number) for number in range(count))


USUAL: Final = GuestConfig(
    ports=spice_ports(4),
    kernel_arguments=("usb_storage.delay_use=0", "console=tty0"),
    modules=("bochs", "usbhid", "hid_generic", "evdev", "cdc_acm"),
    extra_arguments=("-device", "VGA,id=screen"),
)
"""A Linux with a screen, disks that are scanned at once, and drivers of keyboards, pointers and serial lines."""

KVM: Final = Path("/dev/kvm")
_EMULATED: Final = GuestConfig().accelerator


def missing_kvm() -> str:
    """Return why this machine has no KVM for this user; empty: it has."""
    try:
        os.close(os.open(KVM, os.O_RDWR))
    except OSError as error:
        return f"{KVM}: {(error.strerror or str(error)).lower()}"
    return ""


class Lender:
    """What all tests of a process share: the guests, and the thread that runs them.

    Attributes:
        slow: why guests had no KVM.

    Raises:
        pytest.UsageError: an option is not valid.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.slow: set[str] = set()
        self._config = config
        accelerator, self.capture = self._choice("accel"), self._choice("capture")
        self.keep, self.require = bool(self._option("keep")), bool(self._option("require"))
        artifacts = str(self._option("artifacts"))
        self.artifacts = Path(config.invocation_params.dir, artifacts) if artifacts else None
        self.writes_junit = bool(getattr(config.option, "xmlpath", None))
        self.capture_manager: Any = config.pluginmanager.getplugin("capturemanager")
        try:
            self.timeout = float(self._option("timeout"))
        except ValueError:
            self.timeout = 0.0
        if not 0 < self.timeout < float("inf"):
            raise pytest.UsageError("farplug_timeout is not a number of seconds above 0")
        if self.keep and (hasattr(config, "workerinput") or not _has_terminal()):
            raise pytest.UsageError("--farplug-keep waits for Enter: it needs a terminal, and one process (no -n)")
        if self.capture == "on" and self.artifacts is None:
            raise pytest.UsageError("--farplug-capture=on needs a folder: --farplug-artifacts=DIR")
        self._may_fall_back = accelerator == "auto"
        self._missing_kvm = missing_kvm() if accelerator == "auto" else ""
        self._accelerator = _EMULATED if self._missing_kvm or accelerator == "tcg" else "kvm"
        self.thread = LoopThread()
        self.scratch = Scratch()
        snapshots = Path(getattr(config, "workerinput", {}).get(SNAPSHOTS, self.scratch.path))
        self.pool = GuestPool(lambda config: QemuGuest(config, timeout=self.timeout, snapshots=snapshots))

    def _option(self, name: str) -> Any:
        value = self._config.getoption(f"farplug_{name}")
        return self._config.getini(f"farplug_{name}") if value is None else value

    def _choice(self, name: str) -> str:
        value = str(self._option(name))
        known = CHOICES[name]
        if value not in known:
            raise pytest.UsageError(f"farplug_{name} is {value!r}, not one of {', '.join(known)}")
        return value

    def guest(self, config: GuestConfig, *, fresh: bool) -> QemuGuest:
        """Return a guest that has booted, as :meth:`GuestPool.get`, with the accelerator that the user chose.

        Where KVM is there, but does not work, as in some nested VMs, guests are emulated.
        """
        __tracebackhide__ = True
        if config.accelerator != _EMULATED:
            return self.thread.call(self.pool.get(config, fresh=fresh))
        chosen = replace(config, accelerator=self._accelerator)
        try:
            guest = self.thread.call(self.pool.get(chosen, fresh=fresh))
        except (GuestCrashed, GuestTimeout) as error:
            if not self._may_fall_back or self._missing_kvm:
                raise
            guest = self.thread.call(self.pool.get(config, fresh=fresh))
            self._missing_kvm, self._accelerator = error.message.partition("\n")[0], _EMULATED
        self._may_fall_back = False
        if self._missing_kvm:
            self.slow.add(self._missing_kvm)
        return guest

    def close(self) -> None:
        """Stop all guests."""
        try:
            self.thread.call(self.pool.close())
        finally:
            self.thread.close()
            self.scratch.close()


def _has_terminal() -> bool:
    return sys.__stdin__ is not None and sys.__stdin__.isatty()


class Record:
    """The files and properties of one test, or of the fixtures of a session.

    Args:
        lender: has the options.
        name: the test's id.
        properties: those of the test, which reports have.
    """

    def __init__(self, lender: Lender, name: str, properties: list[tuple[str, object]]) -> None:
        self.properties = properties
        self._lender = lender
        self._name = name
        self._guests = 0
        self._folder: Path | None = None

    def folder(self, guest: str) -> Path:
        """Make the folder of a guest. Those of an earlier run are removed."""
        if self._folder is None:
            assert self._lender.artifacts is not None
            name = re.sub(r"[^\w.=-]+", "-", self._name.replace("::", "-").replace("/", "-")).strip("-.")
            self._folder = self._lender.artifacts / name[-_MAX_NAME:]
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        folder = self._folder / ("" if guest == "guest" else guest)
        folder.mkdir(exist_ok=True)
        return folder

    def keep(self, captures: list[Path]) -> None:
        """Move the captures of the next guest to its folder."""
        self._guests += 1
        if captures:
            name = guest_name(self._guests)
            self.properties += _links(name, _moved(captures, self.folder(name)))

    def write(self, guest: str, evidence: Evidence) -> list[Path]:
        """Write what a guest shows; return the paths of the files.

        Raises:
            OSError: they cannot be written.
        """
        texts = {
            "console.txt": evidence.console,
            "qemu-stderr.txt": evidence.stderr,
            "firmware.txt": evidence.firmware,
            "devices.txt": "".join(f"{line}\n" for line in evidence.events),
        }
        contents = {file: text.encode() for file, text in texts.items()}
        contents |= {"screen.png": evidence.screen, "screens.png": evidence.screens}
        folder = self.folder(guest)
        paths = []
        for file, content in contents.items():
            if content:
                (folder / file).write_bytes(content)
                paths.append(folder / file)
        return paths + _moved(evidence.captures, folder)


class Loans:
    """The guests of one test, or of the fixtures of a session.

    Args:
        lender: lends them.
        record: the files of the test.
        config: the configuration of guests whose call gives none.
        forgets: a guest that was released is not in the reports of later failures, unless an exception ended its use.

    Attributes:
        running: the guests that are in reports.
        has_failed: a test with these guests has failed.
    """

    def __init__(self, lender: Lender, record: Record, config: GuestConfig, *, forgets: bool = False) -> None:
        self.running: list[RunningGuest] = []
        self.has_failed = False
        self._lender = lender
        self._record = record
        self._config = config
        self._forgets = forgets

    def lend(self, config: GuestConfig | None = None, *, fresh: bool = False, **values: Any) -> GuestFixture:
        """Return a guest; see :class:`~farplug.testing.fixtures.GuestFactory`."""
        __tracebackhide__ = True
        lender = self._lender
        config = with_fields(config or self._config, values)
        try:
            vm = lender.guest(config, fresh=fresh)
        except SetupError as error:
            how = f" ({error.remedy.command or error.remedy})" if error.remedy else ""
            message = f"{error.message}{how}"
            if lender.require:
                pytest.fail(message, pytrace=False)
            pytest.skip(message)
        captures = None
        if lender.artifacts is not None and lender.capture != "off":
            captures = Path(tempfile.mkdtemp(dir=lender.scratch.path))
        running = lender.thread.call(_run(vm, captures))
        self.running.append(running)
        return GuestFixture(lender.thread, running, lender.timeout, partial(self.release, running))

    def release(self, running: RunningGuest, *, failed: bool = False) -> None:
        """Unplug all devices of a guest, and release the guest. A second call has no effect.

        Args:
            running: the guest.
            failed: an exception ends the use: what shows why is kept for the report. With ``--farplug-keep`` the guest
                stays until :meth:`end`.

        Raises:
            Exception: a device failed, or could not be closed.
        """
        __tracebackhide__ = True
        lender = self._lender
        if running.is_closed or (failed and lender.keep):
            return
        if failed:
            lender.thread.call(running.keep_evidence())
        elif lender.capture == "on" and not self.has_failed:
            self._record.keep(lender.thread.call(running.end_captures()))
        if self._forgets and not failed:
            self.running.remove(running)
        failed |= self.has_failed
        # The exceptions of devices are in the events of the report of a test that has failed.
        faults = [] if failed else [*running.faults]
        faults += lender.thread.call(running.close())
        # The next test must not get a system that this one has broken.
        lender.thread.call(lender.pool.release(running.vm, broken=failed))
        if len(faults) == 1:
            faults[0].add_note("a device that was plugged into the guest raised this, or could not be closed")
            raise faults[0]
        if faults:
            raise ExceptionGroup("devices that were plugged into the guest raised, or could not be closed", faults)

    def end(self) -> None:
        """Release all guests.

        Raises:
            Exception: a device failed, or could not be closed.
        """
        __tracebackhide__ = True
        faults: list[Exception] = []
        for running in [*self.running]:
            try:
                self.release(running)
            except Exception as error:
                faults.append(error)
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise ExceptionGroup("devices that were plugged into several guests failed", faults)


def guest_name(number: int) -> str:
    """Return the name of a guest in reports. Most tests have only the first one."""
    return "guest" if number == 1 else f"guest-{number}"


def add_evidence(
    lender: Lender, record: Record, loans: Sequence[Loans], item: pytest.Item, report: pytest.TestReport
) -> None:
    """Add what the guests of a test show to its report, which is that of the first phase that failed."""
    for one in loans:
        one.has_failed = True
    for number, running in enumerate([running for one in loans for running in one.running], start=1):
        name, title = guest_name(number), guest_name(number).replace("-", " ")
        try:
            evidence = lender.thread.call(running.evidence())
        except Exception as error:
            report.sections.append((f"{title}: what shows why", f"cannot be collected: {error!r}"))
            continue
        for part, text in (
            ("console", evidence.console[-TAIL:]),
            ("standard error of QEMU", evidence.stderr[-TAIL:]),
            ("devices", "\n".join(evidence.events[-EVENTS_TAIL:])),
        ):
            if text.strip():
                report.sections.append((f"{title}: {part}", text))
        if lender.artifacts is None:
            continue
        try:
            paths = record.write(name, evidence)
        except OSError as error:
            report.sections.append((f"{title}: files", f"cannot be written: {error}"))
            continue
        report.sections.append((f"{title}: files", "\n".join(map(str, paths))))
        report.user_properties += _links(name, paths)
        record.properties += _links(name, paths)  # for the report of the teardown, which junit reads
        if lender.writes_junit:
            # What Jenkins and GitLab attach to a test; junit has it with junit_logging=system-out.
            lines = "".join(f"[[ATTACHMENT|{path}]]\n" for path in paths)
            item.add_report_section(report.when or "call", "stdout", lines)
            if report.when == "teardown":
                report.sections.append(("Captured stdout teardown", lines))


def wait_for_user(lender: Lender, item: pytest.Item, loans: Sequence[Loans]) -> None:
    """Print how to reach the guests of a test that has failed, and wait for Enter."""
    lines = [f"\n{item.nodeid} failed; its VM runs until you press Enter:"]
    for running in (running for one in loans for running in one.running):
        if running.vm.alive:
            lines += [f"  QEMU {running.vm.pid}: {target}" for target in dict.fromkeys(running.vm.targets)]
    lines.append("A SPICE console that connects takes the VM from the test, which has failed already.")
    manager = lender.capture_manager
    if manager is not None:
        manager.suspend_global_capture(in_=True)
    try:
        print("\n".join(lines), file=sys.__stdout__, flush=True)
        assert sys.__stdin__ is not None
        sys.__stdin__.readline()
    finally:
        if manager is not None:
            manager.resume_global_capture()


def _links(guest: str, paths: Sequence[Path]) -> list[tuple[str, object]]:
    """Return the properties of a test that has these files."""
    return [(f"farplug_{guest}_{path.stem}".replace("-", "_"), str(path)) for path in paths]


async def _run(vm: QemuGuest, captures: Path | None) -> RunningGuest:
    return RunningGuest(vm, captures)


def _moved(paths: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.move(path, folder / path.name)) for path in paths]


_CONVERSIONS: Final[dict[str, Callable[[Any], Any]]] = {
    "ports": lambda value: spice_ports(value) if isinstance(value, int) else tuple(value),
    "boot": Boot,
    "controller": Controller,
    **dict.fromkeys(("disks", "modules", "programs", "files", "kernel_arguments", "extra_arguments"), tuple),
}


def with_fields(config: GuestConfig, values: dict[str, Any]) -> GuestConfig:
    """Return a configuration with other values for some of its fields, as a marker gives them.

    Raises:
        pytest.UsageError: there is no such field, or the value is not valid.
    """
    known = [field.name for field in fields(GuestConfig)]
    if unknown := sorted(values.keys() - set(known)):
        raise pytest.UsageError(f"a guest has no field {unknown[0]!r}: fresh, {', '.join(known)}")
    try:
        return replace(config, **{name: _CONVERSIONS.get(name, lambda value: value)(values[name]) for name in values})
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"the configuration of the guest is not valid: {error}") from error
