"""``farplug doctor``: what is missing here, and how far a target can be reached."""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

from farplug.cli import log, needs
from farplug.cli.options import (
    PASSWORD_HELP,
    TARGET_FORMS,
    AskPasswordOption,
    CaFileOption,
    DebugOption,
    HostSubjectOption,
    PasswordFileOption,
    ProxyOption,
    target_options,
)
from farplug.errors import ExitCode, FarplugError, Reason, SetupError
from farplug.text import printable
from farplug.version import __version__

if TYPE_CHECKING:
    from farplug.target import TargetOptions
    from farplug.transport.port import Port
    from farplug.transport.session import Session

HELLO_SECONDS = 3.0
"""How long a port may take to say hello before it is called paused."""

LIBRARIES = ("cryptography", "lz4", "rich", "typer")


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]", help=f"Check this target, stage by stage: {TARGET_FORMS}.", show_default=False
        ),
    ] = None,
    password_file: PasswordFileOption = None,
    ask_password: AskPasswordOption = False,
    ca_file: CaFileOption = None,
    host_subject: HostSubjectOption = None,
    proxy: ProxyOption = None,
    install_udev_rule: Annotated[
        bool,
        typer.Option(
            "--install-udev-rule",
            help="First let people use this machine's USB devices without being root: write the udev rule. Needs root.",
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Tell what is missing on this machine, with the command that mends it; check how far TARGET can be reached."""
    if install_udev_rule:
        _install_udev_rule()
    broken = _check_machine()
    if target is not None:
        options = target_options(password_file, ask_password, ca_file, host_subject, proxy)
        typer.echo("\nthe target")
        asyncio.run(_check_target(target, options))
    if broken:
        raise typer.Exit(ExitCode.SETUP)


doctor.__doc__ = f"""{doctor.__doc__}

Nothing is plugged in. But a SPICE server serves one client at a time: checking it ends another client's session. \
And a .vv file with delete-this-file=1 is deleted.

{PASSWORD_HELP}
"""


def _line(mark: str, what: str, detail: str = "") -> None:
    typer.echo(printable(f"  {mark:<8}{what:<20}{detail}").rstrip())


def _check_machine() -> bool:
    """Print what is here and what is not; whether something that ``connect`` needs is missing."""
    typer.echo("to plug devices in (farplug connect)")
    _line("ok", "farplug", f"{__version__}, Python {platform.python_version()} on {sys.platform}")
    broken = False
    for library in LIBRARIES:
        try:
            _line("ok", library, version(library))
        except PackageNotFoundError:
            broken = True
            _line("MISSING", library, f"mend it: {sys.executable} -m pip install {library}")
    typer.echo("\nUSB devices of this machine (farplug connect --usb-device)")
    broken |= _check_usb()
    typer.echo("\nfor images, the demo and the guest tests (farplug image create, farplug demo, make test)")
    missing = []
    for need in needs.NEEDS:
        found = need.found()
        _line("ok" if found else "-", need.name, found or f"not installed: {need.purpose}")
        if not found:
            missing.append(need)
    if missing:
        typer.echo(f"  mend it: {needs.install_command(missing)}")
    return broken


def _install_udev_rule() -> None:
    from farplug.machine.udev import install, udev_rule, whom

    rule = udev_rule()
    typer.echo(f"{install(rule)}:\n  {rule}\n  for {whom()}\n")


def _check_usb() -> bool:
    """Print whether USB devices can be used; whether libusb is missing."""
    from farplug.libusb.library import Library
    from farplug.machine.listing import list_devices
    from farplug.machine.udev import install_commands, udev_rule

    broken = False
    try:
        Library()
        _line("ok", "libusb", f"with python-libusb1 {version('libusb1')}")
    except SetupError as error:
        broken = True
        _line("MISSING", "libusb", error.message)
        _remedy(error.remedy)
    try:
        found = [device for device in list_devices() if not device.is_hub]
    except SetupError as error:
        _line("-", "devices", error.message)
        _remedy(error.remedy)
        return broken
    ready = [device for device in found if device.obstacle is None]
    _line("ok", "devices", f"{len(found)}, of which {len(ready)} can be plugged in: see 'farplug devices'")
    denied = [device for device in found if any(o.reason is Reason.NO_PERMISSION for o in device.obstacles)]
    if denied:
        _line("-", "permission", f"none for {len(denied)} of them: {', '.join(device.port for device in denied)}")
        _remedy(f"{install_commands(udev_rule())}\n(as root, farplug doctor --install-udev-rule does the same)")
    return broken


def _remedy(text: str) -> None:
    for line in log.remedy_lines(text):
        typer.echo(f"  {'':<8}{line}")


class _Stages:
    """Prints a stage once it is known how it ended."""

    def __init__(self) -> None:
        self._pending: tuple[str, str] | None = None

    def begin(self, stage: str, text: str) -> None:
        """A stage begins: so the one before is reached."""
        self.end("ok")
        self._pending = (stage, text)

    def end(self, mark: str, text: str | None = None) -> None:
        """The stage has ended. Does nothing if none has begun."""
        if self._pending is not None:
            stage, begun = self._pending
            self._pending = None
            _line(mark, stage, begun if text is None else text)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Say at which stage it ended; what is to be done is said where every error is."""
        try:
            yield
        except FarplugError:
            self.end("FAILED")
            raise


async def _check_target(text: str, options: TargetOptions) -> None:
    from farplug.hub import Hub
    from farplug.target import ListenTarget, open_session, parse_target

    target = parse_target(text, options)
    if isinstance(target, ListenTarget):
        _line("-", "reach", f"QEMU connects to {target.address}: run 'farplug connect {text}', then start the VM")
        return
    stages = _Stages()
    with stages.failing():
        session = await open_session(target, lambda stage, where: stages.begin(str(stage), where))
        try:
            if session.reached:
                stages.end("ok")
                _line("ok", "VM", f"{session.name} {session.uuid}".strip() or "it tells no name")
                stages.begin("usbredir channels", "none")
                Hub(session).check_room(1)
                stages.end("ok", f"{len(session.ports)}: so many devices can be plugged in")
            for port in session.ports:
                await _check_port(session, port, stages)
        finally:
            await session.close()


async def _check_port(session: Session, port: Port, stages: _Stages) -> None:
    from farplug.redirection import Redirection
    from farplug.redirection.events import GuestReady

    ready: asyncio.Future[GuestReady] = asyncio.get_running_loop().create_future()

    def happened(event: object) -> None:
        if isinstance(event, GuestReady) and not ready.done():
            ready.set_result(event)

    if session.reached:
        stages.begin(port.name, "")
    redirection = Redirection(port, happened)
    await redirection.open()
    try:
        if not session.reached:
            stages.begin(port.name, "")
        closed = asyncio.ensure_future(redirection.closed())
        await asyncio.wait((ready, closed), timeout=HELLO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            stages.end("ok", f"ready: {ready.result().version or 'it tells no version'}")
        elif closed.done():
            error = closed.result()
            if error is not None:
                raise error
        else:
            stages.end(
                "-", f"no answer within {HELLO_SECONDS:g} s: the VM is paused, or the port serves another client"
            )
        closed.cancel()
    finally:
        await redirection.close()
