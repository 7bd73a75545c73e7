"""``farplug mcp``: an MCP server, with which an agent uses a VM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from farplug.app.settings import TargetSettings
from farplug.cli import completion
from farplug.cli.agent_options import AgentOptions
from farplug.cli.options import (
    SESSION_VARIABLE,
    DebugOption,
    TargetOptions,
    target_of,
    with_fields,
)
from farplug.cli.screen import DisplayOption
from farplug.transport import TARGET_FORMS


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command was asked for.

    Attributes:
        session: a name; None: the only one, or that of the target.
        target: start a session of this target; None: use a running one.
        display: the number of the display.
        agents: what the agent may do.
    """

    session: str | None
    target: TargetSettings | None
    display: int
    agents: AgentOptions


def _with_access(command: Callable[..., None]) -> Callable[..., None]:
    """Replace ``access``, without the prompt for a password: standard input carries the protocol; and ``agents``."""
    return with_fields(with_fields(command, "access", TargetOptions, without=("ask_password",)), "agents", AgentOptions)


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
    *,
    agents: AgentOptions,
    display: DisplayOption = 0,
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
    target = target_of(session, access, "a TARGET")
    agents.check()
    from farplug.cli import mcp_server

    options = ServerOptions(None if target is not None else session, target, display, agents)
    mcp_server.run(options, debug=debug)
