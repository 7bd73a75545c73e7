"""Folders as disks: what the guest sees in every format is what is in the folder."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.guest.plugging import LABORATORY, disk_of
from tests.image.support import ISO, MIB, ODD, PLAIN, SIMILAR, WHEN, alike, contents, make_folder, partition, run
from tests.long import LONG

from farplug.errors import ImageError, Reason
from farplug.image import Format, Partition, Volume, build, create_image, create_iso, folder_store, upcase
from farplug.image.fill import fill_in_guest
from farplug.image.tools import ImageBuild
from farplug.image.tree import scan
from farplug.testing import GuestConfig, GuestFixture
from farplug.usb import Device
from farplug.virtual.disk import disk_device

MOUNT = {
    Format.FAT32: "mount -t vfat -o ro,utf8=1,tz=UTC",
    Format.EXFAT: "mount -t exfat -o ro,iocharset=utf8",
    Format.EXT4: "mount -t ext4 -o ro,noload",
    Format.NTFS: "ntfs-3g -o ro",
    Format.ISO9660: "mount -t iso9660 -o ro",
}
FSCK = {
    Format.EXFAT: ("fsck.exfat", "-n"),
    Format.NTFS: ("ntfsfix", "-n"),
}


@dataclass(frozen=True)
class Case:
    """A disk made of a folder.

    Attributes:
        odd: with names that FAT32 needs a guest for, and with names that are equal for Python, but not for the format:
            the Turkish i, the micro sign, title case, and hundreds more.
    """

    format: Format
    partition: Partition = Partition.MBR
    block_size: int = 512
    odd: bool = True

    def __str__(self) -> str:
        return f"{self.format}-{self.partition}-{self.block_size}-{'odd' if self.odd else 'plain'}"


LOOKUP = {
    Format.EXFAT: "mount -t exfat -o iocharset=utf8",
    Format.NTFS: "lowntfs-3g -o ignore_case,big_writes",
}
"""Mounts that compare names as the format does, without regard to case. (ntfs-3g itself compares bytes.)"""

UPCASE = {Format.EXFAT: upcase.EXFAT, Format.NTFS: upcase.NTFS}
BLOCK_SIZE = {Format.EXFAT: 4096, Format.NTFS: 512}
STEP = 1 if LONG else 4
"""Of names that are equal except for case, and of characters, every fourth suffices for a short test."""

ROOM = {"room.bin": bytes(16 * MIB // STEP)}
"""The guest removes this file before it writes: an image has hardly more space than its folder needs."""

CASES = [
    Case(Format.FAT32, odd=False),
    Case(Format.FAT32, Partition.GPT, 4096, odd=False),
    Case(Format.FAT32, Partition.GPT),
    Case(Format.EXT4, Partition.GPT),
    Case(Format.EXT4, Partition.MBR, 4096),
]


@pytest.fixture(scope="module")
def farplug_guest_config() -> GuestConfig:
    return LABORATORY


@contextmanager
def disk_in(guest: GuestFixture, device: Device) -> Iterator[str]:
    """Plug a disk in; return the guest's block device."""
    with guest.plug(device):
        disk = guest.call(disk_of(guest.vm, device))
        yield disk
    guest.wait_until_fails(f"test -e {disk}")


def some_alike(format: Format) -> dict[str, bytes]:
    """Return files whose names are equal except for case for Python, but not for the file system, or some of them."""
    files = alike(format)
    folders = set(sorted({path.rpartition("/")[0] for path in files})[::STEP])
    return {path: content for path, content in files.items() if path.rpartition("/")[0] in folders}


def look(guest: GuestFixture, mount: str, disk: str) -> tuple[dict[str, str], str]:
    """Mount a partition: MD5 of every file by its path, and the time of one."""
    output = guest.succeed(
        f"""set -e
        {mount} {disk} /mnt
        cd /mnt
        find . -type f -exec md5sum {{}} +
        stat -c %Y big.bin
        cd /
        umount /mnt"""
    )
    *lines, when = output.splitlines()
    return {line[36:]: line[:32] for line in lines}, when


def check_contents(folder: Path, seen: dict[str, str], when: str) -> None:
    """Check what the guest has seen: every file of a folder, and nothing else."""
    assert seen == {path: hashlib.md5(content).hexdigest() for path, content in contents(folder).items()}
    assert when == str(WHEN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_guest_sees_the_folder(
    farplug_guest: GuestFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    files = {**PLAIN, **ODD} if case.odd else dict(PLAIN)
    if case.odd and case.format is Format.FAT32:
        files |= SIMILAR
        files |= some_alike(case.format)
    folder = make_folder(tmp_path / "a folder", files, many=300)
    (folder / "nothing").symlink_to("nowhere")
    filled: list[Volume] = []

    def fill(build: ImageBuild, volume: Volume) -> None:
        fill_in_guest(build, volume)
        filled.append(volume)

    monkeypatch.setattr(build, "fill_in_guest", fill)
    store = folder_store(folder, format=case.format, partition=case.partition, block_size=case.block_size)
    assert bool(filled) is (case.odd and case.format is not Format.EXT4)
    with disk_in(farplug_guest, disk_device(store)) as disk:
        farplug_guest.wait_until_succeeds(f"head -c 1 {disk}1")
        name = disk.removeprefix("/dev/")
        facts = farplug_guest.succeed(f"cat /sys/block/{name}/queue/logical_block_size /sys/block/{name}/ro")
        assert facts.split() == [str(case.block_size), "1"]
        seen, when = look(farplug_guest, MOUNT[case.format], f"{disk}1")
    check_contents(folder, seen, when)


@pytest.mark.parametrize("format", LOOKUP)
def test_images_are_in_order_and_names_equal_by_the_table_of_the_file_system(
    farplug_guest: GuestFixture, tmp_path: Path, format: Format
) -> None:
    """Each character is written to a file with its name: characters that are in one file are equal."""
    folder = make_folder(tmp_path / "a folder", {**PLAIN, **ODD, **some_alike(format), **ROOM}, many=300)
    (folder / "nothing").symlink_to("nowhere")
    image = tmp_path / "disk.raw"
    volume = create_image(
        image,
        format=format,
        partition=Partition.GPT,
        block_size=BLOCK_SIZE[format],
        folder=folder,
        label="Größe 😀",
    )
    inside = partition(image, volume, tmp_path / "partition")
    run(*FSCK[format], str(inside))
    assert run("blkid", "-p", "-o", "value", "-s", "LABEL", str(inside)) == "Größe 😀\n"

    table = {chr(unit): chr(upper) for unit, upper in UPCASE[format].items()}
    equal: dict[str, set[str]] = defaultdict(set)
    for character in {*table, *table.values(), *(path[-5] for path in alike(format))}:
        equal[table.get(character, character)].add(character)
    expected = [equal[upper] for upper in sorted(equal)[::STEP]]
    with disk_in(farplug_guest, disk_device(image, block_size=BLOCK_SIZE[format])) as disk:
        farplug_guest.wait_until_succeeds(f"head -c 1 {disk}1")
        check_contents(folder, *look(farplug_guest, MOUNT[format], f"{disk}1"))
        result = farplug_guest.execute(
            f"""set -e
            {LOOKUP[format]} {disk}1 /mnt
            rm /mnt/room.bin
            mkdir /mnt/characters
            cd /mnt/characters
            while read -r character; do
                echo "$character" >>"$character.txt"
            done
            grep "" *
            cd /
            umount /mnt""",
            stdin="".join(f"{character}\n" for character in sorted(set().union(*expected))).encode(),
        )
    assert not result.exit_code
    seen: dict[str, set[str]] = defaultdict(set)
    for line in result.output.splitlines():
        name, _, character = line.rpartition(":")
        seen[name].add(character)
    assert sorted(map(sorted, seen.values())) == sorted(map(sorted, expected))


def test_an_empty_image(farplug_guest: GuestFixture, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    create_image(image, size=64 * MIB, format=Format.EXFAT)
    assert image.stat().st_size == 64 * MIB
    assert image.stat().st_blocks * 512 < 8 * MIB
    with disk_in(farplug_guest, disk_device(image)) as disk:
        farplug_guest.wait_until_succeeds(f"head -c 1 {disk}1")
        assert farplug_guest.succeed(f"mount -t exfat {disk}1 /mnt", "ls -A /mnt", "umount /mnt") == ""


def test_an_iso_image(farplug_guest: GuestFixture, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a folder", ISO, many=300)
    create_iso(tmp_path / "disk.iso", folder)
    with disk_in(farplug_guest, disk_device(tmp_path / "disk.iso", read_only=True)) as disk:
        seen, when = look(farplug_guest, MOUNT[Format.ISO9660], disk)
        joliet = farplug_guest.succeed(
            f"mount -t iso9660 -o ro,norock,iocharset=utf8 {disk} /mnt && cd /mnt && find . && cd / && umount /mnt"
        )
    check_contents(folder, seen, when)
    assert {"./Größe der Dateien.txt", "./中文 name.txt", "./longfilename1.txt", "./d[1]/x[y]/z"} <= set(
        joliet.splitlines()
    )


def test_the_guest_reports_a_folder_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "a folder", {"😀": bytes(8 * MIB), "big.bin": bytes(30 * MIB)})
    before = set(tmp_path.iterdir())

    def too_small(build: ImageBuild, volume: Volume) -> None:
        """The folder grew since it was measured."""
        with (folder / "big.bin").open("ab") as file:
            file.truncate(60 * MIB)
        with pytest.raises(ImageError, match="the folder does not fit") as caught:
            fill_in_guest(ImageBuild(build.fd, scan(folder), build.progress), volume)
        assert caught.value.reason is Reason.TOO_LARGE
        raise caught.value

    monkeypatch.setattr(build, "fill_in_guest", too_small)
    with pytest.raises(ImageError, match=r"changed while it was copied: big\.bin") as caught:  # and that is why
        create_image(tmp_path / "x", folder=folder)
    assert caught.value.reason is Reason.CHANGED
    assert set(tmp_path.iterdir()) == before
