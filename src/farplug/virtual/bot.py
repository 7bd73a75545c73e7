"""Bulk-Only Transport: SCSI commands over two bulk endpoints (USB Mass Storage Class, Bulk-Only Transport 1.0).

A command has three phases: the command block wrapper (CBW, OUT), the data, the command status wrapper (CSW, IN). The
guest may submit transfers before they can be completed: each endpoint has a queue, and the phase determines which queue
is served next. Real hardware answers a transfer that waits here with NAK.

What the host expects (H, from the CBW) and what the device does (D) combine in thirteen cases (chapter 6.7). No case
stalls: short data is padded with zeros or ended by a short transfer, surplus data is received and dropped. Firmware
cannot recover from stalls, and QEMU's own disk, which every system supports, never stalls either. Only an invalid CBW
halts both endpoints, until a Bulk-Only Mass Storage Reset (chapter 6.6.1).
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import IntEnum, auto
from functools import partial

from farplug.scsi.sense import ABORTED_COMMAND
from farplug.usb.share import NO_PORT, Memory
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Direction, Setup
from farplug.virtual.function import FunctionHost
from farplug.virtual.task import Task
from farplug.virtual.unit import LogicalUnit, absent_unit

log = logging.getLogger(__name__)

CBW_SIGNATURE = 0x43425355
CBW = struct.Struct("<IIIBBB16s")
"""dCBWSignature, dCBWTag, dCBWDataTransferLength, bmCBWFlags, bCBWLUN, bCBWCBLength, CBWCB"""

CSW_SIGNATURE = 0x53425355
CSW = struct.Struct("<IIIB")
"""dCSWSignature, dCSWTag, dCSWDataResidue, bCSWStatus"""

GET_MAX_LUN = Setup(0xA1, 0xFE, 0, 0, 1)
BULK_ONLY_RESET = Setup(0x21, 0xFF, 0, 0, 0)

MAX_PADDING = 64 * 1024
"""Short data is padded up to this expected length; above it, a short transfer ends the data. SeaBIOS on xHCI treats a
short transfer as a failed one, and never expects more than this."""

MIN_PREFETCH, MAX_PREFETCH = 32 << 10, 1 << 20
"""A READ of this size is read ahead as soon as its CBW is completed, while the guest prepares the data transfer. A
smaller one is not worth an iteration of the event loop."""

MAX_UNWRITTEN = 4 << 20
"""Bytes passed to the store and not yet written; further OUT transfers wait in the queue, not completed."""

MAX_UNREAD = 16 << 20
"""Bytes of reads in flight whose transfers or commands are gone; above it, further reads wait."""

MAX_QUEUED = 32 << 20
"""Bytes of OUT transfers that wait in the queue; further ones fail with an I/O error."""


class CswStatus(IntEnum):
    """bCSWStatus (table 5.3)."""

    PASSED = 0
    FAILED = 1
    PHASE_ERROR = 2


class _Phase(IntEnum):
    """The next phase."""

    COMMAND = auto()
    DATA_IN = auto()
    DATA_OUT = auto()
    STATUS = auto()


class _Command:
    """A command from its CBW to its CSW.

    Attributes:
        tag: dCBWTag.
        length: H, the bytes that the host expects to move.
        unit: the logical unit of the command.
        task: executes the command.
        moved: how much of H has moved, padding included.
        size: how much of H the task moves; the rest is padding (IN), or dropped (OUT).
        performed: the task was started. False if the host expects the other direction, or too little data-out.
        fetching: whether data-in is being read ahead.
        pad: whether to fill short data with zeros.
        phase_error: the host expects the other direction, or less data than the command moves.
    """

    __slots__ = ("fetching", "length", "moved", "pad", "performed", "phase_error", "size", "tag", "task", "unit")

    def __init__(self, tag: int, length: int, unit: LogicalUnit, task: Task) -> None:
        self.tag = tag
        self.length = length
        self.unit = unit
        self.task = task
        self.moved = 0
        self.size = 0
        self.performed = True
        self.fetching = False
        self.pad = length <= MAX_PADDING
        self.phase_error = False


class BulkOnly:
    """The state machine of one Bulk-Only interface.

    Args:
        units: the logical units, by number.
        endpoint_in: the function's own address of the bulk IN endpoint.
        endpoint_out: the function's own address of the bulk OUT endpoint.

    Attributes:
        share: what the guest may use.
    """

    def __init__(self, units: Sequence[LogicalUnit], endpoint_in: int, endpoint_out: int) -> None:
        self.share = NO_PORT
        self._units = units
        self._absent = absent_unit(len(units))
        self._endpoint_in = endpoint_in
        self._endpoint_out = endpoint_out
        self._host: FunctionHost | None = None
        self._in: OrderedDict[Transfer, None] = OrderedDict()
        self._out: OrderedDict[Transfer, int] = OrderedDict()
        """OUT transfers, numbered in their order: a number that is missing shows that the transfer was lost."""
        self._next_number = 0
        """The number of the next transfer that arrives."""
        self._expected_number = 0
        """The number of the next transfer to take from the queue, unless it was lost."""
        self._queued = 0
        self._unwritten = 0
        self._unread = 0
        self._phase = _Phase.COMMAND
        self._command: _Command | None = None
        self._reading: Transfer | None = None
        self._wedged = False
        self._advancing = False
        self._steps: dict[_Phase, Callable[[], bool]] = {
            _Phase.COMMAND: self._receive_command,
            _Phase.DATA_IN: self._send_data,
            _Phase.DATA_OUT: self._receive_data,
            _Phase.STATUS: self._send_status,
        }

    def bind(self, host: FunctionHost) -> None:
        """Set the host, which can halt the endpoints."""
        self._host = host

    def control(self, transfer: Transfer) -> bool:
        """Complete a class request (chapter 3). Returns False for other requests and wrong fields: they stall."""
        if transfer.setup == GET_MAX_LUN:
            transfer.complete(reply=bytes((len(self._units) - 1,)))
        elif transfer.setup == BULK_ONLY_RESET:
            self._bulk_only_reset()
            transfer.complete()
        else:
            return False
        return True

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer on one of the two endpoints."""
        if transfer.endpoint & 0x80:
            self._in[transfer] = None
        elif self._queued + transfer.length > MAX_QUEUED:
            self._next_number += 1
            transfer.complete(Status.IO_ERROR)
        else:
            self._queued += transfer.length
            self._out[transfer] = self._next_number
            self._next_number += 1
        self._advance()

    def cancel(self, transfer: Transfer) -> None:
        """Complete a pending transfer as cancelled. None of its data has moved: the next transfer moves that data.

        If later OUT transfers are queued, their data must not move in its place: their command fails.
        """
        if transfer is self._reading:
            self._reading = None
        elif transfer in self._in:
            del self._in[transfer]
        elif transfer in self._out:
            latest = next(reversed(self._out)) is transfer
            del self._out[transfer]
            self._queued -= transfer.length
            if latest:
                self._next_number = self._out[next(reversed(self._out))] + 1 if self._out else self._expected_number
        else:
            return
        transfer.complete(Status.CANCELLED)
        self._advance()

    def _data_out_lost(self) -> None:
        """Fail the command, because part of its data-out is missing: later data would be written in its place."""
        command = self._command
        if self._phase is _Phase.DATA_OUT and command is not None:
            command.size = min(command.size, command.moved)
            command.task.fail(ABORTED_COMMAND)

    def _bulk_only_reset(self) -> None:
        """Wait for a CBW again (chapter 3.1). Halts stay until the guest clears them; IN transfers stay queued."""
        self._wedged = False
        self._drop_command()
        for transfer in self._clear_out():
            transfer.complete()

    def halt_cleared(self, endpoint: int) -> None:
        """Halt again if there was no reset after an invalid CBW (chapter 6.6.1: endpoints stay halted until then)."""
        if self._wedged:
            self._halt(endpoint)

    def reset(self) -> None:
        """Cancel all transfers and abort the command. Writes in flight go on: the store keeps their order."""
        self._wedged = False
        self._drop_command()
        pending = [*self._in, *self._clear_out()]
        self._in.clear()
        for transfer in pending:
            transfer.complete(Status.CANCELLED)

    def _clear_out(self) -> list[Transfer]:
        """Remove and return the queued OUT transfers."""
        removed = list(self._out)
        self._out.clear()
        self._queued = 0
        self._expected_number = self._next_number
        return removed

    def _drop_command(self) -> None:
        self._phase = _Phase.COMMAND
        if self._command is not None:
            self._command.task.abort()
        self._command = None
        if self._reading is not None:
            self._in[self._reading] = None
            self._in.move_to_end(self._reading, last=False)
            self._reading = None

    def _advance(self) -> None:
        """Run steps until one has to wait, or the work of this turn of the event loop is done.

        Transfers that completions submit meanwhile go to the queues.
        """
        if self._advancing:
            return
        turn = self.share.turn
        self._advancing = True
        try:
            while turn.left > 0:
                if not self._steps[self._phase]():
                    return
            turn.call_next(self._advance)
        finally:
            self._advancing = False

    # Steps: each serves one transfer, or returns False if it has to wait.

    def _receive_command(self) -> bool:
        if not self._out:
            return False
        transfer = self._next_out()
        if transfer.length != CBW.size:
            return self._wedge(transfer, f"{transfer.length} bytes")
        signature, tag, length, flags, lun, cdb_length, cdb = CBW.unpack(transfer.data)
        if signature != CBW_SIGNATURE:
            return self._wedge(transfer, f"the signature {signature:08x}")
        lun &= 0x0F
        unit = self._units[lun] if lun < len(self._units) else self._absent
        task = Task(unit, cdb[: cdb_length & 0x1F], self._advance)
        command = self._command = _Command(tag, length, unit, task)
        self._match(command, Direction(flags & Direction.IN))
        if not length:
            self._phase = _Phase.STATUS
        else:
            self._phase = _Phase.DATA_IN if flags & Direction.IN else _Phase.DATA_OUT
        transfer.complete()
        if self._command is command and command.performed:
            task.start()
            if task.reads_store and not task.busy and MIN_PREFETCH <= command.size <= MAX_PREFETCH:
                # Later, because the completion of the CBW is sent first.
                asyncio.get_running_loop().call_soon(self._prefetch, command)
        return True

    def _match(self, command: _Command, direction: Direction) -> None:
        """Compare what the host expects with what the command does (chapter 6.7)."""
        task, length = command.task, command.length
        transfer_length = task.transfer_length
        if not transfer_length:  # cases 1, 4, 9
            return
        if not length or task.direction is not direction:  # cases 2, 3, 8, 10
            command.phase_error, command.performed = True, False
            command.pad = False
        elif transfer_length <= length:  # cases 5, 6, 11, 12
            command.size = transfer_length
        elif direction is Direction.IN:  # case 7
            command.phase_error = True
            command.size = length
        else:  # case 13
            command.phase_error, command.performed = True, False
            task.moved = length

    def _prefetch(self, command: _Command) -> None:
        if command is self._command and not command.moved and self._reading is None and not self._unread:
            command.fetching = True
            self._unread += command.size
            memory = self.share.memory
            memory.take(command.size)
            command.task.fetch(command.size, partial(self._fetched, command, memory))

    def _fetched(self, command: _Command, memory: Memory) -> None:
        memory.give(command.size)
        self._unread -= command.size
        command.fetching = False
        self._advance()

    def _send_data(self) -> bool:
        if self._reading is not None or not self._in:
            return False
        command = self._command
        assert command is not None
        task = command.task
        if command.fetching or task.busy:
            return False
        if task.reads_store and self._unread > MAX_UNREAD:
            return False  # reads of cancelled transfers are still in flight
        transfer, _ = self._in.popitem(last=False)
        wanted = min(transfer.length, command.length - command.moved)
        available = 0 if task.sense is not None else min(wanted, command.size - command.moved)
        if available <= 0:
            self._reply(command, transfer, b"")
        else:
            self._reading = transfer
            transfer.hold()
            self._unread += available
            task.read(command.moved, available, partial(self._read_done, command, transfer, available))
        return True

    def _read_done(self, command: _Command, transfer: Transfer, length: int, data: Buffer | None) -> None:
        self._unread -= length
        if transfer is self._reading and command is self._command:
            self._reading = None
            if data is not None:
                command.task.delivered(len(data))
            self._reply(command, transfer, b"" if data is None else data)
        transfer.release()
        self._advance()  # also if cancelled or reset: another read may have waited for this one

    def _reply(self, command: _Command, transfer: Transfer, data: Buffer) -> None:
        """Complete an IN transfer of the data phase; missing data becomes padding or a short transfer."""
        missing = min(transfer.length, command.length - command.moved) - len(data)
        if missing and command.pad:
            data = bytes(data) + bytes(missing)
        command.moved += len(data)
        if len(data) < transfer.length or command.moved == command.length:
            self._phase = _Phase.STATUS
        transfer.complete(Status.SUCCESS, data)

    def _receive_data(self) -> bool:
        if not self._out or (self._unwritten and self._unwritten + next(iter(self._out)).length > MAX_UNWRITTEN):
            return False
        command = self._command
        assert command is not None
        transfer = self._next_out()
        position = command.moved
        command.moved = min(command.length, position + transfer.length)
        if command.moved == command.length:
            self._phase = _Phase.STATUS
        useful = min(command.moved, command.size) - position
        if useful > 0:
            transfer.hold()
        transfer.complete()  # before the write, so that the guest goes on meanwhile
        if useful > 0:
            self._unwritten += useful
            command.task.put(
                position, memoryview(transfer.data)[:useful], partial(self._data_written, transfer, useful)
            )
        return True

    def _data_written(self, transfer: Transfer, length: int) -> None:
        transfer.release()
        self._unwritten -= length
        self._advance()  # also if the command is gone: another command's data may have waited

    def _send_status(self) -> bool:
        command = self._command
        assert command is not None
        task = command.task
        if command.performed and not task.finish():
            return False
        if not self._in:
            return False
        transfer, _ = self._in.popitem(last=False)
        if not transfer.length:
            transfer.complete()
            return True
        if task.sense is not None:
            command.unit.scsi.keep_sense(task.sense)
            status = CswStatus.FAILED
        else:
            status = CswStatus.PHASE_ERROR if command.phase_error else CswStatus.PASSED
        csw = CSW.pack(CSW_SIGNATURE, command.tag, command.length - task.moved, status)
        if transfer.length >= CSW.size:
            self._command = None
            self._phase = _Phase.COMMAND
        transfer.complete(Status.SUCCESS, csw)
        return True

    def _next_out(self) -> Transfer:
        transfer, number = self._out.popitem(last=False)
        self._queued -= transfer.length
        if number != self._expected_number:
            self._data_out_lost()
        self._expected_number = number + 1
        return transfer

    def _wedge(self, transfer: Transfer, what: str) -> bool:
        """Halt both endpoints until a reset, because of an invalid CBW (chapter 6.6.1)."""
        log.debug("invalid command block wrapper (%s): endpoints halted until a reset", what)
        self._wedged = True
        self._halt(self._endpoint_in)
        self._halt(self._endpoint_out)
        stalled = [*self._in, *self._clear_out()]
        self._in.clear()
        transfer.complete()
        for other in stalled:
            other.complete(Status.STALL)
        return True

    def _halt(self, endpoint: int) -> None:
        assert self._host is not None
        self._host.halt(endpoint)
