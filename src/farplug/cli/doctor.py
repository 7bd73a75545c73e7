"""``farplug doctor``: check this machine, and the connection to a target."""

from __future__ import annotations

import asyncio
import json as jsonlib
import platform
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from farplug.app import requirements
from farplug.cli.log import remedy_lines
from farplug.cli.options import (
    OUTPUT,
    PASSWORD_HELP,
    DebugOption,
    TargetOptions,
    with_target_options,
)
from farplug.errors import FarplugError, Reason, Remedy, SetupError
from farplug.exit_codes import ExitCode
from farplug.shell import shell_word
from farplug.text import printable
from farplug.transport import TARGET_FORMS
from farplug.version import __version__

if TYPE_CHECKING:
    from farplug.app.settings import TargetSettings

NO_REMEDY = Remedy()

LIBRARIES = ("cryptography", "lz4", "rich", "typer")


@with_target_options
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help=f"Check this target, stage by stage: {TARGET_FORMS}.", show_default=False
        ),
    ] = None,
    *,
    access: TargetOptions,
    install_udev_rule: Annotated[
        bool,
        typer.Option(
            "--install-udev-rule",
            help="First write the udev rule that lets ordinary users open this machine's USB devices. Needs root.",
        ),
    ] = False,
    all: Annotated[
        bool,
        typer.Option("--all", help="Also check the requirements of the demo, the tests and all image formats."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print each check as JSON, one object a line.", rich_help_panel=OUTPUT)
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Check this machine for missing software, and show how to install it. Check the connection to TARGET."""
    settings = None if target is None else access.settings(target)
    if settings is not None:
        settings.parse(keep_file=True)  # before all checks, which would hide the error
    report = _JsonReport() if json else _Report()
    if install_udev_rule:
        _install_udev_rule(report)
    broken = _check_machine(report, all)
    paused = False
    if settings is not None:
        report.section("target", "the target")
        paused = asyncio.run(_check_target(report, settings))
    if broken:
        raise typer.Exit(ExitCode.SETUP)
    if paused:
        raise PausedError


doctor.__doc__ = f"""{doctor.__doc__}

The check does not plug in a device. But a SPICE server serves one client at a time: the check ends the session of \
another client. A .vv file with delete-this-file=1 is not deleted, so that 'farplug connect' can use it.

{PASSWORD_HELP}
"""


class PausedError(FarplugError):
    """A port of the VM does not answer."""

    def __init__(self) -> None:
        super().__init__(
            "the VM does not answer: it is paused, or the port serves another client",
            reason=Reason.PAUSED,
            remedy="resume the VM; 'farplug connect' waits until it runs",
        )


class Mark(StrEnum):
    """Result of a check."""

    OK = "ok"
    MISSING = "missing"
    NOTE = "note"
    """Something is missing, or could not be checked; ``connect`` works without it."""
    PAUSED = "paused"
    FAILED = "failed"


class _Report:
    """Prints checks as text."""

    _MARKS: ClassVar = {Mark.OK: "ok", Mark.NOTE: "-"}

    def __init__(self) -> None:
        self._begun = False

    def section(self, name: str, title: str) -> None:
        """Begin a section."""
        typer.echo(f"\n{title}" if self._begun else title)
        self._begun = True

    def check(self, mark: Mark, name: str, detail: str = "", remedy: Remedy = NO_REMEDY) -> None:
        """Report a check."""
        self._line(f"  {self._MARKS.get(mark, mark.upper()):<8}{name:<20}{detail}")
        for line in remedy_lines(remedy):
            self._line(f"  {'':<8}{line}")

    def note(self, text: str) -> None:
        """Report an action."""
        self._line(text)

    def _line(self, text: str) -> None:
        typer.echo(printable(text).rstrip())


class _JsonReport(_Report):
    """Prints checks as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self._section = ""

    def section(self, name: str, title: str) -> None:
        self._section = name

    def check(self, mark: Mark, name: str, detail: str = "", remedy: Remedy = NO_REMEDY) -> None:
        check = {"event": "check", "section": self._section, "name": name, "status": str(mark), "message": detail}
        self._json(**check, **remedy.as_dict())

    def note(self, text: str) -> None:
        self._json(event="note", message=text)

    def _json(self, **values: object) -> None:
        typer.echo(jsonlib.dumps({"time": round(time.time(), 3), **values}))


def _check_machine(report: _Report, everything: bool) -> bool:
    """Report the software that is installed or missing; return whether something that ``connect`` needs is missing."""
    report.section("connect", "to plug devices in (farplug connect)")
    report.check(Mark.OK, "farplug", f"{__version__}, Python {platform.python_version()} on {sys.platform}")
    broken = False
    for library in LIBRARIES:
        try:
            report.check(Mark.OK, library, version(library))
        except PackageNotFoundError:
            broken = True
            remedy = Remedy("install it", command=f"{shell_word(sys.executable)} -m pip install {library}")
            report.check(Mark.MISSING, library, "not installed", remedy)
    report.section("usb", "USB devices of this machine (farplug connect --usb-device)")
    broken |= _check_usb(report)
    report.section("images", "images (farplug image create, farplug connect --usb-folder)")
    _check_needs(report, [need for need in requirements.NEEDS if need.images])
    others = [need for need in requirements.NEEDS if not need.images]
    if everything:
        report.section("vm", "the throw-away VM (images with exFAT and NTFS, farplug demo) and the tests")
        _check_needs(report, others)
    else:
        _check_vm(report, [need for need in requirements.NEEDS if need.vm])
    return broken


def _check_needs(report: _Report, wanted: Sequence[requirements.Need]) -> None:
    missing = []
    for need in wanted:
        found = need.found()
        report.check(Mark.OK if found else Mark.NOTE, need.name, found or f"not installed: {need.purpose}")
        if not found:
            missing.append(need)
    if missing:
        report.check(Mark.NOTE, "to install", requirements.install_command(missing))


def _check_vm(report: _Report, wanted: Sequence[requirements.Need]) -> None:
    missing = [need for need in wanted if not need.found()]
    if missing:
        names = ", ".join(need.name for need in missing)
        detail = f"not installed: {names} (for exFAT, NTFS and farplug demo)"
        remedy = Remedy("install it", command=requirements.install_command(missing))
        report.check(Mark.NOTE, "throw-away VM", detail, remedy)
    else:
        report.check(Mark.OK, "throw-away VM", "for exFAT, NTFS and farplug demo")


def _install_udev_rule(report: _Report) -> None:
    from farplug.machine.udev import install, permitted_users, udev_rule

    rule = udev_rule()
    for line in (f"{install(rule)}:", f"  {rule}", f"  for {permitted_users()}", ""):
        report.note(line)


def _check_usb(report: _Report) -> bool:
    """Report whether USB devices can be used; return whether libusb is missing."""
    from farplug.libusb.library import Library
    from farplug.machine.listing import list_devices
    from farplug.machine.udev import install_commands, udev_rule

    broken = False
    try:
        Library()
        report.check(Mark.OK, "libusb", f"with python-libusb1 {version('libusb1')}")
    except SetupError as error:
        broken = True
        report.check(Mark.MISSING, "libusb", error.message, error.remedy)
    try:
        found = [device for device in list_devices() if not device.is_hub]
    except SetupError as error:
        report.check(Mark.NOTE, "devices", error.message, error.remedy)
        return broken
    ready = [device for device in found if device.obstacle is None]
    report.check(Mark.OK, "devices", f"{len(found)}, of which {len(ready)} can be plugged in: see 'farplug devices'")
    denied = [device for device in found if any(o.reason is Reason.NO_PERMISSION for o in device.obstacles)]
    if denied:
        report.check(
            Mark.NOTE,
            "permission",
            f"missing for {len(denied)} of them: {', '.join(device.port for device in denied)}",
            Remedy(
                "run these commands, or 'farplug doctor --install-udev-rule' as root",
                command=install_commands(udev_rule()),
            ),
        )
    return broken


async def _check_target(report: _Report, settings: TargetSettings) -> bool:
    """Report the stages of the connection to a target; return whether one of its ports does not answer."""
    from farplug.app.checks import CheckState, check_target

    paused = False
    async for check in check_target(settings):
        report.check(Mark[check.state.name], check.name, check.detail)
        paused |= check.state is CheckState.PAUSED
    return paused
