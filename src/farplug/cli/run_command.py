"""``farplug run``: a command in a VM that has no network, no agent and no SSH server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from farplug.app.commands import Via
from farplug.cli.options import DebugOption, given_command, with_fields
from farplug.cli.screen import LayoutOption, Place, ViaOption
from farplug.errors import Reason, UsageError

LOGIN = "Login"
FILES = "Files"


@dataclass(frozen=True, slots=True)
class Copy:
    """A file to copy.

    Attributes:
        source: its path.
        destination: its path on the other side; empty: the current folder there.
    """

    source: str
    destination: str = ""

    @classmethod
    def parse(cls, text: str, option: str) -> Copy:
        """Return what ``SOURCE[:DESTINATION]`` means. The last colon counts."""
        source, colon, destination = text.rpartition(":")
        if not colon:
            source, destination = destination, ""
        if not source or (colon and not destination):
            raise UsageError(
                f"{option} {text}: a path is missing",
                reason=Reason.BAD_OPTION,
                remedy="write SOURCE or SOURCE:DESTINATION; with a colon in SOURCE write both",
            )
        return cls(source, destination)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What ``farplug run`` does, in this order: files in, the command, files out; or a shell."""

    command: list[str]
    shell: bool
    no_input: bool
    copy_in: list[Copy]
    copy_out: list[Copy]
    timeout: float | None
    prompt_timeout: float
    user: str | None
    secret_file: Path | None
    login_delay: float
    layout: str
    via: Via


def _with_place(command: Any) -> Any:
    return with_fields(command, "place", Place)


@_with_place
def run(
    context: typer.Context,
    place: Place,
    shell: Annotated[
        bool, typer.Option("--shell", help="Run an interactive shell on this terminal in place of a command.")
    ] = False,
    no_input: Annotated[
        bool, typer.Option("--no-input", "-n", help="Give the command an empty standard input, not this one.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0.1,
            help="Terminate the command after this time, and exit with 124.",
            show_default=False,
        ),
    ] = None,
    prompt_timeout: Annotated[
        float,
        typer.Option("--prompt-timeout", metavar="SECONDS", min=1, help="Wait this long for an answer of a shell."),
    ] = 30,
    copy_in: Annotated[
        list[str] | None,
        typer.Option(
            "--copy-in",
            metavar="FILE[:PATH]",
            help="Copy FILE to PATH in the VM before the command, by default to the shell's folder. Repeatable.",
            show_default=False,
            rich_help_panel=FILES,
        ),
    ] = None,
    copy_out: Annotated[
        list[str] | None,
        typer.Option(
            "--copy-out",
            metavar="PATH[:FILE]",
            help="Copy PATH in the VM to FILE after the command, by default to the current folder. Repeatable.",
            show_default=False,
            rich_help_panel=FILES,
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            "--user",
            metavar="NAME",
            help="Log in as NAME first, when the VM asks for it.",
            show_default=False,
            rich_help_panel=LOGIN,
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            "--secret-file",
            metavar="FILE",
            help="Type the text of FILE without its last newline as the password of --user.",
            show_default=False,
            rich_help_panel=LOGIN,
        ),
    ] = None,
    login_delay: Annotated[
        float,
        typer.Option(
            "--login-delay",
            metavar="SECONDS",
            min=0,
            help="How long the VM needs to ask for the password, and to start a shell, if its screen cannot be read.",
            rich_help_panel=LOGIN,
        ),
    ] = 3,
    layout: LayoutOption = "us",
    via: ViaOption = Via.AUTO,
    *,
    debug: DebugOption = False,
) -> None:
    """Run a command in a VM that has no network, no agent and no SSH server, with its input, output and exit code.

    farplug plugs in a keyboard and serial lines as one USB device, types one line at the prompt of a shell on the \
VM's screen, and runs the command over the serial lines. The VM needs Linux with a POSIX shell and the driver cdc_acm. \
No shell interprets the command: for a pipe, write -- sh -c 'COMMAND | COMMAND'.

    Ctrl-C interrupts the command in the VM; the second one leaves. The exit code is that of the command; 123: no \
shell answered, 124: --timeout, 125: farplug failed. docs/run.md describes the rest.

    A running session carries the command out. With TARGET, farplug starts a session that ends with the command: a \
SPICE server serves one client at a time, so this ends the session of any other client of the VM.
    """
    command = given_command(context)
    if shell and command:
        raise UsageError("--shell and a command contradict each other", reason=Reason.BAD_OPTION)
    if not (shell or command or copy_in or copy_out):
        raise UsageError(
            "no command",
            reason=Reason.BAD_OPTION,
            remedy="write it after --: farplug run -- COMMAND; or give --shell, --copy-in or --copy-out",
        )
    if secret_file is not None and user is None:
        raise UsageError("--secret-file has no effect without --user", reason=Reason.BAD_OPTION)
    options = RunOptions(
        command,
        shell,
        no_input,
        [Copy.parse(one, "--copy-in") for one in copy_in or ()],
        [Copy.parse(one, "--copy-out") for one in copy_out or ()],
        timeout,
        prompt_timeout,
        user,
        secret_file,
        login_delay,
        layout,
        via,
    )
    target = place.settings(context)
    from farplug.cli import run_verb

    code = run_verb.run(place.session, target, options, debug=debug)
    if code:
        raise typer.Exit(code)
