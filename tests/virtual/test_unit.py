from __future__ import annotations

from tests.virtual.bulk_only import Pattern

from farplug.scsi.cdb import Fail
from farplug.scsi.disk import DiskUnit
from farplug.scsi.sense import LOGICAL_UNIT_NOT_SUPPORTED
from farplug.virtual.unit import LogicalUnit, absent_unit


def test_a_new_unit() -> None:
    store = Pattern()
    unit = LogicalUnit(DiskUnit(store), store)
    assert (unit.name, unit.commands, unit.bytes_read, unit.bytes_written) == ("memory", 0, 0, 0)
    assert (unit.lingering, unit.unreported) == (0, None)
    assert unit != LogicalUnit(unit.scsi, store)  # two with equal figures are two


def test_a_unit_that_does_not_exist() -> None:
    unit = absent_unit(1)
    assert unit.name == "no medium"
    assert unit.scsi.execute(bytes(6)) == Fail(LOGICAL_UNIT_NOT_SUPPORTED)
