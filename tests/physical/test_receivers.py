from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeTransfer
from tests.physical.support import BULK, BULK_IN, CAMERA, INTERRUPT, ISO, KEYS, SOUND, Bench, opened, settle, until

from farplug.physical import receivers
from farplug.usb import Reception, Status, Transfer, TransferType
from farplug.usb.descriptors import ConfigurationDescriptor, EndpointDescriptor, InterfaceDescriptor
from farplug.usb.types import Buffer

COMPLETED, STALL, ERROR = usb1.TRANSFER_COMPLETED, usb1.TRANSFER_STALL, usb1.TRANSFER_ERROR
KEYBOARD = Reception(KEYS, INTERRUPT)
SERIAL = Reception(BULK_IN, BULK, transfers=2, bytes_per_transfer=1024)


@asynccontextmanager
async def receiving(*wanted: Reception) -> AsyncIterator[Bench]:
    async with opened() as bench:
        await bench.device.set_interface(2, 1)
        for reception in wanted:
            assert bench.device.start_receiving(reception) is Status.SUCCESS
        yield bench


# Interrupt and buffered bulk


async def test_keys_are_received_without_a_request() -> None:
    async with receiving(KEYBOARD) as bench:
        assert bench.handle.submissions == [("interrupt", KEYS, 8)] * 5
        for key in (b"a", b"", b"12345678"):
            bench.in_flight[0].finish(key)
            await settle()
        assert bench.listener.packets == [
            (KEYS, Status.SUCCESS, b"a"),
            (KEYS, Status.SUCCESS, b""),
            (KEYS, Status.SUCCESS, b"12345678"),
        ]
        assert len(bench.in_flight) == 5
        assert bench.device.start_receiving(KEYBOARD) is Status.INVALID
        assert bench.device.stop_receiving(KEYS) is Status.SUCCESS
        assert not bench.in_flight
        await settle()
        assert len(bench.listener.packets) == 3
        assert bench.listener.ended == []
        assert all(transfer.closed for transfer in bench.handle.transfers)
        assert bench.device.start_receiving(KEYBOARD) is Status.SUCCESS, "it can begin again"
        assert bench.device.stop_receiving(0x8F) is Status.SUCCESS


async def test_what_was_received_is_not_overwritten_by_the_next() -> None:
    async with receiving(KEYBOARD) as bench:
        kept: list[object] = []

        def received(endpoint: int, status: Status, data: Buffer) -> bool:
            kept.append(data)
            return True

        bench.listener.received = received  # type: ignore[method-assign]
        first = bench.in_flight[0]
        first.finish(b"one")
        await settle()
        first.finish(b"two")
        await settle()
        assert kept == [b"one", b"two"]


async def test_buffered_bulk() -> None:
    async with receiving(SERIAL) as bench:
        assert bench.handle.submissions == [("bulk", BULK_IN, 1024)] * 2
        bench.in_flight[0].finish(b"x" * 700)
        await settle()
        assert bench.listener.packets == [(BULK_IN, Status.SUCCESS, b"x" * 700)]
        assert len(bench.in_flight) == 2


async def test_an_error_is_reported_and_the_reception_goes_on() -> None:
    async with receiving(KEYBOARD) as bench:
        for _ in range(3):
            bench.in_flight[0].finish(b"p", ERROR)
        await settle(2)
        assert bench.listener.packets == [(KEYS, Status.IO_ERROR, b"p")] * 3
        await until(lambda: len(bench.in_flight) == 5)
        assert bench.listener.ended == []


async def test_a_failing_endpoint_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "ERROR_PAUSE", 60)
    async with opened() as bench:
        bench.handle.rule = lambda usb: usb.finish(status=ERROR)
        bench.device.start_receiving(KEYBOARD)
        await settle(20)
        assert len(bench.listener.packets) == 5


async def test_a_stall_is_cleared_without_a_report_to_the_guest() -> None:
    async with receiving(KEYBOARD) as bench:
        bench.in_flight[0].finish(status=STALL)
        bench.in_flight[0].finish(status=STALL)
        await until(lambda: bench.fake.calls[-1] == f"clear_halt {KEYS}")
        await until(lambda: len(bench.in_flight) == 5)
        assert bench.listener.packets == []
        assert bench.listener.ended == []
        assert bench.fake.calls.count(f"clear_halt {KEYS}") == 1
        bench.in_flight[0].finish(b"key")
        await settle()
        assert bench.listener.packets == [(KEYS, Status.SUCCESS, b"key")]


async def test_a_stall_while_others_wait_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "ERROR_PAUSE", 0.02)
    async with receiving(KEYBOARD) as bench:
        bench.in_flight[0].finish(status=ERROR)
        bench.in_flight[1].finish(status=STALL)
        await until(lambda: len(bench.in_flight) == 5)
        await asyncio.sleep(0.04)
        assert len(bench.in_flight) == 5
        assert bench.listener.ended == []


async def test_a_stall_that_stays_ends_the_reception() -> None:
    async with receiving(KEYBOARD) as bench:
        bench.fake.failures["clear_halt"] = usb1.USBErrorOther()
        bench.in_flight[0].finish(status=STALL)
        await until(lambda: bench.listener.ended)
        assert bench.listener.ended == [(KEYS, Status.STALL)]
        assert not bench.in_flight
        assert bench.device.start_receiving(KEYBOARD) is Status.SUCCESS


async def test_stopped_while_a_stall_is_cleared() -> None:
    async with receiving(KEYBOARD) as bench:
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        bench.in_flight[0].finish(status=STALL)
        await asyncio.to_thread(bench.fake.hanging.wait, 10)
        bench.device.stop_receiving(KEYS)
        answer.set()
        await settle()
        assert not bench.in_flight
        assert bench.listener.ended == []


async def test_unplugged_while_a_stall_is_cleared() -> None:
    async with receiving(KEYBOARD) as bench:
        bench.fake.failures["clear_halt"] = usb1.USBErrorNoDevice()
        bench.in_flight[0].finish(status=STALL)
        await until(lambda: bench.listener.losses)
        assert bench.listener.ended == []


@pytest.mark.parametrize("accepted", range(5))
async def test_a_reception_that_cannot_start(accepted: int) -> None:
    async with opened() as bench:
        bench.handle.refusals = [None] * accepted + [usb1.USBErrorIO()]
        assert bench.device.start_receiving(KEYBOARD) is Status.STALL
        assert not bench.in_flight
        assert bench.device.start_receiving(KEYBOARD) is Status.SUCCESS
        assert bench.listener.ended == []


@pytest.mark.parametrize("accepted", range(5))
async def test_memory_for_some_of_the_transfers(accepted: int) -> None:
    """Linux has 16 MiB for all devices: a camera of today would not begin at all."""
    async with opened() as bench:
        await bench.device.set_interface(2, 1)
        for reception in (KEYBOARD, Reception(CAMERA, ISO, 5, 2)):
            bench.handle.refusals = [None] * accepted + [usb1.USBErrorNoMem()]
            status = bench.device.start_receiving(reception)
            assert status is (Status.SUCCESS if accepted else Status.STALL)
            assert len(bench.in_flight) == accepted
            bench.device.stop_receiving(reception.endpoint)
            await settle()
            assert all(transfer.closed for transfer in bench.handle.transfers)


async def test_memory_that_another_device_uses_for_now() -> None:
    async with receiving(KEYBOARD) as bench:
        bench.handle.refusals = [usb1.USBErrorNoMem(), usb1.USBErrorNoMem()]
        bench.in_flight[0].finish(b"key")
        await until(lambda: bench.listener.packets)
        await until(lambda: len(bench.in_flight) == 5)
        assert not bench.listener.ended


@pytest.mark.parametrize("type", [INTERRUPT, ISO])
async def test_an_endpoint_without_room_for_a_packet(type: TransferType) -> None:
    lying = InterfaceDescriptor(0, 0, 255, 0, 0, (EndpointDescriptor(0x81, type, 0, 1),))
    async with opened(FakeDevice(ConfigurationDescriptor(1, (lying,)))) as bench:
        assert bench.device.start_receiving(Reception(0x81, type)) is Status.STALL


async def test_no_memory_for_a_reception() -> None:
    async with opened() as bench:
        bench.handle.no_more_transfers = True
        assert bench.device.start_receiving(KEYBOARD) is Status.STALL
        assert bench.device.stop_receiving(KEYS) is Status.SUCCESS


@pytest.mark.parametrize(
    ("error", "ended", "losses"),
    [(usb1.USBErrorOther(), [(KEYS, Status.STALL)], []), (usb1.USBErrorNoDevice(), [], [None])],
)
async def test_a_reception_that_cannot_go_on(
    error: Exception, ended: list[tuple[int, Status]], losses: list[None]
) -> None:
    async with receiving(KEYBOARD) as bench:
        bench.handle.refusals = [error]
        bench.in_flight[0].finish(b"key")
        await until(lambda: bench.listener.ended or bench.listener.losses)
        assert bench.listener.packets == [(KEYS, Status.SUCCESS, b"key")]
        assert (bench.listener.ended, bench.listener.losses) == (ended, losses)


async def test_transfers_that_are_complete_long_after_the_stop() -> None:
    async with receiving(KEYBOARD) as bench:
        bench.handle.keeps_cancelled = True
        bench.device.stop_receiving(KEYS)
        assert bench.device.start_receiving(KEYBOARD) is Status.SUCCESS
        bench.device.stop_receiving(KEYS)
        for usb in list(bench.in_flight):
            usb.finish(b"late", COMPLETED)
        await settle()
        assert bench.listener.packets == []
        bench.handle.keeps_cancelled = False


async def test_a_listener_that_stops_at_a_packet() -> None:
    async with receiving(KEYBOARD) as bench:

        def received(endpoint: int, status: Status, data: Buffer) -> bool:
            bench.device.stop_receiving(KEYS)
            return True

        bench.listener.received = received  # type: ignore[method-assign]
        bench.in_flight[0].finish(b"key")
        await settle()
        assert not bench.in_flight


# Isochronous IN


async def test_each_packet_of_the_camera_is_one_for_the_guest() -> None:
    async with receiving(Reception(CAMERA, ISO, 3, 4)) as bench:
        assert bench.handle.submissions == [("isochronous", CAMERA, 400)] * 3
        assert bench.in_flight[0].lengths == [100] * 4
        bench.in_flight[0].finish(packets=[(COMPLETED, b"one"), (ERROR, 7), (COMPLETED, b""), (-18, b"four")])
        await settle()
        assert bench.listener.packets == [
            (CAMERA, Status.SUCCESS, b"one"),
            (CAMERA, Status.IO_ERROR, b""),
            (CAMERA, Status.SUCCESS, b""),
            (CAMERA, Status.SUCCESS, b"four"),
        ]
        assert len(bench.in_flight) == 3
        bench.in_flight[0].finish(status=ERROR)
        await settle()
        assert bench.listener.packets[4:] == [(CAMERA, Status.IO_ERROR, b"")]
        await until(lambda: len(bench.in_flight) == 3)


@pytest.mark.parametrize("whole", [True, False])
async def test_the_camera_stalls(whole: bool) -> None:
    async with receiving(Reception(CAMERA, ISO, 2, 2)) as bench:
        if whole:
            bench.in_flight[0].finish(status=STALL)
        else:
            bench.in_flight[0].finish(packets=[(COMPLETED, b"x"), (STALL, 0)])
        await until(lambda: bench.fake.calls[-1] == f"clear_halt {CAMERA}")
        await until(lambda: len(bench.in_flight) == 2)
        assert len(bench.listener.packets) == (0 if whole else 1)
        assert bench.listener.ended == []


async def test_a_guest_that_stops_in_the_middle_of_a_transfer() -> None:
    async with receiving(Reception(CAMERA, ISO, 2, 3)) as bench:
        seen: list[bytes] = []

        def received(endpoint: int, status: Status, data: Buffer) -> bool:
            seen.append(bytes(data))
            bench.device.stop_receiving(CAMERA)
            return True

        bench.listener.received = received  # type: ignore[method-assign]
        bench.in_flight[0].finish(packets=[(COMPLETED, b"a"), (COMPLETED, b"b"), (COMPLETED, b"c")])
        await settle()
        assert seen == [b"a"]
        assert not bench.in_flight


# Isochronous OUT


def play(bench: Bench, *packets: bytes) -> list[Transfer]:
    return [bench.submit(ISO, SOUND, data=packet) for packet in packets]


def played(usb: FakeTransfer) -> None:
    usb.finish(packets=[(COMPLETED, length) for length in usb.lengths])


async def test_sound_is_collected_before_it_is_played() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 2)) as bench:
        first = play(bench, b"1", b"22", b"333")
        assert not bench.in_flight, "half of eight packets are collected first"
        first += play(bench, b"4444")
        assert [(bytes(usb.buffer), usb.lengths) for usb in bench.in_flight] == [(b"122", [1, 2]), (b"3334444", [3, 4])]
        play(bench, b"5")
        assert len(bench.in_flight) == 2
        play(bench, b"6")
        assert [bytes(usb.buffer) for usb in bench.in_flight] == [b"122", b"3334444", b"56"]
        played(bench.in_flight[0])
        await settle()
        assert [(one.status, one.actual) for one in first[:2]] == [(Status.SUCCESS, 1), (Status.SUCCESS, 2)]
        assert first[2].status is None


async def test_after_silence_sound_is_collected_again() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 2)) as bench:
        play(bench, *[b"x"] * 5)
        for usb in list(bench.in_flight):
            played(usb)
        await settle()
        assert not bench.in_flight
        play(bench, *[b"y"] * 2)
        assert not bench.in_flight, "three of eight packets are there, half are collected first"
        play(bench, b"y")
        assert len(bench.in_flight) == 2


async def test_too_much_sound_is_dropped_down_to_the_middle() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 2)) as bench:
        held = play(bench, *[b"x"] * 8)
        assert len(bench.in_flight) == 4
        dropped = play(bench, *[b"y"] * 4)
        assert [one.status for one in dropped] == [Status.CANCELLED] * 4
        assert {one.status for one in held} == {None}
        played(bench.in_flight[0])
        await settle()
        after = play(bench, b"z", b"z")
        assert len(bench.in_flight) == 4
        assert {one.status for one in after} == {None}


async def test_packets_that_do_not_fit_are_refused() -> None:
    async with receiving(Reception(SOUND, ISO, 2, 1)) as bench:
        assert [one.status for one in play(bench, b"", bytes(101))] == [Status.SUCCESS, Status.INVALID]
        play(bench, bytes(100))
        assert len(bench.in_flight) == 1


async def test_the_smallest_buffer_plays() -> None:
    async with receiving(Reception(SOUND, ISO, 1, 1)) as bench:
        play(bench, b"x")
        assert len(bench.in_flight) == 1


async def test_errors_of_sound() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 1)) as bench:
        first, second = play(bench, b"x", b"y")
        bench.in_flight[0].finish(packets=[(ERROR, 0)])
        bench.in_flight[0].finish(status=ERROR, packets=[(ERROR, 0)])
        await settle()
        assert (first.status, second.status) == (Status.IO_ERROR, Status.IO_ERROR)
        assert bench.listener.ended == [(SOUND, Status.IO_ERROR)], "reported, and the reception goes on"
        play(bench, b"x", b"y")
        assert len(bench.in_flight) == 2


@pytest.mark.parametrize("whole", [True, False])
async def test_sound_stalls(whole: bool) -> None:
    async with receiving(Reception(SOUND, ISO, 4, 1)) as bench:
        playing = play(bench, b"x", b"y", b"z")
        bench.in_flight[0].finish(status=STALL if whole else COMPLETED, packets=[(STALL, 0)])
        await until(lambda: bench.fake.calls[-1] == f"clear_halt {SOUND}")
        await until(lambda: all(one.status is not None for one in playing))
        assert bench.listener.ended == []
        play(bench, b"x", b"y")
        await until(lambda: len(bench.in_flight) == 2)


async def test_sound_that_arrives_while_a_stall_is_cleared_is_played() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 1)) as bench:
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        play(bench, b"x", b"y")
        bench.in_flight[0].finish(packets=[(STALL, 0)])
        assert await asyncio.to_thread(bench.fake.hanging.wait, 10)
        play(bench, b"x", b"y")
        answer.set()
        await until(lambda: len(bench.in_flight) == 2)


async def test_stopped_while_sound_is_collected_and_played() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 2)) as bench:
        packets = play(bench, *[b"x"] * 5)
        bench.device.stop_receiving(SOUND)
        assert [one.status for one in packets] == [Status.CANCELLED] * 5
        await settle()
        assert all(usb.closed for usb in bench.handle.transfers)


async def test_sound_that_cannot_be_played() -> None:
    async with receiving(Reception(SOUND, ISO, 4, 1)) as bench:
        bench.handle.refusals = [usb1.USBErrorIO()]
        packets = play(bench, b"x", b"y", b"z")
        assert bench.listener.ended == [(SOUND, Status.STALL)]
        assert {one.status for one in packets} <= {Status.CANCELLED, Status.INVALID}
