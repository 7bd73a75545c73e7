from __future__ import annotations

import errno

import pytest
from tests.virtual.bulk_only import Pattern

from farplug.scsi.cdb import Fill, Flush, Verify, Work, Zero
from farplug.scsi.sense import SPACE_ALLOCATION_FAILED, UNRECOVERED_READ_ERROR, WRITE_ERROR, Sense
from farplug.virtual.job import Lanes, StoreJob, job_sense

MIB = 1 << 20
BLOCK = b"\xaa" * 512

WORK: list[tuple[Work, list[str]]] = [
    (Flush(), ["flush"]),
    (Verify(1, 2), ["read 512 1024"]),
    (Verify(0, 4097), [f"read 0 {MIB}", f"read {MIB} {MIB}", f"read {2 * MIB} 512"]),
    (Zero(((1, 2), (5, 1)), unmap=True, durable=False), ["unmap 512 1024", "unmap 2560 512"]),
    (Zero(((1, 2),), unmap=False, durable=True), ["zero 512 1024", "flush"]),
    (Fill(3, 2, BLOCK, durable=False), ["write 1536 1024"]),
    (Fill(0, 2049, BLOCK, durable=True), [f"write 0 {MIB}", f"write {MIB} 512", "flush"]),
]


@pytest.mark.parametrize(("work", "steps"), WORK, ids=[type(work).__name__ for work, _ in WORK])
@pytest.mark.parametrize("holding", [False, True])
def test_steps(work: Work, steps: list[str], holding: bool) -> None:
    store = Pattern(8192)
    store.holding = holding
    ended: list[OSError | None] = []
    StoreJob(store, Lanes(), work, ended.append)
    for number in range(len(steps) * holding):
        assert store.log == steps[: number + 1]  # one at a time
        assert not ended
        store.release(1)
    assert (store.log, ended) == (steps, [None])


@pytest.mark.parametrize(("work", "steps"), WORK, ids=[type(work).__name__ for work, _ in WORK])
def test_an_error_ends_it(work: Work, steps: list[str], caplog: pytest.LogCaptureFixture) -> None:
    store = Pattern(8192)
    store.error = OSError(errno.EIO, "broken")
    ended: list[OSError | None] = []
    StoreJob(store, Lanes(), work, ended.append)
    assert (store.log, ended) == (steps[:1], [store.error])
    assert f"memory: {type(work).__name__.lower()} failed: [Errno {errno.EIO}] broken" in caplog.text


def test_stopped() -> None:
    store = Pattern(8192)
    store.holding = True
    ended: list[OSError | None] = []
    job = StoreJob(store, Lanes(), Fill(0, 8192, BLOCK, durable=True), ended.append)
    store.release(1)
    job.stop()
    store.release()
    assert (len(store.log), ended) == (2, [None])


def test_many_steps_at_once_do_not_nest() -> None:
    store = Pattern(8)
    ended: list[OSError | None] = []
    StoreJob(store, Lanes(), Zero(((0, 1),) * 5000, unmap=True, durable=False), ended.append)
    assert (len(store.log), ended) == (5000, [None])


@pytest.mark.parametrize(
    ("work", "number", "sense"),
    [
        (Flush(), errno.EIO, WRITE_ERROR),
        (Verify(0, 1), errno.EIO, UNRECOVERED_READ_ERROR),
        (Fill(0, 1, BLOCK, durable=False), errno.ENOSPC, SPACE_ALLOCATION_FAILED),
        (Fill(0, 1, BLOCK, durable=False), errno.EDQUOT, SPACE_ALLOCATION_FAILED),
        (Zero(((0, 1),), unmap=True, durable=False), errno.EIO, WRITE_ERROR),
    ],
)
def test_sense(work: Work, number: int, sense: Sense) -> None:
    assert job_sense(work, OSError(number, "broken")) == sense


def test_a_store_that_raises_delays_no_other_job(monkeypatch: pytest.MonkeyPatch) -> None:
    store, lanes = Pattern(), Lanes()
    ended: list[OSError | None] = []
    with monkeypatch.context() as broken:
        broken.setattr(store, "flush", lambda done: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            StoreJob(store, lanes, Flush(), ended.append)
    StoreJob(store, lanes, Flush(), ended.append)
    assert ended == [None]
