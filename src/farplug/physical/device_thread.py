"""A thread for what libusb does at once or not at all: a device that hangs makes such calls take seconds."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import TypeAlias, TypeVar
from weakref import finalize

from farplug.threads import run

T = TypeVar("T")

EXIT_PATIENCE = 5.0
"""Seconds that the exit of the process waits, in all, for devices that are being given back."""

_Job: TypeAlias = Callable[[], None]

_running: set[Worker] = set()


class Worker:
    """One thread that makes calls one after the other.

    It does not keep the process alive, but the exit of the process waits for it, up to a bound.

    Args:
        name: of the thread.
        last: the call that it ends with, once: at :meth:`stop`, or when the process exits.
    """

    def __init__(self, name: str, last: Callable[[], None]) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._last = last
        self._stopping = False
        self._thread = Thread(target=self._serve, name=name, daemon=True)
        _running.add(self)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Make a call in the thread, after those before it. It is made even if nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(lambda: run(function, future, loop))
        return future

    def stop(self) -> asyncio.Future[None]:
        """Make the last call, and end the thread. Done when it has ended."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._stopping = True
        self._jobs.put(lambda: run(self._last, future, loop))
        self._jobs.put(None)
        return future

    def end(self, until: float) -> None:
        """The process exits: see to it that the last call is made; wait for that until a time (monotonic)."""
        if not self._stopping:
            self._stopping = True
            self._jobs.put(self._last)
            self._jobs.put(None)
        self._thread.join(max(0.0, until - monotonic()))

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it may hold the device
        _running.discard(self)


# Exit handlers run last first. python-libusb1 closes its handles in weakref's, which comes with the first finalizer:
# this one makes sure that weakref's is older than ours, so that devices are given back while they are still open.
finalize(Worker, lambda: None)


@atexit.register
def finish() -> None:
    """Have all last calls made, and wait for that, up to :data:`EXIT_PATIENCE`: before the process ends at once."""
    until = monotonic() + EXIT_PATIENCE
    for worker in list(_running):
        worker.end(until)
