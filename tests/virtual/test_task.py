from __future__ import annotations

import errno

import pytest
from tests.virtual.bulk_only import Pattern, read10, write10

from farplug.scsi.disk import DiskUnit
from farplug.scsi.sense import (
    ABORTED_COMMAND,
    INVALID_FIELD_IN_CDB,
    MISCOMPARE,
    RESET_OCCURRED,
    UNRECOVERED_READ_ERROR,
    WRITE_ERROR,
)
from farplug.usb import Buffer, Direction
from farplug.virtual.job import STEP_MEMORY
from farplug.virtual.task import Task
from farplug.virtual.unit import LogicalUnit

FLUSH = bytes.fromhex("35 00 00 00 00 00 00 00 00 00")
VERIFY = bytes.fromhex("2f 00 00 00 00 00 00 00 08 00")
COMPARE = bytes.fromhex("2f 02 00 00 00 01 00 00 02 00")
EIO = OSError(errno.EIO, "broken")


class Bench:
    """A unit and a task on it."""

    def __init__(self, store: Pattern | None = None) -> None:
        self.store = store or Pattern()
        self.unit = LogicalUnit(DiskUnit(self.store), self.store)
        self.progressed = 0
        self.given: list[Buffer | None] = []
        self.done = 0

    def task(self, cdb: bytes) -> Task:
        return Task(self.unit, cdb, self.progress)

    def progress(self) -> None:
        self.progressed += 1

    def put(self, task: Task, begin: int, data: bytes) -> None:
        def done() -> None:
            self.done += 1

        task.put(begin, data, done)


@pytest.mark.parametrize(
    ("cdb", "direction", "transfer_length", "reads_store"),
    [
        (read10(0, 2), Direction.IN, 1024, True),
        (write10(0, 2), Direction.OUT, 1024, False),
        (COMPARE, Direction.OUT, 1024, False),
        (bytes.fromhex("12 00 00 00 24 00"), Direction.IN, 36, False),
        (bytes.fromhex("12 00 00 00 00 00"), None, 0, False),
        (bytes.fromhex("15 10 00 00 18 00"), Direction.OUT, 24, False),
        (VERIFY, None, 0, False),
        (bytes(6), None, 0, False),
        (b"\xff", None, 0, False),
    ],
)
def test_what_a_command_moves(cdb: bytes, direction: Direction | None, transfer_length: int, reads_store: bool) -> None:
    bench = Bench()
    task = bench.task(cdb)
    assert (task.direction, task.transfer_length, task.reads_store) == (direction, transfer_length, reads_store)
    assert (task.name, task.busy, bench.unit.commands, bench.store.log) == ("memory", False, 1, [])


def test_a_command_of_no_bytes() -> None:
    task = Bench().task(b"")
    assert (task.sense, task.finish()) == (INVALID_FIELD_IN_CDB, True)


def test_the_first_failure_counts() -> None:
    task = Bench().task(read10(0, 1))
    task.fail(ABORTED_COMMAND)
    task.fail(MISCOMPARE)
    assert task.sense is ABORTED_COMMAND


def test_reading() -> None:
    bench = Bench()
    task = bench.task(read10(1, 2))
    task.read(512, 512, bench.given.append)
    assert bench.given == [bench.store.original[1024:1536]]
    task.delivered(512)
    assert (task.moved, bench.unit.bytes_read) == (512, 512)
    bench.store.error = EIO
    task.read(0, 512, bench.given.append)
    assert (bench.given[1], task.sense, bench.progressed) == (None, UNRECOVERED_READ_ERROR, 0)


def test_reading_for_an_aborted_task() -> None:
    bench = Bench()
    task = bench.task(read10(1, 2))
    bench.store.holding = True
    task.read(0, 512, bench.given.append)
    task.abort()
    bench.store.error = EIO
    bench.store.release()
    assert (bench.given, task.sense) == ([None], None)


@pytest.mark.parametrize("error", [None, EIO])
def test_fetching(error: OSError | None) -> None:
    bench = Bench()
    task = bench.task(read10(1, 4))
    bench.store.error = error
    fetched: list[bool] = []
    task.fetch(2048, lambda: fetched.append(True))
    assert (fetched, task.sense, task.reads_store) == ([True], None, error is not None)
    bench.store.error = None
    task.read(1024, 512, bench.given.append)
    assert bench.given == [bench.store.original[1536:2048]]
    assert len(bench.store.log) == (1 if error is None else 2)


@pytest.mark.parametrize("cuts", [[1024], [512, 512], [100, 924], [1, 600, 423], [700, 324]])
def test_blocks_are_written_whole(cuts: list[int]) -> None:
    bench = Bench()
    task = bench.task(write10(2, 2))
    begin = 0
    for cut in cuts:
        bench.put(task, begin, bytes((cut & 0xFF,)) * cut)
        begin += cut
    expected = b"".join(bytes((cut & 0xFF,)) * cut for cut in cuts)
    assert bytes(bench.store.content[1024:2048]) == expected
    assert all(int(entry.split()[2]) % 512 == 0 for entry in bench.store.log)
    assert (bench.done, task.moved, bench.unit.bytes_written, task.finish()) == (len(cuts), 1024, 1024, True)


def test_a_durable_write() -> None:
    bench = Bench()
    task = bench.task(write10(0, 1, fua=True))
    bench.store.holding = True
    bench.put(task, 0, bytes(512))
    assert (task.finish(), task.busy, bench.done) == (False, True, 0)
    bench.store.release(1)
    assert (task.finish(), bench.store.log, bench.done) == (False, ["write 0 512", "flush"], 1)
    bench.store.release(1)
    assert (task.finish(), bench.progressed, task.sense) == (True, 2, None)


def test_a_write_that_fails() -> None:
    bench = Bench()
    task = bench.task(write10(0, 3, fua=True))
    bench.put(task, 0, bytes(512))
    bench.store.error = EIO
    bench.put(task, 512, bytes(512))
    assert (task.sense, task.moved) == (WRITE_ERROR, 0)
    bench.store.error = None
    bench.put(task, 1024, b"\xff" * 512)
    assert (bench.done, task.finish(), bench.unit.bytes_written) == (3, True, 512)
    assert bench.store.log == ["write 0 512", "write 512 512"]  # and nothing is flushed


@pytest.mark.parametrize(
    ("data", "error", "sense"),
    [(0, None, None), (1, None, MISCOMPARE), (0, EIO, UNRECOVERED_READ_ERROR)],
)
def test_comparing(data: int, error: OSError | None, sense: object) -> None:
    bench = Bench()
    bench.store.error = error
    task = bench.task(COMPARE)
    bench.put(task, 0, bench.store.original[512:1024])
    bench.put(task, 512, bench.store.original[1024 + data : 1536 + data])
    assert (task.sense, task.finish(), task.moved) == (sense, True, 0 if sense else 1024)


def test_parameters() -> None:
    bench = Bench()
    task = bench.task(bytes.fromhex("15 10 00 00 18 00"))
    bench.put(task, 0, bytes.fromhex("00000000 0812"))
    bench.put(task, 6, bytes(18))
    assert (task.sense, task.moved, bench.store.log, bench.done) == (None, 24, ["flush"], 2)
    task = bench.task(bytes.fromhex("15 10 00 00 18 00"))
    bench.put(task, 0, b"\xff" * 24)
    assert task.sense is not None


def test_work_before_data() -> None:
    bench = Bench()
    bench.store.holding = True
    task = bench.task(bytes.fromhex("28 08 00 00 00 05 00 00 01 00"))
    assert bench.store.log == []
    task.start()
    assert (bench.store.log, task.busy) == (["flush"], True)
    bench.store.release()
    assert (task.busy, bench.progressed) == (False, 1)


def test_a_deferred_error_is_reported_by_the_next_flush() -> None:
    bench = Bench()
    bench.store.holding = True
    for cdb in (FLUSH, VERIFY):
        task = bench.task(cdb)
        task.start()
        task.abort()
        assert len(bench.store.held) == 1
        bench.store.error = EIO
        bench.store.release()
        bench.store.error = None
        assert (bench.unit.deferred_error is EIO) == (cdb == FLUSH)
        bench.store.holding = False
        for sense in (WRITE_ERROR, None) if cdb == FLUSH else (None,):
            task = bench.task(FLUSH)
            task.start()
            assert (task.sense, task.finish()) == (sense, True)
        bench.store.holding = True


@pytest.mark.parametrize("name", ["FLUSH", "VERIFY", "ZERO", "FILL"])
def test_aborted_jobs_occupy_one_step_in_the_store(name: str) -> None:
    """Jobs that run and those whose command was aborted share it; the others wait, and end at once when aborted."""
    bench = Bench()
    bench.store.holding = True
    memory = bench.unit.share.memory

    def start() -> Task:
        cdb = {"FLUSH": FLUSH, "VERIFY": VERIFY, "ZERO": ZERO, "FILL": WRITE_SAME}[name]
        task = bench.task(cdb)
        task.start()
        if name == "FILL":
            bench.put(task, 0, b"\xaa" * 512)
        return task

    before = memory.used
    for _ in range(300):
        start().abort()
    assert len(bench.store.held) == 1
    assert memory.used - before == STEP_MEMORY
    task = start()
    assert (task.busy, len(bench.store.held)) == (True, 1)
    bench.store.release(1)
    assert (task.busy, len(bench.store.held)) == (True, 1)
    bench.store.release()
    assert (task.sense, task.finish(), memory.used) == (None, True, before)


def _run(bench: Bench, cdb: bytes, data: bytes = b"") -> None:
    task = bench.task(cdb)
    task.start()
    if data:
        bench.put(task, 0, data)
    task.finish()


WRITE_SAME = bytes.fromhex("41 00 00 00 00 01 00 00 02 00")
ZERO = bytes.fromhex("93 01 00 00 00 00 00 00 00 01 00 00 00 02 00 00")
UNMAP = bytes.fromhex("42 00 00 00 00 00 00 00 18 00")
EXTENT = bytes.fromhex("0016 0010 00000000  0000000000000001 00000002 00000000")
CACHE_OFF = bytes.fromhex("00 00 00 00  08 12") + bytes(18)


@pytest.mark.parametrize(
    ("cdb", "data", "unfinished"),
    [
        (write10(0, 1), bytes(512), True),
        (write10(0, 1, fua=True), bytes(512), False),
        (bytes.fromhex("2e 00 00 00 00 00 00 00 01 00"), bytes(512), False),  # WRITE AND VERIFY
        (COMPARE, bytes(1024), False),
        (read10(0, 1), b"", False),
        (WRITE_SAME, bytes(512), True),
        (WRITE_SAME, b"x" * 512, True),
        (ZERO, b"", True),
        (UNMAP, EXTENT, True),
    ],
)
def test_commands_that_leave_unflushed_writes(cdb: bytes, data: bytes, unfinished: bool) -> None:
    bench = Bench(Pattern(unmaps=True))
    _run(bench, cdb, data)
    assert bool(bench.unit.unfinished) is unfinished


@pytest.mark.parametrize(
    ("cdb", "data", "flushes"),
    [
        (FLUSH, b"", True),
        (bytes.fromhex("1b 00 00 00 00 00"), b"", True),  # STOP
        (bytes.fromhex("1b 00 00 00 01 00"), b"", False),  # START
        (write10(0, 1, fua=True), bytes(512), False),
        (bytes.fromhex("28 08 00 00 00 00 00 00 01 00"), b"", False),  # READ with FUA
        (bytes.fromhex("15 10 00 00 18 00"), CACHE_OFF, False),
        (bytes(6), b"", False),
    ],
)
def test_commands_that_flush(cdb: bytes, data: bytes, flushes: bool) -> None:
    bench = Bench()
    _run(bench, write10(0, 1), bytes(512))
    _run(bench, cdb, data)
    assert bool(bench.unit.unfinished) is not flushes


def test_with_the_cache_off_writes_are_durable_and_the_file_system_may_have_more() -> None:
    bench = Bench()
    _run(bench, bytes.fromhex("15 10 00 00 18 00"), CACHE_OFF)
    _run(bench, write10(0, 1), bytes(512))
    assert bench.store.log == ["flush", "write 0 512", "flush"]
    assert bench.unit.unfinished


def test_a_flush_covers_what_was_written_before_it() -> None:
    bench = Bench()
    _run(bench, write10(0, 1), bytes(512))
    bench.store.holding = True
    _run(bench, FLUSH)
    assert bench.unit.unfinished, "it is not done"
    _run(bench, write10(0, 1), bytes(512))
    bench.store.release()
    assert bench.unit.unfinished
    bench.store.holding = False
    bench.store.error = EIO
    _run(bench, FLUSH)
    assert bench.unit.unfinished, "it failed"
    bench.store.error = None
    _run(bench, FLUSH)
    assert not bench.unit.unfinished
    bench.store.holding = True
    _run(bench, ZERO)
    flush = bench.task(FLUSH)
    flush.start()
    bench.store.release()
    assert bench.unit.unfinished, "a flush that began during the work covers only a part of it"


def test_a_unit_attention_goes_to_the_first_command() -> None:
    bench = Bench()
    bench.unit.scsi.reset()
    assert bench.task(bytes.fromhex("12 00 00 00 24 00")).sense is None
    assert [bench.task(bytes(6)).sense for _ in range(3)] == [RESET_OCCURRED, None, None]
