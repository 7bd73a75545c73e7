"""Test a device of your own without a VM: read a block of a disk in memory, as a guest's driver does.

python -m pytest -o asyncio_mode=auto examples/test_own_disk.py

Needs pytest and pytest-asyncio.
"""

from __future__ import annotations

import struct

from farplug.store import MemoryStore
from farplug.testing.memory import MemoryGuest
from farplug.virtual.disk import disk_device

ENDPOINT_IN, ENDPOINT_OUT = 0x81, 0x02


async def command(guest: MemoryGuest, cdb: bytes, length: int) -> tuple[bytes, int]:
    """Run a SCSI command over Bulk-Only Transport; return the data that it reads, and its status (0: passed)."""
    wrapper = struct.pack("<4sIIBBB16s", b"USBC", 1, length, 0x80, 0, len(cdb), cdb)
    await guest.bulk_out(ENDPOINT_OUT, wrapper)
    data = await guest.bulk_in(ENDPOINT_IN, length) if length else b""
    return data, (await guest.bulk_in(ENDPOINT_IN, 13))[12]


async def test_a_block_is_read() -> None:
    """Read the fourth block."""
    store = MemoryStore(bytes(512) * 3 + b"hello".ljust(512, b"!") + bytes(512))
    async with MemoryGuest(disk_device(store)) as guest:
        await guest.enumerate()
        while (await command(guest, bytes(6), 0))[1]:  # TEST UNIT READY: once refused, because of the reset
            await command(guest, bytes((0x03, 0, 0, 0, 18, 0)), 18)  # REQUEST SENSE says why
        data, status = await command(guest, struct.pack(">BBIBHB", 0x28, 0, 3, 0, 1, 0), 512)  # READ(10)
        assert data.startswith(b"hello!!!")
        assert status == 0
