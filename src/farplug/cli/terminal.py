"""The live table on a terminal, below lines for what happens."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farplug.app.attachment import AttachmentState
from farplug.app.events import Event, Level
from farplug.cli.output import NO_FIGURES, TextOutput, size
from farplug.cli.writer import QueuedStream, left_out_line
from farplug.text import printable

_STATE_STYLES: Mapping[str, str] = {
    AttachmentState.OPENING: "yellow",
    AttachmentState.WAITING: "yellow",
    AttachmentState.ATTACHED: "cyan",
    AttachmentState.CONFIGURED: "green",
    AttachmentState.REFUSED: "red",
    AttachmentState.DETACHED: "dim",
    AttachmentState.LOST: "yellow",
}

_MARKS = {
    Level.GOOD: ("✓", "green"),
    Level.BAD: ("✗", "red"),
    Level.PROGRESS: ("…", "yellow"),
    Level.INFO: ("·", "dim"),
}


class TerminalOutput(TextOutput):
    """Lines for what happens, and below them a live table with a line for each device."""

    interval = 0.5

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._devices: dict[str, dict[str, str]] = {}
        """Label, state and speed of each attachment, by its id."""
        self._pending = False
        """A stage on the way to the guest, or a copy, is shown in the place of the table."""
        self._left_out = 0
        """Lines that were left out because the terminal does not accept output (Ctrl-S)."""

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        if event.attachment is not None:
            self._follow(event.attachment, event)
        super().show(event)

    def _follow(self, attachment: str, event: Event) -> None:
        if event.name == "attaching":
            self._devices[attachment] = {"label": event.device, "speed": event.fields["speed"]}
        if event.name == "removed":
            self._devices.pop(attachment, None)
        elif attachment in self._devices:
            self._devices[attachment] |= {
                name: event.fields[name] for name in ("state", "speed") if isinstance(event.fields.get(name), str)
            }

    def refresh(self) -> None:
        if not self._idle:
            return  # the table would be old when it is shown
        self._show_left_out()
        if self._pending or not self._devices:
            return
        columns: dict[str, list[Text]] = {heading: [] for heading in _HEADINGS}
        for attachment, device in self._devices.items():
            figures = self._figures.get(attachment, NO_FIGURES)
            row = (
                Text(printable(device["label"])),
                Text(device["state"], _STATE_STYLES.get(device["state"], "red")),
                Text(device["speed"]),
                Text(size(figures["read"])),
                Text(size(figures["written"])),
                Text(f"{size(figures['rate'])}/s"),
                Text(str(figures["commands"])),
            )
            for heading, cell in zip(_HEADINGS, row, strict=True):
                columns[heading].append(cell)
        self._live.update(Group("", _table(columns, self._console.width)), refresh=True)

    def _line(self, level: Level, text: str) -> None:
        self._print(_marked(level, text))

    def _more(self, text: str) -> None:
        self._print(Text(f"  {printable(text)}"))

    def _print(self, line: Text) -> None:
        """Print a line above the table. Half of a change of the screen would spoil it: all or nothing is left out."""
        if self._full:
            self._left_out += 1
            return
        self._show_left_out()
        self._console.print(line, soft_wrap=True)

    def _show_left_out(self) -> None:
        if self._left_out:
            count, self._left_out = self._left_out, 0
            self._console.print(_marked(Level.INFO, left_out_line(count).strip()), soft_wrap=True)

    @property
    def _idle(self) -> bool:
        file = self._console.file
        return not isinstance(file, QueuedStream) or file.idle

    @property
    def _full(self) -> bool:
        file = self._console.file
        return isinstance(file, QueuedStream) and file.full

    def _stage(self, event: Event) -> None:
        text = f"{event.fields['stage']:<9} {event.message}"
        self._pending = event.fields["state"] == "begun"
        if self._pending:
            self._live.update(_marked(Level.PROGRESS, text), refresh=not self._full)
        else:
            self._live.update(Group(), refresh=not self._full)
            self._line(event.level, text)

    def _copying(self, event: Event) -> None:
        done, total = event.fields["done"], event.fields["total"]
        text = f"{event.device}: copying, {size(done)} of {size(total)}"
        self._live.update(_marked(Level.PROGRESS, text), refresh=self._idle)


_HEADINGS = ("device", "state", "speed", "read", "written", "rate", "commands")
_LEFT = ("device", "state", "speed")
_DROPPED_FIRST = ("commands", "speed", "rate", "written", "read", "state")
"""Columns that a narrow terminal does not show."""
_GAP = 2
"""Cells between two columns."""
_LEAST_LABEL = 10
"""Cells of a device's name that are shown before another column is dropped."""


def _table(columns: dict[str, list[Text]], width: int) -> Table:
    """Make a table of the columns that fit into ``width`` cells; a long name of a device is cut."""
    widths = {heading: max(len(heading), *(cell.cell_len for cell in cells)) for heading, cells in columns.items()}
    widths["device"] = min(widths["device"], _LEAST_LABEL)
    for heading in _DROPPED_FIRST:
        if sum(widths.values()) + _GAP * (len(widths) - 1) <= width:
            break
        del widths[heading]
    room = width - sum(widths.values()) - _GAP * (len(widths) - 1)
    longest = max(cell.cell_len for cell in columns["device"])
    widths["device"] = max(1, min(widths["device"] + room, max(longest, len("device"))))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading, cells in widths.items():
        side: JustifyMethod = "left" if heading in _LEFT else "right"
        table.add_column(heading, justify=side, no_wrap=True, overflow="ellipsis", width=cells)
    for row in zip(*(columns[heading] for heading in widths), strict=True):
        table.add_row(*row)
    return table


def _marked(level: Level, text: str) -> Text:
    return Text.assemble(_MARKS[level], " ", printable(text))


def console_for_table() -> Console | None:
    """Return standard output as a console; None if it cannot show a table that changes."""
    console = Console(highlight=False)
    fits = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return console if fits else None
