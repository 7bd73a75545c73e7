"""What moved through each endpoint of a device, counted."""

from __future__ import annotations

from farplug.usb.figures import EndpointFigures
from farplug.usb.transfer import Status


class Counter:
    """The running figures of one endpoint."""

    __slots__ = ("bytes", "cancelled", "dropped", "errors", "stalls", "transfers")

    def __init__(self) -> None:
        self.transfers = self.bytes = self.errors = self.stalls = self.cancelled = self.dropped = 0

    def count(self, status: Status, moved: int) -> None:
        """One transfer ended so, and this many bytes moved."""
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
    """The running figures of all endpoints of a device. Endpoint 0 counts both of its directions."""

    def __init__(self) -> None:
        self._counters: dict[int, Counter] = {}

    def __getitem__(self, endpoint: int) -> Counter:
        address = endpoint if endpoint & 0x0F else 0
        counter = self._counters.get(address)
        if counter is None:
            counter = self._counters[address] = Counter()
        return counter

    def clear(self) -> None:
        """Begin at zero: another device."""
        self._counters.clear()

    def snapshot(self) -> tuple[EndpointFigures, ...]:
        """One entry for each endpoint that was used, by address."""
        return tuple(
            EndpointFigures(endpoint, c.transfers, c.bytes, c.errors, c.stalls, c.cancelled, c.dropped)
            for endpoint, c in sorted(self._counters.items())
        )
