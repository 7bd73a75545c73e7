"""What the guest tests share: images, and plugging devices into a guest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from farplug.events import PortEvent
from farplug.guest import Guest, connect
from farplug.hub import Attachment, Hub
from farplug.target import TargetOptions, parse_target
from farplug.testing import QemuGuest
from farplug.usb import Device

MIB = 2**20

AT_ONCE = ("usb_storage.delay_use=0",)
"""Words on the kernel's command line: a disk is looked at as soon as it is there, not a second later."""


class Plugged(Hub):
    """A hub that remembers what happened."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.events: list[PortEvent] = []
        self.subscribe(lambda attachment, event: self.events.append(event))

    def kinds(self) -> list[type]:
        return [type(event) for event in self.events]


@asynccontextmanager
async def plugged(
    target: str, *devices: Device, options: TargetOptions | None = None, configured: bool = True
) -> AsyncIterator[Plugged]:
    """Plug devices into a guest; they are configured by its driver when the block begins, and gone when it ends."""
    hub = Plugged(await connect(parse_target(target, options or TargetOptions())))
    try:
        async with asyncio.timeout(60):
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
    for _ in range(150):
        name = (await guest.check(script)).strip()
        if name:
            size = (await guest.check(f"cat /sys/block/{name}/size")).strip()
            if size != "0" and (await guest.run(f"test -b /dev/{name}")).exit_code == 0:
                return f"/dev/{name}"
        await asyncio.sleep(0.1)
    raise AssertionError(f"no block device for serial number {serial}\n{await guest.check('dmesg | tail -40')}")


async def gone(guest: QemuGuest, disk: str) -> None:
    """Wait until the guest has noticed that a disk left."""
    async with asyncio.timeout(30):
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
