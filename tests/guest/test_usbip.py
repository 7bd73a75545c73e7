"""USB/IP with a real Linux at the other end: its stock ``usbip`` and vhci_hcd, and its usbipd and usbip-host."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import Running, farplug
from tests.guest.plugging import (
    GUEST_TIMEOUT,
    MIB,
    NO_SCAN_DELAY,
    SCRIPTS,
    STORAGE,
    Plugged,
    blank,
    disk_with,
    gone,
    plugged,
    until,
)
from tests.guest.test_devices_of_your_own import KEY_ESC, KEYBOARD, Everything, bound, has_inputs, reading, text_of
from tests.transport.fake_spice import free_port

from farplug.app.settings import Source
from farplug.errors import Reason
from farplug.target import open_session, parse_target
from farplug.testing import GATEWAY, GuestConfig, QemuGuest, UsbDisk
from farplug.transport.usbip_session import UsbipSession
from farplug.virtual.hid import Key, Led

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

CLIENT = GuestConfig(
    network=True,
    kernel_arguments=NO_SCAN_DELAY,
    memory=512,
    modules=("usbhid", "hid_generic", "evdev"),
    programs=("usbip",),
    python=True,
    files=tuple((f"/scripts/{name}", SCRIPTS / name) for name in ("usbfs.py", "input_events.py")),
)

SIZE = MIB


async def usbip_client(guests: Guests) -> QemuGuest:
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
    condition = """
        (
            for block in /sys/block/sd*; do
                [ -e $block ] && grep -qv '^0$' $block/size && head -c 1 /dev/${block##*/} >/dev/null || continue
                echo /dev/${block##*/} && exit 0
            done 2>/dev/null
            exit 1
        )"""
    return (await until(guest, condition)).strip()


async def without_disk(guest: QemuGuest) -> None:
    """Wait until the guest has no disk."""
    await until(guest, "! ls -d /sys/block/sd* >/dev/null 2>&1")


@pytest.mark.parametrize("storage", list(STORAGE))
async def test_a_disk(guests: Guests, tmp_path: Path, storage: str) -> None:
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
            await guest.check(f"dd if={disk} of=/tmp/copy bs=1M count=1 iflag=direct 2>/dev/null")
            assert (await guest.run("cat /tmp/copy")).data == content
            await guest.check(
                f"dd if=/tmp/copy of={disk} bs=1M seek=1 oflag=direct conv=fsync 2>/dev/null; rm /tmp/copy"
            )
            await detach(guest)
            await command.until("has left")
            await without_disk(guest)
            assert image.read_bytes() == content + content
            image.write_bytes(content + bytes(SIZE))


async def test_the_server_is_killed(guests: Guests, tmp_path: Path) -> None:
    guest = await usbip_client(guests)
    async with serving("--usb-disk", blank(tmp_path / "a.raw")) as (command, port):
        await attach(guest, port)
        await the_disk(guest)
        command.process.kill()
        await without_disk(guest)
    await detach(guest)


async def test_the_client_is_killed(guests: Guests, tmp_path: Path) -> None:
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
        await until(guest, "[ $(ls -d /sys/block/sd* 2>/dev/null | wc -l) -ge 2 ]")
        await detach(guest)
        await without_disk(guest)


async def test_the_device_is_unplugged_at_the_server(guests: Guests, tmp_path: Path) -> None:
    guest = await usbip_client(guests)
    async with serving("--usb-disk", blank(tmp_path / "a.raw")) as (command, port):
        await attach(guest, port)
        await the_disk(guest)
        command.process.terminate()
        await without_disk(guest)
        assert await command.exit_code() == 0


async def test_a_keyboard_types_and_its_lights_come_back(guests: Guests) -> None:
    guest = await usbip_client(guests)
    everything = Everything()
    keyboard = everything.keyboard
    text = "".join(random.Random(1).choices(string.ascii_letters + string.digits + " \n", k=300))
    async with plugged("usbip-listen://127.0.0.1:0", everything.device, configured=False) as hub:
        session = hub.session
        assert isinstance(session, UsbipSession)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while session.ports[0].exporter.device is None:
                await asyncio.sleep(0.01)
        await attach(guest, session.address.port)
        await bound(guest)
        async with reading(guest, KEYBOARD, KEY_ESC) as events:
            await keyboard.type_text(text)
            await keyboard.tap(Key.ESCAPE)
        assert text_of(events) == text
        before = keyboard.leds
        await keyboard.tap(Key.CAPS_LOCK)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while keyboard.leds == before:
                await asyncio.sleep(0.01)
        assert keyboard.leds ^ before == Led.CAPS_LOCK
        await keyboard.tap(Key.CAPS_LOCK)
        await detach(guest)
        await has_inputs(guest, 0)


# The client: a disk of QEMU, which usbip-host of a real Linux exports, in another VM

HOST_SCRIPT = """
    set -e
    busybox modprobe virtio_net
    busybox modprobe usbip-host
    busybox ip link set lo up
    busybox ip address add 10.0.2.15/24 dev eth0 2>/dev/null || busybox ip address show dev eth0 | grep -q 10.0.2.15
    busybox ip link set eth0 up
    mkdir -p /var/run
    usbipd -D
    until busid=$(usbip list -l 2>/dev/null | sed -n 's/.*busid \\([0-9.-]*\\) (46f4:0001).*/\\1/p'); test "$busid"; do
        sleep 0.1
    done
    usbip bind -b $busid >&2
    echo $busid"""
"""Exports the disk, and writes its bus id."""


@asynccontextmanager
async def exported(guests: Guests, image: Path) -> AsyncIterator[tuple[QemuGuest, str]]:
    """Run a Linux that exports a disk for the block; yield it and the address of the disk."""
    port = free_port()
    config = GuestConfig(
        disks=(UsbDisk(image=image),),
        memory=512,
        programs=("usbip", "usbipd"),
        modules=("virtio_net",),
        kernel_arguments=NO_SCAN_DELAY,
        extra_arguments=(
            *("-netdev", f"user,id=forwarded,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:3240"),
            *("-device", "virtio-net-pci,netdev=forwarded"),
        ),
    )
    async with guests.fresh(config) as host:
        if (await host.run("busybox modprobe usbip-host")).exit_code != 0:
            pytest.skip("the kernel of this distribution has no usbip-host")
        busid = (await host.check(HOST_SCRIPT)).split()[-1]
        yield host, f"usbip://127.0.0.1:{port}/{busid}"


async def test_a_disk_of_another_machine(guests: Guests, guest: QemuGuest, tmp_path: Path) -> None:
    image = tmp_path / "remote.raw"
    content = random.Random(7).randbytes(SIZE)
    image.write_bytes(content + bytes(SIZE))
    async with exported(guests, image) as (host, address):
        hub = Plugged(await open_session(parse_target(guest.targets[0])))
        async with hub:
            for _ in range(2):  # after a detach it can be attached again
                async with asyncio.timeout(GUEST_TIMEOUT):
                    attachment = await hub.plug(Source.remote_device(address))
                    await attachment.configured()
                disk = await disk_with(guest, attachment.device.identity.serial_number)
                await guest.check(f"dd if={disk} of=/tmp/copy bs=1M count=1 iflag=direct 2>/dev/null")
                assert (await guest.run("cat /tmp/copy")).data == content
                await guest.check(f"dd if=/tmp/copy of={disk} bs=1M seek=1 oflag=direct conv=fsync 2>/dev/null")
                assert image.read_bytes() == content + content
                image.write_bytes(content + bytes(SIZE))
                await hub.unplug(attachment)
                await gone(guest, disk)
            async with asyncio.timeout(GUEST_TIMEOUT):
                attachment = await hub.plug(Source.remote_device(address))
                await attachment.configured()
            os.kill(host.pid, signal.SIGKILL)
            async with asyncio.timeout(GUEST_TIMEOUT):
                error = await attachment.ended()
            assert error is not None
            assert error.reason is Reason.DEVICE_LOST
