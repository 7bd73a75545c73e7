"""A logical unit: the SCSI unit that decides what commands do, and the store behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from farplug.scsi.unit import AbsentUnit, Unit
from farplug.store.base import Store
from farplug.usb.device import DeviceEvent
from farplug.usb.share import NO_PORT, Share
from farplug.virtual.job import Lanes

SETTLED_AFTER = 40.0
"""Seconds after the last write of a guest, when its file system is assumed to have written everything. Linux writes
pages that were changed 30 s ago (vm.dirty_expire_centisecs), and checks every 5 s (vm.dirty_writeback_centisecs)."""


class Unflushed:
    """Writes that a guest has not flushed: the file system of the guest may have more to write.

    A flush is a SYNCHRONIZE CACHE or a STOP. Not every driver sends one: Linux's FAT driver does not, even when it
    unmounts, and no driver sends one to a disk without a write cache. Therefore writes also count as settled
    :data:`SETTLED_AFTER` seconds after the last one.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._writes = self._flushed = self._runs = 0
        self._last = 0.0

    def wrote(self) -> None:
        """Count a write that its own command does not make durable."""
        if not self.run:
            self._runs += 1
        self._writes += 1
        self._last = self._clock()

    @property
    def writes(self) -> int:
        """Return the number of writes so far: those that a flush which begins now covers."""
        return self._writes

    def flushed(self, writes: int) -> None:
        """Record that a flush which covers the first ``writes`` writes has succeeded."""
        self._flushed = max(self._flushed, writes)

    def forget(self) -> None:
        """Forget all writes: the guest no longer has the disk."""
        self._flushed = self._writes

    @property
    def run(self) -> int:
        """Return the number, from 1, of the current series of unflushed and unsettled writes; 0 if there is none."""
        pending = self._writes > self._flushed and self._clock() - self._last < SETTLED_AFTER
        return self._runs if pending else 0


def _drop(event: DeviceEvent) -> None:
    """Drop an event of a unit that is not part of a device."""


@dataclass(slots=True, eq=False)
class LogicalUnit:
    """A SCSI unit and its store.

    Attributes:
        scsi: decides what commands do.
        store: holds the blocks; None while there is no medium.
        queues: whether several commands at a time are faster than one after the other.
        commands: the number of commands received.
        errors: the number of commands that failed because of the store.
        bytes_read: bytes read from the store and sent to the guest.
        bytes_written: bytes written to the store.
        share: what the guest may use; :meth:`use` sets it.
        lanes: where the steps of jobs wait for their turn.
        deferred_error: the error of a job whose command was aborted (SPC: deferred error): that of the next flush.
        number: the logical unit number; the device sets it.
        report: reports an event of the unit; the device sets it.
        unflushed: the writes that the guest has not flushed.
    """

    scsi: Unit | AbsentUnit
    store: Store | None
    queues: bool = field(default=True, init=False)
    commands: int = field(default=0, init=False)
    errors: int = field(default=0, init=False)
    bytes_read: int = field(default=0, init=False)
    bytes_written: int = field(default=0, init=False)
    share: Share = field(default=NO_PORT, init=False)
    lanes: Lanes = field(default_factory=Lanes, init=False)
    deferred_error: OSError | None = field(default=None, init=False)
    number: int = field(default=0, init=False)
    report: Callable[[DeviceEvent], None] = field(default=_drop, init=False)
    unflushed: Unflushed = field(default_factory=Unflushed, init=False)

    def use(self, share: Share) -> None:
        """Count work and memory in this share from now on."""
        self.share = share
        self.lanes.use(share)

    @property
    def name(self) -> str:
        """Return the name of the store, for the log."""
        return "no medium" if self.store is None else self.store.name

    @property
    def unfinished(self) -> int:
        """Return :attr:`Unflushed.run`: not 0 if files may be lost when the disk is unplugged now.

        0 also for a temporary store, which keeps nothing.
        """
        return 0 if self.store is None or self.store.temporary else self.unflushed.run

    async def close(self) -> None:
        """Close the store. A second call does nothing."""
        if self.store is not None:
            await self.store.close()


def absent_unit(luns: int) -> LogicalUnit:
    """Make the unit that answers for logical unit numbers which do not exist, in a device of ``luns`` units."""
    return LogicalUnit(AbsentUnit(luns), None)
