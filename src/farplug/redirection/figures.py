"""Counters of transfers and bytes for each endpoint of a device."""

from __future__ import annotations

from farplug.usb.figures import EndpointFigures
from farplug.usb.transfer import Status


class Counter:
    """The counters of one endpoint."""

    __slots__ = ("bytes", "cancelled", "dropped", "errors", "stalls", "transfers")

    def __init__(self) -> None:
        self.transfers = self.bytes = self.errors = self.stalls = self.cancelled = self.dropped = 0

    def count(self, status: Status, moved: int) -> None:
        """Count a transfer that ended with ``status`` after ``moved`` bytes."""
        self.transfers += 1
        self.bytes += moved
        if status is Status.SUCCESS:
            return
        if status is Status.STALL:
            self.stalls += 1
        elif status is Status.CANCELLED:
            self.cancelled += 1
        else:
            self.errors += 1


class EndpointCounters:
    """The counters of all endpoints of a device. Endpoint 0 has one counter for both of its directions."""

    def __init__(self) -> None:
        self._counters: dict[int, Counter] = {}

    def __getitem__(self, endpoint: int) -> Counter:
        address = endpoint if endpoint & 0x0F else 0
        counter = self._counters.get(address)
        if counter is None:
            counter = self._counters[address] = Counter()
        return counter

    def clear(self) -> None:
        """Reset all counters, for another device."""
        self._counters.clear()

    def snapshot(self) -> tuple[EndpointFigures, ...]:
        """Return one entry for each endpoint that was used, ordered by address."""
        return tuple(
            EndpointFigures(endpoint, c.transfers, c.bytes, c.errors, c.stalls, c.cancelled, c.dropped)
            for endpoint, c in sorted(self._counters.items())
        )
