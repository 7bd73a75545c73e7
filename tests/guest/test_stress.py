"""Readers, writers and a stream of failing commands side by side, for 3 seconds (make stress: a minute).

Linux cancels the pending data transfers of a failed command, and QEMU then loses those of all commands on the endpoint.
These commands hang for 30 s, until Linux resets the device, which its log shows. The disk must not let this happen.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import (
    GUEST_TIMEOUT,
    LABORATORY,
    SLOW_TCP,
    SPICE,
    STORAGE,
    TCP,
    Port,
    disk_of,
    plugged,
    usb_folder,
    usb_node,
)
from tests.guest.scripts import stress
from tests.long import LONG, every_value

from farplug.redirection import events
from farplug.store import MemoryStore
from farplug.testing import QemuGuest
from farplug.usb import Speed
from farplug.virtual import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

SECONDS = 60 if LONG else 3

DISKS = {"uas": ("uas", Speed.SUPER), "bot": ("bot", Speed.SUPER), "uas-high": ("uas", Speed.HIGH)}
"""The transport of a disk, and its speed: UAS at high speed has no streams."""

TROUBLE = re.compile(r"timed out|timeout|abort|uas_eh|I/O error|offline|reset", re.IGNORECASE)
RESETS = 3

DELAYED_ACKNOWLEDGEMENT = 0.04
"""Seconds that Linux waits at least with an acknowledgement that it means to send along with data."""

pytestmark = pytest.mark.timeout(400 + 2 * SECONDS)


def numbered() -> MemoryStore:
    """Each sector holds its number."""
    sectors = stress.READ_AREA + stress.WRITERS * stress.WRITE_AREA
    return MemoryStore(b"".join(struct.pack("<I", number) * 128 for number in range(sectors)))


async def strain(guest: QemuGuest, disk: str) -> None:
    """Run everything in parallel; nothing goes wrong."""
    counts = json.loads(
        await guest.check(f"python3 /scripts/stress.py {disk} {SECONDS}", timeout=GUEST_TIMEOUT + 2 * SECONDS)
    )
    assert set(counts) == {"reader", "writer", "failing"}, counts
    assert min(counts.values()) > 0, counts  # how many is a matter of the machine


@every_value(disk=DISKS, port=Port)
async def test_everything_at_once(guests: Guests, disk: str, port: Port) -> None:
    guest = await guests.get(LABORATORY)
    storage, speed = DISKS[disk]
    device = disk_device(numbered(), speeds=(speed,), transport=STORAGE[storage].transport)
    async with plugged(guest.targets[port], device) as hub:
        name = await disk_of(guest, device)
        assert STORAGE[storage].driver in await guest.check(f"readlink /sys/block/{name[5:]}/device/../../../driver")
        resets = hub.kinds().count(events.PortReset)
        await guest.check("dmesg -c >/dev/null")
        await strain(guest, name)
        log = await guest.check("dmesg")
        assert not TROUBLE.search(log), log
        assert hub.kinds().count(events.PortReset) == resets
    await device.dispose()


@pytest.mark.parametrize("port", [TCP, SPICE], ids=str)
async def test_usb_resets_in_the_middle(guests: Guests, port: Port) -> None:
    guest = await guests.get(LABORATORY)
    device = disk_device(numbered(), transport=STORAGE["uas"].transport)
    async with plugged(guest.targets[port], device) as hub:
        disk = await disk_of(guest, device)
        node = await usb_node(guest, await usb_folder(guest, device))
        resets = hub.kinds().count(events.PortReset)
        await guest.check("dmesg -c >/dev/null")
        straining = asyncio.ensure_future(strain(guest, disk))
        for _ in range(RESETS):
            await asyncio.sleep(SECONDS / (RESETS + 1))
            await guest.check(f"usbreset {node[-7:]}")
        await straining
        log = await guest.check("dmesg")
        assert len(re.findall("reset SuperSpeed USB device", log)) == RESETS, log
        assert not re.search(r"timed out|timeout|I/O error|offline", log, re.IGNORECASE), log
        assert hub.kinds().count(events.PortReset) >= resets + RESETS
    await device.dispose()


async def test_qemu_that_collects_small_messages_is_not_waited_for(guests: Guests) -> None:
    """It answers a command with several, and Nagle's algorithm holds them back until ours is acknowledged."""
    guest = await guests.get(LABORATORY)
    device = disk_device(numbered())
    async with plugged(guest.targets[SLOW_TCP], device):
        disk = await disk_of(guest, device)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while True:  # until a moment in which nothing else runs here: who waits for it is always as slow
                taken = json.loads(await guest.check(f"python3 /scripts/stress.py {disk} 0"))
                if sorted(taken)[stress.READS // 10] < DELAYED_ACKNOWLEDGEMENT:
                    break
    await device.dispose()
