"""A task: one SCSI command in progress, for any transport (SAM-5, chapter 4.9).

A task moves data between the transport and the store, runs the work that moves no data
(:mod:`~farplug.virtual.job`), and keeps the sense data of the command. The transport alone deals with the length that
the host expects, and with transfers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from farplug.rate_limit import limited_logger
from farplug.scsi.cdb import (
    Action,
    Compare,
    Done,
    Fail,
    Fill,
    Flush,
    Outcome,
    Read,
    Receive,
    Respond,
    Verify,
    Work,
    Write,
    Zero,
)
from farplug.scsi.sense import (
    INVALID_FIELD_IN_CDB,
    MISCOMPARE,
    SPACE_ALLOCATION_FAILED,
    UNRECOVERED_READ_ERROR,
    Sense,
    SenseKey,
)
from farplug.store.base import Store
from farplug.usb.share import STORE_WORK
from farplug.usb.types import Buffer, Direction
from farplug.virtual.job import StoreJob, job_sense, write_sense
from farplug.virtual.unit import LogicalUnit

log = limited_logger(__name__)

ReadCallback: TypeAlias = Callable[[Buffer | None], None]
"""Called with data-in, or with None if reading failed; then the task has failed."""


def _ignore() -> None:
    pass


class Task:
    """A command from its CDB to its status.

    The constructor asks the unit what the command does; nothing is done before :meth:`start`.

    Args:
        unit: the unit that the command is for.
        cdb: the command descriptor block; an empty one fails.
        progress: called when an operation has ended that :meth:`finish` waited for, also from inside another method.

    Attributes:
        direction: of the data; None if the command moves no data.
        transfer_length: the number of bytes that the command moves.
        sense: why the command failed; None if it has not failed.
        moved: bytes sent to the host, written to the store, or received as parameters.
    """

    __slots__ = (
        "_compares",
        "_counts_read",
        "_data",
        "_durable",
        "_flushes",
        "_forced",
        "_job",
        "_memory",
        "_occupied",
        "_offset",
        "_parameters",
        "_partial_block",
        "_pending",
        "_progress",
        "_store",
        "_then",
        "_unit",
        "_work",
        "direction",
        "moved",
        "sense",
        "transfer_length",
    )

    def __init__(self, unit: LogicalUnit, cdb: Buffer, progress: Callable[[], None]) -> None:
        self.direction: Direction | None = None
        self.transfer_length = 0
        self.sense: Sense | None = None
        self.moved = 0
        self._unit: LogicalUnit = unit
        self._progress: Callable[[], None] | None = progress
        self._store = unit.store
        self._offset = 0
        self._data: memoryview | None = None
        """Data-in that is not in the store."""
        self._memory = unit.share.memory
        self._occupied = 0
        """Bytes that the task itself holds, as counted in the share."""
        self._parameters: bytearray | None = None
        """Data-out that is not for the store is collected here; ``_then`` returns what to do with it."""
        self._then: Callable[[Buffer], Outcome] | None = None
        self._partial_block = b""
        """The first part of a block that a transfer cut. Only whole blocks are written."""
        self._compares = False
        self._counts_read = False
        self._durable = False
        self._forced = False
        self._flushes: int | None = None
        """How many of the unit's writes the command covers, if it is a flush."""
        self._work: Work | None = None
        self._job: StoreJob | None = None
        self._pending = 0
        unit.commands += 1
        self._plan(unit.scsi.execute(cdb) if cdb else Fail(INVALID_FIELD_IN_CDB))

    def _plan(self, action: Action) -> None:
        match action:
            case Read(lba, count, fua):
                self._plan_blocks(Direction.IN, lba, count)
                self._counts_read = True
                self._work = Flush() if fua else None
            case Write(lba, count, durable, forced):
                self._plan_blocks(Direction.OUT, lba, count)
                self._durable, self._forced = durable, forced
            case Compare(lba, count):
                self._plan_blocks(Direction.OUT, lba, count)
                self._compares = True
            case Receive(transfer_length, then):
                self.direction, self.transfer_length = Direction.OUT, transfer_length
                self._parameters, self._then = bytearray(), then
            case Respond(data):
                if data:
                    self.direction, self.transfer_length = Direction.IN, len(data)
                    self._data = memoryview(data)
            case Fail(sense):
                self.sense = sense
            case Done():
                pass
            case Flush():
                self._work = action
                self._flushes = self._unit.unflushed.writes
            case _:
                self._work = action

    def _plan_blocks(self, direction: Direction, lba: int, count: int) -> None:
        size = self._medium.block_size
        self.direction, self.transfer_length, self._offset = direction, count * size, lba * size

    @property
    def _medium(self) -> Store:
        assert self._store is not None  # units without a store return no action that needs one
        return self._store

    @property
    def name(self) -> str:
        """Return the name of the store, for the log."""
        return self._unit.name

    @property
    def busy(self) -> bool:
        """Return whether an operation is running that the status waits for."""
        return self._pending > 0

    @property
    def reads_store(self) -> bool:
        """Return whether data-in comes from the store, which may take time."""
        return self.direction is Direction.IN and self._data is None

    def start(self) -> None:
        """Start the work that precedes the data."""
        if self._work is not None:
            self._start_job(self._work)

    def abort(self) -> None:
        """Report nothing more to the transport. Operations in flight go on; a job stops after its step in flight."""
        self._progress = None
        self._occupy(-self._occupied)
        if self._job is not None and self._pending:
            self._job.stop()

    def fail(self, sense: Sense) -> None:
        """Fail the command with this sense, unless it has already failed."""
        if self.sense is None:
            self.sense = sense
            if sense.key in (SenseKey.MEDIUM_ERROR, SenseKey.HARDWARE_ERROR) or sense == SPACE_ALLOCATION_FAILED:
                self._unit.errors += 1

    # Data-in

    def read(self, position: int, length: int, done: ReadCallback) -> None:
        """Read ``length`` bytes of data-in from ``position`` on. ``done`` is called once, also after :meth:`abort`."""
        if self._data is not None:
            done(self._data[position : position + length])
        else:
            self._unit.share.turn.spend(STORE_WORK + length)
            self._medium.read(self._offset + position, length, partial(self._read, position, done))

    def _read(self, position: int, done: ReadCallback, data: Buffer, error: OSError | None) -> None:
        if error is None:
            done(data)
            return
        if self._progress is not None:
            log.warning("%s: reading at byte %d failed: %s", self.name, self._offset + position, error)
            self.fail(UNRECOVERED_READ_ERROR)
        done(None)

    def fetch(self, length: int, done: Callable[[], None]) -> None:
        """Read the first ``length`` bytes of data-in ahead: :meth:`read` then returns them at once.

        If that fails, :meth:`read` reads the store again, and finds the part that fails. ``done`` is always called,
        also after :meth:`abort`.
        """

        def fetched(data: Buffer, error: OSError | None) -> None:
            if error is None:
                self._data = memoryview(data)
                if self._progress is not None:
                    self._occupy(len(data))
            done()

        self._unit.share.turn.spend(STORE_WORK + length)
        self._medium.read(self._offset, length, fetched)

    def delivered(self, length: int) -> None:
        """Count ``length`` bytes of data-in that were sent to the host."""
        self.moved += length
        if self._counts_read:
            self._unit.bytes_read += length

    # Data-out

    def put(self, position: int, data: Buffer, done: Callable[[], None] = _ignore) -> None:
        """Take data-out at ``position``, where the data-out before it ended. Only whole blocks go to the store.

        ``done`` is called once, when the data is no longer needed.
        """
        if self.sense is not None:
            done()
        elif self._parameters is not None:
            self._parameters += data
            self._occupy(len(data))
            if len(self._parameters) == self.transfer_length and self._progress is not None:
                self._parameters_received()
            done()
        else:
            self._put_blocks(position, data, done)

    def _parameters_received(self) -> None:
        assert self._parameters is not None
        assert self._then is not None
        self.moved = self.transfer_length
        match self._then(self._parameters):
            case Done():
                pass
            case Fail(sense):
                self.fail(sense)
            case work:
                self._start_job(work)

    def _put_blocks(self, position: int, data: Buffer, done: Callable[[], None]) -> None:
        if self._partial_block:
            position -= len(self._partial_block)
            data = self._partial_block + bytes(data)
            self._partial_block = b""
            self._memory.take(len(data))
            done = partial(self._copy_done, len(data), done)
        if cut := len(data) % self._medium.block_size:
            self._partial_block = bytes(data[-cut:])
            data = memoryview(data)[:-cut]
        if not data:
            done()
            return
        self._pending += 1
        offset = self._offset + position
        self._unit.share.turn.spend(STORE_WORK + len(data))
        if self._compares:
            self._medium.compare(offset, data, partial(self._compared, len(data), done))
        else:
            if not self._forced:
                self._unit.unflushed.wrote()
            self._medium.write(offset, data, partial(self._written, len(data), done))

    def _copy_done(self, length: int, done: Callable[[], None]) -> None:
        self._memory.give(length)
        done()

    def _compared(self, length: int, done: Callable[[], None], equal: bool, error: OSError | None) -> None:
        sense = None
        if error is not None:
            log.warning("%s: reading failed: %s", self.name, error)
            sense = UNRECOVERED_READ_ERROR
        elif not equal:
            sense = MISCOMPARE
        elif self.sense is None:
            self.moved += length
        self._operation_done(sense, done)

    def _written(self, length: int, done: Callable[[], None], error: OSError | None) -> None:
        if error is not None:
            log.warning("%s: writing failed: %s", self.name, error)
        else:
            self._unit.bytes_written += length
            if self.sense is None:
                self.moved += length
        self._operation_done(None if error is None else write_sense(error), done)

    # Work, and the end

    def finish(self) -> bool:
        """Return whether the command is done, once all data has moved.

        Otherwise call again after ``progress`` was called.
        """
        if self._pending:
            return False
        if self._durable and self.sense is None:
            self._durable = False
            self._start_job(Flush())
            if self._pending:
                return False
        self._occupy(-self._occupied)
        return True

    def _occupy(self, size: int) -> None:
        self._occupied += size
        self._memory.take(size)

    def _start_job(self, work: Work) -> None:
        self._pending += 1
        if isinstance(work, (Zero, Fill)):
            self._unit.unflushed.wrote()
        self._job = StoreJob(self._medium, self._unit.lanes, work, partial(self._job_done, work))

    def _job_done(self, work: Work, error: OSError | None) -> None:
        if self._progress is None:
            if error is not None and not isinstance(work, Verify):
                self._unit.deferred_error = error
        elif error is None and isinstance(work, Flush):
            error, self._unit.deferred_error = self._unit.deferred_error, None
        if isinstance(work, (Zero, Fill)):
            self._unit.unflushed.wrote()  # a flush that began during the work does not cover all of it
        elif error is None and self._flushes is not None:
            self._unit.unflushed.flushed(self._flushes)
        self._operation_done(None if error is None else job_sense(work, error), _ignore)

    def _operation_done(self, sense: Sense | None, done: Callable[[], None]) -> None:
        self._pending -= 1
        if sense is not None:
            self.fail(sense)
            self.moved = 0
        done()
        if self._progress is not None:
            self._progress()
