"""A thread for blocking calls of libusb, which take seconds when a device hangs."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import TypeAlias, TypeVar
from weakref import finalize

from farplug.threads import run_into_future

T = TypeVar("T")

EXIT_TIMEOUT = 5.0
"""Seconds that the exit of the process waits, in all, for devices that are being released."""

_Call: TypeAlias = Callable[[], None]

_running: set[DeviceThread] = set()


class DeviceThread:
    """A thread that makes calls one after the other.

    The thread does not keep the process alive, but the exit of the process waits for it, up to :data:`EXIT_TIMEOUT`.

    Args:
        name: of the thread.
        last: the last call, made once: by :meth:`stop`, or when the process exits.
    """

    def __init__(self, name: str, last: Callable[[], None]) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._last = last
        self._stopping = False
        self._thread = Thread(target=self._serve, name=name, daemon=True)
        _running.add(self)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Make a call in the thread, after the earlier ones. The call is made even if the future is cancelled."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put(lambda: run_into_future(function, future, loop))
        return future

    def stop(self) -> asyncio.Future[None]:
        """Make the last call, then end the thread. The future is done when the last call has returned."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._stopping = True
        self._calls.put(lambda: run_into_future(self._last, future, loop))
        self._calls.put(None)
        return future

    def finish(self, deadline: float) -> None:
        """Make the last call, if :meth:`stop` did not, and wait for the thread until a deadline (monotonic time)."""
        if not self._stopping:
            self._stopping = True
            self._calls.put(self._last)
            self._calls.put(None)
        self._thread.join(max(0.0, deadline - monotonic()))

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it may refer to the device
        _running.discard(self)


# Exit handlers run last first. python-libusb1 closes its handles in weakref's exit handler, which is registered with
# the first finalizer: this one registers it before ours, so that devices are released while their handles are open.
finalize(DeviceThread, lambda: None)


@atexit.register
def finish() -> None:
    """Make the last call of each thread, and wait up to :data:`EXIT_TIMEOUT`: before the process exits at once."""
    deadline = monotonic() + EXIT_TIMEOUT
    for thread in list(_running):
        thread.finish(deadline)
