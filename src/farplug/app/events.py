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
from typing import Any, Final, Self

from farplug.redirection import events as port_events
from farplug.redirection.events import DeviceReport, PortEvent
from farplug.text import printable
from farplug.virtual.events import FunctionRaised, LineChanged, MediumLocked
from farplug.virtual.fido.events import KeyUsed, PresenceAsked
from farplug.virtual.fido.presence import Use

log = logging.getLogger(__name__)

MAX_QUEUED: Final = 1000
"""Events that wait for a reader of :meth:`EventStream.iterate`; of more the oldest are dropped."""
MAX_ERROR: Final = 500
"""Characters of an exception of a listener in the event ``listener-failed``."""
DROPPED: Final = "events-dropped"
"""The name of the event that stands in the place of those that a reader lost."""


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
        data: dict[str, Any] = {
            "id": self.id,
            "time": round(self.time, 3),
            "event": self.name,
            "level": str(self.level),
        }
        if self.guest is not None:
            data["guest"] = self.guest
        if self.attachment is not None:
            data["attachment"] = self.attachment
        if self.device:
            data["device"] = self.device
        return {**data, **self.fields, "message": self.message}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the event that an object of JSON's types describes: what :meth:`to_json` returned.

        A level that is not known counts as ``info``. Fields that every event has are not among ``fields``.

        Raises:
            KeyError: a field that every event has is missing.
        """
        level = data["level"]
        return cls(
            id=data["id"],
            time=data["time"],
            name=data["event"],
            message=data["message"],
            level=Level(level) if level in Level._value2member_map_ else Level.INFO,
            guest=data.get("guest"),
            attachment=data.get("attachment"),
            device=data.get("device", ""),
            fields={name: value for name, value in data.items() if name not in _OF_EVERY_EVENT},
        )

    def __str__(self) -> str:
        return f"{self.device}: {self.message}" if self.device else self.message


_OF_EVERY_EVENT: Final = ("id", "time", "event", "level", "guest", "attachment", "device", "message")

Listener = Callable[[Event], None]


class EventStream:
    """Numbers events, and passes each to all listeners.

    Args:
        clock: returns seconds since 1970.

    Attributes:
        last_id: the id of the last event; 0: there was none.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.last_id = 0
        self._clock = clock
        self._listeners: dict[object, _Subscription] = {}
        self._pending: deque[Event] = deque()
        self._passing_on = False

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each event from now on, on the event loop; return a function that ends the calls.

        All listeners get the events in the order of their ids: an event that a listener publishes follows after the
        one that the listener was called with.

        A listener that raises gets no further event: the others get an event ``listener-failed``, and the log has the
        traceback.
        """
        key = object()
        self._listeners[key] = _Subscription(listener, self.last_id)

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

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
        """Give an event its number and pass it to the listeners. Fields are JSON's types."""
        self.last_id += 1
        self._pending.append(
            Event(self.last_id, self._clock(), name, message, level, guest, attachment, device, fields, source)
        )
        if self._passing_on:
            return  # a listener publishes: the call that called the listener goes on with this event
        self._passing_on = True
        try:
            while self._pending:
                self._pass_on(self._pending.popleft())
        finally:
            self._passing_on = False

    def _pass_on(self, event: Event) -> None:
        for key, subscription in list(self._listeners.items()):
            if key not in self._listeners or event.id <= subscription.after:
                continue  # a listener ended the subscription, or made it, meanwhile
            try:
                subscription.listener(event)
            except (Exception, asyncio.CancelledError) as error:  # the latter of a future that the listener looks at
                self._listeners.pop(key, None)
                log.exception("a listener of events raised; it gets no further event")
                what = printable(f"{type(error).__name__}: {error}", MAX_ERROR)
                self.publish("listener-failed", f"a listener of events raised {what}", level=Level.BAD, error=what)

    def iterate(
        self,
        wanted: Callable[[Event], bool] = lambda event: True,
        last: Callable[[Event], bool] = lambda event: False,
    ) -> EventReader:
        """Return an asynchronous iterator over the events from now on that are wanted.

        A reader that is slower than the events loses the oldest of those that wait: an event ``events-dropped`` with
        their number stands in their place. It has the id of the last one that was dropped.

        Args:
            wanted: returns whether the iterator yields an event.
            last: returns whether the iteration ends after a wanted event.
        """
        return EventReader(self, wanted, last)


@dataclass(frozen=True, slots=True)
class _Subscription:
    """A listener, and the last event before it subscribed."""

    listener: Listener
    after: int


class EventReader(AsyncIterator[Event]):
    """Yields events. Made by :meth:`EventStream.iterate`: events wait from then on, until :meth:`close`.

    A reader that is dropped is closed.
    """

    def __init__(self, stream: EventStream, wanted: Callable[[Event], bool], last: Callable[[Event], bool]) -> None:
        self._queue = queue = EventQueue()
        self._last = last
        self._ended = False
        # The stream must not hold the reader: it would never be dropped.
        self._unsubscribe = stream.subscribe(lambda event: queue.put(event) if wanted(event) else None)

    def close(self) -> None:
        """End the iteration: no further event waits."""
        self._ended = True
        self._unsubscribe()

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._queue.get()
        if self._last(event):
            self.close()
        return event

    def __del__(self) -> None:
        self._unsubscribe()


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
        """Wait for the next event; first for the one with the number of those that were dropped."""
        while not self._events:
            self._there.clear()
            await self._there.wait()
        if self._last_dropped is not None:
            last, count = self._last_dropped, self._dropped
            self._last_dropped, self._dropped = None, 0
            return dropped(last, count)
        return self._events.popleft()


def dropped(last: Event, count: int) -> Event:
    """Return the event that stands in the place of ``count`` events, up to ``last``, that a reader lost."""
    text = f"{count} event{'s' if count > 1 else ''} dropped: the reader is too slow"
    return Event(last.id, last.time, DROPPED, text, Level.BAD, fields={"count": count})


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
        case port_events.Repeated(last=last):
            return level_of(last)
        case DeviceReport(event=MediumLocked() | LineChanged()):
            return Level.DETAIL  # systems lock a drive, and set a line, each time they look into it
        case DeviceReport(event=FunctionRaised()):
            return Level.BAD
        case DeviceReport(event=PresenceAsked()):
            return Level.PROGRESS
        case DeviceReport(event=KeyUsed(use=Use.LOOK_UP)):
            return Level.DETAIL  # browsers look for credentials before they ask for a touch
        case port_events.Detached(error=error):
            return Level.GOOD if error is None else Level.BAD
    return _LEVELS.get(type(event), Level.INFO)
