"""Work of SCSI commands that moves no data to or from the host: done on the store, in steps."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from farplug.rate_limit import limited_logger
from farplug.scsi.cdb import Fill, Flush, Verify, Work, Zero
from farplug.scsi.sense import SPACE_ALLOCATION_FAILED, UNRECOVERED_READ_ERROR, WRITE_ERROR, Sense
from farplug.store.base import Store, WriteDone

log = limited_logger(__name__)

MAX_STEP = 1 << 20
"""Bytes read or written in one step."""

MAX_ZERO_STEP = 128 << 20
"""Bytes zeroed in one step: immediate where holes can be punched, otherwise about a second of writing."""

_Step: TypeAlias = Callable[[WriteDone], None]


def job_sense(work: Work, error: OSError) -> Sense:
    """Return the sense data for failed work."""
    return UNRECOVERED_READ_ERROR if isinstance(work, Verify) else write_sense(error)


def write_sense(error: OSError) -> Sense:
    """Return the sense data for a failed write or flush. Linux maps a full image to ENOSPC and does not retry."""
    return SPACE_ALLOCATION_FAILED if error.errno in (errno.ENOSPC, errno.EDQUOT) else WRITE_ERROR


class StoreJob:
    """Work on a store. The constructor starts the work, which may be done before the constructor returns.

    Args:
        store: the store to work on.
        work: what to do; its blocks are inside the store.
        done: called once, with None or the error.
    """

    def __init__(self, store: Store, work: Work, done: WriteDone) -> None:
        self._store = store
        self._work = work
        self._done = done
        self._steps = _steps(store, work)
        self._error: OSError | None = None
        self._stepping = False
        self._running = False
        self._run()

    def stop(self) -> None:
        """Stop after the step in flight. ``done`` is still called."""
        self._steps = iter(())

    def _run(self) -> None:
        """Run steps until one has to wait. A loop, because thousands of nested calls would exhaust the stack."""
        self._running = True
        while not self._stepping:
            step = next(self._steps, None) if self._error is None else None
            if step is None:
                self._finish()
                return
            self._stepping = True
            step(self._stepped)
        self._running = False

    def _stepped(self, error: OSError | None) -> None:
        self._error = error
        self._stepping = False
        if not self._running:
            self._run()

    def _finish(self) -> None:
        if self._error is not None:
            log.warning("%s: %s failed: %s", self._store.name, type(self._work).__name__.lower(), self._error)
        self._done(self._error)


def _steps(store: Store, work: Work) -> Iterator[_Step]:
    size = store.block_size
    match work:
        case Flush():
            yield store.flush
        case Verify(lba, count):
            for offset, length in _pieces(lba * size, count * size, MAX_STEP):
                yield partial(_read, store, offset, length)
        case Zero(extents, unmap, durable):
            for lba, count in extents:
                for offset, length in _pieces(lba * size, count * size, MAX_ZERO_STEP):
                    yield partial(store.zero, offset, length, unmap=unmap)
            if durable:
                yield store.flush
        case Fill(lba, count, block, durable):
            data = memoryview(block * min(count, MAX_STEP // size))
            for offset, length in _pieces(lba * size, count * size, MAX_STEP):
                yield partial(store.write, offset, data[:length])
            if durable:
                yield store.flush


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(most, offset + length - begin)) for begin in range(offset, offset + length, most))


def _read(store: Store, offset: int, length: int, done: WriteDone) -> None:
    store.read(offset, length, lambda data, error: done(error))
