"""Queues of USB Attached SCSI: transfers that the guest has submitted, and IUs that wait for transfers."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

from farplug.usb.transfer import Status, Transfer

MAX_RESPONSES = 256
"""RESPONSE IUs that wait because the guest does not read them; further ones are dropped."""

Owner = TypeVar("Owner")


class Pipe:
    """The transfers that wait on one endpoint, by stream; without streams all have stream 0."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[int, OrderedDict[Transfer, None]] = {}

    def put(self, transfer: Transfer) -> None:
        """Append a transfer to its stream."""
        queue = self._waiting.get(transfer.stream_id)
        if queue is None:
            queue = self._waiting[transfer.stream_id] = OrderedDict()
        queue[transfer] = None

    def take(self, stream: int) -> Transfer | None:
        """Remove and return the oldest transfer of a stream; None if there is none."""
        queue = self._waiting.get(stream)
        if queue is None:
            return None
        transfer, _ = queue.popitem(last=False)
        if not queue:
            del self._waiting[stream]
        return transfer

    def remove(self, transfer: Transfer, *, followers: bool = False) -> list[Transfer]:
        """Remove a transfer, with ``followers`` also those behind it in its stream.

        Returns:
            The removed transfers, oldest first; none if the transfer does not wait here.
        """
        queue = self._waiting.get(transfer.stream_id)
        if queue is None or transfer not in queue:
            return []
        removed = []
        if followers:
            while (follower := queue.popitem()[0]) is not transfer:
                removed.append(follower)
            removed.append(transfer)
            removed.reverse()
        else:
            del queue[transfer]
            removed.append(transfer)
        if not queue:
            del self._waiting[transfer.stream_id]
        return removed

    def clear(self) -> list[Transfer]:
        """Remove and return all transfers."""
        waiting = [transfer for queue in self._waiting.values() for transfer in queue]
        self._waiting.clear()
        return waiting


class StatusPipe(Pipe, Generic[Owner]):
    """The status pipe. In each stream either transfers wait for information units, or IUs wait for transfers.

    Args:
        on_sent: called with the owner of an IU when the IU is sent.
    """

    __slots__ = ("_on_sent", "_queued", "_responses")

    def __init__(self, on_sent: Callable[[Owner], None]) -> None:
        super().__init__()
        self._on_sent = on_sent
        self._queued: dict[int, deque[tuple[bytes, Owner | None]]] = {}
        self._responses = 0
        """The number of queued IUs without an owner."""

    def read(self, transfer: Transfer) -> None:
        """Complete a transfer with the oldest IU of its stream, now or when there is one."""
        queued = self._queued.get(transfer.stream_id)
        if queued is None:
            self.put(transfer)
            return
        iu, owner = queued.popleft()
        if not queued:
            del self._queued[transfer.stream_id]
        if owner is None:
            self._responses -= 1
        self._complete(transfer, iu, owner)

    def send(self, stream: int, iu: bytes, owner: Owner | None) -> None:
        """Send an IU with the next transfer of a stream.

        The number of IUs of an owner is bounded by the owner; of IUs without one, those beyond
        :data:`MAX_RESPONSES` are dropped.
        """
        transfer = self.take(stream)
        if transfer is not None:
            self._complete(transfer, iu, owner)
            return
        if owner is None:
            if self._responses >= MAX_RESPONSES:
                return
            self._responses += 1
        self._queued.setdefault(stream, deque()).append((iu, owner))

    def discard(self, stream: int, owner: Owner) -> None:
        """Drop the queued IUs of an owner."""
        kept = deque(entry for entry in self._queued.pop(stream, ()) if entry[1] is not owner)
        if kept:
            self._queued[stream] = kept

    def clear(self) -> list[Transfer]:
        self._queued.clear()
        self._responses = 0
        return super().clear()

    def _complete(self, transfer: Transfer, iu: bytes, owner: Owner | None) -> None:
        if owner is not None:
            self._on_sent(owner)
        transfer.complete(Status.SUCCESS, iu)
