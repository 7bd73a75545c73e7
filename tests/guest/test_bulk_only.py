"""Bulk-Only Transport driven raw by the guest: what no driver would send, and how the disk recovers.

The chapters are those of USB Mass Storage Class, Bulk-Only Transport 1.0. tests/virtual/test_bot.py does the same and
more in memory; here the words pass through a real host controller, a real USB stack and QEMU.
"""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.guest.plugging import LABORATORY, Operation, Result, disk_of, plugged, raw, usb_folder, usb_node
from tests.virtual.bulk_only import IN, OUT, Pattern, read10, write10

from farplug.testing import QemuGuest
from farplug.virtual import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

BLOCKS = 2048
KIB = 1024

TUR = bytes(6)
INQUIRY = bytes.fromhex("120000002400")
FLUSH = bytes.fromhex("35000000000000000000")
UNKNOWN = bytes.fromhex("ff0000000000")

TAG = 0x12345678
RESET = ("control", bytes.fromhex("21ff000000000000"))
HALTED, NOT_HALTED = b"\1\0", b"\0\0"
STALL = "EPIPE"
CLEAR = (("clear_halt", IN), ("clear_halt", OUT))
RECOVERY = (RESET, *CLEAR)


def get_status(endpoint: int) -> Operation:
    return "control", struct.pack("<BBHHH", 0x82, 0, 0, endpoint, 2)


def arrived(result: Result) -> bytes:
    """The bytes of an operation that did not fail."""
    assert isinstance(result, bytes), result
    return result


@dataclass(frozen=True)
class Command:
    """A command and how it must end.

    Attributes:
        cdb: the command block.
        receive: lengths of the transfers that ask for data.
        send: data of the transfers that bring some.
        expects: H, if it is not what the transfers move.
        cdb_length: bCBWCBLength, if it is not the length of ``cdb``.
        status, residue, data: how it must end.
    """

    cdb: bytes
    receive: Sequence[int] = ()
    send: Sequence[bytes] = ()
    expects: int | None = None
    cdb_length: int | None = None
    status: int = 0
    residue: int | None = 0
    data: bytes = b""

    @property
    def operations(self) -> list[Operation]:
        length = sum(self.receive) + sum(map(len, self.send)) if self.expects is None else self.expects
        cdb_length = len(self.cdb) if self.cdb_length is None else self.cdb_length
        flags = 0x80 if self.receive else 0
        wrapper = struct.pack("<4sIIBBB16s", b"USBC", TAG, length, flags, 0, cdb_length, self.cdb)
        return [
            ("send", OUT, wrapper),
            *(("receive", IN, size) for size in self.receive),
            *(("send", OUT, data) for data in self.send),
            ("receive", IN, 13),
        ]

    def check(self, results: Sequence[Result]) -> None:
        """Compare with what the operations came to."""
        *parts, end = results
        data = b"".join(part for part in parts if isinstance(part, bytes))
        assert (data, [part for part in parts if isinstance(part, str)]) == (self.data, []), self
        signature, tag, residue, status = struct.unpack("<4sIIB", arrived(end))
        assert (signature, tag, status) == (b"USBS", TAG, self.status), self
        assert self.residue in (None, residue), (self, residue)


@dataclass
class RawDisk:
    """A disk without a driver."""

    guest: QemuGuest
    store: Pattern
    node: str

    async def operate(self, *operations: Operation) -> list[Result]:
        """The results of some operations on the claimed interface, which begin in the command phase."""
        before = (("claim", 0), ("set_interface", 0, 0), *RECOVERY)
        return (await raw(self.guest, self.node, *before, *operations))[len(before) :]

    async def execute(self, *commands: Command) -> None:
        """Each must end as it says."""
        results = await self.operate(*(operation for command in commands for operation in command.operations))
        for command in commands:
            count = len(command.operations)
            command.check(results[:count])
            del results[:count]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def taken(session_guests: Guests) -> AsyncIterator[RawDisk]:
    """A disk taken from its driver; afterwards it has one again, and what the guest reads is what is in the store."""
    store = Pattern(BLOCKS)
    device = disk_device(store)
    async with session_guests.lent(LABORATORY) as guest, plugged(guest.targets[0], device):
        await disk_of(guest, device)
        node = await usb_node(guest, await usb_folder(guest, device))
        await raw(guest, node, ("detach", 0))
        yield RawDisk(guest, store, node)
        assert await raw(guest, node, ("attach", 0)) == [b""]
        name = await disk_of(guest, device)
        # Its driver read the beginning: with the caches dropped, everything is read again.
        await guest.check(f"echo 3 >/proc/sys/vm/drop_caches; dd if={name} of=/tmp/content bs=64k 2>/dev/null")
        assert (await guest.run("cat /tmp/content; rm /tmp/content")).data == bytes(store.content)
    await device.dispose()


@pytest.fixture
def disk(taken: RawDisk) -> RawDisk:
    """The same with its first content."""
    taken.store.content[:] = taken.store.original
    return taken


def blocks(store: Pattern, lba: int, count: int) -> bytes:
    return store.original[lba * 512 : (lba + count) * 512]


async def test_the_thirteen_cases(disk: RawDisk) -> None:
    """Chapter 6.7: what the host expects (H) and what the device intends (D)."""
    store = disk.store
    ten = random.Random(12).randbytes(5120)
    await disk.execute(
        # 1: neither
        Command(TUR),
        Command(FLUSH),
        Command(read10(5, 0)),
        # 2 and 3: the host expects nothing
        Command(read10(0, 1), status=2),
        Command(INQUIRY, status=2),
        Command(write10(0, 1), status=2),
        # 4: the device has nothing to send
        Command(TUR, receive=[512], residue=512, data=bytes(512)),
        Command(UNKNOWN, receive=[36], status=1, residue=36, data=bytes(36)),
        Command(read10(BLOCKS, 1), receive=[512], status=1, residue=512, data=bytes(512)),
        Command(TUR, receive=[128 * KIB], residue=128 * KIB),
        # 5: it has less
        Command(read10(5, 1), receive=[1024], residue=512, data=blocks(store, 5, 1) + bytes(512)),
        Command(read10(5, 1), receive=[512, 512], residue=512, data=blocks(store, 5, 1) + bytes(512)),
        Command(read10(0, 40), receive=[128 * KIB], residue=108 * KIB, data=blocks(store, 0, 40)),
        # 6: as much
        Command(read10(7, 10), receive=[5120], data=blocks(store, 7, 10)),
        Command(read10(7, 10), receive=[1024] * 5, data=blocks(store, 7, 10)),
        Command(read10(0, BLOCKS), receive=[BLOCKS * 512], data=blocks(store, 0, BLOCKS)),
        # 7: more
        Command(read10(3, 2), receive=[512], status=2, data=blocks(store, 3, 1)),
        # 8: it wants to receive
        Command(write10(0, 1), receive=[512], status=2, residue=None),
        # 9: it wants nothing
        Command(TUR, send=[bytes(1024)], residue=1024),
        Command(write10(BLOCKS, 1), send=[bytes(512), bytes(512)], status=1, residue=1024),
        # 10: it wants to send
        Command(read10(0, 1), send=[bytes(1024)], status=2, residue=None),
        # 11: it wants less
        Command(write10(3, 1), send=[b"\xaa" * 1024], residue=512),
        # 12: as much
        Command(write10(20, 10), send=[ten]),
        Command(write10(40, 10), send=[ten[i : i + 1024] for i in range(0, 5120, 1024)]),
        # 13: more
        Command(write10(0, 4), send=[b"\xaa" * 1024], status=2),
        Command(TUR),
    )
    expected = bytearray(store.original)
    for lba, data in ((3, b"\xaa" * 512), (20, ten), (40, ten)):
        expected[lba * 512 : lba * 512 + len(data)] = data
    assert store.content == expected


async def test_reset_recovery_after_a_phase_error(disk: RawDisk) -> None:
    """Chapter 5.3.3.1, in every phase: between the wrapper and the data, in the data, before the status."""
    read, write = Command(read10(8, 4), receive=[2048]), Command(write10(8, 4), send=[b"\xbb" * 2048])
    for begun in (
        read.operations[:1],
        [read.operations[0], ("receive", IN, 1024)],
        read.operations[:2],
        write.operations[:1],
        [write.operations[0], ("send", OUT, b"\xbb" * 1024)],
        write.operations[:2],
        Command(read10(0, 1), status=2).operations,
    ):
        results = await disk.operate(*begun, *RECOVERY, *Command(INQUIRY, receive=[36]).operations)
        assert not any(isinstance(one, str) for one in results), results
        inquiry = results[len(begun) + len(RECOVERY) :]
        assert arrived(inquiry[1])[8:16] == b"farplug "
        assert arrived(inquiry[2])[12] == 0
    assert disk.store.content[8 * 512 : 12 * 512] == b"\xbb" * 2048
    assert disk.store.content[: 8 * 512] == disk.store.original[: 8 * 512]
    assert disk.store.content[12 * 512 :] == disk.store.original[12 * 512 :]


async def test_an_invalid_wrapper_halts_until_reset_recovery(disk: RawDisk) -> None:
    """Chapter 6.6.1. Clearing the halts alone does not help."""
    good = Command(TUR).operations[0][2]
    assert isinstance(good, bytes)
    is_halted = ((get_status(IN), HALTED), (get_status(OUT), HALTED))
    for wrapper in (b"USBS" + good[4:], good[:30], good + b"\0", b""):
        steps: list[tuple[Operation, Result]] = [
            (("send", OUT, wrapper), b""),
            (("receive", IN, 13), STALL),
            *is_halted,
            *((operation, b"") for operation in CLEAR),
            *is_halted,
            (("receive", IN, 13), STALL),
            (("send", OUT, good), STALL),
            (RESET, b""),
            (("receive", IN, 13), STALL),  # the reset itself clears no halt
            *((operation, b"") for operation in CLEAR),
            (get_status(IN), NOT_HALTED),
            (get_status(OUT), NOT_HALTED),
        ]
        command = Command(TUR)
        results = await disk.operate(*(operation for operation, _ in steps), *command.operations)
        assert results[: len(steps)] == [expected for _, expected in steps], wrapper
        command.check(results[len(steps) :])
    assert disk.store.content == disk.store.original


async def test_a_port_reset_recovers_too(disk: RawDisk) -> None:
    # After a reset the kernel binds its driver again.
    recovery = (("reset",), ("detach", 0), ("claim", 0))
    results = await disk.operate(("send", OUT, b"nonsense"), ("receive", IN, 13), *recovery)
    assert results == [b"", STALL, *[b""] * len(recovery)]
    await disk.operate(*Command(TUR).operations)  # fails with UNIT ATTENTION, if the driver did not ask before
    await disk.execute(Command(read10(9, 1), receive=[512], data=blocks(disk.store, 9, 1)))


async def test_halts_that_the_host_sets(disk: RawDisk) -> None:
    """Queued data is delivered after the halt."""
    command = Command(INQUIRY, receive=[36])
    wrapper, data, status = command.operations
    results = await disk.operate(
        wrapper,
        ("control", struct.pack("<BBHHH", 2, 3, 0, IN, 0)),
        data,
        get_status(IN),
        ("clear_halt", IN),
        data,
        ("control", struct.pack("<BBHHH", 2, 3, 0, IN, 0)),
        status,
        ("clear_halt", IN),
        status,
    )
    assert results[:5] == [b"", b"", STALL, HALTED, b""]
    assert results[6:9] == [b"", STALL, b""]
    assert arrived(results[5])[8:16] == b"farplug "
    assert arrived(results[9])[12] == 0


async def test_command_block_lengths(disk: RawDisk) -> None:
    """Hosts announce more than the command has, and what follows it is anything; less is refused."""
    await disk.execute(
        *(Command(TUR + bytes([pad]) * 10, cdb_length=length) for pad in (0xFF, 0x55, 0xAA) for length in (6, 12, 16)),
        *(
            Command(read10(9, 1) + bytes([pad]) * 6, cdb_length=16, receive=[512], data=blocks(disk.store, 9, 1))
            for pad in (0xFF, 0x55, 0xAA)
        ),
        Command(TUR, cdb_length=5, status=1),
        Command(FLUSH, cdb_length=9, status=1),
        Command(TUR, cdb_length=0, status=1),
        Command(TUR, cdb_length=31),
    )


async def test_requests_of_the_class(disk: RawDisk) -> None:
    """Chapters 3.1 and 3.2. The kernel itself refuses what is addressed to another interface."""
    table = {
        "a1fe000000000100": b"\0",
        "a1fe010000000100": STALL,
        "a1fe000000000200": STALL,
        "21fe000000000000": STALL,
        "21ff000000000000": b"",
        "21ff010000000000": STALL,
        "a1ff000000000000": STALL,
        "a1fd000000000100": STALL,
    }
    results = await disk.operate(*(("control", bytes.fromhex(setup)) for setup in table))
    assert dict(zip(table, results, strict=True)) == table
    await disk.execute(Command(TUR))
