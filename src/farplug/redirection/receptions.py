"""Interrupt, isochronous and buffered bulk endpoints that are read all the time, without a request for each packet.

Source: usb-redirection-protocol.md, start/stop iso stream, interrupt receiving and bulk receiving. A reception
that ends without a stop packet of the guest is reported with the status STALL; another status reports an error of a
reception that continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from farplug.redirection.current_device import CurrentDevice
from farplug.redirection.figures import EndpointCounters
from farplug.redirection.port_protocol import PortProtocol
from farplug.usb.device import Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Endpoint, TransferType
from farplug.usbredir import packets

Stop: TypeAlias = packets.StopIsoStream | packets.StopInterruptReceiving | packets.StopBulkReceiving
Start: TypeAlias = packets.StartIsoStream | packets.StartInterruptReceiving | packets.StartBulkReceiving


class _Running:
    """A running reception. Its packets are numbered from 0."""

    __slots__ = ("next_id", "reception")

    def __init__(self, reception: Reception) -> None:
        self.reception = reception
        self.next_id = 0


class Receptions:
    """The running receptions.

    Args:
        protocol: sends the packets. While its port does not accept output isochronous packets are dropped, and others
            queued up to a bound.
        current: the device with its endpoints.
        figures: counts packets and bytes.
        max_transfer: the largest buffered bulk transfer, in bytes.
    """

    def __init__(
        self,
        protocol: PortProtocol,
        current: CurrentDevice,
        figures: EndpointCounters,
        max_transfer: int,
    ) -> None:
        self._protocol = protocol
        self._current = current
        self._send = protocol.send
        self._figures = figures
        self._max_transfer = max_transfer
        self._running: dict[int, _Running] = {}

    def start(self, packet: Start) -> None:
        """Start a reception for the guest, and send its status."""
        self._current.touched = True
        device, endpoint = self._current.usable, self._current.endpoints.get(packet.endpoint)
        reception = _reception(packet)
        if packet.endpoint in self._running:
            self._send_status(reception, Status.INVALID, packet.id)
        elif (
            device is None
            or endpoint is None
            or endpoint.type is not reception.type
            or not self._is_valid(reception, endpoint)
        ):
            self._send_status(reception, Status.STALL, packet.id)
        else:
            # The status is sent first: a device may have its first packet at once.
            self._running[packet.endpoint] = _Running(reception)
            self._send_status(reception, Status.SUCCESS, packet.id)
            try:
                status = device.start_receiving(reception)
            except Exception as error:
                self._protocol.fault(error)
                status = Status.STALL
            if status is not Status.SUCCESS:
                self.ended(packet.endpoint, Status.STALL)

    def stop(self, packet: Stop) -> None:
        """Stop a reception for the guest, and send success, also if no reception runs."""
        device = self._current.usable
        running = self._running.pop(packet.endpoint, None)
        if running is not None and device is not None:
            try:
                device.stop_receiving(packet.endpoint)
            except Exception as error:
                self._protocol.fault(error)
        self._send_status(_reception(packet), Status.SUCCESS, packet.id)

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        """Send a packet of the device, with its number, to the guest; return False if it was dropped."""
        running = self._running.get(endpoint)
        if running is None:
            return False
        counter, size = self._figures[endpoint], len(data)
        if self._protocol.writing_paused:
            admitted = self._protocol.admit(size)
            if not admitted or running.reception.type is TransferType.ISOCHRONOUS:
                counter.dropped += 1
                return False
        id, running.next_id = running.next_id, (running.next_id + 1) & 0xFFFFFFFF
        counter.count(status, size)
        match running.reception.type:
            case TransferType.ISOCHRONOUS:
                return self._send(packets.IsoPacket(id=id, endpoint=endpoint, status=status, length=size, data=data))
            case TransferType.INTERRUPT:
                return self._send(
                    packets.InterruptPacket(id=id, endpoint=endpoint, status=status, length=size, data=data)
                )
            case _:
                return self._send(
                    packets.BufferedBulkPacket(
                        id=id,
                        stream_id=running.reception.stream_id,
                        length=size,
                        endpoint=endpoint,
                        status=status,
                        data=data,
                    )
                )

    def ended(self, endpoint: int, status: Status) -> None:
        """Send the status of a reception that ended by itself (``STALL``), or continues after an error (any other)."""
        running = self._running.get(endpoint)
        if running is not None:
            if status is Status.STALL:
                del self._running[endpoint]
            self._send_status(running.reception, status, 0)

    def end_all(self) -> None:
        """End every reception because of a port reset, and send its status."""
        for endpoint in list(self._running):
            self.ended(endpoint, Status.STALL)

    def drop(self, endpoints: Mapping[int, Endpoint] | None = None) -> None:
        """End receptions (of ``endpoints``) without a status packet: the guest changed the configuration or setting."""
        for endpoint in list(self._running):
            if endpoints is None or endpoint in endpoints:
                del self._running[endpoint]

    def iso_out(self, packet: packets.IsoPacket) -> None:
        """Submit a packet of an isochronous OUT stream. It has no answer: if it fails it is lost, as on a USB cable."""
        device = self._current.usable
        if packet.endpoint not in self._running or device is None:
            return
        counter = self._figures[packet.endpoint]

        def counted(done: Transfer) -> None:
            assert done.status is not None
            counter.count(done.status, done.actual)

        try:
            device.submit(Transfer(TransferType.ISOCHRONOUS, packet.endpoint, counted, data=packet.data))
        except Exception as error:
            self._protocol.fault(error)

    def _is_valid(self, reception: Reception, endpoint: Endpoint) -> bool:
        match reception.type:
            case TransferType.ISOCHRONOUS:
                return 1 <= reception.packets_per_transfer <= 32 and 1 <= reception.transfers <= 16
            case TransferType.BULK:
                size = reception.bytes_per_transfer
                whole = size % max(1, endpoint.max_packet_size) == 0
                return 1 <= reception.transfers <= 16 and 0 < size <= self._max_transfer and whole
            case _:
                return True

    def _send_status(self, reception: Reception, status: Status, id: int) -> None:
        endpoint = reception.endpoint
        match reception.type:
            case TransferType.ISOCHRONOUS:
                self._send(packets.IsoStreamStatus(id=id, status=status, endpoint=endpoint))
            case TransferType.INTERRUPT:
                self._send(packets.InterruptReceivingStatus(id=id, status=status, endpoint=endpoint))
            case _:
                stream_id = reception.stream_id
                self._send(packets.BulkReceivingStatus(id=id, stream_id=stream_id, endpoint=endpoint, status=status))


def _reception(packet: Start | Stop) -> Reception:
    match packet:
        case packets.StartIsoStream():
            return Reception(
                packet.endpoint,
                TransferType.ISOCHRONOUS,
                transfers=packet.urbs,
                packets_per_transfer=packet.packets_per_urb,
            )
        case packets.StartBulkReceiving():
            return Reception(
                packet.endpoint,
                TransferType.BULK,
                transfers=packet.transfers,
                bytes_per_transfer=packet.bytes_per_transfer,
                stream_id=packet.stream_id,
            )
        case packets.StopBulkReceiving():
            return Reception(packet.endpoint, TransferType.BULK, stream_id=packet.stream_id)
        case packets.StopIsoStream():
            return Reception(packet.endpoint, TransferType.ISOCHRONOUS)
        case _:
            return Reception(packet.endpoint, TransferType.INTERRUPT)
