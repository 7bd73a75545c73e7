"""A power cut at any moment: confirmed writes are there, all others are old or new, block by block."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.store import power
from tests.store.power import Event, Guarantees, Host, Medium, Opened, Synced, Unlinked, cuts, record
from tests.store.support import content

from farplug.errors import ImageError
from farplug.store import CacheMode, FileStore, OverlayStore, Store, overlay, overlay_file, overlay_format
from farplug.store.image import Image

TURNS = 120


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make snapshots small, because there are many."""
    monkeypatch.setattr(overlay_format, "DATA_ALIGNMENT", 4096)
    for name in ("HEAD_SAMPLE", "TAIL_SAMPLE"):
        monkeypatch.setattr(overlay_file, name, 4096)


async def work(open_store: Callable[[], Store], chance: random.Random, log: list[Event], blocks: range) -> None:
    store = open_store()
    log.append(Opened())
    host = Host(store, chance, log.append, blocks)
    for _ in range(TURNS):
        host.turn()
        if chance.random() < 0.5:
            await asyncio.sleep(0.001)
    await store.close()


@pytest.mark.parametrize("cache", [CacheMode.WRITEBACK, CacheMode.WRITETHROUGH])
@pytest.mark.parametrize("seed", [1, 2])
async def test_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, cache: CacheMode) -> None:
    chance = random.Random(seed)
    path = tmp_path / "disk.raw"
    before = chance.randbytes(100 * 512)
    path.write_bytes(before)
    with monkeypatch.context() as patch:
        log = record(patch)
        await work(partial(FileStore.open, path, cache=cache), chance, log, range(100))
    guarantees = Guarantees(before, write_through=cache is CacheMode.WRITETHROUGH)
    media = {path: Medium.holding(before)}
    for event, shares in cuts(log, media):
        guarantees.record(event)
        for share in shares:
            guarantees.check(media[path].after_a_cut(chance, share).content())
    assert sum(isinstance(event, Synced) for event in log) > 10


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("cache", [CacheMode.WRITEBACK, CacheMode.WRITETHROUGH])
@pytest.mark.parametrize("cluster_size", [4096, 1024])
async def test_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_size: int, cache: CacheMode) -> None:
    """With small clusters the writes are at the border of two sectors of bits."""
    chance = random.Random(cluster_size)
    monkeypatch.setattr(overlay_format, "MIN_CLUSTER_SIZE", cluster_size)
    base, path, again = tmp_path / "base.raw", tmp_path / "changes", tmp_path / "again"
    middle = 4064 * cluster_size // 512 if cluster_size < 4096 else 60
    size = (middle + 60) * 512
    blocks = range(middle - 60, middle + 60)
    with base.open("wb") as file:
        file.seek(blocks.start * 512)
        file.write(chance.randbytes(len(blocks) * 512))
    before = content(base)
    assert len(before) == size
    with monkeypatch.context() as patch:
        log = record(patch)
        await work(partial(OverlayStore.open, base, path, cache=cache), chance, log, blocks)
    assert content(base) == before
    guarantees = Guarantees(before[blocks.start * 512 :], blocks.start, write_through=cache is CacheMode.WRITETHROUGH)
    media = {path: Medium()}
    named = opened = False
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    for event, shares in cuts(log, media):
        guarantees.record(event)
        named |= event == Synced(tmp_path)
        opened |= isinstance(event, Opened)
        assert named or not opened
        for share in shares:
            media[path].after_a_cut(chance, share).save(again)
            try:
                guarantees.check(read_all(base, again, blocks))
            except ImageError:
                if opened:  # otherwise it was being created, and was empty
                    raise
    assert opened


def read_all(base: Path, path: Path, blocks: range) -> bytearray:
    store = OverlayStore.open(base, path)
    data = bytearray(len(blocks) * 512)
    store._read_blocking(memoryview(data), blocks.start * 512)
    store._close_files()
    return data


@pytest.mark.usefixtures("small")
async def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted anywhere, it can be repeated, and the image becomes what the snapshot was."""
    chance = random.Random(5)
    base, path = tmp_path / "base.raw", tmp_path / "changes"
    before = chance.randbytes(130 * 512)
    base.write_bytes(before)
    os.utime(base, ns=(1, 1_700_000_000_000_000_001))
    await work(partial(OverlayStore.open, base, path), chance, [], range(130))
    snapshot = content(path)
    after = bytes(read_all(base, path, range(130)))
    with monkeypatch.context() as patch:
        log = record(patch)
        overlay.commit(path, base)
    assert content(base) == after != before

    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    media = {base: Medium.holding(before), path: Medium.holding(snapshot)}
    unlinked = gone = False
    seen = set()
    for event, shares in cuts(log, media):
        unlinked |= isinstance(event, Unlinked)
        gone |= unlinked and event == Synced(tmp_path)
        for share in shares:
            media[base].after_a_cut(chance, share).save(base)
            os.utime(base, ns=(1, 1_700_000_000_000_000_001))
            if gone or (unlinked and chance.random() < 0.5):
                assert content(base) == after
                continue
            media[path].after_a_cut(chance, share).save(path)
            half = overlay.info(path).half_committed
            seen.add(half)
            assert half or content(base) == before
            overlay.commit(path, base)
            assert content(base) == after
    assert seen == {False, True}
    assert gone


def test_the_simulation_finds_a_missing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Test the test: bits that are written together with their clusters are found to be wrong."""

    def flush(self: overlay_file.OverlayFile, *, durable: bool = True) -> None:
        for number in sorted(self.clusters.changed):
            self._write_sector(number, self.clusters.content(number))
        self.image.sync()
        self.clusters.changed.clear()

    monkeypatch.setattr(overlay_file.OverlayFile, "flush", flush)
    with pytest.raises(AssertionError, match=r"block \d+ begins with"):
        asyncio.run(test_snapshot(tmp_path, monkeypatch, 4096, CacheMode.WRITEBACK))


@pytest.mark.parametrize("missing", ["changes", "base.raw"])
def test_the_simulation_finds_a_missing_sync_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, missing: str
) -> None:
    sync = Image.sync

    def sync_but_one(self: Image) -> None:
        if self.path.name != missing:
            sync(self)

    monkeypatch.setattr(Image, "sync", sync_but_one)
    with pytest.raises(AssertionError):
        asyncio.run(test_commit(tmp_path, monkeypatch))


def test_the_simulation_loses_what_is_not_synced() -> None:
    medium = Medium.holding(bytes(1024))
    path = Path("x")
    medium.pending += [power.Wrote(path, 0, b"a" * 1024), power.Zeroed(path, 1, 1), power.Resized(path, 2048)]
    seen = {medium.after_a_cut(random.Random(seed), 0.5).content() for seed in range(100)}
    old, new = bytes(512), b"a" * 512
    expected = {first + second for first in (old, new) for second in (old, new)}
    assert seen == expected | {content + bytes(1024) for content in expected}
    assert medium.after_a_cut(random.Random(1), 0.0).content() == bytes(1024)
    medium.sync()
    assert medium.content() == new + bytes(1536)
