"""Transfers as usbredir's packets ask for them, made into requests."""

from __future__ import annotations

from farplug.redirection.current_device import CurrentDevice
from farplug.redirection.offers import OfferWatch
from farplug.redirection.pending_requests import PendingRequests
from farplug.usb.types import Setup, TransferType
from farplug.usbredir import packets as p
from farplug.usbredir.protocol import Oversized


class Transfers:
    """Takes bulk, control and interrupt packets, and says which of them make sense.

    Args:
        current: the device's endpoints.
        requests: has each answered.
        watch: notes what the guest does with the device.
    """

    def __init__(self, current: CurrentDevice, requests: PendingRequests, watch: OfferWatch) -> None:
        self._current = current
        self._requests = requests
        self._watch = watch

    def bulk(self, packet: p.BulkPacket, *, stored: bool = True) -> None:
        """On a bulk endpoint, in or out; on a stream of it, if there is a stream id."""
        self._current.touched = True
        self._watch.used()
        endpoint = self._current.endpoints.get(packet.endpoint)
        self._requests.submit(
            packet.id,
            TransferType.BULK,
            packet.endpoint,
            valid=stored and endpoint is not None and endpoint.type is TransferType.BULK,
            length=packet.length,
            data=packet.data,
            stream_id=packet.stream_id,
        )

    def control(self, packet: p.ControlPacket, *, stored: bool = True) -> None:
        """On endpoint 0."""
        self._current.touched = True
        setup = Setup(packet.request_type, packet.request, packet.value, packet.index, packet.length)
        self._watch.requested(setup)
        self._requests.submit(
            packet.id,
            TransferType.CONTROL,
            packet.endpoint,
            valid=stored and not packet.endpoint & 0x0F,
            length=packet.length,
            data=packet.data,
            setup=setup,
        )

    def interrupt_out(self, packet: p.InterruptPacket, *, stored: bool = True) -> None:
        """One packet: interrupt IN is received without being asked for."""
        self._current.touched = True
        self._watch.used()
        endpoint = self._current.endpoints.get(packet.endpoint)
        self._requests.submit(
            packet.id,
            TransferType.INTERRUPT,
            packet.endpoint,
            valid=stored
            and endpoint is not None
            and endpoint.type is TransferType.INTERRUPT
            and len(packet.data) <= endpoint.max_packet_size,
            data=packet.data,
        )

    def oversized(self, event: Oversized) -> None:
        """A transfer whose body was too large to store: answered with an error, in its turn."""
        match event.packet:
            case p.BulkPacket():
                self.bulk(event.packet, stored=False)
            case p.ControlPacket():
                self.control(event.packet, stored=False)
            case p.InterruptPacket():
                self.interrupt_out(event.packet, stored=False)
