"""``farplug mcp``: an MCP server, with which an agent uses a VM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from farplug.app.settings import TargetSettings
from farplug.cli import completion
from farplug.cli.options import (
    SESSION_VARIABLE,
    DebugOption,
    TargetOptions,
    with_fields,
)
from farplug.cli.screen import DisplayOption
from farplug.errors import Reason, UsageError
from farplug.transport import TARGET_FORMS

RIGHTS = "What the agent may do"
"""Title of the panel in the help."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command was asked for.

    Attributes:
        session: a name; None: the only one, or that of the target.
        target: start a session of this target; None: use a running one.
        display: the number of the display.
        read_only: tools that look, and no others.
        allow: folders whose files may be plugged in.
        allow_write: also disks that the VM writes to.
        allow_devices: also USB devices of this machine.
        secrets: a file; None: none.
        audit: a file; None: no records.
    """

    session: str | None
    target: TargetSettings | None
    display: int
    read_only: bool
    allow: tuple[Path, ...]
    allow_write: bool
    allow_devices: bool
    secrets: Path | None
    audit: Path | None


def _with_access(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``access``, without the prompt for a password: standard input carries the protocol."""
    return with_fields(command, "access", TargetOptions, without=("ask_password",))


@_with_access
def mcp(
    session: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|TARGET",
            envvar=SESSION_VARIABLE,
            show_envvar=False,
            autocompletion=completion.sessions,
            help=f"The name of a running session; or where a VM is, {TARGET_FORMS}: farplug connects to it, and leaves "
            f"it with the server. By default the session in {SESSION_VARIABLE}, else the only one that is running.",
            show_default=False,
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Let it look, and do nothing else.", rich_help_panel=RIGHTS)
    ] = False,
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            "--allow",
            metavar="DIR",
            help="Let it plug in images and folders below DIR, and insert ISO images. What the VM writes to disks is "
            "discarded. May be given several times. By default no file of this machine can be used.",
            show_default=False,
            rich_help_panel=RIGHTS,
        ),
    ] = None,
    allow_write: Annotated[
        bool,
        typer.Option(
            "--allow-write",
            help="Let it plug in disks below --allow so that the VM changes the image. You are asked each time, if the "
            "agent's program can ask.",
            rich_help_panel=RIGHTS,
        ),
    ] = False,
    allow_devices: Annotated[
        bool,
        typer.Option(
            "--allow-devices",
            help="Let it plug in USB devices of this machine. You are asked each time, if the agent's program can ask.",
            rich_help_panel=RIGHTS,
        ),
    ] = False,
    secrets: Annotated[
        Path | None,
        typer.Option(
            "--secrets",
            metavar="FILE",
            help="Texts that it types by their names, and does not see: a file with lines NAME=TEXT, which only you "
            "may read.",
            show_default=False,
            rich_help_panel=RIGHTS,
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            "--audit",
            metavar="FILE",
            help="Append a record of each call to FILE, as JSON lines. Without a record nothing is done.",
            show_default=False,
            rich_help_panel=RIGHTS,
        ),
    ] = None,
    display: DisplayOption = 0,
    *,
    access: TargetOptions,
    debug: DebugOption = False,
) -> None:
    """Let an agent use a VM: serve its screen, keyboard, mouse and USB sockets over MCP, on standard input and output.

    The agent's program starts this command: see docs/agents.md for its configuration. A person who has 'farplug page' \
open sees each act, and takes the keyboard and the mouse with one click. farplug must be installed with its extra "mcp".

    Passwords: --password-file, FARPLUG_PASSWORD in the environment and .vv files keep the SPICE password secret. \
Everybody who can list the processes of this machine can read a password in TARGET. FARPLUG_PASSWORD is not used for a \
.vv file.
    """
    from farplug.cli.joining import target_of

    target = target_of(session, access, "a TARGET")
    rights = {"--allow": allow, "--allow-write": allow_write, "--allow-devices": allow_devices, "--secrets": secrets}
    if read_only and (option := next((name for name, value in rights.items() if value), None)):
        raise UsageError(f"--read-only and {option} contradict each other", reason=Reason.BAD_OPTION)
    if allow_write and not allow:
        raise UsageError(
            "--allow-write has no effect without --allow", reason=Reason.BAD_OPTION, remedy="name a folder: --allow DIR"
        )
    from farplug.cli import mcp_server

    options = ServerOptions(
        None if target is not None else session,
        target,
        display,
        read_only,
        tuple(allow or ()),
        allow_write,
        allow_devices,
        secrets,
        audit,
    )
    mcp_server.run(options, debug=debug)
