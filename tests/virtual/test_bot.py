"""The Bulk-Only transport, driven through the device as a guest drives it."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import Callable

import pytest
from tests.virtual.bulk_only import IN, OUT, Guest, Pattern, make, read10, settle, write10

from farplug.errors import DeviceError
from farplug.store.base import ZERO_STEP, WriteDone
from farplug.testing.memory import MemoryGuest
from farplug.usb import Buffer, Speed, Status, Transfer, TransferType
from farplug.usb.figures import Figures
from farplug.virtual.bot import MAX_QUEUED, MAX_UNREAD, MAX_UNWRITTEN
from farplug.virtual.disk import disk_device

TUR = "00 00 00 00 00 00"
INQUIRY = "12 00 00 00 24 00"
FLUSH = "35 00 00 00 00 00 00 00 00 00"
KIB = 1024


async def guest(store: Pattern | None = None) -> Guest:
    return await Guest.plug(make(store or Pattern()))


def block(store: Pattern, lba: int, count: int = 1) -> bytes:
    return store.original[lba * 512 : (lba + count) * 512]


# The thirteen cases: H is the host's length, D the command's.


@pytest.mark.parametrize("cdb", [TUR, FLUSH, "12 00 00 00 00 00", "28 00 00 00 00 05 00 00 00 00"])
async def test_case_1_nothing_moves(cdb: str) -> None:
    result = (await guest()).command(cdb)
    assert (result.status, result.residue) == (0, 0)


@pytest.mark.parametrize("cdb", [read10(0, 1), write10(0, 1), bytes.fromhex(INQUIRY)])
async def test_cases_2_and_3_the_host_expects_nothing(cdb: bytes) -> None:
    store = Pattern()
    result = (await guest(store)).command(cdb)
    assert (result.status, result.residue) == (2, 0)
    assert store.log == []


@pytest.mark.parametrize(
    ("cdb", "status"), [(TUR, 0), (FLUSH, 0), ("ff", 1), ("12 01 01 00 24 00", 1), (read10(63, 2).hex(), 1)]
)
@pytest.mark.parametrize("host", [1, 36, 512, 64 * KIB, 64 * KIB + 1, 2**32 - 1])
async def test_case_4_data_in_without_data(cdb: str, status: int, host: int) -> None:
    initiator = await guest()
    result = initiator.command(cdb, receive=host, sizes=[1 << 20])
    assert (result.status, result.residue) == (status, host)
    assert result.data == (bytes(host) if host <= 64 * KIB else b"")


@pytest.mark.parametrize("host", [513, 1024, 64 * KIB])
@pytest.mark.parametrize("sizes", [[], [512], [100], [1]])
async def test_case_5_padded(host: int, sizes: list[int]) -> None:
    store = Pattern()
    result = (await guest(store)).command(read10(5, 1), receive=host, sizes=sizes)
    assert (result.status, result.residue) == (0, host - 512)
    assert result.data == block(store, 5) + bytes(host - 512)


@pytest.mark.parametrize("sizes", [[128 * KIB], [20 * KIB], [4 * KIB], [5000]])
async def test_case_5_too_much_to_pad(sizes: list[int]) -> None:
    """4 KiB transfers: the data ends with a transfer, the next one is empty and ends the phase."""
    store = Pattern()
    result = (await guest(store)).command(read10(0, 40), receive=128 * KIB, sizes=sizes)
    assert (result.status, result.residue) == (0, 108 * KIB)
    assert result.data == block(store, 0, 40)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("size", [1, 3, 13, 31, 64, 511, 512, 513, 1024, 4096, 5119, 5120])
async def test_case_6_in_any_transfer_sizes(size: int, early: bool) -> None:
    store = Pattern()
    result = (await guest(store)).command(read10(7, 10), receive=5120, sizes=[size], early=early)
    assert (result.status, result.residue, result.data) == (0, 0, block(store, 7, 10))


@pytest.mark.parametrize(("cdb", "data"), [(read10(3, 2), 600), (bytes.fromhex(INQUIRY), 20)])
async def test_case_7_the_host_expects_less(cdb: bytes, data: int) -> None:
    result = (await guest()).command(cdb, receive=data)
    assert (result.status, result.residue, len(result.data)) == (2, 0, data)


@pytest.mark.parametrize("host", [512, 128 * KIB])
async def test_case_8_the_host_expects_data_in(host: int) -> None:
    store = Pattern()
    result = (await guest(store)).command(write10(0, 1), receive=host)
    assert (result.status, result.data) == (2, b"")
    assert store.log == []


@pytest.mark.parametrize(("cdb", "status"), [(TUR, 0), (FLUSH, 0), ("ff", 1), (write10(64, 1).hex(), 1)])
@pytest.mark.parametrize("sizes", [[], [512], [300]])
async def test_case_9_data_out_that_the_command_does_not_use(cdb: str, status: int, sizes: list[int]) -> None:
    store = Pattern()
    result = (await guest(store)).command(cdb, send=bytes(1024), sizes=sizes)
    assert (result.status, result.residue) == (status, 1024)
    assert bytes(store.content) == store.original


@pytest.mark.parametrize("cdb", [read10(0, 1), bytes.fromhex(INQUIRY)])
async def test_case_10_the_host_sends_instead(cdb: bytes) -> None:
    store = Pattern()
    result = (await guest(store)).command(cdb, send=bytes(1024))
    assert result.status == 2
    assert store.log == []


@pytest.mark.parametrize("sizes", [[], [512], [700], [1]])
async def test_case_11_the_host_sends_more(sizes: list[int]) -> None:
    store = Pattern()
    result = (await guest(store)).command(write10(3, 1), send=b"\xaa" * 1024, sizes=sizes)
    assert (result.status, result.residue) == (0, 512)
    assert bytes(store.content) == block(store, 0, 3) + b"\xaa" * 512 + block(store, 4, 60)


@pytest.mark.parametrize("size", [1, 3, 13, 31, 64, 511, 512, 513, 1024, 4096, 5119, 5120])
async def test_case_12_in_any_transfer_sizes(size: int) -> None:
    store = Pattern()
    data = random.Random(size).randbytes(5120)
    result = (await guest(store)).command(write10(7, 10), send=data, sizes=[size])
    assert (result.status, result.residue) == (0, 0)
    assert bytes(store.content) == block(store, 0, 7) + data + block(store, 17, 47)
    assert all(int(entry.split()[2]) % 512 == 0 for entry in store.log)


async def test_case_13_the_host_sends_less() -> None:
    store = Pattern()
    result = (await guest(store)).command(write10(0, 4), send=b"\xaa" * 1024)
    assert (result.status, result.residue) == (2, 0)
    assert store.log == []


# Invalid CBWs


@pytest.mark.parametrize(
    "wrapper",
    [b"", b"U", b"USBC" + bytes(26), b"USBC" + bytes(28), b"USBS" + bytes(27), bytes(31), bytes(512), bytes(70000)],
)
async def test_invalid_cbw_halts_until_reset_recovery(wrapper: bytes) -> None:
    store = Pattern()
    initiator = await guest(store)
    early = initiator.receive(13)
    assert initiator.send(wrapper).status is Status.SUCCESS
    assert early.status is Status.STALL
    for _ in range(2):
        for endpoint in (IN, OUT):  # the halt returns until the reset
            assert initiator.control(struct.pack("<BBHHH", 2, 1, 0, endpoint, 0)).status is Status.SUCCESS
            status = initiator.control(struct.pack("<BBHHH", 0x82, 0, 0, endpoint, 2))
            assert bytes(status.reply) == b"\1\0"
    assert initiator.receive(13).status is Status.STALL
    assert initiator.send(initiator.cbw(bytes(6), 0, False)).status is Status.STALL
    assert initiator.control(bytes.fromhex("21ff000000000000")).status is Status.SUCCESS
    assert initiator.receive(13).status is Status.STALL  # the reset itself clears no halt
    for endpoint in (IN, OUT):
        assert initiator.control(struct.pack("<BBHHH", 2, 1, 0, endpoint, 0)).status is Status.SUCCESS
    assert initiator.command(TUR).status == 0


async def test_invalid_cbw_then_port_reset() -> None:
    initiator = await guest()
    initiator.send(b"nonsense")
    await initiator.enumerate()
    assert initiator.command(TUR).status == 1
    assert initiator.sense() == (6, 0x29, 0)


@pytest.mark.parametrize("lun", [1, 15])
async def test_absent_units(lun: int) -> None:
    initiator = await guest()
    assert initiator.command(TUR, lun=lun).status == 1
    assert initiator.command("03 00 00 00 12 00", receive=18, lun=lun).sense == (5, 0x25, 0)
    assert initiator.command(INQUIRY, receive=36, lun=lun).data[0] == 0x7F


@pytest.mark.parametrize(
    ("cdb", "length", "status"),
    [
        (TUR, 12, 0),
        (TUR, 16, 0),
        (TUR, 6, 0),
        (TUR, 31, 0),
        (TUR, 5, 1),
        (TUR, 0, 1),
        (FLUSH, 12, 0),
        (FLUSH, 9, 1),
    ],
)
async def test_command_block_lengths(cdb: str, length: int, status: int) -> None:
    initiator = await guest()
    assert initiator.command(cdb, cdb_length=length).status == status
    if status:
        assert initiator.sense() == (5, 0x24, 0)


# Class requests


@pytest.mark.parametrize(
    ("setup", "status", "reply"),
    [
        ("a1fe000000000100", Status.SUCCESS, b"\0"),
        ("a1fe010000000100", Status.STALL, b""),
        ("a1fe000001000100", Status.STALL, b""),
        ("a1fe000000000200", Status.STALL, b""),
        ("21fe000000000000", Status.STALL, b""),
        ("21ff000000000000", Status.SUCCESS, b""),
        ("21ff010000000000", Status.STALL, b""),
        ("a1ff000000000000", Status.STALL, b""),
    ],
)
async def test_class_requests(setup: str, status: Status, reply: bytes) -> None:
    transfer = (await guest()).control(bytes.fromhex(setup))
    assert (transfer.status, bytes(transfer.reply)) == (status, reply)


async def test_bulk_only_reset_in_the_middle() -> None:
    store = Pattern()
    initiator = await guest(store)
    initiator.send(initiator.cbw(write10(0, 4), 2048, False))
    initiator.send(bytes(700))
    assert initiator.control(bytes.fromhex("21ff000000000000")).status is Status.SUCCESS
    assert initiator.command(INQUIRY, receive=36).status == 0
    assert store.log == ["write 0 512"]  # a block is written whole or not at all


async def test_bulk_only_reset_drops_queued_data() -> None:
    store = Pattern(16384)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 16384), 8 << 20, False))
    sent = [initiator.send(b"\xaa" * (4 << 20)), initiator.send(b"\xbb" * (4 << 20))]
    assert sent[1].status is None
    assert initiator.control(bytes.fromhex("21ff000000000000")).status is Status.SUCCESS
    assert [str(one.status) for one in sent] == ["success", "success"]
    store.release()
    store.holding = False
    assert initiator.command(TUR).status == 0
    assert store.content[4 << 20 :] == store.original[4 << 20 :]


async def test_bulk_only_reset_keeps_queued_reads() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(read10(0, 1), 512, True))
    reading = initiator.receive(512)
    initiator.control(bytes.fromhex("21ff000000000000"))
    store.release()
    assert reading.status is None
    initiator.send(initiator.cbw(bytes(6), 0, False))
    assert initiator.csw(reading) == (0, 0)


async def test_an_old_read_does_not_complete_a_transfer_of_a_new_command() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(read10(0, 1), 512, True))
    reading = initiator.receive(512)
    initiator.control(bytes.fromhex("21ff000000000000"))
    initiator.send(initiator.cbw(read10(5, 1), 512, True))
    store.release(1)
    assert reading.status is None
    store.release(1)
    assert bytes(reading.reply) == block(store, 5)
    assert initiator.csw(initiator.receive(13)) == (0, 0)


# Order and time


async def test_status_waits_for_the_write() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 2), 1024, False))
    assert initiator.send(bytes(512)).status is Status.SUCCESS
    assert initiator.send(bytes(512)).status is Status.SUCCESS
    status = initiator.receive(13)
    store.release(1)
    assert status.status is None
    store.release(1)
    assert initiator.csw(status) == (0, 0)


async def test_fua_flushes_after_the_writes() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 1, fua=True), 512, False))
    initiator.send(bytes(512))
    status = initiator.receive(13)
    assert store.log == ["write 0 512"]
    store.release(1)
    assert store.log == ["write 0 512", "flush"]
    assert status.status is None
    store.release(1)
    assert initiator.csw(status) == (0, 0)


async def test_the_status_waits_for_a_flush() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex(FLUSH), 0, False))
    status = initiator.receive(13)
    assert status.status is None
    store.release()
    assert initiator.csw(status) == (0, 0)


async def test_the_next_command_may_be_queued() -> None:
    store = Pattern()
    initiator = await guest(store)
    initiator.send(initiator.cbw(read10(1, 1), 512, True))
    second = initiator.send(initiator.cbw(read10(2, 1), 512, True))
    assert second.status is None
    first = [initiator.receive(512), initiator.receive(13)]
    assert bytes(first[0].reply) == block(store, 1)
    assert second.status is Status.SUCCESS
    assert bytes(initiator.receive(512).reply) == block(store, 2)
    assert initiator.csw(initiator.receive(13)) == (0, 0)


async def test_unwritten_data_is_bounded() -> None:
    store = Pattern(32768)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 32768), 16 << 20, False))
    sent = [initiator.send(bytes(1 << 20)) for _ in range(16)]
    assert sum(one.status is Status.SUCCESS for one in sent) == MAX_UNWRITTEN >> 20
    while store.held:
        store.release(1)
    assert all(one.status is Status.SUCCESS for one in sent)
    assert initiator.csw(initiator.receive(13)) == (0, 0)


async def test_data_waits_for_the_data_of_a_dropped_command() -> None:
    store = Pattern(32768)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 32768), 16 << 20, False))
    for _ in range(MAX_UNWRITTEN >> 20):
        initiator.send(bytes(1 << 20))
    await initiator.enumerate()
    initiator.command(TUR)
    initiator.send(initiator.cbw(write10(0, 1), 512, False))
    waiting = initiator.send(block(store, 5))
    assert waiting.status is None
    store.release()
    assert waiting.status is Status.SUCCESS
    store.release()
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    assert store.content[:512] == block(store, 5)


async def test_one_large_transfer_is_accepted_whole() -> None:
    initiator = await guest(Pattern(32768))
    assert initiator.command(write10(0, 32768), send=bytes(16 << 20)).status == 0


async def test_queued_data_is_bounded() -> None:
    initiator = await guest()
    initiator.send(initiator.cbw(read10(0, 1), 512, True))
    sent = [initiator.send(bytes(8 << 20)) for _ in range(6)]
    assert [one.status for one in sent] == [None] * (MAX_QUEUED // (8 << 20)) + [Status.IO_ERROR] * 2


async def test_data_is_never_written_in_the_place_of_refused_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.virtual.bot.MAX_UNWRITTEN", 512)
    monkeypatch.setattr("farplug.virtual.bot.MAX_QUEUED", 1024)
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 5), 5 * 512, False))
    sent = [initiator.send(bytes((number,)) * 512) for number in range(1, 5)]
    assert [one.status for one in sent] == [Status.SUCCESS, None, None, Status.IO_ERROR]
    store.holding = False
    store.release()
    assert [initiator.send(bytes((5,)) * 512).status for _ in range(2)] == [Status.SUCCESS] * 2
    assert initiator.csw(initiator.receive(13))[0] == 1
    assert store.content == b"".join(bytes((number,)) * 512 for number in range(1, 4)) + store.original[3 * 512 :]


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_cancelled_data_behind_a_queued_command_fails_that_command(which: int) -> None:
    """Later data must not land in its place. Only the newest transfer can be sent again: it has nothing behind it."""
    store = Pattern()
    initiator = await guest(store)
    initiator.send(initiator.cbw(bytes(6), 0, False))  # its CSW is not read yet
    initiator.send(initiator.cbw(write10(4, 3), 3 * 512, False))
    sent = [initiator.send(bytes((number,)) * 512) for number in (1, 2, 3)]
    initiator.device.cancel(sent[which])
    again = initiator.send(b"\4" * 512)
    assert [one.status for one in sent] == [Status.CANCELLED if one == which else None for one in range(3)]
    initiator.tag -= 1
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    initiator.tag += 1
    assert again.status is Status.SUCCESS
    lost = which < 2
    assert initiator.csw(initiator.receive(13))[0] == lost
    written = [bytes((number,)) * 512 for number in range(1, 4)]
    if not lost:
        written[2] = b"\4" * 512
    written[which if lost else 3 :] = []
    assert store.content == block(store, 0, 4) + b"".join(written) + store.original[(4 + len(written)) * 512 :]
    if lost:
        assert initiator.sense() == (0xB, 0, 0)
    assert initiator.command(write10(20, 1), send=b"\5" * 512).status == 0


async def test_data_that_is_cancelled_as_a_whole_is_sent_again() -> None:
    """As QEMU does: it cancels what it has submitted, in any order, and submits it again from the first on."""
    store = Pattern()
    initiator = await guest(store)
    initiator.send(initiator.cbw(bytes(6), 0, False))
    initiator.send(initiator.cbw(write10(4, 3), 3 * 512, False))
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        sent = [initiator.send(bytes(512)) for _ in range(3)]
        for number in order:
            initiator.device.cancel(sent[number])
    for number in (1, 2, 3):
        initiator.send(bytes((number,)) * 512)
    initiator.receive(13)
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    assert store.content[4 * 512 : 7 * 512] == b"".join(bytes((number,)) * 512 for number in (1, 2, 3))


async def test_cancelled_data_no_longer_counts() -> None:
    initiator = await guest()
    initiator.send(initiator.cbw(read10(0, 1), 512, True))
    for _ in range(3):
        sent = [initiator.send(bytes(8 << 20)) for _ in range(4)]
        for transfer in sent:
            assert transfer.status is None
            initiator.device.cancel(transfer)
        assert [one.status for one in sent] == [Status.CANCELLED] * 4


async def test_hostile_lengths_allocate_nothing() -> None:
    initiator = await guest()
    initiator.send(initiator.cbw(read10(0, 1), 2**32 - 1, True))
    transfer = initiator.receive(2**32 - 1)
    assert (transfer.status, transfer.actual) == (Status.SUCCESS, 512)
    assert initiator.csw(initiator.receive(13)) == (0, 2**32 - 1 - 512)


@pytest.mark.parametrize("length", [0, 1, 12])
async def test_a_status_that_does_not_fit_is_kept(length: int) -> None:
    initiator = await guest()
    initiator.send(initiator.cbw(bytes(6), 0, False))
    short = initiator.receive(length)
    assert short.status is (Status.BABBLE if length else Status.SUCCESS)
    assert initiator.csw(initiator.receive(13)) == (0, 0)


async def test_empty_transfers_change_nothing() -> None:
    store = Pattern()
    initiator = await guest(store)
    initiator.send(initiator.cbw(read10(0, 1), 512, True))
    assert initiator.receive(0).status is Status.SUCCESS
    assert bytes(initiator.receive(512).reply) == block(store, 0)
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    initiator.send(initiator.cbw(write10(0, 1), 512, False))
    assert initiator.send(b"").status is Status.SUCCESS
    assert initiator.send(bytes(512)).status is Status.SUCCESS
    assert initiator.csw(initiator.receive(13)) == (0, 0)


# Errors of the store


@pytest.mark.parametrize(("host", "moved"), [(1024, 1024), (128 * KIB, 0)])
async def test_read_errors(host: int, moved: int) -> None:
    store = Pattern()
    initiator = await guest(store)
    store.error = OSError(errno.EIO, "broken")
    result = initiator.command(read10(0, 2), receive=host)
    assert (result.status, result.residue, result.data) == (1, host, bytes(moved))
    assert initiator.sense() == (3, 0x11, 0)


async def test_read_error_in_the_middle() -> None:
    store = Pattern()
    initiator = await guest(store)
    initiator.send(initiator.cbw(read10(0, 3), 1536, True))
    assert bytes(initiator.receive(512).reply) == block(store, 0)
    store.error = OSError(errno.EIO, "broken")
    assert [bytes(initiator.receive(512).reply) for _ in range(2)] == [bytes(512)] * 2
    assert initiator.csw(initiator.receive(13)) == (1, 1024)
    assert store.log == ["read 0 512", "read 512 512"]


@pytest.mark.parametrize("cdb", [write10(0, 2), write10(0, 2, fua=True)])
@pytest.mark.parametrize("sizes", [[], [512], [300]])
async def test_write_errors(cdb: bytes, sizes: list[int]) -> None:
    store = Pattern()
    initiator = await guest(store)
    for number, sense in ((errno.EIO, (3, 0x0C, 0)), (errno.ENOSPC, (7, 0x27, 7)), (errno.EDQUOT, (7, 0x27, 7))):
        store.error = OSError(number, "broken")
        result = initiator.command(cdb, send=bytes(1024), sizes=sizes)
        assert (result.status, result.residue) == (1, 1024)
        assert initiator.sense() == sense
    store.error = None
    assert initiator.command(cdb, send=bytes(1024)).status == 0


async def test_write_error_while_others_succeed() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 2), 1024, False))
    initiator.send(bytes(512))
    initiator.send(bytes(512))
    store.error = OSError(errno.EIO, "broken")
    store.release(1)
    store.error = None
    store.release(1)
    assert initiator.csw(initiator.receive(13)) == (1, 1024)


@pytest.mark.parametrize("cdb", [FLUSH, "1b 00 00 00 00 00"])
async def test_flush_errors(cdb: str) -> None:
    store = Pattern()
    initiator = await guest(store)
    store.error = OSError(errno.EIO, "broken")
    assert initiator.command(cdb).status == 1
    assert initiator.sense() == (3, 0x0C, 0)


async def test_fua_flush_error() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 1, fua=True), 512, False))
    initiator.send(bytes(512))
    status = initiator.receive(13)
    store.release(1)
    store.error = OSError(errno.EIO, "broken")
    store.release(1)
    assert initiator.csw(status) == (1, 512)


@pytest.mark.parametrize("lost", [FLUSH, "93 09 00 00 00 00 00 00 00 00 00 00 00 08 00 00"])
async def test_a_deferred_error_is_reported_by_the_next_flush(lost: str) -> None:
    store = Pattern(unmaps=True)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex(lost), 0, False))
    await initiator.enumerate()
    store.error = OSError(errno.EIO, "broken")
    store.release()
    store.error, store.holding = None, False
    assert initiator.sense() == (6, 0x29, 0)
    assert initiator.command(FLUSH).status == 1
    assert initiator.sense() == (3, 0x0C, 0)
    assert initiator.command(FLUSH).status == 0


async def test_a_failed_verify_is_not_a_deferred_error() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex("2f 00 00 00 00 01 00 00 01 00"), 0, False))
    await initiator.enumerate()
    store.error = OSError(errno.EIO, "broken")
    store.held = [(None, done, b"") for _, done, _ in store.held]
    store.release()
    store.error, store.holding = None, False
    assert initiator.sense() == (6, 0x29, 0)
    assert initiator.command(FLUSH).status == 0


# Cancels and resets


async def test_a_cancelled_read_can_be_submitted_again() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(read10(0, 2), 1024, True))
    first = initiator.receive(512)
    waiting = initiator.receive(512)
    initiator.device.cancel(waiting)
    initiator.device.cancel(first)
    assert (first.status, waiting.status) == (Status.CANCELLED, Status.CANCELLED)
    again = initiator.receive(512)
    store.release()
    assert bytes(again.reply) == block(store, 0)
    store.holding = False
    assert bytes(initiator.receive(512).reply) == block(store, 1)
    status = initiator.receive(13)
    assert initiator.csw(status) == (0, 0)
    initiator.device.cancel(status)
    initiator.device.cancel(Transfer(TransferType.BULK, IN, initiator.completed.append, length=13))  # never submitted
    assert len(initiator.completed) == len(set(initiator.completed))


async def test_a_cancelled_status_is_kept() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex(FLUSH), 0, False))
    status = initiator.receive(13)
    initiator.device.cancel(status)
    assert status.status is Status.CANCELLED
    store.release()
    assert initiator.csw(initiator.receive(13)) == (0, 0)


async def test_a_cancelled_write_is_not_written() -> None:
    store = Pattern(16384)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 16384), 8 << 20, False))
    assert initiator.send(bytes(4 << 20)).status is Status.SUCCESS
    waiting = initiator.send(b"\xaa" * (4 << 20))
    initiator.device.cancel(waiting)
    assert (waiting.status, waiting.actual) == (Status.CANCELLED, 0)
    store.release()
    store.holding = False
    assert initiator.send(b"\xbb" * (4 << 20)).status is Status.SUCCESS
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    assert store.content[4 << 20 :] == b"\xbb" * (4 << 20)


@pytest.mark.parametrize("configure", [False, True])
async def test_reset_cancels_everything(configure: bool) -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(read10(0, 2), 1024, True))
    pending = [initiator.receive(512), initiator.receive(512), initiator.send(bytes(31)), initiator.receive(13)]
    if configure:
        assert await initiator.device.set_configuration(1) is Status.SUCCESS
    else:
        await initiator.enumerate()
    assert [one.status for one in pending] == [Status.CANCELLED] * 4
    store.release()
    store.holding = False
    assert initiator.command(TUR).status == (0 if configure else 1)
    assert len(initiator.completed) == len(set(initiator.completed))


async def test_a_write_in_flight_survives_a_reset() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(write10(0, 1), 512, False))
    initiator.send(bytes(512))
    await initiator.enumerate()
    assert initiator.sense() == (6, 0x29, 0)
    store.error = OSError(errno.EIO, "broken")
    store.release()
    store.error, store.holding = None, False
    assert initiator.sense() == (0, 0, 0)  # not the old command's
    assert initiator.command(TUR).status == 0


async def test_completions_may_submit() -> None:
    """A whole command whose transfers are each submitted inside the completion of the one before."""
    store = Pattern()
    initiator = await guest(store)
    ended: list[Transfer] = []
    bulk = TransferType.BULK

    def data(transfer: Transfer) -> None:
        ended.append(initiator._submit(Transfer(bulk, IN, status, length=512)))

    def status(transfer: Transfer) -> None:
        ended.append(initiator._submit(Transfer(bulk, IN, ended.append, length=13)))

    wrapper = initiator.cbw(read10(0, 1), 512, True)
    initiator._submit(Transfer(bulk, OUT, data, data=wrapper))
    assert initiator.csw(ended[-1]) == (0, 0)


# Data-out that is not written: parameters, comparisons, one block for many

VERIFY = "2f 02 00 00 00 03 00 00 02 00"
WRITE_SAME = "41 00 00 00 00 03 00 00 04 00"
UNMAP = "42 00 00 00 00 00 00 00 28 00"
UNMAP_LIST = struct.pack(">HH4xQI4xQI4x", 38, 32, 3, 2, 60, 4)
UNCACHED = bytes.fromhex("00000000 081200") + bytes(17)


@pytest.mark.parametrize("sizes", [[], [512], [700], [1]])
async def test_verify_compares(sizes: list[int]) -> None:
    store = Pattern()
    initiator = await guest(store)
    data = block(store, 3, 2)
    result = initiator.command(VERIFY, send=data, sizes=sizes)
    assert (result.status, result.residue) == (0, 0)
    for index in (0, 511, 512, 1023):
        wrong = data[:index] + bytes((data[index] ^ 1,)) + data[index + 1 :]
        result = initiator.command(VERIFY, send=wrong, sizes=sizes)
        assert (result.status, result.residue) == (1, 1024)
        assert initiator.sense() == (0xE, 0x1D, 0)
    assert not any(entry.startswith("write") for entry in store.log)
    store.error = OSError(errno.EIO, "broken")
    assert initiator.command(VERIFY, send=data, sizes=sizes).status == 1
    assert initiator.sense() == (3, 0x11, 0)


async def test_a_later_match_does_not_undo_a_miscompare() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex(VERIFY), 1024, False))
    initiator.send(bytes(512))
    initiator.send(block(store, 4))
    store.release()
    assert initiator.csw(initiator.receive(13)) == (1, 1024)


async def test_verify_reads() -> None:
    store = Pattern(4096)
    initiator = await guest(store)
    assert initiator.command("2f 00 00 00 00 01 00 0f ff 00").status == 0
    assert store.log == ["read 512 1048576", f"read {512 + 1048576} {4095 * 512 - 1048576}"]
    store.error = OSError(errno.EIO, "broken")
    assert initiator.command("2f 00 00 00 00 01 00 00 01 00").status == 1
    assert initiator.sense() == (3, 0x11, 0)


@pytest.mark.parametrize("sizes", [[], [100]])
async def test_write_same(sizes: list[int]) -> None:
    store = Pattern(8192, unmaps=True)
    initiator = await guest(store)
    result = initiator.command(WRITE_SAME, send=b"\xaa" * 512, sizes=sizes)
    assert (result.status, result.residue) == (0, 0)
    assert store.log == ["write 1536 2048"]
    assert store.content[1536:3584] == b"\xaa" * 2048
    assert initiator.command("41 08 00 00 00 04 00 00 02 00", send=bytes(512), sizes=sizes).status == 0
    assert store.log[1:] == ["unmap 2048 1024"]
    assert initiator.command("93 01 00 00 00 00 00 00 00 00 00 00 00 08 00 00").status == 0
    assert store.log[2:] == ["zero 0 4096"]
    assert initiator.command("93 00 00 00 00 00 00 00 00 00 00 00 20 00 00 00", send=b"\x55" * 512).status == 0
    assert store.log[3:] == [f"write {at << 20} 1048576" for at in range(4)]
    assert store.content == b"\x55" * (4 << 20)


async def test_unmap() -> None:
    store = Pattern(unmaps=True)
    initiator = await guest(store)
    for sizes in ([], [8], [17]):
        store.log.clear()
        assert initiator.command(UNMAP, send=UNMAP_LIST, sizes=sizes).status == 0
        assert store.log == ["unmap 1536 1024", "unmap 30720 2048"]
    assert initiator.command(read10(2, 4), receive=2048).data == block(store, 2) + bytes(1024) + block(store, 5)
    wrong = UNMAP_LIST[:32] + b"\xff" * 8
    assert initiator.command(UNMAP, send=wrong).status == 1
    assert initiator.sense() == (5, 0x26, 0)
    assert len(store.log) == 3


async def test_zeros_come_in_steps() -> None:
    store = Pattern(unmaps=True)
    store.block_count = 1 << 20
    initiator = await guest(store)
    assert initiator.command("93 09 00 00 00 00 00 00 00 00 00 08 00 01 00 00").status == 0
    steps = [f"unmap {begin} {ZERO_STEP}" for begin in range(0, 256 << 20, ZERO_STEP)]
    assert store.log == [*steps, "unmap 268435456 512"]


@pytest.mark.parametrize(
    ("cdb", "data"),
    [(WRITE_SAME, b"\xaa" * 512), (WRITE_SAME, bytes(512)), (UNMAP, UNMAP_LIST), (write10(0, 1).hex(), bytes(512))],
)
async def test_without_a_write_cache_the_status_waits_for_the_medium(cdb: str, data: bytes) -> None:
    store = Pattern(unmaps=True)
    initiator = await guest(store)
    assert initiator.command("15 10 00 00 18 00", send=UNCACHED).status == 0
    assert store.log == ["flush"]  # the cached writes
    mode = initiator.command("1a 00 08 00 18 00", receive=24)
    assert mode.data == bytes.fromhex("17001000 081200") + bytes(17)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex(cdb), len(data), False))
    initiator.send(data)
    status = initiator.receive(13)
    while store.log[-1] != "flush" or len(store.log) == 1:
        assert status.status is None
        store.release(1)
    assert status.status is None
    store.release(1)
    assert initiator.csw(status) == (0, 0)


async def test_mode_select_is_refused() -> None:
    initiator = await guest()
    wrong = UNCACHED[:6] + b"\x05" + UNCACHED[7:]
    result = initiator.command("15 10 00 00 18 00", send=wrong)
    assert (result.status, result.residue) == (1, 0)
    assert initiator.sense() == (5, 0x26, 0)


@pytest.mark.parametrize(("cdb", "data"), [(WRITE_SAME, 512), (UNMAP, 40), (VERIFY, 1024), ("15 10 00 00 18 00", 24)])
async def test_the_thirteen_cases_for_other_data_out(cdb: str, data: int) -> None:
    store = Pattern(unmaps=True)
    initiator = await guest(store)
    assert (initiator.command(cdb).status, store.log) == (2, [])  # case 3
    assert (initiator.command(cdb, receive=data).status, store.log) == (2, [])  # case 8
    short = initiator.command(cdb, send=bytes(data - 1))  # case 13
    assert (short.status, short.residue, store.log) == (2, 0, [])
    payload = {WRITE_SAME: bytes(512), UNMAP: UNMAP_LIST, VERIFY: block(store, 3, 2)}.get(cdb, UNCACHED)
    for sizes in ([], [7], [513]):
        more = initiator.command(cdb, send=payload + bytes(100), sizes=sizes)  # case 11
        assert (more.status, more.residue) == (0, 100)


async def test_a_reset_stops_a_long_job() -> None:
    store = Pattern(8192)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex("93 00 00 00 00 00 00 00 00 00 00 00 20 00 00 00"), 512, False))
    initiator.send(b"\x55" * 512)
    store.release(1)
    await initiator.enumerate()
    store.release()
    assert store.log == ["write 0 1048576", "write 1048576 1048576"]
    store.holding = False
    assert initiator.sense() == (6, 0x29, 0)
    assert initiator.command(TUR).status == 0


async def test_a_job_that_fails_stops() -> None:
    store = Pattern(8192)
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex("93 00 00 00 00 00 00 00 00 00 00 00 20 00 00 00"), 512, False))
    initiator.send(b"\x55" * 512)
    store.release(1)
    store.error = OSError(errno.ENOSPC, "full")
    store.release(1)
    assert len(store.log) == 2
    assert initiator.csw(initiator.receive(13)) == (1, 512)
    store.error, store.holding = None, False
    assert initiator.sense() == (7, 0x27, 7)


async def test_a_read_with_fua_flushes_first() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.holding = True
    initiator.send(initiator.cbw(bytes.fromhex("28 08 00 00 00 05 00 00 01 00"), 512, True))
    reading = initiator.receive(512)
    assert store.log == ["flush"]
    store.release(1)
    assert store.log == ["flush", "read 2560 512"]
    store.release(1)
    assert bytes(reading.reply) == block(store, 5)
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    initiator.send(initiator.cbw(bytes.fromhex("28 08 00 00 00 05 00 00 01 00"), 512, True))
    reading = initiator.receive(512)
    store.error = OSError(errno.EIO, "broken")
    store.release(1)
    assert bytes(reading.reply) == bytes(512)
    assert initiator.csw(initiator.receive(13)) == (1, 512)


async def test_a_new_size_is_reported() -> None:
    store = Pattern()
    initiator = await guest(store)
    store.block_count = 32
    assert initiator.command(TUR).status == 1
    assert initiator.sense() == (6, 0x2A, 9)
    assert initiator.command("25 00 00 00 00 00 00 00 00 00", receive=8).data == struct.pack(">II", 31, 512)


# Sequences of real hosts: each command with the data that the host needs


async def test_seabios() -> None:
    initiator = await Guest.plug(make(Pattern()), attention=True)
    assert initiator.control(bytes.fromhex("a1fe000000000100")).reply == b"\0"
    inquiry = initiator.command(INQUIRY, receive=36, cdb_length=12)
    assert (inquiry.status, inquiry.residue, len(inquiry.data)) == (0, 0, 36)
    assert inquiry.data[8:16] != b"QEMU    "
    assert initiator.command(TUR, cdb_length=12).status == 1
    sense = initiator.command("03 00 00 00 12 00", receive=18, cdb_length=12)
    assert (len(sense.data), sense.sense) == (18, (6, 0x29, 0))
    assert initiator.command(TUR, cdb_length=12).status == 0
    capacity = initiator.command("25 00 00 00 00 00 00 00 00 00", receive=8, cdb_length=12)
    assert (capacity.residue, capacity.data) == (0, struct.pack(">II", 63, 512))
    read = initiator.command(read10(0, 64), receive=32 * KIB, cdb_length=12)
    assert (read.status, len(read.data)) == (0, 32 * KIB)


async def test_windows() -> None:
    initiator = await Guest.plug(make(Pattern()), attention=True)
    assert initiator.command(INQUIRY, receive=36).status == 0
    formatted = initiator.command("23 00 00 00 00 00 00 00 fc 00", receive=252)
    assert formatted.status == 1  # the unit attention
    assert initiator.sense() == (6, 0x29, 0)
    formatted = initiator.command("23 00 00 00 00 00 00 00 fc 00", receive=252)
    assert (formatted.status, formatted.residue) == (0, 240)
    assert formatted.data[:12] == bytes.fromhex("00000008 00000040 02000200")
    serial = initiator.command("12 01 80 00 ff 00", receive=255)
    assert (serial.status, serial.residue) == (0, 235)
    assert serial.data[:20] == bytes.fromhex("00800010") + b"0123456789ABCDEF"
    assert initiator.command("12 01 83 00 ff 00", receive=255).status == 0
    assert initiator.command("1a 00 1c 00 c0 00", receive=192).data[4:7] == bytes.fromhex("1c0a08")
    assert initiator.command("1a 00 3f 00 c0 00", receive=192).status == 0
    assert initiator.command("2f 00 00 00 00 00 00 00 40 00").status == 0
    assert initiator.command(FLUSH).status == 0


async def test_ovmf() -> None:
    initiator = await Guest.plug(make(Pattern()), attention=True)
    assert initiator.command(INQUIRY, receive=36).status == 0
    assert initiator.command(TUR).status == 1
    assert initiator.sense() == (6, 0x29, 0)
    assert initiator.command("25 00 00 00 00 00 00 00 00 00", receive=8).residue == 0
    mode = initiator.command("1a 00 3f 00 04 00", receive=4)
    assert (mode.status, mode.residue, mode.data) == (0, 0, bytes.fromhex("3b001000"))


async def test_linux() -> None:
    initiator = await Guest.plug(make(Pattern()), attention=True)
    inquiry = initiator.command(INQUIRY, receive=36)
    assert (inquiry.status, inquiry.residue, inquiry.data[4]) == (0, 0, 31)
    assert initiator.command(TUR).status == 1
    sense = initiator.command("03 00 00 00 60 00", receive=96)
    assert (sense.status, sense.residue, sense.sense) == (0, 78, (6, 0x29, 0))
    assert initiator.command(TUR).status == 0
    mode = initiator.command("1a 00 3f 00 c0 00", receive=192)
    assert (mode.status, mode.residue, len(mode.data)) == (0, 132, 192)
    assert mode.data[16:36] == bytes.fromhex("081204") + bytes(17)  # behind the page 01, which Linux skips
    assert initiator.command(FLUSH).status == 0
    ata = initiator.command("85 08 0e 00 00 00 01 00 00 00 00 00 00 00 ec 00", receive=512)
    assert (ata.status, ata.residue, ata.data) == (1, 512, bytes(512))
    assert initiator.sense() == (5, 0x20, 0)


# Random commands against a shadow copy


@pytest.mark.parametrize("seed", range(20))
async def test_random_work_matches_a_shadow(seed: int) -> None:
    source = random.Random(seed)
    store = Pattern(128)
    initiator = await guest(store)
    shadow = bytearray(store.original)
    for _ in range(120):
        store.holding = source.random() < 0.5
        lba = source.randrange(128)
        count = source.randrange(1, min(32, 128 - lba) + 1)
        begin, end = lba * 512, (lba + count) * 512
        writes = source.random() < 0.5
        data = source.randbytes(end - begin)
        cdb = write10(lba, count, fua=source.random() < 0.2) if writes else read10(lba, count)
        assert initiator.send(initiator.cbw(cdb, end - begin, not writes)).status is Status.SUCCESS
        moved = 0
        broken = False
        got = bytearray()
        while moved < end - begin:
            size = source.choice([1, 100, 512, 1000, 4096, 1 << 16])
            transfer = initiator.send(data[moved : moved + size]) if writes else initiator.receive(size)
            fate = source.random()
            if fate < 0.02:
                await initiator.enumerate()
                initiator.command(TUR)
                broken = True
            elif fate < 0.04:
                store.release(0)
                initiator.control(bytes.fromhex("21ff000000000000"))
                initiator.device.cancel(transfer)
                broken = True
            elif fate < 0.2:
                initiator.device.cancel(transfer)
            store.release()
            if broken:
                break
            await settle(transfer)
            moved += transfer.actual
            got += transfer.reply
        if broken:  # completed writes may be there or not, but only whole blocks; then both are equal again
            for one in range(lba, lba + count):
                part = bytes(store.content[one * 512 : one * 512 + 512])
                new = data[(one - lba) * 512 : (one - lba) * 512 + 512]
                assert part in (bytes(shadow[one * 512 : one * 512 + 512]), new)
            shadow[:] = store.content
            continue
        status = initiator.receive(13)
        while status.status is None:
            store.release()
        assert initiator.csw(status) == (0, 0)
        if writes:
            shadow[begin:end] = data
        else:
            assert got == shadow[begin:end]
        assert store.content == shadow
    assert all(one.status is not None for one in initiator.completed)
    assert len(initiator.completed) == len(set(initiator.completed))


# Read-ahead


async def fetched_ahead(store: Pattern, *, hold: bool) -> Guest:
    """A READ of 64 KiB at block 4 whose data is read ahead."""
    initiator = await guest(store)
    store.holding = hold
    initiator.send(initiator.cbw(read10(4, 128), 64 * KIB, True))
    assert store.log == []  # the completion of the CBW goes first
    await asyncio.sleep(0)
    assert store.log == [f"read 2048 {64 * KIB}"]
    return initiator


@pytest.mark.parametrize("sizes", [[64 * KIB], [20 * KIB, 20 * KIB, 24 * KIB]])
@pytest.mark.parametrize("hold", [False, True])
async def test_a_large_read_is_read_ahead(sizes: list[int], hold: bool) -> None:
    store = Pattern(256)
    initiator = await fetched_ahead(store, hold=hold)
    parts = [initiator.receive(size) for size in sizes]
    if hold:
        assert parts[0].status is None
        store.release(1)
    assert b"".join(bytes(part.reply) for part in parts) == block(store, 4, 128)
    assert initiator.csw(initiator.receive(13)) == (0, 0)
    assert store.log == [f"read 2048 {64 * KIB}"]
    assert initiator.device.figures == Figures(read=64 * KIB, commands=initiator.tag)


async def test_a_failed_read_ahead_is_retried_when_the_host_reads() -> None:
    store = Pattern(256)
    initiator = await fetched_ahead(store, hold=True)
    store.error = OSError(errno.EIO, "broken")
    store.release(1)
    store.error, store.holding = None, False
    assert bytes(initiator.receive(64 * KIB).reply) == block(store, 4, 128)
    assert initiator.csw(initiator.receive(13)) == (0, 0)


async def test_no_read_ahead_for_a_dropped_or_served_command() -> None:
    store = Pattern(256)
    initiator = await guest(store)
    initiator.send(initiator.cbw(read10(4, 128), 64 * KIB, True))
    initiator.control(bytes.fromhex("21ff000000000000"))
    await asyncio.sleep(0)
    assert store.log == []
    initiator.send(initiator.cbw(read10(4, 128), 64 * KIB, True))
    assert bytes(initiator.receive(64 * KIB).reply) == block(store, 4, 128)
    await asyncio.sleep(0)
    assert store.log == [f"read 2048 {64 * KIB}"]


async def test_the_read_ahead_of_an_old_command_does_not_serve_a_new_one() -> None:
    store = Pattern(256)
    initiator = await fetched_ahead(store, hold=True)
    initiator.control(bytes.fromhex("21ff000000000000"))
    initiator.send(initiator.cbw(read10(0, 64), 32 * KIB, True))
    reading = initiator.receive(32 * KIB)
    store.release(1)
    assert reading.status is None
    store.release(1)
    assert bytes(reading.reply) == block(store, 0, 64)


# Cancellations by a hostile guest


class Late(Pattern):
    """A store whose writes and flushes happen, in order, when they are released."""

    def __init__(self, blocks: int = 64) -> None:
        super().__init__(blocks)
        self.late = True
        self.later: list[Callable[[], None]] = []
        self.flush_error: OSError | None = None

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        kept = bytes(data)

        def happen() -> None:
            self.content[offset : offset + len(kept)] = kept
            done(None)

        self._later(happen)

    def flush(self, done: WriteDone) -> None:
        def happen() -> None:
            error, self.flush_error = self.flush_error, None  # the kernel reports it once
            done(error)

        self._later(happen)

    def _later(self, happen: Callable[[], None]) -> None:
        if self.late:
            self.later.append(happen)
        else:
            happen()

    def go(self) -> None:
        later, self.later = self.later, []
        for happen in later:
            happen()


async def ticks() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.mark.parametrize("how", ["detach", "reset", "cancel"])
async def test_data_is_never_written_in_the_place_of_cancelled_data(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("farplug.virtual.bot.MAX_UNWRITTEN", 8 * 512)
    store = Late()
    device = disk_device(store, speeds=(Speed.HIGH,))
    async with MemoryGuest(device) as memory:
        await memory.set_configuration(1)
        initiator = Guest(device)
        await memory.bulk_out(OUT, initiator.cbw(write10(0, 12), 12 * 512, False))
        await memory.bulk_out(OUT, b"1" * 512 * 6)
        waits, fits = memory.submit_out(OUT, b"2" * 512 * 4), memory.submit_out(OUT, b"3" * 512 * 2)
        await ticks()
        assert not waits.done
        leaving = None
        if how == "detach":
            leaving = asyncio.create_task(memory.redirection.detach())
        elif how == "reset":
            memory.reset()
        else:
            waits.cancel()
        for _ in range(3):
            await ticks()
            store.go()
        if leaving is not None:
            await leaving
        store.late = False
        assert bytes(store.content[6 * 512 : 10 * 512]) in (block(store, 6, 4), b"2" * 512 * 4)
        if how == "cancel":
            assert (await fits).status is Status.SUCCESS  # accepted and dropped, like the rest
            await memory.bulk_out(OUT, bytes(4 * 512))
            status = await memory.bulk_in(IN, 13)
            assert status[12] == 1


async def test_a_flush_that_failed_for_a_dropped_command_fails_the_next_one() -> None:
    for closes in (False, True):
        store = Late()
        initiator = await guest(store)
        device = initiator.device
        store.flush_error = OSError(errno.EIO, "Input/output error")
        initiator.send(initiator.cbw(bytes.fromhex(FLUSH), 0, False))
        device.cancel(initiator.receive(13))
        await initiator.enumerate()
        store.go()
        if closes:
            closing = asyncio.create_task(device.close())
            await ticks()
            store.go()
            with pytest.raises(DeviceError, match="may be lost"):
                await closing
        else:
            initiator.command(TUR)
            for expected in (1, 0):
                initiator.send(initiator.cbw(bytes.fromhex(FLUSH), 0, False))
                store.go()
                assert initiator.csw(initiator.receive(13))[0] == expected


async def test_cancelled_reads_are_bounded() -> None:
    store = Pattern(65536)
    device = disk_device(store)
    async with MemoryGuest(device) as memory:
        await memory.set_configuration(1)
        initiator = Guest(device)
        store.holding = True
        size = 16 << 20
        await memory.bulk_out(OUT, initiator.cbw(read10(0, 65535), 65535 * 512, True))
        for _ in range(20):
            reading = memory.submit_in(IN, size)
            await ticks()
            reading.cancel()
            await reading
        assert sum(len(data) for _, _, data in store.held) <= 2 * MAX_UNREAD
        store.holding = False
        reading = memory.submit_in(IN, size)
        await ticks()
        assert not reading.done  # it waits for the cancelled reads
        store.release()
        assert bytes((await reading).data) == store.original[:size]
