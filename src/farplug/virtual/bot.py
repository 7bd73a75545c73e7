"""Bulk-Only Transport: SCSI commands over two bulk endpoints (USB Mass Storage Class, Bulk-Only Transport 1.0).

A command is three transfers: the command block wrapper (CBW, OUT), the data, the command status wrapper (CSW, IN). The
guest may queue transfers before they can be answered: each endpoint has a queue, and the phase says which queue is
served next. What waits in a queue is what real hardware answers with NAK.

The host's expectation (H, from the CBW) and what the command does (D) meet in thirteen cases (chapter 6.7). Nothing
stalls in any of them: short data is padded with zeros or ended by a short transfer, surplus data is taken and dropped.
Firmware cannot recover from stalls, and QEMU's own disk, which every system knows, never stalls either. Only a CBW that
is none halts both endpoints, until a Bulk-Only Mass Storage Reset (chapter 6.6.1).
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable
from enum import IntEnum, auto
from functools import partial

from farplug.scsi.cdb import Action, Compare, Done, Fail, Flush, Outcome, Read, Receive, Respond, Verify, Work, Write
from farplug.scsi.disk import AbsentUnit, DiskUnit
from farplug.scsi.sense import ABORTED_COMMAND, INVALID_FIELD_IN_CDB, MISCOMPARE, UNRECOVERED_READ_ERROR, Sense
from farplug.store.base import Store
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer
from farplug.virtual.function import FunctionHost
from farplug.virtual.job import Job, job_sense, write_sense

log = logging.getLogger(__name__)

CBW_SIGNATURE = 0x43425355
CBW = struct.Struct("<IIIBBB16s")
"""dCBWSignature, dCBWTag, dCBWDataTransferLength, bmCBWFlags, bCBWLUN, bCBWCBLength, CBWCB"""

CSW_SIGNATURE = 0x53425355
CSW = struct.Struct("<IIIB")
"""dCSWSignature, dCSWTag, dCSWDataResidue, bCSWStatus"""

MAX_PADDING = 64 * 1024
"""Short data is padded to what the host expects up to here; beyond, a short transfer ends it. SeaBIOS on xHCI takes a
short transfer for a failed one, and asks for no more than this."""

MIN_PREFETCH, MAX_PREFETCH = 32 << 10, 1 << 20
"""A READ of so many bytes is fetched as soon as the command is acknowledged, while the guest prepares to ask for the
data. For less it is not worth a turn of the event loop."""

MAX_UNWRITTEN = 4 << 20
"""Bytes handed to the store and not yet written; more data waits in the queue, not acknowledged."""

MAX_UNREAD = 16 << 20
"""Bytes of reads under way that nobody waits for; above it, further reads wait."""

MAX_QUEUED = 32 << 20
"""Bytes of OUT transfers that wait in the queue; more are refused with an I/O error."""


class CswStatus(IntEnum):
    """bCSWStatus (table 5.3)."""

    PASSED = 0
    FAILED = 1
    PHASE_ERROR = 2


class _Phase(IntEnum):
    """What comes next."""

    COMMAND = auto()
    DATA_IN = auto()
    DATA_OUT = auto()
    STATUS = auto()


class _Command:
    """A command from its CBW to its CSW.

    Attributes:
        tag: dCBWTag.
        length: H, what the host expects to move.
        moved: how much of it has moved, padding included.
        size: how much of it the command itself moves, at most H: what follows is padding, or dropped.
        processed: how much of ``size`` was really delivered or written.
        data: data-in from here; None: from or to the store.
        fetching: ``data`` is being read from the store.
        offset: where in the store.
        pad: fill short data with zeros.
        durable: flush before the status.
        pending: writes, comparisons and jobs under way. The status waits for them, and data-in for jobs.
        job: what was last begun besides moving data.
        reads: it is a READ: what it delivers counts as read.
        compares: data-out is compared with the store, not written.
        parameters: data-out is collected here: it is not for the store. ``then`` says what it asks for.
        part: of a block that was cut by the end of a transfer. A block is written whole or not at all.
    """

    __slots__ = (
        "compares",
        "data",
        "durable",
        "fetching",
        "job",
        "length",
        "moved",
        "offset",
        "pad",
        "parameters",
        "part",
        "pending",
        "processed",
        "reads",
        "size",
        "status",
        "tag",
        "then",
    )

    def __init__(self, tag: int, length: int) -> None:
        self.tag = tag
        self.length = length
        self.moved = 0
        self.size = 0
        self.processed = 0
        self.data: memoryview | None = None
        self.fetching = False
        self.offset = 0
        self.pad = length <= MAX_PADDING
        self.durable = False
        self.pending = 0
        self.job: Job | None = None
        self.reads = False
        self.compares = False
        self.parameters: bytearray | None = None
        self.then: Callable[[Buffer], Outcome] | None = None
        self.part = b""
        self.status = CswStatus.PASSED


class BulkOnly:
    """The state machine of one Bulk-Only interface with one logical unit.

    Args:
        store: where the blocks are.
        unit: decides what commands do.
        endpoint_in: the function's own address of the bulk IN endpoint.
        endpoint_out: of the bulk OUT endpoint.

    Attributes:
        commands: how many were taken.
        bytes_read: from the store, delivered.
        bytes_written: to the store.
    """

    def __init__(self, store: Store, unit: DiskUnit, endpoint_in: int, endpoint_out: int) -> None:
        self.commands = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self._store = store
        self._unit = unit
        self._absent = AbsentUnit()
        self._endpoint_in = endpoint_in
        self._endpoint_out = endpoint_out
        self._host: FunctionHost | None = None
        self._in: deque[Transfer] = deque()
        self._out: deque[Transfer] = deque()
        self._queued = 0
        self._unwritten = 0
        self._unread = 0
        self.unreported: OSError | None = None
        self._phase = _Phase.COMMAND
        self._command: _Command | None = None
        self._reading: Transfer | None = None
        self._wedged = False
        self._advancing = False
        self._steps: dict[_Phase, Callable[[], bool]] = {
            _Phase.COMMAND: self._take_command,
            _Phase.DATA_IN: self._give_data,
            _Phase.DATA_OUT: self._take_data,
            _Phase.STATUS: self._give_status,
        }

    def bind(self, host: FunctionHost) -> None:
        """Say who can halt the endpoints."""
        self._host = host

    def submit(self, transfer: Transfer) -> None:
        """Take a transfer on one of the two endpoints."""
        if transfer.endpoint & 0x80:
            self._in.append(transfer)
        elif self._queued + transfer.length > MAX_QUEUED:
            transfer.complete(Status.IO_ERROR)
        else:
            self._queued += transfer.length
            self._out.append(transfer)
        self._advance()

    def cancel(self, transfer: Transfer) -> None:
        """Complete a pending transfer as cancelled. Nothing of it has moved: the next one takes its place."""
        if transfer is self._reading:
            self._reading = None
        elif transfer in self._in:
            self._in.remove(transfer)
        elif transfer in self._out:
            later = self._out[-1] is not transfer
            self._out.remove(transfer)
            self._queued -= transfer.length
            command = self._command
            if later and self._phase is _Phase.DATA_OUT and command is not None:
                # What follows would be written in its place.
                command.size = min(command.size, command.moved)
                self._fail(command, ABORTED_COMMAND)
        else:
            return
        transfer.complete(Status.CANCELLED)
        self._advance()

    def bulk_only_reset(self) -> None:
        """Be ready for a CBW again (chapter 3.1). Halts stay until the guest clears them; IN transfers stay queued."""
        self._wedged = False
        self._forget()
        dropped, self._out = self._out, deque()
        self._queued = 0
        for transfer in dropped:
            transfer.complete()

    def halt_cleared(self, endpoint: int) -> None:
        """Halt again while no reset has come yet (chapter 6.6.1: the endpoints stay halted until then)."""
        if self._wedged:
            self._halt(endpoint)

    def reset(self) -> None:
        """Drop everything. Writes under way go on: the store keeps their order."""
        self._wedged = False
        self._forget()
        pending = [*self._in, *self._out]
        self._in.clear()
        self._out.clear()
        self._queued = 0
        for transfer in pending:
            transfer.complete(Status.CANCELLED)

    def _forget(self) -> None:
        self._phase = _Phase.COMMAND
        if self._command is not None and self._command.job is not None:
            self._command.job.stop()
        self._command = None
        if self._reading is not None:
            self._in.appendleft(self._reading)
            self._reading = None

    def _advance(self) -> None:
        """Take steps until the next one has to wait. Completions that submit again end up in the queues."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._steps[self._phase]():
                pass
        finally:
            self._advancing = False

    # Steps: each serves one transfer, or returns False because it has to wait.

    def _take_command(self) -> bool:
        if not self._out:
            return False
        transfer = self._next_out()
        if transfer.length != CBW.size:
            return self._wedge(transfer, f"{transfer.length} bytes")
        signature, tag, length, flags, lun, cdb_length, cdb = CBW.unpack(transfer.data)
        if signature != CBW_SIGNATURE:
            return self._wedge(transfer, f"the signature {signature:08x}")
        command = self._command = _Command(tag, length)
        self.commands += 1
        unit: DiskUnit | AbsentUnit = self._absent if lun & 0x0F else self._unit
        cdb = cdb[: cdb_length & 0x1F]
        action = unit.execute(cdb) if cdb else Fail(INVALID_FIELD_IN_CDB)
        work = self._begin(command, action, bool(flags & 0x80))
        if not length:
            self._phase = _Phase.STATUS
        else:
            self._phase = _Phase.DATA_IN if flags & 0x80 else _Phase.DATA_OUT
        transfer.complete()
        if work is not None and self._command is command:
            self._start(command, work)
        elif type(action) is Read and MIN_PREFETCH <= command.size <= MAX_PREFETCH:
            # Not now: the acknowledgement leaves first.
            asyncio.get_running_loop().call_soon(self._prefetch, command)
        return True

    def _prefetch(self, command: _Command) -> None:
        if command is self._command and not command.moved and self._reading is None and not self._unread:
            command.fetching = True
            self._unread += command.size
            self._store.read(command.offset, command.size, partial(self._fetched, command))

    def _fetched(self, command: _Command, data: Buffer, error: OSError | None) -> None:
        self._unread -= command.size
        command.fetching = False
        if error is None:  # else the transfer that asks for the data finds out which part cannot be read
            command.data = memoryview(data)
        self._advance()

    def _begin(self, command: _Command, action: Action, to_host: bool) -> Work | None:
        """Match what the host expects with what the command does. Returns what is to be done at once."""
        length = command.length
        work: Work | None = None
        match action:
            case Read(lba, count, fua):
                demand, sends = count * self._store.block_size, True
                command.offset = lba * self._store.block_size
                command.reads = True
                work = Flush() if fua else None
            case Write(lba, count, durable):
                demand, sends = count * self._store.block_size, False
                command.offset = lba * self._store.block_size
                command.durable = durable
            case Compare(lba, count):
                demand, sends = count * self._store.block_size, False
                command.offset = lba * self._store.block_size
                command.compares = True
            case Receive(demand, then):
                sends = False
                command.parameters, command.then = bytearray(), then
            case Respond(data):
                demand, sends = len(data), True
                command.data = memoryview(data)
            case Fail(sense):
                self._fail(command, sense)
                return None
            case Done():
                return None  # cases 1, 4, 9
            case _:
                return action  # cases 1, 4, 9
        if not demand:
            return None
        if not length:  # cases 2, 3
            command.status = CswStatus.PHASE_ERROR
        elif sends is not to_host:  # cases 8, 10
            command.status = CswStatus.PHASE_ERROR
            command.pad = False
        elif demand <= length:  # cases 5, 6, 11, 12
            command.size = demand
            return work
        elif sends:  # case 7
            command.status = CswStatus.PHASE_ERROR
            command.size = length
            return work
        else:  # case 13
            command.status = CswStatus.PHASE_ERROR
            command.processed = length
        return None

    def _give_data(self) -> bool:
        if self._reading is not None or not self._in:
            return False
        command = self._command
        assert command is not None
        if command.fetching or command.pending:
            return False
        if command.data is None and self._unread > MAX_UNREAD:
            return False  # reads that were cancelled or reset are still under way
        transfer = self._in.popleft()
        wanted = min(transfer.length, command.length - command.moved)
        available = min(wanted, command.size - command.moved)
        if available <= 0:
            self._reply(command, transfer, b"")
        elif command.data is not None:
            command.processed += available
            if command.reads:
                self.bytes_read += available
            self._reply(command, transfer, command.data[command.moved : command.moved + available])
        else:
            self._reading = transfer
            self._unread += available
            done = partial(self._read_done, command, transfer, available)
            self._store.read(command.offset + command.moved, available, done)
        return True

    def _read_done(
        self, command: _Command, transfer: Transfer, length: int, data: Buffer, error: OSError | None
    ) -> None:
        self._unread -= length
        if transfer is not self._reading or command is not self._command:
            self._advance()  # cancelled or reset meanwhile: another read may have waited for this one
            return
        self._reading = None
        if error is None:
            command.processed += len(data)
            self.bytes_read += len(data)
        else:
            log.warning("%s: reading at byte %d failed: %s", self._store.name, command.offset + command.moved, error)
            command.size = command.moved
            self._fail(command, UNRECOVERED_READ_ERROR)
        self._reply(command, transfer, data)
        self._advance()

    def _reply(self, command: _Command, transfer: Transfer, data: Buffer) -> None:
        """Answer an IN transfer of the data phase; padding, or a short transfer, follow from what is missing."""
        missing = min(transfer.length, command.length - command.moved) - len(data)
        if missing and command.pad:
            data = bytes(data) + bytes(missing)
        command.moved += len(data)
        if len(data) < transfer.length or command.moved == command.length:
            self._phase = _Phase.STATUS
        transfer.complete(Status.SUCCESS, data)

    def _take_data(self) -> bool:
        if not self._out or (self._unwritten and self._unwritten + self._out[0].length > MAX_UNWRITTEN):
            return False
        command = self._command
        assert command is not None
        transfer = self._next_out()
        begin = command.moved
        command.moved = min(command.length, begin + transfer.length)
        if command.moved == command.length:
            self._phase = _Phase.STATUS
        useful = min(command.moved, command.size) - begin
        transfer.complete()  # first: the guest's next step and the write then run at the same time
        if useful > 0:
            self._put(command, begin, memoryview(transfer.data)[:useful])
        return True

    def _put(self, command: _Command, begin: int, data: Buffer) -> None:
        """Take data-out; ``begin`` counts from the start of the data phase. Blocks go to the store whole only."""
        if command.parameters is not None:
            command.parameters += data
            if len(command.parameters) == command.size and command is self._command:
                self._take_parameters(command)
            return
        if command.part:
            begin -= len(command.part)
            data = command.part + bytes(data)
            command.part = b""
        if cut := len(data) % self._store.block_size:
            command.part = bytes(data[-cut:])
            data = memoryview(data)[:-cut]
        if not data:
            return
        command.pending += 1
        self._unwritten += len(data)
        offset = command.offset + begin
        if command.compares:
            self._store.read(offset, len(data), partial(self._compared, command, data))
        else:
            self._store.write(offset, data, partial(self._write_done, command, len(data)))

    def _take_parameters(self, command: _Command) -> None:
        assert command.parameters is not None
        assert command.then is not None
        command.processed = command.size
        match command.then(command.parameters):
            case Done():
                pass
            case Fail(sense):
                self._fail(command, sense)
            case work:
                self._start(command, work)

    def _compared(self, command: _Command, data: Buffer, found: Buffer, error: OSError | None) -> None:
        self._unwritten -= len(data)
        sense = None
        if error is not None:
            log.warning("%s: reading failed: %s", self._store.name, error)
            sense = UNRECOVERED_READ_ERROR
        elif found != data:
            sense = MISCOMPARE
        elif command.status is not CswStatus.FAILED:
            command.processed += len(data)
        self._settle(command, sense)

    def _write_done(self, command: _Command, length: int, error: OSError | None) -> None:
        self._unwritten -= length
        if error is not None:
            log.warning("%s: writing failed: %s", self._store.name, error)
        else:
            self.bytes_written += length
            if command.status is not CswStatus.FAILED:
                command.processed += length
        self._settle(command, None if error is None else write_sense(error))

    def _start(self, command: _Command, work: Work) -> None:
        command.pending += 1
        command.job = Job(self._store, work, partial(self._job_done, command, work))

    def _job_done(self, command: _Command, work: Work, error: OSError | None) -> None:
        if command is not self._command:
            if error is not None and not isinstance(work, Verify):
                self.unreported = error
        elif error is None and isinstance(work, Flush):
            error, self.unreported = self.unreported, None
        self._settle(command, None if error is None else job_sense(work, error))

    def _settle(self, command: _Command, sense: Sense | None) -> None:
        """Something that the status waits for has ended."""
        command.pending -= 1
        if command is self._command and sense is not None:
            command.size = command.processed = 0
            self._fail(command, sense)
        self._advance()

    def _give_status(self) -> bool:
        command = self._command
        assert command is not None
        if command.pending:
            return False
        if command.durable and command.status is CswStatus.PASSED:
            command.durable = False
            self._start(command, Flush())
            return True
        if not self._in:
            return False
        transfer = self._in.popleft()
        if not transfer.length:
            transfer.complete()
            return True
        csw = CSW.pack(CSW_SIGNATURE, command.tag, command.length - command.processed, command.status)
        if transfer.length >= CSW.size:
            self._command = None
            self._phase = _Phase.COMMAND
        transfer.complete(Status.SUCCESS, csw)
        return True

    def _next_out(self) -> Transfer:
        transfer = self._out.popleft()
        self._queued -= transfer.length
        return transfer

    def _fail(self, command: _Command, sense: Sense) -> None:
        command.status = CswStatus.FAILED
        self._unit.keep_sense(sense)

    def _wedge(self, transfer: Transfer, what: str) -> bool:
        """A CBW that is none: halt both endpoints until a reset (chapter 6.6.1)."""
        log.debug("%s: the guest sent %s instead of a command: endpoints halted until a reset", self._store.name, what)
        self._wedged = True
        self._halt(self._endpoint_in)
        self._halt(self._endpoint_out)
        stalled = [*self._in, *self._out]
        self._in.clear()
        self._out.clear()
        self._queued = 0
        transfer.complete()
        for other in stalled:
            other.complete(Status.STALL)
        return True

    def _halt(self, endpoint: int) -> None:
        assert self._host is not None
        self._host.halt(endpoint)
