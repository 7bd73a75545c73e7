"""The guest's pending requests: answer each exactly once, and in order on its endpoint.

QEMU aborts its VM when answers on one endpoint are out of order (``usb_packet_complete_one`` in hw/usb/core.c), and
loses a transfer whose id is answered twice or never. This module enforces both rules, whatever the device does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TypeAlias

from farplug.redirection.current_device import CurrentDevice
from farplug.redirection.figures import EndpointCounters
from farplug.redirection.port_protocol import PortProtocol
from farplug.usb.share import Memory
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Setup, TransferType
from farplug.usbredir import packets

MAX_TRANSFER = 16 * 2**20
"""Bytes that one transfer may carry or request; a larger one is answered with an error, its payload is not stored."""


class Request(Transfer):
    """A transfer that the guest requested by a packet.

    Attributes:
        id: the packet's id; the guest may reuse it after the answer.
        queue: the requests on the same endpoint, oldest first; None on bulk streams, where any order is allowed.
        memory: where the bytes of the request are counted, until it is answered and the device has released it.
        size: these bytes.
        abandoned: whether the request was answered before the device completed it: the completion is ignored.
    """

    __slots__ = ("abandoned", "id", "memory", "queue", "size")

    def __init__(
        self,
        id: int,
        queue: _Queue | None,
        memory: Memory,
        type: TransferType,
        endpoint: int,
        on_complete: Callable[[Transfer], None],
        *,
        length: int,
        data: Buffer,
        setup: Setup | None,
        stream_id: int,
    ) -> None:
        Transfer.__init__(self, type, endpoint, on_complete, length=length, data=data, setup=setup, stream_id=stream_id)
        self.id = id
        self.queue = queue
        self.memory = memory
        self.size = 0
        self.holders = 1  # the engine
        self.abandoned = False

    def release(self) -> None:
        self.holders -= 1
        if not self.holders:
            self.memory.used -= self.size


_Queue: TypeAlias = OrderedDict[Request, None]


class PendingRequests:
    """The requests that are not answered yet, by id.

    Args:
        protocol: sends the answers.
        current: the device that gets the transfers; while there is none every request is answered with an I/O error.
        figures: counts transfers and bytes.
        max_transfer: bytes, see :data:`MAX_TRANSFER`.
    """

    def __init__(
        self,
        protocol: PortProtocol,
        current: CurrentDevice,
        figures: EndpointCounters,
        max_transfer: int = MAX_TRANSFER,
    ) -> None:
        self._protocol = protocol
        self._current = current
        self._figures = figures
        self._send = protocol.send
        self._max_transfer = max_transfer
        self._by_id: dict[int, Request] = {}
        self._queues: dict[int, _Queue] = {}
        self._memory = protocol.share.memory

    def submit(
        self,
        id: int,
        type: TransferType,
        endpoint: int,
        *,
        valid: bool,
        length: int = 0,
        data: Buffer = b"",
        setup: Setup | None = None,
        stream_id: int = 0,
    ) -> None:
        """Submit a request of the guest to the device.

        A request that is not ``valid``, is too large, or has the id of a pending request is answered with an error, in
        order on its endpoint.
        """
        queue = None
        if not stream_id:
            queue = self._queues.get(endpoint)
            if queue is None:
                queue = self._queue(endpoint)
        request = Request(
            id,
            queue,
            self._memory,
            type,
            endpoint,
            self._completed,
            length=length,
            data=data,
            setup=setup,
            stream_id=stream_id,
        )
        size, device, memory = request.length, self._current.device, self._memory
        valid = self._by_id.setdefault(id, request) is request and valid and size <= self._max_transfer
        if queue is not None:
            queue[request] = None
        self._protocol.pending += 1
        if device is None or not valid or memory.used + size > memory.limit:
            request.data, request.length = b"", 0  # the error waits for its turn: hold no memory
            request.complete(Status.INVALID if device is not None and not valid else Status.IO_ERROR)
            return
        request.size = size
        memory.used += size
        try:
            device.submit(request)
        except Exception as error:
            self._protocol.fault(error)
            if request.status is None:
                request.complete(Status.STALL)

    def cancel(self, id: int) -> None:
        """Cancel a request for the guest, and answer it at once. A request with an unknown id was already answered."""
        request = self._by_id.get(id)
        if request is None:
            return
        self._abandon(request)
        self._cancel_at_device(request)
        if request.queue is not None:
            self._answer_in_order(request.queue)

    def cancel_all(self, endpoints: Collection[int] | None = None) -> None:
        """Answer every pending request (of ``endpoints``) as cancelled, in order, and cancel it at the device."""
        requests = [r for r in self._by_id.values() if endpoints is None or r.endpoint in endpoints]
        for request in requests:
            self._abandon(request)
        for queue in self._queues.values():
            self._answer_in_order(queue)
        # The newest first: a device must not begin a later transfer in place of a cancelled one.
        for request in reversed(requests):
            self._cancel_at_device(request)

    def _queue(self, endpoint: int) -> _Queue:
        # Endpoint 0 has one queue for both of its directions, as in QEMU.
        address = endpoint if endpoint & 0x0F else 0
        queue = self._queues.get(address)
        if queue is None:
            queue = self._queues[address] = OrderedDict()
        return queue

    def _cancel_at_device(self, request: Request) -> None:
        device = self._current.device
        if request.status is None and device is not None:
            try:
                device.cancel(request)
            except Exception as error:
                self._protocol.fault(error)

    def _completed(self, transfer: Transfer) -> None:
        assert isinstance(transfer, Request)
        if transfer.abandoned:
            return
        if transfer.queue is not None:
            self._answer_in_order(transfer.queue)
        else:
            assert transfer.status is not None
            self._answer(transfer, transfer.status, transfer.reply, transfer.actual)
        protocol = self._protocol
        protocol.schedule_flush(last=not protocol.pending)

    def _answer_in_order(self, queue: _Queue) -> None:
        while queue:
            request = next(iter(queue))
            status = request.status
            if status is None:
                return
            del queue[request]
            self._answer(request, status, request.reply, request.actual)

    def _abandon(self, request: Request) -> None:
        request.abandoned = True
        if request.queue is not None:
            del request.queue[request]
        self._answer(request, Status.CANCELLED, b"", 0)

    def _answer(self, request: Request, status: Status, reply: Buffer, actual: int) -> None:
        """Send the answer to a request; the guest may reuse its id from now on."""
        id = request.id
        if self._by_id.get(id) is request:
            del self._by_id[id]
        request.release()
        self._protocol.pending -= 1
        endpoint = request.endpoint
        self._figures[endpoint].count(status, actual)
        packet: packets.DataPacket
        if request.type is TransferType.BULK:
            packet = packets.BulkPacket(
                id=id, endpoint=endpoint, status=status, length=actual, data=reply, stream_id=request.stream_id
            )
        elif request.type is TransferType.CONTROL:
            setup = request.setup
            assert setup is not None
            packet = packets.ControlPacket(
                id=id,
                endpoint=endpoint,
                request=setup.request,
                request_type=setup.request_type,
                status=status,
                value=setup.value,
                index=setup.index,
                length=actual,
                data=reply,
            )
        else:
            packet = packets.InterruptPacket(id=id, endpoint=endpoint, status=status, length=actual)
        if not self._send(packet):  # the reply cannot be encoded: send an I/O error instead
            packet.status, packet.length, packet.data = Status.IO_ERROR, 0, b""
            self._send(packet)
