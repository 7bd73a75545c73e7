"""What a person or a program sees of the application's events: log lines, JSON lines, or on a terminal a live table."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TextIO

from farplug.app.events import Event, Level, dropped
from farplug.cli import log
from farplug.cli.log import remedy_lines
from farplug.cli.writer import QueuedStream
from farplug.errors import Remedy
from farplug.text import printable
from farplug.transport.spice_target import Stage

_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Return a number of bytes for people: ``1.4 MB`` (powers of 1000, as disks are sold)."""
    unit = 0
    while count >= 999.5 and unit < len(_DECIMAL_UNITS) - 1:
        count /= 1000
        unit += 1
    digits = 0 if unit == 0 or count >= 99.95 else 1
    return f"{count:.{digits}f} {_DECIMAL_UNITS[unit]}"


def figures_text(figures: Mapping[str, Any]) -> str:
    """Return the fields of an event ``figures`` for people: ``1.4 MB read, 0 B written, 12 commands``, and errors."""
    count, errors = figures["commands"], figures.get("errors", 0)
    commands = f"{count} command{'' if count == 1 else 's'}"
    failed = f", {errors} error{'' if errors == 1 else 's'}" if errors else ""
    return f"{size(figures['read'])} read, {size(figures['written'])} written, {commands}{failed}"


NO_FIGURES = {"read": 0, "written": 0, "commands": 0, "rate": 0}


class Output(ABC):
    """Shows events. Its methods may raise OSError when the reader of the output is gone.

    Attributes:
        interval: seconds between two calls of :meth:`refresh`.
        answers: how a user answers what a security key asks.
    """

    interval = 1.0
    answers = "'farplug touch' allows it, 'farplug touch --refuse' refuses it"

    def start(self) -> None:
        """Begin."""
        return

    def stop(self) -> None:
        """End; more events may follow. Does nothing the second time."""
        return

    @abstractmethod
    def show(self, event: Event) -> None:
        """Show an event."""

    def refresh(self) -> None:
        """Show what changes without an event of its own: figures."""
        return


class SilentOutput(Output):
    """For a reader that has left."""

    def show(self, event: Event) -> None:
        """Show nothing."""


class JsonOutput(Output):
    """One JSON object a line on standard output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._copying_shown = 0.0
        self._shown: Event | None = None
        """The event that is being written, or left out."""
        if isinstance(stream, QueuedStream):
            stream.note = self._note

    def show(self, event: Event) -> None:
        if event.name == "copying":  # comes several times a second
            if time.monotonic() - self._copying_shown < self.interval:
                return
            self._copying_shown = time.monotonic()
        self._shown = event
        self._stream.write(json.dumps(event.to_json()) + "\n")
        self._stream.flush()

    def _note(self, count: int) -> str:
        """Return the line that stands in the place of events that were left out, of which this one is the last."""
        assert self._shown is not None
        return json.dumps(dropped(self._shown, count).to_json()) + "\n"


class TextOutput(Output):
    """What log lines and the live table have in common: the text of each event."""

    def __init__(self) -> None:
        self._figures: dict[str, Mapping[str, Any]] = {}
        """The last figures of each attachment, by its id."""

    def show(self, event: Event) -> None:
        match event.name:
            case "figures":
                assert event.attachment is not None
                self._figures[event.attachment] = event.fields
            case "stage":
                self._stage(event)
            case "copying":
                self._copying(event)
            case "opened":
                self._line(event.level, event.message)
            case "detached":
                figures = self._figures.get(event.attachment or "", NO_FIGURES)
                self._line(event.level, f"{event} ({figures_text(figures)})")
            case "removed":
                self._figures.pop(event.attachment or "", None)
            case _ if event.level is not Level.DETAIL:
                self._line(event.level, str(event))
                if event.name == "presence-asked":
                    self._more(self.answers)
                for line in remedy_lines(_remedy(event.fields)):
                    self._more(line)

    @abstractmethod
    def _line(self, level: Level, text: str) -> None:
        """Write a line."""

    @abstractmethod
    def _more(self, text: str) -> None:
        """Write a line that belongs to the one before."""

    @abstractmethod
    def _stage(self, event: Event) -> None:
        """Show how far the way to the guest is."""

    def _copying(self, event: Event) -> None:
        """Show how far the copy of a folder is."""


class PlainOutput(TextOutput):
    """Log lines, for files and pipes.

    Args:
        stream: takes the lines.
        figures: write what the devices have moved, too.
    """

    interval = 10.0

    def __init__(self, stream: TextIO, *, figures: bool = True) -> None:
        super().__init__()
        self._stream = stream
        self._with_figures = figures
        self._shown: dict[str, Mapping[str, Any]] = {}
        self._labels: dict[str, str] = {}

    def show(self, event: Event) -> None:
        if event.name == "attaching" and event.attachment is not None:
            self._labels[event.attachment] = event.device
        super().show(event)

    def refresh(self) -> None:
        for attachment, figures in self._figures.items() if self._with_figures else ():
            text = figures_text(figures)
            if figures_text(self._shown.get(attachment, NO_FIGURES)) != text:
                self._shown[attachment] = figures
                self._more(f"{self._labels[attachment]}: {text}")

    def _line(self, level: Level, text: str) -> None:
        self._more(text)

    def _more(self, text: str) -> None:
        self._stream.write(f"{time.strftime('%H:%M:%S')} {printable(text)}\n")
        self._stream.flush()

    def _stage(self, event: Event) -> None:
        stage, state = event.fields["stage"], event.fields["state"]
        if state == "reached" or (stage == Stage.LISTEN and state == "begun"):  # the user must start the VM
            self._more(f"{stage}: {event.message}")


def _remedy(fields: Mapping[str, Any]) -> Remedy:
    """Return the remedy that an event has; an empty one if it has none."""
    return Remedy(
        fields.get("remedy", ""),
        setting=fields.get("setting", ""),
        value=fields.get("value"),
        command=fields.get("command", ""),
        alternative=_remedy(fields["alternative"]) if "alternative" in fields else None,
    )


def choose(*, as_json: bool, commands: bool = False, between: bool = False, stream: TextIO | None = None) -> Output:
    """Return the output that fits: JSON if it is asked for, a live table on a terminal, log lines elsewhere and between
    the lines of ``--debug`` and the commands that the user types.

    Args:
        as_json: the user asked for JSON.
        commands: the user types commands on the terminal.
        between: the lines appear between what a guest sends to the terminal.
        stream: takes log lines; None: standard output.
    """
    if as_json:
        return JsonOutput(sys.stdout)
    if sys.stdout.isatty() and not (log.debugging() or commands or between):
        from farplug.cli.terminal import TerminalOutput, console_for_table

        if (console := console_for_table()) is not None:
            return TerminalOutput(console)
    return PlainOutput(stream or sys.stdout, figures=not between)
