"""A simulated power cut: writes of a program are recorded, and any part of those that are not synced may be lost.

The medium writes sectors of 512 bytes as a whole, and guarantees nothing else: of the writes since the last sync of a
file, any sectors may have reached it. Names of files are durable when their folder was synced.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest

from farplug.store import Store, holes
from farplug.usb import Buffer

SECTOR = 512
ZEROS = bytes(SECTOR)


@dataclass(frozen=True, slots=True)
class Wrote:
    path: Path
    sector: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Zeroed:
    path: Path
    sector: int
    count: int


@dataclass(frozen=True, slots=True)
class Resized:
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Synced:
    path: Path


@dataclass(frozen=True, slots=True)
class Unlinked:
    path: Path


@dataclass(frozen=True, slots=True)
class Issued:
    """The host writes blocks, from ``block`` on; the content of each."""

    number: int
    block: int
    contents: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WriteDone:
    number: int


@dataclass(frozen=True, slots=True)
class FlushCalled:
    number: int


@dataclass(frozen=True, slots=True)
class FlushDone:
    number: int


@dataclass(frozen=True, slots=True)
class Opened:
    """The store is open: from now on it must be possible to open it again."""


Change: TypeAlias = Wrote | Zeroed | Resized
Event: TypeAlias = Change | Synced | Unlinked | Issued | WriteDone | FlushCalled | FlushDone | Opened


def record(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Record all writes from now on. They are made, too, but not really synced."""
    log: list[Event] = []
    pwrite, ftruncate, zero_range, unlink = os.pwrite, os.ftruncate, holes.zero_range, Path.unlink

    def path_of(fd: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))

    def pwrite_recorded(fd: int, data: Buffer, offset: int) -> int:
        assert not offset % SECTOR
        assert not len(data) % SECTOR
        log.append(Wrote(path_of(fd), offset // SECTOR, bytes(data)))
        return pwrite(fd, data, offset)

    def zero_range_recorded(fd: int, offset: int, length: int, *, unmap: bool) -> bool:
        assert not offset % SECTOR
        assert not length % SECTOR
        log.append(Zeroed(path_of(fd), offset // SECTOR, length // SECTOR))
        return zero_range(fd, offset, length, unmap=unmap)

    def ftruncate_recorded(fd: int, size: int) -> None:
        log.append(Resized(path_of(fd), size))
        ftruncate(fd, size)

    def unlink_recorded(self: Path, missing_ok: bool = False) -> None:
        log.append(Unlinked(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(os, "pwrite", pwrite_recorded)
    monkeypatch.setattr(os, "ftruncate", ftruncate_recorded)
    monkeypatch.setattr(holes, "zero_range", zero_range_recorded)
    monkeypatch.setattr(Path, "unlink", unlink_recorded)
    for name in ("fdatasync", "fsync"):
        monkeypatch.setattr(os, name, lambda fd: log.append(Synced(path_of(fd))))
    return log


@dataclass
class Medium:
    """The medium of one file: sectors that are not zero, its size, and changes that are not synced yet."""

    sectors: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    pending: list[Change] = field(default_factory=list)

    @classmethod
    def holding(cls, content: bytes) -> Medium:
        sectors = {at // SECTOR: content[at : at + SECTOR] for at in range(0, len(content), SECTOR)}
        return cls(sectors, len(content))

    def sync(self) -> None:
        for change in self.pending:
            self._apply(change, lambda: True)
        self.pending.clear()

    def after_a_cut(self, chance: random.Random, share: float) -> Medium:
        """Return a possible medium after a power cut, with about this share of the sectors that were not synced."""
        medium = Medium(dict(self.sectors), self.size)
        for change in self.pending:
            medium._apply(change, lambda: chance.random() < share)
        return medium

    def _apply(self, change: Change, reached: Callable[[], bool]) -> None:
        match change:
            case Resized(_, size):
                if reached():
                    self.size = size
            case Wrote(_, first, data):
                for number in range(len(data) // SECTOR):
                    if reached():
                        self.sectors[first + number] = data[number * SECTOR : (number + 1) * SECTOR]
            case Zeroed(_, first, count):
                for sector in range(first, first + count):
                    if reached():
                        self.sectors.pop(sector, None)

    def save(self, path: Path) -> None:
        """Write the medium to a new file: ext4 would flush a file that was truncated to zero at once."""
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            for sector, data in self.sectors.items():
                file.seek(sector * SECTOR)
                file.write(data)
            file.truncate(max(self.size, file.seek(0, os.SEEK_END)))

    def content(self) -> bytes:
        return b"".join(self.sectors.get(number, ZEROS) for number in range(-(-self.size // SECTOR)))[: self.size]


class Guarantees:
    """The contents that each block may have: that of the last confirmed flush, or of a write since then.

    Args:
        content: initial content of all blocks to check.
        first: number of the first block.
        write_through: every confirmed write is durable.
    """

    def __init__(self, content: bytes, first: int = 0, *, write_through: bool = False) -> None:
        self._first = first
        self._history = [[content[at : at + SECTOR]] for at in range(0, len(content), SECTOR)]
        self._floor = [0] * len(self._history)
        self._write_through = write_through
        self._covered: dict[int, list[int]] = {}
        self._writes: dict[int, list[tuple[int, int]]] = {}

    def record(self, event: Event) -> None:
        match event:
            case Issued(number, block, contents):
                self._writes[number] = []
                for at, content in enumerate(contents, block - self._first):
                    self._history[at].append(content)
                    self._writes[number].append((at, len(self._history[at]) - 1))
            case WriteDone(number):
                if self._write_through:
                    for at, index in self._writes[number]:
                        self._floor[at] = max(self._floor[at], index)
            case FlushCalled(number):
                self._covered[number] = [len(history) - 1 for history in self._history]
            case FlushDone(number):
                self._floor = [max(pair) for pair in zip(self._floor, self._covered.pop(number), strict=True)]
            case _:
                pass

    def check(self, content: Buffer) -> None:
        assert len(content) == len(self._history) * SECTOR
        for number, history in enumerate(self._history):
            block = bytes(content[number * SECTOR : (number + 1) * SECTOR])
            assert block in history[self._floor[number] :], (
                f"block {self._first + number} begins with {block[:8].hex(' ')}"
            )


def pattern(number: int, count: int) -> tuple[bytes, ...]:
    """Return the blocks of the write with this number."""
    return (number.to_bytes(4, "big") * (SECTOR // 4),) * count


class Host:
    """Makes random writes, zeros and flushes, several at a time, and reports calls and completions."""

    def __init__(
        self, store: Store, chance: random.Random, report: Callable[[Event], None], blocks: range, number: int = 0
    ) -> None:
        self._store = store
        self._chance = chance
        self._report = report
        self._blocks = blocks
        self._number = number
        self.pending = 0

    def turn(self) -> None:
        """Make one call; it completes later."""
        self._number += 1
        self.pending += 1
        number = self._number
        if self._chance.random() < 0.15:
            self._report(FlushCalled(number))
            self._store.flush(lambda error: self._completed(FlushDone(number), error))
            return

        def written(error: OSError | None) -> None:
            self._completed(WriteDone(number), error)

        first = self._chance.choice(self._blocks)
        count = min(self._chance.choice((1, 1, 2, 8, 8, 13, 24)), self._blocks.stop - first)
        if self._chance.random() < 0.25:
            self._report(Issued(number, first, (ZEROS,) * count))
            self._store.zero(first * SECTOR, count * SECTOR, written, unmap=self._chance.random() < 0.5)
        else:
            contents = pattern(number, count)
            self._report(Issued(number, first, contents))
            self._store.write(first * SECTOR, b"".join(contents), written)

    def _completed(self, event: Event, error: OSError | None) -> None:
        assert error is None
        self.pending -= 1
        self._report(event)


SHARES = (0.0, 0.5, 0.5, 0.9, 1.0)
"""Shares of the unsynced sectors that reach the medium: one attempt for each, after every step."""


def cuts(log: list[Event], media: dict[Path, Medium]) -> Iterator[tuple[Event, Sequence[float]]]:
    """Yield the recorded steps, each with the shares to try for a power cut after it."""
    for event in log:
        match event:
            case Synced(path):
                if path in media:
                    media[path].sync()
            case Wrote(path) | Zeroed(path) | Resized(path):
                media.setdefault(path, Medium()).pending.append(event)
            case Issued() | FlushCalled():
                yield event, ()  # more contents are allowed, the medium is unchanged
                continue
            case _:
                pass
        yield event, SHARES if any(medium.pending for medium in media.values()) else (1.0,)
