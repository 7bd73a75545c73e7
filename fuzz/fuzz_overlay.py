"""Fuzz snapshots: files with any header and map, and good ones across kills, power cuts, reopening and commits.

A file that is not a good snapshot is refused with ImageError; only the image that the caller names is ever written. A
good one has, after a kill or a power cut at any moment, the confirmed writes, and old or new content in all other
blocks; the image does not change before a commit, and a commit can be interrupted anywhere and repeated.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.store.power import SECTOR, Event, Guarantees, Host, Issued, Medium, Opened, Unlinked, cuts, record

from farplug.errors import ImageError, Reason
from farplug.store import CacheMode, OverlayStore, overlay, overlay_file, overlay_format, threaded
from farplug.store.base import WriteDone
from farplug.store.overlay_format import CONTENT_SIZE, Header, sector_offset
from harness import check, counts, run

_T = TypeVar("_T")

FOLDER = Path(tempfile.mkdtemp(prefix="farplug-fuzz-"))
MODIFIED = 1_700_000_000_000_000_001
"""Modification time of the images, in nanoseconds."""
SHARES = (0.0, 0.5, 0.9, 1.0, 1.0)
"""Shares of the sectors that were not synced and reach the medium. 1: a kill, the kernel has everything."""


def write_image(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(1, MODIFIED))


# Hostile files


def hostile_header(rng: random.Random, size: int, named: Path) -> bytes:
    """Return a header with a correct checksum, and perhaps wrong numbers."""
    if rng.random() < 0.5:
        return bytes(Header(rng.randbytes(16), size, 512, 4096, MODIFIED, rng.randbytes(32), named))
    sizes = (size, size, size, 0, 1, 1 << 63, (1 << 64) - 1, rng.getrandbits(40), (1 << 26) * 4096)
    block_sizes = (512, 512, 512, 1, 0, 4096, (1 << 32) - 1)
    cluster_sizes = (4096, 4096, 8192, 1 << 31, 0, 3, 1 << 20)
    modified = rng.choice((MODIFIED, 0, -1, 1 << 62))
    base = Path(rng.choice((str(named), str(named), "", "a\0b", "\x1b[31m", "/" + "a" * 9000)))
    header = Header(
        rng.randbytes(16),
        rng.choice(sizes),
        rng.choice(block_sizes),
        rng.choice(cluster_sizes),
        modified,
        rng.randbytes(32),
        base,
    )
    data = bytearray(bytes(header)[: overlay_format.HEADER_SIZE])
    if rng.random() < 0.1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def hostile_sector(rng: random.Random, number: int) -> bytes:
    """Return the content of a sector: a state, or bits."""
    if number == 0:
        digest = rng.randbytes(32)
        states = (bytes(1), b"\1", b"\2", b"\2" + digest, b"\2" + digest + b"\3", b"\3")
        return rng.choice(states).ljust(CONTENT_SIZE, b"\0")
    contents = (bytes(CONTENT_SIZE), b"\1".ljust(CONTENT_SIZE, b"\0"), b"\xff" * CONTENT_SIZE)
    return rng.choice((*contents, rng.randbytes(CONTENT_SIZE)))


def write_hostile(rng: random.Random, path: Path, size: int, named: Path) -> None:
    data = hostile_header(rng, size, named)
    with path.open("wb") as file:
        file.write(data[: rng.choice((len(data), len(data), len(data), rng.randrange(len(data))))])
        try:
            header = Header.parse(data, path)
            os.ftruncate(file.fileno(), header.file_size + rng.choice((0, 0, 0, -1, 5)))
        except (ImageError, OSError):
            return
        if header.map_sectors < 100:
            file.seek(sector_offset(0))
            for number in range(header.map_sectors + 1):
                file.write(header.seal(number, hostile_sector(rng, number)))


def hostile(rng: random.Random) -> None:
    image, named, path = FOLDER / "image.raw", FOLDER / "named.raw", FOLDER / "hostile"
    size = rng.choice((512, 4096, 10240, 1 << 20))
    content = rng.randbytes(size)
    write_image(image, content)
    write_image(named, content)
    write_hostile(rng, path, size, named)

    def read() -> None:
        store = OverlayStore.open(image, path)
        try:
            store._read_blocking(memoryview(bytearray(size)), 0)
        finally:
            asyncio.run(store.close())

    actions: list[Callable[[], Any]] = [
        lambda: overlay.info(path),
        lambda: overlay.commit(path, image, force=rng.random() < 0.5),
        lambda: overlay.discard(path),
        read,
    ]
    rng.shuffle(actions)
    for action in actions:
        try:
            action()
            counts["hostile accepted"] += 1
        except ImageError as refused:
            check(len(str(refused)) < 20_000)
            counts["hostile refused"] += 1
    assert named.read_bytes() == content, "the file that the snapshot names was written"
    assert len(image.read_bytes()) == size


# Good files


def call(function: Callable[..., None], *arguments: Any) -> asyncio.Future[Any]:
    """Call a method of a store with a callback; return its result."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    function(*arguments, lambda *result: future.set_result(result))
    return future


class Pool:
    """In place of the threads of a store: everything is done in later turns of the event loop, so a seed repeats it."""

    def __init__(self, count: int, name: str) -> None:
        pass

    def run(self, work: Callable[[], None], finish: WriteDone) -> None:
        asyncio.get_running_loop().call_soon(self._run, work, finish)

    def _run(self, work: Callable[[], None], finish: WriteDone) -> None:
        error: OSError | None = None
        try:
            work()
        except OSError as raised:
            error = raised
        asyncio.get_running_loop().call_soon(finish, error)

    def stop(self) -> None:
        pass


class Shadow:
    """What a snapshot must contain: it receives what a host reports."""

    def __init__(self, content: bytes, log: list[Event]) -> None:
        self.content = bytearray(content)
        self._log = log

    def report(self, event: Event) -> None:
        self._log.append(event)
        if isinstance(event, Issued):
            data = b"".join(event.contents)
            self.content[event.block * SECTOR : event.block * SECTOR + len(data)] = data


async def use(rng: random.Random, open_store: Callable[[], OverlayStore], shadow: Shadow) -> None:
    """Write, read, flush, and open the snapshot again, several times."""
    number = 0
    size = len(shadow.content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        store = open_store()
        shadow.report(Opened())
        host = Host(store, rng, shadow.report, range(size // SECTOR), number)
        for _ in range(rng.randrange(40)):
            host.turn()
            if rng.random() < 0.3:
                begin = rng.randrange(size // SECTOR) * SECTOR
                length = min(rng.choice((512, 4096, 20_480)), size - begin)
                expected = bytes(shadow.content[begin : begin + length])
                data, error = await call(store.read, begin, length)
                assert error is None
                assert bytes(data) == expected
        await call(store.flush)  # after all calls of the host
        assert not host.pending, "a call of the store has failed"
        await store.close()
        number = host._number


def read_all(image: Path, path: Path, size: int) -> bytes:
    store = OverlayStore.open(image, path)
    try:
        data = bytearray(size)
        store._read_blocking(memoryview(data), 0)
    finally:
        store._close_files()
    return bytes(data)


def check_cuts(rng: random.Random, log: list[Event], image: Path, before: bytes, cache: CacheMode) -> None:
    """Open what the snapshot is at some moments after a kill or a power cut."""
    path, again = FOLDER / "changes", FOLDER / "again"
    guarantees = Guarantees(before, write_through=cache is CacheMode.WRITETHROUGH)
    media = {path: Medium()}
    opened = False
    for event, shares in cuts(log, media):
        guarantees.record(event)
        opened |= isinstance(event, Opened)
        if not shares or rng.random() > 0.05:
            continue
        media[path].after_a_cut(rng, rng.choice(SHARES)).save(again)
        try:
            guarantees.check(read_all(image, again, len(before)))
        except ImageError:
            check(not opened, "a snapshot that was open is not one any more")
        counts["cuts"] += 1


def check_commit(rng: random.Random, image: Path, before: bytes, after: bytes) -> None:
    """Commit, then interrupt the commit at some moments, and repeat it."""
    path = FOLDER / "changes"
    snapshot = path.read_bytes()
    with pytest.MonkeyPatch.context() as recording:
        log = record(recording)
        overlay.commit(path, image)
    assert image.read_bytes() == after
    counts["commits"] += 1
    media = {image: Medium.holding(before), path: Medium.holding(snapshot)}
    unlinked = False
    for event, shares in cuts(log, media):
        unlinked |= isinstance(event, Unlinked)
        if unlinked or rng.random() > 0.1:
            continue
        share = rng.choice(SHARES) if shares else 1.0
        write_image(image, media[image].after_a_cut(rng, share).content())
        media[path].after_a_cut(rng, share).save(path)
        half = overlay.info(path).half_committed
        assert half or image.read_bytes() == before
        if half:
            for refused in (lambda: OverlayStore.open(image, path), lambda: overlay.discard(path)):
                try:
                    refused()
                except ImageError as error:
                    check(error.reason is Reason.HALF_COMMITTED)
                else:
                    raise AssertionError("a snapshot that is half committed was used")
        overlay.commit(path, image)
        assert image.read_bytes() == after
        assert not path.exists()
        counts["commits interrupted"] += 1


def good(rng: random.Random) -> None:
    image, path = FOLDER / "base.raw", FOLDER / "changes"
    path.unlink(missing_ok=True)
    cache = rng.choice((CacheMode.WRITEBACK, CacheMode.WRITETHROUGH))
    before = rng.randbytes(512 * rng.choice((8, 9, 63, 200, 2000)))
    write_image(image, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlay_format, "DATA_ALIGNMENT", 4096)  # many copies are made: they must be small
        patch.setattr(overlay_format, "MIN_CLUSTER_SIZE", rng.choice((512, 1024, 4096)))
        patch.setattr(overlay_file, "HEAD_SAMPLE", 4096)
        patch.setattr(overlay_file, "TAIL_SAMPLE", 4096)
        patch.setattr(threaded, "ThreadPool", Pool)
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: None)
        log: list[Event] = []
        shadow = Shadow(before, log)
        with pytest.MonkeyPatch.context() as recording:
            recorded = record(recording)
            shadow._log = recorded
            asyncio.run(use(rng, lambda: OverlayStore.open(image, path, cache=cache), shadow))
        assert image.read_bytes() == before, "the image was written"
        after = bytes(shadow.content)
        assert read_all(image, path, len(before)) == after
        check_cuts(rng, recorded, image, before, cache)
        if rng.random() < 0.5:
            check_commit(rng, image, before, after)


def one_case(rng: random.Random) -> None:
    hostile(rng) if rng.random() < 0.5 else good(rng)


if __name__ == "__main__":
    try:
        run("overlay", one_case)
    finally:
        shutil.rmtree(FOLDER)
