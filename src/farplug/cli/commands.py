"""What can be said to a running ``farplug connect --commands``, one command a line on standard input."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

from farplug.errors import FarplugError, Reason, UsageError
from farplug.virtual.cdrom import CdromDrive

log = logging.getLogger(__name__)

HELP = (
    "insert [DRIVE] PATH, eject [DRIVE], and with 'force' before them also what the guest has locked, or is not an ISO"
)

MAX_LINE = 8192
"""Characters of a line; a longer one is no command."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a line asks for.

    Attributes:
        verb: insert or eject.
        force: also a medium that the guest has locked, and a file that is not an ISO image.
        drive: the label of the drive; None: the only one.
        path: what to insert.
    """

    verb: str
    force: bool
    drive: str | None
    path: str

    @classmethod
    def parse(cls, line: str) -> Command:
        """Read a line, which is not blank. Words are quoted as in a shell.

        Raises:
            UsageError: it is no command.
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
                return cls("eject", force, None, "")
            case ["eject", drive]:
                return cls("eject", force, drive, "")
        raise _unknown(line)

    async def run(self, drives: Sequence[tuple[str, CdromDrive]]) -> None:
        """Do it. ``drives`` are those plugged in, with their labels.

        Raises:
            UsageError: there is no such drive, or it is not clear which one.
            ImageError: what is to be inserted cannot be used.
            DeviceError: the guest has locked the medium.
        """
        found = [drive for label, drive in drives if self.drive in (None, label)]
        if len(found) != 1:
            which = "which drive" if self.drive is None and found else "there is no such drive"
            raise UsageError(
                f"{self.verb}: {which}: {', '.join(label for label, _ in drives) or 'no drive is plugged in'}",
                reason=Reason.BAD_OPTION,
            )
        if self.verb == "insert":
            await found[0].insert(self.path, force=self.force)
        else:
            await found[0].eject(force=self.force)


def _unknown(line: str) -> UsageError:
    return UsageError(f"{line[:80]!r} is no command", reason=Reason.BAD_OPTION, remedy=f"commands are: {HELP}")


async def obey(drives: Callable[[], Sequence[tuple[str, CdromDrive]]], failed: Callable[[FarplugError], None]) -> None:
    """Read commands from standard input and do them, one after the other, until it ends.

    Args:
        drives: tells those plugged in, with their labels.
        failed: told what a command could not do.
    """
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    # Not an asyncio pipe: that would make the terminal non-blocking for everybody, and takes no file.
    Thread(target=_read_lines, args=(loop, lines), name="farplug-commands", daemon=True).start()
    while (line := await lines.get()) is not None:
        try:
            if line.strip():
                await Command.parse(line.strip()).run(drives())
        except FarplugError as error:
            failed(error)


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
