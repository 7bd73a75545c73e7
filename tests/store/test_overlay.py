from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from tests.store.support import content, make_snapshot, read, settle, write, zero
from tests.turns import TurnMeter

from farplug.errors import ImageError, Reason
from farplug.store import CacheMode, FileStore, OverlayStore, holes, overlay
from farplug.store.image import serial_number
from farplug.store.overlay_file import OverlayFile
from farplug.usb import Buffer

SIZE = 40 * 4096 + 1536
CONTENT = random.Random(11).randbytes(SIZE)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.snapshot"


@pytest.mark.parametrize("named", [True, False])
async def test_the_image_stays_as_it_is(base: Path, path: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(path.parent))
    base.chmod(0o444)
    before = (content(base), os.stat(base).st_mtime_ns)
    store = OverlayStore.open(base, path if named else None)
    assert (store.block_count, store.read_only, store.write_cache) == (SIZE // 512, False, True)
    assert store.serial_number == serial_number(base)
    assert store.temporary is not named
    assert store.name == f"{base} (snapshot in {path if named else path.parent})"
    await write(store, 512, b"x" * 512)
    await settle(store.flush)
    assert await read(store, 0, SIZE) == CONTENT[:512] + b"x" * 512 + CONTENT[1024:]
    await store.close()
    await store.close()
    assert (content(base), os.stat(base).st_mtime_ns) == before
    assert sorted(os.listdir(path.parent)) == (["base.raw", "changes.snapshot"] if named else ["base.raw"])
    if named:
        assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [512, 4096, 4608, 10 * 4096 + 700, SIZE])
@pytest.mark.parametrize("holes_work", [True, False])
async def test_against_a_shadow(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, size: int, holes_work: bool
) -> None:
    """Writes and zeros of any length and place; closed and opened again, flushed or not."""
    if not holes_work:
        monkeypatch.setattr(holes, "zero_range", lambda *_, **__: False)
    source = random.Random(size)
    base = tmp_path / "small.raw"
    base.write_bytes(CONTENT[:size])
    end = size // 512 * 512
    shadow = bytearray(CONTENT[:end])
    store = OverlayStore.open(base, path)
    for turn in range(300):
        begin = source.randrange(0, end, 512)
        length = min(source.choice((512, 1024, 4096, 8192, 20480)), end - begin)
        if turn % 50 == 49:
            await store.close()
            assert overlay.info(path).size == size
            store = OverlayStore.open(base, path)
        match source.randrange(4):
            case 0:
                store.zero(begin, length, lambda error: None, unmap=source.random() < 0.5)
                shadow[begin : begin + length] = bytes(length)
            case 1:
                await settle(store.flush)
            case _:
                data = source.randbytes(length)
                store.write(begin, data, lambda error: None)
                shadow[begin : begin + length] = data
        begin = source.randrange(0, end, 512)
        length = min(source.choice((512, 4096, 65536)), end - begin)
        assert await read(store, begin, length) == shadow[begin : begin + length]
    await store.close()
    assert content(base) == CONTENT[:size]
    seen: list[tuple[int, int]] = []
    changed = overlay.info(path).changed
    assert overlay.commit(path, base, progress=lambda done, total: seen.append((done, total))) == changed
    assert content(base) == shadow + CONTENT[end:size]
    assert seen == sorted(seen)
    assert seen[-1] == (changed, changed)
    assert not path.exists()


async def test_cached_reads_complete_inside_the_call(base: Path, path: Path) -> None:
    store = OverlayStore.open(base, path)
    await write(store, 4096, b"x" * 4096)
    try:
        os.preadv(store._file.image.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not support RWF_NOWAIT")
    answers: list[Buffer] = []
    store.read(0, 16384, lambda data, error: answers.append(data))
    assert answers == [CONTENT[:4096] + b"x" * 4096 + CONTENT[8192:16384]]
    await store.close()


@pytest.mark.parametrize("cached", ["nothing", "the image", "the snapshot"])
async def test_reads_that_must_wait(base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, cached: str) -> None:
    store = OverlayStore.open(base, path)
    await write(store, 4096, b"x" * 4096)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        fast = {"nothing": None, "the image": store._base.fd, "the snapshot": store._file.image.fd}[cached]
        if flags and fd != fast:
            raise BlockingIOError(errno.EAGAIN, "not now")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for begin in (0, 4096):
        data = await read(store, begin, 12288)
        assert data == (CONTENT[:4096] + b"x" * 4096 + CONTENT[8192:])[begin : begin + 12288]
    await store.close()


@pytest.mark.parametrize(
    ("cache", "order"),
    [
        (CacheMode.WRITEBACK, "data data sync bits sync data sync"),
        (CacheMode.WRITETHROUGH, "data sync bits sync data sync bits sync data sync"),
        (CacheMode.UNSAFE, "data data bits data"),
    ],
)
async def test_cache_modes(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, cache: CacheMode, order: str
) -> None:
    """Bits are written when their clusters are durable, and only those that changed."""
    store = OverlayStore.open(base, path, cache=cache)
    assert store.write_cache is (cache is not CacheMode.WRITETHROUGH)
    log: list[str] = []
    pwrite = os.pwrite

    def write_logged(fd: int, data: Buffer, offset: int) -> int:
        log.append("data" if offset >= store._header.data_offset else "bits")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", write_logged)
    monkeypatch.setattr(os, "fdatasync", lambda fd: log.append("sync"))
    await write(store, 0, bytes(4096))
    await write(store, 4096, bytes(4096))
    await settle(store.flush)
    await write(store, 0, bytes(512))
    await settle(store.flush)
    assert " ".join(log) == order
    await store.close()


@pytest.mark.parametrize("size", [3 << 40, (256 << 30) + 512])
async def test_a_large_image(tmp_path: Path, path: Path, size: int) -> None:
    base = tmp_path / "large.raw"
    with base.open("wb") as file:
        try:
            file.truncate(size)
        except OSError:
            pytest.skip("this file system does not support files of this size")
    store = OverlayStore.open(base, path)
    await write(store, size - 512, b"\xaa" * 512)
    await write(store, 1 << 31, b"\xbb" * 512)
    await zero(store, 1 << 33, 128 << 20, unmap=True)
    await store.close()
    assert os.stat(path).st_blocks * 512 < 12 << 20
    store = OverlayStore.open(base, path)
    assert await read(store, size - 1024, 1024) == bytes(512) + b"\xaa" * 512
    assert await read(store, (1 << 31) - 512, 1536) == bytes(512) + b"\xbb" * 512 + bytes(512)
    await store.close()
    overlay.commit(path, base)
    with base.open("rb") as file:
        file.seek(size - 512)
        assert file.read() == b"\xaa" * 512
    assert os.stat(base).st_blocks * 512 < 1 << 20


async def test_zeros_take_no_space(base: Path, path: Path) -> None:
    store = OverlayStore.open(base, path)
    if not store.unmaps:
        pytest.skip("this file system has no holes")
    await write(store, 0, CONTENT[: 32 * 4096])
    await settle(store.flush)
    full = os.stat(path).st_blocks
    await zero(store, 0, 32 * 4096, unmap=False)
    assert os.stat(path).st_blocks == full - 32 * 8
    assert await read(store, 0, 33 * 4096) == bytes(32 * 4096) + CONTENT[32 * 4096 : 33 * 4096]
    await store.close()


@pytest.mark.parametrize("call", ["copy", "write"])
async def test_a_full_file_system(base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A write that fails reports an error and changes nothing; later writes work."""
    store = OverlayStore.open(base, path)
    pwrite = os.pwrite
    left = 0 if call == "copy" else 1

    def full(fd: int, data: Buffer, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        await write(store, 512, b"x" * 512)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert await read(store, 0, SIZE) == CONTENT
    await write(store, 1024, b"y" * 512)
    assert await read(store, 0, SIZE) == CONTENT[:1024] + b"y" * 512 + CONTENT[1536:]
    await store.close()


async def test_a_flush_that_failed_leaves_what_was_flushed_before(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store = OverlayStore.open(base, path)
    await write(store, 0, b"x" * 512)
    await settle(store.flush)
    await write(store, 8192, b"y" * 512)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output"):
        await settle(store.flush)
    monkeypatch.undo()
    with pytest.raises(OSError, match="an earlier flush failed"):
        await settle(store.flush)
    await store.close()
    assert "data written since the last flush is lost" in caplog.text
    store = OverlayStore.open(base, path)
    assert await read(store, 0, SIZE) == b"x" * 512 + CONTENT[512:]
    await store.close()


async def test_files_that_shrink(base: Path, path: Path) -> None:
    store = OverlayStore.open(base, path)
    await write(store, 8192, b"x" * 4096)
    os.truncate(base, 4096)
    with pytest.raises(OSError, match=r"base\.raw ends at byte 4096: it has shrunk"):
        await read(store, 0, 8192)
    os.truncate(path, store._header.data_offset)
    await write(store, 8192, bytes(512))
    for call in (read(store, 8192, 512), settle(store.flush), zero(store, 0, 4096, unmap=True)):
        with pytest.raises(OSError, match="it has shrunk"):
            await call
    store.refresh()
    assert store.block_count == SIZE // 512
    await store.close()
    assert path.stat().st_size == store._header.data_offset


async def test_locks(base: Path, path: Path, tmp_path: Path) -> None:
    """Many snapshots of one image, but no writer of it; one user of a snapshot."""
    store = OverlayStore.open(base, path)
    other = OverlayStore.open(base, tmp_path / "other")
    await FileStore.open(base, read_only=True).close()
    with pytest.raises(ImageError, match=r"base\.raw is in use") as caught:
        FileStore.open(base)
    assert caught.value.reason is Reason.IN_USE
    with pytest.raises(ImageError, match=r"changes\.snapshot is in use"):
        OverlayStore.open(base, path)
    for function in (lambda path: overlay.commit(path, base), overlay.discard, overlay.info):
        with pytest.raises(ImageError, match=r"changes\.snapshot is in use"):
            function(path)
    await store.close()
    with pytest.raises(ImageError, match=r"base\.raw is in use"):  # by the other snapshot
        overlay.commit(path, base)
    assert not overlay.info(path).half_committed
    await other.close()
    overlay.commit(path, base)


async def test_commit(base: Path, path: Path, tmp_path: Path) -> None:
    store = OverlayStore.open(base, path)
    await write(store, 4096, b"x" * 8192)
    await zero(store, 16384, 8192, unmap=True)
    await write(store, SIZE - 512, b"y" * 512)
    await store.close()
    about = overlay.info(path)
    assert (about.base, about.size, about.block_size) == (base, SIZE, 512)
    assert (about.changed, about.half_committed) == (4 * 4096 + 1536, False)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert overlay.commit(link, base) == 4 * 4096 + 1536
    expected = bytearray(CONTENT)
    expected[4096:12288] = b"x" * 8192
    expected[16384:24576] = bytes(8192)
    expected[-512:] = b"y" * 512
    assert content(base) == expected
    assert not path.exists()


async def test_the_image_is_locked_until_the_snapshot_is_gone(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await OverlayStore.open(base, path).close()
    remove = OverlayFile.remove

    def removed(file: OverlayFile) -> None:
        with pytest.raises(ImageError, match="in use"):
            FileStore.open(base)
        remove(file)

    monkeypatch.setattr(OverlayFile, "remove", removed)
    overlay.commit(path, base)
    await FileStore.open(base).close()


async def test_a_commit_of_nothing(base: Path, path: Path) -> None:
    await OverlayStore.open(base, path).close()
    assert overlay.commit(path, base) == 0
    assert content(base) == CONTENT


async def test_holes_stay_holes(tmp_path: Path, path: Path) -> None:
    base = tmp_path / "full.raw"
    base.write_bytes(b"\xaa" * (8 << 20))
    store = OverlayStore.open(base, path)
    if not store.unmaps:
        pytest.skip("this file system has no holes")
    await zero(store, 0, 8 << 20, unmap=True)
    await write(store, 4 << 20, b"x" * 4096)
    await store.close()
    overlay.commit(path, base)
    assert content(base) == bytes(4 << 20) + b"x" * 4096 + bytes((4 << 20) - 4096)
    assert os.stat(base).st_blocks * 512 < 1 << 20


async def test_an_interrupted_commit(base: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = OverlayStore.open(base, path)
    for begin in range(0, 32768, 8192):
        await write(store, begin, b"x" * 4096)
    await store.close()
    pwrite = os.pwrite
    left = 3

    def full(fd: int, data: Buffer, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ImageError, match="was interrupted: no space left on device") as caught:
        overlay.commit(path, base)
    assert caught.value.reason is Reason.NO_SPACE
    monkeypatch.undo()
    assert overlay.info(path).half_committed
    assert content(base) not in (CONTENT, (b"x" * 4096 + CONTENT[4096:8192]) * 4)
    for call in (lambda: OverlayStore.open(base, path), lambda: overlay.discard(path)):
        with pytest.raises(ImageError) as caught:
            call()
        assert caught.value.reason is Reason.HALF_COMMITTED
        assert caught.value.remedy.command.startswith("farplug image commit ")
    overlay.commit(path, base)
    expected = bytearray(CONTENT)
    for begin in range(0, 32768, 8192):
        expected[begin : begin + 4096] = b"x" * 4096
    assert content(base) == expected


async def test_a_commit_without_its_image(base: Path, path: Path) -> None:
    await make_snapshot(base, path)
    base.unlink()
    with pytest.raises(ImageError, match=r"base\.raw cannot be opened") as caught:
        overlay.commit(path, base)
    assert caught.value.reason is Reason.NOT_FOUND
    overlay.discard(path)
    assert not path.exists()


async def test_a_commit_to_an_image_that_was_moved(base: Path, path: Path, tmp_path: Path) -> None:
    await make_snapshot(base, path)
    moved = base.rename(tmp_path / "moved.raw")
    overlay.commit(path, moved)
    assert content(moved) == b"x" * 512 + CONTENT[512:]


async def test_discard_takes_only_snapshots(base: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(CONTENT)
    with pytest.raises(ImageError, match="is not a snapshot"):
        overlay.discard(path)
    path.unlink()
    await make_snapshot(base, path)

    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ImageError) as caught:
        overlay.discard(path)
    assert caught.value.reason is Reason.NO_PERMISSION
    monkeypatch.undo()
    overlay.discard(path)
    assert not path.exists()
    assert content(base) == CONTENT


async def test_a_read_of_many_parts_runs_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is a system call: a guest decides how many there are."""
    base = tmp_path / "base"
    base.write_bytes(bytes(2 << 20))
    store = OverlayStore.open(base, tmp_path / "changes")
    try:
        os.preadv(store._file.image.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not support RWF_NOWAIT")
    for cluster in range(0, 512, 2):
        store._file.clusters.mark(cluster, cluster + 1)
    await read(store, 0, 2 << 20)  # from now on the page cache has all
    meter = TurnMeter(monkeypatch)
    for clusters, calls in ((32, 32), (33, 0), (255, 0)):
        before = meter.total["calls"]
        async with meter:
            assert await read(store, 4096, clusters * 4096) == bytes(clusters * 4096)
        assert meter.total["calls"] - before == calls
    await store.close()
