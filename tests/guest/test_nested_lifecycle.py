"""What happens to real devices while they are plugged into another guest: other configurations, neighbours that never
answer or never stop, a VM that pauses, firmware that makes them another device."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.guest.nested import FAR, Job, Plugger, RealDevice, from_inside, running
from tests.guest.plugging import GUEST_TIMEOUT, MIB, Result, raw, usb_folder_by_name, usb_node
from tests.guest.test_nested_functions import EV_ABS, EV_KEY, KEYS, PRESSES, decoded, events, first
from tests.guest.test_nested_iso import INTERVAL, ISOCHRONOUS, PER_URB, SOURCE, URBS, Clocked, rises, split
from tests.guest.test_nested_storage import BOT, far_disk
from tests.guest.test_nested_storage import disk as real_disk
from tests.guest.usbip import UsbipDevice, configuration, device_descriptor, endpoint, interface
from tests.long import LONG

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

    from farplug.testing import QemuGuest

PLAIN, FLASHED, OTHER = "1d6b:0105", "1d6b:0106", "1d6b:0107"
"""Ids that no driver of Linux knows (Linux Foundation)."""
BULK = 2
OUT, IN = 0x01, 0x81


@pytest_asyncio.fixture(loop_scope="session")
async def far(guests: Guests) -> QemuGuest:
    return await guests.get(FAR)


async def bulk_endpoints(guest: QemuGuest, folder: str) -> tuple[int, int]:
    """The addresses of the bulk endpoints of a device with two: out, in."""
    names = (await guest.check(f"ls -d {folder}/*:*/ep_*")).split()
    out, inwards = sorted(int(name[-2:], 16) for name in names)
    return out, inwards


@pytest.mark.usefixtures("paused")
async def test_configuration_is_changed_with_transfers_in_flight(plugger: Plugger, far: QemuGuest) -> None:
    machine = plugger.machine
    async with machine.gadget(PLAIN, "SourceSink.0", "Loopback.0") as real:
        async with plugger.plugged(far.targets[0], real):
            folder = await usb_folder_by_name(far, f"{PLAIN} *")
            node = await usb_node(far, folder)
            await far.check(f"echo 2 >{folder}/bConfigurationValue")
            assert await machine.check(f"cat {real.folder}/bConfigurationValue") == "2\n"
            out, inwards = await bulk_endpoints(far, folder)
            sent = [os.urandom(size) for size in (1, 1023, 3000, 4096)]
            answers = await raw(
                far,
                node,
                ("claim", 0),
                *(one for data in sent for one in (("send", out, data), ("receive", inwards, 4096))),
                ("begin", "receive", inwards, 4096),
                # Past the kernel, which would take the transfers back before.
                ("control", bytes.fromhex("0009010000000000")),
                ("join",),
            )
            *looped, begun, chosen, ended = answers[1:]
            assert looped[1::2] == sent
            assert begun == chosen == b""
            assert isinstance(ended, bytes)
            # The transfer was cancelled; Linux retries it, and the source of the new configuration replies.
            assert json.loads(ended) in (["EPROTO"], ["EIO"], [bytes(4096).hex()]), ended[:100]
            assert await machine.check(f"cat {real.folder}/bConfigurationValue") == "1\n"

            await far.check(f"echo 1 >{folder}/bConfigurationValue")
            out, inwards = await bulk_endpoints(far, folder)
            written = os.urandom(1000)
            answers = await raw(
                far,
                node,
                ("claim", 0),
                ("receive", inwards, 65536),
                ("send", out, bytes(65536)),
                ("control", struct.pack("<BBHHH", 0x40, 0x5B, 0, 0, len(written)), written),
                ("control", struct.pack("<BBHHH", 0xC0, 0x5C, 0, 0, len(written))),
            )
            assert answers == [b"", bytes(65536), b"", b"", written]
            await far.check(f"echo 2 >{folder}/bConfigurationValue")
        assert await machine.check(f"cat {real.folder}/bConfigurationValue") == "1\n"


def silent() -> UsbipDevice:
    """A device whose endpoints never answer: it takes transfers and keeps them."""
    setting = interface(0, endpoint(OUT, BULK, 512), endpoint(IN, BULK, 512))
    return UsbipDevice(device_descriptor(OTHER), [configuration(setting)])


KEYBOARD, TABLET = "0627:0001 *Keyboard", "0627:0001 *Tablet"


async def test_neighbours_that_never_answer_and_never_stop(plugger: Plugger, far: QemuGuest) -> None:
    machine, mute = plugger.machine, silent()
    async with (
        mute.attached(machine.guest),
        machine.gadget(PLAIN, "SourceSink.0") as flood,
        machine.device("usb-kbd", KEYBOARD) as keyboard,
    ):
        never = await machine.find(f"{OTHER} *")
        async with plugger.plugged(far.targets[-1], never, flood, keyboard) as (_, flooding, _):

            async def moved(count: int) -> None:
                """Wait until ``count`` bytes of the flood have arrived."""
                async with asyncio.timeout(GUEST_TIMEOUT):
                    while (await plugger.ask("figures", flooding)).get(f"{IN:02x}", {"bytes": 0})["bytes"] <= count:
                        await asyncio.sleep(0.1)

            async def type_then_stop() -> list[tuple[int, int]]:
                async with asyncio.timeout(GUEST_TIMEOUT):
                    while mute.submitted < 2:
                        await asyncio.sleep(0.1)
                try:
                    folder = await usb_folder_by_name(far, KEYBOARD)
                    return await events(far, folder, EV_KEY, lambda: machine.type(KEYS), len(PRESSES))
                finally:
                    await moved(1 << 20)
                    await far.check("touch /run/enough")

            async def node(name: str) -> str:
                return await usb_node(far, await usb_folder_by_name(far, f"{name} *"))

            await far.check("rm -f /run/enough")
            typed, drained, waited = await asyncio.gather(
                type_then_stop(),
                raw(far, await node(PLAIN), ("claim", 0), ("drain", IN, 1 << 16, "/run/enough")),
                raw(
                    far,
                    await node(OTHER),
                    ("claim", 0),
                    ("timeout", 5000),
                    ("begin", "send", OUT, b"never accepted"),
                    ("begin", "receive", IN, 512),
                    ("join",),
                ),
            )
            assert typed == PRESSES
            assert drained == [b"", b""]
            assert waited == [*[b""] * 4, b'["ETIMEDOUT", "ETIMEDOUT"]']
            async with asyncio.timeout(GUEST_TIMEOUT):
                while mute.pending:  # cancelled, also at the device
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("follow", ["port", "device"])
async def test_firmware_makes_it_another_device(plugger: Plugger, far: QemuGuest, follow: str) -> None:
    machine, target = plugger.machine, from_inside(far.targets[0])
    plugger.events.clear()
    await plugger.ask("connect", target)
    try:
        async with machine.gadget(PLAIN, "SourceSink.0") as real:
            await plugger.ask("keep", target, PLAIN, follow)
            await plugger.happened("Configured")
            plugger.events.clear()
        assert "was pulled out; when it comes back it goes into the VM again" in await plugger.happened("note")
        plugger.events.clear()
        async with machine.gadget(FLASHED, "SourceSink.0") as flashed:
            assert flashed.folder == real.folder
            if follow == "port":
                assert "is back: it goes into the VM" in await plugger.happened("note")
                await plugger.happened("Configured")
                await usb_folder_by_name(far, f"{FLASHED} *")
                assert await machine.drivers(flashed) == {"1.0": "usbfs"}
        if follow == "device":
            async with machine.gadget(PLAIN, "SourceSink.0"):
                await plugger.happened("Configured")
                await usb_folder_by_name(far, f"{PLAIN} *")
            assert not [words for _, _, words in plugger.events if FLASHED in words], plugger.events
    finally:
        await plugger.ask("let_go")
        await plugger.ask("leave", target)


PAUSE = 30 if LONG else 0
"""Seconds of the pause at least; the other tests here run meanwhile."""
CAMERA = "1d6b:0108"
HIGH_BANDWIDTH, PICTURE = 0x1400, 3 * 1024
"""wMaxPacketSize of an endpoint that has three packets of 1024 bytes in one interval (USB 2.0, 5.9.1)."""
PICTURES = 200
MAX_GROWTH = 3 * MIB
"""Bytes by which farplug's memory may grow while 1.5 times as many of a camera's pictures are dropped, in a pause."""
READ = "sh -c 'while dd if={disk} bs=64k iflag=direct 2>/dev/null | sha256sum; do :; done'"


def picture(number: int) -> bytes:
    """Three packets, full of their number."""
    return struct.pack("<I", number) * (PICTURE // 4)


@dataclass(frozen=True)
class Paused:
    """A VM that pauses while its devices are at work.

    Attributes:
        since: when it began to, on the clock of the event loop.
        devices: disk, camera and tablet.
        numbers: of the devices, for the plugger.
        reading: the sums of the whole disk, again and again.
        touched: what the tablet's event device gives.
        seen: the pictures that arrive before, and after.
        unplug: takes the devices out of the VM.
    """

    guest: QemuGuest
    since: float
    devices: Sequence[RealDevice]
    numbers: Sequence[int]
    sha256: str
    reading: Job
    touched: Job
    seen: asyncio.Task[list[Result]]
    unplug: Callable[[], Awaitable[None]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def paused(
    plugger: Plugger, session_guests: Guests, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Paused]:
    """A VM with a disk, a camera that sends 768 kB/s, and a tablet; it pauses."""
    machine = plugger.machine
    image = tmp_path_factory.mktemp("pause") / "disk.raw"
    image.write_bytes(os.urandom(4 * MIB))
    setting = interface(0, endpoint(SOURCE, ISOCHRONOUS, HIGH_BANDWIDTH, INTERVAL), alternate=1)
    camera = Clocked(device_descriptor(CAMERA), [configuration(interface(0), setting)], packet=picture)
    camera.limit = PICTURES * 3 / 2  # not all that the VM asks for comes before the pause, however late that begins
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        far = await enter(session_guests.fresh(FAR))
        disk = await enter(real_disk(plugger, BOT, image))
        await enter(camera.attached(machine.guest))
        devices = [disk, await machine.find(f"{CAMERA} *"), await enter(machine.device("usb-tablet", TABLET))]
        plugs = await enter(AsyncExitStack())
        places = (far.targets[0], far.targets[1], far.targets[-1])
        plugged = [
            await plugs.enter_async_context(plugger.plugged(target, real))
            for target, real in zip(places, devices, strict=True)
        ]
        reading = await enter(running(far, READ.format(disk=await far_disk(far, BOT))))
        node = await first(far, f"{await usb_folder_by_name(far, TABLET)}/*/*/input/*/event*")
        touched = await enter(running(far, f"cat /dev/input/{node}"))
        await touched.opened(node)
        node = await usb_node(far, await usb_folder_by_name(far, f"{CAMERA} *"))
        listen = ("listen", SOURCE, PICTURE, PER_URB, URBS, PICTURES)
        await reading.until("-")
        seen = asyncio.ensure_future(raw(far, node, ("claim", 0), ("set_interface", 0, 1), listen, listen, timeout=600))
        async with asyncio.timeout(GUEST_TIMEOUT):
            while camera.given < PICTURES / 2:
                await asyncio.sleep(0.05)
        await far.qmp.execute("stop")
        camera.limit = math.inf
        yield Paused(
            far,
            asyncio.get_running_loop().time(),
            devices,
            [number for (number,) in plugged],
            hashlib.sha256(image.read_bytes()).hexdigest(),
            reading,
            touched,
            seen,
            plugs.aclose,
        )
        seen.cancel()


async def test_vm_goes_on_after_a_pause(plugger: Plugger, paused: Paused) -> None:
    machine, far = plugger.machine, paused.guest

    async def dropped() -> int:
        return int((await plugger.ask("figures", paused.numbers[1]))[f"{SOURCE:02x}"]["dropped"])

    async def dropped_more_than(count: int) -> int:
        async with asyncio.timeout(GUEST_TIMEOUT):
            while (now := await dropped()) <= count:
                await asyncio.sleep(0.1)
        return now

    async def memory_grows() -> bool:
        before, count = await plugger.ask("memory"), await dropped()
        await dropped_more_than(count + 3 * MAX_GROWTH // 2 // PICTURE)
        return bool(await plugger.ask("memory") - before >= MAX_GROWTH)

    await dropped_more_than(0)  # what is kept for the VM is full
    await machine.point(1000, 2000)
    # The heap, which the other tests have used, may grow once; what is not freed grows again and again.
    assert not (await memory_grows() and await memory_grows())
    await asyncio.sleep(PAUSE - (asyncio.get_running_loop().time() - paused.since))
    assert not paused.seen.done()

    await far.qmp.execute("cont")
    sums = (await paused.reading.output()).count("\n")
    *chosen, before, after = await paused.seen
    assert chosen == [b"", b""]
    numbers = [int.from_bytes(data[:4], "little") for data in split(before) + split(after)]
    assert split(before) + split(after) == list(map(picture, numbers))
    assert rises(numbers)
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await paused.reading.output()).count("\n") < sums + 2:
            await asyncio.sleep(0.1)
        while len(decoded(await paused.touched.data(), EV_ABS)) < 2:
            await asyncio.sleep(0.1)
    assert set((await paused.reading.output()).split()) == {paused.sha256, "-"}

    await paused.unplug()
    assert [await machine.drivers(real) for real in paused.devices] == [
        {"1.0": "usb-storage"},
        {"1.0": ""},
        {"1.0": "usbhid"},
    ]
