"""The options of a session, and its run: of the commands that keep devices plugged in until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import dumps
from typing import Annotated

import typer

from farplug.app.settings import CaptureSettings, GuestSettings, ReconnectSettings, TargetSettings
from farplug.cli.device_options import Devices
from farplug.cli.options import OUTPUT, SESSION, DebugOption, with_fields
from farplug.control.names import check_name
from farplug.errors import Reason, UsageError
from farplug.exit_codes import ExitCode


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """The values of the options. Each field is an option, in the order of the help."""

    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="Read commands from standard input: insert and eject media, list, help, quit.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    json: Annotated[
        bool, typer.Option("--json", help="Print events as JSON, one object a line.", rich_help_panel=OUTPUT)
    ] = False
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
    ] = None
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Print the name of the session when it is ready, and leave it running in the background. It stays "
            "without a device, too.",
            rich_help_panel=SESSION,
        ),
    ] = False
    capture: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Capture what moves between the VM and its devices, as a pcapng file for Wireshark. FILE may be a "
            "named pipe, or - for standard output.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    capture_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Capture at most N bytes of each transfer, and not what the connections carry.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    debug: DebugOption = False

    def run(self, target: TargetSettings, devices: Devices, reconnect: ReconnectSettings | None) -> None:
        """Plug devices in, and keep them there until Ctrl-C; with ``--detach`` leave that to another process.

        Args:
            target: where the devices go.
            devices: what is plugged in.
            reconnect: what happens when the VM is lost.

        Raises:
            UsageError: an option is not valid, or contradicts another one.
            FarplugError: something cannot be plugged in, or has left although no user asked.
            KeyboardInterrupt: the session was interrupted before a device was plugged in.
            typer.Exit: the session has ended.
        """
        stay = self.name is not None or self.detach
        if not (stay or devices):
            if target.command is None:
                target.parse(keep_file=True)  # an image in place of the target is the more helpful error
            devices.check_any()
        if self.name is not None:
            check_name(self.name)
        if self.detach and self.commands:
            raise UsageError(
                "--detach and --commands contradict each other: a session in the background reads no standard input",
                reason=Reason.BAD_OPTION,
                remedy="leave --commands out: other commands, such as 'farplug insert', reach the session",
            )
        if devices.uses_stdio:
            self._check_stdio()
        settings = GuestSettings(
            target,
            devices.sources,
            devices.storage,
            devices.rules,
            separate=devices.separate,
            stay=stay,
            capture=None if self.capture is None else CaptureSettings(self.capture, self.capture_bytes),
            reconnect=reconnect,
        )
        if self.detach:
            self._start_in_background(settings)
            return

        import asyncio
        import sys

        from farplug.cli import output, session, writer
        from farplug.cli.service import ServiceOptions

        if self.capture == "-" or devices.uses_stdio:
            sys.stdout = sys.stderr  # standard output is the capture, or what the guest sends
        writer.install()
        if devices.uses_stdio:
            writer.use_carriage_returns()
        shown = output.choose(as_json=self.json, commands=self.commands, between=devices.uses_stdio)
        service = ServiceOptions(self.name, required=self.name is not None)
        code = asyncio.run(session.run(settings, shown, commands=self.commands, service=service))
        if code is ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        raise typer.Exit(code)

    def check_capture(self) -> None:
        """Check the options of the capture.

        Raises:
            UsageError: one of them has no effect, or contradicts another option.
        """
        if self.capture is None and self.capture_bytes is not None:
            raise UsageError("--capture-bytes has no effect without --capture", reason=Reason.BAD_OPTION)
        if self.capture == "-" and self.detach:
            raise UsageError(
                "--detach and --capture - contradict each other: a session in the background has no standard output",
                reason=Reason.BAD_OPTION,
                remedy="name a file or a named pipe",
            )

    def _check_stdio(self) -> None:
        """Raise ``UsageError`` if an option contradicts a serial line to standard input and output."""
        options = {"--detach": self.detach, "--commands": self.commands, "--capture -": self.capture == "-"}
        for option, given in options.items():
            if given:
                raise UsageError(
                    f"{option} and --usb-serial - contradict each other: both are about standard input and output",
                    reason=Reason.BAD_OPTION,
                    remedy="choose another end, such as --usb-serial pty",
                )

    def _start_in_background(self, settings: GuestSettings) -> None:
        from farplug.cli import background

        ready = background.start(background.Request(settings, self.name, json=self.json, debug=self.debug))
        typer.echo(dumps(asdict(ready)) if self.json else ready.name)


def with_session_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``session`` by the fields of :class:`SessionOptions`."""
    return with_fields(command, "session", SessionOptions)
