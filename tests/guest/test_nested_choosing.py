"""Devices of a real kernel: how ``farplug devices`` lists them, and how they are plugged in when they appear."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest_asyncio
from tests.guest.nested import FAR, Job, Machine, Plugger, from_inside

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

KEYBOARD, HUB, DISK, NETWORK = "0627:0001 *Keyboard", "0409:55aa *", "46f4:0001 *", "0525:a4a2 *"


@pytest_asyncio.fixture(loop_scope="session")
async def machine(plugger: Plugger) -> Machine:
    """The near guest."""
    return plugger.machine


@pytest_asyncio.fixture(loop_scope="session")
async def drive(machine: Machine, tmp_path: Path) -> AsyncIterator[str]:
    """An empty image as a block device of the near guest's QEMU."""
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    async with machine.drive(image) as name:
        yield name


async def events(job: Job, name: str) -> list[dict[str, Any]]:
    """The events of a kind in the output of a session."""
    lines = [json.loads(line) for line in (await job.output()).splitlines() if line.endswith("}")]
    return [line for line in lines if line["event"] == name]


async def test_what_is_there_and_why_it_cannot_be_plugged(plugger: Plugger, machine: Machine, drive: str) -> None:
    async with (
        machine.device("usb-kbd", KEYBOARD) as keyboard,
        machine.device("usb-hub", HUB) as hub,
        machine.device("usb-storage", DISK, drive=drive) as disk,
        machine.device("usb-net", NETWORK) as network,
    ):
        await machine.check(f"""
            set -e
            until name=$(ls {network.folder}/*/net/); do sleep 0.1; done
            busybox ip link set $name up
            busybox ip address add 10.7.0.1/24 dev $name""")
        await machine.check("until head -c 1 /dev/sda >/dev/null 2>&1; do sleep 0.1; done; mke2fs -q /dev/sda")
        await machine.check("mkdir -p /run/stick; mount -t ext2 /dev/sda /run/stick")
        try:
            async with plugger.farplug("devices --json") as job:
                code, output = await job.end()
            assert code == 0, output
        finally:
            await machine.check("umount /run/stick")
        found = {f"{one['bus']}-{one['address']}": one for one in json.loads(output)["usb"]["devices"]}
        listed = found[keyboard.bus]
        assert (listed["product"], listed["classes"], listed["can_be_plugged"]) == ("QEMU USB Keyboard", ["hid"], True)
        assert listed["speed"] == "high"
        assert listed["interfaces"] == [{"number": 0, "class": [3, 1, 1], "driver": "usbhid"}]
        assert listed["caution"]["reason"] == "input-device"
        assert found[network.bus]["caution"]["reason"] == "network-device"
        hubs = [one for one in found.values() if "hub" in one["classes"]]
        assert found[hub.bus] in hubs
        assert [obstacle["reason"] for one in hubs for obstacle in one["obstacles"]] == ["hub"] * len(hubs)
        assert len(hubs) > 1, "those of the controllers, too"
        (mounted,) = found[disk.bus]["obstacles"]
        assert (mounted["reason"], found[disk.bus]["interfaces"][0]["driver"]) == ("in-use", "usb-storage")
        assert "/dev/sda is mounted on /run/stick" in mounted["message"]


async def test_rules_take_what_comes_but_not_the_keyboard(
    plugger: Plugger, machine: Machine, drive: str, guests: Guests
) -> None:
    target = from_inside((await guests.get(FAR)).targets[0])
    async with plugger.farplug(f"connect {target} --auto-connect allow --json") as job:
        await job.until("from now on")
        async with machine.device("usb-kbd", KEYBOARD) as keyboard:
            await job.until("is left alone: it is a keyboard of this machine")
            async with machine.device("usb-storage", DISK, drive=drive):
                await job.until('"configured"')
                assert await machine.drivers(keyboard) == {"1.0": "usbhid"}
                await job.kill()
                assert (await job.end())[0] == 0
    (attached,) = await events(job, "attached")
    assert (attached["identity"]["vendor_id"], attached["identity"]["product_id"]) == (0x46F4, 1)
