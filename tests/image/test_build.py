from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.image.support import ISO, MIB, ODD, PLAIN, TYPES, WHEN, contents, make_folder, partition, run, table
from tests.leaks import descriptors

from farplug.errors import ImageError, Reason, SetupError, UsageError
from farplug.image import build as build_module
from farplug.image.build import create_image, create_iso, new_file, no_progress
from farplug.image.tools import PROGRESS_INTERVAL, ImageBuild
from farplug.image.volume import BLOCK_SIZES, Format, Partition, Volume
from farplug.store.base import ProgressCallback


def make(path: Path, format: Format, folder: Path, progress: ProgressCallback = no_progress) -> None:
    """Make an image of any format that needs no guest."""
    if format is Format.ISO9660:
        create_iso(path, folder, progress=progress)
    else:
        create_image(path, format=format, folder=folder, progress=progress)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "folder", PLAIN, many=300)


@pytest.mark.parametrize(("kind", "block_size"), list(product(Partition, BLOCK_SIZES)))
def test_fat32(folder: Path, tmp_path: Path, kind: Partition, block_size: int) -> None:
    reported: list[tuple[int, int]] = []
    image = tmp_path / "disk.raw"
    volume = create_image(
        image,
        partition=kind,
        folder=folder,
        block_size=block_size,
        progress=lambda done, total: reported.append((done, total)),
    )
    total = sum(map(len, contents(folder).values()))
    assert reported[0] == (0, 0)
    assert reported[-1] == (total, total)
    assert all(done <= total for done, _ in reported)
    assert (volume.label, volume.disk_size) == ("FOLDER", image.stat().st_size)
    assert image.stat().st_blocks * 512 < total + 8 * MIB
    blocks = volume.length // block_size
    assert table(image, block_size) == f"{MIB // block_size} {blocks} {TYPES[kind]}"
    if block_size == 512:
        assert "No errors detected" in run("sfdisk", "--verify", str(image))
    run("fsck.vfat", "-n", str(partition(image, volume, tmp_path / "partition")))
    assert "FOLDER" in run("mdir", "-i", f"{image}@@1M", "::")
    copied = tmp_path / "copied"
    copied.mkdir()
    run("mcopy", "-s", "-m", "-i", f"{image}@@1M", "::*", str(copied))
    assert contents(copied) == contents(folder)
    assert (copied / "big.bin").stat().st_mtime == WHEN


@pytest.mark.parametrize("kind", Partition)
def test_ext4(tmp_path: Path, kind: Partition) -> None:
    folder = make_folder(tmp_path / "folder", {**PLAIN, **ODD}, many=300)
    (folder / "link").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe")
    (Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff"))).write_bytes(b"bad")
    image = tmp_path / "disk.raw"
    volume = create_image(image, format=Format.EXT4, partition=kind, folder=folder, label="my disk")
    inside = partition(image, volume, tmp_path / "partition")
    assert "0 bad" not in run("e2fsck", "-fn", str(inside))
    assert "Linux" in table(image, 512)
    copied = tmp_path / "copied"
    copied.mkdir()
    run("debugfs", "-R", f'rdump / "{copied}"', str(inside))
    assert contents(copied) == contents(folder)
    assert os.readlink(copied / "link") == "/nowhere"
    assert (copied / "big.bin").stat().st_mtime == WHEN
    assert "Filesystem volume name:   my disk" in run("debugfs", "-R", "stats -h", str(inside))


def test_ext4_has_room_for_many_small_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", {f"{number}": b"" for number in range(4000)})
    volume = create_image(tmp_path / "x", format=Format.EXT4, folder=folder, size=60 * MIB)
    inside = partition(tmp_path / "x", volume, tmp_path / "partition")
    run("e2fsck", "-fn", str(inside))
    assert "3999" in run("debugfs", "-R", "ls /", str(inside))


@pytest.mark.parametrize("format", [Format.FAT32, Format.EXT4])
def test_empty_images_of_a_size(tmp_path: Path, format: Format) -> None:
    image = tmp_path / "disk.raw"
    volume = create_image(image, size=100 * MIB, format=format, partition=Partition.GPT, label="new")
    assert image.stat().st_size == 100 * MIB
    inside = partition(image, volume, tmp_path / "partition")
    run(*(("fsck.vfat", "-n") if format is Format.FAT32 else ("e2fsck", "-fn")), str(inside))


def test_settings_of_the_user_change_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".xorrisorc").write_text("-map /nothing/there /added\n-volid CHANGED\n")
    (home / ".mtoolsrc").write_text("drive a:\n  what\n")
    monkeypatch.setenv("HOME", str(home))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    create_iso(tmp_path / "disk.iso", folder, label="MINE")
    listed = run("xorriso", "-no_rc", "-indev", str(tmp_path / "disk.iso"), "-find", "/").split("\n")
    assert [line for line in listed if line.startswith("'/")] == ["'/'", "'/a.txt'"]
    assert "Volume id    : 'MINE'" in listed
    create_image(tmp_path / "disk.raw", folder=folder)


def test_iso(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "folder", ISO, many=300)
    (folder / "link").symlink_to("/nowhere")
    image = tmp_path / "disk.iso"
    create_iso(image, folder, label="drivers_1")
    assert caplog.messages[0].startswith(f"{folder}: Windows will show these with other names: a*b?, ")
    assert image.read_bytes()[32769:32774] == b"CD001"
    assert image.read_bytes()[32808:32840].rstrip() == b"DRIVERS_1"
    copied = tmp_path / "copied"
    run("xorriso", "-osirrox", "on", "-indev", str(image), "-extract", "/", str(copied))
    run("chmod", "-R", "u+rwX", str(copied))
    assert contents(copied) == contents(folder)
    assert os.readlink(copied / "link") == "/nowhere"
    assert (copied / "big.bin").stat().st_mtime == WHEN


@pytest.mark.parametrize("format", [Format.EXFAT, Format.NTFS, Format.FAT32])
def test_what_the_guest_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format) -> None:
    folder = make_folder(tmp_path / "folder", {"ä": b"odd"})
    filled: list[tuple[int, str]] = []

    def fill(build: ImageBuild, volume: Volume) -> None:
        assert build.tree is not None
        assert os.fstat(build.fd).st_size == volume.disk_size
        filled.append((len(build.tree.entries), volume.format))

    monkeypatch.setattr(build_module, "fill_in_guest", fill)
    create_image(tmp_path / "x", format=format, folder=folder)
    assert filled == [(1, format)]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, UsageError, "needs a size"),
        ({"size": 100 * MIB, "block_size": 1024}, UsageError, "512 or 4096"),
        ({"size": 100 * MIB, "format": Format.ISO9660}, UsageError, "has no partitions"),
        ({"size": 100 * MIB, "label": "ä"}, UsageError, "is not a valid label"),
        ({"size": 100 * MIB + 1}, UsageError, "not a multiple"),
        ({"size": MIB}, ImageError, "too small"),
        ({"folder": "folder", "size": 33 * MIB, "format": Format.EXT4}, ImageError, "the folder needs"),
        ({"folder": "folder/missing"}, ImageError, "no such file"),
        ({"folder": "bad"}, ImageError, "cannot hold"),
        ({"size": 2**62, "partition": Partition.GPT, "format": Format.EXT4}, ImageError, "cannot be created|at most"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], error: type[Exception], text: str
) -> None:
    make_folder(tmp_path / "folder", {"big": bytes(20 * MIB)})
    make_folder(tmp_path / "bad", {"a*": b""})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        create_image("disk.raw", **arguments)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["bad", "folder"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_is_overwritten(folder: Path, tmp_path: Path, kind: str) -> None:
    image = tmp_path / "disk.raw"
    if kind == "file":
        image.write_bytes(b"precious")
    else:
        image.symlink_to("nowhere")
    for format in (Format.FAT32, Format.ISO9660):
        with pytest.raises(ImageError, match="already exists") as caught:
            make(image, format, folder)
        assert caught.value.reason is Reason.EXISTS
    assert not (tmp_path / "nowhere").exists()


def test_not_inside_its_own_folder(folder: Path) -> None:
    for place in (folder / "x.raw", folder / "many" / "x.raw", folder / "many" / ".." / "x.raw"):
        with pytest.raises(ImageError, match="is inside the folder"):
            create_image(place, folder=folder)


@pytest.fixture(params=[True, False], ids=["unnamed", "named"])
def unnamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the filesystem supports files without a name."""
    if not request.param:
        real = os.open

        def refuse(path: str, flags: int, *more: int, **names: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return real(path, flags, *more, **names)

        monkeypatch.setattr("os.open", refuse)
    return bool(request.param)


def test_a_new_file_appears_at_the_end(tmp_path: Path, unnamed: bool) -> None:
    with new_file(tmp_path / "x") as fd:
        os.write(fd, b"content")
        assert (tmp_path / "x").exists() is not unnamed
    assert (tmp_path / "x").read_bytes() == b"content"
    with pytest.raises(ImageError, match="already exists"), new_file(tmp_path / "x") as fd:
        os.write(fd, b"other")
    assert (tmp_path / "x").read_bytes() == b"content"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ImageError("no", reason=Reason.CHANGED)])
def test_a_failure_leaves_no_file(tmp_path: Path, unnamed: bool, error: BaseException) -> None:
    with pytest.raises(error if isinstance(error, type) else type(error)), new_file(tmp_path / "x"):
        raise error
    assert not os.listdir(tmp_path)


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="already exists"), new_file(tmp_path / "x"):
        (tmp_path / "x").write_bytes(b"theirs")
    assert (tmp_path / "x").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, Reason.NO_SPACE),
        (errno.EDQUOT, Reason.NO_SPACE),
        (errno.EROFS, Reason.NO_PERMISSION),
        (errno.ENOENT, Reason.NOT_FOUND),
        (errno.EIO, Reason.IO_ERROR),
    ],
)
def test_paths_where_no_image_can_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason
) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ImageError) as caught, new_file(tmp_path / "x"):
        pass
    assert caught.value.reason is reason
    with pytest.raises(ImageError) as caught, new_file(tmp_path / "missing" / "x"):
        pass
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("format", [Format.FAT32, Format.EXT4, Format.ISO9660])
def test_a_cancelled_build(folder: Path, tmp_path: Path, format: Format) -> None:
    before = descriptors()

    class GivenUp(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if total:
            raise GivenUp

    with pytest.raises(GivenUp):
        make(tmp_path / "x", format, folder, progress)
    assert sorted(os.listdir(tmp_path)) == ["folder"]
    assert descriptors() <= before


@pytest.mark.parametrize("format", [Format.FAT32, Format.EXT4, Format.ISO9660])
@pytest.mark.parametrize("what", ["lower.txt", "sub"])
@pytest.mark.parametrize("back", [True, False])
def test_a_link_out_that_is_swapped_in_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format, what: str, back: bool
) -> None:
    """Before the tool that copies runs, and back after it: the image never gets a name."""
    folder = make_folder(tmp_path / "folder", {"lower.txt": b"mine", "sub/lower.txt": b"mine"})
    outside = make_folder(tmp_path / "outside", {"lower.txt": b"SECRET"})
    outputs: list[bytes] = []
    start = ImageBuild._execute

    def execute(self: ImageBuild, command: Sequence[str], *arguments: Any) -> tuple[str, int]:
        copies = Path(command[0]).name in ("mcopy", "mke2fs", "xorrisofs")
        if copies and not (tmp_path / "kept").exists():
            (folder / what).rename(tmp_path / "kept")
            (folder / what).symlink_to(outside if what == "sub" else outside / "lower.txt")
        result = start(self, command, *arguments)
        if copies and back:
            (folder / what).unlink()
            (tmp_path / "kept").rename(folder / what)
        outputs.append(os.pread(self.fd, 4 << 20, 1 << 20))
        return result

    monkeypatch.setattr(ImageBuild, "_execute", execute)
    with pytest.raises(ImageError, match="changed while it was copied") as caught:
        make(tmp_path / "x", format, folder)
    assert caught.value.reason is Reason.CHANGED
    assert not (tmp_path / "x").exists()
    if format is Format.FAT32:  # mcopy gets descriptors; the other tools open names
        assert not any(b"SECRET" in output for output in outputs)
        assert any(b"mine" in output for output in outputs)


@pytest.mark.parametrize("format", [Format.FAT32, Format.EXT4, Format.ISO9660])
def test_who_may_read_an_image(tmp_path: Path, format: Format, unnamed: bool) -> None:
    """Files of the folder may be private; an empty image is not."""
    folder = make_folder(tmp_path / "folder", {"x": b"1"})
    before = os.umask(0o022)
    try:
        make(tmp_path / "image", format, folder)
        create_image(tmp_path / "empty", size=64 << 20)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()}
    assert modes == {"image": 0o600, "empty": 0o644}


def test_more_files_than_one_call_copies(tmp_path: Path) -> None:
    files = {f"file {n:04}.txt": b"%d" % n for n in range(300)} | {"sub/[a] ü.txt": b"x"}
    folder = make_folder(tmp_path / "folder", files)
    (folder / "link.txt").symlink_to("file 0001.txt")
    make(tmp_path / "x", Format.FAT32, folder)
    copied = tmp_path / "copied"
    copied.mkdir()
    run("mcopy", "-s", "-m", "-i", f"{tmp_path}/x@@1M", "::/", str(copied))
    found = {str(path.relative_to(copied)): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert found == files | {"link.txt": b"1"}


@pytest.mark.parametrize("format", [Format.FAT32, Format.EXT4, Format.ISO9660])
@pytest.mark.parametrize("tick", [0.001, PROGRESS_INTERVAL])
def test_a_file_that_grows_meanwhile(
    folder: Path, tmp_path: Path, format: Format, tick: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the tool runs, which may refuse it, or when it has ended."""
    monkeypatch.setattr("farplug.image.tools.PROGRESS_INTERVAL", tick)

    def progress(done: int, total: int) -> None:
        if total:
            with (folder / "lower.txt").open("ab") as file:
                file.write(b"more")

    with pytest.raises(ImageError, match=r"changed while it was copied: lower\.txt") as caught:
        make(tmp_path / "x", format, folder, progress)
    assert caught.value.reason is Reason.CHANGED
    assert sorted(os.listdir(tmp_path)) == ["folder"]


def test_a_full_host_is_reported_before_copying(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**32 - 1)
    monkeypatch.setattr(build_module, "_METADATA_ROOM", 1 << 60)
    for format in (Format.EXT4, Format.ISO9660):
        with pytest.raises(
            ImageError, match=r"no space left for the image \(\d+ bytes are needed in /.*, \d+ are free"
        ):
            make(tmp_path / "x", format, folder)


def test_a_missing_program(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(SetupError, match="xorrisofs is not installed") as caught:
        create_iso(tmp_path / "x", folder)
    assert caught.value.remedy.command == "sudo apt-get install xorriso"
    assert sorted(os.listdir(tmp_path)) == ["folder"]


def test_what_is_left_out_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "folder", {"a": b""})
    os.mkfifo(folder / "pipe")
    create_image(tmp_path / "x", folder=folder)
    assert caplog.messages == [f"{folder}: left out, a pipe: pipe"]
