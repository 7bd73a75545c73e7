"""What the guest tests share: images, and plugging devices into a guest."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from farplug.app.attachment import Attachment
from farplug.app.guest import Guest
from farplug.redirection.events import DeviceReport, PortEvent
from farplug.target import TargetOptions, open_session, parse_target
from farplug.testing import GuestConfig, QemuGuest, SpicePort, TcpPort
from farplug.transport.session import Session
from farplug.usb import Device, DeviceEvent
from farplug.virtual.storage_transport import StorageTransport

MIB = 2**20
GUEST_TIMEOUT = 120
"""Seconds that something in a guest may take on a machine that has other things to do: a bound for what hangs, and none
for what is slow."""

Operation: TypeAlias = tuple[str | int | bytes, ...]
Result: TypeAlias = bytes | str

NO_SCAN_DELAY = ("usb_storage.delay_use=0",)
"""Words on the kernel's command line: a disk is looked at as soon as it is there, not a second later."""


SCRIPTS = Path(__file__).parent / "scripts"

LABORATORY = GuestConfig(
    ports=(TcpPort(), SpicePort(), TcpPort(nodelay=False)),
    kernel_arguments=NO_SCAN_DELAY,
    memory=512,
    programs=("badblocks", "blkdiscard", "f3probe", "fallocate", "fio", "fsck.exfat", "mkfs.exfat", "usbreset"),
    python=True,
    files=tuple((f"/scripts/{path.name}", path) for path in sorted(SCRIPTS.glob("*.py"))),
)
"""The guest of the long suites: tools that try disks, Python, and the scripts of this folder."""


@dataclass(frozen=True)
class Storage:
    """How a guest talks to a disk.

    Attributes:
        transport: what the disk offers.
        driver: what the guest's kernel takes then.
    """

    transport: StorageTransport
    driver: str


STORAGE = {"bot": Storage(StorageTransport.BOT, "usb-storage"), "uas": Storage(StorageTransport.AUTO, "uas")}
"""The suites that take ``storage`` run over all of these."""


class Plugged(Guest):
    """A guest that remembers what the engine reported."""

    def __init__(self, session: Session) -> None:
        super().__init__(session=session)
        self.seen: list[PortEvent] = []
        self.stream.subscribe(lambda event: None if event.source is None else self.seen.append(event.source))

    def kinds(self) -> list[type]:
        return [type(event) for event in self.seen]

    def reports(self) -> list[DeviceEvent]:
        """What the devices reported."""
        return [event.event for event in self.seen if isinstance(event, DeviceReport)]


@asynccontextmanager
async def plugged(
    target: str, *devices: Device, options: TargetOptions | None = None, configured: bool = True
) -> AsyncIterator[Plugged]:
    """Plug devices into a guest; they are configured by its driver when the block begins, and gone when it ends."""
    hub = Plugged(await open_session(parse_target(target, options or TargetOptions())))
    try:
        async with asyncio.timeout(GUEST_TIMEOUT):
            attachments: list[Attachment] = await asyncio.gather(*(hub.plug(device) for device in devices))
            if configured:
                await asyncio.gather(*(attachment.configured() for attachment in attachments))
        yield hub
    finally:
        await hub.close()


async def disk_of(guest: QemuGuest, device: Device) -> str:
    """The guest's block device for one of our disks; waits until it is readable."""
    return await disk_with(guest, device.identity.serial_number)


async def disk_with(guest: QemuGuest, serial: str) -> str:
    """The guest's block device with a USB serial number; waits until it is readable."""
    # /sys/block/sdX -> …/usbN/N-P/N-P:1.0/hostN/targetN/N:0:0:0/block/sdX
    script = f"""
        for block in /sys/block/sd*; do
            usb=$(readlink -f $block/device/../../../..)
            [ "$(cat $usb/serial 2>/dev/null)" = {serial} ] && basename $block
        done
        :"""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while True:
            name = (await guest.check(script)).strip()
            if name:
                size = (await guest.run(f"cat /sys/block/{name}/size")).output.strip()
                if size not in ("", "0") and (await guest.run(f"test -b /dev/{name}")).exit_code == 0:
                    return f"/dev/{name}"
            await asyncio.sleep(0.1)


async def give_space_back(guest: QemuGuest, disk: str, storage: str) -> None:
    """Let the guest use UNMAP or WRITE SAME: over Bulk-Only Transport Linux has to be told (docs/disk.md)."""
    if storage == "bot":
        await guest.check(f"echo writesame_16 >$(echo /sys/block/{disk[5:]}/device/scsi_disk/*/provisioning_mode)")


async def usb_folder(guest: QemuGuest, device: Device) -> str:
    """The guest's folder in /sys for one of our devices, by its ids; waits until it is there."""
    return await usb_folder_by_name(guest, f"{device.identity.vendor_id:04x}:{device.identity.product_id:04x} *")


async def usb_folder_by_name(guest: QemuGuest, name: str) -> str:
    """The guest's folder in /sys for a USB device; waits until it is there.

    ``name`` is a pattern for its ids and product name, such as ``0627:0001 *Keyboard``.
    """
    pattern = name.replace(" ", "\\ ")
    script = f"""
        for usb in /sys/bus/usb/devices/*; do
            read vendor <$usb/idVendor && read id <$usb/idProduct || continue
            product=
            read product <$usb/product
            case "$vendor:$id $product" in {pattern}) echo $usb ;; esac
        done 2>/dev/null
        :"""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not (folder := (await guest.check(script)).strip()):
            await asyncio.sleep(0.1)
    return folder


async def usb_node(guest: QemuGuest, folder: str) -> str:
    """The guest's device node for raw access to a USB device."""
    bus, number = map(int, (await guest.check(f"cat {folder}/busnum {folder}/devnum")).split())
    return f"/dev/bus/usb/{bus:03d}/{number:03d}"


async def raw(guest: QemuGuest, node: str, *operations: Operation, timeout: float = GUEST_TIMEOUT) -> list[Result]:
    """Drive a device past its drivers: the operations of ``scripts/usbfs.py``, one after the other, and their results.

    Each result is the bytes that arrived, or the name of the error.
    """
    request = json.dumps([[part.hex() if isinstance(part, bytes) else part for part in one] for one in operations])
    answer = await guest.check(f"python3 /scripts/usbfs.py {node}", stdin=request.encode(), timeout=timeout)
    return [one if one.startswith("E") else bytes.fromhex(one) for one in json.loads(answer)]


async def gone(guest: QemuGuest, disk: str) -> None:
    """Wait until the guest has noticed that a disk left."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await guest.run(f"test -e {disk}")).exit_code == 0:
            await asyncio.sleep(0.05)


def blank(path: Path, size: int = 32 * MIB) -> Path:
    """An image of zeros."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def descriptors() -> int:
    """How many file descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))
