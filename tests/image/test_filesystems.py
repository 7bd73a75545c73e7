from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.image.support import MIB, ODD, PLAIN, alike, make_folder, run
from tests.image.test_names import tree_of

from farplug.errors import ImageError, Reason
from farplug.image import filesystems
from farplug.image.tools import ImageBuild
from farplug.image.tree import scan
from farplug.image.volume import Format, Partition, Volume


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    yield descriptor
    os.close(descriptor)


def volume(length: int, **values: object) -> Volume:
    figures: dict[str, object] = {"format": Format.FAT32, "partition": Partition.GPT, "label": "X", "block_size": 512}
    return Volume(**{**figures, **values}, length=length, disk_size=length + 2 * MIB)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [path.rpartition("/")[2] for path in PLAIN])
def test_names_that_mtools_can(name: str) -> None:
    assert filesystems.mtools_can_write(tree_of(name), 4096)


@pytest.mark.parametrize(
    "name", [*(path for path in ODD), "nul", "COM1", "a~1", "Ä.TXT", "ü", "ÜA.txt", "ﬁ.a.é"[:3], "漢字", "漢字.é"]
)
def test_names_that_it_may_not_keep(name: str) -> None:
    assert not filesystems.mtools_can_write(tree_of(name), 512)


def test_long_names_need_a_large_cluster() -> None:
    assert filesystems.mtools_can_write(tree_of("x" * 195), 512)
    assert not filesystems.mtools_can_write(tree_of("x" * 196), 512)
    assert filesystems.mtools_can_write(tree_of("x" * 255), 1024)


def test_many_similar_names_are_too_slow() -> None:
    def similar(count: int) -> list[str]:
        return [f"folder/IMG_2026 {number}.jpeg" for number in range(count)]

    assert filesystems.mtools_can_write(
        tree_of(*similar(200), "IMG_20", "folder/IMG_20.jpx", "folder/IMG.20.jpeg"), 512
    )
    for another in ("folder/img_202.jpe", "folder/.i m g _ 2 0.jpeg"):
        assert not filesystems.mtools_can_write(tree_of(*similar(200), another), 512)
    assert filesystems.mtools_can_write(tree_of(*(f"{number:06} of many" for number in range(20_000))), 512)


def test_long_names_with_large_clusters_are_written(fd: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {f"{letter * 255}": b"" for letter in "abcdefghij"})
    disk = volume(66 * MIB)
    assert disk.cluster_size == 1024
    build = ImageBuild(fd, scan(folder), lambda done, total: None)
    os.ftruncate(fd, disk.disk_size)
    filesystems.format_fat32(build, disk)
    filesystems.copy_with_mtools(build, scan(folder))
    listed = build.run("mdir", "-b", "-i", f"{build.path}@@1M", "::", MTOOLSRC="/dev/null")
    assert listed.split() == [f"::/{letter * 255}" for letter in "abcdefghij"]


def test_names_that_are_equal_in_lower_case_only() -> None:
    for one, other in (("\u01c4", "\u01c5"), ("\u2126", "\u03c9"), ("\u0130", "i"), ("\u1e9e", "ß")):
        assert filesystems.mtools_can_write(tree_of(f"a long name {one}.txt", f"sub/a long name {other}.txt"), 512)
        assert not filesystems.mtools_can_write(tree_of(f"a long name {one}.txt", f"a long name {other}.txt"), 512)


def test_mtools_keeps_what_is_alike(fd: int, tmp_path: Path) -> None:
    """Each pair in a folder of its own, with names that are long, so that mtools can write them."""
    files = {f"{path[:-5]}a long name {path[-5:]}": content for path, content in alike(Format.FAT32).items()}
    tree = scan(make_folder(tmp_path / "f", {path: files[path] for path in sorted(files)}))
    can = {
        folder: entries
        for folder, entries in tree.folders.items()
        if folder.count("/") == 1 and filesystems.mtools_can_write(tree_of(*(entry.name for entry in entries)), 512)
    }
    assert 40 < len(can) < len(tree.folders) - 100
    entries = [entry for entry in tree.entries if entry.path in can or entry.parent in can or entry.path == "alike"]
    disk = volume(66 * MIB)
    build = ImageBuild(fd, tree, lambda done, total: None)
    os.ftruncate(fd, disk.disk_size)
    filesystems.format_fat32(build, disk)
    filesystems.copy_with_mtools(build, replace(tree, entries=tuple(entries)))
    listed = build.run("mdir", "-/", "-b", "-i", f"{build.path}@@1M", "::", MTOOLSRC="/dev/null")
    found = {line.removeprefix("::/") for line in listed.splitlines() if line.endswith(".txt")}
    assert found == {entry.path for entry in entries if not entry.is_folder}


def test_many_files_go_in_several_calls(fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "ARGUMENT_BYTES", 1000)
    folder = make_folder(tmp_path / "f", {f"folder {number}/a": b"x" for number in range(10)})
    make_folder(folder, {f"file {number}": b"x" for number in range(10)})
    disk = volume(33 * MIB)
    os.ftruncate(fd, disk.disk_size)
    build = ImageBuild(fd, scan(folder), lambda done, total: None)
    filesystems.format_fat32(build, disk)
    filesystems.copy_with_mtools(build, scan(folder))
    listed = build.run("mdir", "-b", "-/", "-i", f"{build.path}@@1M", "::", MTOOLSRC="/dev/null")
    assert len(listed.splitlines()) == 30


def test_a_volume_that_gets_full(fd: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {"big": bytes(40 * MIB)})
    disk = volume(33 * MIB)
    os.ftruncate(fd, disk.disk_size)
    build = ImageBuild(fd, scan(folder), lambda done, total: None)
    filesystems.format_fat32(build, disk)
    with pytest.raises(ImageError, match="the image is full") as caught:
        filesystems.copy_with_mtools(build, scan(folder))
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_partition_that_does_not_fit(fd: int) -> None:
    os.ftruncate(fd, 10 * MIB)
    with pytest.raises(ImageError, match="fdisk made no partition") as caught:
        filesystems.write_table(ImageBuild(fd, None, lambda done, total: None), volume(33 * MIB))
    assert caught.value.reason is Reason.IO_ERROR


def test_names_of_partitions(fd: int) -> None:
    disk = volume(33 * MIB, label='a"b\\ü😀', format=Format.EXFAT)
    os.ftruncate(fd, disk.disk_size)
    build = ImageBuild(fd, None, lambda done, total: None)
    filesystems.write_table(build, disk)
    assert run("sfdisk", "--part-label", f"/proc/{os.getpid()}/fd/{fd}", "1") == "a_b_ü_\n"


def test_needs_cover_what_is_used() -> None:
    tree = tree_of(*(f"folder/{number}" for number in range(1000)), size=5000)
    content = 1000 * 8192
    assert filesystems.exfat_needs(tree, 4096) > content
    assert filesystems.ntfs_needs(tree, 4096) > content
    assert filesystems.ext4_needs(tree) > content
    assert filesystems.fat32_needs(tree, 4096) > content
