"""A disk in a real guest: it looks right, filesystems live on it, and the image holds what was written."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import (
    GUEST_TIMEOUT,
    LABORATORY,
    MIB,
    NO_SCAN_DELAY,
    Plugged,
    beside,
    blank,
    comes,
    descriptors,
    disk_of,
    gone,
    plugged,
    with_controller,
)
from tests.long import LONG

from farplug.redirection import events
from farplug.target import TargetOptions, open_session, parse_target
from farplug.testing import Controller, GuestConfig, QemuGuest, Spice, SpicePort, SpiceTransport
from farplug.usb import Speed
from farplug.virtual import StorageTransport, disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

TEXT = "written by the guest"

LIFE = """
set -e
{mkfs} {disk} >/dev/null 2>&1
mount {disk} /mnt
head -c 1000000 /dev/urandom >/tmp/random
cat /tmp/random /tmp/random /tmp/random >/mnt/random
printf '{text}' >/mnt/hello
md5sum </mnt/random
sync /mnt/random /mnt/hello
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
blockdev --flushbufs {disk}
mount {disk} /mnt
md5sum </mnt/random
cat /mnt/hello
umount /mnt
{fsck} {disk} >/tmp/fsck 2>&1 || {{ cat /tmp/fsck; exit 1; }}
"""
FILESYSTEMS = {"ext4": ("mke2fs -q -F -t ext4", "e2fsck -fn"), "vfat": ("mkfs.vfat", "fsck.vfat -n")}


def read_back(image: Path, filesystem: str, name: str) -> bytes:
    """A file of the image, read on the host without the guest."""
    if filesystem == "vfat":
        command = ["mtype", "-i", str(image), f"::{name}"]
    else:
        command = ["/usr/sbin/debugfs", "-R", f"cat /{name}", str(image)]
    return subprocess.run(command, check=True, capture_output=True, timeout=GUEST_TIMEOUT).stdout


async def live(guest: QemuGuest, disk: str, filesystem: str) -> None:
    """Make a filesystem, write, fsync, read back cold, check."""
    mkfs, fsck = FILESYSTEMS[filesystem]
    output = await guest.check(LIFE.format(mkfs=mkfs, fsck=fsck, disk=disk, text=TEXT))
    before, after, text = output.splitlines()[:3]
    assert before == after
    assert text.startswith(TEXT)


@pytest.mark.parametrize(
    ("filesystem", "transport", "driver"),
    [("ext4", "bot", "usb-storage"), ("ext4", "uas", "uas"), ("vfat", "auto", "uas")],
)
async def test_life_of_a_disk_over_spice(
    guest: QemuGuest, tmp_path: Path, filesystem: str, transport: str, driver: str
) -> None:
    image = blank(tmp_path / "disk.raw", 64 * MIB + 200)  # a trailing part of a sector is rounded down
    device = disk_device(image, transport=StorageTransport(transport))
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        name = disk.removeprefix("/dev/")
        assert int(await guest.check(f"cat /sys/block/{name}/size")) == 64 * MIB // 512
        assert (await guest.check(f"cat /sys/block/{name}/device/vendor")).strip() == "farplug"
        assert (await guest.check(f"cat /sys/block/{name}/device/model")).strip() == "Virtual Disk"
        assert (await guest.check(f"cat /sys/block/{name}/removable")).strip() == "0"
        usb = f"$(readlink -f /sys/block/{name}/device/../../../..)"
        facts = await guest.check(f"cd {usb}; cat speed idVendor idProduct manufacturer product serial")
        assert facts.split("\n")[:6] == [
            "5000", "1d6b", "0104", "farplug", "Virtual Disk", device.identity.serial_number,
        ]  # fmt: skip
        assert (await guest.check(f"basename $(readlink {usb}/*:1.0/driver)")).strip() == driver
        await live(guest, disk, filesystem)
    await device.dispose()
    assert read_back(image, filesystem, "hello") == TEXT.encode()
    assert image.stat().st_size == 64 * MIB + 200


@pytest.mark.parametrize("port", [2, 3], ids=["tcp", "unix"])
async def test_the_same_disk_over_plain_sockets(guest: QemuGuest, tmp_path: Path, port: int) -> None:
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    async with plugged(guest.targets[port], device):
        await live(guest, await disk_of(guest, device), "ext4")
    await device.dispose()
    assert read_back(image, "ext4", "hello") == TEXT.encode()


async def test_over_tls_with_a_ticket(guests: Guests, tmp_path: Path) -> None:
    spice = Spice(transport=SpiceTransport.TLS, ticket="pass word/1")
    guest = await guests.get(replace(LABORATORY, ports=(SpicePort(),), spice=spice))
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    vv = tmp_path / "console.vv"
    vv.write_text(guest.spice.vv + "delete-this-file=1\n")
    for target, options in (
        (guest.targets[0], TargetOptions(ca_file=guest.spice.ca_file)),
        (guest.targets[0], TargetOptions(ca_file=guest.spice.ca_file, host_subject=guest.spice.host_subject)),
        (str(vv), TargetOptions()),
    ):
        async with plugged(target, device, options=options):
            await live(guest, disk := await disk_of(guest, device), "ext4")
        await gone(guest, disk)
    assert not vv.exists()
    await device.dispose()
    assert read_back(image, "ext4", "hello") == TEXT.encode()


async def test_a_guest_with_nothing_but_ehci_gets_high_speed_by_itself(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(with_controller(Controller.EHCI))
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    async with plugged(guest.targets[0], device) as hub:
        assert events.OfferChanged in hub.kinds()
        assert device.identity.speed is Speed.HIGH
        disk = await disk_of(guest, device)
        usb = f"$(readlink -f /sys/block/{disk.removeprefix('/dev/')}/device/../../../..)"
        assert (await guest.check(f"cat {usb}/speed")).strip() == "480"
        await live(guest, disk, "ext4")
    await device.dispose()
    assert read_back(image, "ext4", "hello") == TEXT.encode()


async def test_a_port_without_streams_gets_high_speed_by_itself(guest: QemuGuest, tmp_path: Path) -> None:
    """Linux's driver would find the streams in the descriptors of SuperSpeed, get none, and leave the disk alone."""
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    async with plugged(guest.targets[4], device) as hub:
        assert [one.why for one in hub.seen if isinstance(one, events.OfferChanged)] == [events.OfferProblem.STREAMS]
        await live(guest, await disk_of(guest, device), "ext4")
    await device.dispose()
    assert read_back(image, "ext4", "hello") == TEXT.encode()


async def test_high_speed_on_xhci_when_it_is_asked_for(guest: QemuGuest, tmp_path: Path) -> None:
    device = disk_device(blank(tmp_path / "disk.raw"), speeds=(Speed.HIGH,))
    async with plugged(guest.targets[3], device):
        disk = await disk_of(guest, device)
        usb = f"$(readlink -f /sys/block/{disk.removeprefix('/dev/')}/device/../../../..)"
        assert (await guest.check(f"cat {usb}/speed")).strip() == "480"
        await live(guest, disk, "vfat")
    await device.dispose()


async def test_read_only(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw")
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", image], check=True, timeout=GUEST_TIMEOUT)
    content, before = image.read_bytes(), image.stat()
    device = disk_device(image, read_only=True)
    async with plugged(guest.targets[3], device):
        disk = await disk_of(guest, device)
        assert (await guest.check(f"cat /sys/block/{disk.removeprefix('/dev/')}/ro")).strip() == "1"
        assert (await guest.run(f"dd if=/dev/zero of={disk} bs=4k count=1 oflag=direct")).exit_code != 0
        assert (await guest.run(f"mount -o rw {disk} /mnt && umount /mnt")).exit_code == 0  # falls back to ro
        # Past the guest's own protection: a raw WRITE(10) is refused by us.
        await guest.check(f"mount -o ro,noload {disk} /mnt && ls /mnt && umount /mnt")
    await device.dispose()
    after = image.stat()
    assert image.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


async def test_two_disks_on_two_channels_at_once(guest: QemuGuest, tmp_path: Path) -> None:
    images = [blank(tmp_path / f"{name}.raw") for name in ("one", "two")]
    devices = [disk_device(image) for image in images]
    assert devices[0].identity.serial_number != devices[1].identity.serial_number
    async with plugged(guest.targets[0], *devices) as hub:
        assert [attachment.port.name for attachment in hub.attachments] == ["usbredir 0", "usbredir 1"]
        disks = [await disk_of(guest, device) for device in devices]
        script = """
            head -c {size} /dev/urandom >/tmp/{number}
            md5sum </tmp/{number}
            dd if=/tmp/{number} of={disk} bs=64k oflag=direct 2>/dev/null
            dd if={disk} bs=64k count={count} iflag=direct 2>/dev/null | md5sum
            rm /tmp/{number}
        """
        size, count = (16 * MIB, 256) if LONG else (4 * MIB, 64)
        patterns = await asyncio.gather(
            *(
                guest.check(script.format(size=size, count=count, number=number, disk=disk))
                for number, disk in enumerate(disks)
            )
        )
    sums = [pattern.split()[::2] for pattern in patterns]
    for written, read in sums:
        assert written == read
    assert sums[0] != sums[1]
    for device in devices:
        await device.dispose()


async def test_attached_before_the_vm_runs(guests: Guests, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    async with guests.fresh(GuestConfig(ports=(SpicePort(),), paused=True, kernel_arguments=NO_SCAN_DELAY)) as guest:
        hub = Plugged(await open_session(parse_target(guest.targets[0])))
        try:
            plugging = asyncio.ensure_future(hub.plug(device))
            await beside(plugging, comes(lambda: events.WaitingForGuest in hub.kinds()))
            assert not plugging.done()
            await guest.qmp.execute("cont")
            await beside(plugging, guest.booted())
            attachment = await plugging
            await attachment.configured()
            await live(guest, await disk_of(guest, device), "ext4")
        finally:
            await hub.close()
    await device.dispose()
    assert read_back(image, "ext4", "hello") == TEXT.encode()


async def test_detached_while_mounted_and_attached_again_six_times(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw")
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", image], check=True, timeout=GUEST_TIMEOUT)
    device = disk_device(image)
    held = 0
    for number in range(6):
        target = guest.targets[(0, 2, 3)[number % 3]]
        async with plugged(target, device):
            disk = await disk_of(guest, device)
            await guest.check(f"mount {disk} /mnt && echo {number} >/mnt/{number} && sync /mnt/{number}")
        await gone(guest, disk)  # under a mounted filesystem
        await guest.run("umount -l /mnt")
        if number == 2:  # every transport was used once
            held = descriptors()
    await comes(lambda: descriptors() <= held)
    async with plugged(guest.targets[0], device):
        disk = await disk_of(guest, device)
        await guest.check(f"mount {disk} /mnt")
        names = (await guest.check("ls /mnt")).split()
        assert sorted(map(int, filter(re.compile(r"\d+$").match, names))) == list(range(6))
        await guest.check("umount /mnt")
    await device.dispose()
    fsck = subprocess.run(["/usr/sbin/e2fsck", "-fp", image], capture_output=True, timeout=GUEST_TIMEOUT)
    assert fsck.returncode in (0, 1), fsck.stdout


async def test_what_was_synced_is_in_the_image_while_it_is_plugged(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw")
    device = disk_device(image)
    async with plugged(guest.targets[3], device):
        disk = await disk_of(guest, device)
        await guest.check(f"printf '{TEXT}' | dd of={disk} bs=512 seek=777 conv=fsync 2>/dev/null")
        with image.open("rb") as file:
            assert os.pread(file.fileno(), len(TEXT), 777 * 512) == TEXT.encode()
    await device.dispose()
