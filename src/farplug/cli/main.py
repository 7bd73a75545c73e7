"""``farplug``: run a command, and report its error."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper

import typer
import typer.main

from farplug.cli import log, writer
from farplug.cli.failure import Failure
from farplug.cli.tree import app
from farplug.errors import FarplugError, InternalError, Reason, Remedy
from farplug.exit_codes import ExitCode
from farplug.rate_limit import release_logs
from farplug.shell import shell_quote, shell_word

_EXTRA = re.compile(r"Got unexpected extra argument(?:\(s\)|s)? \((\S+)\)")
_BAD_ARGUMENTS: type[Exception] = typer.BadParameter.__bases__[0]
"""Base class of the errors of the command line's parser: Click's, or that of the copy of Click in Typer."""


def main() -> None:
    """Run ``farplug`` with the arguments of this process, and exit."""
    _prepare_standard_streams()
    if _COMPLETION in os.environ:  # the shell requests completions
        typer.main.get_command(app)(prog_name="farplug")
    sys.exit(run(sys.argv[1:]))


_COMPLETION = "_FARPLUG_COMPLETE"


def _prepare_standard_streams() -> None:
    """Replace closed streams by /dev/null. Escape characters that standard output cannot encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # an image could get its descriptor
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open until the process ends)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for standard error


def run(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit code. Print an error and its remedy on standard error.

    With ``--json`` the last line of standard output is the event ``failed``.
    """
    log.start()
    try:
        failure = _run(arguments)
        release_logs()
        writer.lift_bound()  # what follows is the reason of the end
        options = itertools.takewhile(lambda one: one != "--", arguments)
        return _report(failure, as_json="--json" in options)  # not parsed: errors of the parser are reported too
    finally:
        writer.finish()


def _report(failure: Failure | int | None, *, as_json: bool) -> int:
    if failure is None:
        return ExitCode.OK
    if isinstance(failure, int):
        return failure
    failure.report(as_json=as_json)
    return failure.exit_code


def _run(arguments: Sequence[str]) -> Failure | int | None:
    try:
        try:
            with typer.main.get_command(app).make_context("farplug", list(arguments)) as context:
                context.command.invoke(context)
        finally:
            sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except FarplugError as error:
        if isinstance(error, InternalError):
            log.traceback(error.__cause__)
        return Failure.of(error)
    except (BrokenPipeError, SystemExit):  # the reader of the output closed the pipe (rich raises SystemExit)
        log.discard(sys.stdout)
    except (KeyboardInterrupt, typer.Abort):
        return Failure("interrupted", Reason.INTERRUPTED, ExitCode.INTERRUPTED, Remedy())
    except _BAD_ARGUMENTS as error:
        context_of_error = getattr(error, "ctx", None)
        command = "farplug" if context_of_error is None else context_of_error.command_path
        message = error.format_message()  # type: ignore[attr-defined]
        # Typer checks values with pydantic, whose messages contain this prefix.
        message = message.rstrip(".").replace(": Value error, ", ": ")
        return Failure(message, Reason.BAD_OPTION, ExitCode.USAGE, _advice(command, message))
    except Exception as error:
        log.traceback(error)
        return Failure.of(InternalError(error))
    return None


def _advice(command: str, message: str) -> Remedy:
    """Return the remedy for wrong arguments: the option for an image, a folder or a VM that has none before it."""
    see = f"see: {command} --help"
    extra = _EXTRA.fullmatch(message)
    name = command.partition(" ")[2]
    if extra is None or name not in ("connect", "attach", "serve", "page"):
        return Remedy(see)
    argument = extra[1]
    if name == "page":
        return Remedy("name a session or a VM with an option:", command=f"farplug page -s {shell_quote(argument)}")
    option = "--usb-cdrom" if argument.lower().endswith(".iso") else "--usb-disk"
    if os.path.isdir(argument):
        option = "--usb-folder"
    return Remedy(f"to plug it in: {option} {shell_word(argument)}", alternative=Remedy(see))
