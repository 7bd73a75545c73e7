from __future__ import annotations

import asyncio
import threading
from typing import cast

import pytest
import usb1
from tests.libusb.fake_libusb import FakeTransfer
from tests.physical.support import BULK, BULK_IN, BULK_OUT, INTERRUPT, LIGHTS, Bench, opened, settle, until

from farplug.physical import transfers
from farplug.physical.transfers import MAX_IDLE, MAX_PIECE, MIN_PIECE
from farplug.usb import Setup, Status, Transfer

READ = Setup(0xC0, 5, 1, 2, 64)
WRITE = Setup(0x40, 6, 3, 4, 5)


# One transfer


async def test_reads_and_writes() -> None:
    async with opened() as bench:
        read = bench.read(512)
        bench.in_flight[0].finish(b"short")
        await settle()
        assert (read.status, bytes(read.reply), read.actual) == (Status.SUCCESS, b"short", 5)
        for data in (b"bytes", bytearray(b"array"), memoryview(b"views"), memoryview(bytearray(b"xwritable"))[1:], b""):
            write = bench.write(data)
            assert bytes(bench.in_flight[0].buffer) == bytes(data)
            bench.in_flight[0].finish(actual=len(data))
            await settle()
            assert (write.status, write.actual) == (Status.SUCCESS, len(data))
        lights = bench.submit(INTERRUPT, LIGHTS, data=b"on")
        assert bench.handle.submissions[-1] == ("interrupt", LIGHTS, 2)
        bench.in_flight[0].finish(actual=1)
        await settle()
        assert (lights.status, lights.actual) == (Status.SUCCESS, 1)


async def test_control_transfers() -> None:
    async with opened() as bench:
        read = bench.control(READ)
        assert bench.in_flight[0].setup == (0xC0, 5, 1, 2)
        bench.in_flight[0].finish(b"answer")
        await settle()
        assert (read.status, bytes(read.reply)) == (Status.SUCCESS, b"answer")
        write = bench.control(WRITE, b"quest")
        assert bench.in_flight[0].setup == (0x40, 6, 3, 4)
        assert bytes(bench.in_flight[0].buffer) == b"quest"
        bench.in_flight[0].finish(actual=5)
        await settle()
        assert (write.status, write.actual) == (Status.SUCCESS, 5)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (usb1.TRANSFER_ERROR, Status.IO_ERROR),
        (usb1.TRANSFER_TIMED_OUT, Status.TIMEOUT),
        (usb1.TRANSFER_CANCELLED, Status.CANCELLED),
        (usb1.TRANSFER_STALL, Status.STALL),
        (usb1.TRANSFER_OVERFLOW, Status.BABBLE),
        (-71, Status.IO_ERROR),
    ],
)
async def test_an_error_comes_with_the_bytes_that_moved(code: int, status: Status) -> None:
    async with opened() as bench:
        read, write, control = bench.read(512), bench.write(b"12345678"), bench.control(READ)
        bench.in_flight[0].finish(b"part", code)
        bench.in_flight[0].finish(status=code, actual=3)
        bench.in_flight[0].finish(b"par", code)
        await settle()
        assert bench.results() == [(status, 4), (status, 3), (status, 3)]
        assert (bytes(read.reply), bytes(control.reply)) == (b"part", b"par")
        assert write.actual == 3
        assert not bench.listener.losses


async def test_the_reported_length_is_bounded_by_the_requested_one() -> None:
    async with opened() as bench:
        bench.read(4)
        bench.in_flight[0].finish(b"four", actual=4000)
        await settle()
        assert bench.results() == [(Status.SUCCESS, 4)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (usb1.USBErrorIO() if hasattr(usb1, "USBErrorIO") else usb1.USBErrorOther(), Status.IO_ERROR),
        (usb1.USBErrorInvalidParam(), Status.INVALID),
        (usb1.USBErrorNotFound(), Status.IO_ERROR),
    ],
)
async def test_refused_by_libusb(error: Exception, status: Status) -> None:
    async with opened() as bench:
        bench.handle.refusals = [error]
        assert bench.read(512).status is status
        assert bench.read(512).status is None, "the next is on its own"


async def test_gone_at_submission() -> None:
    async with opened() as bench:
        bench.fake.unplugged = True
        assert bench.read(512).status is Status.IO_ERROR
        await until(lambda: bench.listener.losses)


async def test_libusbs_transfers_are_used_again_up_to_a_bound() -> None:
    async with opened() as bench:
        for _ in range(10):
            bench.read(MAX_PIECE)
            bench.in_flight[0].finish()
            await settle(1)
        await settle()
        assert len(bench.handle.transfers) == 1
        assert len(bench.handle.transfers[0].buffer) == 0, "an idle one keeps no large buffer"
        for _ in range(2 * MAX_IDLE):
            bench.read(16)
        for usb in list(bench.in_flight):
            usb.finish()
        await settle()
        assert sum(not transfer.closed for transfer in bench.handle.transfers) == MAX_IDLE


# Cancelling


async def test_cancelled_by_the_guest() -> None:
    async with opened() as bench:
        read = bench.read(512)
        bench.device.cancel(read)
        assert read.status is None, "it is in flight"
        await settle()
        assert read.status is Status.CANCELLED
        bench.device.cancel(read)
        assert len(bench.done) == 1


async def test_done_before_the_cancel_arrives() -> None:
    async with opened() as bench:
        read = bench.read(512)
        bench.in_flight[0].finish(b"data")
        bench.device.cancel(read)
        await settle()
        assert (read.status, read.actual) == (Status.SUCCESS, 4)


async def test_completed_long_after_the_cancel() -> None:
    async with opened() as bench:
        bench.handle.keeps_cancelled = True
        read = bench.read(512)
        bench.device.cancel(read)
        bench.device.cancel(read)
        await settle()
        assert not bench.done
        bench.in_flight[0].finish(b"late", usb1.TRANSFER_CANCELLED)
        await settle()
        assert bench.results() == [(Status.CANCELLED, 4)]
        assert bytes(read.reply) == b"late"


async def test_a_control_transfer_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "CONTROL_TIMEOUT", 0.01)
    async with opened() as bench:
        transfer = bench.control(READ)
        await until(lambda: transfer.status)
        assert transfer.status is Status.TIMEOUT
        bench.handle.refusals = [usb1.USBErrorNoMem()] * 1000
        transfer = bench.control(READ)
        await until(lambda: transfer.status)
        assert transfer.status is Status.TIMEOUT
        bench.handle.refusals = []


# Long transfers


def answer_whole(usb: FakeTransfer) -> None:
    usb.finish(b"x" * len(usb.buffer) if usb.endpoint & 0x80 else b"", actual=len(usb.buffer))


async def test_a_long_transfer_moves_in_pieces() -> None:
    async with opened() as bench:
        bench.handle.rule = answer_whole
        read = bench.read(2 * MAX_PIECE + 512)
        write = bench.write(bytes(MAX_PIECE + 1))
        await until(lambda: len(bench.done) == 2)
        assert (read.status, bytes(read.reply)) == (Status.SUCCESS, b"x" * (2 * MAX_PIECE + 512))
        assert (write.status, write.actual) == (Status.SUCCESS, MAX_PIECE + 1)
        sizes = [size for _, endpoint, size in bench.handle.submissions if endpoint == BULK_IN]
        assert sizes == [MAX_PIECE, MAX_PIECE, 512]


@pytest.mark.parametrize(
    ("code", "status"), [(usb1.TRANSFER_COMPLETED, Status.SUCCESS), (usb1.TRANSFER_STALL, Status.STALL)]
)
async def test_a_long_transfer_ends_at_a_short_piece(code: int, status: Status) -> None:
    async with opened() as bench:
        bench.read(2 * MAX_PIECE)
        bench.in_flight[0].finish(b"x" * MAX_PIECE)
        await settle()
        bench.in_flight[0].finish(b"yz", code)
        await settle()
        assert bench.results() == [(status, MAX_PIECE + 2)]
        assert not bench.in_flight


async def test_nothing_overtakes_a_long_transfer() -> None:
    async with opened() as bench:
        order: list[Transfer] = []
        first = bench.read(2 * MAX_PIECE)
        second, third, fourth = bench.read(8), bench.read(3 * MAX_PIECE), bench.read(16)
        other = bench.write(b"elsewhere")
        assert [len(usb.buffer) for usb in bench.in_flight] == [MAX_PIECE, 9]
        for turn in range(10):
            for usb in [usb for usb in bench.in_flight if usb.endpoint == BULK_IN]:
                usb.finish(b"x" * len(usb.buffer))
            await settle()
            if turn == 0:
                order.append(bench.read(24))  # submitted while others wait
        assert bench.done == [first, second, third, fourth, *order]
        assert other.status is None
        sizes = [size for _, endpoint, size in bench.handle.submissions if endpoint == BULK_IN]
        assert sizes == [MAX_PIECE, MAX_PIECE, 8, MAX_PIECE, MAX_PIECE, MAX_PIECE, 16, 24]


async def test_a_long_transfer_is_cancelled_between_two_pieces() -> None:
    async with opened() as bench:
        read, waiting, last = bench.read(2 * MAX_PIECE), bench.read(8), bench.read(16)
        bench.device.cancel(waiting)
        assert waiting.status is Status.CANCELLED, "nothing of it is at the device"
        bench.in_flight[0].finish(b"x" * MAX_PIECE)
        bench.device.cancel(read)
        await settle()
        assert (read.status, read.actual) == (Status.CANCELLED, MAX_PIECE)
        assert last.status is None
        assert [len(usb.buffer) for usb in bench.in_flight] == [16]


async def test_a_completion_that_cancels_the_next_transfers() -> None:
    async with opened() as bench:
        behind: list[Transfer] = []

        def answered(transfer: Transfer) -> None:
            for one in behind:
                bench.device.cancel(one)

        bench.device.submit(Transfer(BULK, BULK_IN, answered, length=2 * MAX_PIECE))
        behind += [bench.read(8), bench.read(3 * MAX_PIECE), bench.read(8)]
        bench.in_flight[0].finish(status=usb1.TRANSFER_STALL)
        await settle()
        assert bench.results() == [(Status.CANCELLED, 0)] * 3
        assert not bench.in_flight
        bench.read(8)
        assert len(bench.in_flight) == 1, "the endpoint is not blocked"


async def test_everything_behind_a_long_transfer_is_refused() -> None:
    async with opened() as bench:
        bench.read(2 * MAX_PIECE)
        for length in (8, 2 * MAX_PIECE, 16, 3 * MAX_PIECE):
            bench.read(length)
        bench.handle.refusals = [usb1.USBErrorOther()] * 4
        bench.in_flight[0].finish(status=usb1.TRANSFER_STALL)
        await settle()
        assert bench.results() == [(Status.STALL, 0), *[(Status.IO_ERROR, 0)] * 4]
        bench.read(8)
        assert len(bench.in_flight) == 1


# Memory


async def test_no_transfer_overtakes_a_long_one_after_memory_was_short() -> None:
    async with opened() as bench:
        for length in (2 * MAX_PIECE, 4 * MIN_PIECE, 3 * MAX_PIECE, 8):
            bench.read(length)
        bench.handle.rule = answer_whole
        bench.handle.refusals = [None, usb1.USBErrorNoMem()]
        bench.in_flight[0].finish(b"x" * MAX_PIECE)
        await until(lambda: len(bench.done) == 4)
        sizes = [size for _, _, size in bench.handle.submissions]
        assert sizes == [MAX_PIECE, MAX_PIECE, 4 * MIN_PIECE, MAX_PIECE, MAX_PIECE, MAX_PIECE, 8]


async def test_with_little_memory_the_pieces_are_smaller() -> None:
    async with opened() as bench:
        bench.handle.rule = answer_whole
        bench.handle.refusals = [usb1.USBErrorNoMem(), usb1.USBErrorNoMem()]
        read = bench.read(MAX_PIECE)
        await until(lambda: read.status is not None)
        assert (read.status, read.actual) == (Status.SUCCESS, MAX_PIECE)
        assert [size for _, _, size in bench.handle.submissions] == [MAX_PIECE // 4] * 4


async def test_without_memory_a_transfer_waits_and_keeps_its_place() -> None:
    async with opened() as bench:
        no = usb1.USBErrorNoMem()
        bench.handle.refusals = [no] * 3
        waiting, behind = bench.write(bytes(MIN_PIECE)), bench.write(b"behind")
        assert not bench.in_flight
        elsewhere = bench.read(8)
        await until(lambda: bench.in_flight)
        await until(lambda: len(bench.in_flight) == 3)
        assert {usb.endpoint for usb in bench.in_flight} == {BULK_IN, BULK_OUT}
        sizes = [size for _, endpoint, size in bench.handle.submissions if endpoint == BULK_OUT]
        assert sizes == [MIN_PIECE, 6]
        for usb in list(bench.in_flight):
            usb.finish(actual=len(usb.buffer))
        await settle()
        assert {waiting.status, behind.status, elsewhere.status} == {Status.SUCCESS}


async def test_libusb_cannot_allocate_a_transfer() -> None:
    async with opened() as bench:
        bench.handle.no_more_transfers = True
        bench.read(8)
        await settle()
        assert not bench.done
        bench.handle.no_more_transfers = False
        await until(lambda: bench.in_flight)


async def test_a_completed_transfer_frees_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MEMORY_PAUSE", 1000)
    async with opened() as bench:
        bench.read(8)
        bench.handle.refusals = [usb1.USBErrorNoMem()]
        waiting, cancelled = bench.write(b"data"), bench.read(8)
        bench.in_flight[0].finish(b"x")
        await until(lambda: any(usb.endpoint == BULK_OUT for usb in bench.in_flight))
        bench.handle.refusals = [usb1.USBErrorNoMem()]
        bench.device.cancel(cancelled)
        control = bench.control(READ)
        bench.device.cancel(control)
        assert control.status is Status.CANCELLED, "it waited for memory"
        assert waiting.status is None


async def test_transfers_without_memory_that_a_completion_cancels() -> None:
    async with opened() as bench:
        others: list[Transfer] = []
        bench.handle.refusals = [usb1.USBErrorNoMem()] * 2 + [usb1.USBErrorOther()]

        def answered(transfer: Transfer) -> None:
            for other in others:
                bench.device.cancel(other)

        bench.device.submit(Transfer(BULK, BULK_IN, answered, length=8))
        others.append(bench.write(b"x"))
        await until(lambda: others[0].status is not None)
        assert others[0].status is Status.CANCELLED


async def test_closed_while_some_wait() -> None:
    async with opened() as bench:
        bench.read(2 * MAX_PIECE)
        bench.read(8)
        bench.handle.refusals = [usb1.USBErrorNoMem()] * 10
        bench.write(b"x")
        bench.control(READ)
    assert bench.results() == [(Status.CANCELLED, 0)] * 4


async def many(bench: Bench) -> None:
    for _ in range(50):
        bench.read(512)
        bench.write(bytes(512))
    await asyncio.sleep(0)


async def test_a_storm_of_cancels() -> None:
    async with opened() as bench:
        bench.handle.keeps_cancelled = True
        await many(bench)
        await bench.device.set_interface(0, 0)
        await many(bench)
        for usb in list(bench.in_flight)[::-1]:  # out of order
            usb.finish(status=usb1.TRANSFER_CANCELLED)
        await settle()
        bench.handle.keeps_cancelled = False
    assert len(bench.done) == 200
    assert {transfer.status for transfer in bench.done} == {Status.CANCELLED}


async def test_control_transfers_keep_their_order_in_both_directions() -> None:
    async with opened() as bench:
        answer = threading.Event()
        session = bench.device._session
        assert session is not None
        call = asyncio.ensure_future(session.gate.call(lambda: cast(None, answer.wait(100))))
        await settle()
        for request in (1, 2, 3):
            bench.control(Setup(0xC0 if request == 2 else 0x40, request))
        answer.set()
        await call
        await settle()
        assert [usb.setup[1] for usb in bench.in_flight if usb.setup is not None] == [1, 2, 3]
