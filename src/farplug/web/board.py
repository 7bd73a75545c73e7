"""All sessions of this user, for the board of the page: their rows, and pictures of their screens."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Final
from weakref import WeakValueDictionary

from farplug.control.client import Client
from farplug.control.names import list_sessions, socket_path
from farplug.control.views import list_json
from farplug.errors import Reason, RemoteProtocolError, TargetError, UsageError
from farplug.text import shown
from farplug.web.thumbnail import scaled

INTERVAL: Final = 2.0
"""Seconds between two looks at the sessions while a board is shown."""
MAX_AGE: Final = 1.0
"""Seconds for which what was found is used for other boards, too."""
SCREENSHOT_TIMEOUT: Final = 20.0
"""Seconds in which a session writes a picture."""
MAX_PICTURE: Final = 64 << 20
"""Bytes of a PNG file: the pixels of the largest display."""
MAX_PICTURES: Final = 32
"""Small pictures that are kept."""
THUMBNAIL_WIDTH: Final = 320
"""Pixels of a small picture, at most."""


class Board:
    """Looks at the sessions of this user.

    Args:
        folder: a private folder for pictures.
        only: the name of the only session that is shown; None: all.
        environment: the environment variables; None: those of this process.

    Attributes:
        watched: the sessions whose screen a browser watches, with the number of these. Their screens are linked, so
            that a picture for the board costs the VM no link.
    """

    def __init__(self, folder: Path, only: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.watched: Counter[str] = Counter()
        self._folder = folder
        self._only = only
        self._environment = environment
        self._rows: list[dict[str, Any]] = []
        self._found = -MAX_AGE
        self._looking = asyncio.Lock()
        self._pictures: OrderedDict[tuple[str, int], tuple[float, bytes]] = OrderedDict()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._decoding = asyncio.Lock()

    async def rows(self) -> list[dict[str, Any]]:
        """Return an object for each session, as ``farplug ls --json`` prints it, with ``thumbnail``: it has a picture.

        Raises:
            SetupError: the folder with the sockets of sessions cannot be used.
        """
        async with self._looking:
            if time.monotonic() - self._found > MAX_AGE:
                self._rows = [list_json(entry) for entry in await list_sessions(self._environment)]
                self._found = time.monotonic()
        return [
            {**row, "thumbnail": self.watched[row["name"]] > 0}
            for row in self._rows
            if self._only is None or row["name"] == self._only
        ]

    def check(self, name: object) -> str:
        """Return the name of a session that this page shows.

        Raises:
            UsageError: it is not a name, or the page is for another session.
        """
        if not isinstance(name, str):
            raise UsageError(f"session: {shown(name)} is not a name", reason=Reason.BAD_SETTING)
        if self._only is not None and name != self._only:
            raise UsageError(f"this page is for the session {self._only} only", reason=Reason.NO_SESSION)
        return name

    def path(self, name: str) -> Path:
        """Return the path of a session's socket.

        Raises:
            UsageError: the name is not valid.
            SetupError: the folder cannot be used.
        """
        return socket_path(name, self._environment)

    async def thumbnail(self, name: str, display: int = 0) -> bytes:
        """Return a small picture of a screen that a browser watches, as a PNG file.

        Raises:
            UsageError: ``no-session``: no browser watches it.
            FarplugError: the session cannot write it.
        """
        if not self.watched[self.check(name)]:
            raise UsageError(f"no browser watches the screen of {shown(name)}", reason=Reason.NO_SESSION)
        key = (name, display)
        async with self._turn(name):
            kept = self._pictures.get(key)
            if kept is None or time.monotonic() - kept[0] > INTERVAL:
                picture = await self._screenshot(name, display)
                async with self._decoding:  # one at a time: its pixels take more memory than the file
                    kept = time.monotonic(), await asyncio.to_thread(_small, picture)
                self._pictures[key] = kept
                self._pictures.move_to_end(key)
                while len(self._pictures) > MAX_PICTURES:
                    self._pictures.popitem(last=False)
        return kept[1]

    async def screenshot(self, name: str, display: int = 0) -> bytes:
        """Return the picture of a screen as a PNG file; the session links the screen if it is not linked.

        Raises:
            FarplugError: the session does not run, or cannot write it.
        """
        self.check(name)
        async with self._turn(name):
            return await self._screenshot(name, display)

    def _turn(self, name: str) -> asyncio.Lock:
        """Return the lock of a session: it is asked for one picture at a time, and delays no other session's."""
        return self._turns.setdefault(name, asyncio.Lock())

    async def _screenshot(self, name: str, display: int) -> bytes:
        path = self._folder / f"{token_hex(8)}.png"
        try:
            async with asyncio.timeout(SCREENSHOT_TIMEOUT), Client.connect(self.path(name)) as client:
                await client.call("screenshot", {"path": str(path), "display": display})
            return await asyncio.to_thread(_read, path)
        except TimeoutError:
            raise TargetError(f"the session {name} sends no picture", reason=Reason.TIMED_OUT) from None
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_PICTURE)


def _small(picture: bytes) -> bytes:
    try:
        return scaled(picture, THUMBNAIL_WIDTH)
    except ValueError as error:
        raise RemoteProtocolError(f"the session wrote a picture that cannot be used: {error}") from None
