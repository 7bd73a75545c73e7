"""What the event loop says to a device while its thread talks to it: nothing."""

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
async def test_the_loop_says_nothing_to_a_device_that_hangs(operation: str) -> None:
    """Linux locks a device for as long as such a call takes: whoever submits, cancels or reaps meanwhile waits."""
    async with opened() as bench:
        await bench.device.set_interface(2, 1)
        before = bench.read(512)
        answer = bench.fake.hang[operation] = threading.Event()
        bench.fake.hanging.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # the engine waits no longer
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
        assert gone.status is Status.CANCELLED, "nothing of it is at the device"
        for flying in bench.flying:
            flying.finish(b"late")
        await settle()
        assert (first.status, second.status) == (None, None)
        answer.set()
        bench.fake.hang.clear()
        await until(lambda: before.status is not None)
        await until(lambda: len(bench.flying) == 3)
        assert [(one.kind, len(one.buffer)) for one in bench.flying] == [("bulk", 256), ("bulk", 128), ("interrupt", 8)]
        assert not bench.fake.waits


async def test_sound_that_begins_while_it_hangs() -> None:
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
        await until(lambda: bench.flying)
        assert [one.lengths for one in bench.flying] == [[2, 2]]


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


async def test_a_device_that_is_plugged_in_still_is_not_lost() -> None:
    """Linux ends what is under way on an endpoint as if the device had gone, when its interface gets a new setting."""
    async with opened() as bench:
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        read = bench.read(512)
        bench.control(CLEAR_HALT)
        await until(bench.fake.hanging.is_set)
        bench.device.cancel(read)
        bench.flying[0].finish(status=usb1.TRANSFER_NO_DEVICE)
        answer.set()
        await until(lambda: read.status is not None)
        await settle()
        assert not bench.listener.losses


async def hang(bench: Bench) -> threading.Event:
    """The device's thread talks to it, until the event is set."""
    answer = bench.fake.hang["clear_halt"] = threading.Event()
    bench.fake.hanging.clear()
    bench.control(CLEAR_HALT)
    assert await asyncio.to_thread(bench.fake.hanging.wait, 10)
    return answer


async def test_cancelled_while_it_hangs_the_newest_first() -> None:
    """As the ledger says it: none goes on in the place of another."""
    async with opened() as bench:
        reads = [bench.read(512) for _ in range(3)]
        answer = await hang(bench)
        for read in reversed(reads):
            bench.device.cancel(read)
        answer.set()
        await until(lambda: all(read.status is Status.CANCELLED for read in reads))
        assert [one for one in bench.done if one in reads] == reads[::-1]


async def test_a_guest_that_begins_and_ends_while_it_hangs_costs_no_memory() -> None:
    async with opened() as bench:
        answer = await hang(bench)
        for _ in range(20):
            bench.device.cancel(bench.read(512))
            assert bench.device.start_receiving(Reception(KEYS, INTERRUPT, 1)) is Status.SUCCESS
            bench.device.stop_receiving(KEYS)
        assert not bench.device._session.gate._held  # type: ignore[union-attr]
        answer.set()
        await until(lambda: not bench.device._session.gate.shut)  # type: ignore[union-attr]
        assert not bench.flying


async def test_what_came_back_before_its_cancel_was_said_is_anothers() -> None:
    """Where a thread handles the events, transfers come back while the device's thread talks, and are used again."""
    library = FakeLibrary(fake := FakeDevice(EVERYTHING))
    library.polls_nothing = True
    async with opened(fake, library=library) as bench:
        old = bench.read(512)
        answer = await hang(bench)
        new = bench.read(512)
        bench.device.cancel(old)
        bench.flying[0].finish(b"late")
        await until(lambda: old.status is not None)
        answer.set()
        await until(lambda: bench.flying)
        await settle()
        assert new.status is None
        assert len(bench.handle.transfers) == 1


async def test_what_comes_when_the_gate_opens_does_not_overtake_what_was_held_back() -> None:
    async with opened() as bench:
        answer = await hang(bench)
        data, more = [bytes([number]) * 16 for number in range(4)], []
        refused = bench.write(data[0])
        bench.write(data[1])
        bench.write(data[2])
        refused.on_complete = lambda transfer: more.append(bench.write(data[3]))  # the guest has more when it hears
        bench.handle.refusals = [usb1.USBErrorIO()]
        answer.set()
        await until(lambda: len(bench.flying) == 3)
        assert [bytes(one.buffer) for one in bench.flying] == data[1:]


async def test_a_long_one_that_comes_when_the_gate_opens_does_not_overtake_either() -> None:
    """The long one that was refused blocks its endpoint no more when its answer is heard."""
    async with opened() as bench:
        answer = await hang(bench)
        refused = bench.write(bytes(2 * MAX_PIECE))
        bench.write(b"held back")
        refused.on_complete = lambda transfer: bench.done.append(bench.write(bytes(3 * MAX_PIECE)))
        bench.handle.refusals = [usb1.USBErrorIO()]
        answer.set()
        await until(lambda: len(bench.flying) == 2)
        assert [len(one.buffer) for one in bench.flying] == [9, MAX_PIECE]


async def test_what_was_held_back_waits_behind_what_finds_no_memory() -> None:
    async with opened() as bench:
        answer = await hang(bench)
        data = [bytes([number]) * 16 for number in range(3)]
        for one in data:
            bench.write(one)
        bench.handle.refusals = [usb1.USBErrorNoMem()]
        answer.set()
        await until(lambda: len(bench.flying) == 3)
        assert [bytes(one.buffer) for one in bench.flying] == data


async def test_receiving_goes_on_after_an_error_while_it_hangs() -> None:
    async with opened() as bench:
        bench.device.start_receiving(Reception(KEYS, INTERRUPT, 1))
        bench.flying[0].finish(status=usb1.TRANSFER_ERROR)
        await until(lambda: bench.listener.packets)
        answer = await hang(bench)
        await asyncio.sleep(ERROR_PAUSE * 2)
        assert not bench.flying
        answer.set()
        await until(lambda: bench.flying)


async def test_the_device_is_talked_to_again_as_soon_as_the_gate_opens() -> None:
    """An answer to what was held back makes the guest ask for a reset: what is held back then waits for its end."""
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
