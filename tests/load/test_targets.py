from __future__ import annotations

from pathlib import Path

import pytest

from farplug.errors import Reason, UsageError
from farplug.load import targets
from farplug.load.targets import Pool, read_targets, read_vv


def test_targets_go_round_and_those_of_a_dead_worker_are_free_again() -> None:
    pool = Pool(["a", "b", "c"])
    leases = [pool.acquire(holder) for holder in ("one", "two", "two")]
    assert [lease.target for lease in leases] == ["a", "b", "c"]
    with pytest.raises(UsageError, match="all 3 are in use") as caught:
        pool.acquire("one")
    assert caught.value.reason is Reason.BUSY
    assert pool.holders == {"one", "two"}
    pool.drop("two")
    assert pool.holders == {"one"}
    pool.release(leases[1].number)  # too late: its worker has died
    pool.release(leases[0].number)
    assert [pool.acquire("one").target for _ in range(3)] == ["b", "c", "a"]
    assert not pool.used_up


def test_a_limit_of_sessions() -> None:
    pool = Pool(["a"], limit=2)
    for _ in range(2):
        assert not pool.used_up
        lease = pool.acquire("one")
        assert not pool.over
        pool.release(lease.number)
    assert pool.used_up
    assert pool.over
    pool.reset()
    assert not pool.used_up


def test_the_list(tmp_path: Path) -> None:
    path = tmp_path / "targets"
    path.write_text("# VMs\n\n spice://one:5900 \r\nconsole.vv\n")
    assert read_targets(path) == ["spice://one:5900", "console.vv"]


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (b"", Reason.EMPTY, "empty"),
        (b"\n# nothing\n  \n", Reason.EMPTY, "empty"),
        (b"a\nb\na\n", Reason.BAD_TARGET, "listed twice"),
        (b"\xff\xfe", Reason.WRONG_FORMAT, "is not UTF-8"),
        (b"x" * 5000, Reason.TOO_LARGE, "longer than 4096 bytes"),
        (None, Reason.NOT_FOUND, "cannot be read"),
    ],
)
def test_a_list_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reason: Reason, message: str
) -> None:
    monkeypatch.setattr(targets, "MAX_LIST", 4096)
    path = tmp_path / "targets"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_targets(path)
    assert caught.value.reason is reason


def test_a_vv_file_is_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "console.vv"
    path.write_text("[virt-viewer]\ndelete-this-file=1\n")
    assert read_vv(path) == path.read_text()
    path.write_bytes(bytes(targets.MAX_VV + 1))
    with pytest.raises(UsageError, match="longer than"):
        read_vv(path)
