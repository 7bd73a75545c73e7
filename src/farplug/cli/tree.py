"""The commands of farplug. The module of a command is imported when the command is used, not for the list of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from textwrap import fill
from typing import Annotated, Any, Final

import typer
import typer.core
import typer.main

from farplug.cli.options import Command, Group, RunCommand, debug_option
from farplug.exit_codes import ExitCode
from farplug.version import __version__

EXIT_CODES: Final = {
    ExitCode.OK: "success",
    ExitCode.INTERNAL_ERROR: "internal error: please report it",
    ExitCode.USAGE: "an option, an argument or a .vv file is not valid",
    ExitCode.IMAGE: "an image, or another file of which a device is made, cannot be used",
    ExitCode.UNREACHABLE: "the VM cannot be reached",
    ExitCode.TLS: "TLS is required, or failed: the certificate is not trusted, or belongs to another host",
    ExitCode.DENIED: (
        "the password is wrong or missing, or the ticket expired; or a SPICE proxy does not permit the channel; or a "
        "Kubernetes API does not accept or permit this user"
    ),
    ExitCode.NO_PORT: "the VM has no free port: no usbredir channel, or all are in use",
    ExitCode.REFUSED: "the VM refused the device: its filter, its USB controller",
    ExitCode.GUEST_GONE: "the connection to the VM, or to a session, ended while it was in use",
    ExitCode.PROTOCOL: "the peer is not a SPICE or usbredir server, or violates the protocol",
    ExitCode.SETUP: "a program, a package or a permission is missing on this machine",
    ExitCode.DEVICE: "a device cannot be plugged in, or failed: written data may not be on stable storage",
    ExitCode.PAUSED: "farplug doctor: the VM does not answer: it is paused, or the port serves another client",
    ExitCode.NO_PROMPT: "farplug run: no shell in the VM answered",
    ExitCode.COMMAND_TIMED_OUT: "farplug run: the command in the VM did not end in time",
    ExitCode.COMMAND_FAILED: "farplug run failed; its other codes are those of the command in the VM",
    ExitCode.INTERRUPTED: "interrupted before a device was plugged in, or by a second Ctrl-C",
}


FIRST_STEPS: Final = "First steps"
CONNECTING: Final = "Plug devices in"
SESSIONS: Final = "Running sessions"
SCREEN: Final = "Screen, keyboard and shell of a VM"
TOOLS: Final = "Images, and devices of this machine"
"""Titles of panels in the help, in its order."""


@dataclass(frozen=True)
class Entry:
    """A command, or a group of commands.

    Attributes:
        panel: the title under which the help lists it.
        module: where it is, in this package.
        name: its function or its group there.
        summary: the first paragraph of its help.
        kind: the class that parses its command line; a group has its own.
        epilog: the end of its help.
    """

    panel: str
    module: str
    name: str
    summary: str
    kind: type[Command] = Command
    epilog: str | None = None

    def load(self, name: str) -> Any:
        """Import the command, and return it as Typer's command or group with a name."""
        found = getattr(import_module(f"farplug.cli.{self.module}"), self.name)
        if isinstance(found, typer.Typer):
            group = typer.main.get_group(found)
            group.name = name
            return group
        app = typer.Typer(add_completion=False)
        app.command(name, cls=self.kind, epilog=self.epilog)(found)
        return typer.main.get_command(app)


_EXIT_CODES_HELP = "\n".join(
    ["Exit codes", *(fill(f"{code:>3}  {what}", 78, subsequent_indent=" " * 5) for code, what in EXIT_CODES.items())]
)

ENTRIES: Final = {
    "demo": Entry(
        FIRST_STEPS,
        "demo",
        "demo",
        "Boot a small VM, plug in an image, read and write a file; then show the VM in the browser.",
    ),
    "doctor": Entry(
        FIRST_STEPS,
        "doctor",
        "doctor",
        "Check this machine for missing software, and show how to install it. Check the connection to TARGET.",
    ),
    "devices": Entry(
        FIRST_STEPS,
        "devices",
        "devices",
        "List USB devices and check images; show why one cannot be used and how to fix it.",
    ),
    "connect": Entry(
        CONNECTING,
        "connect",
        "connect",
        "Plug devices into the VM at TARGET, and keep them there until Ctrl-C.",
        epilog=_EXIT_CODES_HELP,
    ),
    "serve": Entry(CONNECTING, "serve", "serve", "Offer devices to USB/IP clients, until Ctrl-C."),
    "usbredirect": Entry(
        CONNECTING,
        "usbredirect",
        "usbredirect",
        "Plug one device into a usbredir socket, with the command line of usbredirect.",
    ),
    "ls": Entry(SESSIONS, "sessions", "ls", "List the running sessions."),
    "status": Entry(
        SESSIONS,
        "sessions",
        "status",
        "Show a session: its VM, its ports with what is in them, its devices with their figures.",
    ),
    "watch": Entry(
        SESSIONS, "sessions", "watch", "Show a session, then everything that happens in it, until it ends or Ctrl-C."
    ),
    "attach": Entry(SESSIONS, "sessions", "attach", "Plug devices into the VM of a running session."),
    "detach": Entry(
        SESSIONS,
        "sessions",
        "detach",
        "Take devices out of the VM of a running session, as one pulls a USB stick: unmount a disk in the VM first.",
    ),
    "insert": Entry(
        SESSIONS,
        "sessions",
        "insert",
        "Insert an ISO image into a CD-ROM drive of a running session, in place of the one that is there.",
    ),
    "eject": Entry(SESSIONS, "sessions", "eject", "Eject the medium of a CD-ROM drive of a running session."),
    "touch": Entry(
        SESSIONS,
        "sessions",
        "touch",
        "Touch a security key of a running session: allow what a program in the VM asks for.",
    ),
    "capture": Entry(
        SESSIONS,
        "capture",
        "capture",
        "Capture what moves between a running session's VM and its devices, for Wireshark.",
    ),
    "reconnect": Entry(
        SESSIONS,
        "sessions",
        "reconnect",
        "Connect a running session to its VM, which is lost, at once: without the delay before the next attempt.",
    ),
    "stop": Entry(
        SESSIONS,
        "sessions",
        "stop",
        "End a session: take its devices out of the VM, and wait until the session has ended.",
    ),
    "page": Entry(
        SCREEN, "page", "page", "Serve a page with the screen of a VM, its keyboard and mouse, and its USB sockets."
    ),
    "run": Entry(
        SCREEN,
        "run_command",
        "run",
        "Run a command in a VM that has no network, no agent and no SSH server, with its input, output and exit code.",
        kind=RunCommand,
    ),
    "screenshot": Entry(
        SCREEN, "screen", "screenshot", "Write the screen of a VM to a PNG file, in place of a PNG file that is there."
    ),
    "type": Entry(
        SCREEN,
        "screen",
        "type_text",
        "Type a text in a VM, on a USB keyboard that is plugged in for it, and have the VM confirm it.",
    ),
    "press": Entry(
        SCREEN,
        "screen",
        "press",
        "Press keys of a VM's keyboard: the names of X keysyms, in any case, and the characters of a US keyboard.",
    ),
    "click": Entry(
        SCREEN,
        "screen",
        "click",
        "Click with the mouse of a VM at a position of its screen, or on a USB tablet that is plugged in for it.",
    ),
    "mcp": Entry(
        SCREEN,
        "mcp",
        "mcp",
        "Let an agent use a VM: serve its screen, keyboard, mouse and USB sockets over MCP, on standard input and "
        "output.",
    ),
    "image": Entry(TOOLS, "image", "app", "Make disk images, and finish snapshots."),
    "device": Entry(TOOLS, "device", "app", "Make something of a USB device of this machine."),
}
"""The commands by their names, in the order of the help."""


class _Commands(Mapping[str, Any]):
    """The commands by their names. A command is imported when it is looked up."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = ENTRIES[name].load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ENTRIES)

    def __len__(self) -> int:
        return len(ENTRIES)


class Root(Group):
    """The command ``farplug``. Its help and its completion need the names and the summaries of commands only."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()  # type: ignore[assignment]  # nothing is added

    def list_commands(self, ctx: Any) -> list[str]:
        return list(ENTRIES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command that has the name and the summary only; None if there is no such command."""
        entry = ENTRIES.get(cmd_name)
        if entry is None:
            return None
        return typer.core.TyperCommand(cmd_name, help=entry.summary, rich_help_panel=entry.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is used."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, self.commands[name] if name else None, rest


app = typer.Typer(
    name="farplug",
    cls=Root,
    help="Plug disk images, ISOs, folders and USB devices of this machine into a VM.",
    epilog="'farplug connect --help' explains TARGET, and ends with the exit codes.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"farplug {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, debug_option()] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
