"""A power cut loses what was not flushed: the strong form, on a store that remembers what a disk may forget.

One guest works on ext4, while the store keeps a log of its writes and flushes. Then
the power is cut on the host, hundreds of times: at a point of the log the image is everything that a finished flush
covers, and of what was written since a random part, torn at sectors of 512 bytes, as a disk's volatile cache would
leave it. Every file whose fsync had returned in the guest must be there.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY, MIB, STORAGE, blank, disk_of, enable_unmap, plugged
from tests.guest.recovery import recovered
from tests.guest.scripts import worker
from tests.long import in_full

from farplug.programs import find_program
from farplug.store import MemoryStore, WriteDone
from farplug.store.base import Stopped, never_stopped
from farplug.usb import Buffer
from farplug.virtual import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

POINTS = 10 * int(os.environ.get("FARPLUG_POWER_CUTS", "4"))
"""How often the power is cut (make powercut: thousands of times)."""

SECTOR = 512


@dataclass(frozen=True)
class Written:
    """A write to the store; data None: zeros, from UNMAP or WRITE SAME."""

    offset: int
    length: int
    data: bytes | None


@dataclass(frozen=True)
class Flushed:
    """The end of a flush that began when the log had ``since`` entries."""

    since: int


class VolatileStore(MemoryStore):
    """A store with a volatile cache: it keeps a log of its writes and flushes.

    Operations complete a moment later, in any order, which reveals an acknowledgement that is sent too early.

    Attributes:
        log: what happened, in order.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.unmaps = True
        self.log: list[Written | Flushed] = []

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        kept = bytes(data)
        self.content[offset : offset + len(kept)] = kept
        self.log.append(Written(offset, len(kept), kept))
        self._later(lambda: done(None))

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self.content[offset : offset + length] = bytes(length)
        self.log.append(Written(offset, length, None))
        self._later(lambda: done(None))

    def flush(self, done: WriteDone) -> None:
        since = len(self.log)

        def finished() -> None:
            self.log.append(Flushed(since))
            done(None)

        self._later(finished)

    def _later(self, then: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(random.uniform(0, 0.002), then)


class PowerCuts:
    """Images as a power cut leaves them, at later and later points of a log.

    Args:
        content: what the disk held first.
        log: what happened to it.
        forgets: even what was flushed.
    """

    def __init__(self, content: bytes, log: Sequence[Written | Flushed], *, forgets: bool = False) -> None:
        self._durable = bytearray(content)
        self._log = log
        self._forgets = forgets
        self._flushed = 0
        """How many entries of the log are durable."""

    def image(self, point: int) -> bytearray:
        """Return the image after ``point`` entries."""
        if not self._forgets:
            covered = [entry.since for entry in self._log[:point] if isinstance(entry, Flushed)]
            flushed = max(covered, default=0)
            for entry in self._log[self._flushed : flushed]:
                self._apply(self._durable, entry, 1)
            self._flushed = flushed
        image = bytearray(self._durable)
        survives = random.choice((0, 0.2, 0.5, 0.9, 1))
        for entry in self._log[self._flushed : point]:
            self._apply(image, entry, survives)
        return image

    def _apply(self, image: bytearray, entry: Written | Flushed, survives: float) -> None:
        """Write an entry, or those of its sectors that survive."""
        if isinstance(entry, Flushed):
            return
        data = entry.data if entry.data is not None else bytes(entry.length)
        torn = 0 < survives < 1 and random.random() < 0.5
        whole = random.random() < survives
        for start in range(0, entry.length, SECTOR if torn else entry.length):
            if random.random() < survives if torn else whole:
                end = start + SECTOR if torn else entry.length
                image[entry.offset + start : entry.offset + end] = data[start:end]


class Marks(MemoryStore):
    """Records the marks of ``scripts/worker.py``: a mark is written after the event, so the log is long enough then.

    Attributes:
        confirmed: how long the log was when the fsync of a file had returned, by its name.
        removed: how long it was before the file was removed.
    """

    def __init__(self, log: Sequence[Written | Flushed]) -> None:
        super().__init__(MIB)
        self.confirmed: dict[str, int] = {}
        self.removed: dict[str, int] = {}
        self._log = log

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        kind, name = worker.parse_mark(bytes(data))
        {"+": self.confirmed, "-": self.removed}[kind][name] = len(self._log)
        super().write(offset, data, done)

    def durable(self, point: int) -> list[str]:
        """The files that must be there when the power is cut at this point of the log."""
        return [name for name, since in self.confirmed.items() if since <= point <= self.removed.get(name, point)]

    def check(self, cuts: PowerCuts, points: Sequence[int], folder: Path) -> None:
        """The file system recovers, and every file is there that must be, at each of these points."""
        path = folder / "cut.raw"
        for point in sorted(points):
            path.write_bytes(cuts.image(point))
            shutil.rmtree(folder / "files", ignore_errors=True)
            files = recovered(path, folder / "files")
            for name in self.durable(point):
                assert files.get(name) == worker.file_content(name), f"{name} is lost at {point} of {len(self._log)}"


@pytest.mark.timeout(400 + POINTS)
@pytest.mark.parametrize("storage", ["uas", *in_full("bot")])
async def test_what_fsync_confirmed_survives(guests: Guests, tmp_path: Path, storage: str) -> None:
    guest = await guests.get(LABORATORY)
    image = blank(tmp_path / "disk.raw", 24 * MIB)
    subprocess.run([find_program("mke2fs"), "-q", "-F", "-t", "ext4", image], check=True, timeout=GUEST_TIMEOUT)
    first = image.read_bytes()
    store = VolatileStore(first)
    marks = Marks(store.log)
    devices = disk_device(store, transport=STORAGE[storage].transport), disk_device(marks)
    async with plugged(guest.targets[0], devices[0]), plugged(guest.targets[1], devices[1]):
        disk, other = [await disk_of(guest, device) for device in devices]
        await enable_unmap(guest, disk, storage)
        await guest.check(f"mount -o discard {disk} /mnt")
        await guest.check(f"python3 /scripts/worker.py {other}")
        await guest.check("umount /mnt")
    for device in devices:
        await device.dispose()
    assert len(marks.confirmed) == worker.WORKERS * worker.FILES
    assert any(isinstance(entry, Written) and entry.data is None for entry in store.log), "space was freed"
    # Anywhere, and right where an fsync has just returned.
    ends = tuple(marks.confirmed.values())
    points = [random.choice((random.randrange(len(store.log)), random.choice(ends))) for _ in range(POINTS)]
    marks.check(PowerCuts(first, store.log), points, tmp_path)
    # A disk that forgets what it flushed is found out.
    with pytest.raises(AssertionError):
        marks.check(PowerCuts(first, store.log, forgets=True), points, tmp_path)
