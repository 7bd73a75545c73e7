"""Errors of a disk's files become sense data for the guest: the disk stays, and works again after the errors."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from farplug.errors import DeviceError
from farplug.store import FileStore, OverlayStore
from farplug.testing.memory import MemoryGuest
from farplug.virtual.disk import disk_device

BULK_IN, BULK_OUT = 0x81, 0x02
BLOCKS = 4096

READ, WRITE, FLUSH = "28 00 00 00 00 00 00 00 08 00", "2a 00 00 00 00 00 00 00 08 00", "35 00 00 00 00 00 00 00 00 00"
REQUEST_SENSE = "03 00 00 00 12 00"
SPACE_ALLOCATION_FAILED, WRITE_ERROR, UNRECOVERED_READ_ERROR = (
    (0x07, 0x27, 0x07),
    (0x03, 0x0C, 0x00),
    (0x03, 0x11, 0x00),
)


async def command(guest: MemoryGuest, cdb: str, *, receive: int = 0, send: bytes = b"") -> tuple[int, bytes]:
    """Run a command over Bulk-Only Transport. Return its status and its data."""
    raw = bytes.fromhex(cdb)
    head = struct.pack("<4sIIBBB", b"USBC", 1, receive or len(send), 0x80 * bool(receive), 0, len(raw))
    await guest.bulk_out(BULK_OUT, head + raw.ljust(16, b"\0"))
    data = await guest.bulk_in(BULK_IN, receive) if receive else b""
    if send:
        await guest.bulk_out(BULK_OUT, send)
    return (await guest.bulk_in(BULK_IN, 13))[12], data


async def run(guest: MemoryGuest, cdb: str) -> int:
    lengths = {READ: {"receive": 4096}, WRITE: {"send": b"x" * 4096}, FLUSH: {}}
    return (await command(guest, cdb, **lengths[cdb]))[0]  # type: ignore[arg-type]


async def sense(guest: MemoryGuest) -> tuple[int, int, int]:
    _, data = await command(guest, REQUEST_SENSE, receive=18)
    return data[2], data[12], data[13]


@contextlib.asynccontextmanager
async def detached(guest: MemoryGuest, *, lossy: bool) -> AsyncIterator[MemoryGuest]:
    """Plug a disk, and detach it: the detach raises if data was lost."""
    raised: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if lossy:
        raised = pytest.raises(DeviceError, match="what was written may be lost")
    with raised:
        async with guest:
            await guest.enumerate()
            await command(guest, "00 00 00 00 00 00")
            yield guest


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize(
    ("call", "number", "cdb", "expected"),
    [
        ("pwrite", errno.ENOSPC, WRITE, SPACE_ALLOCATION_FAILED),
        ("pwrite", errno.EDQUOT, WRITE, SPACE_ALLOCATION_FAILED),
        ("pwrite", errno.EIO, WRITE, WRITE_ERROR),
        ("preadv", errno.EIO, READ, UNRECOVERED_READ_ERROR),
        ("fdatasync", errno.EIO, FLUSH, WRITE_ERROR),
        ("fdatasync", errno.ENOSPC, FLUSH, SPACE_ALLOCATION_FAILED),
    ],
)
async def test_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: bool,
    call: str,
    number: int,
    cdb: str,
    expected: tuple[int, int, int],
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(BLOCKS * 512))
    disk = disk_device(OverlayStore.open(path, tmp_path / "changes") if snapshot else FileStore.open(path))
    async with detached(MemoryGuest(disk), lossy=cdb == FLUSH) as guest:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(number))
            assert await run(guest, cdb) == 1
            assert await sense(guest) == expected
        assert disk.figures is not None
        assert disk.figures.errors == 1
        for again in (READ, WRITE) if cdb == FLUSH else (READ, WRITE, FLUSH):
            assert await run(guest, again) == 0
        if cdb == FLUSH:  # lost data stays lost
            assert await run(guest, FLUSH) == 1
            assert await sense(guest) == expected
    await disk.dispose()


@pytest.mark.parametrize("snapshot", [False, True])
async def test_files_that_shrink(tmp_path: Path, snapshot: bool) -> None:
    path, changes = tmp_path / "disk.raw", tmp_path / "changes"
    path.write_bytes(bytes(BLOCKS * 512))
    disk = disk_device(OverlayStore.open(path, changes) if snapshot else FileStore.open(path))
    async with detached(MemoryGuest(disk), lossy=snapshot) as guest:
        assert await run(guest, WRITE) == 0
        os.truncate(changes if snapshot else path, 0)
        assert await run(guest, READ) == 1
        assert await sense(guest) == UNRECOVERED_READ_ERROR
        if await run(guest, WRITE) == 0:  # in the cache of the disk
            assert await run(guest, FLUSH) == 1
        assert await sense(guest) == WRITE_ERROR
        assert (await command(guest, "00 00 00 00 00 00"))[0] == 0
    await disk.dispose()
