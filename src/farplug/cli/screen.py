"""``farplug screenshot``, ``type``, ``press`` and ``click``: the screen, the keyboard and the mouse of a VM."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farplug.app.commands import ButtonName, Click, Command, Press, Screenshot, TypeText, Via
from farplug.app.settings import TargetSettings
from farplug.cli import completion
from farplug.cli.options import (
    PASSWORD_HELP,
    SESSION_VARIABLE,
    DebugOption,
    OptionalTargetArgument,
    TargetOptions,
    check_no_session,
    has_form_of_target,
    target_of,
    with_fields,
)
from farplug.cli.sessions import JsonOption, session_option
from farplug.errors import Reason, UsageError, from_oserror

if TYPE_CHECKING:
    from farplug.app.ducky import Delay

PIECE = 250
"""Characters that are typed with one request: after Ctrl-C no more than these follow."""
MAX_FILE = 1 << 20
"""Characters of a file that is typed."""
STANDARD_INPUT = "-"

ViaOption = Annotated[
    Via,
    typer.Option(
        "--via",
        help="On a USB device (usb), through SPICE (spice), or on a USB device if the VM uses one or has a free port "
        "for it (auto).",
    ),
]
LayoutOption = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="NAME",
        help="The keyboard layout that the VM uses: us, de, fr, ... or with a variant us-intl.",
        autocompletion=completion.layouts,
    ),
]
DisplayOption = Annotated[
    int, typer.Option("--display", metavar="N", min=0, help="The number of the display, for a VM with several.")
]
SessionOrTargetOption = Annotated[
    str | None,
    session_option(
        "NAME|TARGET",
        f"The name of a running session, or a TARGET; by default that in {SESSION_VARIABLE}, else the only session "
        "that is running.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a command is carried out: a running session, or a target."""

    target: OptionalTargetArgument = None
    session: SessionOrTargetOption = None
    access: TargetOptions

    def settings(self, context: typer.Context) -> TargetSettings | None:
        """Return the target as settings; None: a running session carries the command out.

        Raises:
            UsageError: the options contradict each other.
        """
        if self.target is None:
            return target_of(self.session, self.access, "TARGET")
        source = context.get_parameter_source("session")
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                "TARGET and --session contradict each other",
                reason=Reason.BAD_OPTION,
                remedy="name the session, which serves the VM already, or the target of a VM without one",
            )
        if not has_form_of_target(self.target):
            self._check_order(context)
        return self.access.settings(self.target)

    def _check_order(self, context: typer.Context) -> None:
        """Check that TARGET is neither a session nor what comes before it, which no message quotes.

        Raises:
            UsageError: it is.
        """
        target = self.target or ""
        check_no_session(target, f"name it with an option: -s {target}")
        arguments = [one for one in context.command.params if one.param_type_name == "argument"]
        if has_form_of_target(str(context.params.get(arguments[0].name or ""))):
            order = " ".join(str(one.metavar) for one in arguments)
            raise UsageError(
                "TARGET is the last argument",
                reason=Reason.BAD_OPTION,
                remedy=f"write it as: {context.command_path} {order}",
            )


def _with_place(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``place`` by the fields of :class:`Place`; add to its help what they mean."""
    whole = with_fields(command, "place", Place)
    whole.__doc__ = f"""{inspect.cleandoc(command.__doc__ or "")}

A running session carries the command out. With TARGET, also as the value of --session, farplug connects alone: a \
SPICE server serves one client at a time, so this ends the session of any other client of the VM, also one that has \
devices plugged in.

{PASSWORD_HELP}
"""
    return whole


@_with_place
def screenshot(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The PNG file.", show_default=False)],
    place: Place,
    display: DisplayOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the screen of a VM to a PNG file, in place of a PNG file that is there."""
    if file == "-":
        raise UsageError(
            "a session writes to files, not to the standard output of this command",
            reason=Reason.BAD_OPTION,
            remedy="name a file",
        )
    (result,) = _carry_out(context, place, [Screenshot(os.path.abspath(file), display)])
    typer.echo(dumps(result) if json else f"{file}: {result['width']}x{result['height']}")


@_with_place
def type_text(
    context: typer.Context,
    *,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="What to type; '-' reads it from standard input, where passwords are not seen by other users.",
            show_default=False,
        ),
    ] = None,
    place: Place,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Type the text of a file, in UTF-8.", show_default=False),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            "--secret-file",
            metavar="FILE",
            help="Type the text of a file without its last newline, and quote no character of it in errors.",
            show_default=False,
        ),
    ] = None,
    ducky: Annotated[
        Path | None,
        typer.Option(
            "--ducky",
            metavar="FILE",
            help="Carry out a script in DuckyScript 1: STRING, DELAY, keys, REPEAT.",
            show_default=False,
        ),
    ] = None,
    layout: LayoutOption = "us",
    via: ViaOption = Via.AUTO,
    debug: DebugOption = False,
) -> None:
    """Type a text in a VM, on a USB keyboard that is plugged in for it, and have the VM confirm it.

    A newline is the Return key. The exit code is 0 if the VM has confirmed that it took all of the text, or if SPICE \
was asked for (--via spice), which confirms nothing.
    """
    from farplug.app.ducky import parse_ducky
    from farplug.app.screen import check_text

    named = [option for option in (file, secret_file, ducky) if option is not None]
    hidden = secret_file is not None or (not named and text == STANDARD_INPUT)
    if len(named) > 1 or (named and text is not None and place.target is not None):
        raise UsageError(
            "a text, --file, --secret-file and --ducky exclude each other",
            reason=Reason.BAD_OPTION,
            remedy="leave all but one of them out",
        )
    if named:
        place, text = replace(place, target=text), text_of(named[0])
    elif text is None:
        raise UsageError(
            "nothing to type", reason=Reason.BAD_OPTION, remedy="give a text, --file, --secret-file or --ducky"
        )
    elif text == STANDARD_INPUT:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError:
            raise UsageError("standard input is not text", reason=Reason.BAD_OPTION) from None
    if ducky is not None:
        _carry_out(context, place, parse_ducky(text, layout, via))
        return
    if secret_file is not None:
        text = without_newline(text)
    check_text(text, layout, secret=hidden)
    pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
    _carry_out(context, place, [TypeText(piece, layout, via, hidden) for piece in pieces])


def without_newline(text: str) -> str:
    """Return the text of a file with a secret, without the last newline, which an editor has added."""
    return text.removesuffix("\n").removesuffix("\r")


def text_of(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UsageError: the file cannot be read, is too long, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # editors on Windows write a byte order mark
            text = file.read(MAX_FILE + 1)
    except OSError as error:
        raise from_oserror(path, error, as_=UsageError, problem="cannot be read") from error
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8", reason=Reason.BAD_OPTION) from None
    if len(text) > MAX_FILE:
        raise UsageError(f"{path} has more than {MAX_FILE} characters", reason=Reason.BAD_OPTION)
    return text


@_with_place
def press(
    context: typer.Context,
    keys: Annotated[
        str,
        typer.Argument(
            metavar="KEYS", help="Keys that are pressed together, such as ctrl+alt+Delete, F1 or a.", show_default=False
        ),
    ],
    place: Place,
    via: ViaOption = Via.AUTO,
    debug: DebugOption = False,
) -> None:
    """Press keys of a VM's keyboard: the names of X keysyms, in any case, and the characters of a US keyboard."""
    _carry_out(context, place, [Press(keys, via)])


@_with_place
def click(
    context: typer.Context,
    x: Annotated[int, typer.Argument(metavar="X", help="The column, in pixels from the left.", show_default=False)],
    y: Annotated[int, typer.Argument(metavar="Y", help="The row, in pixels from the top.", show_default=False)],
    place: Place,
    button: Annotated[ButtonName, typer.Option("--button", help="The button.")] = ButtonName.LEFT,
    relative: Annotated[
        bool,
        typer.Option("--relative", help="Move the pointer by X and Y, in a VM without a tablet. Write -5 after '--'."),
    ] = False,
    display: DisplayOption = 0,
    via: ViaOption = Via.AUTO,
    debug: DebugOption = False,
) -> None:
    """Click with the mouse of a VM at a position of its screen, or on a USB tablet that is plugged in for it."""
    _carry_out(context, place, [Click(x, y, button, relative, display, via)])


def _carry_out(context: typer.Context, place: Place, steps: Sequence[Command | Delay]) -> list[Any]:
    """Carry commands out, one after the other; return their results."""
    from farplug.cli import screen_verbs

    return screen_verbs.carry_out(place.session, place.settings(context), steps)
