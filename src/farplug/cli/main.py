"""``farplug``: the commands, and how an error ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from farplug.cli import connect, demo, devices, doctor, image, log
from farplug.cli.options import DebugOption
from farplug.errors import ExitCode, FarplugError
from farplug.text import printable
from farplug.version import __version__

EXIT_CODES = {
    ExitCode.OK: "everything that was asked for was done",
    ExitCode.DEFECT: "a defect in farplug: please report it",
    ExitCode.USAGE: "an option, an argument or a .vv file is wrong",
    ExitCode.IMAGE: "an image cannot be used",
    ExitCode.UNREACHABLE: "the VM cannot be reached",
    ExitCode.TLS: "TLS is needed, or failed: the certificate is not trusted, or is another host's",
    ExitCode.DENIED: "the password is wrong or missing, or the ticket expired",
    ExitCode.NO_PORT: "the VM has no free port: no usbredir channel, or all are in use",
    ExitCode.REFUSED: "the VM refused the device: its filter, its USB controller",
    ExitCode.GUEST_GONE: "the VM went away while it was in use",
    ExitCode.PROTOCOL: "what answers does not speak SPICE or usbredir, or breaks its rules",
    ExitCode.SETUP: "something is missing on this machine",
    ExitCode.DEVICE: "a device cannot be plugged in, or failed: what was written may not be on stable storage",
    ExitCode.INTERRUPTED: "interrupted: left at once, without waiting for the VM",
}

app = typer.Typer(
    name="farplug",
    help="Plug USB devices into virtual machines from afar.",
    epilog="\n".join(["Exit codes", *(f"{code:>3}  {what}" for code, what in EXIT_CODES.items())]),
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("connect")(connect.connect)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.add_typer(image.app, name="image")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"farplug {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: DebugOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


_BAD_ARGUMENTS: type[Exception] = typer.BadParameter.__bases__[0]
"""What the parser of the command line raises. Typer has it from Click, or from a Click of its own: not by name."""


def main() -> None:
    """The command ``farplug``."""
    _prepare_standard_streams()
    sys.exit(run(sys.argv[1:]))


def _prepare_standard_streams() -> None:
    """One that is closed leads nowhere. A character that the encoding of standard output lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # its descriptor would become that of an image
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open as long as we run)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does it for standard error


def run(arguments: Sequence[str]) -> int:
    """Run a command; its exit code. Every expected failure is one line, and a remedy, on standard error."""
    log.start()
    try:
        try:
            with typer.main.get_command(app).make_context("farplug", list(arguments)) as context:
                context.command.invoke(context)
        finally:
            sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except FarplugError as error:
        report(error)
        return error.exit_code
    except (BrokenPipeError, SystemExit):  # the reader of our output left (rich says it with SystemExit)
        log.discard(sys.stdout)
        return ExitCode.OK
    except (KeyboardInterrupt, typer.Abort):
        log.say("farplug: interrupted")
        return ExitCode.INTERRUPTED
    except _BAD_ARGUMENTS as error:
        context_of_error = getattr(error, "ctx", None)
        command = "farplug" if context_of_error is None else context_of_error.command_path
        message = error.format_message()  # type: ignore[attr-defined]
        log.say(f"farplug: {printable(message.rstrip('.'))}\n  see: {command} --help")
        return ExitCode.USAGE
    except Exception as error:
        log.defect(error)
        return ExitCode.DEFECT
    return ExitCode.OK


def report(error: FarplugError) -> None:
    """Tell a person what happened and what to do."""
    log.say(f"farplug: {printable(error.message)}")
    for line in log.remedy_lines(error.remedy):
        log.say(f"  {line}")
