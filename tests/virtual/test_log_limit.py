"""A disk whose medium fails: the log lines are limited."""

from __future__ import annotations

import errno
import struct
from contextlib import suppress

import pytest

from farplug.errors import DeviceError
from farplug.rate_limit import BURST, release_logs
from farplug.store import MemoryStore
from farplug.store.base import ReadDone, Stopped, WriteDone, never_stopped
from farplug.testing.memory import MemoryGuest
from farplug.usb.types import Buffer
from farplug.virtual import disk_device
from farplug.virtual.storage_transport import StorageTransport

MANY = 100
READ, WRITE = "28 00 00 00 00 00 00 00 01 00", "2a 00 00 00 00 00 00 00 01 00"
FLUSH, VERIFY = "35 00 00 00 00 00 00 00 00 00", "2f 00 00 00 00 00 00 00 01 00"
ZERO = "41 00 00 00 00 00 00 00 01 00"
COMPARE = "2f 02 00 00 00 00 00 00 01 00"


class FullStore(MemoryStore):
    """A disk on a file system that is full, with bad blocks."""

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        done(OSError(errno.ENOSPC, "No space left on device"))

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        done(b"", OSError(errno.EIO, "Input/output error"))

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        done(OSError(errno.ENOSPC, "No space left on device"))

    def flush(self, done: WriteDone) -> None:
        done(OSError(errno.EIO, "Input/output error"))


async def run(guest: MemoryGuest, cdb: str, *, receive: int = 0, send: int = 0) -> int:
    raw = bytes.fromhex(cdb)
    head = struct.pack("<4sIIBBB", b"USBC", 1, receive or send, 0x80 * bool(receive), 0, len(raw))
    await guest.bulk_out(2, head + raw.ljust(16, b"\0"))
    if receive:
        await guest.bulk_in(0x81, receive)
    if send:
        await guest.bulk_out(2, bytes(send))
    return (await guest.bulk_in(0x81, 13))[12]


@pytest.mark.parametrize(
    ("cdb", "lengths", "text"),
    [
        (READ, {"receive": 512}, "reading at byte 0 failed"),
        (WRITE, {"send": 512}, "writing failed"),
        (FLUSH, {}, "flush failed"),
        (VERIFY, {}, "verify failed"),
        (ZERO, {"send": 512}, "failed"),
        (COMPARE, {"send": 512}, "reading failed"),
    ],
    ids=["read", "write", "flush", "verify", "zero", "compare"],
)
async def test_a_disk_that_fails(
    cdb: str, lengths: dict[str, int], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = disk_device(FullStore(1 << 20), transport=StorageTransport.BOT)
    guest = MemoryGuest(device)
    async with guest:
        await guest.enumerate()
        await run(guest, "00 00 00 00 00 00")  # the unit attention
        caplog.clear()
        before = len(guest.events)
        for _ in range(MANY):
            assert await run(guest, cdb, **lengths) == 1, "the command failed"
        assert len(caplog.messages) == BURST
        assert all(text in message for message in caplog.messages)
        release_logs()
        assert len(caplog.messages) == BURST + 1
        assert caplog.messages[-1].endswith(f"({MANY - BURST - 1} more like this)")
        assert guest.events[before:] == []
        with suppress(DeviceError):  # its flush fails, too
            await guest.redirection.detach()
        guest.faults.clear()
    await device.dispose()
