"""One stream of events: everything that happens in the application, in its order.

Each event has a stable name and a number. :meth:`EventStream.subscribe` calls a listener at once, on the event loop;
:meth:`EventStream.iterate` is the same for ``async for``, through a bounded queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from farplug.redirection import events as port_events
from farplug.redirection.events import DeviceReport, PortEvent, as_dict
from farplug.virtual.events import FunctionRaised, MediumLocked

log = logging.getLogger(__name__)

MAX_QUEUED: Final = 1000
"""Events that wait for a reader of :meth:`EventStream.iterate`; of more the oldest are dropped."""


class Level(StrEnum):
    """How much an event matters to a person."""

    DETAIL = "detail"
    """Only for programs."""
    INFO = "info"
    PROGRESS = "progress"
    """Something is awaited."""
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        id: counts the events of the application from 1, without a gap.
        time: when, in seconds since 1970.
        name: of this kind of event; stable.
        message: one line for a person.
        level: how much it matters to a person.
        guest: the id of the guest; None: it concerns none.
        attachment: the id of the attachment; None: it concerns none.
        device: the label of the attachment, or of what is about to become one; empty: none.
        fields: JSON's types, by name; which ones there are depends on ``name``.
        source: the event of the engine or of the device that it reports; not part of JSON.
    """

    id: int
    time: float
    name: str
    message: str
    level: Level = Level.INFO
    guest: str | None = None
    attachment: str | None = None
    device: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: PortEvent | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON's types. Ids and the label stand there if the event has them."""
        data: dict[str, Any] = {"id": self.id, "time": round(self.time, 3), "event": self.name}
        if self.guest is not None:
            data["guest"] = self.guest
        if self.attachment is not None:
            data["attachment"] = self.attachment
        if self.device:
            data["device"] = self.device
        return {**data, **self.fields, "message": self.message}

    def __str__(self) -> str:
        return f"{self.device}: {self.message}" if self.device else self.message


Listener = Callable[[Event], None]


class EventStream:
    """Numbers events, and hands them to everybody who listens.

    Args:
        clock: returns seconds since 1970.

    Attributes:
        last_id: the id of the last event; 0: there was none.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.last_id = 0
        self._clock = clock
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each event from now on, on the event loop; return what ends that.

        A listener that raises gets no further event: the others get an event ``listener-failed``, and the log has the
        traceback.
        """
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def publish(
        self,
        name: str,
        message: str,
        /,
        *,
        level: Level = Level.INFO,
        guest: str | None = None,
        attachment: str | None = None,
        device: str = "",
        source: PortEvent | None = None,
        **fields: Any,
    ) -> None:
        """Give an event its number and hand it to the listeners. Fields are JSON's types."""
        self.last_id += 1
        event = Event(self.last_id, self._clock(), name, message, level, guest, attachment, device, fields, source)
        failed: list[tuple[Listener, Exception]] = []
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:
                failed.append((listener, error))
        for listener, raised in failed:
            log.error("a listener of events raised; it gets no further event", exc_info=raised)
            if listener in self._listeners:
                self._listeners.remove(listener)
        for _, raised in failed:
            what = f"{type(raised).__name__}: {raised}"
            self.publish("listener-failed", f"a listener of events raised {what}", level=Level.BAD, error=what)

    async def iterate(self, wanted: Callable[[Event], bool] = lambda event: True) -> AsyncIterator[Event]:
        """Yield each event from now on that is wanted.

        A reader that is slower than the events loses the oldest of those that wait: an event ``events-dropped`` with
        their number stands in their place. It has the id of the last one that was dropped.
        """
        queue = EventQueue()
        unsubscribe = self.subscribe(lambda event: queue.put(event) if wanted(event) else None)
        try:
            while True:
                yield await queue.get()
        finally:
            unsubscribe()


class EventQueue:
    """Events that wait for one reader.

    Args:
        size: how many wait at most; of more the oldest are dropped.
    """

    def __init__(self, size: int = MAX_QUEUED) -> None:
        self._size = size
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._last_dropped: Event | None = None
        self._there = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event; drop the oldest one if too many wait."""
        if len(self._events) >= self._size:
            self._last_dropped = self._events.popleft()
            self._dropped += 1
        self._events.append(event)
        self._there.set()

    async def get(self) -> Event:
        """Wait for the next event; first for the one that tells how many were dropped."""
        while not self._events:
            self._there.clear()
            await self._there.wait()
        if self._last_dropped is not None:
            last, count = self._last_dropped, self._dropped
            self._last_dropped, self._dropped = None, 0
            text = f"{count} event{'s' if count > 1 else ''} dropped: the reader is too slow"
            return Event(last.id, last.time, "events-dropped", text, Level.BAD, fields={"count": count})
        return self._events.popleft()


_LEVELS: Mapping[type[PortEvent], Level] = {
    port_events.WaitingForGuest: Level.PROGRESS,
    port_events.Unused: Level.PROGRESS,
    port_events.OfferChanged: Level.PROGRESS,
    port_events.Attached: Level.GOOD,
    port_events.Configured: Level.GOOD,
    port_events.PeerViolation: Level.BAD,
    port_events.DeviceFault: Level.BAD,
    port_events.Refused: Level.BAD,
}


def level_of(event: PortEvent) -> Level:
    """Return how much an event of the engine matters to a person."""
    match event:
        case DeviceReport(event=MediumLocked()):
            return Level.DETAIL  # systems lock a drive each time they look into it
        case DeviceReport(event=FunctionRaised()):
            return Level.BAD
        case port_events.Detached(error=error):
            return Level.GOOD if error is None else Level.BAD
    return _LEVELS.get(type(event), Level.INFO)


def fields_of(event: PortEvent) -> dict[str, Any]:
    """Return the fields of an event of the engine as JSON's types."""
    return {name: value for name, value in as_dict(event).items() if name not in ("event", "message")}
