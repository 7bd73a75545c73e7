"""The tools that people try disks with, in the guest: every byte comes back, and file systems live and are sound.

What they leave is checked twice: by the guest, and on the host in the image after the disk was detached.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import LABORATORY, MIB, STORAGE, blank, disk_of, enable_unmap, gone, plugged
from tests.long import LONG, every_value

from farplug.programs import find_program
from farplug.testing import QemuGuest
from farplug.virtual import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

TEBIBYTE = 1 << 40

TROUBLE = re.compile(r"reset |rror|timed out|Sense Key|offline|corrupt", re.IGNORECASE)
"""What the guest's kernel must not say about a disk that works."""


@dataclass(frozen=True)
class Drive:
    """A disk in the guest."""

    guest: QemuGuest
    image: Path
    disk: str

    async def run(self, command: str, timeout: float = 120) -> str:
        """Run a command that must succeed, ``{d}`` being the disk and ``{n}`` its name in /sys/block."""
        return await self.guest.check(command.format(d=self.disk, n=self.disk.removeprefix("/dev/")), timeout=timeout)

    @property
    def used(self) -> int:
        """Bytes of the image that take up space."""
        return self.image.stat().st_blocks * 512


@asynccontextmanager
async def drive(
    pool: Guests, storage: str, image: Path, *, block_size: int = 512, port: int = 0
) -> AsyncIterator[Drive]:
    """Plug an image; the guest's kernel has nothing to complain about while it is there."""
    guest = await pool.get(LABORATORY)
    device = disk_device(image, block_size=block_size, transport=STORAGE[storage].transport)
    async with plugged(guest.targets[port], device):
        disk = await disk_of(guest, device)
        await guest.check("dmesg -c >/dev/null")
        plug = Drive(guest, image, disk)
        assert STORAGE[storage].driver in await plug.run("readlink /sys/block/{n}/device/../../../driver")
        yield plug
        log = await guest.check("dmesg")
        assert not TROUBLE.search(log), log
    await gone(guest, disk)  # what Linux writes when it leaves belongs to no other disk
    await device.dispose()


FIO = """
fio --name=verify --filename={{d}} --size=6m --offset={offset} --rw={pattern} --bsrange={sizes} --blockalign={align} \
    --verify=crc32c --verify_fatal=1 --do_verify=1 {mode} >/tmp/fio 2>&1 || {{{{ cat /tmp/fio; exit 1; }}}}
echo 3 >/proc/sys/vm/drop_caches
dd if={{d}} bs=1M skip={offset_mib} count=6 iflag=direct 2>/dev/null | md5sum
"""
QUEUED = "--direct=1 --ioengine=libaio --iodepth=16"
BUFFERED = "--direct=0 --ioengine=psync --fsync=64"
JOBS = {
    "buffered": (64 * MIB, 0, 512, "randrw", BUFFERED),
    "queued": (64 * MIB, 0, 512, "randwrite", QUEUED),
    "large-blocks": (64 * MIB, 0, 4096, "randrw", QUEUED),
    "across-2-tib": (3 * TEBIBYTE, 2 * TEBIBYTE - 3 * MIB, 512, "randrw", QUEUED),
}
"""The size of the image, the offset of the job, the size of the disk's blocks, what is read and written, and how."""


@every_value(storage=STORAGE, job=JOBS)
async def test_fio_verifies_random_sizes_and_alignments(guests: Guests, tmp_path: Path, storage: str, job: str) -> None:
    size, offset, block_size, pattern, mode = JOBS[job]
    try:
        image = blank(tmp_path / "disk.raw", size)
    except OSError:
        pytest.skip(f"this file system has no files of {size >> 40} TiB")
    script = FIO.format(
        offset=offset,
        offset_mib=offset // MIB,
        pattern=pattern,
        sizes=f"{block_size}-128k",
        align=block_size,
        mode=mode,
    )
    async with drive(guests, storage, image, block_size=block_size) as plug:
        output = (await plug.run(script)).split()[0]
    with image.open("rb") as file:
        file.seek(offset)
        content = file.read(6 * MIB)
    assert content.count(0) < 0.6 * len(content)  # half of randrw are reads
    assert hashlib.md5(content).hexdigest() == output


@pytest.mark.parametrize("storage", STORAGE)
async def test_f3probe_finds_the_capacity_real(guests: Guests, tmp_path: Path, storage: str) -> None:
    async with drive(guests, storage, blank(tmp_path / "disk.raw", 64 * MIB)) as plug:
        output = await plug.run("f3probe --destructive --time-ops {d}")
    assert "is the real thing" in output, output
    assert "Announced size: 64.00 MB (131072 blocks)" in output, output


@pytest.mark.parametrize("storage", STORAGE)
async def test_badblocks_writes_and_reads_every_byte(guests: Guests, tmp_path: Path, storage: str) -> None:
    async with drive(guests, storage, image := blank(tmp_path / "disk.raw", 16 * MIB)) as plug:
        assert await plug.run("badblocks -w -b 65536 -c 16 {d}") == ""  # AA, 55, FF, 00, each written and read
        assert image.read_bytes() == bytes(16 * MIB)
        assert await plug.run("badblocks -w -b 65536 -c 16 -t random -o /tmp/bad {d}; cat /tmp/bad") == ""
    assert image.read_bytes()[: 64 << 10].count(0) < 1024


# Not lazily: Linux would write tables of inodes some time after the first mount, while a test measures the image.
MAKE = {"ext4": "mke2fs -q -F -t ext4 -E lazy_itable_init=0", "vfat": "mkfs.vfat", "exfat": "mkfs.exfat"}
CHECK = {"ext4": "e2fsck -fn", "vfat": "fsck.vfat -n", "exfat": "fsck.exfat -n"}

BORN = """
set -e
{make} {{d}} >/dev/null 2>&1
mount {{d}} /mnt
mkdir -p /mnt/folder/below
head -c {large} /dev/urandom >/mnt/folder/large
for i in $(seq 60); do head -c $((i * 137)) /dev/urandom >/mnt/folder/below/"a long name of file $i"; done
cp -r /mnt/folder /mnt/copy
cd /mnt; find . -type f -exec md5sum {{{{}}}} + >/tmp/sums; cd /
cp /tmp/sums /mnt/sums
umount /mnt
{check} {{d}} >/tmp/check 2>&1 || {{{{ cat /tmp/check; exit 1; }}}}
"""
GROWN = """
set -e
mount {{d}} /mnt
cd /mnt
md5sum -c sums >/tmp/check 2>&1 || {{{{ cat /tmp/check; exit 1; }}}}
grep -c OK /tmp/check
mv copy/large moved
rm -r folder
cp -r copy again
dd if=/dev/urandom of=moved bs=4096 seek=100 count=7 conv=notrunc,fsync 2>/dev/null
truncate -s 100000 copy/below/*1
find . -type f -exec md5sum {{{{}}}} + >/tmp/sums
md5sum <moved
cp /tmp/sums sums
cd /
umount /mnt
mount {{d}} /mnt
cd /mnt
grep -v ' ./sums$' /tmp/sums >/tmp/others
md5sum -c /tmp/others >/tmp/check 2>&1 || {{{{ cat /tmp/check; exit 1; }}}}
md5sum <moved
cd /
umount /mnt
{check} {{d}} >/tmp/check 2>&1 || {{{{ cat /tmp/check; exit 1; }}}}
"""


def sound(image: Path, filesystem: str) -> None:
    """The host's tools find nothing wrong in the image."""
    program, *options = CHECK[filesystem].split()
    result = subprocess.run([find_program(program), *options, image], capture_output=True, text=True)
    assert result.returncode == 0, result


@every_value(storage=STORAGE, filesystem=MAKE, block_size=[512, 4096])
async def test_life_of_a_file_system(
    guests: Guests, tmp_path: Path, storage: str, filesystem: str, block_size: int
) -> None:
    """Made, filled, checked, unplugged, plugged again, changed, checked."""
    image = blank(tmp_path / "disk.raw", 64 * MIB)
    words = {"make": MAKE[filesystem], "check": CHECK[filesystem], "large": 5_000_000 if LONG else 1_500_000}
    async with drive(guests, storage, image, block_size=block_size) as plug:
        await plug.run(BORN.format(**words))
    sound(image, filesystem)
    async with drive(guests, storage, image, block_size=block_size, port=1) as plug:
        count, before, after = re.findall(r"^[0-9a-f]+", await plug.run(GROWN.format(**words)), re.MULTILINE)
    assert int(count) == 122
    assert before == after
    sound(image, filesystem)


FILLED = """
set -e
{make} {{d}} >/dev/null 2>&1
mount {{d}} /mnt
head -c 4000000 /dev/urandom >/mnt/large
head -c 500000 /dev/urandom >/mnt/kept
md5sum </mnt/kept
sync
"""
TRIMMED = """
set -e
rm /mnt/large
sync
fstrim -v /mnt
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount {d} /mnt
md5sum </mnt/kept
umount /mnt
"""


@every_value(storage=STORAGE, filesystem=MAKE)
async def test_fstrim_makes_the_image_smaller(guests: Guests, tmp_path: Path, storage: str, filesystem: str) -> None:
    image = blank(tmp_path / "disk.raw", 64 * MIB)
    async with drive(guests, storage, image) as plug:
        await enable_unmap(plug.guest, plug.disk, storage)
        before = await plug.run(FILLED.format(make=MAKE[filesystem]))
        full = plug.used
        assert full > 4_000_000
        assert before in await plug.run(TRIMMED)
        assert plug.used < full - 3_500_000
    sound(image, filesystem)


@pytest.mark.parametrize("storage", STORAGE)
async def test_discard_and_zero_out(guests: Guests, tmp_path: Path, storage: str) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\xaa" * (16 * MIB))
    expected = bytearray(image.read_bytes())
    async with drive(guests, storage, image) as plug:
        await enable_unmap(plug.guest, plug.disk, storage)
        os.sync()  # before, the file system has not given it all its blocks
        full = plug.used
        commands = ["blkdiscard", "blkdiscard -z", "fallocate -z"]
        if storage == "uas":  # over Bulk-Only Transport Linux writes zeros, and does not call that a hole
            commands.append("fallocate -p")
        for number, command in enumerate(commands):
            start, length = (4 * number + 1) * MIB, 2 * MIB
            await plug.run(f"{command} -o {start} -l {length} {{d}} && sync {{d}}")
            expected[start : start + length] = bytes(length)
            output = await plug.run("echo 3 >/proc/sys/vm/drop_caches; md5sum <{d}")
            assert output.split()[0] == hashlib.md5(expected).hexdigest(), command
            assert image.read_bytes() == expected, command
        assert plug.used <= full - 2 * MIB  # what was discarded
        await plug.run("blkdiscard {d}")
        assert plug.used < MIB
    assert image.read_bytes() == bytes(16 * MIB)
