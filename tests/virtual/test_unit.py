from __future__ import annotations

from tests.virtual.bulk_only import Pattern

from farplug.scsi.cdb import Fail
from farplug.scsi.disk import DiskUnit
from farplug.scsi.sense import LOGICAL_UNIT_NOT_SUPPORTED
from farplug.virtual.unit import SETTLED_AFTER, LogicalUnit, Unflushed, absent_unit


def test_a_new_unit() -> None:
    store = Pattern()
    unit = LogicalUnit(DiskUnit(store), store)
    assert (unit.name, unit.commands, unit.bytes_read, unit.bytes_written) == ("memory", 0, 0, 0)
    assert unit.deferred_error is None
    assert unit != LogicalUnit(unit.scsi, store)  # units are compared by identity


def test_unflushed_writes() -> None:
    now = 1000.0
    unflushed = Unflushed(lambda: now)
    assert unflushed.run == 0
    unflushed.wrote()
    unflushed.wrote()
    assert (unflushed.writes, unflushed.run) == (2, 1)
    covered = unflushed.writes
    unflushed.wrote()
    unflushed.flushed(covered)
    assert unflushed.run == 1, "a write came while the flush was in flight"
    unflushed.flushed(unflushed.writes)
    unflushed.flushed(covered)
    assert unflushed.run == 0, "a flush that began earlier and ends later changes nothing"
    unflushed.wrote()
    assert unflushed.run == 2
    unflushed.forget()
    assert unflushed.run == 0


def test_writes_settle_without_a_flush() -> None:
    now = 1000.0
    unflushed = Unflushed(lambda: now)
    unflushed.wrote()
    now += SETTLED_AFTER - 1
    unflushed.wrote()
    now += SETTLED_AFTER - 1
    assert unflushed.run == 1
    now += 1
    assert unflushed.run == 0
    unflushed.wrote()
    assert unflushed.run == 2


def test_writes_to_a_temporary_store_are_lost_anyway() -> None:
    store = Pattern()
    unit = LogicalUnit(DiskUnit(store), store)
    unit.unflushed.wrote()
    assert unit.unfinished == 1
    store.temporary = True
    assert unit.unfinished == 0


def test_a_unit_that_does_not_exist() -> None:
    unit = absent_unit(1)
    assert unit.unfinished == 0
    assert unit.name == "no medium"
    assert unit.scsi.execute(bytes(6)) == Fail(LOGICAL_UNIT_NOT_SUPPORTED)
