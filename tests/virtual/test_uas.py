"""USB Attached SCSI, driven through the device as a guest drives it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from tests.virtual.attached_scsi import TUR, Initiator, command_iu, management_iu, response
from tests.virtual.bulk_only import Pattern, read10, write10

from farplug.scsi.disk import COMMANDS
from farplug.usb import Speed, Status
from farplug.virtual.iu import TaskFunction

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
    assert initiator.device.figures == {"commands": 6, "read": 2048, "written": 1024}
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("size", [512, 1024, 1536, 4096, 5119, 5120, 8192])
async def test_data_in_split_anyhow(speed: Speed, size: int) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    read = initiator.run(read10(7, 10), receive=5120, sizes=[size])
    assert (read.status, read.data) == (0, block(store, 7, 10))
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("sizes", [[1024], [2048], [3072, 1024], [4096], [1024, 4096], [5120]])
async def test_data_out_split_anyhow(speed: Speed, sizes: list[int]) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    data = random.Random(1).randbytes(5120)
    assert initiator.run(write10(7, 10), send=data, sizes=sizes).status == 0
    assert bytes(store.content) == block(store, 0, 7) + data + block(store, 17, 47)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("extra", [1, 512, 5120])
async def test_data_in_that_does_not_come(speed: Speed, extra: int) -> None:
    store = Pattern()
    initiator = await Initiator.plug_in(store, speed=speed)
    read = initiator.run(read10(0, 2), receive=1024 + extra, sizes=[1024, extra])
    assert (read.status, read.data) == (0, block(store, 0, 2))
    assert initiator.run(read10(0, 2), receive=1024 + extra).data == block(store, 0, 2)
    await initiator.leave()


@pytest.mark.parametrize("speed", SPEEDS)
async def test_more_data_out_than_the_command_takes(speed: Speed) -> None:
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
        initiator.attend()
        assert initiator.run(read10(1, 1), receive=512).status == 0
    await initiator.leave()


# The order in which things end


async def test_data_in_that_fails_ends_before_the_command() -> None:
    """Else Linux takes it back, and QEMU then drops the transfers of all other commands."""
    store = Pattern()
    initiator = await Initiator.plug_in(store)
    for cdb in (read10(64, 1), bytes.fromhex("ff 00 00 00 00 00"), bytes.fromhex("12 01 01 00 ff 00")):
        initiator.completed.clear()
        initiator.submitted.clear()
        status, first, second = initiator.ask(1), initiator.data_in(1, 512), initiator.data_in(1, 512)
        initiator.issue(command_iu(cdb, 1))
        assert initiator.completed[1:] == [first, second, status]
        assert [one.status for one in (first, second)] == [Status.SUCCESS] * 2
        assert [one.actual for one in (first, second)] == [0, 0]


async def test_data_out_that_fails_is_taken_before_the_command_ends() -> None:
    store = Pattern(read_only=True)
    initiator = await Initiator.plug_in(store)
    status, data = initiator.ask(1), initiator.data_out(1, bytes(512))
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


def test_initiator_builds_what_the_standard_shows() -> None:
    assert command_iu(b"\x28", 0x0102, lun=3).hex() == "0100010200000000" + "0003000000000000" + "28" + "00" * 15
    assert command_iu(bytes(range(20)), 1).hex()[12:16] == "0400"
    assert management_iu(1, 2, 3).hex() == "05000002010000030000000000000000"
    assert response(5, 8).hex() == "0400000500000008"
