"""Write ``docs/farplug.1``, the man page, from the commands of farplug and their help (``make man``)."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

from farplug.cli.tree import EXIT_CODES, app
from farplug.version import __version__

PAGE = Path(__file__).parents[1] / "docs/farplug.1"

ENVIRONMENT = {
    "FARPLUG_PASSWORD": "The SPICE password, where TARGET is a URL, and neither TARGET nor an option has one.",
    "FARPLUG_SESSION": "The session that commands use if --session is not given.",
    "NOTIFY_SOCKET": "Set by systemd for a service of Type=notify: 'farplug connect' reports there that it is ready.",
    "TMPDIR": "The folder for the images that --usb-folder makes, and for other temporary files.",
    "XDG_CACHE_HOME": "The folder of caches, ~/.cache if it is not set: the kernel of the throw-away VM is kept there.",
    "XDG_RUNTIME_DIR": (
        "The folder farplug in it has the sockets of sessions; without it, /run/farplug (root) or /tmp/farplug-UID."
    ),
    "XDG_STATE_HOME": "The folder farplug in it has the logs of sessions in the background; ~/.local/state if not set.",
}

EXAMPLES = {
    "farplug connect vm.vv --usb-cdrom installer.iso": "Plug an ISO image into the VM of a console file, as a CD-ROM.",
    "farplug connect spice://vmhost:5900 --usb-folder ./drivers --usb-disk scratch.raw": (
        "Plug a copy of a folder and a disk into a VM."
    ),
    "farplug connect tcp://127.0.0.1:4000 --usb-disk scratch.raw --snapshot": (
        "Plug in a disk, and discard what the VM writes to it."
    ),
    "farplug connect vm.vv --usb-device 1050:0407": "Plug a USB device of this machine into a VM.",
    "farplug connect vm.vv --name web1 --detach": "Start a session in the background.",
    "farplug attach -s web1 --usb-disk scratch.raw": "Plug a disk into the VM of that session.",
    "farplug doctor spice://vmhost:5900": "Check, stage by stage, how far a VM can be reached.",
}


def escape(text: str) -> str:
    """Return a text as roff, in one line: no character of it is a request, and a hyphen is the one of ASCII."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text


def bold(text: str) -> str:
    """Return a text in bold, as roff."""
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    """Return a text in italics, as roff."""
    return f"\\fI{escape(text)}\\fR"


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it that do something, each with its whole name."""
    below = getattr(command, "commands", {})
    if not below:
        yield name, command
    for word, inner in below.items():
        if not inner.hidden:
            yield from walk(inner, f"{name} {word}")


def choices(command: Any, parameter: Any) -> list[str]:
    """Return the values that a parameter takes, if its type is an enumeration."""
    function = inspect.unwrap(command.callback)
    hint = typing.get_type_hints(function).get(parameter.name)
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Enum):
            return [str(member.value) for member in kind]
    return []


def option(command: Any, parameter: Any) -> Iterator[str]:
    """Yield the lines of one option."""
    names = ", ".join(bold(name) for name in (*parameter.opts, *parameter.secondary_opts))
    values = choices(command, parameter)
    bare = parameter.is_flag or parameter.count
    value = "" if bare else f" {italic(parameter.metavar or '|'.join(values) or parameter.name.upper())}"
    yield from (".TP", names + value)
    default = parameter.default.value if isinstance(parameter.default, Enum) else None
    yield escape(parameter.help) + (f" The default is {bold(str(default))}." if default is not None else "")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of a help text that has paragraphs."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield from (".PP", escape(paragraph))


def visible(command: Any, kind: str) -> list[Any]:
    """Return the parameters of a command that its help shows: each "argument", or each "option"."""
    return [one for one in command.params if one.param_type_name == kind and not one.hidden]


def argument_name(argument: Any) -> str:
    """Return the name of an argument, as roff. Typer adds brackets and dots to some."""
    name = argument.metavar or argument.name
    return italic(name if " " in name else name.strip("[].").upper())


def synopsis(name: str, command: Any) -> str:
    """Return the line that a command is called with."""
    words = [bold(name)]
    for argument in visible(command, "argument"):
        word = argument_name(argument)
        if " " not in (argument.metavar or ""):  # otherwise it has its own brackets
            word += " ..." if argument.nargs == -1 else ""
            word = word if argument.required else f"[{word}]"
        words.append(word)
    if visible(command, "option"):
        words.append(f"[{italic('OPTION')} ...]")
    return " ".join(words)


def describe(name: str, command: Any) -> Iterator[str]:
    """Yield the lines of one command."""
    yield f".SS {synopsis(name, command)}"
    yield from paragraphs(command.help or "")
    for argument in visible(command, "argument"):
        yield from (".TP", argument_name(argument), escape(argument.help))
    panels: dict[str, list[Any]] = {"": []}  # those without a panel come first
    for one in visible(command, "option"):
        panels.setdefault(one.rich_help_panel or "", []).append(one)
    for panel, members in panels.items():
        if panel:
            yield from (".PP", f"{escape(panel)}:")
        for one in members:
            yield from option(command, one)


def page() -> str:
    """Return the man page, as roff with the macros of man(7)."""
    root = typer.main.get_command(app)
    commands = list(walk(root, "farplug"))
    lines = [
        '.\\" Written by scripts/man_page.py: change the help of the commands, then run make man.',
        f'.TH FARPLUG 1 "" "farplug {__version__}" "User Commands"',
        ".SH NAME",
        "farplug \\- plug disk images, ISOs, folders and USB devices into a VM",
        ".SH SYNOPSIS",
        ".nh",
        ".ad l",
        *(line for name, command in commands for line in (synopsis(name, command), ".br")),
        f"{bold('farplug')} {bold('--version')} | {bold('--help')}",
        ".SH DESCRIPTION",
        *paragraphs(root.help or ""),
        *paragraphs("Each command shows its options with --help, or -h."),
        ".SH COMMANDS",
    ]
    for name, command in commands:
        lines += describe(name, command)
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES.items():
        lines += [".TP", bold(str(int(code))), escape(meaning)]
    lines.append(".SH ENVIRONMENT")
    for variable, meaning in ENVIRONMENT.items():
        lines += [".TP", bold(variable), escape(meaning)]
    lines.append(".SH EXAMPLES")
    for example, meaning in EXAMPLES.items():
        lines += [".TP", bold(example), escape(meaning)]
    lines += [".SH SEE ALSO", ".BR qemu (1),", ".BR remote\\-viewer (1),", ".BR usbredirect (1)"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.name} written\n")
