"""The rate limit for events and log lines that a peer, a device or a failing disk can cause.

:class:`RateLimit` limits any items; :func:`limited_logger` returns a logger whose records it limits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, Generic, Protocol, TypeVar

T = TypeVar("T")

BURST: Final = 20
"""Items of one kind that are passed on at once."""
INTERVAL: Final = 5.0
"""Seconds after which one more item of a kind is passed on at once, up to :data:`BURST`; and the longest time for which
an item is held."""
MAX_KINDS: Final = 64
"""Kinds of items that are limited separately; further ones are limited together."""


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> object:
        """Cancel the call."""


class Clock(Protocol):
    """What the limit needs of an event loop, which is one."""

    def time(self) -> float:
        """Return the time in seconds, from any origin."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call ``callback`` once after ``delay`` seconds."""


class _Kind:
    """The items of one kind: how many may pass, and how many are held."""

    __slots__ = ("held", "left", "since")

    def __init__(self, now: float) -> None:
        self.left = float(BURST)
        self.since = now
        self.held = 0

    def refill(self, now: float) -> None:
        self.left = min(float(BURST), self.left + (now - self.since) / INTERVAL)
        self.since = now


class RateLimit(Generic[T]):
    """Passes items on: up to :data:`BURST` of a kind at once, then one of a kind for each :data:`INTERVAL`.

    The last item of a kind is never lost, and no item overtakes an earlier one: while items are held, later ones are
    held too. At most ``MAX_KINDS * (BURST + 1)`` are.

    Args:
        pass_on: called with each item.
        repeated: returns what is passed on for the last item of a kind and a number of items of the kind before it,
            which were dropped.
        clock: returns the clock: ``asyncio.get_running_loop``, for example.
    """

    def __init__(
        self,
        pass_on: Callable[[T], None],
        repeated: Callable[[T, int], Iterable[T]],
        clock: Callable[[], Clock],
    ) -> None:
        self._pass_on = pass_on
        self._repeated = repeated
        self._clock = clock
        self._kinds: dict[Hashable, _Kind] = {}
        self._held: dict[Hashable, tuple[_Kind | None, T]] = {}
        """The items to be passed on, in order. With its kind: the last one of several; without: one item."""
        self._timer: Timer | None = None

    def add(self, kind: Hashable, item: T) -> None:
        """Pass an item on, now or within :data:`INTERVAL`, unless another one of its kind takes its place."""
        if self.admit(kind, item):
            self._pass_on(item)

    def admit(self, kind: Hashable, item: T) -> bool:
        """Return True if the caller must pass the item on now; False if the limit holds it, as :meth:`add` does."""
        clock = self._clock()
        state = self._kind(kind, clock.time())
        if state.left >= 1:
            state.left -= 1
            if not self._held:
                return True
            self._held[object()] = (None, item)
        else:
            state.held += 1
            self._held.pop(state, None)  # the kind moves to the end
            self._held[state] = (state, item)
        if self._timer is None:
            self._timer = clock.call_later(INTERVAL, self.release)
        return False

    def release(self) -> None:
        """Pass on all items that are held, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held, self._held = self._held, {}
        for state, item in held.values():
            if state is None:
                self._pass_on(item)
                continue
            dropped, state.held = state.held - 1, 0
            state.left -= 1
            for one in self._repeated(item, dropped) if dropped else (item,):
                self._pass_on(one)

    def restart(self) -> None:
        """Pass on all items that are held, and begin again with full bursts: a user did something."""
        self.release()
        self._kinds.clear()

    def _kind(self, kind: Hashable, now: float) -> _Kind:
        """Return the state of a kind, up to date."""
        state = self._kinds.get(kind)
        if state is None:
            if len(self._kinds) >= MAX_KINDS:
                self._forget_idle(now)
            if len(self._kinds) >= MAX_KINDS:
                kind = None
            state = self._kinds.setdefault(kind, _Kind(now))
        state.refill(now)
        return state

    def _forget_idle(self, now: float) -> None:
        """Forget the kinds of which nothing was dropped or held for a while."""
        for state in self._kinds.values():
            state.refill(now)
        self._kinds = {kind: state for kind, state in self._kinds.items() if state.left < BURST or state.held}


# Logs -----------------------------------------------------------------------------------------------------------------


class _ThreadClock:
    """A clock for any thread."""

    time = staticmethod(time.monotonic)

    def call_later(self, delay: float, callback: Callable[[], None]) -> threading.Timer:
        timer = threading.Timer(delay, callback)
        timer.daemon = True
        timer.start()
        return timer


class LogLimit(logging.Filter):
    """Limits the records of one logger from INFO on: one kind for each message and each first argument of it.

    The first argument of a message is the name of what it is about: a port, a device, a disk.

    Args:
        logger: the logger.
        clock: None: a clock for any thread.
    """

    def __init__(self, logger: logging.Logger, clock: Clock | None = None) -> None:
        super().__init__()
        used = clock or _ThreadClock()
        self._lock = threading.RLock()
        self._limit = RateLimit(logger.callHandlers, _repeated_record, lambda: used)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged now."""
        if record.levelno <= logging.DEBUG:
            return True
        about = record.args[0] if isinstance(record.args, tuple) and record.args else None
        with self._lock:
            return self._limit.admit((record.msg, str(about)), record)

    def release(self) -> None:
        """Log all records that are held."""
        with self._lock:
            self._limit.release()


def _repeated_record(last: logging.LogRecord, dropped: int) -> Iterable[logging.LogRecord]:
    changed: dict[str, Any] = {"msg": "%s (%d more like this)", "args": (last.getMessage(), dropped)}
    return (logging.makeLogRecord({**last.__dict__, **changed}),)


_log_limits: dict[str, LogLimit] = {}


def limited_logger(name: str) -> logging.Logger:
    """Return the logger with a name; a :class:`LogLimit` limits its records."""
    logger = logging.getLogger(name)
    if name not in _log_limits:
        _log_limits[name] = LogLimit(logger)
        logger.addFilter(_log_limits[name])
    return logger


def release_logs() -> None:
    """Log all records that are held, of all loggers: before the process ends."""
    for limit in _log_limits.values():
        limit.release()
