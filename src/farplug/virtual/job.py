"""What a SCSI command asks for besides moving data: done on the store, step by step, whatever the transport is."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from farplug.scsi.cdb import Fill, Flush, Verify, Work, Zero
from farplug.scsi.sense import SPACE_ALLOCATION_FAILED, UNRECOVERED_READ_ERROR, WRITE_ERROR, Sense
from farplug.store.base import Store, WriteDone

log = logging.getLogger(__name__)

MAX_STEP = 1 << 20
"""Bytes read or written in one step."""

MAX_ZERO_STEP = 128 << 20
"""Bytes zeroed in one step: at once where holes can be made, and where not, a second's work or so."""

_Step: TypeAlias = Callable[[WriteDone], None]


def job_sense(work: Work, error: OSError) -> Sense:
    """Tell a host that work failed."""
    return UNRECOVERED_READ_ERROR if isinstance(work, Verify) else write_sense(error)


def write_sense(error: OSError) -> Sense:
    """Tell a host that a write or flush failed. Linux passes the full image on as ENOSPC, and does not try again."""
    return SPACE_ALLOCATION_FAILED if error.errno in (errno.ENOSPC, errno.EDQUOT) else WRITE_ERROR


class StoreJob:
    """Work on a store. It begins now, and may be over before the constructor returns.

    Args:
        store: where.
        work: what, inside the store.
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
        """Take no step after the one under way. ``done`` is called all the same."""
        self._steps = iter(())

    def _run(self) -> None:
        """Take steps until one has to wait: many in a row must not nest."""
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
