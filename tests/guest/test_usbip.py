"""Devices of farplug used over USB/IP: the stock ``usbip`` and vhci_hcd of a real Linux, ``farplug serve`` here."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import Running, farplug
from tests.guest.plugging import GUEST_TIMEOUT, MIB, NO_SCAN_DELAY, STORAGE, blank

from farplug.testing import GATEWAY, GuestConfig, QemuGuest

if TYPE_CHECKING:
    from tests.guest.conftest import GuestPool

CLIENT = GuestConfig(network=True, kernel_arguments=NO_SCAN_DELAY, programs=("usbip",), memory=512)

SIZE = 4 * MIB


async def usbip_client(guests: GuestPool) -> QemuGuest:
    """Return a guest whose kernel has vhci_hcd."""
    guest = await guests.get(CLIENT)
    if (await guest.run("busybox modprobe vhci_hcd")).exit_code != 0:
        pytest.skip("the kernel of this distribution has no vhci_hcd")
    await guest.check("mkdir -p /var/run")  # where usbip notes what is attached
    return guest


@asynccontextmanager
async def serving(*arguments: object) -> AsyncIterator[tuple[Running, int]]:
    """Run ``farplug serve`` with devices for the block; yield it and its TCP port."""
    async with farplug("serve", "--listen", "127.0.0.1:0", *arguments) as command:
        found = re.search(r"listening on 127\.0\.0\.1:(\d+) ", await command.until("listening on"))
        assert found is not None
        await command.until("usbip --tcp-port")
        yield command, int(found[1])


async def attach(guest: QemuGuest, port: int, busid: str = "1-1") -> None:
    await guest.check(f"usbip --tcp-port {port} attach -r {GATEWAY} -b {busid}")


async def detach(guest: QemuGuest) -> None:
    """Detach all devices, and wait until vhci_hcd has none."""
    await guest.check("""
        for port in $(usbip port 2>/dev/null | sed -n 's/^Port 0*\\([0-9][0-9]*\\):.*/\\1/p'); do
            usbip detach -p $port
        done
        while grep -qE '^[hs]s +[0-9]+ +006 ' /sys/devices/platform/vhci_hcd.0/status; do sleep 0.1; done""")


async def the_disk(guest: QemuGuest) -> str:
    """Return the block device of the only disk, once it is readable."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while True:
            found = await guest.run("for b in /sys/block/sd*; do [ $(cat $b/size) -gt 0 ] && basename $b; done")
            if name := found.output.strip():
                return f"/dev/{name}"
            await asyncio.sleep(0.1)


async def without_disk(guest: QemuGuest) -> None:
    """Wait until the guest has no disk."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await guest.run("ls -d /sys/block/sd*")).exit_code == 0:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("storage", list(STORAGE))
async def test_a_disk(guests: GuestPool, tmp_path: Path, storage: str) -> None:
    guest = await usbip_client(guests)
    image = tmp_path / "a.raw"
    content = random.Random(storage).randbytes(SIZE)
    image.write_bytes(content + bytes(SIZE))
    protocol = {"bot": "bot", "uas": "auto"}[storage]
    async with serving("--usb-disk", image, "--usb-storage", protocol) as (command, port):
        listed = await guest.check(f"usbip --tcp-port {port} list -r {GATEWAY}")
        assert re.search(r"\b1-1: .*\(1d6b:0104\)", listed), listed

        for _ in range(2):  # after a detach the next client finds the device as it was
            await attach(guest, port)
            await command.until("attached by the client")
            await command.until("configured by the guest (configuration 1)")
            assert f"{port}" in await guest.check("cat /sys/devices/platform/vhci_hcd.0/status; usbip port 2>&1 | cat")
            in_use = await guest.check(f"usbip --tcp-port {port} list -r {GATEWAY} 2>&1 || true")
            assert "1-1" not in in_use
            disk = await the_disk(guest)
            driver = await guest.check(f"readlink -f /sys/block/{disk[5:]}/device/../../../driver")
            assert driver.strip().endswith(f"/{STORAGE[storage].driver}")
            await guest.check(f"dd if={disk} of=/tmp/copy bs=1M count=4 iflag=direct 2>/dev/null")
            assert (await guest.run("cat /tmp/copy")).data == content
            await guest.check(
                f"dd if=/tmp/copy of={disk} bs=1M seek=4 oflag=direct conv=fsync 2>/dev/null; rm /tmp/copy"
            )
            await detach(guest)
            await command.until("has left")
            await without_disk(guest)
            assert image.read_bytes() == content + content
            image.write_bytes(content + bytes(SIZE))


async def test_the_server_is_killed(guests: GuestPool, tmp_path: Path) -> None:
    guest = await usbip_client(guests)
    async with serving("--usb-disk", blank(tmp_path / "a.raw")) as (command, port):
        await attach(guest, port)
        await the_disk(guest)
        command.process.kill()
        await without_disk(guest)
    await detach(guest)


async def test_the_client_is_killed(guests: GuestPool, tmp_path: Path) -> None:
    guest = await usbip_client(guests)
    async with serving("--usb-disk", blank(tmp_path / "a.raw"), "--usb-disk-ro", blank(tmp_path / "b.raw")) as (
        command,
        port,
    ):
        async with guests.fresh(CLIENT) as victim:
            await victim.check("busybox modprobe vhci_hcd; mkdir -p /var/run")
            await attach(victim, port)
            disk = await the_disk(victim)
            writing = asyncio.ensure_future(victim.run(f"dd if=/dev/zero of={disk} bs=1M oflag=direct"))
            await asyncio.sleep(0.5)
            os.kill(victim.pid, signal.SIGKILL)
            await asyncio.gather(writing, return_exceptions=True)
        await command.until("has left")
        await attach(guest, port, "1-2")
        await attach(guest, port)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while int(await guest.check("ls -d /sys/block/sd* | wc -l")) < 2:
                await asyncio.sleep(0.1)
        await detach(guest)
        await without_disk(guest)


async def test_the_device_is_unplugged_at_the_server(guests: GuestPool, tmp_path: Path) -> None:
    guest = await usbip_client(guests)
    async with serving("--usb-disk", blank(tmp_path / "a.raw")) as (command, port):
        await attach(guest, port)
        await the_disk(guest)
        command.process.terminate()
        await without_disk(guest)
        assert await command.exit_code() == 0
