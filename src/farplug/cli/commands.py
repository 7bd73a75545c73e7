"""Commands on standard input of ``farplug connect --commands``, one a line."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Final

from farplug.app.app import App
from farplug.app.commands import Command, Presence, PresenceAnswer, Quit, from_words, help_lines
from farplug.app.guest import Guest
from farplug.errors import FarplugError, Reason, UsageError

log = logging.getLogger(__name__)

MAX_LINE = 8192
"""Characters of a line; a longer one is not a command."""


def parse(line: str) -> Command | None:
    """Return the command that a line, which is not blank, asks for; None for ``help``. Words are quoted as in a shell.

    Raises:
        UsageError: the line is not a command.
    """
    try:
        words = shlex.split(line) if len(line) <= MAX_LINE else []
    except ValueError:  # a quotation mark without its other one
        words = []
    command = from_words(words)
    if command is None and words != ["help"]:
        raise UsageError(
            f"{line[:80]!r} is not a command", reason=Reason.UNKNOWN_COMMAND, remedy="\n".join(help_lines())
        )
    return command


ANSWERS: Final = {
    "y": PresenceAnswer.ALLOW,
    "yes": PresenceAnswer.ALLOW,
    "n": PresenceAnswer.REFUSE,
    "no": PresenceAnswer.REFUSE,
}
"""Lines that answer what a security key asks, where the user types no commands."""


async def answer(app: App, guest: Guest) -> None:
    """Read answers to the questions of security keys from standard input, until it ends. Ignore other lines.

    Args:
        app: carries the answers out.
        guest: publishes what was refused.
    """
    lines = _lines()
    while (line := await lines.get()) is not None:
        given = ANSWERS.get(line.strip().lower())
        if given is not None:
            try:
                await app.do(Presence(given, guest=guest.id))
            except FarplugError as error:
                guest.refused(error)


async def serve(app: App, guest: Guest, leave: Callable[[], None]) -> None:
    """Read commands from standard input and carry them out, one after the other, until it ends.

    Args:
        app: carries the commands out.
        guest: publishes what was refused.
        leave: called for the command ``quit``.
    """
    lines = _lines()
    while (line := await lines.get()) is not None:
        try:
            if not line.strip():
                continue
            command = parse(line.strip())
            if isinstance(command, Quit):
                leave()
                continue
            if command is not None:
                await app.do(command)
                continue
            for text in help_lines():
                guest.note(text)
        except FarplugError as error:
            guest.refused(error)


def _lines() -> asyncio.Queue[str | None]:
    """Return a queue of the lines of standard input, from now on; None: the end."""
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    # Not an asyncio pipe: that would make the terminal non-blocking for everybody, and takes no file.
    Thread(target=_read_lines, args=(loop, lines), name="farplug-commands", daemon=True).start()
    return lines


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
