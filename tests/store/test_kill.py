"""kill -9 at any moment. FARPLUG_KILLS is the number of kills, for runs longer than that of CI."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store.killed import BLOCKS
from tests.store.power import SECTOR, ZEROS, Event, FlushCalled, FlushDone, Guarantees, Issued, WriteDone, pattern
from tests.store.support import content

from farplug.store import OverlayStore, overlay

KILLS = int(os.environ.get("FARPLUG_KILLS", "30"))
SIZE = len(BLOCKS) * SECTOR


class Victims:
    """Starts processes and kills them."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
        command = [sys.executable, "-m", "tests.store.killed"]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, env=environment)

    def kill(self, kind: str, base: Path, snapshot: Path, number: int, chance: random.Random) -> list[list[str]]:
        """Run a process until it is killed, and return its reports.

        A process with an even number kills itself after a report. Others are killed from here, a moment later.
        """
        assert self._process.stdin
        assert self._process.stdout
        after, later = chance.randrange(1, 100 if kind == "commit" else 400), chance.choice((0, 0.0005, 0.003))
        left = 0 if number % 2 else after
        self._process.stdin.write(f"{kind}\t{base}\t{snapshot}\t{number}\t{left}\n".encode())
        self._process.stdin.flush()
        pid = 0
        reported: list[list[str]] = []
        killed = bool(left)
        for line in self._process.stdout:
            words = line.decode().split()
            if words == ["end"]:
                return reported
            if words[0] == "pid":
                pid = int(words[1])
            else:
                reported.append(words)
            if pid and len(reported) >= after and not killed:
                time.sleep(later)
                os.kill(pid, signal.SIGKILL)
                killed = True
        raise AssertionError("the helper process ended")

    def end(self) -> None:
        self._process.communicate(timeout=100)


@pytest.fixture
def victims() -> Iterator[Victims]:
    several = Victims()
    yield several
    several.end()


def events(reported: list[list[str]]) -> Iterator[Event]:
    for kind, *words in reported:
        numbers = [int(word) for word in words]
        match kind:
            case "issued":
                number, block, count, zeros = numbers
                yield Issued(number, block, (ZEROS,) * count if zeros else pattern(number, count))
            case "written":
                yield WriteDone(numbers[0])
            case "called":
                yield FlushCalled(numbers[0])
            case "flushed":
                yield FlushDone(numbers[0])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["image", "snapshot"])
def test_confirmed_writes_survive(tmp_path: Path, victims: Victims, kind: str) -> None:
    """Flushed writes survive, as on a disk with a write cache."""
    chance = random.Random(7)
    base, snapshot = tmp_path / "base.raw", tmp_path / "changes"
    current = chance.randbytes(SIZE)
    base.write_bytes(current)
    before, flushed = current, 0
    for kill in range(1, KILLS + 1):
        reported = victims.kill(kind, base, snapshot, kill, chance)
        guarantees = Guarantees(current, write_through=False)
        for event in events(reported):
            guarantees.record(event)
            flushed += isinstance(event, FlushDone)
        current = content(base) if kind == "image" else read_all(base, snapshot)
        guarantees.check(current)
    assert flushed > KILLS
    assert current != before
    if kind == "snapshot":
        assert content(base) == before
        overlay.commit(snapshot, base)
        assert content(base) == current


def read_all(base: Path, path: Path) -> bytes:
    store = OverlayStore.open(base, path)
    data = bytearray(SIZE)
    store._read_blocking(memoryview(data), 0)
    store._close_files()
    return bytes(data)


@pytest.mark.timeout(600)
def test_a_commit_can_be_repeated(tmp_path: Path, victims: Victims) -> None:
    chance = random.Random(9)
    base, path = tmp_path / "base.raw", tmp_path / "changes"
    before = chance.randbytes(SIZE)
    base.write_bytes(before)
    store = OverlayStore.open(base, path)
    for begin in range(0, SIZE - 4096, 8192):
        store._write_blocking(memoryview(chance.randbytes(4096)), begin)
    store._close_files()
    snapshot, after, status = content(path), read_all(base, path), base.stat()
    halves = 0
    for kill in range(KILLS):
        victims.kill("commit", base, path, kill, chance)
        if path.exists():
            halves += overlay.info(path).half_committed
            if chance.random() < 0.5:
                continue  # kill the next one, too
            overlay.commit(path, base)
        assert content(base) == after
        base.write_bytes(before)
        path.write_bytes(snapshot)
        os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert halves >= KILLS // 2
