"""Transfers of a device that is open: control, bulk, interrupt. Asynchronous, each completed exactly once.

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
from farplug.usb.types import TransferType

CONTROL_TIMEOUT = 5.0
"""Seconds that a control transfer may take. Others may take for ever: a key is pressed when somebody presses it."""
MAX_PIECE: Final = 2**20
"""Bytes that are given to libusb at once. Linux has 16 MiB for all transfers of all programs."""
MIN_PIECE: Final = 16 * 2**10
"""If there is no memory for this much either, a transfer waits until there is."""
MEMORY_PAUSE = 0.01
"""Seconds until a transfer that found no memory tries again, if none comes back before."""
MAX_IDLE: Final = 128
"""libusb's transfers that are kept to be used again."""
MAX_IDLE_BUFFER: Final = 64 * 2**10
"""An idle one does not keep a larger buffer."""

ZEROED_BELOW: Final = 64 * 2**10
"""A larger buffer is not zeroed before the device fills it: on a slow processor that is 3 % of a sequential read. Only
what the device wrote is ever read."""

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytearray.restype = ctypes.py_object

_Key: TypeAlias = tuple[int, int, TransferType]
"""An endpoint, a stream and a type: what is submitted there moves in this order. Settings may differ in the type."""


class Owner(Protocol):
    """The user data of each of libusb's transfers: whom it comes back to."""

    def came_back(self, usb: UsbTransfer) -> None:
        """It is not in flight any more. Called on the event loop."""


class _Job:
    """A transfer under way. A long one moves in pieces, one after the other.

    Attributes:
        blocks: it is not wholly at libusb: what comes after it on its endpoint has to wait.
    """

    __slots__ = (
        *("owner", "transfer", "key", "length", "buffer", "moved", "piece", "usb", "timer"),
        *("blocks", "cancelled", "timed_out"),
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

    def came_back(self, usb: UsbTransfer) -> None:
        self.owner.came_back(self, usb)


class Transfers:
    """The transfers of an open device.

    Args:
        handle: libusb's.
        gate: while it is shut, nothing is said to libusb.
        completed: the callback of libusb's transfers; it brings each to its :class:`Owner`.
        assign_stream: makes a bulk transfer of libusb's one of a stream.
        lost: called when the device turns out to be gone.
    """

    def __init__(
        self,
        handle: UsbHandle,
        gate: Gate,
        completed: Callable[[UsbTransfer], None],
        assign_stream: Callable[[UsbTransfer, int], None],
        lost: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._gate = gate
        self._completed = completed
        self._assign_stream = assign_stream
        self._lost = lost
        self._jobs: dict[Transfer, _Job] = {}
        self._waiting: dict[_Key, deque[_Job]] = {}
        """What waits behind a job that blocks its endpoint, or for the gate."""
        self._blocked: set[_Key] = set()
        """Where a job blocks: one at most, also while a queue is being worked off."""
        self._hungry: deque[_Job] = deque()
        """Jobs that found no memory."""
        self._hunger: asyncio.TimerHandle | None = None
        self._idle: dict[_Key, list[UsbTransfer]] = {}
        """libusb's transfers that came back, by where they were used: they go there again."""
        self._idle_count = 0

    @property
    def in_flight(self) -> list[UsbTransfer]:
        """libusb's transfers that are not back yet."""
        return [job.usb for job in self._jobs.values() if job.usb is not None]

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer: it is completed now or later."""
        job = self._jobs[transfer] = _Job(self, transfer)
        if transfer.setup is not None:
            job.timer = asyncio.get_running_loop().call_later(CONTROL_TIMEOUT, self._expire, job)
        self._admit(job)

    def cancel(self, transfer: Transfer) -> None:
        """Complete a transfer soon; at once, if nothing of it is at the device."""
        job = self._jobs.get(transfer)
        if job is not None:
            job.cancelled = True
            self._take_back(job)

    def cancel_all(self, endpoints: Collection[int] | None = None) -> None:
        """Cancel all transfers (of ``endpoints``), the newest first: none goes on in the place of another."""
        for job in reversed(list(self._jobs.values())):
            if job.transfer in self._jobs and (endpoints is None or job.transfer.endpoint in endpoints):
                self.cancel(job.transfer)

    def abandon(self, status: Status) -> list[UsbTransfer]:
        """Complete all transfers at once: what comes back later belongs to nobody.

        Returns:
            what is still in flight.
        """
        in_flight = self.in_flight
        jobs = list(self._jobs.values())
        self._jobs.clear()
        self._waiting.clear()
        self._blocked.clear()
        self._hungry.clear()
        if self._hunger is not None:
            self._hunger.cancel()
        for job in jobs:
            if job.timer is not None:
                job.timer.cancel()
            job.transfer.complete(status, actual=job.moved)
        return in_flight

    # The way of a job

    def _admit(self, job: _Job) -> None:
        """Let a job come behind those before it on its endpoint."""
        waiting = self._waiting.get(job.key)
        if waiting is not None:
            waiting.append(job)
        elif self._gate.shut:
            self._waiting[job.key] = deque((job,))
            self._resume(job.key)
        else:
            if job.length > MAX_PIECE:
                self._block(job)
            self._start(job)

    def _start(self, job: _Job, held: bool = False) -> None:
        """Give a job, or its next piece, to libusb; ``held``: the gate opens for it."""
        if self._gate.shut and not held:
            self._gate.when_open(job, partial(self._start, job, True))
            return
        usb = None
        try:
            job.usb = usb = self._filled(job)
            usb.submit()
        except UsbError as raised:
            error = raised
        else:
            if job.blocks and job.moved + job.piece >= job.length:  # that was the last of it
                self._unblock(job)
                self._resume(job.key)
            return
        job.usb = None
        if usb is not None:
            self._recycle(usb, job, MAX_PIECE)
        if isinstance(error, NoMemory):
            self._block(job)
            if min(job.piece, job.length - job.moved) > MIN_PIECE and job.transfer.setup is None:
                job.piece //= 2
                self._start(job, held)
            else:
                self._hungry.append(job)
                if self._hunger is None:
                    self._hunger = asyncio.get_running_loop().call_later(MEMORY_PAUSE, self._feed)
            return
        self._end(job, Status.INVALID if isinstance(error, InvalidParameter) else Status.IO_ERROR)
        if isinstance(error, NoDevice):
            self._lost()

    def _filled(self, job: _Job) -> UsbTransfer:
        """A transfer of libusb's for a job, or for its next piece."""
        transfer = job.transfer
        piece = job.buffer[job.moved : job.moved + job.piece] if job.length > job.piece else job.buffer
        idle = self._idle.get(job.key)
        if idle:
            usb = idle.pop()
            self._idle_count -= 1
            if transfer.setup is None:
                usb.setBuffer(piece)
                usb.setUserData(job)
                return usb
        else:
            usb = self._handle.getTransfer()
        setup = transfer.setup
        if setup is not None:
            stage = job.length if transfer.endpoint & 0x80 else bytes(transfer.data)
            usb.setControl(setup.request_type, setup.request, setup.value, setup.index, stage, self._completed, job)
        elif transfer.type is TransferType.BULK:
            usb.setBulk(transfer.endpoint, piece, self._completed, job)
            if transfer.stream_id:
                self._assign_stream(usb, transfer.stream_id)
        else:
            usb.setInterrupt(transfer.endpoint, piece, self._completed, job)
        return usb

    def came_back(self, job: _Job, usb: UsbTransfer) -> None:
        """libusb is done with a job, or with a piece of it."""
        if job.usb is not usb or job.transfer not in self._jobs:
            return  # it was abandoned
        job.usb = None
        code, actual = usb.getStatus(), usb.getActualLength()
        setup = job.transfer.setup
        if setup is not None and job.transfer.endpoint & 0x80:
            job.buffer = memoryview(usb.getBuffer())
        length = job.length if setup is not None else min(job.piece, job.length - job.moved)
        job.moved += min(actual, length)
        self._recycle(usb, job, length)
        status = transfer_status(code)
        if status is Status.SUCCESS and actual >= length and job.moved < job.length:
            if not job.cancelled:
                self._start(job)
                return
            status = Status.CANCELLED
        elif status is Status.CANCELLED and job.timed_out:
            status = Status.TIMEOUT
        self._end(job, status)
        if code == TRANSFER_NO_DEVICE and not job.cancelled:  # Linux says so also of what a new setting has ended
            self._lost()
        elif self._hungry:
            self._feed()

    def _end(self, job: _Job, status: Status) -> None:
        """Complete a job's transfer, then let those behind it go on."""
        transfer = job.transfer
        del self._jobs[transfer]
        if job.timer is not None:
            job.timer.cancel()
        if transfer.endpoint & 0x80:
            transfer.complete(status, job.buffer[: job.moved])
        else:
            transfer.complete(status, actual=job.moved)
        if job.blocks:
            self._unblock(job)
            self._resume(job.key)

    def _resume(self, key: _Key, held: bool = False) -> None:
        """What waited goes on, up to the next job that blocks; ``held``: the gate opens for it."""
        if self._gate.shut and not held:
            self._gate.when_open(key, partial(self._resume, key, True))
            return
        while key not in self._blocked and (waiting := self._waiting.get(key)) is not None:
            if not waiting:
                del self._waiting[key]
                return
            job = waiting.popleft()
            if job.length > MAX_PIECE:
                self._block(job)
            self._start(job, held)

    def _take_back(self, job: _Job) -> None:
        """End a job early: at once, unless something of it is at the device."""
        if job.usb is not None:
            self._gate.when_open(job, partial(_cancel_job, job))
            return
        self._gate.forget(job)
        for queue in (self._hungry, self._waiting.get(job.key, deque())):
            if job in queue:
                queue.remove(job)
        if self._gate.shut and not self._waiting.get(job.key, True) and job.key not in self._blocked:
            del self._waiting[job.key]
            self._gate.forget(job.key)
        self._end(job, Status.TIMEOUT if job.timed_out else Status.CANCELLED)

    def _expire(self, job: _Job) -> None:
        job.timer = None
        job.timed_out = True
        self._take_back(job)

    # Memory

    def _block(self, job: _Job) -> None:
        job.blocks = True
        self._blocked.add(job.key)
        self._waiting.setdefault(job.key, deque())

    def _unblock(self, job: _Job) -> None:
        job.blocks = False
        self._blocked.remove(job.key)

    def _feed(self) -> None:
        """Something came back, or time has passed: there may be memory."""
        if self._hunger is not None:
            self._hunger.cancel()
            self._hunger = None
        for _ in range(len(self._hungry)):
            if self._hungry:  # an answer may have had the others cancelled
                self._start(self._hungry.popleft())

    def _recycle(self, usb: UsbTransfer, job: _Job, length: int) -> None:
        if self._idle_count >= MAX_IDLE:
            usb.close()
            return
        if job.transfer.setup is None and length > MAX_IDLE_BUFFER:
            usb.setBuffer(bytearray())
        self._idle.setdefault(job.key, []).append(usb)
        self._idle_count += 1


def _buffer(length: int) -> bytearray:
    """Room for what a device sends."""
    return bytearray(length) if length < ZEROED_BELOW else cast(bytearray, _new_bytearray(None, length))


def _cancel_job(job: _Job) -> None:
    if job.usb is not None:  # else it came back meanwhile, and may be another job's now
        cancel(job.usb)


def cancel(usb: UsbTransfer) -> None:
    """Cancel one of libusb's transfers; it comes back all the same."""
    try:
        usb.cancel()
    except UsbError:
        pass  # it is on its way back
