"""Options that several commands share."""

from __future__ import annotations

import getpass
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
import typer.core

from farplug.app.settings import TargetSettings
from farplug.cli import log
from farplug.errors import Reason, UsageError
from farplug.transport import TARGET_FORMS

PASSWORD_VARIABLE = "FARPLUG_PASSWORD"
MAX_PASSWORD_LINE = 1024
"""Characters of a password file's first line; a SPICE password has 60 bytes at most."""


IMAGES = "Images"
TUNING = "How the VM sees images"
DEVICES = "USB devices of this machine"
CONNECTION = "Connection (SPICE)"
OUTPUT = "Output and commands"
"""Panels of the help."""


def _without_type(parameters: list[Any]) -> list[Any]:
    """Return parameters; of those without a value no type is shown in the help, where Typer has ``<bool>``."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Group(typer.core.TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type(super().get_params(ctx))


class Command(typer.core.TyperCommand):
    """A command that keeps the order of its options, and that errors name."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, twice: Click drops the order in which different options were given."""
        try:
            _, _, order = self.make_parser(ctx).parse_args(args=[*args])
            ctx.meta[_ORDER] = [parameter.name for parameter in order]
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


_ORDER = "farplug.order"


def given_order(context: typer.Context) -> list[str]:
    """Return the names of the parameters of a :class:`Command`, once for each time that they were given, in order."""
    order: list[str] = context.meta[_ORDER]
    return order


class BlockSizeOption(StrEnum):
    """Values of ``--block-size``."""

    B512 = "512"
    B4096 = "4096"


TargetArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="TARGET", help=f"Where the VM is: {TARGET_FORMS}.", show_default=False)
]
PasswordFileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        metavar="FILE",
        help="Read the SPICE password from the first line of FILE.",
        rich_help_panel=CONNECTION,
        show_default=False,
    ),
]
AskPasswordOption: TypeAlias = Annotated[
    bool, typer.Option("--ask-password", help="Ask for the SPICE password on the terminal.", rich_help_panel=CONNECTION)
]
CaFileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        metavar="FILE",
        help="Trust the certificates in FILE (PEM) for TLS.",
        show_default=False,
        rich_help_panel=CONNECTION,
    ),
]
HostSubjectOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--host-subject",
        metavar="SUBJECT",
        help="Check the server certificate's subject (such as 'O=Lab,CN=vmhost') instead of the host name.",
        show_default=False,
        rich_help_panel=CONNECTION,
    ),
]
ProxyOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        metavar="URL",
        help="Reach a SPICE server through an HTTP proxy.",
        show_default=False,
        rich_help_panel=CONNECTION,
    ),
]
DebugOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=log.debug,
        help="Show the traffic on standard error, one line a packet.",
        rich_help_panel=OUTPUT,
    ),
]

PASSWORD_HELP = (
    f"Passwords: --password-file, --ask-password, {PASSWORD_VARIABLE} in the environment and .vv files keep the SPICE "
    "password to yourself. One written into TARGET (spice://:secret@host:port) is seen by everybody who can list this "
    "machine's processes. If the server wants one and none was given, it is asked for on the terminal."
)


def target_settings(
    target: str,
    password_file: Path | None,
    ask_password: bool,
    ca_file: Path | None,
    host_subject: str | None,
    proxy: str | None,
) -> TargetSettings:
    """Return the settings that the options make. The environment's password counts only where nothing else gives one.

    Raises:
        UsageError: the password cannot be read.
    """
    password = None
    if ask_password:
        password = prompt_for_password()
    elif password_file is not None:
        password = _read_password(password_file)
    return TargetSettings(
        target,
        password=password,
        fallback_password=os.environ.get(PASSWORD_VARIABLE, ""),
        ca_file=None if ca_file is None else str(ca_file),
        host_subject=host_subject,
        proxy=proxy,
    )


def has_terminal() -> bool:
    """Whether a person can be asked something."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def prompt_for_password() -> str:
    """Ask for the password on the terminal, without showing it.

    Raises:
        UsageError: there is no terminal.
    """
    if not has_terminal():
        raise UsageError(
            "--ask-password needs a terminal",
            reason=Reason.BAD_OPTION,
            remedy=f"use --password-file, or {PASSWORD_VARIABLE} in the environment",
        )
    try:
        return getpass.getpass("SPICE password: ")
    except EOFError:
        raise UsageError("no password was given", reason=Reason.BAD_OPTION) from None


def _read_password(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:  # editors on Windows begin with a byte order mark
            line = file.readline(MAX_PASSWORD_LINE)
    except OSError as error:
        what = os.strerror(error.errno or 0)
        raise UsageError(f"--password-file {path} cannot be read: {what}", reason=Reason.BAD_OPTION) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--password-file {path} is not text in UTF-8", reason=Reason.BAD_OPTION) from error
    password = line.rstrip("\r\n")
    if not password:
        raise UsageError(f"--password-file {path} has no password: its first line is empty", reason=Reason.BAD_OPTION)
    return password
