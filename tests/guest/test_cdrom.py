"""A CD-ROM drive in a real guest: its ISO mounts, leaves and is replaced by another, and firmware boots from it."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import LABORATORY, MIB, SPICE, TCP, Plugged, plugged, until
from tests.guest.test_boot import BOOTED, CODE, PROOF, plug_and_run, tool

from farplug.errors import DeviceError, Reason
from farplug.redirection import events
from farplug.testing import Boot, GuestConfig, GuestFactory, QemuGuest, SpicePort
from farplug.usb import Device
from farplug.virtual import StorageTransport, cdrom_device, drives_of
from farplug.virtual.events import MediumEjected, MediumInserted, MediumLocked

if TYPE_CHECKING:
    from tests.guest.conftest import Guests


def make_iso(path: Path, *arguments: str, **files: bytes) -> Path:
    """An ISO 9660 image with these files, with Joliet and Rock Ridge names."""
    folder = path.with_suffix("")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tool("xorriso", "-as", "mkisofs", "-quiet", "-J", "-R", "-V", path.stem, *arguments, "-o", str(path), str(folder))
    return path


async def drive_of(guest: QemuGuest, device: Device) -> str:
    """The guest's block device for our drive."""
    serial = device.identity.serial_number
    condition = f"""
        (
            for block in /sys/block/sr*; do
                name=/dev/${{block##*/}}
                read -r serial <$block/device/../../../../serial && [ "$serial" = {serial} ] || continue
                [ -b $name ] && echo $name && exit 0
            done 2>/dev/null
            exit 1
        )"""
    return (await until(guest, condition)).strip()


async def checksum(guest: QemuGuest, drive: str) -> str:
    """Mount the medium, and read its file ``random``."""
    output = await guest.check(f"mount -t iso9660 -o ro {drive} /mnt && sha256sum </mnt/random && umount /mnt")
    return output.split()[0]


def high_sierra(content: bytes) -> bytes:
    """An image in the High Sierra format (Linux, include/uapi/linux/iso_fs.h: hs_primary_descriptor) with a file."""

    def both(number: int, length: int) -> bytes:
        return number.to_bytes(length, "little") + number.to_bytes(length, "big")

    def record(name: bytes, block: int, size: int, flags: int) -> bytes:
        body = both(block, 4) + both(size, 4) + bytes([90, 1, 1, 0, 0, 0, flags, 0, 0, 0]) + both(1, 2)
        body += bytes([len(name)]) + name + bytes(1 - len(name) % 2)
        return bytes([len(body) + 2, 0]) + body

    root, blocks = record(b"\0", 18, 2048, 2), 19 + -(-len(content) // 2048)
    volume = (
        both(16, 4) + b"\1CDROM\1\0" + bytes(32) + b"HIGH SIERRA".ljust(32) + bytes(8) + both(blocks, 4) + bytes(32)
    )
    volume += both(1, 2) + both(1, 2) + both(2048, 2) + bytes(8) + bytes(4) + bytes(28) + root
    end = both(17, 4) + b"\xffCDROM\1"
    folder = root + record(b"\1", 18, 2048, 2) + record(b"RANDOM.;1", 19, len(content), 0)
    parts = (bytes(16 * 2048), volume, end, folder, content)
    return b"".join(part + bytes(-len(part) % 2048) for part in parts)


def no_reset(hub: Plugged) -> None:
    """The guest's driver never had to give up and start over."""
    kinds = hub.kinds()
    assert events.PortReset not in kinds[kinds.index(events.Configured) :]


@pytest.mark.parametrize(
    ("transport", "driver"), [(StorageTransport.AUTO, "usb-storage"), (StorageTransport.UAS, "uas")], ids=str
)
async def test_mounted_ejected_and_replaced(
    guests: Guests, tmp_path: Path, transport: StorageTransport, driver: str
) -> None:
    guest = await guests.get(LABORATORY)
    contents = [os.urandom(8 * MIB), os.urandom(3 * MIB)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    first, second = (
        make_iso(tmp_path / f"{number}.iso", random=content) for number, content in enumerate(contents, start=1)
    )
    device = cdrom_device(first, transport=transport)
    async with plugged(guest.targets[SPICE], device) as hub:
        drive = await drive_of(guest, device)
        name = drive.removeprefix("/dev/")
        usb = f"$(readlink -f /sys/block/{name}/device/../../../..)"
        assert (await guest.check(f"basename $(readlink {usb}/*:1.0/driver)")).strip() == driver
        assert (await guest.check(f"cat /sys/block/{name}/device/model")).strip() == "Virtual CD-ROM"
        assert await checksum(guest, drive) == digests[0]
        assert "Current profile: CD-ROM" in await guest.check(f"sg_get_config --current {drive}")

        await guest.check(f"sg_start --eject {drive}")
        assert MediumEjected(str(first), by_guest=True) in hub.reports()
        assert drives_of(device)[0].medium is None
        assert (await guest.run(f"mount -t iso9660 -o ro {drive} /mnt")).exit_code != 0

        # the guest polls, and notifies its programs of the new medium
        await guest.check(
            f"""echo 200 >/sys/block/{name}/events_poll_msecs
                rm -f /tmp/events
                setsid uevent sh -c 'echo "$DEVNAME $DISK_MEDIA_CHANGE" >>/tmp/events' >/dev/null 2>&1 &
                echo $! >/tmp/uevent.pid
                until [ -s /tmp/events ]; do echo change >/sys/block/{name}/uevent; sleep 0.1; done"""
        )
        await drives_of(device)[0].insert(second)
        await guest.check(f"until grep -q '^{name} 1' /tmp/events; do sleep 0.1; done; kill $(cat /tmp/uevent.pid)")
        assert await checksum(guest, drive) == digests[1]
        size = int(await guest.check(f"blockdev --getsize64 {drive}"))
        assert size == second.stat().st_size
        no_reset(hub)
    await device.dispose()


async def test_a_mounted_medium_is_locked_and_can_be_taken_by_force(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(LABORATORY)
    content = os.urandom(16 * MIB)
    iso = make_iso(tmp_path / "one.iso", random=content)
    device = cdrom_device(iso)
    async with plugged(guest.targets[TCP], device) as hub:
        drive = await drive_of(guest, device)
        # Ubuntu's kernel does not lock the tray by default.
        await guest.check(f"echo 1 >/proc/sys/dev/cdrom/lock && mount -t iso9660 -o ro {drive} /mnt")
        with pytest.raises(DeviceError, match="locked by the guest") as caught:
            await drives_of(device)[0].eject()
        assert caught.value.reason is Reason.MEDIUM_LOCKED
        assert (await guest.check("sha256sum </mnt/random")).split()[0] == hashlib.sha256(content).hexdigest()
        await guest.check("echo 3 >/proc/sys/vm/drop_caches")
        await drives_of(device)[0].eject(force=True)
        assert (await guest.run("cat /mnt/random >/dev/null")).exit_code != 0  # an error, and no hang
        await guest.check("umount /mnt")
        await drives_of(device)[0].insert(iso)
        assert await checksum(guest, drive) == hashlib.sha256(content).hexdigest()
        no_reset(hub)
        kinds = [type(event) for event in hub.reports()]
        assert kinds.index(MediumLocked) < kinds.index(MediumEjected) < kinds.index(MediumInserted)
    await device.dispose()


def bootable_iso(folder: Path) -> Path:
    """An El Torito image for both firmwares.

    A BIOS loads the first 2048 bytes of the boot image, which read another block and print it on the serial port. UEFI
    sees a FAT volume, on which its shell finds a script.
    """
    efi = folder / "efi.img"
    efi.write_bytes(bytes(2 * MIB))
    tool("/usr/sbin/mkfs.vfat", str(efi))
    for name, data in {"startup.nsh": b"type fs0:\\proof.txt\r\n", "proof.txt": PROOF.encode() + b"\r\n"}.items():
        tool("mcopy", "-i", str(efi), "-", f"::{name}", stdin=data)
    packet = struct.pack("<BxHHHQ", 16, 1, 0x7E00, 0, 0)
    iso = make_iso(
        folder / "boot.iso",
        *("-b", "boot", "-no-emul-boot", "-boot-load-size", "4"),
        *("-eltorito-alt-boot", "-e", "efi", "-no-emul-boot"),
        boot=(CODE + packet).ljust(2048, b"\0"),
        efi=efi.read_bytes(),
        text=BOOTED.encode(),
    )
    content = bytearray(iso.read_bytes())
    block, rest = divmod(content.index(BOOTED.encode()), 2048)
    assert not rest
    at = content.index(CODE + packet) + len(CODE)
    content[at : at + len(packet)] = struct.pack("<BxHHHQ", 16, 1, 0x7E00, 0, block)
    iso.write_bytes(content)
    return iso


@pytest.mark.parametrize(("boot", "console"), [(Boot.BIOS, BOOTED.strip()), (Boot.UEFI, PROOF)], ids=str)
def test_firmware_boots(farplug_guest_factory: GuestFactory, tmp_path: Path, boot: Boot, console: str) -> None:
    config = GuestConfig(ports=(SpicePort(bootindex=0),), boot=boot, paused=True)
    plug_and_run(farplug_guest_factory(config), bootable_iso(tmp_path), console)


async def test_the_format_before_iso_9660(guests: Guests, tmp_path: Path) -> None:
    content = os.urandom(100_000)
    path = tmp_path / "1986.iso"
    path.write_bytes(high_sierra(content))
    guest = await guests.get(LABORATORY)
    device = cdrom_device(path)
    async with plugged(guest.targets[TCP], device):
        drive = await drive_of(guest, device)
        assert await checksum(guest, drive) == hashlib.sha256(content).hexdigest()
    await device.dispose()
