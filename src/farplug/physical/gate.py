"""The gate between the event loop and a device: shut while the device's thread makes a call.

Linux locks a device during a reset, a change of setting or a cleared halt. Submitting, cancelling or reaping a transfer
of the device blocks meanwhile, so the event loop does none of these until the thread is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from farplug.physical.device_thread import DeviceThread
from farplug.physical.event_handler import EventHandler
from farplug.rate_limit import limited_logger

log = limited_logger(__name__)


class Gate:
    """Runs the event loop's actions on a device, or defers them while the device's thread makes a call.

    Args:
        thread: the device's thread.
        event_handler: paused while the gate is shut.

    Attributes:
        shut: the event loop must not act on the device now.
    """

    def __init__(self, thread: DeviceThread, event_handler: EventHandler) -> None:
        self.shut = False
        self._thread = thread
        self._event_handler = event_handler
        self._calls = 0
        """Calls that the thread has not finished."""
        self._deferred: dict[object, Callable[[], None]] = {}
        self._ended = False

    def run_or_defer(self, key: object, action: Callable[[], None]) -> None:
        """Run an action on the device now, or when the gate opens, in the order of the calls.

        Deferred actions run while ``shut`` is still set, so that no new action runs before the rest of them. Each key
        has one deferred action, the last: memory is bounded by the number of keys.
        """
        if self.shut:
            self._deferred[key] = action
        else:
            action()

    def discard(self, key: object) -> None:
        """Discard the deferred action of ``key``, if there is one."""
        self._deferred.pop(key, None)

    async def call(self, function: Callable[[], None]) -> None:
        """Make a call in the device's thread. The gate is shut until it returns, even if the caller is cancelled.

        Raises:
            Exception: as ``function`` does.
        """
        if not self._calls:
            self._event_handler.pause()
            self.shut = True
        self._calls += 1
        call = self._thread.call(function)
        call.add_done_callback(self._called)
        await asyncio.shield(call)

    def end(self) -> None:
        """Discard all deferred actions. A gate that is shut stays shut."""
        self._ended = True
        self._deferred.clear()

    def _called(self, call: asyncio.Future[None]) -> None:
        if not call.cancelled():
            call.exception()  # retrieved, as its caller may be gone
        self._calls -= 1
        if self._calls or self._ended:
            return
        self._event_handler.resume()
        # Still shut: an action that a deferred one causes must not overtake the other deferred ones.
        while self._deferred and not self._calls:
            action = self._deferred.pop(next(iter(self._deferred)))
            try:
                action()
            except Exception:
                log.exception("a deferred action on a device failed")
        self.shut = self._ended or self._calls > 0
