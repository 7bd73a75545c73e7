"""The command line with real devices, in nested guests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guest.nested import FAR, Plugger, from_inside
from tests.guest.plugging import MIB
from tests.guest.test_nested_storage import BOT, far_disk

if TYPE_CHECKING:
    from tests.guest.conftest import Guests


async def test_disk_that_is_pulled_out_and_comes_back(plugger: Plugger, guests: Guests, tmp_path: Path) -> None:
    machine, far = plugger.machine, await guests.get(FAR)
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(4 * MIB))
    content = hashlib.sha256(image.read_bytes()).hexdigest()
    arguments = f"connect {from_inside(far.targets[0])} --usb-device 46f4:0001 --wait"
    async with machine.drive(image) as drive, plugger.farplug(arguments) as job:
        await job.until("waiting for 46f4:0001")
        async with machine.device("usb-storage", BOT, drive=drive):
            await job.until("configured by the guest")
            await far_disk(far, BOT)
        await job.until("pulled out; when it comes back it goes into the VM again")
        async with machine.device("usb-storage", BOT, drive=drive) as real:
            await job.until("is back: it goes into the VM")
            await job.until("configured by the guest", 2)
            there = await far.check(f"sha256sum <{await far_disk(far, BOT)}")
            assert there.split()[0] == content
            assert await machine.drivers(real) == {"1.0": "usbfs"}
            await job.kill("INT")
            code, output = await job.end()
            assert code == 0, output
            assert await machine.drivers(real) == {"1.0": "usb-storage"}
