"""Answers that lie before a VM that was paused: another word makes QEMU look.

While its VM is paused QEMU's usb-redir takes nothing. When the VM goes on it takes what came in the pause from a
socket, but not from its SPICE server (seen with QEMU 7.2): there it lies until more comes, and the guest's driver
waits until it gives up. So in a silence something harmless is said again and again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

FIRST_DELAY = 1.0
"""Seconds of the guest's silence until the first reminder; each next one comes after twice the time."""
MAX_DELAY = 5.0
"""Seconds between reminders at most. Linux gives a disk 30 s for an answer."""


class Reminder:
    """Reminds a guest that is silent.

    Args:
        send: says something harmless.

    Attributes:
        heard: the guest said something: set it with each word.
    """

    def __init__(self, send: Callable[[], None]) -> None:
        self.received = False
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From here on a silence counts."""
        self.stop()
        self._wait(FIRST_DELAY)

    def stop(self) -> None:
        """No more reminders."""
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
