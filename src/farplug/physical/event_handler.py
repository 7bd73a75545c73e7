"""libusb's events on the event loop of asyncio.

Where libusb has file descriptors (Linux, macOS), the event loop watches them; elsewhere a thread waits for events.
Transfers have no timeout of libusb, so no timer is needed.

Source: libusb-1.0, "Asynchronous device I/O" and "Polling and timing".
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from threading import Thread
from typing import Final

from farplug.libusb.binding import UsbContext, UsbTransfer
from farplug.libusb.library import Interrupted, UsbError
from farplug.rate_limit import limited_logger

POLL_IN: Final = getattr(select, "POLLIN", 1)
POLL_OUT: Final = getattr(select, "POLLOUT", 4)

log = limited_logger(__name__)


class EventHandler:
    """Handles the events of one libusb context.

    :meth:`completed` is the callback of every transfer. It only queues the transfer; ``deliver`` handles the completion
    on the event loop, outside of libusb.

    Args:
        context: libusb's context.
        deliver: called on the event loop with each completed transfer.
        gone: called on the event loop when libusb no longer watches the device: it was unplugged.
    """

    def __init__(self, context: UsbContext, deliver: Callable[[UsbTransfer], None], gone: Callable[[], None]) -> None:
        self._context = context
        self._deliver = deliver
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._completed: deque[UsbTransfer] = deque()
        self._descriptors: list[tuple[int, int]] = []
        self._paused: list[tuple[int, int]] = []
        self._thread: Thread | None = None
        self._waking = False
        self._stopped = False
        try:
            for descriptor, events in context.getPollFDList():
                self._watch(descriptor, events)
        except NotImplementedError:  # by libusb (Windows), or by the event loop
            self._unwatch()
            self._thread = Thread(target=self._wait, name="usb-events", daemon=True)
            self._thread.start()

    def completed(self, transfer: UsbTransfer) -> None:
        """Queue a completed transfer: libusb's callback, in the thread that handles events."""
        self._completed.append(transfer)
        if self._thread is not None and not self._waking and not self._stopped:
            self._waking = True
            self._call_soon(self._wake)

    def pause(self) -> None:
        """Stop handling events on the event loop until :meth:`resume`, because a call of another thread would block it.

        Transfers that are complete by now, as those just cancelled, are delivered first.
        """
        if self._descriptors:
            self._handle()
        self._paused = self._descriptors
        self._unwatch()

    def resume(self) -> None:
        """Handle events again, and those since :meth:`pause`."""
        paused, self._paused = self._paused, []
        for descriptor, events in paused:
            self._watch(descriptor, events)

    def stop(self) -> None:
        """Handle no more events. Completed transfers that were not delivered yet are dropped."""
        self._stopped = True
        self._unwatch()
        self._paused = []
        self._completed.clear()

    def join(self) -> None:
        """Wait until the thread has ended, after :meth:`stop`. May block for 0.1 s."""
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
        if self._completed:
            self._deliver_all()
        elif len(self._context.getPollFDList()) < len(self._descriptors):
            self.stop()
            self._gone()

    def _handle_events(self, timeout: float) -> None:
        try:
            self._context.handleEventsTimeout(timeout)
        except Interrupted:
            pass
        except UsbError as error:
            log.warning("libusb cannot handle events: %s", error)

    def _deliver_all(self) -> None:
        back = self._completed
        while back and not self._stopped:
            transfer = back.popleft()
            try:
                self._deliver(transfer)
            except Exception:
                log.exception("handling a completed transfer failed")

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
            pass  # the loop is closed
