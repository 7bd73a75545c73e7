"""Work of SCSI commands that moves no data to or from the host: done on the store, in steps."""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from farplug.rate_limit import limited_logger
from farplug.scsi.cdb import Fill, Flush, Verify, Work, Zero
from farplug.scsi.sense import SPACE_ALLOCATION_FAILED, UNRECOVERED_READ_ERROR, WRITE_ERROR, Sense
from farplug.store.base import Store, WriteDone
from farplug.usb.share import NO_PORT, STORE_WORK, Memory, Share

log = limited_logger(__name__)


MAX_STEP = 1 << 20
"""Bytes read or written in one step."""

STEP_MEMORY = 256 << 10
"""Bytes that a step occupies in the store: no step takes data along."""

_Step: TypeAlias = tuple[Callable[[WriteDone], None], int]
"""A call of the store, and the bytes that it touches."""


def job_sense(work: Work, error: OSError) -> Sense:
    """Return the sense data for failed work."""
    return UNRECOVERED_READ_ERROR if isinstance(work, Verify) else write_sense(error)


def write_sense(error: OSError) -> Sense:
    """Return the sense data for a failed write or flush. Linux maps a full image to ENOSPC and does not retry."""
    return SPACE_ALLOCATION_FAILED if error.errno in (errno.ENOSPC, errno.EDQUOT) else WRITE_ERROR


class Lane:
    """The steps of one kind on a store: one at a time, those of all jobs in turn; the others wait here.

    So a job whose command was aborted occupies at most one step in the store, and a guest that aborts commands again
    and again only waits for this step.

    Attributes:
        share: what the guest may use; a step is counted there while it is in the store.
    """

    def __init__(self) -> None:
        self.share: Share = NO_PORT
        self._busy = False
        self._waiting: OrderedDict[StoreJob, None] = OrderedDict()
        self._starting = False

    def enter(self, job: StoreJob) -> None:
        """Start the next step of a job, now or when it is its turn."""
        self._waiting[job] = None
        self._start()

    def leave(self) -> None:
        """Note that the step has ended."""
        self._busy = False
        self._start()

    def withdraw(self, job: StoreJob) -> bool:
        """Return whether a job waited; then it waits no longer."""
        if job not in self._waiting:
            return False
        del self._waiting[job]
        return True

    def _start(self) -> None:
        if self._starting:
            return
        self._starting = True
        try:
            while self._waiting and not self._busy:
                job, _ = self._waiting.popitem(last=False)
                self._busy = True
                job.step()
        finally:
            self._starting = False


class Lanes:
    """The lanes of a unit.

    Attributes:
        reads: steps that read.
        writes: steps that write, and flushes: a store does them one after the other.
    """

    __slots__ = ("reads", "writes")

    def __init__(self) -> None:
        self.reads = Lane()
        self.writes = Lane()

    def use(self, share: Share) -> None:
        """Count the steps in this share from now on."""
        self.reads.share = self.writes.share = share


class StoreJob:
    """Work on a store. The constructor starts the work, which may be done before the constructor returns.

    Args:
        store: the store to work on.
        lanes: where the steps wait for their turn.
        work: what to do; its blocks are inside the store.
        done: called once, with None or the error.
    """

    def __init__(self, store: Store, lanes: Lanes, work: Work, done: WriteDone) -> None:
        self._store = store
        self._work = work
        self._done = done
        self._lane = lanes.reads if isinstance(work, Verify) else lanes.writes
        self._steps = self._plan()
        self._next: _Step | None = None
        self._memory: Memory | None = None
        """Where the step in the store is counted."""
        self._error: OSError | None = None
        self._stopped = False
        self._answered = False
        self._stepping = False
        self._running = False
        self._run()

    def stop(self) -> None:
        """Stop before the next step, and if possible within the step in the store. ``done`` is still called."""
        self._stopped = True
        if self._lane.withdraw(self):
            self._stepping = False
            self._run()

    def _run(self) -> None:
        """Run steps until one has to wait. A loop, because thousands of nested calls would exhaust the stack."""
        self._running = True
        turn = self._lane.share.turn
        while not self._stepping:
            if turn.left <= 0 and not self._stopped:
                turn.call_next(self._run)
                break
            step = next(self._steps, None) if self._error is None and not self._stopped else None
            if step is None:
                self._finish()
                return
            self._stepping = True
            self._next = step
            self._lane.enter(self)
        self._running = False

    def step(self) -> None:
        """Pass the next step to the store. The lane calls this."""
        assert self._next is not None
        (call, size), self._next = self._next, None
        share = self._lane.share
        self._memory = share.memory
        self._memory.take(STEP_MEMORY)
        self._answered = False
        try:
            call(self._stepped)
        except Exception as error:
            if not self._answered:  # the store is broken: other steps must not wait for this one
                self._stepped(OSError(errno.EIO, repr(error)))
            raise
        # A step that continues in a thread costs this turn little.
        share.turn.spend(STORE_WORK + (size if self._answered else 0))

    def _stepped(self, error: OSError | None) -> None:
        assert self._memory is not None
        self._memory.give(STEP_MEMORY)
        self._answered = True
        self._error = error
        self._stepping = False
        self._lane.leave()
        if not self._running:
            self._run()

    def _finish(self) -> None:
        if self._error is not None:
            log.warning("%s: %s failed: %s", self._store.name, type(self._work).__name__.lower(), self._error)
        self._done(self._error)

    def _plan(self) -> Iterator[_Step]:
        store, size = self._store, self._store.block_size
        match self._work:
            case Flush():
                yield store.flush, 0
            case Verify(lba, count):
                for offset, length in _pieces(lba * size, count * size, MAX_STEP):
                    yield partial(store.verify, offset, length), length
            case Zero(extents, unmap, durable):
                for lba, count in extents:
                    yield from self._plan_zeros(lba * size, count * size, unmap)
                if durable:
                    yield store.flush, 0
            case Fill(lba, count, block, durable):
                for offset, length in _pieces(lba * size, count * size, MAX_STEP):
                    yield partial(store.fill, offset, block, length // size), length
                if durable:
                    yield store.flush, 0

    def _plan_zeros(self, offset: int, length: int, unmap: bool) -> Iterator[_Step]:
        store, end = self._store, offset + length
        while offset < end:
            length = min(store.zero_step(unmap=unmap), end - offset)
            yield partial(store.zero, offset, length, unmap=unmap, stopped=self._is_stopped), length
            offset += length

    def _is_stopped(self) -> bool:
        return self._stopped


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(most, offset + length - begin)) for begin in range(offset, offset + length, most))
