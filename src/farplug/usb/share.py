"""What one guest may use of this process: work in a turn of the event loop, and memory.

The engine makes one :class:`Share` for each port, and the device counts its work and memory there too. So neither a
guest that sends much, nor a guest whose few bytes cause much work, delays other devices or takes more than its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

TURN_WORK: Final = 4 << 20
"""Work of one port in one turn of the event loop: a few milliseconds. The unit is the time to copy a byte."""
PACKET_WORK: Final = TURN_WORK // 64
"""Work of handling one packet, without its payload."""
STORE_WORK: Final = 16 << 10
"""Work of one operation of a store, without its data. A store makes only a few system calls on the event loop."""
MAX_MEMORY: Final = 64 << 20
"""Bytes that the guest of one port may occupy."""

Callback: TypeAlias = Callable[[], None]


class Turn:
    """The work that may be done in one turn of the event loop.

    Work is counted when it is done, so the last piece of it may exceed the limit. A part of the engine or of a device
    that has more to do passes a callback to :meth:`call_next`, and returns. Work is counted across turns until half of
    the limit is used: a callback in each turn would cost more than a small turn itself.

    Args:
        call_soon: calls a callback in the next turn, as :meth:`asyncio.loop.call_soon`; None: the work has no limit.
        limit: the work of a turn.

    Attributes:
        left: the work that is left in this turn; the turn is over at 0 or below.
    """

    __slots__ = ("_call_soon", "_half", "_limit", "_renewing", "_waiting", "left")

    def __init__(self, call_soon: Callable[[Callback], object] | None, limit: int = TURN_WORK) -> None:
        self.left = limit
        self._limit = limit
        self._half = limit // 2
        self._call_soon = call_soon
        self._renewing = False
        self._waiting: dict[Callback, None] = {}

    def spend(self, work: int) -> None:
        """Count work that is done in this turn."""
        if self._call_soon is not None:
            self.left -= work
            if self.left < self._half and not self._renewing:
                self._schedule()

    def call_next(self, callback: Callback) -> None:
        """Call ``callback`` once in a later turn that has work left; after those that were passed in before."""
        self._waiting[callback] = None
        if not self._renewing:
            self._schedule()

    def _schedule(self) -> None:
        if self._call_soon is not None:
            self._renewing = True
            self._call_soon(self._renew)

    def _renew(self) -> None:
        self._renewing = False
        self.left = self._limit
        waiting, self._waiting = self._waiting, {}
        for callback in list(waiting):
            if self.left <= 0:
                break
            del waiting[callback]
            try:
                callback()
            except BaseException:
                self._keep(waiting)
                raise
        self._keep(waiting)

    def _keep(self, waiting: dict[Callback, None]) -> None:
        """Keep callbacks for the next turn, before those that were passed in during this one."""
        self._waiting = {**waiting, **self._waiting}
        if self._waiting and not self._renewing:
            self._schedule()


class Memory:
    """The bytes that one guest occupies: its pending transfers, and what the device and the output still hold.

    Attributes:
        limit: the bound for transfers.
        used: bytes that are occupied now. For each transfer the engine changes this attribute without a call.
    """

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = MAX_MEMORY) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Count bytes as occupied."""
        self.used += size

    def give(self, size: int) -> None:
        """Count bytes as free again."""
        self.used -= size


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What the guest of one port may use."""

    turn: Turn
    memory: Memory = field(default_factory=Memory)


NO_PORT: Final = Share(Turn(None))
"""The share of a device that is not attached to a port."""
