from __future__ import annotations

import errno
import hashlib
import os
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.leaks import descriptors
from tests.store.support import content, make_snapshot

from farplug.errors import ImageError, Reason
from farplug.store import BLOCK_SIZE, OverlayStore, overlay, overlay_file
from farplug.store.overlay_file import OverlayFile
from farplug.store.overlay_format import HEADER_SIZE, Header

SIZE = 40 * 4096 + 1536
CONTENT = random.Random(11).randbytes(SIZE)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(CONTENT)
    path.chmod(0o444)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "changes.snapshot"


def refused(base: Path, path: Path, *, block_size: int = BLOCK_SIZE) -> ImageError:
    before = len(descriptors())
    with pytest.raises(ImageError) as caught:
        OverlayStore.open(base, path, block_size=block_size)
    assert len(descriptors()) <= before
    assert "\n" not in caught.value.message
    assert caught.value.remedy
    return caught.value


async def test_an_image_that_was_copied(base: Path, path: Path, tmp_path: Path) -> None:
    """A copy with the same time is accepted; the time of another can be restored by the command of the remedy."""
    await make_snapshot(base, path)
    copy = tmp_path / "copy.raw"
    shutil.copy2(base, copy)
    await OverlayStore.open(copy, path).close()
    os.utime(copy)
    error = refused(copy, path)
    assert error.reason is Reason.WRONG_IMAGE
    assert "copy.raw has a newer modification time than the snapshot" in error.message
    assert os.system(error.remedy.command) == 0
    await OverlayStore.open(copy, path).close()


Change = Callable[[Path], None]


def _grow(base: Path) -> None:
    os.truncate(base, SIZE + 512)


def _write_with_the_old_time(base: Path) -> None:
    status = base.stat()
    with base.open("r+b") as file:
        file.write(b"changed")
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_grow, f"has {SIZE + 512} bytes, the image of the snapshot"),
        (_write_with_the_old_time, "was changed after the snapshot"),
    ],
)
async def test_an_image_that_was_changed(base: Path, path: Path, change: Change, message: str) -> None:
    await make_snapshot(base, path)
    base.chmod(0o644)
    change(base)
    error = refused(base, path)
    assert error.reason is Reason.WRONG_IMAGE
    assert message in error.message
    assert str(base) in error.remedy
    with pytest.raises(ImageError, match=message[:20]):
        overlay.commit(path, base)
    assert not overlay.info(path).half_committed


async def test_samples_are_all_over_the_image(tmp_path: Path, path: Path) -> None:
    base = tmp_path / "large.raw"
    base.write_bytes(bytes(64 << 20))
    await make_snapshot(base, path)
    status = base.stat()
    for begin in (0, 4 << 20, (4 << 20) - 1, 6 << 20, 32 << 20, 63 << 20, (64 << 20) - 1):
        with base.open("r+b") as file:
            file.seek(begin)
            file.write(b"x")
        os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert "was changed after" in refused(base, path).message
        with base.open("r+b") as file:
            file.seek(begin)
            file.write(b"\0")
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    await OverlayStore.open(base, path).close()


async def test_another_block_size(base: Path, path: Path) -> None:
    await make_snapshot(base, path)
    error = refused(base, path, block_size=4096)
    assert (error.reason, error.remedy.setting, error.remedy.value) == (Reason.WRONG_IMAGE, "storage.block_size", 512)


def _flip(at: int) -> Change:
    def flip(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes((byte ^ 0x10,)))

    return flip


def _sector(number: int, content: bytes) -> Change:
    def write(path: Path) -> None:
        file = OverlayFile.open(path)
        file._write_sector(number, content)
        file.close()

    return write


def _to(size: int) -> Change:
    return lambda path: os.truncate(path, size)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (_flip(0), Reason.WRONG_FORMAT, "is not a snapshot"),
        (_flip(30), Reason.DAMAGED, "its header does not match its checksum"),
        (_flip(HEADER_SIZE), Reason.DAMAGED, "the sector at byte 8192 does not match"),
        (_flip(HEADER_SIZE + 511), Reason.DAMAGED, "the sector at byte 8192 does not match"),
        (_flip(HEADER_SIZE + 512), Reason.DAMAGED, "the sector at byte 8704 does not match"),
        (_sector(1, bytes(507) + b"\x80"), Reason.DAMAGED, "it has clusters after the end of the image"),
        (_sector(0, b"\3" + bytes(507)), Reason.DAMAGED, "its sector 0 has no valid content"),
        (_sector(0, b"\1\1" + bytes(506)), Reason.DAMAGED, "its sector 0 has no valid content"),
        (_sector(0, bytes(507) + b"\1"), Reason.DAMAGED, "its sector 0 has no valid content"),
        (_sector(0, b"\2" * 34 + bytes(474)), Reason.DAMAGED, "its sector 0 has no valid content"),
        (_to(3), Reason.WRONG_FORMAT, "is not a snapshot"),
        (_to(100), Reason.DAMAGED, "header does not match"),
        (_to(HEADER_SIZE), Reason.DAMAGED, "it has 8192 bytes of"),
        (_to((1 << 20) + SIZE - 1), Reason.DAMAGED, f"it has {(1 << 20) + SIZE - 1} bytes of {(1 << 20) + SIZE}"),
    ],
)
async def test_a_damaged_snapshot(base: Path, path: Path, change: Change, reason: Reason, message: str) -> None:
    await make_snapshot(base, path)
    change(path)
    error = refused(base, path)
    assert error.reason is reason
    assert message in error.message
    for function in (lambda path: overlay.commit(path, base), overlay.info):
        with pytest.raises(ImageError) as caught:
            function(path)
        assert caught.value.reason is reason
    assert content(base) == CONTENT


def test_files_that_are_not_a_snapshot(base: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.raw").write_bytes(CONTENT)
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (tmp_path / "image.raw", Reason.WRONG_FORMAT),
        (base, Reason.NO_PERMISSION if os.geteuid() else Reason.WRONG_FORMAT),
        (tmp_path, Reason.NOT_A_FILE),
        (tmp_path / "pipe", Reason.NOT_A_FILE),
        (tmp_path / "missing" / "x", Reason.NOT_FOUND),
        (Path("a\0b"), Reason.NOT_FOUND),
    ]
    for case, reason in cases:
        assert refused_reason(base, case) is reason
    (tmp_path / "begun").write_bytes(bytes(8192))
    for name, remedy in (
        ("image.raw", "name the file of a snapshot, or a new file"),
        ("begun", "name another file, or remove this one if its content is not needed"),
        ("", "name a file for the snapshot"),
        ("pipe", "name a file for the snapshot"),
    ):
        with pytest.raises(ImageError) as caught:
            overlay.info(tmp_path / name)
        assert caught.value.remedy == remedy
    assert content(tmp_path / "image.raw") == CONTENT
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(ImageError, match="missing cannot be opened") as caught:
        OverlayStore.open(base)
    assert caught.value.reason is Reason.NOT_FOUND
    for function in (lambda path: overlay.commit(path, base), overlay.discard, overlay.info):
        with pytest.raises(ImageError) as caught:
            function(path)
        assert caught.value.reason is Reason.NOT_FOUND


def refused_reason(base: Path, path: Path) -> Reason:
    with pytest.raises(ImageError) as caught:
        OverlayStore.open(base, path)
    return caught.value.reason


@pytest.mark.parametrize(
    ("number", "reason", "message"),
    [
        (errno.EFBIG, Reason.IO_ERROR, "its file system does not support files of"),
        (errno.EINVAL, Reason.IO_ERROR, "its file system does not support files of"),
        (errno.ENOSPC, Reason.NO_SPACE, "no space left"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_snapshot_that_cannot_be_created(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason, message: str, named: bool
) -> None:
    def refuse(fd: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "ftruncate", refuse)
    before = len(descriptors())
    with pytest.raises(ImageError) as caught:
        OverlayStore.open(base, path if named else None)
    assert message in caught.value.message
    assert caught.value.reason is reason
    assert len(descriptors()) <= before
    assert not path.exists()


async def test_an_image_that_cannot_be_read(base: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ImageError, match=r"base\.raw cannot be opened: input/output error"):
        OverlayStore.open(base, path)
    assert not path.exists()


async def test_an_empty_file_becomes_a_snapshot(base: Path, path: Path) -> None:
    path.touch()
    await make_snapshot(base, path)
    assert overlay.info(path).changed == 4096


@pytest.mark.parametrize("function", ["commit", "discard", "open"])
async def test_a_snapshot_that_is_removed_while_it_is_opened(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    await make_snapshot(base, path)
    monkeypatch.setattr(overlay_file, "lock", lambda fd, path, read_only: path.unlink())
    functions: dict[str, Callable[[], object]] = {
        "commit": lambda: overlay.commit(path, base),
        "discard": lambda: overlay.discard(path),
        "open": lambda: OverlayStore.open(base, path),
    }
    with pytest.raises(ImageError, match="was just removed") as caught:
        functions[function]()
    assert caught.value.reason is Reason.IN_USE
    assert content(base) == CONTENT


@pytest.fixture
async def half(base: Path, path: Path) -> Path:
    """A snapshot with clusters 0 and 40 of the image, whose commit ended after cluster 0."""
    base.chmod(0o644)
    await make_snapshot(base, path)
    file = OverlayFile.open(path)
    file.image.write(memoryview(b"y" * 1536), file.header.data_offset + 40 * 4096)
    file.clusters.mark(40, 41)
    file.flush()
    file.close()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overlay.commit(path, base, progress=stop)
    assert overlay.info(path).half_committed
    return path


def patch_file(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


async def test_half_committed_to_its_image(base: Path, half: Path) -> None:
    assert content(base) == b"x" * 512 + CONTENT[512:]
    os.utime(base)
    patch_file(base, 0, b"?" * 4096)  # of the snapshot: written anew
    patch_file(base, SIZE - 1536, b"?" * 1536)
    overlay.commit(half, base)
    assert content(base) == b"x" * 512 + CONTENT[512:-1536] + b"y" * 1536


@pytest.mark.parametrize("at", [4096, 20 * 4096, SIZE - 1537])
async def test_half_committed_and_the_image_changed(
    base: Path, half: Path, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    patch_file(base, at, bytes((CONTENT[at] ^ 1,)))
    before = content(base)
    with pytest.raises(
        ImageError, match=r"was changed after the commit of .* was interrupted, or is another"
    ) as caught:
        overlay.commit(half, base)
    assert caught.value.reason is Reason.WRONG_IMAGE
    assert content(base) == before
    overlay.commit(half, base, force=True)
    assert "was changed after the commit" in caplog.text
    assert content(base)[:512] == b"x" * 512


async def test_half_committed_to_another_image(half: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(before := random.Random(12).randbytes(SIZE))
    with pytest.raises(ImageError, match=r"other\.raw was changed after") as caught:
        overlay.commit(half, other)
    assert caught.value.reason is Reason.WRONG_IMAGE
    other.write_bytes(before + b"z" * 512)
    with pytest.raises(ImageError, match=r"other\.raw has \d+ bytes, the image of the snapshot"):
        overlay.commit(half, other, force=True)
    assert content(other) == before + b"z" * 512


async def test_half_committed_by_an_older_version(base: Path, half: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It recorded no digest, so nothing shows whether the image is the right one."""
    _sector(0, b"\1" + bytes(507))(half)
    assert overlay.info(half).half_committed
    assert refused(base, half).reason is Reason.HALF_COMMITTED
    with pytest.raises(ImageError, match="recorded no digest") as caught:
        overlay.commit(half, base)
    assert caught.value.remedy.command == f"farplug image commit {half} --image {base} --force"
    overlay.commit(half, base, force=True)
    assert "recorded no digest" in caplog.text
    assert content(base) == b"x" * 512 + CONTENT[512:-1536] + b"y" * 1536


async def test_the_remedy_of_half_committed_names_the_image_of_the_caller(
    base: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = base.rename(tmp_path / "it's mine; ls.raw")
    monkeypatch.chdir(tmp_path)
    for image in (moved, Path(moved.name)):
        error = refused(image, half)
        assert error.reason is Reason.HALF_COMMITTED
        assert shlex.split(error.remedy.command) == ["farplug", "image", "commit", str(half), "--image", str(image)]
    with pytest.raises(ImageError) as caught:
        overlay.discard(half)
    assert caught.value.remedy.command == f"farplug image commit {half} --image IMAGE"


@pytest.mark.parametrize("state", [b"\1", b"\2", b"\2" + hashlib.sha256().digest()])
@pytest.mark.parametrize("block_size", [1, 512])
def test_a_hostile_snapshot_of_a_file(path: Path, tmp_path: Path, state: bytes, block_size: int) -> None:
    """It claims to be half committed, to a file whose size, but not whose content, is known."""
    victim = tmp_path / "profile"
    victim.write_bytes(before := b"# mine\n".ljust(807, b"#"))
    header = Header(bytes(16), 807, block_size, 4096, 0, bytes(32), victim)
    data = bytearray(header.file_size)
    data[: len(bytes(header))] = bytes(header)
    sectors = header.seal(0, state.ljust(508, b"\0")) + header.seal(1, bytes(508))
    data[HEADER_SIZE : HEADER_SIZE + len(sectors)] = sectors
    data[header.data_offset :] = b"#" * 807
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        overlay.commit(path, victim)
    assert caught.value.reason is (Reason.DAMAGED if block_size == 1 else Reason.WRONG_IMAGE)
    assert victim.read_bytes() == before


def test_headers_that_lie(tmp_path: Path) -> None:
    """Any numbers, with the right checksum: an error, and little memory."""
    chance = random.Random(3)
    path = tmp_path / "lie"
    numbers = (0, 1, 511, 512, 4096, SIZE, 1 << 26, 1 << 31, (1 << 32) - 1, 1 << 38, 1 << 57, (1 << 64) - 1)
    reasons = set()
    for _ in range(300):
        size, block_size, cluster_size = chance.choice(numbers), chance.choice(numbers[:9]), chance.choice(numbers[:9])
        header = Header(bytes(16), size, block_size, cluster_size, chance.choice((0, -1, 5)), bytes(32), Path("/x"))
        path.write_bytes(bytes(header))
        os.truncate(path, chance.choice((8192, 8704, 1 << 20, 1 << 40)))
        with pytest.raises(ImageError) as caught:
            OverlayFile.open(path)
        reasons.add(caught.value.reason)
    assert reasons == {Reason.DAMAGED}
