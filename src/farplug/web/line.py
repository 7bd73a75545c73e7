"""How fast the line to a browser is, without I/O: whether pictures are worth compressing for it.

A picture of 1280x800 pixels has 4 MB. On this machine it is drawn sooner without compression; through a slow line,
which a page on the loopback address can have behind ``ssh -L``, it takes minutes without. So pictures are compressed
until the browser has acknowledged one soon enough, and again when one takes too long.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FAST: Final = 20e6
"""Bytes per second of a line on which compression only costs time."""
SIGNIFICANT: Final = 16384
"""Bytes of a message from which on its time says something about the line."""
QUICK: Final = 0.03
"""Seconds that a browser on this machine takes for a small picture, besides the line."""
LATE: Final = 0.1
"""Seconds besides the line from which on it is not as fast."""
VERY_LATE: Final = 1.0
"""Seconds from which on less bytes are worth more processor time."""
MIN_HOLD: Final = 10.0
MAX_HOLD: Final = 600.0
"""Seconds in which pictures remain compressed after one took too long: twice as long each time."""


class ScreenLine:
    """The line to a browser that acknowledges each event ``screen``.

    Attributes:
        level: of zlib, for the next picture; 0: it is not worth compressing.
    """

    def __init__(self) -> None:
        self.level = 1
        self._sent: deque[tuple[int, int, float]] = deque(maxlen=8)
        self._free_at = 0.0
        """When the browser had taken all before."""
        self._hold = MIN_HOLD
        self._held_until = 0.0

    def sent(self, serial: int, size: int, now: float) -> None:
        """Take note that an event is being sent.

        Args:
            serial: of the event.
            size: bytes that follow it.
            now: the time in seconds.
        """
        self._sent.append((serial, size, now))

    def acknowledged(self, serial: object, now: float) -> None:
        """Take note that the browser has drawn an event. Unknown serials have no effect."""
        if all(serial != one for one, _, _ in self._sent):
            return
        while True:
            one, size, begin = self._sent.popleft()
            if one == serial:
                break
        seconds = now - max(begin, self._free_at)
        self._free_at = now
        if self.level == 0:
            if seconds <= size / FAST + LATE:
                return
            self._held_until = now + self._hold
            self._hold = min(2 * self._hold, MAX_HOLD)
        elif size >= SIGNIFICANT and now >= self._held_until and seconds < size / FAST + QUICK:
            self.level = 0
            return
        self.level = 6 if seconds > VERY_LATE else 1
