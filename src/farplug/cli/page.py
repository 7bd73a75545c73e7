"""``farplug page``: a page for the browser, with the screens and the devices of sessions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from farplug.app.settings import TargetSettings
from farplug.cli.agent_options import RIGHTS, AgentOptions
from farplug.cli.options import (
    OUTPUT,
    PASSWORD_HELP,
    SESSION_VARIABLE,
    DebugOption,
    TargetOptions,
    target_of,
    with_fields,
    with_target_options,
)
from farplug.cli.sessions import session_option
from farplug.errors import Reason, UsageError
from farplug.transport import TARGET_FORMS

PAGE = "Page"
"""Title of the panel in the help."""
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
DEFAULT_QUOTA = "16G"


@dataclass(frozen=True, slots=True)
class PageOptions:
    """What the command was asked for.

    Attributes:
        session: a name; None: all sessions, or that of the target.
        target: start a session of this target first; None: use running ones.
        address: where the page listens.
        port: 0: any.
        certificate: PEM file; None: no TLS.
        key: PEM file of its key.
        web_root: the folder below which browsers may name files; None: none.
        upload_quota: bytes of uploads.
        view_only: print a second link, for watching.
        agents: what agents may do; None: there is no MCP server.
        open: start the browser.
        json: print an object.
    """

    session: str | None
    target: TargetSettings | None
    address: str
    port: int
    certificate: str | None
    key: str | None
    web_root: str | None
    upload_quota: int
    view_only: bool
    agents: AgentOptions | None
    open: bool
    json: bool


def _with_groups(command: Callable[..., None]) -> Callable[..., None]:
    return with_target_options(with_fields(command, "agents", AgentOptions))


@_with_groups
def page(
    context: typer.Context,
    session: Annotated[
        str | None,
        session_option(
            "NAME|TARGET",
            f"The name of a running session; or where a VM is, {TARGET_FORMS}: farplug connects to it, and leaves it "
            f"with the page. By default the session in {SESSION_VARIABLE}, else all sessions.",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="N", min=0, max=65535, help="The port of the page; 0: any.", rich_help_panel=PAGE
        ),
    ] = 0,
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="ADDRESS",
            help="Where the page listens. Addresses that other machines reach need --tls-cert and --tls-key.",
            rich_help_panel=PAGE,
        ),
    ] = "127.0.0.1",
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            metavar="FILE",
            help="Serve the page over TLS, with the certificate in FILE (PEM).",
            show_default=False,
            rich_help_panel=PAGE,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key",
            metavar="FILE",
            help="The private key of the certificate (PEM).",
            show_default=False,
            rich_help_panel=PAGE,
        ),
    ] = None,
    open: Annotated[bool, typer.Option("--open", help="Show the page in the browser.", rich_help_panel=PAGE)] = False,
    view_only: Annotated[
        bool,
        typer.Option("--view-only", help="Print a second link, with which one can only watch.", rich_help_panel=PAGE),
    ] = False,
    web_root: Annotated[
        Path | None,
        typer.Option(
            "--web-root",
            metavar="DIR",
            help="Let the page plug in images and folders below DIR. By default only files of the browser and uploads "
            "can be plugged in.",
            show_default=False,
            rich_help_panel=PAGE,
        ),
    ] = None,
    upload_quota: Annotated[
        str,
        typer.Option(
            "--upload-quota",
            metavar="SIZE",
            help="Bytes of all uploads, with k, M, G or T for powers of 1000; 0: no uploads.",
            rich_help_panel=PAGE,
        ),
    ] = DEFAULT_QUOTA,
    mcp: Annotated[
        bool,
        typer.Option(
            "--mcp",
            help="Let an agent use the VM, too: serve MCP over HTTP below the page, with a token of its own. Needs a "
            "session.",
            rich_help_panel=RIGHTS,
        ),
    ] = False,
    *,
    agents: AgentOptions,
    access: TargetOptions,
    json: Annotated[
        bool, typer.Option("--json", help="Print one object with the links as JSON.", rich_help_panel=OUTPUT)
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Serve a page with the screen of a VM, its keyboard and mouse, and its USB sockets.

    The link has a secret token: who has the link can use the VM, and plug in what this user can. The page is reached \
from this machine only, unless --listen names another address. Ctrl-C ends the page. A session that was running before \
continues; one that the page started ends with it.
    """
    target = target_of(session, access, "a TARGET in --session")
    if not mcp:
        agents.check_unused("--mcp")
    elif session is None:
        raise UsageError(
            "--mcp needs a session", reason=Reason.BAD_OPTION, remedy="name it: --session NAME; farplug ls lists them"
        )
    agents.check()
    options = PageOptions(
        None if target is not None else session,
        target,
        listen,
        port,
        None if tls_cert is None else str(tls_cert),
        None if tls_key is None else str(tls_key),
        None if web_root is None else str(web_root),
        _bytes(upload_quota),
        view_only,
        agents if mcp else None,
        open,
        json,
    )
    from farplug.cli import page_server

    page_server.run(options, debug=debug)


page.__doc__ = f"{page.__doc__}\n{PASSWORD_HELP}\n"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([kMGT]?)", text, re.ASCII)
    if match is None:
        raise UsageError(
            f"--upload-quota: {text!r} is not a valid size",
            reason=Reason.BAD_OPTION,
            remedy="write it as 500M, 16G or 1.5T",
        )
    return round(float(match[1]) * _UNITS[match[2]])
