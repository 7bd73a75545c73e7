"""Real devices of every kind of transfer, redirected from one guest into another: they work there."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.guest.nested import FAR, Job, Plugger, Real, running
from tests.guest.plugging import raw, usb_folder_by_ids, usb_node

if TYPE_CHECKING:
    from tests.guest.conftest import GuestPool

    from farplug.testing import QemuGuest

EVENT = struct.Struct("<qqHHi")
"""input_event (Linux, include/uapi/linux/input.h): time, type, code, value."""
EV_KEY, EV_ABS = 1, 3
KEYS = {"f": 33, "a": 30, "r": 19, "p": 25, "l": 38, "u": 22, "g": 34}
"""Key codes (Linux, include/uapi/linux/input-event-codes.h)."""

pytestmark = pytest.mark.timeout(400)

NAMES = {
    "keyboard": "0627:0001",
    "serial": "0403:6001",
    "speaker": "46f4:0002",
    "network": "0525:a4a2",
    "reader": "08e6:4433",
    "player": "46f4:0004",
}


class Desk:
    """The near guest with its devices, and the far one that got them."""

    def __init__(self, plugger: Plugger, far: QemuGuest, devices: dict[str, Real]) -> None:
        self.plugger = plugger
        self.machine = plugger.machine
        self.far = far
        self.devices = devices

    async def folder(self, name: str) -> str:
        """The far guest's folder in /sys for a device."""
        return await usb_folder_by_ids(self.far, self.devices[name].ids)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def desk(plugger: Plugger, guests: GuestPool, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    """One of each, all plugged in."""
    machine, far = plugger.machine, await guests.get(FAR)
    folder = tmp_path_factory.mktemp("desk")
    (folder / "songs").mkdir()
    (folder / "songs" / "note.txt").write_text("la")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(await asyncio.start_unix_server(echo, folder / "line"))
        backend = {"addr": {"type": "unix", "data": {"path": str(folder / "line")}}, "server": False}
        await machine.qmp.execute("chardev-add", {"id": "line", "backend": {"type": "socket", "data": backend}})
        await machine.qmp.execute("netdev_add", {"type": "user", "id": "lan", "net": "10.9.0.0/24"})
        properties: dict[str, tuple[str, dict[str, object]]] = {
            "keyboard": ("usb-kbd", {}),
            "serial": ("usb-serial", {"chardev": "line"}),
            "speaker": ("usb-audio", {"audiodev": "speaker"}),
            "network": ("usb-net", {"netdev": "lan"}),
            "reader": ("usb-ccid", {}),
            "player": ("usb-mtp", {"rootdir": str(folder / "songs")}),
        }
        devices = {
            name: await stack.enter_async_context(machine.device(driver, NAMES[name], **extra))
            for name, (driver, extra) in properties.items()
        }
        await stack.enter_async_context(plugger.plugged(far.targets[-1], *devices.values()))
        yield Desk(plugger, far, devices)


async def input_node(guest: QemuGuest, folder: str) -> str:
    """The input device of a USB device."""
    async with asyncio.timeout(30):
        while not (found := (await guest.check(f"ls -d {folder}/*/*/input/*/event* 2>/dev/null; :")).split()):
            await asyncio.sleep(0.1)
    return "/dev/input/" + found[0].rpartition("/")[2]


async def test_keys_arrive_in_order(desk: Desk) -> None:
    node = await input_node(desk.far, await desk.folder("keyboard"))
    typed = [(code, value) for code in KEYS.values() for value in (1, 0)]
    async with running(desk.far, f"cat {node}") as job:
        await opened(desk.far, job, node)
        for letter in KEYS:
            for down in (True, False):
                key = {"down": down, "key": {"type": "qcode", "data": letter}}
                await desk.machine.qmp.execute("input-send-event", {"events": [{"type": "key", "data": key}]})
        async with asyncio.timeout(30):
            while len(
                keys := [(code, value) for kind, code, value in events(await job.data()) if kind == EV_KEY]
            ) < len(typed):
                await asyncio.sleep(0.1)
    assert keys == typed


async def opened(guest: QemuGuest, job: Job, node: str) -> None:
    """Wait until a command has opened a file."""
    await guest.check(f"until ls -l /proc/{await job.pid()}/fd | grep -q {node}; do sleep 0.05; done")


def events(data: bytes) -> list[tuple[int, int, int]]:
    whole = len(data) // EVENT.size * EVENT.size
    return [fields[2:] for fields in EVENT.iter_unpack(data[:whole])]


async def test_serial_line(desk: Desk) -> None:
    folder = await desk.folder("serial")
    async with asyncio.timeout(30):
        while not (found := (await desk.far.check(f"ls -d {folder}/*/ttyUSB* 2>/dev/null; :")).split()):
            await asyncio.sleep(0.1)
    node = "/dev/" + found[0].rpartition("/")[2]
    sent = os.urandom(3000)
    result = await desk.far.run(
        f"stty -F {node} raw -echo 115200; exec 3<>{node} 4<&0; cat <&4 >&3 & exec timeout 30 head -c {len(sent)} <&3",
        stdin=sent,
        timeout=60,
    )
    assert result.data == sent


async def test_network(desk: Desk) -> None:
    folder = await desk.folder("network")
    async with asyncio.timeout(30):
        while not (found := (await desk.far.check(f"ls {folder}/*/net 2>/dev/null; :")).split()):
            await asyncio.sleep(0.1)
    name = found[0]
    print(found)
    output = await desk.far.check(
        f"ip link set {name} up; ip address add 10.9.0.77/24 dev {name}; ping -c 3 -w 20 10.9.0.2; ping -c 1 -s 1400 -w 10 10.9.0.2",
        timeout=60,
    )
    print(output)


async def test_speaker(desk: Desk) -> None:
    folder = await desk.folder("speaker")
    await desk.far.check(
        "printf 'pcm.out { type hw card 0 device 0 }\\n' >/tmp/alsa.conf; until test -e /dev/snd/pcmC0D0p; do sleep 0.1; done"
    )
    result = await desk.far.run(
        "ALSA_CONFIG_PATH=/tmp/alsa.conf aplay -D out -t raw -f S16_LE -r 48000 -c 2 -d 5 /dev/urandom", timeout=60
    )
    print(result)
    print(await desk.far.check("dmesg | tail -5"))


async def test_smart_card_reader_is_listed(desk: Desk) -> None:
    await desk.folder("reader")
    print((await desk.far.check("lsusb -v -d 08e6:4433")))


async def test_player(desk: Desk) -> None:
    node = await usb_node(desk.far, await desk.folder("player"))
    print((await desk.far.check("lsusb -v -d 46f4:0004 2>/dev/null")))
    print(
        await raw(
            desk.far,
            node,
            ("claim", 0),
            ("send", 2, bytes.fromhex("0c000000010001100000000000")[:12]),
            ("receive", 0x81, 4096),
        )
    )


async def test_end(desk):
    print(await desk.far.check("lsusb -t"))
    print(await desk.machine.check("lsusb -t"))
    print(desk.plugger.events)
