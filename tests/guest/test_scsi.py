"""Every command that the disk knows, sent by a real guest: with sg3_utils, and by the kernel's own use of them."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.guest.plugging import LABORATORY, MIB, blank, disk_of, plugged, until

from farplug.testing import QemuGuest
from farplug.virtual import VirtualDevice, disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

NEW_SIZE = 40 * MIB


@dataclass
class Plug:
    """A disk in the guest."""

    guest: QemuGuest
    device: VirtualDevice
    image: Path
    disk: str

    async def run(self, command: str) -> str:
        """Run a command that must succeed, ``{d}`` being the disk."""
        return await self.guest.check(command.format(d=self.disk))

    async def refused(self, command: str) -> str:
        """Run a command that must fail, and return everything that it says, in lower case."""
        result = await self.guest.run(command.format(d=self.disk))
        assert result.exit_code != 0, result
        return result.output.lower()

    def bytes_at(self, offset: int, length: int) -> bytes:
        with self.image.open("rb") as file:
            return os.pread(file.fileno(), length, offset)


@pytest_asyncio.fixture(loop_scope="session")
async def plug(guests: Guests, tmp_path: Path) -> AsyncIterator[Plug]:
    guest = await guests.get(LABORATORY)
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\xaa" * (32 * MIB))
    device = disk_device(image)
    async with plugged(guest.targets[0], device):
        yield Plug(guest, device, image, await disk_of(guest, device))
    await device.dispose()


async def test_what_the_disk_says(plug: Plug) -> None:
    inquiry = await plug.run("sg_inq {d}")
    assert "Vendor identification: farplug" in inquiry
    assert "Product identification: Virtual Disk" in inquiry
    serial = plug.device.identity.serial_number
    vpd = await plug.run("for page in 0 0x80 0x83 0xb0 0xb1 0xb2; do sg_vpd -p $page {d}; done")
    for text in (
        f"Unit serial number: {serial}",
        f"vendor specific: Virtual Disk {serial}",
        "designator type: NAA",
        "      0x3",
        "Maximum transfer length: 65535 blocks",
        "Optimal transfer length: 2048 blocks",
        "Optimal unmap granularity: 8 blocks",
        "Maximum write same length: 0x7fffff blocks",
        "Non-rotating medium",
        "Unmap command supported (LBPU): 1",
        "Write same (16) with unmap bit supported (LBPWS): 1",
        "Write same (10) with unmap bit supported (LBPWS10): 1",
        "Provisioning type: 2 (thin provisioned)",
    ):
        assert text in vpd, vpd
    capacity = await plug.run("sg_readcap {d}; sg_readcap -l {d}")
    assert capacity.count("Last LBA=65535 (0xffff), Number of logical blocks=65536") == 2, capacity
    for text in ("lbpme=1, lbprz=1", "Logical blocks per physical block exponent=3", "Logical block length=512 bytes"):
        assert text in capacity, capacity
    assert "Lun list length = 8 which imples 1 lun entry" in await plug.run("sg_luns {d}")
    for width in ("", "-6"):
        modes = await plug.run(f"sg_modes {width} -a {{d}}")
        for text in ("Read-Write error recovery", "Caching", "Control", "Informational exceptions control"):
            assert text in modes, modes
    assert (await plug.run("cat /sys/block/$(basename {d})/device/scsi_disk/*/cache_type")).strip() == "write back"
    assert (await plug.run("cat /sys/block/$(basename {d})/queue/fua")).strip() == "1"


async def test_sense_and_readiness(plug: Plug) -> None:
    assert "No Sense" in await plug.run("sg_requests {d}")
    assert "72 00 00 00 00 00 00 00" in (await plug.run("sg_requests -d -HH {d}")).replace("  ", " ")
    await plug.run("sg_turs -n 200 {d}")
    assert "Received 36 bytes of data" in await plug.run("sg_raw -r 36 {d} 12 00 00 00 24 00")
    formats = await plug.run("sg_raw -r 12 {d} 23 00 00 00 00 00 00 00 0c 00")
    assert "00 00 00 08 00 01 00 00  02 00 02 00" in formats


async def test_the_table_of_commands(plug: Plug) -> None:
    output = (await plug.run("sg_opcodes {d}")).lower()
    names = (
        "test unit ready", "request sense", "read(6)", "write(6)", "inquiry", "mode select(6)", "mode sense(6)",
        "start stop unit", "read capacity(10)", "read(10)", "write(10)", "write and verify(10)", "verify(10)",
        "synchronize cache(10)", "write same(10)", "unmap", "mode select(10)", "mode sense(10)", "read(16)",
        "write(16)", "write and verify(16)", "verify(16)", "synchronize cache(16)", "write same(16)",
        "read capacity(16)", "report luns", "report supported operation codes", "read(12)", "write(12)",
        "write and verify(12)", "verify(12)",
    )  # fmt: skip
    for name in names:
        assert name in output, output
    one = await plug.run("sg_opcodes -o 0x93 {d}")
    assert "93 09 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00" in one, one
    assert "9e 10 ff" in await plug.run("sg_opcodes -o 0x9e,0x10 {d}")
    assert "not supported" in (await plug.guest.run(f"sg_opcodes -o 0x85 {plug.disk}")).output.lower()


async def test_verify_and_sync(plug: Plug) -> None:
    for options in ("--count=65535", "--16 --lba=1 --count=65535", "--lba=65535 --count=1"):
        await plug.run(f"sg_verify {options} {{d}}")
    await plug.run("head -c 4096 {d} >/tmp/same; head -c 4095 {d} >/tmp/other; printf x >>/tmp/other")
    for options in ("--lba=8 --count=8 --ndo=4096", "--16 --lba=8 --count=8 --ndo=4096"):
        await plug.run(f"sg_verify {options} --in=/tmp/same {{d}}")
        assert "miscompare" in await plug.refused(f"sg_verify {options} --in=/tmp/other -v {{d}}")
    for options in ("", "--16"):
        await plug.run(f"sg_sync {options} {{d}}")


async def test_unmap_and_write_same(plug: Plug) -> None:
    os.sync()
    used = plug.image.stat().st_blocks
    await plug.run("sg_unmap --lba=2048 --num=2048 --force {d}")
    assert plug.bytes_at(MIB - 1, MIB + 2) == b"\xaa" + bytes(MIB) + b"\xaa"
    await plug.run("sg_write_same --16 --unmap --lba=8192 --num=16384 {d}")
    assert plug.bytes_at(4 * MIB - 1, 8 * MIB + 2) == b"\xaa" + bytes(8 * MIB) + b"\xaa"
    await plug.run("sg_write_same --10 --unmap --lba=24576 --num=2048 {d}")
    assert plug.image.stat().st_blocks <= used - 10 * 2048 + 64  # the list of extents may grow
    await plug.run("sg_write_same --16 --ndob --lba=32768 --num=2048 {d}")
    assert plug.bytes_at(16 * MIB - 1, MIB + 2) == b"\xaa" + bytes(MIB) + b"\xaa"
    await plug.run("head -c 512 /dev/zero | tr '\\0' U >/tmp/block")
    for width, lba in ((10, 40960), (16, 43008)):
        await plug.run(f"sg_write_same --{width} --in=/tmp/block --lba={lba} --num=1000 {{d}}")
        assert plug.bytes_at(lba * 512 - 1, 512002) == b"\xaa" + b"U" * 512000 + b"\xaa"
    assert plug.image.stat().st_size == 32 * MIB
    for command in (
        "sg_unmap --lba=65535 --num=2 --force -v {d}",
        "sg_write_same --16 --unmap --lba=65535 --num=2 -v {d}",
        "sg_write_same --10 --in=/tmp/block --lba=65536 --num=1 -v {d}",
    ):
        assert "out of range" in await plug.refused(command)
    assert plug.bytes_at(32 * MIB - 512, 512) == b"\xaa" * 512


REFUSED = {
    "85 08 0e 00 00 00 01 00 00 00 00 00 00 00 ec 00": "invalid command operation code",
    "a1 08 0e 00 01 00 00 00 00 ec 00 00": "invalid command operation code",
    "5e 00 00 00 00 00 00 00 08 00": "invalid command operation code",
    "9e 12 00 00 00 00 00 00 00 00 00 00 00 20 00 00": "invalid command operation code",
    "12 00 80 00 24 00": "invalid field in cdb",
    "12 01 c0 00 24 00": "invalid field in cdb",
    "1a 00 04 00 24 00": "invalid field in cdb",
    "1a 00 c8 00 24 00": "saving parameters not supported",
    "28 20 00 00 00 00 00 00 01 00": "invalid field in cdb",
    "28 00 00 01 00 00 00 00 01 00": "logical block address out of range",
    "28 00 ff ff ff ff 00 00 00 00": "logical block address out of range",
    "88 00 ff ff ff ff ff ff ff ff 00 00 00 01 00 00": "logical block address out of range",
    "2f 04 00 00 00 00 00 00 01 00": "invalid field in cdb",
    "00 00 00 00 00 04": "invalid field in cdb",
}
"""Commands that the disk refuses, and the sense that Linux gets."""


async def test_refused(plug: Plug) -> None:
    for cdb, sense in REFUSED.items():
        assert sense in await plug.refused(f"sg_raw -r 512 {{d}} {cdb}"), cdb
        await plug.run("sg_turs {d}")


async def test_the_write_cache_can_be_turned_off(plug: Plug) -> None:
    cache = "/sys/block/$(basename {d})/device/scsi_disk/*/cache_type"
    await plug.run(f"echo 'write through' > $(echo {cache})")
    assert (await plug.run(f"cat {cache}")).strip() == "write through"
    assert "08 12 00" in await plug.run("sg_raw -r 24 {d} 1a 00 08 00 18 00")
    await plug.run("dd if=/dev/zero of={d} bs=64k count=4 oflag=direct 2>/dev/null")
    await plug.run(f"echo 'write back' > $(echo {cache})")
    assert (await plug.run(f"cat {cache}")).strip() == "write back"


async def test_a_new_size(plug: Plug) -> None:
    await plug.run("dmesg -c >/dev/null")
    os.truncate(plug.image, NEW_SIZE)
    block = f"/sys/block/{plug.disk.removeprefix('/dev/')}"  # the disk looks at its size every second
    await until(plug.guest, f"{{ echo 1 >{block}/device/rescan; grep -qx {NEW_SIZE // 512} {block}/size; }}")
    assert "Capacity data has changed" in await plug.run("dmesg")
    await plug.run(f"printf end | dd of={{d}} bs=512 seek={NEW_SIZE // 512 - 1} conv=fsync 2>/dev/null")
    assert plug.bytes_at(NEW_SIZE - 512, 3) == b"end"


LIFE = """
set -e
mke2fs -q -F -t ext4 {disk} >/dev/null 2>&1
mount {disk} /mnt
head -c 3000000 /dev/urandom >/mnt/random
md5sum </mnt/random
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount {disk} /mnt
md5sum </mnt/random
umount /mnt
e2fsck -fn {disk} >/tmp/fsck 2>&1 || {{ cat /tmp/fsck; exit 1; }}
"""


async def test_large_blocks(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(LABORATORY)
    device = disk_device(blank(tmp_path / "disk.raw", 64 * MIB), block_size=4096)
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        name = disk.removeprefix("/dev/")
        facts = await guest.check(f"cd /sys/block/{name}; cat queue/logical_block_size queue/physical_block_size size")
        assert facts.split() == ["4096", "4096", str(64 * MIB // 512)]
        before, after = re.findall(r"[0-9a-f]{32}", await guest.check(LIFE.format(disk=disk)))
        assert before == after
    await device.dispose()


async def test_three_tebibytes(guests: Guests, tmp_path: Path) -> None:
    """Past 2 TiB Linux uses the 16-byte commands, and WRITE SAME(16) to give space back, without asking for limits."""
    guest = await guests.get(LABORATORY)
    size = 3 << 40
    try:
        image = blank(tmp_path / "disk.raw", size)
    except OSError:
        pytest.skip("this file system has no files of 3 TiB")
    device = disk_device(image)
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        assert int(await guest.check(f"cat /sys/block/{disk.removeprefix('/dev/')}/size")) == size // 512
        far = size // MIB - 8
        await guest.check(f"head -c {8 * MIB} /dev/urandom | tee /tmp/far | dd of={disk} bs=1M seek={far} conv=fsync")
        sums = await guest.check(
            f"md5sum </tmp/far; echo 3 >/proc/sys/vm/drop_caches; dd if={disk} bs=1M skip={far} | md5sum; rm /tmp/far"
        )
        assert len(set(re.findall(r"[0-9a-f]{32}", sums))) == 1
        used = image.stat().st_blocks
        assert used >= 8 * MIB // 512
        await guest.check(f"blkdiscard -o {size - 8 * MIB} -l {8 * MIB} {disk}")
        assert image.stat().st_blocks <= used - 8 * MIB // 512
        left = await guest.check(f"dd if={disk} bs=1M skip={far} iflag=direct 2>/dev/null | tr -d '\\0' | wc -c")
        assert left.strip() == "0"
    await device.dispose()


async def test_one_sector(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(LABORATORY)
    device = disk_device(blank(tmp_path / "disk.raw", 512))
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        await guest.check(f"printf sector | dd of={disk} conv=fsync")
        assert "Last LBA=0" in await guest.check(f"sg_readcap {disk}")
        assert "out of range" in (await guest.run(f"sg_verify -v --lba=1 --count=1 {disk}")).output.lower()
    await device.dispose()
