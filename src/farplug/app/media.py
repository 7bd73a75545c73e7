"""Files that clients offer: media whose blocks come from the client, and go with it."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from farplug.app.events import EventStream, Level
from farplug.app.outlet import ClientEvent, Outlet
from farplug.errors import Reason, UsageError
from farplug.store.base import Store
from farplug.store.remote import ChunkCache, RemoteFile, RemoteStore
from farplug.text import printable, shown
from farplug.virtual.cdrom import CdromDrive

PREFIX: Final = "client:"
"""Begins the path of a file that a client offers: ``client:m1`` for this client, ``client:m1/name.iso`` for people."""
MAX_FILE: Final = 1 << 53
"""Bytes of a file that a client offers."""
PROGRESS_INTERVAL: Final = 1.0
"""Seconds from one event ``media-progress`` to the next."""
GONE: Final = "its client has gone, or offers the file no more"
_PATH: Final = re.compile(r"client:(m\d{1,15})/.*", re.DOTALL)


class Offer:
    """A file that a client offers.

    Args:
        id: unique in the session.
        name: of the file, as the client gave it.
        size: in bytes.
        modified: when it was changed last, as the client gave it.
        outlet: the connection of the client.
        cache: where chunks are stored.
        failed: called with the event's message when a read of a guest fails.

    Attributes:
        id: as above.
        path: under which it is plugged, with the name.
        file: its content.
    """

    def __init__(
        self,
        id: str,
        name: str,
        size: int,
        modified: str,
        outlet: Outlet,
        cache: ChunkCache,
        failed: Callable[[Offer, str], None],
    ) -> None:
        self.id = id
        name = printable(re.split(r"[/\\]", name)[-1], 255).strip() or id
        self.path = f"{PREFIX}{id}/{name}"
        self._outlet = outlet
        self._failed = failed
        self._timer: asyncio.TimerHandle | None = None
        self._questions: dict[int, dict[str, Any]] = {}
        """Those that were not sent yet, by their numbers."""
        self.file = RemoteFile(
            name,
            size,
            modified,
            self._ask,
            cache,
            lambda error: failed(self, f"{name}: reading failed: {printable(str(error.strerror), 500)}"),
            self._progress,
        )

    def _ask(self, read: int, offset: int, length: int) -> None:
        self._questions = {one: data for one, data in self._questions.items() if self.file.is_asked(one)}
        self._questions[read] = {"media": self.id, "read": read, "offset": offset, "length": length}
        self._outlet.post(("media-read", self.id), self._question)

    def _question(self) -> ClientEvent | None:
        """Return the oldest question that an answer is awaited to, and post the event for the others."""
        questions = [data for one, data in self._questions.items() if self.file.is_asked(one)]
        self._questions = {data["read"]: data for data in questions[1:]}
        if self._questions:
            self._outlet.post(("media-read", self.id), self._question)
        return ClientEvent("media-read", questions[0]) if questions else None

    def _progress(self) -> None:
        if self._timer is None and self.file.is_open:
            self._timer = asyncio.get_running_loop().call_later(PROGRESS_INTERVAL, self._report)

    def _report(self) -> None:
        self._timer = None
        self._outlet.post(("media-progress", self.id), self._event)

    def _event(self) -> ClientEvent:
        file = self.file
        touched = base64.b64encode(file.touched).decode()
        data = {"media": self.id, "read": file.bytes_read, "last": file.last_offset, "touched": touched}
        return ClientEvent("media-progress", data)

    def close(self) -> None:
        """End the offer: drives eject the medium, and reads fail."""
        if self._timer is not None:
            self._timer.cancel()
        is_disk = any(not store.removable for store in self.file.users)
        self.file.close()
        if is_disk:
            self._failed(self, f"{self.file.name}: {GONE}")


class Media:
    """The files that the clients of an application offer.

    Args:
        events: where failures are published.
    """

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._numbers = count(1)
        self._cache = ChunkCache()
        self._offers: dict[str, Offer] = {}

    def offer(self, name: str, size: int, modified: str, outlet: Outlet) -> Offer:
        """Take an offer of a client.

        Raises:
            UsageError: the size is not valid.
        """
        if not 0 < size <= MAX_FILE:
            raise UsageError(f"size: {shown(size)} is not from 1 to {MAX_FILE}", reason=Reason.BAD_SETTING)
        offer = Offer(f"m{next(self._numbers)}", name, size, modified, outlet, self._cache, self._failed)
        self._offers[offer.id] = offer
        return offer

    def withdraw(self, offer: Offer) -> None:
        """End an offer."""
        del self._offers[offer.id]
        offer.close()

    def find(self, path: str) -> Offer | None:
        """Return the file with this path, which has the name; None: it is a path of this machine.

        Raises:
            UsageError: the file is not offered any more (``NOT_FOUND``).
        """
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        if match[1] not in self._offers:
            raise UsageError(f"{shown(path)}: {GONE}", reason=Reason.NOT_FOUND)
        return self._offers[match[1]]

    def _failed(self, offer: Offer, message: str) -> None:
        self._events.publish("medium-failed", message, level=Level.BAD, media=offer.id, medium=offer.path)


def eject_with_client(drive: CdromDrive, store: Store) -> None:
    """Eject a medium from its drive when the client that offers it has gone. Does nothing for other media."""
    if not isinstance(store, RemoteStore):
        return
    store.removable = True

    def gone() -> None:
        if drive.medium == store.name:
            drive.take_out(GONE)

    store.lost = gone
    if not store.file.is_open:
        asyncio.get_running_loop().call_soon(gone)
