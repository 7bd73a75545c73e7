"""Endpoints of a remote device that are used continuously: several URBs are always in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from farplug.remote.connection import UrbConnection, status_of
from farplug.usb.device import Reception
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, Endpoint, TransferType
from farplug.usbip.messages import IsoPacket, Submit, Submitted

ERROR_PAUSE: Final = 0.01
"""Seconds until a failed URB is sent again: a broken device may fail each one at once."""
MAX_TRANSFERS: Final = 16
"""URBs of one endpoint that are in flight."""


class Receiver:
    """A reception: interrupt, isochronous or buffered bulk IN.

    Args:
        reception: the guest's parameters.
        endpoint: of the device.
        connection: carries the URBs.
        received: called with each packet, its endpoint and status.
        ended: called when the endpoint has stalled.
    """

    def __init__(
        self,
        reception: Reception,
        endpoint: Endpoint,
        connection: UrbConnection,
        received: Callable[[int, Status, Buffer], None],
        ended: Callable[[int], None],
    ) -> None:
        self._address = endpoint.address
        self._transfers = min(max(1, reception.transfers), MAX_TRANSFERS)
        size = endpoint.max_packet_size
        iso = endpoint.type is TransferType.ISOCHRONOUS
        count = reception.packets_per_transfer if iso else 0
        self._packets = tuple(IsoPacket(number * size, size) for number in range(count))
        self._length = count * size or reception.bytes_per_transfer or size
        self._connection = connection
        self._received = received
        self._ended = ended
        self._in_flight: set[int] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._stopped = False

    def start(self) -> None:
        """Send the first URBs."""
        for _ in range(self._transfers):
            self._send()

    def stop(self) -> None:
        """Cancel the URBs; what they still receive is dropped."""
        self._stopped = True
        for timer in self._timers:
            timer.cancel()
        for number in self._in_flight:
            self._connection.unlink(number)

    def _send(self) -> None:
        if self._stopped or not self._connection.is_open:
            return
        urb = Submit(0, 0, self._address, self._length, packets=self._packets)
        self._in_flight.add(self._connection.submit(urb, self._done))

    def _done(self, reply: Submitted) -> None:
        self._in_flight.discard(reply.number)
        if self._stopped or not self._connection.is_open:
            return
        status = status_of(reply.status)
        if status is Status.STALL:
            self._ended(self._address)
            return
        if self._packets and status is Status.SUCCESS:
            view, at = memoryview(reply.data), 0
            for packet in reply.packets:
                part = bytes(view[at : at + packet.actual])
                at += packet.actual
                self._received(self._address, status_of(packet.status), part)
        elif status is not Status.CANCELLED:
            # The data of an isochronous URB are those of several packets, which do not fit one packet of the guest.
            self._received(self._address, status, b"" if self._packets else reply.data)
        if status is Status.SUCCESS:
            self._send()
        else:
            self._send_later()

    def _send_later(self) -> None:
        def send() -> None:
            self._timers.discard(timer)
            self._send()

        timer = asyncio.get_running_loop().call_later(ERROR_PAUSE, send)
        self._timers.add(timer)


class IsoOut:
    """An isochronous OUT stream: packets are sent in URBs of several.

    Args:
        reception: the guest's parameters.
        endpoint: of the device.
        connection: carries the URBs.
    """

    def __init__(self, reception: Reception, endpoint: Endpoint, connection: UrbConnection) -> None:
        self._address = endpoint.address
        self._count = max(1, reception.packets_per_transfer)
        self._transfers = min(max(1, reception.transfers), MAX_TRANSFERS)
        self._connection = connection
        self._waiting: list[bytes] = []
        self._in_flight: set[int] = set()

    def add(self, packet: bytes) -> Status:
        """Take a packet; return ``IO_ERROR`` if the device is too slow, and the packet is lost."""
        if len(self._in_flight) >= self._transfers:
            return Status.IO_ERROR
        self._waiting.append(packet)
        if len(self._waiting) >= self._count:
            parts, self._waiting = self._waiting, []
            packets, at = [], 0
            for part in parts:
                packets.append(IsoPacket(at, len(part)))
                at += len(part)
            urb = Submit(0, 0, self._address, at, b"".join(parts), packets=packets)
            self._in_flight.add(self._connection.submit(urb, self._done))
        return Status.SUCCESS

    def _done(self, reply: Submitted) -> None:
        self._in_flight.discard(reply.number)

    def stop(self) -> None:
        """Cancel the URBs."""
        for number in self._in_flight:
            self._connection.unlink(number)
