"""Control, bulk and interrupt transfers of an open device: asynchronous, each completed exactly once.

Source: libusb-1.0, "Asynchronous device I/O"; usb-redirection-protocol.md, control and bulk packets.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Final, Protocol, TypeAlias, cast

from farplug.libusb.binding import UsbHandle, UsbTransfer
from farplug.libusb.library import TRANSFER_NO_DEVICE, InvalidParameter, NoDevice, NoMemory, UsbError, transfer_status
from farplug.physical.gate import Gate
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, TransferType

CONTROL_TIMEOUT = 5.0
"""Seconds that a control transfer may take. Others have no timeout: a keyboard sends a key when one is pressed."""
MAX_PIECE: Final = 2**20
"""Bytes of one transfer of libusb. Linux has 16 MiB for all transfers of all programs."""
MIN_PIECE: Final = 16 * 2**10
"""A transfer waits if there is no memory for a piece of this size."""
MEMORY_PAUSE = 0.01
"""Seconds until a transfer that waits for memory is submitted again, if no other transfer completes before."""
MAX_IDLE: Final = 128
"""libusb's transfers that are kept to be used again."""
MAX_IDLE_BUFFER: Final = 64 * 2**10
"""Bytes of the largest buffer that an idle transfer of libusb keeps."""

ZEROED_BELOW: Final = 64 * 2**10
"""Larger buffers are not zeroed before the device fills them: on a slow processor that is 3 % of a sequential read.
Only bytes that the device wrote are ever read."""

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytearray.restype = ctypes.py_object

_Key: TypeAlias = tuple[int, int, TransferType]
"""Endpoint, bulk stream and type (alternate settings may differ in the type): transfers of one key keep their order."""


class Owner(Protocol):
    """The user data of each of libusb's transfers: it handles the completion."""

    def handle_completion(self, usb: UsbTransfer) -> None:
        """Handle the completion of a transfer. Called on the event loop."""


class _PendingTransfer:
    """A transfer that is not complete. A long one moves in pieces, one after the other.

    Attributes:
        blocks: libusb does not have all of the transfer yet, so the next ones of its key have to wait.
    """

    __slots__ = (
        "blocks",
        "buffer",
        "cancelled",
        "key",
        "length",
        "moved",
        "owner",
        "piece",
        "timed_out",
        "timer",
        "transfer",
        "usb",
    )

    def __init__(self, owner: Transfers, transfer: Transfer) -> None:
        self.owner = owner
        self.transfer = transfer
        endpoint = transfer.endpoint if transfer.endpoint & 0x0F else 0  # one queue for both directions of endpoint 0
        self.key = (endpoint, transfer.stream_id, transfer.type)
        self.length = transfer.length
        self.buffer = memoryview(_buffer(self.length) if transfer.endpoint & 0x80 else transfer.data)
        self.moved = 0
        self.piece = MAX_PIECE
        self.usb: UsbTransfer | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.blocks = self.cancelled = self.timed_out = False

    def handle_completion(self, usb: UsbTransfer) -> None:
        self.owner.handle_completion(self, usb)


class Transfers:
    """The transfers of an open device.

    Args:
        handle: libusb's.
        gate: while it is shut, nothing is submitted or cancelled.
        completed: the callback of libusb's transfers; it passes each to its :class:`Owner`.
        assign_stream: assigns one of libusb's bulk transfers to a bulk stream.
        set_buffer: sets the buffer of one of libusb's bulk or interrupt transfers.
        lost: called when the device was unplugged.
    """

    def __init__(
        self,
        handle: UsbHandle,
        gate: Gate,
        completed: Callable[[UsbTransfer], None],
        assign_stream: Callable[[UsbTransfer, int], None],
        set_buffer: Callable[[UsbTransfer, Buffer], None],
        lost: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._gate = gate
        self._completed = completed
        self._assign_stream = assign_stream
        self._set_buffer = set_buffer
        self._lost = lost
        self._pending: dict[Transfer, _PendingTransfer] = {}
        self._waiting: dict[_Key, deque[_PendingTransfer]] = {}
        """Transfers that wait for the gate, or for one that blocks their key."""
        self._blocked: set[_Key] = set()
        """Keys that a transfer blocks; at most one for each key."""
        self._out_of_memory: deque[_PendingTransfer] = deque()
        """Transfers that wait for memory."""
        self._retry_timer: asyncio.TimerHandle | None = None
        self._idle: dict[_Key, list[UsbTransfer]] = {}
        """libusb's completed transfers, to be used again for the same key."""
        self._idle_count = 0

    @property
    def in_flight(self) -> list[UsbTransfer]:
        """Return libusb's transfers that are not complete."""
        return [pending.usb for pending in self._pending.values() if pending.usb is not None]

    def submit(self, transfer: Transfer) -> None:
        """Submit a transfer. It is completed during the call or later."""
        pending = self._pending[transfer] = _PendingTransfer(self, transfer)
        if transfer.setup is not None:
            pending.timer = asyncio.get_running_loop().call_later(CONTROL_TIMEOUT, self._expire, pending)
        self._enqueue(pending)

    def cancel(self, transfer: Transfer) -> None:
        """Cancel a transfer. It is completed during the call if libusb has no piece of it, else when libusb is done."""
        pending = self._pending.get(transfer)
        if pending is not None:
            pending.cancelled = True
            self._end_early(pending)

    def cancel_all(self, endpoints: Collection[int] | None = None) -> None:
        """Cancel all transfers (of ``endpoints``), the newest first, so that none starts because another ended."""
        for pending in reversed(list(self._pending.values())):
            if pending.transfer in self._pending and (endpoints is None or pending.transfer.endpoint in endpoints):
                self.cancel(pending.transfer)

    def abandon(self, status: Status) -> list[UsbTransfer]:
        """Complete all transfers with a status, and ignore later completions of libusb.

        Returns:
            libusb's transfers that are still in flight.
        """
        in_flight = self.in_flight
        all_pending = list(self._pending.values())
        self._pending.clear()
        self._waiting.clear()
        self._blocked.clear()
        self._out_of_memory.clear()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        for pending in all_pending:
            if pending.timer is not None:
                pending.timer.cancel()
            pending.transfer.complete(status, actual=pending.moved)
        return in_flight

    # From submission to completion

    def _enqueue(self, pending: _PendingTransfer) -> None:
        """Start a transfer, or queue it behind the earlier ones of its key."""
        waiting = self._waiting.get(pending.key)
        if waiting is not None:
            waiting.append(pending)
        elif self._gate.shut:
            self._waiting[pending.key] = deque((pending,))
            self._resume(pending.key)
        else:
            if pending.length > MAX_PIECE:
                self._block(pending)
            self._start(pending)

    def _start(self, pending: _PendingTransfer, deferred: bool = False) -> None:
        """Submit a transfer, or its next piece, to libusb. ``deferred``: called by the gate."""
        if self._gate.shut and not deferred:
            self._gate.run_or_defer(pending, partial(self._start, pending, True))
            return
        usb = None
        try:
            pending.usb = usb = self._prepare(pending)
            usb.submit()
        except UsbError as raised:
            error = raised
        else:
            if pending.blocks and pending.moved + pending.piece >= pending.length:  # the last piece
                self._unblock(pending)
                self._resume(pending.key)
            return
        pending.usb = None
        if usb is not None:
            self._recycle(usb, pending, MAX_PIECE)
        if isinstance(error, NoMemory):
            self._block(pending)
            if min(pending.piece, pending.length - pending.moved) > MIN_PIECE and pending.transfer.setup is None:
                pending.piece //= 2
                self._start(pending, deferred)
            else:
                self._out_of_memory.append(pending)
                if self._retry_timer is None:
                    self._retry_timer = asyncio.get_running_loop().call_later(MEMORY_PAUSE, self._retry)
            return
        self._end(pending, Status.INVALID if isinstance(error, InvalidParameter) else Status.IO_ERROR)
        if isinstance(error, NoDevice):
            self._lost()

    def _prepare(self, pending: _PendingTransfer) -> UsbTransfer:
        """Return one of libusb's transfers, filled with a transfer or its next piece."""
        transfer = pending.transfer
        piece = (
            pending.buffer[pending.moved : pending.moved + pending.piece]
            if pending.length > pending.piece
            else pending.buffer
        )
        idle = self._idle.get(pending.key)
        if idle:
            usb = idle.pop()
            self._idle_count -= 1
            if transfer.setup is None:
                self._set_buffer(usb, piece)
                usb.setUserData(pending)
                return usb
        else:
            usb = self._handle.getTransfer()
        setup = transfer.setup
        if setup is not None:
            stage = pending.length if transfer.endpoint & 0x80 else bytes(transfer.data)
            usb.setControl(setup.request_type, setup.request, setup.value, setup.index, stage, self._completed, pending)
        elif transfer.type is TransferType.BULK:
            usb.setBulk(transfer.endpoint, b"", self._completed, pending)
            self._set_buffer(usb, piece)
            if transfer.stream_id:
                self._assign_stream(usb, transfer.stream_id)
        else:
            usb.setInterrupt(transfer.endpoint, b"", self._completed, pending)
            self._set_buffer(usb, piece)
        return usb

    def handle_completion(self, pending: _PendingTransfer, usb: UsbTransfer) -> None:
        """Handle the completion of a transfer, or of a piece of it."""
        if pending.usb is not usb or pending.transfer not in self._pending:
            return  # after abandon()
        pending.usb = None
        code, actual = usb.getStatus(), usb.getActualLength()
        setup = pending.transfer.setup
        if setup is not None and pending.transfer.endpoint & 0x80:
            pending.buffer = memoryview(usb.getBuffer())
        length = pending.length if setup is not None else min(pending.piece, pending.length - pending.moved)
        pending.moved += min(actual, length)
        self._recycle(usb, pending, length)
        status = transfer_status(code)
        if status is Status.SUCCESS and actual >= length and pending.moved < pending.length:
            if not pending.cancelled:
                self._start(pending)
                return
            status = Status.CANCELLED
        elif status is Status.CANCELLED and pending.timed_out:
            status = Status.TIMEOUT
        self._end(pending, status)
        # Linux reports the same for transfers that a new alternate setting ended: they were cancelled before.
        if code == TRANSFER_NO_DEVICE and not pending.cancelled:
            self._lost()
        elif self._out_of_memory:
            self._retry()

    def _end(self, pending: _PendingTransfer, status: Status) -> None:
        """Complete a transfer, then start those that it blocked."""
        transfer = pending.transfer
        del self._pending[transfer]
        if pending.timer is not None:
            pending.timer.cancel()
        if transfer.endpoint & 0x80:
            transfer.complete(status, pending.buffer[: pending.moved])
        else:
            transfer.complete(status, actual=pending.moved)
        if pending.blocks:
            self._unblock(pending)
            self._resume(pending.key)

    def _resume(self, key: _Key, deferred: bool = False) -> None:
        """Start the waiting transfers of a key, up to the next that blocks. ``deferred``: called by the gate."""
        if self._gate.shut and not deferred:
            self._gate.run_or_defer(key, partial(self._resume, key, True))
            return
        while key not in self._blocked and (waiting := self._waiting.get(key)) is not None:
            if not waiting:
                del self._waiting[key]
                return
            pending = waiting.popleft()
            if pending.length > MAX_PIECE:
                self._block(pending)
            self._start(pending, deferred)

    def _end_early(self, pending: _PendingTransfer) -> None:
        """Cancel a transfer: complete it now, unless libusb has a piece of it."""
        if pending.usb is not None:
            self._gate.run_or_defer(pending, partial(_cancel_pending, pending))
            return
        self._gate.discard(pending)
        for queue in (self._out_of_memory, self._waiting.get(pending.key, deque())):
            if pending in queue:
                queue.remove(pending)
        if self._gate.shut and not self._waiting.get(pending.key, True) and pending.key not in self._blocked:
            del self._waiting[pending.key]
            self._gate.discard(pending.key)
        self._end(pending, Status.TIMEOUT if pending.timed_out else Status.CANCELLED)

    def _expire(self, pending: _PendingTransfer) -> None:
        pending.timer = None
        pending.timed_out = True
        self._end_early(pending)

    # Memory

    def _block(self, pending: _PendingTransfer) -> None:
        pending.blocks = True
        self._blocked.add(pending.key)
        self._waiting.setdefault(pending.key, deque())

    def _unblock(self, pending: _PendingTransfer) -> None:
        pending.blocks = False
        self._blocked.remove(pending.key)

    def _retry(self) -> None:
        """Submit the transfers that wait for memory: another transfer completed, or time has passed."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        for _ in range(len(self._out_of_memory)):
            if self._out_of_memory:  # a completion may have cancelled the rest
                self._start(self._out_of_memory.popleft())

    def _recycle(self, usb: UsbTransfer, pending: _PendingTransfer, length: int) -> None:
        if self._idle_count >= MAX_IDLE:
            usb.close()
            return
        if pending.transfer.setup is None and length > MAX_IDLE_BUFFER:
            self._set_buffer(usb, b"")
        self._idle.setdefault(pending.key, []).append(usb)
        self._idle_count += 1


def _buffer(length: int) -> bytearray:
    """Return a buffer for a device to fill."""
    return bytearray(length) if length < ZEROED_BELOW else cast(bytearray, _new_bytearray(None, length))


def _cancel_pending(pending: _PendingTransfer) -> None:
    if pending.usb is not None:  # else it is complete, and may be in use for another transfer
        cancel(pending.usb)


def cancel(usb: UsbTransfer) -> None:
    """Cancel one of libusb's transfers, which completes it."""
    try:
        usb.cancel()
    except UsbError:
        pass  # it is complete, and about to be handled
