"""Real disks, redirected from one guest into another: the bytes are right, and both machines survive."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.guest.nested import FAR, Plugger, RealDevice, from_inside, running
from tests.guest.plugging import GUEST_TIMEOUT, MIB, gone, until, usb_folder_by_name

from farplug.testing import QemuGuest, TcpPort

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

BOT, UAS = "46f4:0001 *", "46f4:0003 *"
SIZE = 4 * MIB
READER = "08e6:4433 *"

LIFE_CYCLE = """
set -e
mke2fs -q -t ext4 {disk}
mount -t ext4 {disk} /mnt
head -c 1000000 /dev/urandom >/tmp/file
cp /tmp/file /mnt/file
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro {disk} /mnt
cmp /tmp/file /mnt/file
umount /mnt
e2fsck -fn {disk} >/dev/null 2>&1
sha256sum <{disk}
"""


@asynccontextmanager
async def disk(plugger: Plugger, kind: str, image: Path) -> AsyncIterator[RealDevice]:
    """A real disk of the near guest."""
    machine = plugger.machine
    async with (
        machine.drive(image) as drive,
        machine.device("usb-storage" if kind == BOT else "usb-uas", kind, drive=drive) as real,
    ):
        yield real


async def far_disk(guest: QemuGuest, name: str) -> str:
    """The far guest's block device; it can be read."""
    folder = Path(await usb_folder_by_name(guest, name)).name
    condition = f"""
        (
            for block in /sys/block/sd*; do
                cd -P $block && case $PWD in */{folder}/*) ;; *) continue ;; esac
                read -r size <size && [ "$size" != 0 ] || continue
                busybox dd if=/dev/${{block##*/}} of=/dev/null bs=512 count=1 && echo /dev/${{block##*/}} && exit 0
            done 2>/dev/null
            exit 1
        )"""
    return (await until(guest, condition)).strip()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random bytes."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest_asyncio.fixture(loop_scope="session")
async def far(guests: Guests) -> QemuGuest:
    return await guests.get(FAR)


@pytest.mark.parametrize(("kind", "driver"), [(BOT, "usb-storage"), (UAS, "uas")], ids=["bot", "uas"])
async def test_bytes_are_right_in_both_directions(
    plugger: Plugger, far: QemuGuest, image: Path, kind: str, driver: str
) -> None:
    async with disk(plugger, kind, image) as real:
        async with plugger.plugged(far.targets[0], real):
            block = await far_disk(far, kind)
            folder = await usb_folder_by_name(far, kind)
            # Linux has no uas at SuperSpeed without bulk streams.
            shown = await far.check(f"basename $(readlink -f {folder}/*:1.0/driver); cat {folder}/speed")
            assert shown.split() == [driver, "5000"]
            there = await far.check(f"sha256sum <{block}")
            assert there.split()[0] == hashlib.sha256(image.read_bytes()).hexdigest()
            written = await far.check(LIFE_CYCLE.format(disk=block))
        assert written.split()[0] == hashlib.sha256(image.read_bytes()).hexdigest()
        assert await plugger.machine.drivers(real) == {"1.0": driver}


async def test_unplugged_while_it_is_read(plugger: Plugger, far: QemuGuest, image: Path) -> None:
    machine = plugger.machine
    async with machine.drive(image) as drive:
        real = await machine.plug("usb-storage", BOT, drive=drive)
        async with plugger.plugged(far.targets[0], real):
            block = await far_disk(far, BOT)
            async with running(far, f"sh -c 'while dd if={block} of=/dev/null bs=1M iflag=direct; do :; done'") as job:
                await job.until("records in")
                await machine.unplug(real)
                assert "the device is gone" in await plugger.happened("Detached")
                await job.end()
            await gone(far, block)
    async with disk(plugger, BOT, image) as real, plugger.plugged(far.targets[0], real):
        there = await far.check(f"sha256sum <{await far_disk(far, BOT)}")
        assert there.split()[0] == hashlib.sha256(image.read_bytes()).hexdigest()


async def test_guest_is_reset_paused_and_killed(plugger: Plugger, guests: Guests, image: Path) -> None:
    async with guests.fresh(replace(FAR, ports=(TcpPort(),))) as far, disk(plugger, BOT, image) as real:
        async with plugger.plugged(far.targets[0], real):
            await far_disk(far, BOT)
            plugger.events.clear()
            await far.qmp.execute("set-action", {"reboot": "reset"})
            await far.qmp.execute("system_reset")
            await plugger.happened("Configured")
            there = await far.check(f"sha256sum <{await far_disk(far, BOT)}")
            assert there.split()[0] == hashlib.sha256(image.read_bytes()).hexdigest()
        assert await plugger.machine.drivers(real) == {"1.0": "usb-storage"}

        async with plugger.plugged(far.targets[0], real):
            block = await far_disk(far, BOT)
            async with running(far, f"dd if={block} of=/dev/null bs=1M iflag=direct"):
                await far.qmp.execute("stop")
                await plugger.ask("leave", from_inside(far.targets[0]))
                assert await plugger.machine.drivers(real) == {"1.0": "usb-storage"}
                await far.qmp.execute("cont")

        async with plugger.plugged(far.targets[0], real):
            await far_disk(far, BOT)
            os.kill(far.pid, 9)
            await plugger.happened("Detached")
            async with asyncio.timeout(GUEST_TIMEOUT):
                while await plugger.machine.drivers(real) != {"1.0": "usb-storage"}:
                    await asyncio.sleep(0.1)


async def test_six_rounds_leak_nothing(plugger: Plugger, far: QemuGuest) -> None:
    async with plugger.machine.device("usb-ccid", READER) as real:
        before: Counter[str] | None = None
        for _ in range(6):
            async with plugger.plugged(far.targets[0], real):
                pass
            before = before or Counter(await plugger.ask("descriptors"))
        assert before is not None
        async with asyncio.timeout(GUEST_TIMEOUT):  # what was open after the first round may have been about to close
            while Counter(await plugger.ask("descriptors")) - before:
                await asyncio.sleep(0.1)
        assert await plugger.machine.drivers(real) == {"1.0": ""}
