"""A real device behind the engine, with a guest that notices what would make QEMU abort."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from typing import Any

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeHandle
from tests.physical.support import BULK_IN, BULK_OUT, EVERYTHING, KEYS, OTHER, SOUND, on_bench, settle

from farplug.redirection.events import Detached
from farplug.testing.memory import MemoryGuest, Pending, TransferFailed
from farplug.usb import Setup, Status
from farplug.usbredir import packets

CODES = (
    usb1.TRANSFER_COMPLETED,
    usb1.TRANSFER_COMPLETED,
    usb1.TRANSFER_ERROR,
    usb1.TRANSFER_STALL,
    usb1.TRANSFER_CANCELLED,
    usb1.TRANSFER_OVERFLOW,
)


async def test_a_guest_uses_a_device() -> None:
    fake = FakeDevice(EVERYTHING, OTHER, drivers={0: "storage"})
    async with MemoryGuest(on_bench(fake).device) as guest:
        assert guest.connected is not None
        assert guest.connected.vendor_id == 0x1234
        await guest.set_configuration(1)
        reading = guest.submit_in(BULK_IN, 512)
        await settle()
        fake.handle.in_flight[0].finish(b"sector")
        answer = await reading
        assert isinstance(answer, packets.BulkPacket)
        assert bytes(answer.data) == b"sector"
        guest.send(packets.StartInterruptReceiving(endpoint=KEYS))
        next_key = guest.stream(packets.InterruptPacket, KEYS)
        await settle()
        fake.handle.in_flight[0].finish(b"key")
        key = await next_key()
        assert (bytes(key.data), key.id) == (b"key", 0)
        await guest.set_interface(2, 1)
        await guest.clear_halt(BULK_IN)
        assert fake.calls[-1] == f"clear_halt {BULK_IN}"
        await guest.set_configuration(3)
        assert fake.handle.claimed == {1}
        with pytest.raises(TransferFailed):
            await guest.bulk_in(BULK_IN, 8)
    assert fake.drivers == {0: "storage"}
    assert fake.handle.closed


async def test_unplugged_during_transfers() -> None:
    fake = FakeDevice(EVERYTHING)
    async with MemoryGuest(on_bench(fake).device) as guest:
        await guest.set_configuration(1)
        pending = [guest.submit_in(BULK_IN, 512) for _ in range(5)] + [guest.submit_out(BULK_OUT, b"data")]
        await settle()
        fake.unplug()
        await asyncio.gather(*pending)
        await guest.wait(lambda: any(isinstance(event, Detached) for event in guest.events))
        assert fake.handle.closed


async def ignore(operation: Coroutine[Any, Any, object]) -> None:
    """Wait for an answer, whatever it is; a guest whose device left waits no longer."""
    with contextlib.suppress(TransferFailed, asyncio.CancelledError):
        await operation


def disturb(chance: random.Random, handle: FakeHandle) -> None:
    """Some of what is in flight ends, in any order and in any way."""
    for usb in chance.sample(handle.in_flight, chance.randint(0, len(handle.in_flight))):
        code = chance.choice(CODES)
        length = chance.randint(0, len(usb.buffer))
        if usb.kind == "isochronous":
            usb.finish(status=code, packets=[(chance.choice(CODES), 0) for _ in usb.lengths])
        else:
            usb.finish(status=code, actual=length)


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_a_device_and_a_guest_do_the_guest_lives(seed: int) -> None:
    chance = random.Random(seed)
    fake = FakeDevice(EVERYTHING, OTHER)
    bench = on_bench(fake)
    async with MemoryGuest(bench.device) as guest:
        await guest.set_configuration(1)
        fake.handle.keeps_cancelled = chance.random() < 0.5
        pending: list[Pending] = []
        operations: list[asyncio.Task[None]] = []
        for _ in range(60):
            handle = fake.handle
            match chance.randrange(12):
                case 0 | 1 | 2:
                    pending.append(guest.submit_in(BULK_IN, chance.choice((0, 8, 512, 2**20, 3 * 2**20))))
                case 3 | 4:
                    pending.append(guest.submit_out(BULK_OUT, bytes(chance.choice((0, 8, 512, 2**20 + 1)))))
                case 5:
                    for one in chance.sample(pending, len(pending) // 2):
                        one.cancel()
                case 6:
                    guest.send(
                        chance.choice(
                            (
                                packets.StartInterruptReceiving(endpoint=KEYS),
                                packets.StopInterruptReceiving(endpoint=KEYS),
                                packets.StartIsoStream(endpoint=SOUND, packets_per_urb=2, urbs=3),
                                packets.StopIsoStream(endpoint=SOUND),
                                packets.IsoPacket(endpoint=SOUND, status=Status.SUCCESS, length=3, data=b"abc"),
                            )
                        )
                    )
                case 7:
                    guest.reset()
                case 8:
                    value, alternate = chance.choice((0, 1, 1, 1, 3, 9)), chance.choice((0, 1, 7))
                    match chance.randrange(3):
                        case 0:
                            operation = guest.set_configuration(value)
                        case 1:
                            operation = guest.set_interface(2, alternate)
                        case _:
                            operation = guest.clear_halt(BULK_IN)
                    operations.append(asyncio.create_task(ignore(operation)))
                case 9:
                    handle.refusals = [chance.choice((None, usb1.USBErrorNoMem(), usb1.USBErrorOther()))] * 3
                case 10:
                    operations.append(asyncio.create_task(ignore(guest.control_in(Setup(0xC0, 1, 0, 0, 8)))))
                case _:
                    disturb(chance, handle)
            await settle(chance.randrange(2))
        fake.handle.keeps_cancelled = False
        if chance.random() < 0.3:
            fake.unplug()
        for one in pending:
            one.cancel()
        for _ in range(200):
            disturb(chance, fake.handle)
            await settle(1)
            if all(one.done for one in pending) and all(task.done() for task in operations):
                break
        await asyncio.gather(*operations)
        assert all(one.done for one in pending), "each has its answer"
        for usb in [usb for usb in fake.handle.in_flight if usb.cancelling]:
            usb.finish(status=usb1.TRANSFER_CANCELLED)
    assert fake.handle.closed
    assert not fake.handle.in_flight
