"""``farplug``: run a command, and report its error."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from farplug.cli import (
    capture,
    connect,
    demo,
    device,
    devices,
    doctor,
    image,
    log,
    mcp,
    page,
    run_command,
    screen,
    serve,
    sessions,
    usbredirect,
    writer,
)
from farplug.cli.failure import Failure
from farplug.cli.options import Command, DebugOption, Group
from farplug.errors import FarplugError, InternalError, Reason, Remedy
from farplug.exit_codes import ExitCode
from farplug.rate_limit import release_logs
from farplug.version import __version__

EXIT_CODES = {
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

app = typer.Typer(
    name="farplug",
    cls=Group,
    help="Plug disk images, ISOs, folders and USB devices of this machine into a VM.",
    epilog="'farplug connect --help' ends with the exit codes.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXIT_CODES_HELP = "\n".join(["Exit codes", *(f"{code:>3}  {what}" for code, what in EXIT_CODES.items())])
app.command("connect", cls=Command, epilog=_EXIT_CODES_HELP)(connect.connect)
app.command("serve", cls=Command)(serve.serve)
app.command("devices", cls=Command)(devices.devices)
for _command in (
    sessions.ls,
    sessions.status,
    sessions.attach,
    sessions.detach,
    sessions.insert,
    sessions.eject,
    sessions.reconnect,
    sessions.touch,
    sessions.watch,
    sessions.stop,
    capture.capture,
):
    app.command(_command.__name__, cls=Command)(_command)
app.command("screenshot", cls=Command)(screen.screenshot)
app.command("type", cls=Command)(screen.type_text)
app.command("press", cls=Command)(screen.press)
app.command("click", cls=Command)(screen.click)
app.command("run", cls=run_command.RunCommand)(run_command.run)
app.command("page", cls=Command)(page.page)
app.command("mcp", cls=Command)(mcp.mcp)
app.command("usbredirect", cls=Command)(usbredirect.usbredirect)
app.command("doctor", cls=Command)(doctor.doctor)
app.command("demo", cls=Command)(demo.demo)
app.add_typer(image.app, name="image")
app.add_typer(device.app, name="device")


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
        return Failure(message, Reason.BAD_OPTION, ExitCode.USAGE, Remedy(f"see: {command} --help"))
    except Exception as error:
        log.traceback(error)
        return Failure.of(InternalError(error))
    return None
