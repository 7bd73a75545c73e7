"""A logical unit: what decides about SCSI commands, and the store behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from farplug.scsi.unit import AbsentUnit, Unit
from farplug.store.base import Store
from farplug.usb.device import DeviceEvent

SETTLED_AFTER = 40.0
"""Seconds after the last write of a guest until its file system is taken to have written everything. Linux writes what
was changed 30 s ago (vm.dirty_expire_centisecs), which it looks for every 5 s (vm.dirty_writeback_centisecs)."""


class Unflushed:
    """Writes that a guest has not flushed: its file system may have more to write, which nobody sees from outside.

    A flush is a SYNCHRONIZE CACHE or a STOP. Not every driver sends one: Linux's FAT driver does not, even when it
    unmounts, and a disk without a write cache is sent none. Therefore writes also count as settled
    :data:`SETTLED_AFTER` seconds after the last one.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._writes = self._flushed = self._runs = 0
        self._last = 0.0

    def wrote(self) -> None:
        """Count a write that is not durable by its own command."""
        if not self.run:
            self._runs += 1
        self._writes += 1
        self._last = self._clock()

    @property
    def writes(self) -> int:
        """How many there were: what a flush that begins now covers."""
        return self._writes

    def flushed(self, writes: int) -> None:
        """Note that a flush has succeeded that covers the first ``writes`` writes."""
        self._flushed = max(self._flushed, writes)

    def forget(self) -> None:
        """Forget all writes: the guest has the disk no more."""
        self._flushed = self._writes

    @property
    def run(self) -> int:
        """The number of the run of writes, from 1, that is not flushed and not settled; 0 if there is none."""
        pending = self._writes > self._flushed and self._clock() - self._last < SETTLED_AFTER
        return self._runs if pending else 0


def _unheard(event: DeviceEvent) -> None:
    """A unit that is not part of a device reports to nobody."""


@dataclass(slots=True, eq=False)
class LogicalUnit:
    """A SCSI unit and its store.

    Attributes:
        scsi: decides what commands do.
        store: where the blocks are; None while there is no medium.
        queues: whether a guest that sends several commands at a time gains from that.
        commands: how many were taken.
        bytes_read: from the store, delivered.
        bytes_written: to the store.
        orphaned_jobs: jobs under way whose commands are gone.
        deferred_error: an error of work whose command was gone when it failed. The next flush fails with it.
        number: the unit's number in its device; the device sets it.
        report: reports an event of the unit; its device sets it.
        unflushed: what the guest wrote and has not flushed.
    """

    scsi: Unit | AbsentUnit
    store: Store | None
    queues: bool = field(default=True, init=False)
    commands: int = field(default=0, init=False)
    bytes_read: int = field(default=0, init=False)
    bytes_written: int = field(default=0, init=False)
    orphaned_jobs: int = field(default=0, init=False)
    deferred_error: OSError | None = field(default=None, init=False)
    number: int = field(default=0, init=False)
    report: Callable[[DeviceEvent], None] = field(default=_unheard, init=False)
    unflushed: Unflushed = field(default_factory=Unflushed, init=False)

    @property
    def name(self) -> str:
        """For the log."""
        return "no medium" if self.store is None else self.store.name

    @property
    def unfinished(self) -> int:
        """Whether files may be lost if the disk leaves the guest now: :attr:`Unflushed.run`; 0 if nothing is kept."""
        return 0 if self.store is None or self.store.temporary else self.unflushed.run

    async def close(self) -> None:
        """Give the store back. Does nothing the second time."""
        if self.store is not None:
            await self.store.close()


def absent_unit(luns: int) -> LogicalUnit:
    """Make what answers for a logical unit number that does not exist, beside so many that do."""
    return LogicalUnit(AbsentUnit(luns), None)
