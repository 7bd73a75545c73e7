"""libusb's events on the event loop: completions come to it as if it had waited for them itself.

Where libusb has file descriptors (Linux, macOS) the loop watches them; elsewhere a thread waits. No timeout of libusb
is used: then there is nothing else to wake up for.

Source: libusb-1.0, "Asynchronous device I/O" and "Polling and timing".
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections import deque
from collections.abc import Callable
from threading import Thread
from typing import Final

from farplug.libusb.binding import UsbContext, UsbTransfer
from farplug.libusb.library import Interrupted, UsbError

POLL_IN: Final = getattr(select, "POLLIN", 1)
POLL_OUT: Final = getattr(select, "POLLOUT", 4)

log = logging.getLogger(__name__)


class Events:
    """The events of one session with libusb.

    :meth:`completed` is the callback of every transfer. It only takes a note; what is to be done about a completion
    is done by ``deliver``, on the loop, outside of libusb.

    Args:
        context: the session.
        deliver: called on the loop with each transfer that came back.
        gone: called on the loop when libusb no longer watches the device: it was unplugged.
    """

    def __init__(self, context: UsbContext, deliver: Callable[[UsbTransfer], None], gone: Callable[[], None]) -> None:
        self._context = context
        self._deliver = deliver
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._back: deque[UsbTransfer] = deque()
        self._descriptors: list[tuple[int, int]] = []
        self._paused: list[tuple[int, int]] = []
        self._thread: Thread | None = None
        self._waking = False
        self._stopped = False
        try:
            for descriptor, events in context.getPollFDList():
                self._watch(descriptor, events)
        except NotImplementedError:  # of libusb (Windows), or of the loop
            self._unwatch()
            self._thread = Thread(target=self._wait, name="usb-events", daemon=True)
            self._thread.start()

    def completed(self, transfer: UsbTransfer) -> None:
        """A transfer came back: libusb's callback, in whatever thread handles events."""
        self._back.append(transfer)
        if self._thread is not None and not self._waking and not self._stopped:
            self._waking = True
            self._call_soon(self._wake)

    def pause(self) -> None:
        """Do not handle events in the loop until :meth:`go_on`: it would wait for whoever talks to the device now.

        What has come back by now (what was just cancelled, say) is delivered first.
        """
        if self._descriptors:
            self._handle()
        self._paused = self._descriptors
        self._unwatch()

    def go_on(self) -> None:
        """Handle events again: those that came meanwhile, too."""
        paused, self._paused = self._paused, []
        for descriptor, events in paused:
            self._watch(descriptor, events)

    def stop(self) -> None:
        """Handle no more events. What came back and was not delivered yet never will be."""
        self._stopped = True
        self._unwatch()
        self._paused = []
        self._back.clear()

    def join(self) -> None:
        """After :meth:`stop`: wait until no thread of ours handles events. May block for 0.1 s."""
        if self._thread is not None:
            self._context.interruptEventHandler()
            self._thread.join()

    # With descriptors

    def _watch(self, descriptor: int, events: int) -> None:
        self._descriptors.append((descriptor, events))
        if events & POLL_IN:
            self._loop.add_reader(descriptor, self._handle)
        if events & POLL_OUT:
            self._loop.add_writer(descriptor, self._handle)

    def _unwatch(self) -> None:
        for descriptor, events in self._descriptors:
            if events & POLL_IN:
                self._loop.remove_reader(descriptor)
            if events & POLL_OUT:
                self._loop.remove_writer(descriptor)
        self._descriptors = []

    def _handle(self) -> None:
        if self._stopped or not self._descriptors:
            return
        self._handle_events(0)
        if self._back:
            self._deliver_all()
        elif len(self._context.getPollFDList()) < len(self._descriptors):
            self.stop()
            self._gone()

    def _handle_events(self, patience: float) -> None:
        try:
            self._context.handleEventsTimeout(patience)
        except Interrupted:
            pass
        except UsbError as error:
            log.warning("libusb could not handle its events: %s", error)

    def _deliver_all(self) -> None:
        back = self._back
        while back and not self._stopped:
            transfer = back.popleft()
            try:
                self._deliver(transfer)
            except Exception:
                log.exception("a transfer that came back could not be dealt with")

    # With a thread

    def _wait(self) -> None:
        while not self._stopped:
            self._handle_events(0.1)

    def _wake(self) -> None:
        self._waking = False
        self._deliver_all()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more
