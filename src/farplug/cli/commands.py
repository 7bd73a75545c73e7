"""What can be said to a running ``farplug connect --commands``, one command a line on standard input."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Protocol

from farplug.errors import FarplugError, Reason, UsageError
from farplug.virtual.cdrom import CdromDrive

log = logging.getLogger(__name__)

HELP = (
    "insert [DRIVE] PATH   put a medium in, in place of the one that is there",
    "eject [DRIVE]         take the medium out",
    "force insert ...      also in place of a medium that the guest has locked, and a file that is not an ISO image",
    "force eject ...       also while the guest has the medium locked",
    "list                  show the drives (cdrom0, cdrom1, ...) and what is in them",
    "quit                  detach everything and leave, as Ctrl-C does",
    "help                  show this",
)

MAX_LINE = 8192
"""Characters of a line; a longer one is not a command."""


class Host(Protocol):
    """What commands act on. Called on the event loop; its methods must not raise."""

    def drives(self) -> Sequence[tuple[str, CdromDrive]]:
        """Return the drives that are plugged in, each with its name."""

    def note(self, text: str) -> None:
        """Show a line that answers a command."""

    def listed(self, name: str, drive: CdromDrive) -> None:
        """Show a drive."""

    def refused(self, error: FarplugError) -> None:
        """Show why a command could not be carried out."""

    def quit(self) -> None:
        """Detach everything and leave."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a line asks for.

    Attributes:
        verb: insert, eject, list, quit or help.
        force: also a medium that the guest has locked, and a file that is not an ISO image.
        drive: the drive, by its name or by the medium in it; None: the only one.
        path: what to insert.
    """

    verb: str
    force: bool = False
    drive: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, line: str) -> Command:
        """Read a line, which is not blank. Words are quoted as in a shell.

        Raises:
            UsageError: it is not a command.
        """
        try:
            words = shlex.split(line) if len(line) <= MAX_LINE else []
        except ValueError as error:  # a quotation mark without its other one
            raise _unknown(line) from error
        force = words[:1] == ["force"]
        match words[force:]:
            case ["insert", path]:
                return cls("insert", force, None, path)
            case ["insert", drive, path]:
                return cls("insert", force, drive, path)
            case ["eject"]:
                return cls("eject", force)
            case ["eject", drive]:
                return cls("eject", force, drive)
            case ["list" | "quit" | "help" as verb] if not force:
                return cls(verb)
        raise _unknown(line)

    async def run(self, host: Host) -> None:
        """Carry it out.

        Raises:
            UsageError: there is no such drive, or it is not clear which one.
            ImageError: what is to be inserted cannot be used.
            DeviceError: the guest has locked the medium.
        """
        match self.verb:
            case "help":
                for line in HELP:
                    host.note(line)
            case "list":
                for name, drive in host.drives():
                    host.listed(name, drive)
                if not host.drives():
                    host.note("no drive is plugged in")
            case "quit":
                host.quit()
            case "insert":
                await self._drive(host.drives())[1].insert(self.path, force=self.force)
            case _:
                name, drive = self._drive(host.drives())
                if drive.medium is None:
                    host.note(f"{name} is empty")
                await drive.eject(force=self.force)

    def _drive(self, drives: Sequence[tuple[str, CdromDrive]]) -> tuple[str, CdromDrive]:
        named = [one for one in drives if self.drive in (None, one[0])]
        found = named or [
            one for one in drives if one[1].medium is not None and self.drive in (one[1].medium, _name(one[1].medium))
        ]
        if len(found) != 1:
            which = "which drive?" if found else "no drive is plugged in"
            if drives and not found:
                which = f"there is no drive {self.drive!r}"
            names = ", ".join(f"{name} ({_name(drive.medium) or 'empty'})" for name, drive in drives)
            raise UsageError(
                f"{self.verb}: {which}", reason=Reason.BAD_OPTION, remedy=f"the drives are: {names}" if names else ""
            )
        return found[0]


def _name(medium: str | None) -> str:
    return "" if medium is None else os.path.basename(medium)


def _unknown(line: str) -> UsageError:
    return UsageError(f"{line[:80]!r} is not a command", reason=Reason.BAD_OPTION, remedy="\n".join(HELP))


async def obey(host: Host) -> None:
    """Read commands from standard input and carry them out, one after the other, until it ends."""
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    # Not an asyncio pipe: that would make the terminal non-blocking for everybody, and takes no file.
    Thread(target=_read_lines, args=(loop, lines), name="farplug-commands", daemon=True).start()
    while (line := await lines.get()) is not None:
        try:
            if line.strip():
                await Command.parse(line.strip()).run(host)
        except FarplugError as error:
            host.refused(error)


def _read_lines(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str | None]) -> None:
    """Runs in a thread, which a read that never ends keeps: so it reads without the locks of Python's streams."""
    rest = b""
    with suppress(RuntimeError):  # the loop is closed
        while data := _read():
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                loop.call_soon_threadsafe(lines.put_nowait, os.fsdecode(line))
            rest = rest[: MAX_LINE + 1]
        for last in (os.fsdecode(rest), None):
            loop.call_soon_threadsafe(lines.put_nowait, last)


def _read() -> bytes:
    try:
        return os.read(sys.stdin.fileno(), MAX_LINE)
    except (OSError, ValueError) as error:
        log.debug("standard input cannot be read: %s", error)
        return b""
