"""What the guest waits for: each request is answered exactly once, and in order on its endpoint.

QEMU aborts its VM when answers on one endpoint overtake each other (``usb_packet_complete_one`` in hw/usb/core.c), and
loses a transfer whose id was answered twice or never. So these two rules are kept here, whatever the device does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace

from farplug.redirection.conversation import Conversation
from farplug.redirection.current import Current
from farplug.redirection.figures import EndpointCounters
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Setup, TransferType
from farplug.usbredir import packets as p

MAX_TRANSFER = 16 * 2**20
"""Bytes that one transfer may carry or ask for; a larger one is answered with an error and its body is not stored."""
MAX_IN_FLIGHT = 64 * 2**20
"""Bytes that all pending transfers together may carry or ask for; one that would pass it is answered with an error."""


class Request(Transfer):
    """A transfer that the guest asked for by a packet id.

    Attributes:
        id: usbredir's id; free again once it is answered.
        queue: the requests on the same endpoint, oldest first; None where the order is free (bulk streams).
        abandoned: it was answered without the device: how the device ends it no longer counts.
    """

    __slots__ = ("abandoned", "id", "queue")

    def __init__(
        self,
        id: int,
        queue: deque[Request] | None,
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
        self.abandoned = False


class Ledger:
    """The requests that are not answered yet.

    Args:
        conversation: takes the answers.
        current: the device that answers; while there is none every request is answered with an I/O error.
        figures: where what moved is counted.
        max_transfer: bytes, see :data:`MAX_TRANSFER`.
    """

    def __init__(
        self,
        conversation: Conversation,
        current: Current,
        figures: EndpointCounters,
        max_transfer: int = MAX_TRANSFER,
    ) -> None:
        self._conversation = conversation
        self._current = current
        self._figures = figures
        self._send = conversation.send
        self._max_transfer = max_transfer
        self._requests: dict[int, Request] = {}
        self._queues: dict[int, deque[Request]] = {}
        self._in_flight = 0

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
        """Hand a request of the guest to the device.

        One that is not ``valid``, is too large, or reuses the id of a pending one is answered with an error, in turn.
        """
        queue = None
        if not stream_id:
            queue = self._queues.get(endpoint)
            if queue is None:
                queue = self._queue(endpoint)
        request = Request(
            id,
            queue,
            type,
            endpoint,
            self._completed,
            length=length,
            data=data,
            setup=setup,
            stream_id=stream_id,
        )
        size, device = request.length, self._current.device
        valid = self._requests.setdefault(id, request) is request and valid and size <= self._max_transfer
        if queue is not None:
            queue.append(request)
        self._conversation.pending += 1
        if device is None or not valid or self._in_flight + size > MAX_IN_FLIGHT:
            request.data, request.length = b"", 0  # it only waits for its turn: hold nothing
            request.complete(Status.INVALID if device is not None and not valid else Status.IO_ERROR)
            return
        self._in_flight += size
        try:
            device.submit(request)
        except Exception as error:
            self._conversation.fault(error)
            if request.status is None:
                request.complete(Status.STALL)

    def cancel(self, id: int) -> None:
        """The guest takes a request back: it is answered at once. An unknown id has its answer on the way."""
        request = self._requests.get(id)
        if request is None:
            return
        self._abandon(request)
        self._cancel_at_device(request)
        if request.queue is not None:
            self._answer_in_order(request.queue)

    def cancel_all(self, endpoints: Collection[int] | None = None) -> None:
        """Every pending request (of ``endpoints``) is answered as cancelled, in order, and taken from the device."""
        requests = [r for r in self._requests.values() if endpoints is None or r.endpoint in endpoints]
        for request in requests:
            self._abandon(request)
        for queue in self._queues.values():
            self._answer_in_order(queue)
        # The newest first: a queue must never serve a later transfer in the place of a cancelled one.
        for request in reversed(requests):
            self._cancel_at_device(request)

    def _queue(self, endpoint: int) -> deque[Request]:
        # Endpoint 0 has one queue for both of its directions, like the guest's.
        address = endpoint if endpoint & 0x0F else 0
        queue = self._queues.get(address)
        if queue is None:
            queue = self._queues[address] = deque()
        return queue

    def _cancel_at_device(self, request: Request) -> None:
        device = self._current.device
        if request.status is None and device is not None:
            try:
                device.cancel(request)
            except Exception as error:
                self._conversation.fault(error)

    def _completed(self, transfer: Transfer) -> None:
        assert isinstance(transfer, Request)
        if transfer.abandoned:
            return
        if transfer.queue is not None:
            self._answer_in_order(transfer.queue)
        else:
            assert transfer.status is not None
            self._answer(transfer, transfer.status, transfer.reply, transfer.actual)
        self._conversation.answered()

    def _answer_in_order(self, queue: deque[Request]) -> None:
        while queue and (status := queue[0].status) is not None:
            request = queue.popleft()
            self._answer(request, status, request.reply, request.actual)

    def _abandon(self, request: Request) -> None:
        request.abandoned = True
        if request.queue is not None:
            request.queue.remove(request)
        self._answer(request, Status.CANCELLED, b"", 0)

    def _answer(self, request: Request, status: Status, reply: Buffer, actual: int) -> None:
        """Say how a request ended; from here on its id is free."""
        id = request.id
        if self._requests.get(id) is request:
            del self._requests[id]
        self._in_flight -= request.length
        self._conversation.pending -= 1
        endpoint = request.endpoint
        self._figures[endpoint].count(status, actual)
        packet: p.DataPacket
        if request.type is TransferType.BULK:
            packet = p.BulkPacket(
                id=id, endpoint=endpoint, status=status, length=actual, data=reply, stream_id=request.stream_id
            )
        elif request.type is TransferType.CONTROL:
            setup = request.setup
            assert setup is not None
            packet = p.ControlPacket(
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
            packet = p.InterruptPacket(id=id, endpoint=endpoint, status=status, length=actual)
        if not self._send(packet):  # what the device gave cannot be said: an answer is due all the same
            self._send(replace(packet, status=Status.IO_ERROR, length=0, data=b""))
