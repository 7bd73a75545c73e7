"""The event loop does not act on a device while its thread makes a call."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeLibrary
from tests.physical.support import (
    BULK,
    BULK_IN,
    EVERYTHING,
    INTERRUPT,
    ISO,
    KEYS,
    SOUND,
    Bench,
    opened,
    settle,
    until,
)

from farplug.physical.receivers import ERROR_PAUSE
from farplug.physical.transfers import MAX_PIECE
from farplug.usb import Reception, Setup, Status

CLEAR_HALT = Setup(0x02, 1, 0, BULK_IN)


@pytest.mark.parametrize("operation", ["reset", "clear_halt", "set_interface"])
async def test_the_loop_does_not_act_on_a_device_that_hangs(operation: str) -> None:
    """Linux locks a device during such a call, and submitting, cancelling and reaping block meanwhile."""
    async with opened() as bench:
        await bench.device.set_interface(2, 1)
        before = bench.read(512)
        answer = bench.fake.hang[operation] = threading.Event()
        bench.fake.hanging.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # the caller waits no longer
                match operation:
                    case "reset":
                        await bench.device.reset()
                    case "set_interface":
                        await bench.device.set_interface(2, 0)
                    case _:
                        bench.control(CLEAR_HALT)
        assert await asyncio.to_thread(bench.fake.hanging.wait, 10)
        first, second, gone = bench.read(256), bench.read(128), bench.read(64)
        assert bench.device.start_receiving(Reception(KEYS, INTERRUPT, 1)) is Status.SUCCESS
        assert bench.device.start_receiving(Reception(BULK_IN, BULK, 1, bytes_per_transfer=512)) is Status.SUCCESS
        bench.device.stop_receiving(BULK_IN)
        bench.device.cancel(before)
        bench.device.cancel(gone)
        assert gone.status is Status.CANCELLED, "libusb has no piece of it"
        for usb in bench.in_flight:
            usb.finish(b"late")
        await settle()
        assert (first.status, second.status) == (None, None)
        answer.set()
        bench.fake.hang.clear()
        await until(lambda: before.status is not None)
        await until(lambda: len(bench.in_flight) == 3)
        assert [(one.kind, len(one.buffer)) for one in bench.in_flight] == [
            ("bulk", 256),
            ("bulk", 128),
            ("interrupt", 8),
        ]
        assert not bench.fake.waits


async def test_sound_that_starts_while_it_hangs() -> None:
    async with opened() as bench:
        await bench.device.set_interface(2, 1)
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        bench.fake.hanging.clear()
        bench.control(CLEAR_HALT)
        assert await asyncio.to_thread(bench.fake.hanging.wait, 10)
        assert bench.device.start_receiving(Reception(SOUND, ISO, 2, 2)) is Status.SUCCESS
        for _ in range(2):
            bench.submit(ISO, SOUND, data=b"la")
        answer.set()
        await until(lambda: not bench.device._session.gate.shut)  # type: ignore[union-attr]
        bench.submit(ISO, SOUND, data=b"la")
        await until(lambda: bench.in_flight)
        assert [one.lengths for one in bench.in_flight] == [[2, 2]]


async def test_closed_while_it_hangs() -> None:
    async with opened() as bench:
        bench.device.start_receiving(Reception(KEYS, INTERRUPT, 1))
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        bench.control(CLEAR_HALT)
        assert await asyncio.to_thread(bench.fake.hanging.wait, 10)
        read = bench.read(512)
        closing = asyncio.create_task(bench.device.close())
        await until(lambda: read.status is not None)
        assert read.status is Status.CANCELLED
        answer.set()
        await closing
        assert [one.submitted for one in bench.handle.transfers] == [False]


async def test_a_device_that_is_still_plugged_in_is_not_lost() -> None:
    """When an interface gets a new setting, Linux ends its transfers as if the device was unplugged."""
    async with opened() as bench:
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        read = bench.read(512)
        bench.control(CLEAR_HALT)
        await until(bench.fake.hanging.is_set)
        bench.device.cancel(read)
        bench.in_flight[0].finish(status=usb1.TRANSFER_NO_DEVICE)
        answer.set()
        await until(lambda: read.status is not None)
        await settle()
        assert not bench.listener.losses


async def hang(bench: Bench) -> threading.Event:
    """Have the device's thread make a call until the event is set."""
    answer = bench.fake.hang["clear_halt"] = threading.Event()
    bench.fake.hanging.clear()
    bench.control(CLEAR_HALT)
    assert await asyncio.to_thread(bench.fake.hanging.wait, 10)
    return answer


async def test_cancelled_while_it_hangs_the_newest_first() -> None:
    """So that none starts because another ended."""
    async with opened() as bench:
        reads = [bench.read(512) for _ in range(3)]
        answer = await hang(bench)
        for read in reversed(reads):
            bench.device.cancel(read)
        answer.set()
        await until(lambda: all(read.status is Status.CANCELLED for read in reads))
        assert [one for one in bench.done if one in reads] == reads[::-1]


async def test_a_guest_that_starts_and_stops_while_it_hangs_uses_no_memory() -> None:
    async with opened() as bench:
        answer = await hang(bench)
        for _ in range(20):
            bench.device.cancel(bench.read(512))
            assert bench.device.start_receiving(Reception(KEYS, INTERRUPT, 1)) is Status.SUCCESS
            bench.device.stop_receiving(KEYS)
        assert not bench.device._session.gate._deferred  # type: ignore[union-attr]
        answer.set()
        await until(lambda: not bench.device._session.gate.shut)  # type: ignore[union-attr]
        assert not bench.in_flight


async def test_a_transfer_that_completes_before_its_deferred_cancel_is_used_again() -> None:
    """With an event thread, transfers complete during a call of the device's thread, and are used again."""
    library = FakeLibrary(fake := FakeDevice(EVERYTHING))
    library.polls_nothing = True
    async with opened(fake, library=library) as bench:
        old = bench.read(512)
        answer = await hang(bench)
        new = bench.read(512)
        bench.device.cancel(old)
        bench.in_flight[0].finish(b"late")
        await until(lambda: old.status is not None)
        answer.set()
        await until(lambda: bench.in_flight)
        await settle()
        assert new.status is None
        assert len(bench.handle.transfers) == 1


async def test_new_transfers_do_not_overtake_deferred_ones() -> None:
    async with opened() as bench:
        answer = await hang(bench)
        data, more = [bytes([number]) * 16 for number in range(4)], []
        refused = bench.write(data[0])
        bench.write(data[1])
        bench.write(data[2])
        refused.on_complete = lambda transfer: more.append(
            bench.write(data[3])
        )  # the guest submits more after the completion
        bench.handle.refusals = [usb1.USBErrorIO()]
        answer.set()
        await until(lambda: len(bench.in_flight) == 3)
        assert [bytes(one.buffer) for one in bench.in_flight] == data[1:]


async def test_a_new_long_transfer_does_not_overtake_deferred_ones() -> None:
    """The long transfer that was refused does not block its endpoint when it is completed."""
    async with opened() as bench:
        answer = await hang(bench)
        refused = bench.write(bytes(2 * MAX_PIECE))
        bench.write(b"deferred.")
        refused.on_complete = lambda transfer: bench.done.append(bench.write(bytes(3 * MAX_PIECE)))
        bench.handle.refusals = [usb1.USBErrorIO()]
        answer.set()
        await until(lambda: len(bench.in_flight) == 2)
        assert [len(one.buffer) for one in bench.in_flight] == [9, MAX_PIECE]


async def test_deferred_transfers_wait_behind_one_without_memory() -> None:
    async with opened() as bench:
        answer = await hang(bench)
        data = [bytes([number]) * 16 for number in range(3)]
        for one in data:
            bench.write(one)
        bench.handle.refusals = [usb1.USBErrorNoMem()]
        answer.set()
        await until(lambda: len(bench.in_flight) == 3)
        assert [bytes(one.buffer) for one in bench.in_flight] == data


async def test_receiving_goes_on_after_an_error_while_it_hangs() -> None:
    async with opened() as bench:
        bench.device.start_receiving(Reception(KEYS, INTERRUPT, 1))
        bench.in_flight[0].finish(status=usb1.TRANSFER_ERROR)
        await until(lambda: bench.listener.packets)
        answer = await hang(bench)
        await asyncio.sleep(ERROR_PAUSE * 2)
        assert not bench.in_flight
        answer.set()
        await until(lambda: bench.in_flight)


async def test_a_deferred_action_that_causes_a_call() -> None:
    """A deferred transfer fails, and the guest resets the device: the other deferred transfers wait for that."""
    async with opened() as bench:
        answer = await hang(bench)
        refused, later = bench.write(b"refused"), bench.write(b"later")
        tasks: list[asyncio.Task[Status]] = []
        refused.on_complete = lambda transfer: tasks.append(asyncio.create_task(bench.device.reset()))
        bench.handle.refusals = [usb1.USBErrorIO()]
        answer.set()
        await until(lambda: tasks)
        assert await tasks[0] is Status.SUCCESS
        await until(lambda: later.status is Status.CANCELLED)
        assert not bench.device._session.gate.shut  # type: ignore[union-attr]
