"""The sequences of ``tests.scsi.test_sequences``, through Bulk-Only Transport."""

from __future__ import annotations

import re

import pytest
from tests.scsi.test_sequences import CDROMS, DISKS, SERIAL
from tests.virtual.bulk_only import Guest

from farplug.store import ReadDone, Store, WriteDone
from farplug.store.base import Stopped, never_stopped
from farplug.usb import Buffer
from farplug.virtual import VirtualDevice, cdrom_device, disk_device, drives_of

PADDING = 100
"""Bytes that a host expects beyond the length of the data."""


class Zeros(Store):
    """Any number of blocks of zeros; writes are dropped."""

    name = "zeros"
    unmaps = True

    def __init__(self, block_count: int, block_size: int) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self.serial_number = SERIAL

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        assert offset + length <= self.block_count * self.block_size
        done(bytes(length), None)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        done(None)

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        done(None)

    def flush(self, done: WriteDone) -> None:
        done(None)

    async def close(self) -> None: ...


async def replay(device: VirtualDevice, sequence: list[tuple[str, str]], padding: int) -> None:
    guest = await Guest.plug(device, attention=True)
    block = 2048 if drives_of(device) else 512
    for line, (cdb, answer) in enumerate(sequence):
        where = f"line {line}: {cdb}"
        if cdb == "insert":
            assert drives_of(device)
            await drives_of(device)[0].insert(Zeros(100, 2048))
        elif re.fullmatch(r"\w\w/\w\w/\w\w", answer):
            result = guest.command(cdb, receive=padding)
            assert (result.status, result.residue, result.data) == (1, padding, bytes(padding)), where
        elif answer.startswith("read"):
            length = int(answer.split()[-1]) * block
            result = guest.command(cdb, receive=length)
            assert (result.status, result.residue, result.data) == (0, 0, bytes(length)), where
        elif answer.startswith(("write", "receive")):
            count = int(answer.split()[-1])
            if not answer.startswith("receive"):  # parameters have their own test
                assert guest.command(cdb, send=bytes(count * block)).status == 0, where
        elif re.match(r"[0-9a-f]{2,}\b", answer):
            data = bytes.fromhex(answer)
            result = guest.command(cdb, receive=len(data) + padding)
            assert (result.status, result.residue, result.data) == (0, padding, data + bytes(padding)), where
        else:
            result = guest.command(cdb, receive=padding)
            assert (result.status, result.residue) == (0, padding), where
    await device.close()
    await device.dispose()


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("system", DISKS)
async def test_disk(system: str, padding: int) -> None:
    await replay(disk_device(Zeros(0xF00000, 512)), DISKS[system], padding)


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("system", CDROMS)
async def test_cdrom(system: str, padding: int) -> None:
    await replay(cdrom_device(Zeros(0x54321, 2048)), CDROMS[system], padding)
