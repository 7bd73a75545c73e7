"""``farplug connect``: plug devices into a guest and keep them there."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from json import dumps
from typing import Annotated

import typer

from farplug.app.settings import CaptureSettings, GuestSettings
from farplug.cli.device_options import DeviceOptions, with_device_options
from farplug.cli.options import (
    OUTPUT,
    PASSWORD_HELP,
    SESSION,
    AllowPlainOption,
    AskPasswordOption,
    CaFileOption,
    DebugOption,
    HostSubjectOption,
    NoReconnectOption,
    OptionalTargetArgument,
    PasswordFileOption,
    ProxyOption,
    ReconnectOption,
    TargetCommandOption,
    reconnect_settings,
    target_settings,
)
from farplug.control.names import check_name
from farplug.errors import Reason, UsageError
from farplug.exit_codes import ExitCode


@with_device_options
def connect(
    context: typer.Context,
    options: DeviceOptions,
    target: OptionalTargetArgument = None,
    password_file: PasswordFileOption = None,
    ask_password: AskPasswordOption = False,
    ca_file: CaFileOption = None,
    host_subject: HostSubjectOption = None,
    proxy: ProxyOption = None,
    allow_plain: AllowPlainOption = False,
    target_command: TargetCommandOption = None,
    reconnect: ReconnectOption = None,
    no_reconnect: NoReconnectOption = False,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="Read commands from standard input: insert and eject media, list, help, quit.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print events as JSON, one object a line.", rich_help_panel=OUTPUT)
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="The name of the session for 'farplug attach', 'status', 'stop' and so on; the session stays without "
            "a device, too. By default it is that of the VM.",
            show_default=False,
            rich_help_panel=SESSION,
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Print the name of the session when it is ready, and leave it running in the background. It stays "
            "without a device, too.",
            rich_help_panel=SESSION,
        ),
    ] = False,
    capture: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Capture what moves between the VM and its devices, as a pcapng file for Wireshark. FILE may be a "
            "named pipe, or - for standard output.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    capture_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Capture at most N bytes of each transfer, and not what the connections carry.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Plug devices into the VM at TARGET, and keep them there until Ctrl-C.

    Devices get the VM's ports in the order of the command line: the first one gets port 0. Where the VM has too few \
ports, all but USB devices of this machine share one: disks and CD-ROM drives as logical units, in the same order.
    """
    if capture is None and capture_bytes is not None:
        raise UsageError("--capture-bytes has no effect without --capture", reason=Reason.BAD_OPTION)
    if capture == "-" and detach:
        raise UsageError(
            "--detach and --capture - contradict each other: a session in the background has no standard output",
            reason=Reason.BAD_OPTION,
            remedy="name a file or a named pipe",
        )
    where = target_settings(
        target, password_file, ask_password, ca_file, host_subject, proxy, allow_plain, target_command
    )
    devices = options.devices(context)
    stay = name is not None or detach
    if not stay:
        devices.check_any()
    if name is not None:
        check_name(name)
    if detach and commands:
        raise UsageError(
            "--detach and --commands contradict each other: a session in the background reads no standard input",
            reason=Reason.BAD_OPTION,
            remedy="leave --commands out: other commands, such as 'farplug insert', reach the session",
        )
    settings = GuestSettings(
        where,
        devices.sources,
        devices.storage,
        devices.rules,
        stay=stay,
        capture=None if capture is None else CaptureSettings(capture, capture_bytes),
        reconnect=reconnect_settings(reconnect, no_reconnect, detach=detach),
    )
    if detach:
        _detach(settings, name, as_json=json, debug=debug)
        return

    import asyncio
    import sys

    from farplug.cli import output, session, writer
    from farplug.cli.service import ServiceOptions

    if capture == "-":
        sys.stdout = sys.stderr  # standard output is the capture
    writer.install()
    shown = output.choose(as_json=json, commands=commands)
    service = ServiceOptions(name, required=name is not None)
    code = asyncio.run(session.run(settings, shown, commands=commands, service=service))
    if code is ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    raise typer.Exit(code)


def _detach(settings: GuestSettings, name: str | None, *, as_json: bool, debug: bool) -> None:
    from farplug.cli import background

    ready = background.start(background.Request(settings, name, json=as_json, debug=debug))
    typer.echo(dumps(asdict(ready)) if as_json else ready.name)


connect.__doc__ = f"""{inspect.cleandoc(connect.__doc__ or "")}

Ctrl-C (SIGTERM, or closing the terminal) pulls the devices out of the VM, as one pulls a USB stick: first unmount a \
disk in the VM, or "safely remove" it there. What the VM has written is kept; what it still holds in memory is lost. \
If it may have more to write, the first Ctrl-C on a terminal only says so, and the next one leaves. A further Ctrl-C \
leaves at once, without waiting for the VM.

{PASSWORD_HELP}
"""
