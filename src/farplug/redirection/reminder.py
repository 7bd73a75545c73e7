"""Work around QEMU not reading usbredir data that arrived over SPICE while the VM was paused.

QEMU's usb-redir device reads nothing while its VM is paused. When the VM continues, QEMU reads what arrived from a
socket in the meantime, but not what its own SPICE server holds (seen with QEMU 7.2): that is read only when more data
arrives, and the guest's driver waits for its answer until its timeout. So a harmless packet is sent again and again
while the guest is silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

FIRST_DELAY = 1.0
"""Seconds of the guest's silence before the first reminder; the delay doubles with each further one."""
MAX_DELAY = 5.0
"""The longest delay in seconds. The timeout of Linux for a command of a disk is 30 s."""


class Reminder:
    """Sends a packet repeatedly while the guest is silent.

    Args:
        send: sends a harmless packet.

    Attributes:
        received: whether the guest has sent data since the last check: set it with all data.
    """

    def __init__(self, send: Callable[[], None]) -> None:
        self.received = False
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to measure the guest's silence."""
        self.stop()
        self._wait(FIRST_DELAY)

    def stop(self) -> None:
        """Send no more reminders."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, seconds: float) -> None:
        self.received = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._check, seconds)

    def _check(self, waited: float) -> None:
        if self.received:
            self._wait(FIRST_DELAY)
        else:
            self._send()
            self._wait(min(2 * waited, MAX_DELAY))
