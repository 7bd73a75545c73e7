"""What each system takes of what is offered by default: ``--usb-storage auto`` and ``--usb-speed auto``."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.guest.firmware import lacking, machine, program
from tests.guest.plugging import GUEST_TIMEOUT, MIB, NO_SCAN_DELAY, Plugged, blank, disk_of, plugged, usb_folder
from tests.guest.test_boot import FAR_BLOCK
from tests.guest.test_cdrom import drive_of, make_iso

from farplug.redirection import engine, offers
from farplug.redirection.events import Attached, Configured, OfferChanged, OfferProblem, PortReset
from farplug.target import open_session, parse_target
from farplug.testing import GuestConfig, QemuGuest, TcpPort
from farplug.usb import Device, Offer, Speed
from farplug.virtual import cdrom_device, disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

UAS = "USB Attached SCSI"


@pytest_asyncio.fixture(loop_scope="session")
async def without_uas(guest: QemuGuest) -> AsyncIterator[QemuGuest]:
    """Linux that has USB Attached SCSI as a module, and not the module: initramfs of installers, OpenWrt, NixOS."""
    await guest.check("rmmod uas && mv /lib/modules/*/uas.ko /tmp")
    yield guest
    await guest.check("mv /tmp/uas.ko /lib/modules/* && modprobe uas")


async def until(hub: Plugged, kind: type, count: int = 1) -> None:
    """Wait until an event of a kind came so often."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while hub.kinds().count(kind) < count:
            await asyncio.sleep(0.05)


def steps(hub: Plugged) -> list[tuple[OfferProblem, Offer]]:
    """Return the reason and the offer of each time that the device was offered again."""
    return [(event.why, event.offer) for event in hub.seen if isinstance(event, OfferChanged)]


async def driver_of(guest: QemuGuest, device: Device) -> str:
    folder = await usb_folder(guest, device)
    return (await guest.check(f"basename $(readlink -f {folder}/*:1.0/driver)")).strip()


async def test_linux_without_uas_has_the_cdrom_drive_at_once(without_uas: QemuGuest, tmp_path: Path) -> None:
    guest = without_uas
    device = cdrom_device(make_iso(tmp_path / "cd.iso", hello=b"hello"))
    async with plugged(guest.targets[2], device) as hub:
        drive = await drive_of(guest, device)
        assert await guest.check(f"mount -t iso9660 -o ro {drive} /mnt && cat /mnt/hello && umount /mnt") == "hello"
        assert steps(hub) == []
    await device.dispose()


async def test_linux_without_uas_has_the_disk_after_some_seconds(without_uas: QemuGuest, tmp_path: Path) -> None:
    guest = without_uas
    device = disk_device(image := blank(tmp_path / "disk.raw"))
    async with plugged(guest.targets[2], device) as hub:
        disk = await disk_of(guest, device)
        assert steps(hub) == [(OfferProblem.NOT_USED, Offer(Speed.SUPER, UAS))]
        assert await driver_of(guest, device) == "usb-storage"
        await guest.check(f"echo hello | dd of={disk} conv=fsync")
    await device.dispose()
    assert image.read_bytes()[:6] == b"hello\n"


async def test_linux_without_uas_has_the_disk_that_firmware_used_before(guests: Guests, tmp_path: Path) -> None:
    """SeaBIOS finds the disk, over Bulk-Only Transport, before Linux starts."""
    config = GuestConfig(ports=(TcpPort(),), kernel_arguments=(*NO_SCAN_DELAY, "module_blacklist=uas"), paused=True)
    device = disk_device(blank(tmp_path / "disk.raw"))
    async with guests.fresh(config) as guest:
        hub = Plugged(await open_session(parse_target(guest.targets[0])))
        try:
            plugging = asyncio.ensure_future(hub.plug(device))
            await guest.qmp.execute("cont")
            await plugging
            await guest.booted()
            assert device.figures is not None
            assert device.figures.commands > 0
            assert steps(hub) == []
            await disk_of(guest, device)
            assert steps(hub) == [(OfferProblem.NOT_USED, Offer(Speed.SUPER, UAS))]
        finally:
            await hub.close()
    await device.dispose()


@pytest.mark.parametrize("port", [2, 0], ids=["tcp", "spice"])
async def test_a_vm_that_is_paused_gets_the_other_offer_when_it_goes_on(
    without_uas: QemuGuest, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "IDLE_TIMEOUT", 5.0)  # the VM is stopped before
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.5)
    guest = without_uas
    device = disk_device(blank(tmp_path / "disk.raw"))
    async with plugged(guest.targets[port], device) as hub:
        await guest.qmp.execute("stop")
        await until(hub, OfferChanged)
        await asyncio.sleep(3)  # so that there is something to lose
        assert hub.kinds().count(Attached) == 1
        await guest.qmp.execute("cont")
        await disk_of(guest, device)
        assert hub.kinds().count(Attached) == 2
        assert steps(hub) == [(OfferProblem.NOT_USED, Offer(Speed.SUPER, UAS))]
    await device.dispose()


@pytest_asyncio.fixture(loop_scope="session")
async def prefers_bulk_only(guest: QemuGuest) -> AsyncIterator[QemuGuest]:
    """Linux with a quirk: usb-storage takes farplug's devices, not uas."""
    quirks = "/sys/module/usb_storage/parameters/quirks"
    await guest.check(f"echo 1d6b:0104:u >{quirks}")
    yield guest
    await guest.check(f"echo >{quirks}")


async def test_a_mounted_disk_stays_whatever_the_guest_does_not_do(
    prefers_bulk_only: QemuGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver for Bulk-Only Transport sends no request after a reset, nor without reads and writes."""
    guest = prefers_bulk_only
    device = disk_device(blank(tmp_path / "disk.raw"))
    async with plugged(guest.targets[2], device) as hub:
        disk = await disk_of(guest, device)
        assert await driver_of(guest, device) == "usb-storage"
        await guest.check(f"mke2fs -q -t ext2 {disk} && mount {disk} /mnt && echo hello >/mnt/hello && sync")
        before = hub.kinds().count(Configured)
        monkeypatch.setattr(offers, "IDLE_TIMEOUT", 3.0)
        await guest.check("usbreset 1d6b:0104")
        await until(hub, Configured, before + 1)
        assert PortReset in hub.kinds()
        figures = device.figures
        await guest.check("lsusb -v -d 1d6b:0104")
        await asyncio.sleep(2 * offers.IDLE_TIMEOUT)
        assert device.figures == figures  # it was left alone, indeed
        assert steps(hub) == []
        await guest.check("echo 3 >/proc/sys/vm/drop_caches")
        assert (await guest.check("cat /mnt/hello && umount /mnt")).strip() == "hello"
    await device.dispose()


LOAD_DRIVERS = "modprobe usb-storage; modprobe uas"


@pytest_asyncio.fixture(loop_scope="session")
async def without_drivers(guest: QemuGuest) -> AsyncIterator[QemuGuest]:
    """Linux without a driver for disks."""
    await guest.check("rmmod uas usb-storage")
    yield guest
    await guest.check(LOAD_DRIVERS)


async def test_linux_without_any_driver_gets_the_best_back(
    without_drivers: QemuGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "IDLE_TIMEOUT", 4.0)  # Linux needs that on no machine to configure a device
    guest = without_drivers
    device = disk_device(blank(tmp_path / "disk.raw"))
    async with plugged(guest.targets[2], device) as hub:
        await until(hub, Configured, 4)
        await asyncio.sleep(1.5 * offers.IDLE_TIMEOUT)
        assert steps(hub) == [
            (OfferProblem.NOT_USED, Offer(Speed.SUPER, UAS)),
            (OfferProblem.NOT_USED, Offer(Speed.HIGH, UAS)),
            (OfferProblem.ALL, Offer(Speed.SUPER)),
        ]
        await guest.check(LOAD_DRIVERS)
        await disk_of(guest, device)
        assert await driver_of(guest, device) == "uas"
    await device.dispose()


SLOF = ("-machine", "pseries,usb=off", "-m", "512", "-vga", "none", "-prom-env", "auto-boot?=false")
SLOF_PROMPT = "0 > "


async def test_slof(tmp_path: Path) -> None:
    """SLOF takes the last interface descriptor for the disk's, and looks for disks once."""
    disk, cdrom = disk_device(blank(tmp_path / "disk.raw")), cdrom_device(make_iso(tmp_path / "cd.iso", hello=b"hello"))
    async with (
        machine("qemu-system-ppc64", tmp_path, *SLOF, "-device", "qemu-xhci,id=usb", ports=2) as pseries,
        plugged(pseries.targets[0], disk, configured=False) as hub,
        plugged(pseries.targets[1], cdrom, configured=False) as other,
    ):
        await pseries.wait_for(SLOF_PROMPT)
        aliases = await pseries.run("devalias", SLOF_PROMPT)
        assert "cdrom :" in aliases
        assert "disk :" not in aliases
        with pseries.stopped():
            await until(hub, OfferChanged)
        await until(hub, Attached, 2)
        assert steps(hub) == [(OfferProblem.NOT_USED, Offer(Speed.SUPER, UAS))]
        await pseries.run("reset-all", SLOF_PROMPT)
        aliases = await pseries.run("devalias", SLOF_PROMPT)
        assert "cdrom :" in aliases
        assert "disk :" in aliases
        assert steps(other) == []
    await disk.dispose()
    await cdrom.dispose()


def grub_image(folder: Path, modules: str, settings: str) -> Path:
    """Make a hard disk with GRUB and nothing else on it.

    Args:
        folder: for its files.
        modules: names of GRUB's modules, with spaces between them.
        settings: the lines of its configuration file.
    """
    boot = Path("/usr/lib/grub/i386-pc/boot.img")
    if not boot.exists():
        lacking("GRUB for a PC's BIOS is not installed (Debian: grub-pc-bin)")
    file = folder / "grub.cfg"
    file.write_text(settings)
    core = folder / "core.img"
    subprocess.run(
        [
            *(
                program("grub-mkstandalone"),
                "-O",
                "i386-pc",
                "-o",
                core,
                "--modules",
                modules,
                "--install-modules",
                modules,
            ),
            *("--locales=", "--fonts=", "--themes=", f"boot/grub/grub.cfg={file}"),
        ],
        check=True,
        capture_output=True,
        timeout=GUEST_TIMEOUT,
    )
    image = folder / "grub.raw"
    image.write_bytes(boot.read_bytes() + core.read_bytes())
    os.truncate(image, MIB * (image.stat().st_size // MIB + 1))
    return image


async def test_grub(tmp_path: Path) -> None:
    """GRUB takes SuperSpeed's companion descriptors for endpoints. At High Speed there are none."""
    grub_disk = grub_image(
        tmp_path,
        "ehci usbms serial normal ls cat",  # drivers of its own for EHCI and mass storage
        "serial --unit=0\nterminal_input serial\nterminal_output serial\n",
    )
    drive = f"file={grub_disk},format=raw,if=ide,snapshot=on"
    grub = ("-machine", "pc,usb=off", "-m", "128", "-device", "usb-ehci,id=usb", "-drive", drive)
    image = blank(tmp_path / "disk.raw")
    with image.open("r+b") as file:
        file.seek(FAR_BLOCK * 512)
        file.write(b"farplug: read by GRUB\n")
    device = disk_device(image)
    async with (
        machine("qemu-system-x86_64", tmp_path, *grub) as pc,
        plugged(pc.targets[0], device, configured=False) as hub,
    ):
        await pc.wait_for("grub> ")
        with pc.stopped():
            await until(hub, OfferChanged)
        await until(hub, Attached, 2)
        assert steps(hub) == [(OfferProblem.NOT_CONFIGURED, Offer(Speed.HIGH))]
        name = ""
        async with asyncio.timeout(GUEST_TIMEOUT):
            while not name:  # its prompt looks for new devices
                words = (await pc.run("ls", "grub> ")).split()
                name = next((word for word in words if word.startswith("(usb")), "")
        await pc.run(f"cat {name}{FAR_BLOCK}+1", "grub> ")
        await pc.wait_for("farplug: read by GRUB")
        with pc.stopped():
            await asyncio.sleep(offers.IDLE_TIMEOUT)  # a boot menu that waits for the user
        assert len(steps(hub)) == 1
    await device.dispose()
