"""What the guest has queued on an endpoint."""

from __future__ import annotations

from collections import deque

from farplug.usb.transfer import Transfer


class Pipe:
    """The transfers that wait on one endpoint, by stream; without streams all have the number 0."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Transfer]] = {}

    def put(self, transfer: Transfer) -> None:
        """Append one to its stream."""
        queue = self._waiting.get(transfer.stream_id)
        if queue is None:
            self._waiting[transfer.stream_id] = deque((transfer,))
        else:
            queue.append(transfer)

    def take(self, stream: int) -> Transfer | None:
        """The oldest of a stream; None if there is none."""
        queue = self._waiting.get(stream)
        if queue is None:
            return None
        transfer = queue.popleft()
        if not queue:
            del self._waiting[stream]
        return transfer

    def remove(self, transfer: Transfer, *, followers: bool = False) -> list[Transfer]:
        """Take this one out, and those behind it in its stream too if asked to. Returns what was taken out."""
        queue = self._waiting.get(transfer.stream_id)
        if queue is None or transfer not in queue:
            return []
        index = queue.index(transfer)
        removed = list(queue)[index:] if followers else [transfer]
        for one in removed:
            queue.remove(one)
        if not queue:
            del self._waiting[transfer.stream_id]
        return removed

    def clear(self) -> list[Transfer]:
        """Take all of them out."""
        waiting = [transfer for queue in self._waiting.values() for transfer in queue]
        self._waiting.clear()
        return waiting
