"""Options that several commands share."""

from __future__ import annotations

import functools
import getpass
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, get_type_hints

import typer
import typer.core

from farplug.cli import log
from farplug.cli.values import without_pydantic
from farplug.errors import FarplugError, Reason, UsageError, from_oserror
from farplug.programs import PASSWORD_VARIABLE
from farplug.text import printable
from farplug.transport import TARGET_FORMS

if TYPE_CHECKING:
    from farplug.app.settings import ReconnectSettings, TargetSettings

SESSION_VARIABLE = "FARPLUG_SESSION"
MAX_PASSWORD_LINE = 1024
"""Maximum length of the first line of a password file, in characters; a SPICE password has at most 60 bytes."""


IMAGES = "Images"
SOFTWARE = "Devices made of software"
TUNING = "How the VM sees images"
DEVICES = "USB devices of this machine"
CONNECTION = "Connection (SPICE)"
CONNECTION_USBIP = "Connection (USB/IP)"
SESSION = "Session"
OUTPUT = "Output and commands"
"""Titles of panels in the help."""


def _prepared(parameters: list[Any]) -> list[Any]:
    """Return the parameters without types of Python: Typer shows ``<bool>`` for flags, ``<str>`` for arguments."""
    for parameter in parameters:
        without_pydantic(parameter)
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = _no_type
        if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False):
            parameter.metavar = ""
    return parameters


def _no_type(ctx: Any) -> None:
    return None


def _usage(argument: Any) -> str:
    """Return what the usage shows of an argument; a metavar of several words has its own brackets."""
    name = str(argument.metavar or argument.name.upper())
    if " " in name:
        return name
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


class Group(typer.core.TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _prepared(super().get_params(ctx))


class Command(typer.core.TyperCommand):
    """A command that records the order of its options, and whose errors have its context."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _prepared(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage shows: some versions of Typer add brackets to a metavar, others none."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *map(_usage, arguments)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line twice: Click does not keep the order of different options."""
        args = list(_with_values(args))
        try:
            _, _, order = self.make_parser(ctx).parse_args(args=[*args])
            ctx.meta[_ORDER] = [parameter.name for parameter in order]
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


class RunCommand(Command):
    """A command of which everything after ``--`` is a command for the VM."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what follows ``--``, and parse the rest."""
        args = list(args)
        place = args.index("--") if "--" in args else len(args)
        ctx.meta[_FOR_VM] = args[place + 1 :]
        return super().parse_args(ctx, args[:place])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage shows, with the command."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND [ARGUMENT]...]"]


OPTIONAL_VALUES = {"--reconnect": "forever"}
"""Options whose value may be missing, with the value that they have then. The value comes after "="."""


def _with_values(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments of a command; options whose value is missing get it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for position, argument in enumerate(arguments):
        if argument in OPTIONAL_VALUES and position < end:
            yield f"{argument}={OPTIONAL_VALUES[argument]}"
        else:
            yield argument


_ORDER = "farplug.order"


def given_order(context: typer.Context) -> list[str]:
    """Return the names of the parameters that were given to a :class:`Command`, in order, with repetitions."""
    order: list[str] = context.meta[_ORDER]
    return order


_FOR_VM: Final = "farplug.command"


def given_command(context: typer.Context) -> list[str]:
    """Return the command for the VM that a :class:`RunCommand` was given, after ``--``."""
    command: list[str] = context.meta[_FOR_VM]
    return command


def with_fields(
    command: Callable[..., None], parameter: str, kind: type[Any], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Return a command that has the fields of a dataclass as its options, in place of one parameter.

    Args:
        command: the command.
        parameter: the name of the parameter, which gets an instance of the dataclass.
        kind: the dataclass, whose fields are annotated as options, or are such dataclasses.
        without: names of fields that the command has no option for: they keep their defaults.
    """

    def with_options(**values: Any) -> None:
        made = _from_options(kind, values)
        command(**{parameter: made}, **values)

    own = get_type_hints(command, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    for one in inspect.signature(command).parameters.values():
        if one.name == parameter:
            parameters += [option for option in _options_of(kind) if option.name not in without]
        else:
            parameters.append(one.replace(kind=keyword, annotation=own[one.name]))
    functools.update_wrapper(with_options, command)
    del vars(with_options)["__wrapped__"]  # that one has other parameters
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def _options_of(kind: type[Any]) -> Iterator[inspect.Parameter]:
    """Yield the fields of a dataclass, and of the dataclasses in it, as parameters of a command."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _options_of(hint)  # type: ignore[arg-type]  # a class
        else:
            yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)


def _from_options(kind: type[Any], values: dict[str, Any]) -> Any:
    """Return an instance of a dataclass, and of the dataclasses in it; take its fields out of the values."""
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            given[field.name] = _from_options(hint, values)  # type: ignore[arg-type]  # a class
        elif field.name in values:
            given[field.name] = values.pop(field.name)
    return kind(**given)


class BlockSizeOption(StrEnum):
    """Values of ``--block-size``."""

    B512 = "512"
    B4096 = "4096"


TargetArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="TARGET", help=f"Where the VM is: {TARGET_FORMS}.", show_default=False)
]
OptionalTargetArgument: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="TARGET", help=f"Where the VM is: {TARGET_FORMS}.", show_default=False),
]
TargetCommandOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--target-command",
        metavar="COMMAND",
        help="In place of TARGET: a shell command that prints a .vv file. It is run for each attempt to connect, for "
        "tickets that expire.",
        rich_help_panel=CONNECTION,
        show_default=False,
    ),
]
ReconnectOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--reconnect",
        metavar="[DURATION]",
        help="Connect again to a VM that restarts or is lost, and plug the devices in again. --reconnect=10m gives up "
        "after 10 minutes (s, m, h). Default: with --detach forever, otherwise not.",
        rich_help_panel=CONNECTION,
        show_default=False,
    ),
]
NoReconnectOption: TypeAlias = Annotated[
    bool,
    typer.Option("--no-reconnect", help="With --detach: end when the VM is lost.", rich_help_panel=CONNECTION),
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
AllowPlainOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-plain",
        help="Use the plain port where the server has no TLS, although a CA, a host subject or secure-channels demands "
        "TLS. Any server that answers there can read the password.",
        rich_help_panel=CONNECTION,
    ),
]


def debug_option(panel: str | None = None) -> Any:
    """Return the option ``--debug``, which the help lists under the title of a panel."""
    text = "Log the traffic on standard error, one line per packet."
    return typer.Option("--debug", callback=log.debug, help=text, rich_help_panel=panel)


DebugOption: TypeAlias = Annotated[bool, debug_option(OUTPUT)]

PASSWORD_HELP = (
    f"Passwords: --password-file, --ask-password, {PASSWORD_VARIABLE} in the environment and .vv files keep the SPICE "
    "password secret. Everybody who can list the processes of this machine can read a password in TARGET "
    f"(spice://:secret@host:port). {PASSWORD_VARIABLE} is not used for a .vv file. If the server requires a password "
    "and none was given, farplug prompts for it on the terminal."
)


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def reconnect_settings(reconnect: str | None, no_reconnect: bool, *, detach: bool) -> ReconnectSettings | None:
    """Return the options as settings; None: the session ends when the VM is lost.

    Raises:
        UsageError: the duration is not valid, or the options contradict each other.
    """
    from farplug.app.settings import ReconnectSettings

    if no_reconnect and reconnect is not None:
        raise UsageError("--reconnect and --no-reconnect contradict each other", reason=Reason.BAD_OPTION)
    if reconnect is None:
        return ReconnectSettings() if detach and not no_reconnect else None
    if reconnect == OPTIONAL_VALUES["--reconnect"]:
        return ReconnectSettings()
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smh]?)", reconnect, re.ASCII)
    if match is None or not float(match[1]):
        raise UsageError(
            f"--reconnect={reconnect}: {reconnect!r} is not a valid duration",
            reason=Reason.BAD_OPTION,
            remedy="write it as --reconnect=30s, --reconnect=10m or --reconnect=2h, or without a duration",
        )
    return ReconnectSettings(limit=float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """How the VM at a target is reached. Each field is an option, in the order of the help."""

    password_file: PasswordFileOption = None
    ask_password: AskPasswordOption = False
    ca_file: CaFileOption = None
    host_subject: HostSubjectOption = None
    proxy: ProxyOption = None
    allow_plain: AllowPlainOption = False

    def settings(self, target: str | None, command: str | None = None) -> TargetSettings:
        """Return the options as settings. A password in the environment is used only if there is no other one.

        Raises:
            UsageError: the password cannot be read, there is no target, or two, or the target is a running session.
        """
        from farplug.app.settings import TargetSettings

        if (target is None) is (command is None):
            raise UsageError(
                "TARGET and --target-command contradict each other" if command else "Missing argument 'TARGET'",
                reason=Reason.BAD_OPTION,
                remedy=f"name one of them; TARGET is {TARGET_FORMS}",
            )
        if target is not None:
            check_no_session(
                target, f"use a command for sessions, such as: farplug attach -s {target} or farplug status -s {target}"
            )
        password = None
        if self.ask_password:
            password = prompt_for_password()
        elif self.password_file is not None:
            password = _read_password(self.password_file)
        return TargetSettings(
            target or "",
            password=password,
            fallback_password=os.environ.get(PASSWORD_VARIABLE, ""),
            ca_file=None if self.ca_file is None else str(self.ca_file),
            host_subject=self.host_subject,
            proxy=self.proxy,
            allow_plain=self.allow_plain,
            command=command,
        )

    def check_unused(self, needed: str, remedy: str = "") -> None:
        """Raise ``UsageError`` if an option was given, which has no effect without a target.

        Args:
            needed: what is missing, for the message.
            remedy: what to do.
        """
        for field in fields(self):
            if getattr(self, field.name):
                raise UsageError(
                    f"--{field.name.replace('_', '-')} has no effect without {needed}",
                    reason=Reason.BAD_OPTION,
                    remedy=remedy,
                )


def is_target(text: str) -> bool:
    """Return whether a text is a target, not the name of a session. A running session with this name comes first."""
    return not is_session(text) and (has_form_of_target(text) or os.path.isfile(text))


def is_session(text: str) -> bool:
    """Return whether a text is the name of a session that may run."""
    from farplug.control.names import socket_path

    try:
        return socket_path(text).exists()
    except FarplugError:
        return False  # it is not a name


def check_no_session(target: str, remedy: str) -> None:
    """Raise ``UsageError`` with this remedy if a running session is named in place of a target."""
    if not has_form_of_target(target) and is_session(target):
        raise UsageError(f"{target} is a running session, not a TARGET", reason=Reason.BAD_OPTION, remedy=remedy)


def has_form_of_target(text: str) -> bool:
    """Return whether a text can only be a target, or the name of a .vv file."""
    return "://" in text or text.startswith("unix:") or text.endswith(".vv")


def target_of(session: str | None, access: TargetOptions, needed: str) -> TargetSettings | None:
    """Return the target that ``--session``, or the argument in its place, names; None: it names a session, or nothing.

    Raises:
        UsageError: the password cannot be read, or an option for a target is given without one; ``needed`` names it.
    """
    if session is not None and is_target(session):
        return access.settings(session)
    access.check_unused(needed, f"write a target as one of {TARGET_FORMS}")
    return None


def with_target_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``access`` by the fields of :class:`TargetOptions`."""
    return with_fields(command, "access", TargetOptions)


def has_terminal() -> bool:
    """Return whether farplug can prompt the user."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def prompt_for_password() -> str:
    """Prompt for the password on the terminal, without echo.

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


def ask_on_terminal(question: str) -> str | None:
    """Show a refusal of the server, and prompt for another password; return None if there is no terminal."""
    if not has_terminal():
        return None
    log.say(f"farplug: {printable(question)}")
    return prompt_for_password()


def _read_password(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:  # editors on Windows write a byte order mark
            line = file.readline(MAX_PASSWORD_LINE)
    except OSError as error:
        raise from_oserror(path, error, as_=UsageError, problem="cannot be read") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--password-file {path} is not text in UTF-8", reason=Reason.BAD_OPTION) from error
    password = line.rstrip("\r\n")
    if not password:
        raise UsageError(f"--password-file {path} has no password: its first line is empty", reason=Reason.BAD_OPTION)
    return password
