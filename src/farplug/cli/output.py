"""What a person or a program sees while devices are plugged in: a live table, log lines, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farplug.app.guest import Attachment, AttachmentState
from farplug.cli import log
from farplug.cli.log import remedy_lines
from farplug.errors import FarplugError
from farplug.redirection import events
from farplug.redirection.events import PortEvent, as_dict
from farplug.text import printable
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.events import MediumLocked

_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """A number of bytes, for people: ``1.4 MB`` (powers of 1000, as disks are sold)."""
    unit = 0
    while count >= 999.5 and unit < len(_DECIMAL_UNITS) - 1:
        count /= 1000
        unit += 1
    digits = 0 if unit == 0 or count >= 99.95 else 1
    return f"{count:.{digits}f} {_DECIMAL_UNITS[unit]}"


def unfinished_writes(disks: Sequence[str], *, leaving: bool) -> str:
    """Return the warning of :meth:`Output.unfinished`."""
    them = "it" if len(disks) == 1 else "them"
    then = "before farplug leaves" if leaving else "first; interrupt again to leave"
    return f"the VM may not have finished writing to {', '.join(disks)}: unmount {them} there {then}"


@dataclass(frozen=True, slots=True)
class Figures:
    """What a device did so far.

    Attributes:
        read: bytes that the guest read.
        written: bytes that the guest wrote.
        commands: a disk's commands; transfers of a device that does not count commands.
    """

    read: int = 0
    written: int = 0
    commands: int = 0

    @classmethod
    def of(cls, attachment: Attachment) -> Figures:
        """From the device's own counters where it has them, else from its endpoints'."""
        own = attachment.device.figures
        if own is not None:
            return cls(own.read, own.written, own.commands)
        figures = [f for f in attachment.figures if f.endpoint]
        return cls(
            read=sum(f.bytes for f in figures if f.endpoint & 0x80),
            written=sum(f.bytes for f in figures if not f.endpoint & 0x80),
            commands=sum(f.transfers for f in figures),
        )

    def __str__(self) -> str:
        commands = f"{self.commands} command{'' if self.commands == 1 else 's'}"
        return f"{size(self.read)} read, {size(self.written)} written, {commands}"


class Output(ABC):
    """Where it is shown. Its methods may raise OSError when nobody reads it any more.

    Attributes:
        interval: seconds between two calls of :meth:`figures`.
    """

    interval = 1.0

    def __init__(self) -> None:
        self._pending: tuple[str, str] | None = None

    def start(self) -> None:
        """Begin."""
        return

    def stop(self) -> None:
        """End; more lines may follow. Does nothing the second time."""
        return

    def stage(self, stage: str, text: str) -> None:
        """A stage on the way to the guest begins: so the one before is reached."""
        self.reached()
        self._pending = (stage, text)

    def reached(self) -> None:
        """The stage that began last is reached. Does nothing if there is none."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._stage_line(*pending)

    @abstractmethod
    def _stage_line(self, stage: str, text: str) -> None:
        """Show a stage that is reached."""

    @abstractmethod
    def happened(self, label: str, attachment: Attachment, event: PortEvent) -> None:
        """Something happened to a device."""

    @abstractmethod
    def opened(self, label: str, titles: Sequence[str], event: events.Opened) -> None:
        """A device got its port. ``titles``: its logical units, in the order of their numbers, or itself."""

    @abstractmethod
    def drive(self, name: str, drive: CdromDrive) -> None:
        """Show what is in a drive: a command asked for it."""

    @abstractmethod
    def figures(self, attachments: Sequence[tuple[str, Attachment]]) -> None:
        """It is time to show figures."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Anything else that a person wants to know."""

    @abstractmethod
    def refused(self, error: FarplugError) -> None:
        """A command on standard input could not be done; the session goes on."""

    @abstractmethod
    def skipped(self, error: FarplugError) -> None:
        """A device of this machine is not plugged in; the session goes on."""

    @abstractmethod
    def unfinished(self, disks: Sequence[str], *, leaving: bool) -> None:
        """Warn that the VM may not have finished writing to disks.

        Args:
            disks: their labels.
            leaving: farplug leaves all the same; otherwise it stays until it is interrupted again.
        """

    def copying(self, label: str, done: int, total: int) -> None:
        """A folder is being copied into a disk: so many bytes of so many, told several times a second."""
        return

    def failed(self, error: FarplugError) -> None:
        """It ends with an error, which is shown where every error is."""
        self._pending = None


class SilentOutput(Output):
    """For a reader that has left."""

    def _stage_line(self, stage: str, text: str) -> None:
        """Nobody reads it."""

    def happened(self, label: str, attachment: Attachment, event: PortEvent) -> None:
        """Nobody reads it."""

    def opened(self, label: str, titles: Sequence[str], event: events.Opened) -> None:
        """Nobody reads it."""

    def drive(self, name: str, drive: CdromDrive) -> None:
        """Nobody reads it."""

    def figures(self, attachments: Sequence[tuple[str, Attachment]]) -> None:
        """Nobody reads it."""

    def note(self, text: str) -> None:
        """Nobody reads it."""

    def refused(self, error: FarplugError) -> None:
        """Nobody reads it."""

    def skipped(self, error: FarplugError) -> None:
        """Nobody reads it."""

    def unfinished(self, disks: Sequence[str], *, leaving: bool) -> None:
        """Nobody reads it."""


class JsonOutput(Output):
    """One JSON object a line on standard output."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._last: dict[str, tuple[AttachmentState, Figures]] = {}
        self._copying_told = 0.0

    def _line(self, **values: object) -> None:
        self._stream.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
        self._stream.flush()

    def _stage_line(self, stage: str, text: str) -> None:
        self._line(event="stage", stage=stage, message=text)

    def note(self, text: str) -> None:
        self._line(event="note", message=text)

    def refused(self, error: FarplugError) -> None:
        self._line(event="command-refused", **error.as_dict())

    def skipped(self, error: FarplugError) -> None:
        self._line(event="skipped", **error.as_dict())

    def unfinished(self, disks: Sequence[str], *, leaving: bool) -> None:
        message = unfinished_writes(disks, leaving=leaving)
        self._line(event="unfinished-writes", disks=list(disks), leaving=leaving, message=message)

    def happened(self, label: str, attachment: Attachment, event: PortEvent) -> None:
        if isinstance(event, events.Detached):
            self.figures([(label, attachment)])
        self._line(device=label, **as_dict(event))

    def opened(self, label: str, titles: Sequence[str], event: events.Opened) -> None:
        self._line(device=label, **{**as_dict(event), "units": list(titles), "message": port_line(titles, event)})

    def drive(self, name: str, drive: CdromDrive) -> None:
        self._line(
            event="drive", device=name, medium=drive.medium, locked=drive.locked, message=drive_line(name, drive)
        )

    def figures(self, attachments: Sequence[tuple[str, Attachment]]) -> None:
        for label, attachment in attachments:
            now = (attachment.state, Figures.of(attachment))
            if self._last.get(label) != now:
                self._last[label] = now
                state, figures = now
                self._line(
                    event="figures",
                    device=label,
                    state=str(state),
                    read=figures.read,
                    written=figures.written,
                    commands=figures.commands,
                )

    def copying(self, label: str, done: int, total: int) -> None:
        if time.monotonic() - self._copying_told >= self.interval:
            self._copying_told = time.monotonic()
            self._line(event="copying", device=label, done=done, total=total)


class PlainOutput(Output):
    """Log lines, for files and pipes."""

    interval = 10.0

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._last: dict[str, Figures] = {}

    def _line(self, text: str) -> None:
        self._stream.write(f"{time.strftime('%H:%M:%S')} {printable(text)}\n")
        self._stream.flush()

    def stage(self, stage: str, text: str) -> None:
        super().stage(stage, text)
        if text.startswith("listening"):  # somebody must act on it
            self.reached()

    def _stage_line(self, stage: str, text: str) -> None:
        self._line(f"{stage}: {text}")

    def note(self, text: str) -> None:
        self._line(text)

    def refused(self, error: FarplugError) -> None:
        for line in (error.message, *remedy_lines(error.remedy)):
            self._line(line)

    def skipped(self, error: FarplugError) -> None:
        self.refused(error)

    def unfinished(self, disks: Sequence[str], *, leaving: bool) -> None:
        self._line(unfinished_writes(disks, leaving=leaving))

    def happened(self, label: str, attachment: Attachment, event: PortEvent) -> None:
        match event:
            case events.DeviceReport(event=MediumLocked()):
                pass  # systems lock a drive each time they look into it
            case events.Detached():
                self._line(f"{label}: {event} ({Figures.of(attachment)})")
            case _:
                self._line(f"{label}: {event}")

    def opened(self, label: str, titles: Sequence[str], event: events.Opened) -> None:
        self._line(port_line(titles, event))

    def drive(self, name: str, drive: CdromDrive) -> None:
        self._line(drive_line(name, drive))

    def figures(self, attachments: Sequence[tuple[str, Attachment]]) -> None:
        for label, attachment in attachments:
            figures = Figures.of(attachment)
            if self._last.get(label, Figures()) != figures:
                self._last[label] = figures
                self._line(f"{label}: {figures}")


class _Rate:
    """Bytes a second between two looks; 0 at the first look, and when a device begins again."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def look(self, figures: Figures) -> float:
        moved, now = figures.read + figures.written, time.monotonic()
        before, when = self._last or (moved, now)
        self._last = moved, now
        return max(moved - before, 0) / max(now - when, 1e-3)


_STATE_STYLES = {
    AttachmentState.OPENING: "yellow",
    AttachmentState.WAITING: "yellow",
    AttachmentState.ATTACHED: "cyan",
    AttachmentState.CONFIGURED: "green",
    AttachmentState.REFUSED: "red",
    AttachmentState.DETACHED: "dim",
}

GOOD, BAD, PENDING, PLAIN = ("✓", "green"), ("✗", "red"), ("…", "yellow"), ("·", "dim")


class TerminalOutput(Output):
    """Lines for what happens, and below them a live table with a line for each device."""

    interval = 0.5

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._rates: dict[str, _Rate] = {}

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def _line(self, mark: tuple[str, str], text: str) -> None:
        self._console.print(_marked(mark, text), soft_wrap=True)

    def stage(self, stage: str, text: str) -> None:
        super().stage(stage, text)
        self._live.update(_marked(PENDING, f"{stage:<9} {text}"), refresh=True)

    def _stage_line(self, stage: str, text: str) -> None:
        self._live.update(Group(), refresh=True)
        self._line(GOOD, f"{stage:<9} {text}")

    def note(self, text: str) -> None:
        self._line(PLAIN, text)

    def refused(self, error: FarplugError) -> None:
        self._line(BAD, error.message)

    def skipped(self, error: FarplugError) -> None:
        self._line(BAD, error.message)
        for line in remedy_lines(error.remedy):
            self._console.print(f"  {line}", markup=False, soft_wrap=True)

    def unfinished(self, disks: Sequence[str], *, leaving: bool) -> None:
        self._line(BAD if leaving else PENDING, unfinished_writes(disks, leaving=leaving))

    def copying(self, label: str, done: int, total: int) -> None:
        self._live.update(_marked(PENDING, f"{label}: copying, {size(done)} of {size(total)}"), refresh=True)

    def failed(self, error: FarplugError) -> None:
        if self._pending is not None:
            stage, text = self._pending
            self._live.update(Group(), refresh=True)
            self._line(BAD, f"{stage:<9} {text}")
        super().failed(error)

    def happened(self, label: str, attachment: Attachment, event: PortEvent) -> None:
        text = f"{label}: {event}"
        match event:
            case events.DeviceReport(event=MediumLocked()):
                pass
            case events.Refused() | events.DeviceFault() | events.PeerViolation():
                self._line(BAD, text)
            case events.Detached():
                self._line(GOOD if event.error is None else BAD, f"{text} ({Figures.of(attachment)})")
            case events.WaitingForGuest() | events.Unused() | events.FellBack():
                self._line(PENDING, text)
            case events.Attached() | events.Configured():
                self._line(GOOD, text)
            case _:
                self._line(PLAIN, text)

    def opened(self, label: str, titles: Sequence[str], event: events.Opened) -> None:
        self._line(PLAIN, port_line(titles, event))

    def drive(self, name: str, drive: CdromDrive) -> None:
        self._line(PLAIN, drive_line(name, drive))

    def figures(self, attachments: Sequence[tuple[str, Attachment]]) -> None:
        if self._pending is not None or not attachments:
            return
        columns: dict[str, list[Text]] = {heading: [] for heading in _HEADINGS}
        for label, attachment in attachments:
            figures = Figures.of(attachment)
            rate = self._rates.setdefault(label, _Rate()).look(figures)
            row = (
                Text(printable(label)),
                Text(str(attachment.state), _STATE_STYLES[attachment.state]),
                Text(str(attachment.device.identity.speed)),
                Text(size(figures.read)),
                Text(size(figures.written)),
                Text(f"{size(rate)}/s"),
                Text(str(figures.commands)),
            )
            for heading, cell in zip(_HEADINGS, row, strict=True):
                columns[heading].append(cell)
        self._live.update(Group("", _table(columns, self._console.width)), refresh=True)


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


def port_line(titles: Sequence[str], event: events.Opened) -> str:
    """Return which device is in a port, for people: ``port 0: scratch.raw``."""
    units = titles if len(titles) == 1 else [f"LUN {lun} {title}" for lun, title in enumerate(titles)]
    return f"port {event.number}: {', '.join(units)}"


def drive_line(name: str, drive: CdromDrive) -> str:
    """Return what is in a drive, for people."""
    if drive.medium is None:
        return f"{name}: empty"
    return f"{name}: {drive.medium}{', locked by the guest' if drive.locked else ''}"


def _marked(mark: tuple[str, str], text: str) -> Text:
    return Text.assemble(mark, " ", printable(text))


def choose(*, as_json: bool, commands: bool = False) -> Output:
    """The output that fits: JSON if it is asked for, a live table on a terminal, log lines elsewhere and between the
    lines of ``--debug`` and the commands that somebody types.
    """
    if as_json:
        return JsonOutput(sys.stdout)
    console = Console(highlight=False)
    if (
        console.is_terminal
        and not console.is_dumb_terminal
        and console.encoding.startswith("utf")
        and not log.debugging()
        and not commands
    ):
        return TerminalOutput(console)
    return PlainOutput(sys.stdout)
