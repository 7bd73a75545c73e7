from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeLibrary
from tests.physical.support import (
    BULK,
    BULK_IN,
    BULK_OUT,
    CAMERA,
    CONTROL,
    EVERYTHING,
    INTERRUPT,
    ISO,
    KEYS,
    LIGHTS,
    OTHER,
    SOUND,
    STREAMING,
    on_bench,
    opened,
    settle,
    until,
)

from farplug.errors import DeviceError, Reason, StateError
from farplug.physical import device, device_session, find_device, open_device, transfers
from farplug.usb import Reception, Setup, Speed, Status, TransferType
from farplug.usb.descriptors import ConfigurationDescriptor

CLEAR_HALT = Setup(0x02, 1, 0, BULK_IN)
INQUIRE = Setup(0xC0, 5, 0, 0, 4)


# Identity


def test_identity() -> None:
    device = on_bench(FakeDevice(EVERYTHING, OTHER, speed=usb1.SPEED_SUPER_PLUS)).device
    assert str(device) == "1234:5678 Thing (1-2)"
    identity = device.identity
    assert (identity.speed, identity.device_version, identity.device_class) == (Speed.SUPER_PLUS, 0x0102, 0xEF)
    assert device.configuration == 0
    assert [interface.number for interface in device.interfaces] == [0, 2]
    assert not device.warnings


async def test_a_device_without_configurations_can_be_opened() -> None:
    async with opened(FakeDevice()) as bench:
        assert bench.device.configuration == 0
        assert bench.device.interfaces == ()
        transfer = bench.read(8)
        assert transfer.status is Status.INVALID


def test_the_device_at_an_address() -> None:
    one, two = FakeDevice(OTHER, place=(1, 2)), FakeDevice(EVERYTHING, ids=(1, 2), place=(1, 3))
    library = FakeLibrary(one, two)
    found = find_device(1, 3, library=library, serial_number="7")
    assert (found.identity.vendor_id, found.identity.serial_number) == (1, "7")
    assert library.contexts[0].closed
    with pytest.raises(DeviceError, match="there is no USB device 4-4") as caught:
        find_device(4, 4, library=library)
    assert caught.value.reason is Reason.DEVICE_LOST


def test_a_device_that_libusb_does_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_device, "NODES", tmp_path)
    (tmp_path / "004").mkdir()
    (tmp_path / "004" / "017").touch()
    with pytest.raises(DeviceError, match="libusb cannot read the descriptors of the USB device 4-17") as caught:
        find_device(4, 17, library=FakeLibrary())
    assert caught.value.reason is Reason.DEVICE_FAULT


# Opening and closing


async def test_opens_and_closes_again_and_again() -> None:
    bench = on_bench(FakeDevice(EVERYTHING, drivers={0: "storage"}))
    threads = threading.active_count()
    for _ in range(20):
        await bench.device.open(bench.listener)
        assert bench.device.configuration == 1
        assert bench.handle.claimed == {0, 2}
        with pytest.raises(StateError, match="is already open"):
            await bench.device.open(bench.listener)
        bench.read(512)
        await bench.device.close()
        assert bench.fake.drivers == {0: "storage"}
    await bench.device.close()
    assert len(bench.library.contexts) == 20
    assert all(context.closed for context in bench.library.contexts)
    assert all(handle.closed and not handle.claimed for handle in bench.fake.handles)
    assert [transfer.status for transfer in bench.done] == [Status.CANCELLED] * 20
    await until(lambda: threading.active_count() <= threads)  # one of an earlier test may have ended meanwhile


async def test_another_device_at_the_same_address_is_not_opened() -> None:
    bench = on_bench(FakeDevice(EVERYTHING))
    bench.fake.ids = (9, 9)
    with pytest.raises(DeviceError, match="is no longer plugged in") as caught:
        await bench.device.open(bench.listener)
    assert caught.value.reason is Reason.DEVICE_LOST
    assert bench.library.contexts[0].closed
    assert not bench.fake.handles


async def test_a_device_that_hangs_is_released_when_it_responds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CLOSE_TIMEOUT", 0.05)
    bench = on_bench(FakeDevice(EVERYTHING))
    await bench.device.open(bench.listener)
    answer = bench.fake.hang["reset"] = threading.Event()
    with pytest.raises(DeviceError, match="released when it does") as caught:
        await bench.device.close()
    assert caught.value.reason is Reason.TIMED_OUT
    monkeypatch.setattr(device, "OPEN_TIMEOUT", 0.05)
    with pytest.raises(DeviceError, match="does not respond"):
        await bench.device.open(bench.listener)
    assert len(bench.fake.handles) == 1, "it was opened before it was released"
    answer.set()
    del bench.fake.hang["reset"]
    monkeypatch.setattr(device, "OPEN_TIMEOUT", 10)
    await bench.device.open(bench.listener)
    assert bench.fake.handles[0].closed
    await bench.device.close()


async def test_a_device_that_hangs_while_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "OPEN_TIMEOUT", 0.05)
    bench = on_bench(FakeDevice(EVERYTHING, drivers={0: "storage"}))
    answer = bench.fake.hang["reset"] = threading.Event()
    with pytest.raises(DeviceError, match="does not respond"):
        await bench.device.open(bench.listener)
    await bench.device.close()
    answer.set()
    await until(lambda: bench.fake.calls[-1] == "close")
    assert bench.fake.drivers == {0: "storage"}


async def test_cancelled_while_it_is_opened_or_closed() -> None:
    bench = on_bench(FakeDevice(EVERYTHING, drivers={0: "storage"}))
    answer = bench.fake.hang["claim"] = threading.Event()
    opening = asyncio.create_task(bench.device.open(bench.listener))
    await asyncio.to_thread(bench.fake.hanging.wait, 10)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    answer.set()
    await until(lambda: bench.fake.calls[-1] == "close")
    assert bench.fake.drivers == {0: "storage"}
    bench.fake.hang.clear()
    bench.fake.hanging.clear()

    await bench.device.open(bench.listener)
    answer = bench.fake.hang["release"] = threading.Event()
    closing = asyncio.create_task(bench.device.close())
    await asyncio.to_thread(bench.fake.hanging.wait, 10)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    answer.set()
    await until(lambda: bench.fake.calls[-1] == "close")
    assert bench.fake.drivers == {0: "storage"}


async def test_unplugged_in_the_middle() -> None:
    async with opened() as bench:
        reads = [bench.read(512), bench.read(4 * transfers.MAX_PIECE)]
        await bench.device.set_interface(2, 1)
        assert bench.device.start_receiving(Reception(KEYS, INTERRUPT)) is Status.SUCCESS
        assert bench.device.start_receiving(Reception(SOUND, ISO, 4, 2)) is Status.SUCCESS
        sound = bench.submit(ISO, SOUND, data=b"la")
        bench.fake.unplug()
        await until(lambda: bench.listener.losses)
        assert bench.listener.losses == [None]
        assert [transfer.status for transfer in reads] == [Status.IO_ERROR] * 2
        assert sound.status is not None
        assert bench.read(1).status is Status.IO_ERROR
        assert bench.control(INQUIRE).status is Status.IO_ERROR
        assert await bench.device.reset() is Status.IO_ERROR
        assert await bench.device.set_configuration(3) is Status.IO_ERROR
        assert await bench.device.set_interface(2, 0) is Status.IO_ERROR
        assert await bench.device.allocate_streams([BULK_IN], 2) is Status.IO_ERROR
        assert await bench.device.free_streams([BULK_IN]) is Status.IO_ERROR
        assert bench.device.start_receiving(Reception(KEYS, INTERRUPT)) is Status.STALL
        assert bench.device.stop_receiving(KEYS) is Status.SUCCESS
        bench.device.cancel(reads[0])
        await settle()
        assert bench.listener.losses == [None]


async def test_unplugged_while_nothing_is_in_flight() -> None:
    async with opened() as bench:
        bench.fake.unplug()
        await until(lambda: bench.listener.losses)
        assert bench.listener.losses == [None]


@pytest.mark.parametrize("operation", ["reset", "set_configuration", "set_interface", "clear_halt"])
async def test_unplugged_is_noticed_by_every_operation(operation: str) -> None:
    async with opened() as bench:
        bench.fake.failures[operation] = usb1.USBErrorNoDevice()
        status = {
            "reset": lambda: bench.device.reset(),
            "set_configuration": lambda: bench.device.set_configuration(3),
            "set_interface": lambda: bench.device.set_interface(2, 1),
        }
        if operation in status:
            assert await status[operation]() is Status.IO_ERROR
        else:
            transfer = bench.control(CLEAR_HALT)
            await until(lambda: transfer.status)
            assert transfer.status is Status.IO_ERROR
        await until(lambda: bench.listener.losses)
        bench.fake.failures.clear()


# Configurations and settings


async def test_reset() -> None:
    async with opened() as bench:
        read = bench.read(512)
        bench.device.start_receiving(Reception(KEYS, INTERRUPT))
        bench.fake.calls.clear()
        assert await bench.device.reset() is Status.SUCCESS
        assert bench.fake.calls == ["reset"]
        assert read.status is Status.CANCELLED
        assert bench.device.start_receiving(Reception(KEYS, INTERRUPT)) is Status.SUCCESS
        assert bench.listener.ended == []


@pytest.mark.parametrize(("error", "lost"), [(usb1.USBErrorNotFound(), [None]), (usb1.USBErrorOther(), [])])
async def test_a_reset_that_fails(error: Exception, lost: list[None]) -> None:
    async with opened() as bench:
        bench.fake.failures["reset"] = error
        assert await bench.device.reset() is Status.IO_ERROR
        await settle()
        assert bench.listener.losses == lost
        bench.fake.failures.clear()


async def test_configurations() -> None:
    bench = on_bench(FakeDevice(EVERYTHING, OTHER, drivers={0: "storage"}))
    bench.fake.bound_by_kernel[3] = {1: "vendor"}
    await bench.device.open(bench.listener)
    read = bench.read(512)
    assert await bench.device.set_configuration(9) is Status.STALL
    assert await bench.device.set_configuration(3) is Status.SUCCESS
    assert read.status is Status.CANCELLED
    assert bench.device.configuration == 3
    assert [interface.number for interface in bench.device.interfaces] == [1]
    assert bench.handle.claimed == {1}
    assert bench.read(64).status is Status.INVALID
    assert bench.read(64, 0x88).status is None
    assert await bench.device.set_configuration(0) is Status.SUCCESS
    assert bench.fake.calls[-1] == "set_configuration -1"
    assert bench.device.configuration == 0
    assert [interface.number for interface in bench.device.interfaces] == [0, 2]
    assert await bench.device.set_interface(0, 0) is Status.INVALID
    assert bench.read(512).status is Status.INVALID
    await bench.device.close()
    assert bench.fake.configuration == 1
    assert bench.fake.drivers == {0: "storage"}


async def test_the_current_configuration_again_selects_alternate_setting_0() -> None:
    async with opened() as bench:
        assert await bench.device.set_interface(2, 1) is Status.SUCCESS
        bench.fake.calls.clear()
        assert await bench.device.set_configuration(1) is Status.SUCCESS
        assert await bench.device.set_configuration(1) is Status.SUCCESS
        assert bench.fake.calls == ["set_interface 2 0"]
        assert [interface.alternate for interface in bench.device.interfaces] == [0, 0]


async def test_a_configuration_that_cannot_be_set() -> None:
    async with opened() as bench:
        bench.fake.failures["set_configuration"] = usb1.USBErrorBusy()
        assert await bench.device.set_configuration(3) is Status.IO_ERROR
        assert bench.device.configuration == 1
        assert bench.handle.claimed == {0, 2}


async def test_settings() -> None:
    async with opened() as bench:
        read = bench.read(512)
        assert await bench.device.set_interface(1, 0) is Status.INVALID
        assert await bench.device.set_interface(2, 7) is Status.STALL
        assert await bench.device.set_interface(2, 1) is Status.SUCCESS
        assert read.status is None, "another interface is not disturbed"
        assert [interface.alternate for interface in bench.device.interfaces] == [0, 1]
        assert bench.device.start_receiving(Reception(CAMERA, ISO, 2, 2)) is Status.SUCCESS
        assert await bench.device.set_interface(0, 0) is Status.SUCCESS
        await settle()
        assert read.status is Status.CANCELLED
        assert [transfer.endpoint for transfer in bench.in_flight] == [CAMERA] * 2
        assert await bench.device.set_interface(2, 0) is Status.SUCCESS
        assert not bench.in_flight
        assert bench.device.start_receiving(Reception(CAMERA, ISO, 2, 2)) is Status.STALL


async def test_an_operation_whose_caller_was_cancelled() -> None:
    async with opened() as bench:
        answer = bench.fake.hang["set_interface"] = threading.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await bench.device.set_interface(2, 1)
        answer.set()
        await until(lambda: bench.device.interfaces[1].alternate == 1)


@pytest.mark.parametrize(
    "reception",
    [
        Reception(LIGHTS, INTERRUPT),
        Reception(BULK_OUT, BULK, bytes_per_transfer=512),
        Reception(BULK_IN, BULK, bytes_per_transfer=512, stream_id=1),
        Reception(BULK_IN, BULK, bytes_per_transfer=transfers.MAX_PIECE + 512),
    ],
)
async def test_invalid_receptions(reception: Reception) -> None:
    async with opened() as bench:
        assert bench.device.start_receiving(reception) is Status.STALL
        assert not bench.handle.transfers


async def test_receptions_start_again_after_a_setting_that_is_refused() -> None:
    """The guest regards them as ended, as the protocol says."""
    async with opened() as bench:
        for choice in (bench.device.set_configuration(9), bench.device.set_interface(0, 9)):
            assert bench.device.start_receiving(Reception(KEYS, INTERRUPT)) is Status.SUCCESS
            read = bench.read(512)
            assert await choice is Status.STALL
            assert bench.device.start_receiving(Reception(KEYS, INTERRUPT)) is Status.SUCCESS
            await settle()
            assert read.status is Status.CANCELLED
            bench.device.stop_receiving(KEYS)


async def test_a_configuration_whose_driver_cannot_be_unbound() -> None:
    async with opened() as bench:
        bench.fake.bound_by_kernel[3] = {1: "vendor"}
        bench.fake.failures = {"detach 1": usb1.USBErrorAccess()}
        assert await bench.device.set_configuration(3) is Status.IO_ERROR
        assert bench.device.configuration == 3
        bench.fake.failures = {}


async def test_a_configuration_that_its_descriptors_do_not_have() -> None:
    fake = FakeDevice(EVERYTHING)
    fake.configuration = 5
    async with opened(fake) as bench:
        assert bench.device.configuration == 5
        assert await bench.device.set_interface(0, 0) is Status.STALL


# Invalid transfers


@pytest.mark.parametrize(
    ("type", "endpoint", "setup", "stream_id", "status"),
    [
        (BULK, 0x8F, None, 0, Status.INVALID),
        (INTERRUPT, BULK_IN, None, 0, Status.INVALID),
        (BULK, BULK_IN, None, 1, Status.INVALID),
        (ISO, SOUND, None, 0, Status.INVALID),
        (CONTROL, 0x80, None, 0, Status.INVALID),
        (CONTROL, 0x00, INQUIRE, 0, Status.INVALID),
        (CONTROL, 0x81, INQUIRE, 0, Status.INVALID),
        (CONTROL, 0x00, Setup(0x00, 5, 9), 0, Status.STALL),
        (CONTROL, 0x00, Setup(0x00, 9, 1), 0, Status.STALL),
        (CONTROL, 0x00, Setup(0x01, 11, 0, 2), 0, Status.STALL),
    ],
)
async def test_what_a_device_cannot_do_is_refused(
    type: TransferType, endpoint: int, setup: Setup | None, stream_id: int, status: Status
) -> None:
    async with opened() as bench:
        assert bench.submit(type, endpoint, length=1, setup=setup, stream_id=stream_id).status is status
        assert not bench.in_flight


async def test_an_iso_packet_without_a_reception_is_refused() -> None:
    async with opened() as bench:
        await bench.device.set_interface(2, 1)
        assert bench.submit(ISO, SOUND, data=b"x").status is Status.INVALID


async def test_a_closed_device_completes_transfers_too() -> None:
    bench = on_bench(FakeDevice(EVERYTHING))
    transfer = bench.read(1)
    assert transfer.status is Status.IO_ERROR
    bench.device.cancel(transfer)
    assert bench.device.stop_receiving(KEYS) is Status.SUCCESS


# Halts


async def test_a_halt_is_cleared_through_libusb() -> None:
    async with opened() as bench:
        transfer = bench.control(CLEAR_HALT)
        await until(lambda: transfer.status is not None)
        assert transfer.status is Status.SUCCESS
        assert bench.fake.calls[-1] == f"clear_halt {BULK_IN}"
        assert not bench.handle.submissions
        bench.control(Setup(0x02, 1, 0, 0x80))  # not an endpoint of an interface: as any other request
        assert bench.handle.submissions == [("control", 0, 0)]


async def test_a_halt_that_cannot_be_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened() as bench:
        bench.fake.failures["clear_halt"] = usb1.USBErrorNotFound()
        transfer = bench.control(CLEAR_HALT)
        await until(lambda: transfer.status is not None)
        assert transfer.status is Status.STALL
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        transfer = bench.control(CLEAR_HALT)
        bench.device.cancel(transfer)
        assert transfer.status is Status.CANCELLED
        monkeypatch.setattr(device_session, "CONTROL_TIMEOUT", 0.01)
        transfer = bench.control(CLEAR_HALT)
        await until(lambda: transfer.status is not None)
        assert transfer.status is Status.TIMEOUT
        answer.set()


async def test_closed_while_a_halt_is_cleared() -> None:
    async with opened() as bench:
        answer = bench.fake.hang["clear_halt"] = threading.Event()
        transfer = bench.control(CLEAR_HALT)
        closing = asyncio.create_task(bench.device.close())
        await until(lambda: transfer.status is not None)
        assert transfer.status is Status.CANCELLED
        answer.set()
        await closing


# BulkStreams


async def test_bulk_streams() -> None:
    async with opened(FakeDevice(STREAMING, speed=usb1.SPEED_SUPER)) as bench:
        device, streams = bench.device, bench.library.fake_streams
        assert await device.allocate_streams([BULK_IN, BULK_OUT], 16) is Status.SUCCESS
        assert streams.allocated == {BULK_IN: 16, BULK_OUT: 16}
        bench.submit(BULK, BULK_IN, length=512, stream_id=16)
        assert bench.in_flight[0].stream_id == 16
        assert bench.submit(BULK, BULK_IN, length=512, stream_id=17).status is Status.INVALID
        assert await device.free_streams([BULK_IN, BULK_OUT]) is Status.SUCCESS
        assert await device.free_streams([BULK_IN, BULK_OUT]) is Status.IO_ERROR
        streams.limit = 8
        assert await device.allocate_streams([BULK_IN, BULK_OUT], 16) is Status.IO_ERROR
        assert not streams.allocated, "fewer are freed"
        for endpoints, count in (([], 2), ([BULK_IN], 0), ([BULK_IN], 17), ([0x8E], 2)):
            assert await device.allocate_streams(endpoints, count) is Status.INVALID
        assert await device.free_streams([0x8E]) is Status.INVALID


# Without descriptors that can be polled


async def test_where_libusb_has_no_descriptors_a_thread_waits() -> None:
    library = FakeLibrary(fake := FakeDevice(EVERYTHING))
    library.polls_nothing = True
    async with opened(fake, library=library) as bench:
        read = bench.read(4)
        bench.in_flight[0].finish(b"data")
        await until(lambda: read.status is not None)
        assert bytes(read.reply) == b"data"
        bench.read(4)
        bench.read(4)
    assert bench.results() == [(Status.SUCCESS, 4), (Status.CANCELLED, 0), (Status.CANCELLED, 0)]


async def test_the_valid_part_of_broken_descriptors_is_used() -> None:
    broken = replace(EVERYTHING.interfaces[0], extra=b"broken")
    double = replace(EVERYTHING.interfaces[2], number=0, alternate=0)
    far = replace(EVERYTHING.interfaces[1], number=200)
    fake = FakeDevice(ConfigurationDescriptor(1, (broken, double, far)), OTHER, OTHER)
    bench = on_bench(fake)
    assert "interface 0 setting 0 occurs twice: the second was skipped" in bench.device.warnings
    await bench.device.open(bench.listener)
    assert bench.handle.claimed == {0}, "libusb claims nothing beyond 31"
    assert bench.read(512).status is None
    await bench.device.close()
