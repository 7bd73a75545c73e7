"""Bulk, control and interrupt OUT packets: check them, and submit the transfers that they request."""

from __future__ import annotations

from farplug.redirection.current_device import CurrentDevice
from farplug.redirection.offers import OfferWatch
from farplug.redirection.pending_requests import PendingRequests
from farplug.usb.types import Setup, TransferType
from farplug.usbredir import packets
from farplug.usbredir.protocol import Oversized


class Transfers:
    """Handles the packets that request a transfer.

    Args:
        current: the device with its endpoints.
        requests: submits the transfers, and answers the packets.
        watch: is notified of the guest's use of the device.
    """

    def __init__(self, current: CurrentDevice, requests: PendingRequests, watch: OfferWatch) -> None:
        self._current = current
        self._requests = requests
        self._watch = watch

    def bulk(self, packet: packets.BulkPacket, *, stored: bool = True) -> None:
        """Submit a transfer on a bulk endpoint, IN or OUT, or on a bulk stream if there is a stream id."""
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

    def control(self, packet: packets.ControlPacket, *, stored: bool = True) -> None:
        """Submit a control transfer on endpoint 0."""
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

    def interrupt_out(self, packet: packets.InterruptPacket, *, stored: bool = True) -> None:
        """Submit one packet on an interrupt OUT endpoint. Interrupt IN packets come from a reception instead."""
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
        """Answer a transfer whose payload was too large to store with an error, in order on its endpoint."""
        match event.packet:
            case packets.BulkPacket():
                self.bulk(event.packet, stored=False)
            case packets.ControlPacket():
                self.control(event.packet, stored=False)
            case packets.InterruptPacket():
                self.interrupt_out(event.packet, stored=False)
