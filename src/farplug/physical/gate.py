"""The gate between the event loop and a device: shut while the device's thread talks to it.

Linux locks a device for as long as a reset, a new setting or a cleared halt takes, and whoever submits, cancels or
reaps a transfer of it meanwhile waits. So the loop does none of that until the thread is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from farplug.physical.device_thread import Worker
from farplug.physical.event_handler import Events

log = logging.getLogger(__name__)


class Gate:
    """Lets the loop talk to a device, or holds back what it has to say.

    Args:
        worker: the device's thread.
        events: of the device: not handled while the gate is shut.

    Attributes:
        shut: nothing may be said to the device now.
    """

    def __init__(self, worker: Worker, events: Events) -> None:
        self.shut = False
        self._worker = worker
        self._events = events
        self._calls = 0
        """Calls that the thread has to make."""
        self._held: dict[object, Callable[[], None]] = {}
        self._ended = False

    def when_open(self, subject: object, say: Callable[[], None]) -> None:
        """Say something to the device: now, or when the gate opens, in the order in which it came.

        What was held back is called with ``shut`` still set, so that nothing new comes before the rest of it. Only one
        thing is held back about a ``subject``, the last: memory is bounded by what there is to talk about.
        """
        if self.shut:
            self._held[subject] = say
        else:
            say()

    def forget(self, subject: object) -> None:
        """What is held back about ``subject`` is not to be said any more."""
        self._held.pop(subject, None)

    async def call(self, function: Callable[[], None]) -> None:
        """Have something done in the thread: the gate is shut until then, even if nobody waits for it any more.

        Raises what ``function`` raises.
        """
        if not self._calls:
            self._events.pause()
            self.shut = True
        self._calls += 1
        call = self._worker.call(function)
        call.add_done_callback(self._called)
        await asyncio.shield(call)

    def end(self) -> None:
        """If it is shut, it stays so: what is held back is never said."""
        self._ended = True
        self._held.clear()

    def _called(self, call: asyncio.Future[None]) -> None:
        if not call.cancelled():
            call.exception()  # who waited for it was told
        self._calls -= 1
        if self._calls or self._ended:
            return
        self._events.go_on()
        # Still shut: what comes in answer to what is said now must not overtake what is held back.
        while self._held and not self._calls:
            say = self._held.pop(next(iter(self._held)))
            try:
                say()
            except Exception:
                log.exception("something could not be said to a device")
        self.shut = self._ended or self._calls > 0
