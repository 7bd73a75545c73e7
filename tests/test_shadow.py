"""Random reads, writes, cancels and resets, compared with a shadow copy of the disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from farplug.testing.memory import MemoryGuest, Pending
from farplug.usb import Setup, Status
from farplug.usbredir import packets
from farplug.virtual.disk import disk_device
from farplug.virtual.storage import BULK_IN, BULK_OUT

SEED = 20261122
OPERATIONS = 4000
BLOCK = 512
BLOCKS = 4096

COUNTS = (1, 1, 1, 2, 8, 8, 8, 15, 64, 240, 800)
"""Blocks of a command: one, a page, and more than one transfer holds."""

TRANSFER_SIZES = (1 << 20, 1 << 20, 20 << 10, 1000)
"""The largest data transfer in bytes: Linux on xHCI, a transfer descriptor of EHCI, a part of a block."""
MAX_TRANSFERS = 64
"""The most transfers of a command. Otherwise most of the work is transfers of a part of a block."""

BULK_ONLY_RESET = Setup(0x21, 0xFF, 0, 0, 0)
COLD_EVERY, REPLUGGED_EVERY = 25, 500
"""Operations after which the image is removed from the page cache, and after which the disk is replugged."""


def pattern(lba: int, count: int, generation: int) -> bytes:
    """Return blocks filled with their number, a generation and a checksum of both."""
    blocks = []
    for number in range(lba, lba + count):
        head = struct.pack("<QQ", number, generation)
        blocks.append((head + hashlib.sha256(head).digest()[:16]) * (BLOCK // 32))
    return b"".join(blocks)


class Shadow:
    """The possible contents of each block of the disk: one, or several after an interrupted write."""

    def __init__(self) -> None:
        self._blocks = [{bytes(BLOCK)} for _ in range(BLOCKS)]

    def wrote(self, lba: int, data: bytes) -> None:
        """Note a write that the disk acknowledged."""
        for number, content in self._split(lba, data):
            self._blocks[number] = {content}

    def may_have_written(self, lba: int, data: bytes) -> None:
        """Note a write that was interrupted after ``data``: each of these blocks is old or new, and none is torn."""
        for number, content in self._split(lba, data):
            self._blocks[number].add(content)

    def read(self, lba: int, data: bytes) -> None:
        """Compare with data that the disk returned; from now on the disk must return the same."""
        for number, content in self._split(lba, data):
            assert content in self._blocks[number], f"block {number} begins with {content[:32].hex(' ')}"
            self._blocks[number] = {content}

    @staticmethod
    def _split(lba: int, data: bytes) -> list[tuple[int, bytes]]:
        whole = len(data) // BLOCK
        return [(lba + index, data[index * BLOCK : (index + 1) * BLOCK]) for index in range(whole)]


class Interrupted(Exception):
    """A command was interrupted. ``sent``: the bytes of its data that had been sent."""

    def __init__(self, sent: int) -> None:
        super().__init__(sent)
        self.sent = sent


class Driver:
    """A host's mass storage driver that may interrupt a command at any point."""

    def __init__(self, guest: MemoryGuest, chance: random.Random, counts: Counter[str]) -> None:
        self._guest = guest
        self._chance = chance
        self._counts = counts
        self._tag = 0

    async def ready(self) -> None:
        """Configure the disk, and clear its unit attention."""
        await self._guest.set_configuration(1)
        for _ in range(2):
            if (await self.command(bytes(6)))[0] == 0:
                return
        raise AssertionError("the disk does not become ready")

    async def read(self, lba: int, count: int, *, cut: bool) -> bytes:
        status, data = await self.command(struct.pack(">BBIxHx", 0x28, 0, lba, count), receive=count * BLOCK, cut=cut)
        assert status == 0
        assert len(data) == count * BLOCK
        return data

    async def write(self, lba: int, data: bytes, *, cut: bool) -> None:
        fua = 8 * (self._chance.random() < 0.1)
        status, _ = await self.command(struct.pack(">BBIxHx", 0x2A, fua, lba, len(data) // BLOCK), send=data, cut=cut)
        assert status == 0

    async def flush(self, *, cut: bool) -> None:
        status, _ = await self.command(bytes([0x35]) + bytes(9), cut=cut)
        assert status == 0

    async def command(self, cdb: bytes, *, receive: int = 0, send: bytes = b"", cut: bool = False) -> tuple[int, bytes]:
        """Run a command, its transfers one after the other or all at once. Return its status and its data.

        Raises:
            Interrupted: the command was interrupted; the disk is ready for the next one.
        """
        steps, ends = self._transfers(cdb, receive, send)
        ahead = self._chance.random() < 0.3
        last = self._chance.randrange(len(steps)) if cut else len(steps) - 1
        turns = self._chance.randrange(4)
        pending: list[Pending] = []
        for step in steps[: last + 1]:
            pending.append(step())
            if not ahead and len(pending) <= last:
                await pending[-1]
        recovery = self._chance.choice((self._port_reset, self._port_reset_alone, self._bulk_only_reset))
        if cut:
            for _ in range(turns):
                await asyncio.sleep(0)
            if not (last == len(steps) - 1 and pending[-1].done):
                await recovery(pending)
                self._counts["interrupted"] += 1
                raise Interrupted(ends[last])
        data = bytearray()
        for number, transfer in enumerate(pending):
            answer = await transfer
            assert isinstance(answer, packets.BulkPacket)
            assert answer.status == Status.SUCCESS, (number, answer)
            data += answer.data
        signature, tag, residue, status = struct.unpack("<4sIIB", data[-13:])
        assert (signature, tag) == (b"USBS", self._tag)
        assert status or not residue
        return status, bytes(data[:-13])

    def _transfers(self, cdb: bytes, receive: int, send: bytes) -> tuple[list[Callable[[], Pending]], list[int]]:
        """Return how to begin each transfer of a command, and the bytes of its data that were sent by then."""
        self._tag += 1
        length = receive or len(send)
        cbw = struct.pack("<4sIIBBB16s", b"USBC", self._tag, length, 0x80 if receive else 0, 0, len(cdb), cdb)
        steps: list[Callable[[], Pending]] = [partial(self._guest.submit_out, BULK_OUT, cbw)]
        ends = [0]
        sizes = (self._chance.choice(TRANSFER_SIZES), *TRANSFER_SIZES)
        size = next(size for size in sizes if length <= size * MAX_TRANSFERS)
        for begin in range(0, length, size):
            end = min(begin + size, length)
            if receive:
                steps.append(partial(self._guest.submit_in, BULK_IN, end - begin))
            else:
                steps.append(partial(self._guest.submit_out, BULK_OUT, send[begin:end]))
            ends.append(end)
        steps.append(partial(self._guest.submit_in, BULK_IN, 13))
        ends.append(length)
        return steps, ends

    async def _port_reset(self, pending: list[Pending]) -> None:
        """Cancel the transfers, then reset the port, as Linux does."""
        await self._cancel(pending)
        self._guest.reset()
        await self.ready()
        self._counts["port reset"] += 1

    async def _port_reset_alone(self, pending: list[Pending]) -> None:
        """Reset the port: the reset completes all transfers."""
        self._guest.reset()
        for transfer in pending:
            await transfer
        await self.ready()
        self._counts["port reset"] += 1

    async def _bulk_only_reset(self, pending: list[Pending]) -> None:
        """Do a reset recovery (Bulk-Only Transport, chapter 5.3.4)."""
        await self._cancel(pending)
        await self._guest.control_out(BULK_ONLY_RESET)
        await self._guest.clear_halt(BULK_IN)
        await self._guest.clear_halt(BULK_OUT)
        self._counts["bulk-only reset"] += 1

    async def _cancel(self, pending: list[Pending]) -> None:
        for transfer in pending:
            if not transfer.done:
                transfer.cancel()
                self._counts["cancel"] += 1
        for transfer in pending:
            await transfer


async def work(driver: Driver, chance: random.Random, shadow: Shadow, generation: int, counts: Counter[str]) -> None:
    """Do one operation."""
    kind = chance.choices(("read", "write", "flush"), (45, 50, 5))[0]
    cut = chance.random() < 0.2
    count = chance.choice(COUNTS)
    # Half of the operations overlap in a small part of the disk.
    lba = chance.randrange(min(BLOCKS - count, 200) if chance.random() < 0.5 else BLOCKS - count)
    data = pattern(lba, count, generation) if kind == "write" else b""
    counts[kind] += 1
    try:
        if kind == "read":
            shadow.read(lba, await driver.read(lba, count, cut=cut))
        elif kind == "write":
            await driver.write(lba, data, cut=cut)
            shadow.wrote(lba, data)
        else:
            await driver.flush(cut=cut)
    except Interrupted as interrupted:
        if kind == "write":
            shadow.may_have_written(lba, data[: interrupted.sent])


async def test_operations_match_a_shadow(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(BLOCKS * BLOCK))
    shadow, counts = Shadow(), Counter[str]()
    device = disk_device(image)
    number = 0
    try:
        while number < OPERATIONS:
            async with MemoryGuest(device) as guest:
                await guest.enumerate()
                driver = Driver(guest, chance, counts)
                await driver.ready()
                for _ in range(REPLUGGED_EVERY):
                    number += 1
                    if number % COLD_EVERY == 0:
                        forget_cached(image)
                    await work(driver, chance, shadow, number, counts)
                assert not guest.violations
    except BaseException as error:
        error.add_note(f"seed {SEED}, operation {number}")
        raise
    finally:
        await device.dispose()
    shadow.read(0, image.read_bytes())
    for event in ("interrupted", "cancel", "port reset", "bulk-only reset", "flush"):
        assert counts[event] > OPERATIONS // 50, counts


def forget_cached(image: Path) -> None:
    """Remove the image from the page cache, so that reads go through a thread."""
    with image.open("r+b") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
