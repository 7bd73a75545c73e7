"""USB Attached SCSI, driven through the device as a guest drives it."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterable, Iterator

import pytest
from tests.virtual.attached_scsi import TUR, Initiator, Issued, command_iu, management_iu, response
from tests.virtual.bulk_only import IN, Listener, Pattern, read10, write10

from farplug.scsi.disk import COMMANDS
from farplug.usb import Speed, Status, Transfer, TransferType
from farplug.usb.figures import Figures
from farplug.virtual.iu import TaskFunction
from farplug.virtual.pipe import MAX_RESPONSES
from farplug.virtual.uas import MAX_COMMANDS

KIB = 1024
SPEEDS = [Speed.SUPER, Speed.HIGH]
FLUSH = "35 00 00 00 00 00 00 00 00 00"


@pytest.fixture(autouse=True)
def no_function_raises(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A device catches what its functions raise: here that is a failure."""
    yield
    assert not [one for one in caplog.get_records("call") if one.exc_info]


def block(store: Pattern, lba: int, count: int = 1) -> bytes:
    return store.original[lba * 512 : (lba + count) * 512]


# Commands


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("late", [False, True])
async def test_commands_of_each_kind(speed: Speed, late: bool) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed, attention=True)
    assert initiator.run(TUR, late=late).sense == (6, 0x29, 0)
    assert initiator.run(TUR, late=late).status == 0
    inquiry = initiator.run("12 00 00 00 24 00", receive=36, late=late)
    assert (inquiry.status, inquiry.data[8:16], len(inquiry.data)) == (0, b"farplug ", 36)
    assert initiator.run(write10(3, 2), send=b"\xaa" * 1024, late=late).status == 0
    read = initiator.run(read10(2, 4), receive=2048, late=late)
    assert (read.status, read.data) == (0, block(store, 2) + b"\xaa" * 1024 + block(store, 5))
    assert initiator.run(FLUSH, late=late).status == 0
    assert initiator.device.figures == Figures(read=2048, written=1024, commands=6)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("size", [512, 1024, 1536, 4096, 5119, 5120, 8192])
async def test_data_in_in_any_transfer_sizes(speed: Speed, size: int) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    read = initiator.run(read10(7, 10), receive=5120, sizes=[size])
    assert (read.status, read.data) == (0, block(store, 7, 10))
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("sizes", [[1024], [2048], [3072, 1024], [4096], [1024, 4096], [5120]])
async def test_data_out_in_any_transfer_sizes(speed: Speed, sizes: list[int]) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    data = random.Random(1).randbytes(5120)
    assert initiator.run(write10(7, 10), send=data, sizes=sizes).status == 0
    assert bytes(store.content) == block(store, 0, 7) + data + block(store, 17, 47)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("extra", [1, 512, 5120])
async def test_data_in_without_data(speed: Speed, extra: int) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    read = initiator.run(read10(0, 2), receive=1024 + extra, sizes=[1024, extra])
    assert (read.status, read.data) == (0, block(store, 0, 2))
    assert initiator.run(read10(0, 2), receive=1024 + extra).data == block(store, 0, 2)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_more_data_out_than_the_command_uses(speed: Speed) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    for sizes in ([1024], [2048], [4096]):
        assert initiator.run(write10(3, 2), send=b"\xaa" * 4096, sizes=sizes).status == 0
    assert bytes(store.content) == block(store, 0, 3) + b"\xaa" * 1024 + block(store, 5, 59)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(("sent", "taken"), [(b"\xaa" * 100, 0), (b"\xaa" * 700, 0), (b"\xaa" * 1124, 1024)])
async def test_less_data_out_than_the_command_needs(speed: Speed, sent: bytes, taken: int) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    ended = initiator.run(write10(0, 4), send=sent, sizes=[1024])
    assert ended.sense == (0xB, 0x4B, 0)
    assert bytes(store.content) == b"\xaa" * taken + store.original[taken:]
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_a_random_cdb_of_every_command_leaves_it_working(speed: Speed) -> None:
    store = Pattern(unmaps=True)
    initiator = await Initiator.plug_in(store, speed=speed)
    for row in COMMANDS:
        cdb = bytes((row.opcode, row.service_action or 0)).ljust(row.length, b"\0")
        initiator.start(cdb, receive=64 * KIB)
        assert initiator.manage(TaskFunction.I_T_NEXUS_RESET) == 0
        await initiator.enumerate()
        initiator.clear_unit_attentions()
        assert initiator.run(read10(1, 1), receive=512).status == 0
    await initiator.leave()


# Order of completions


async def test_data_in_that_fails_ends_before_the_command() -> None:
    """Otherwise Linux cancels it, and QEMU then drops the transfers of all other commands."""
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    for cdb in (read10(64, 1), bytes.fromhex("ff 00 00 00 00 00"), bytes.fromhex("12 01 01 00 ff 00")):
        initiator.completed.clear()
        initiator.submitted.clear()
        status, first, second = initiator.read_status(1), initiator.data_in(1, 512), initiator.data_in(1, 512)
        initiator.issue(command_iu(cdb, 1))
        assert initiator.completed[1:] == [first, second, status]
        assert [one.status for one in (first, second)] == [Status.SUCCESS] * 2
        assert [one.actual for one in (first, second)] == [0, 0]


async def test_data_out_that_fails_is_taken_before_the_command_ends() -> None:
    store = Pattern(read_only=True)
    initiator = await Initiator.plug_in(store)
    status, data = initiator.read_status(1), initiator.data_out(1, bytes(512))
    initiator.issue(command_iu(write10(0, 1), 1))
    assert initiator.completed[-2:] == [data, status]
    assert (data.status, data.actual) == (Status.SUCCESS, 512)


# Tasks


@pytest.mark.parametrize("speed", SPEEDS)
async def test_tasks_are_managed(speed: Speed) -> None:
    initiator = await Initiator.plug_in(Pattern(), speed=speed)
    for function, code in (
        (TaskFunction.ABORT_TASK, 0),
        (TaskFunction.ABORT_TASK_SET, 0),
        (TaskFunction.CLEAR_TASK_SET, 0),
        (TaskFunction.QUERY_TASK, 0),
        (TaskFunction.QUERY_TASK_SET, 0),
        (TaskFunction.CLEAR_ACA, 4),
        (0x33, 4),
    ):
        assert initiator.manage(function, 7) == code
        assert initiator.run(TUR).status == 0
    for function in (TaskFunction.LOGICAL_UNIT_RESET, TaskFunction.I_T_NEXUS_RESET):
        assert initiator.manage(function) == 0
        assert initiator.run(TUR).sense == (6, 0x29, 0)
        assert initiator.run(TUR).status == 0
    await initiator.leave()


def test_the_initiator_builds_ius_as_in_the_standard() -> None:
    assert command_iu(b"\x28", 0x0102, lun=3).hex() == "0100010200000000" + "0003000000000000" + "28" + "00" * 15
    assert command_iu(bytes(range(20)), 1).hex()[12:16] == "0400"
    assert management_iu(1, 2, 3).hex() == "05000002010000030000000000000000"
    assert response(5, 8).hex() == "0400000500000008"


# Commands in parallel


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("seed", range(3))
async def test_32_commands_whose_store_completes_late_and_in_any_order(speed: Speed, seed: int) -> None:
    source = random.Random(seed)
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    data = [source.randbytes(1024) for _ in range(16)]
    commands = [
        initiator.start(write10(2 * number, 2), send=data[number // 2])
        if number % 2
        else initiator.start(read10(2 * number, 2), receive=1024)
        for number in range(32)
    ]
    assert len(store.held) == (32 if initiator.streams else 2)  # without streams one moves data in each direction
    assert not any(one.iu for one in commands)
    while store.held:
        source.shuffle(store.held)
        store.release(1)
        initiator.pump()
    for number, one in enumerate(commands):
        assert one.status == 0
        if number % 2:
            assert bytes(store.content[number * 1024 :][:1024]) == data[number // 2]
        else:
            assert one.data == block(store, 2 * number, 2)
    await initiator.leave()


async def test_a_command_without_data_transfers_does_not_delay_others() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    starved = initiator.start(write10(0, 2))
    assert initiator.run(write10(2, 1), send=b"\xaa" * 512).status == 0
    assert initiator.run(read10(2, 1), receive=512).data == b"\xaa" * 512
    starved.parts.append(initiator.data_out(starved.tag, b"\xbb" * 1024))
    initiator.pump()
    assert starved.status == 0
    assert bytes(store.content[:1536]) == b"\xbb" * 1024 + b"\xaa" * 512
    await initiator.leave()


async def test_without_streams_a_command_without_data_transfers_delays_those_of_its_direction() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=Speed.HIGH)
    starved = initiator.start(write10(0, 2))
    waits = initiator.start(write10(2, 1), send=b"\xaa" * 512)
    assert initiator.run(read10(2, 1), receive=512).status == 0
    assert initiator.run(FLUSH).status == 0
    assert not waits.parts
    assert initiator.manage(TaskFunction.ABORT_TASK, starved.tag) == 0
    initiator.forget(starved)
    assert waits.status == 0
    assert store.content == block(store, 0, 2) + b"\xaa" * 512 + block(store, 3, 61)
    await initiator.leave()


@pytest.mark.parametrize("order", ["status data command", "command data status", "data command status"])
async def test_transfers_may_come_in_any_order(order: str) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    for tag in (1, 32):
        made: dict[str, Transfer] = {}
        for what in order.split():
            if what == "status":
                made[what] = initiator.read_status(tag)
            elif what == "data":
                made[what] = initiator.data_in(tag, 512)
            else:
                initiator.issue(command_iu(read10(tag, 1), tag))
        assert bytes(made["data"].reply) == block(store, tag)
        assert made["status"].reply[:4] == bytes((3, 0, 0, tag))
    await initiator.leave()


@pytest.mark.parametrize("order", ["status data command", "command data status", "command status data"])
async def test_data_out_may_come_in_any_order(order: str) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    for what in order.split():
        if what == "status":
            status = initiator.read_status(1)
        elif what == "data":
            data = initiator.data_out(1, b"\xaa" * 512)
        else:
            initiator.issue(command_iu(write10(3, 1), 1))
    assert (data.status, data.actual, status.reply[6]) == (Status.SUCCESS, 512, 0)
    assert bytes(store.content[1536:2048]) == b"\xaa" * 512
    await initiator.leave()


async def test_data_for_a_command_that_has_ended_ends_at_once() -> None:
    """The sense IU waits for a transfer, so the tag is still in use."""
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    initiator.issue(command_iu(read10(64, 1), 1))
    assert (initiator.data_in(1, 512).status, initiator.data_out(1, bytes(512)).actual) == (Status.SUCCESS, 512)
    assert initiator.read_status(1).reply[6] == 2
    await initiator.leave()


# Errors


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(
    ("error", "reading", "writing"),
    [(errno.EIO, (3, 0x11, 0), (3, 0x0C, 0)), (errno.ENOSPC, (3, 0x11, 0), (7, 0x27, 7))],
)
async def test_errors_of_the_store(speed: Speed, error: int, reading: object, writing: object) -> None:
    store = Pattern(unmaps=True)
    initiator = await Initiator.plug_in(store, speed=speed)
    store.error = OSError(error, "broken")
    for sizes in ([2048], [1024]):
        read = initiator.run(read10(0, 4), receive=2048, sizes=sizes)
        assert (read.sense, read.data) == (reading, b"")
        assert initiator.run(write10(0, 4), send=bytes(2048), sizes=sizes).sense == writing
    assert initiator.run("2f 02 00 00 00 01 00 00 01 00", send=bytes(512)).sense == (3, 0x11, 0)
    assert initiator.run(FLUSH).sense == writing
    assert initiator.run("93 01 00 00 00 00 00 00 00 00 00 00 00 01 00 00").sense == writing
    store.error = None
    assert initiator.run("2f 02 00 00 00 01 00 00 01 00", send=bytes(512)).sense == (0xE, 0x1D, 0)
    assert (
        initiator.run("03 00 00 00 12 00", receive=18).data[2] == 0
    )  # the sense data was sent with the status, and is not kept
    assert initiator.run(read10(0, 4), receive=2048).data == block(store, 0, 4)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_a_write_that_fails_takes_all_of_its_data_before_it_ends(speed: Speed) -> None:
    """Later data would be written by the next command."""
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    broken = initiator.start(write10(0, 4))
    store.error = OSError(errno.ENOSPC, "full")
    first = initiator.data_out(broken.tag, b"\xaa" * 1024)
    store.error = None
    initiator.pump()
    assert (first.status, first.actual, broken.iu) == (Status.SUCCESS, 1024, b"")
    other = initiator.start(write10(8, 1), send=b"\xbb" * 512)
    second = initiator.data_out(broken.tag, b"\xcc" * 1024)
    initiator.pump()
    assert (second.status, second.actual, broken.sense) == (Status.SUCCESS, 1024, (7, 0x27, 7))
    assert other.status == 0
    assert store.content == block(store, 0, 8) + b"\xbb" * 512 + block(store, 9, 55)
    assert initiator.completed.index(second) < len(initiator.completed) - 1
    await initiator.leave()


async def test_data_in_ends_in_the_order_of_its_transfers() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    store.holding = True
    status, parts = initiator.read_status(1), [initiator.data_in(1, 1024) for _ in range(3)]
    initiator.issue(command_iu(read10(0, 6), 1))
    store.release(1)
    store.error = OSError(errno.EIO, "broken")
    store.release(1)
    assert [one for one in initiator.completed if one in (*parts, status)] == [*parts, status]
    assert [one.actual for one in parts] == [1024, 0, 0]


# Durability


@pytest.mark.parametrize("speed", SPEEDS)
async def test_durable_writes(speed: Speed) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    assert initiator.run(write10(0, 1), send=bytes(512)).status == 0
    assert "flush" not in store.log
    store.holding = True
    durable = initiator.start(write10(0, 1, fua=True), send=bytes(512))
    store.release(1)
    initiator.pump()
    assert (store.log[-1], durable.iu) == ("flush", b"")
    store.release(1)
    initiator.pump()
    assert durable.status == 0
    store.holding = False
    select = bytes.fromhex("00000000 0812 00") + bytes(17)
    assert initiator.run("15 10 00 00 18 00", send=select).status == 0  # no write cache
    store.log.clear()
    for cdb, data in (
        (write10(1, 1), bytes(512)),
        (bytes.fromhex("2e 00 00 00 00 01 00 00 01 00"), bytes(512)),
        (bytes.fromhex("93 01 00 00 00 00 00 00 00 00 00 00 00 01 00 00"), b""),
    ):
        assert initiator.run(cdb, send=data).status == 0
        assert store.log.pop() == "flush"
    await initiator.leave()


# Tags, logical units, information units


@pytest.mark.parametrize("speed", SPEEDS)
async def test_a_tag_that_is_in_use(speed: Speed) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    for second in (command_iu(TUR, 5), management_iu(TaskFunction.QUERY_TASK, 5, 5)):
        store.holding = True
        initiator.issue(command_iu(read10(0, 1), 5))
        ready = initiator.read_status(5)
        data = initiator.data_in(5, 512)
        initiator.issue(second)
        status = ready if initiator.streams else initiator.read_status(5)
        assert status.reply == response(5, 0x0A)
        assert (data.status, data.actual) == (
            Status.SUCCESS,
            0,
        )  # both commands are gone, with the transfers queued for them
        store.release()
        store.holding = False
        assert initiator.run(read10(1, 1), receive=512).data == block(store, 1)
        again = initiator.start(read10(2, 1), receive=512, tag=5)
        assert again.data == block(store, 2)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(
    "lun",
    ["0000000000000000", "4000000000000000", "0001000000000000", "4001000000000000"],
)
async def test_logical_units_by_every_address(speed: Speed, lun: str) -> None:
    initiator = await Initiator.plug_in(Pattern(), Pattern(32), speed=speed)
    where = bytes.fromhex(lun)
    capacity = initiator.run("25 00 00 00 00 00 00 00 00 00", receive=8, lun=where).data
    assert capacity == struct.pack(">II", 31 if where[1] else 63, 512)
    assert initiator.manage(TaskFunction.QUERY_TASK, 9, lun=where) == 0
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(
    "lun",
    [
        "0002000000000000",
        "00ff000000000000",
        "4002000000000000",
        "4100000000000000",
        "0100000000000000",
        "8000000000000000",
        "c101000000000000",
        "0000000100000000",
        "0000000000000001",
        "ffffffffffffffff",
    ],
)
async def test_logical_units_that_do_not_exist(speed: Speed, lun: str) -> None:
    initiator = await Initiator.plug_in(Pattern(), Pattern(), speed=speed)
    where = bytes.fromhex(lun)
    assert initiator.run(TUR, lun=where).sense == (5, 0x25, 0)
    assert initiator.run("12 00 00 00 24 00", receive=36, lun=where).data[0] == 0x7F
    assert initiator.run(write10(0, 1), send=bytes(512) if initiator.streams else b"", lun=where).sense == (5, 0x25, 0)
    assert initiator.manage(TaskFunction.ABORT_TASK_SET, lun=where) == 9
    assert initiator.manage(TaskFunction.I_T_NEXUS_RESET, lun=where) == 0
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(
    "iu",
    [
        command_iu(TUR, 7)[:31],
        command_iu(TUR, 7)[:4],
        management_iu(1, 7)[:15],
        b"\x03" + command_iu(TUR, 7)[1:],
        b"\xff" * 2 + b"\x00\x07" + bytes(60000),
        b"\x06\0\0\x07",
    ],
)
async def test_invalid_information_units(speed: Speed, iu: bytes) -> None:
    initiator = await Initiator.plug_in(Pattern(), speed=speed)
    status, data = initiator.read_status(7), initiator.data_in(7, 512)
    initiator.issue(iu)
    assert status.reply == response(7, 2)
    assert (data.status, data.actual) == (Status.SUCCESS, 0)
    assert initiator.run(TUR).status == 0
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("iu", [b"", b"\1", b"\1\0\0", command_iu(TUR, 0), management_iu(0x10, 0)])
async def test_information_units_without_a_tag(speed: Speed, iu: bytes) -> None:
    initiator = await Initiator.plug_in(Pattern(), speed=speed)
    initiator.issue(iu)
    if len(iu) > 4 and not initiator.streams:
        assert initiator.read_status().reply == response(0, 2)
    assert initiator.run(TUR).status == 0
    await initiator.leave()


async def test_there_is_no_stream_for_a_larger_tag() -> None:
    initiator = await Initiator.plug_in(Pattern())
    for tag in (33, 0xFFFF):
        initiator.issue(command_iu(TUR, tag))
        assert [initiator.read_status(tag).status, initiator.data_in(tag, 1).status] == [Status.INVALID] * 2
    assert initiator.device.figures == Figures(commands=1)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_command_blocks_of_any_length(speed: Speed) -> None:
    initiator = await Initiator.plug_in(Pattern(), speed=speed)
    assert initiator.run(read10(1, 1) + bytes(10), receive=512).status == 0
    assert initiator.run(b"\x7f" + bytes(31)).sense == (5, 0x20, 0)
    initiator.issue(command_iu(bytes(200), 1)[:40])  # the additional CDB length is too large
    assert initiator.read_status(1).reply[6] == 0
    await initiator.leave()


# Task management in the middle


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(
    "function",
    [
        TaskFunction.ABORT_TASK,
        TaskFunction.ABORT_TASK_SET,
        TaskFunction.CLEAR_TASK_SET,
        TaskFunction.LOGICAL_UNIT_RESET,
        TaskFunction.I_T_NEXUS_RESET,
    ],
)
async def test_commands_are_aborted(speed: Speed, function: TaskFunction) -> None:
    store, other = Pattern(), Pattern()
    initiator = await Initiator.plug_in(store, other, speed=speed)
    store.holding = other.holding = True
    reads = initiator.start(read10(0, 4), receive=2048, sizes=[1024], tag=1)
    writes = initiator.start(write10(8, 4), tag=2)
    first = initiator.data_out(2, b"\xaa" * 1024)
    stays = initiator.start(write10(8, 1), send=b"\xbb" * 512, tag=3, lun=1)
    assert initiator.manage(TaskFunction.QUERY_TASK, 2) == 8
    assert initiator.manage(TaskFunction.QUERY_TASK, 2, lun=1) == 0
    assert initiator.manage(TaskFunction.QUERY_TASK_SET) == 8
    for tag in (1, 2) if function is TaskFunction.ABORT_TASK else (1,):
        assert initiator.manage(function, tag) == 0
    assert [(one.status, one.actual) for one in reads.parts] == [(Status.SUCCESS, 0)] * 2
    assert first not in initiator.completed  # it is being written
    initiator.forget(reads, writes)
    if function is TaskFunction.I_T_NEXUS_RESET:
        initiator.forget(stays)
    store.holding = other.holding = False
    store.release()
    other.release()
    initiator.pump()
    assert (first.status, first.actual) == (Status.SUCCESS, 1024)
    assert function is TaskFunction.I_T_NEXUS_RESET or stays.status == 0
    assert initiator.manage(TaskFunction.QUERY_TASK_SET) == 0
    expected = {TaskFunction.LOGICAL_UNIT_RESET: [6, 0], TaskFunction.I_T_NEXUS_RESET: [6, 6]}.get(function, [0, 0])
    assert [initiator.run(TUR, lun=lun).sense[0] for lun in (0, 1)] == expected
    assert initiator.run(write10(0, 1), send=b"\xcc" * 512).status == 0
    assert store.content == b"\xcc" * 512 + block(store, 1, 7) + b"\xaa" * 1024 + block(store, 10, 54)
    await initiator.leave()


async def test_without_streams_the_turn_of_an_aborted_command_passes_on() -> None:
    """Unused data of the first command must not be written by the next one, which is aborted too."""
    for how in ("reset", "nexus", "set"):
        store = Pattern()
        initiator = await Initiator.plug_in(store, speed=Speed.HIGH)
        store.holding = True
        initiator.start(write10(0, 1), send=b"\xaa" * 1024, sizes=[512])
        initiator.start(write10(8, 1), send=b"\xbb" * 512)
        surplus = [initiator.read_status() for _ in range(4)]
        store.holding = False
        if how == "reset":
            await initiator.enumerate()
            assert all(one.status is Status.CANCELLED for one in surplus)
            initiator.clear_unit_attentions()
        else:
            nexus = how == "nexus"
            function = TaskFunction.I_T_NEXUS_RESET if nexus else TaskFunction.ABORT_TASK_SET
            initiator.issue(management_iu(function, 9))
            assert [bytes(one.reply) for one in initiator.completed[-2:] if one.endpoint & 0x80] == [response(9, 0)]
            await initiator.enumerate()
            initiator.clear_unit_attentions()
        assert store.content == b"\xaa" * 512 + block(store, 1, 63)
        assert initiator.run(write10(2, 1), send=b"\xcc" * 512).status == 0
        assert bytes(store.content[1024:1536]) == b"\xcc" * 512
        store.release()
        await initiator.leave()


async def test_the_unsent_ready_iu_of_an_aborted_command_is_discarded() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=Speed.HIGH)
    initiator.issue(command_iu(write10(0, 1), 1))
    initiator.issue(command_iu(write10(1, 1), 2))
    early = initiator.data_out(0, b"\xaa" * 512)
    assert early.actual == 512  # no READY IU was sent: no command uses it
    initiator.issue(management_iu(TaskFunction.ABORT_TASK, 3, 1))
    ius = {bytes(initiator.read_status().reply) for _ in range(2)}
    assert ius == {response(3, 0), bytes.fromhex("07000002")}
    initiator.data_out(0, b"\xbb" * 512)
    assert initiator.read_status().reply[:4] == bytes.fromhex("03000002")
    assert store.content == block(store, 0) + b"\xbb" * 512 + block(store, 2, 62)
    await initiator.leave()


# Task attributes


@pytest.mark.parametrize("speed", SPEEDS)
async def test_ordered_tasks(speed: Speed) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    before = initiator.start(read10(0, 1), receive=512)
    ordered = initiator.start(write10(0, 1), send=b"\xaa" * 512, attribute=2)
    after = initiator.start(FLUSH)
    dropped = initiator.start(FLUSH, attribute=2)
    head = initiator.start(FLUSH, attribute=1)
    assert store.log == ["read 0 512", "flush"]
    store.release(2)
    initiator.pump()
    assert (before.data, head.status, ordered.iu, after.iu) == (block(store, 0), 0, b"", b"")
    assert store.log == ["read 0 512", "flush", "write 0 512"]
    assert initiator.manage(TaskFunction.ABORT_TASK, dropped.tag) == 0
    initiator.forget(dropped)
    store.release(1)
    initiator.pump()
    assert (ordered.status, after.iu, store.log[3:]) == (0, b"", ["flush"])
    store.release(1)
    initiator.pump()
    assert (ordered.status, after.status) == (0, 0)
    assert initiator.run(TUR).status == 0
    assert len(store.log) == 4
    await initiator.leave()


async def test_commands_that_wait_for_an_ordered_task_are_reset_too() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    store.holding = True
    initiator.start(read10(0, 1), receive=512)
    initiator.start(write10(0, 1), send=b"\xaa" * 512, attribute=2)
    initiator.start(write10(1, 1), send=b"\xaa" * 512)
    await initiator.enumerate()
    store.release()
    initiator.clear_unit_attentions()
    assert store.log == ["read 0 512"]
    await initiator.leave()


# Cancelled transfers


@pytest.mark.parametrize("speed", SPEEDS)
async def test_reads_are_cancelled_and_submitted_again(speed: Speed) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    read = initiator.start(read10(3, 6), receive=3072, sizes=[1024])
    for _ in range(3):
        assert initiator.resubmit(read)
        store.release(1)
    store.holding = False
    store.release()
    initiator.pump()
    assert (read.status, read.data) == (0, block(store, 3, 6))
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("sizes", [[4096], [1024], [3072, 1024]])
async def test_data_out_is_cancelled_and_submitted_again(speed: Speed, sizes: list[int]) -> None:
    """No cancelled data may reach the next command."""
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    write = initiator.start(write10(3, 8), send=b"\xaa" * 4096, sizes=sizes)
    assert initiator.resubmit(write)
    store.release()
    store.holding = False
    initiator.pump()
    assert write.sense == (0xB, 0, 0)
    assert initiator.run(write10(20, 1), send=b"\xbb" * 512).status == 0
    assert bytes(store.content) == block(store, 0, 3) + b"\xaa" * 4096 + block(store, 11, 9) + b"\xbb" * 512 + block(
        store, 21, 43
    )
    await initiator.leave()


async def test_queued_data_out_is_cancelled_with_the_transfers_behind_it() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    first, second, third = (initiator.data_out(1, bytes((number,)) * 1024) for number in (1, 2, 3))
    initiator.device.cancel(second)
    assert [one.status for one in (first, second, third)] == [None, Status.CANCELLED, Status.CANCELLED]
    write = initiator.start(write10(0, 6), tag=1)
    assert first.status is Status.SUCCESS
    initiator.data_out(1, b"\4" * 2048)
    initiator.pump()
    assert write.sense == (0xB, 0, 0)
    assert store.content == store.original
    assert initiator.run(write10(0, 1), send=b"\5" * 512).status == 0
    await initiator.leave()


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_data_out_that_is_cancelled_before_its_command_starts_fails_the_command(which: int) -> None:
    """Also a command that waits for an ORDERED one: what the guest sends next must not take the place of the lost."""
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    store.holding = True
    initiator.start(FLUSH, attribute=2)
    waiting = initiator.start(
        write10(4, 6), send=b"".join(bytes((number,)) * 1024 for number in (1, 2, 3)), sizes=[1024]
    )
    other = initiator.start(write10(20, 2), send=b"\7" * 1024)
    initiator.device.cancel(waiting.parts[which])
    assert [one.status for one in waiting.parts] == [None] * which + [Status.CANCELLED] * (3 - which)
    initiator.data_out(waiting.tag, b"\4" * 1024 * (3 - which))
    store.holding = False
    store.release()
    initiator.pump()
    assert waiting.sense == (0xB, 0, 0)
    assert other.status == 0
    assert bytes(store.content) == block(store, 0, 20) + b"\7" * 1024 + block(store, 22, 42)
    await initiator.leave()


async def test_cancelled_data_out_does_not_fail_a_command_without_data_out() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    initiator.device.cancel(initiator.data_out(1, bytes(512)))
    assert initiator.run(TUR).status == 0
    initiator.device.cancel(initiator.data_out(1, bytes(512)))
    await initiator.enumerate()
    assert initiator.run(write10(0, 1), send=b"\1" * 512).sense != (0xB, 0, 0), "a reset forgets it"
    await initiator.leave()


async def test_data_out_that_waits_for_the_store_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.virtual.uas.MAX_UNWRITTEN", 1023)
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    store.holding = True
    write = initiator.start(write10(0, 8), send=bytes((1,)) * 1024 + bytes((2,)) * 3072, sizes=[1024])
    assert store.log == ["write 0 1024"]
    initiator.device.cancel(write.parts[1])
    assert [one.status for one in write.parts] == [None] + [Status.CANCELLED] * 3
    store.holding = False
    store.release()
    initiator.data_out(write.tag, bytes((3,)) * 3072)
    initiator.pump()
    assert write.sense == (0xB, 0, 0)
    assert store.content == b"\1" * 1024 + block(store, 2, 62)
    await initiator.leave()


async def test_a_status_transfer_is_cancelled() -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=Speed.HIGH)
    first, second = initiator.read_status(), initiator.read_status()
    initiator.device.cancel(first)
    initiator.uas.cancel(first)  # the second time it is ignored
    initiator.issue(command_iu(TUR, 1))
    assert (first.status, second.reply[:4]) == (Status.CANCELLED, b"\3\0\0\1")
    await initiator.leave()


# Bounds


def kept(initiator: Initiator) -> int:
    """Return how much the state machine holds."""
    uas = initiator.uas
    total = len(uas._commands) + len(uas._waiting) + len(uas._writing) + len(uas._to_serve)
    total += sum(1 + len(queue) for queue in uas._status._queued.values())
    total += sum(len(turns) for turns in uas._turns.values())
    return total + sum(1 + len(queue) for pipe in uas._pipes.values() for queue in pipe._waiting.values())


@pytest.mark.parametrize("speed", SPEEDS)
async def test_a_guest_that_never_reads_the_status_pipe(speed: Speed) -> None:
    initiator = await Initiator.plug_in(Pattern(), speed=speed)
    source = random.Random(1)
    functions = [int(one) for one in TaskFunction]
    for number in range(6000):
        tag = 1 + number % 65535
        match number % 4:
            case 0:
                initiator.issue(command_iu(source.choice((TUR, read10(0, 1), write10(0, 1))), tag, lun=number % 3))
            case 1:
                initiator.issue(management_iu(source.choice(functions), tag, source.randrange(40)))
            case 2:
                initiator.issue(b"\x55" * 40)
            case 3:
                initiator.issue(command_iu(read10(0, 1), 1 + number % 32, attribute=number % 5))
        if not number % 500:
            assert kept(initiator) < 3 * (MAX_COMMANDS + MAX_RESPONSES)
    for tag in range(1, 70000, 17):
        initiator.issue(command_iu(TUR, tag & 0xFFFF))
        initiator.issue(management_iu(TaskFunction.ABORT_TASK, 5, tag & 0xFFFF))
    assert kept(initiator) < 3 * (MAX_COMMANDS + MAX_RESPONSES)
    await initiator.enumerate()
    assert kept(initiator) == 0
    initiator.clear_unit_attentions()
    assert initiator.run(read10(0, 1), receive=512).status == 0
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_task_set_full(speed: Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.virtual.uas.MAX_COMMANDS", 3)
    initiator = await Initiator.plug_in(Pattern(), speed=speed)
    for tag in (1, 2, 3):
        initiator.issue(command_iu(read10(0, 1), tag))
    refused = initiator.data_in(4, 512) if initiator.streams else None
    status = initiator.read_status(4) if initiator.streams else None
    initiator.issue(command_iu(read10(0, 1), 4))
    if status is None:
        initiator.read_status()  # the READY of the first
        status = initiator.read_status()
    assert status.reply == bytes.fromhex("0300000400002800000000000000") + bytes(2)
    assert refused is None or (refused.status, refused.actual) == (Status.SUCCESS, 0)
    assert initiator.manage(TaskFunction.ABORT_TASK_SET) == 0
    assert initiator.run(TUR).status == 0
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_cancelled_reads_are_bounded(speed: Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.virtual.uas.MAX_UNREAD", 8192)
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    read = initiator.start(read10(0, 8), receive=4096, tag=1)
    for _ in range(30):
        initiator.resubmit(read)
    assert sum(len(data) for _, _, data in store.held) <= 8192 + 4096
    other = initiator.start(read10(8, 1), receive=512, tag=2)
    store.holding = False
    store.release()
    initiator.pump()
    assert (read.data, other.data) == (block(store, 0, 8), block(store, 8))
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("how", ["abort", "cancel", "reset"])
async def test_unwritten_data_is_bounded(speed: Speed, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.virtual.uas.MAX_UNWRITTEN", 8192)
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    for _ in range(30):
        write = initiator.start(write10(0, 8), send=b"\xaa" * 4096, tag=1)
        if how == "reset":
            await initiator.enumerate()
            initiator.clear_unit_attentions()
            continue
        if how == "cancel":
            for part in write.parts:
                initiator.device.cancel(part)
        assert initiator.manage(TaskFunction.ABORT_TASK, 1) == 0
        initiator.forget(write)
    assert store.log == ["write 0 4096"] * 3
    other = initiator.start(write10(16, 1), send=b"\xbb" * 512)
    assert not other.iu
    store.holding = False
    store.release()
    initiator.pump()
    assert other.status == 0
    assert bytes(store.content[16 * 512 : 17 * 512]) == b"\xbb" * 512
    await initiator.leave()


async def test_jobs_of_aborted_commands_leave_only_their_steps_in_the_store() -> None:
    store = Pattern(4096)
    initiator = await Initiator.plug_in(store)
    store.holding = True
    verify = bytes.fromhex("2f 00 00 00 00 00 00 10 00 00")
    for _ in range(200):
        one = initiator.start(verify)
        assert not one.iu
        assert initiator.manage(TaskFunction.ABORT_TASK, one.tag) == 0
        initiator.forget(one)
    assert len(store.held) == 1
    assert initiator.run(TUR).status == 0
    other = initiator.start(verify)
    assert len(store.held) == 1
    store.holding = False
    store.release()
    initiator.pump()
    assert other.status == 0
    assert len(store.held) == 0
    assert initiator.run(FLUSH).status == 0
    await initiator.leave()


async def test_completions_may_submit() -> None:
    """A guest that submits from inside completions, also task management."""
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    ended: list[Transfer] = []

    def hostile(transfer: Transfer) -> None:
        ended.append(transfer)
        initiator.issue(management_iu(TaskFunction.I_T_NEXUS_RESET, 9))
        initiator.issue(command_iu(read10(0, 1), 1))

    def read(tag: int) -> None:
        initiator.device.submit(Transfer(TransferType.BULK, IN, hostile, length=512, stream_id=tag))

    for _ in range(3):
        read(1)
    initiator.issue(command_iu(read10(64, 1), 1))
    assert len(ended) == 3
    initiator.issue(command_iu(TUR, 8))  # clears the unit attention
    store.holding = True
    for tag in (2, 3):
        read(tag)
        initiator.issue(command_iu(read10(0, 1), tag))
    initiator.issue(management_iu(TaskFunction.ABORT_TASK_SET, 9))
    assert len(ended) == 5
    store.holding = False
    store.release()
    await initiator.enumerate()
    initiator.clear_unit_attentions()
    assert initiator.run(read10(1, 1), receive=512).data == block(store, 1)
    await initiator.device.close()


# Resets


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("how", ["port", "configuration", "alternate", "bot", "close"])
async def test_resets_complete_everything(speed: Speed, how: str) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    store.holding = True
    initiator.start(read10(0, 4), receive=2048, sizes=[1024])
    initiator.start(write10(8, 4), send=b"\xaa" * 2048, sizes=[1024])
    initiator.start(write10(16, 1), send=b"\xbb" * 512)
    initiator.start(FLUSH)
    initiator.read_status(20)
    if initiator.streams:
        initiator.data_in(21, 1)
        initiator.data_out(22, b"\xcc" * 512)
    device = initiator.device
    if how == "port":
        await device.reset()
    elif how == "configuration":
        await device.set_configuration(1)
    elif how == "close":
        store.holding = False
        await device.close()
    else:
        await device.set_interface(0, 0 if how == "bot" else 1)
    assert all(one.status is not None for one in initiator.submitted)
    assert kept(initiator) == 0
    completed = len(initiator.completed)
    store.holding = False
    store.release()
    assert len(initiator.completed) == completed
    if how == "close":
        await device.open(Listener())
    await initiator.enumerate()
    initiator.clear_unit_attentions()
    read = initiator.run(read10(7, 3), receive=1536)
    assert (read.status, read.data) == (0, block(store, 7) + b"\xaa" * 1024)
    await initiator.leave()


# Random commands against a shadow copy


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("seed", range(15))
async def test_random_work_matches_a_shadow(speed: Speed, seed: int) -> None:
    source = random.Random(seed)
    store = Pattern(256)
    initiator = await Initiator.plug_in(store, speed=speed)
    shadow = bytearray(store.original)
    work = Work(initiator, store, shadow, source)
    for _ in range(300):
        fate = source.random()
        if fate < 0.45:
            work.begin()
        elif fate < 0.80:
            source.shuffle(store.held)
            store.release(1)
        elif fate < 0.90:
            work.resubmit()
        elif fate < 0.97:
            work.abort()
        elif fate < 0.98:
            await initiator.enumerate()
            initiator.clear_unit_attentions()
            work.forget(work.running)
        else:
            store.holding = not store.holding
        initiator.pump()
        work.look()
    store.holding = False
    store.release()
    initiator.pump()
    work.look()
    assert not work.running
    assert store.content == shadow
    await initiator.leave()


class Work:
    """Running commands, each on its own blocks."""

    def __init__(self, initiator: Initiator, store: Pattern, shadow: bytearray, source: random.Random) -> None:
        self.initiator = initiator
        self.store = store
        self.shadow = shadow
        self.source = source
        self.running: dict[Issued, tuple[int, bytes]] = {}
        """The block, and the data to write (empty: read)."""
        self.spoilt: set[Issued] = set()

    def begin(self) -> None:
        source = self.source
        lba = source.randrange(250)
        count = source.randrange(1, min(24, 256 - lba) + 1)
        begin, end = lba * 512, (lba + count) * 512
        if len(self.running) > 20 or any(
            begin < where + one_end and where < end
            for one, (where, _) in self.running.items()
            for one_end in (sum(one.receive) or sum(map(len, one.send)),)
        ):
            return
        writes = source.random() < 0.5
        data = source.randbytes(end - begin) if writes else b""
        cdb = write10(lba, count, fua=source.random() < 0.2) if writes else read10(lba, count)
        issued = self.initiator.start(
            cdb,
            receive=0 if writes else end - begin,
            send=data,
            sizes=[1024 * source.randrange(1, 9) for _ in range(4)],
            attribute=source.choice((0, 0, 0, 0, 1, 2)),
            late=source.random() < 0.3,
        )
        self.running[issued] = begin, data

    def resubmit(self) -> None:
        if self.running:
            issued = self.source.choice([*self.running])
            if self.initiator.resubmit(issued) and issued.send:
                self.spoilt.add(issued)

    def abort(self) -> None:
        if not self.running:
            return
        initiator, issued = self.initiator, self.source.choice([*self.running])
        if issued.iu:
            return
        tag = next(one for one in range(1, 33) if one not in initiator.issued)
        assert initiator.manage(TaskFunction.ABORT_TASK, issued.tag, tag=tag) == 0
        if not issued.iu:
            initiator.forget(issued)
            self.forget([issued])

    def forget(self, gone: Iterable[Issued]) -> None:
        """Check that each block of an aborted write is the old block or the new one."""
        for issued in list(gone):
            begin, data = self.running.pop(issued)
            for offset in range(0, len(data), 512):
                here = slice(begin + offset, begin + offset + 512)
                assert bytes(self.store.content[here]) in (bytes(self.shadow[here]), data[offset : offset + 512])
                self.shadow[here] = self.store.content[here]

    def look(self) -> None:
        """At what has ended."""
        for issued in [one for one in self.running if one.iu]:
            begin, data = self.running[issued]
            if issued in self.spoilt and issued.status == 2:
                assert issued.sense == (0xB, 0, 0)
                self.forget([issued])
                continue
            del self.running[issued]
            assert issued.status == 0
            if data:
                self.shadow[begin : begin + len(data)] = data
                assert self.store.content[begin : begin + len(data)] == data
            else:
                size = sum(issued.receive)
                assert issued.data == self.shadow[begin : begin + size]
