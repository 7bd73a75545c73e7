"""A logical unit: what decides about SCSI commands, and the store behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from farplug.scsi.unit import AbsentUnit, Unit
from farplug.store.base import Store
from farplug.usb.device import DeviceEvent


def _unheard(event: DeviceEvent) -> None:
    """A unit that is not part of a device reports to nobody."""


@dataclass(slots=True, eq=False)
class LogicalUnit:
    """A SCSI unit and its store.

    Attributes:
        scsi: decides what commands do.
        store: where the blocks are; None while there is no medium.
        commands: how many were taken.
        bytes_read: from the store, delivered.
        bytes_written: to the store.
        lingering: jobs under way whose commands are gone.
        unreported: an error of work whose command was gone when it failed. The next flush fails with it.
        report: reports an event of the unit; its device sets it.
    """

    scsi: Unit | AbsentUnit
    store: Store | None
    commands: int = field(default=0, init=False)
    bytes_read: int = field(default=0, init=False)
    bytes_written: int = field(default=0, init=False)
    lingering: int = field(default=0, init=False)
    unreported: OSError | None = field(default=None, init=False)
    report: Callable[[DeviceEvent], None] = field(default=_unheard, init=False)

    @property
    def name(self) -> str:
        """For the log."""
        return "no medium" if self.store is None else self.store.name

    async def close(self) -> None:
        """Give the store back. Does nothing the second time."""
        if self.store is not None:
            await self.store.close()


def absent_unit(luns: int) -> LogicalUnit:
    """Make what answers for a logical unit number that does not exist, beside so many that do."""
    return LogicalUnit(AbsentUnit(luns), None)
