"""A store that blocks delays only its own disk: no PONG, no cancel, no other device.

Nothing is timed: the store completes only when everything else has been answered.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.transport.fake_spice import Channel, FakeSpice, message, ping, running
from tests.virtual.attached_scsi import command_iu

from farplug.redirection import Redirection
from farplug.redirection.events import PortEvent
from farplug.store import FileStore, MemoryStore, OverlayStore, Store
from farplug.testing.memory import MemoryGuest, Pending
from farplug.transport.spice_session import SpiceSession
from farplug.transport.spice_target import SpiceTarget
from farplug.usb import Buffer, Status
from farplug.usb.types import DescriptorType
from farplug.usbredir import packets
from farplug.virtual.disk import disk_device

BULK_IN, BULK_OUT, COMMAND_PIPE, STATUS_PIPE = 0x81, 0x02, 0x04, 0x83
BLOCKS = 4096
DATA, PONG = 101, 3

READ, WRITE, FLUSH = "28 00 00 00 00 00 00 00 08 00", "2a 00 00 00 00 00 00 00 08 00", "35 00 00 00 00 00 00 00 00 00"
TEST_UNIT_READY = "00 00 00 00 00 00"
LENGTH = 8 * 512


class Gate:
    """Blocks every system call that may wait for the medium, from :meth:`shut` on. No data is cached then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self._monkeypatch = monkeypatch

    def shut(self) -> None:
        read = self._slow(os.preadv)

        def preadv(fd: int, buffers: list[Buffer], offset: int, flags: int = 0) -> int:
            if flags & os.RWF_NOWAIT:
                raise BlockingIOError(errno.EAGAIN, "not cached")
            return int(read(fd, buffers, offset))

        self._monkeypatch.setattr(os, "preadv", preadv)
        for name in ("pwrite", "fdatasync"):
            self._monkeypatch.setattr(os, name, self._slow(getattr(os, name)))

    def _slow(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread(), "the event loop would be blocked"
            self.reached.set()
            assert self.opened.wait(100)
            return call(*args)

        return wait


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture(params=["image", "snapshot"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(BLOCKS * 512))
    return FileStore.open(path) if request.param == "image" else OverlayStore.open(path, tmp_path / "changes")


def begin(guest: MemoryGuest, cdb: str, *, tag: int = 1) -> Pending:
    """Begin a command of Bulk-Only Transport. Return its last transfer."""
    reads, writes = cdb == READ, cdb == WRITE
    command = bytes.fromhex(cdb)
    length = LENGTH if reads or writes else 0
    head = struct.pack("<4sIIBBB", b"USBC", tag, length, 0x80 * reads, 0, len(command))
    guest.submit_out(BULK_OUT, head + command.ljust(16, b"\0"))
    if writes:
        guest.submit_out(BULK_OUT, b"x" * length)
    return guest.submit_in(BULK_IN, length if reads else 13)


async def ready(guest: MemoryGuest) -> None:
    """Configure the disk, and clear its unit attentions."""
    await guest.enumerate()
    for _ in range(3):
        await begin(guest, TEST_UNIT_READY)


async def status(guest: MemoryGuest, cdb: str) -> int:
    """Run a command, and return its status."""
    answer = await begin(guest, cdb)
    if cdb == READ:
        answer = await guest.submit_in(BULK_IN, 13)
    assert len(answer.data) == 13
    return int(answer.data[12])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("cdb", [READ, WRITE, FLUSH])
async def test_cancels_and_other_devices_are_not_delayed(store: Store, gate: Gate, cdb: str) -> None:
    disk, other = disk_device(store), disk_device(MemoryStore(BLOCKS * 512))
    async with MemoryGuest(disk) as guest, MemoryGuest(other) as second:
        await ready(guest)
        await ready(second)
        gate.shut()
        pending = begin(guest, cdb)
        await until(gate.reached.is_set)
        assert len(await guest.get_descriptor(DescriptorType.DEVICE, length=18)) == 18
        for command in (READ, WRITE, FLUSH):
            assert await status(second, command) == 0
        assert not pending.done
        pending.cancel()
        answer = await pending
        assert isinstance(answer, packets.BulkPacket)
        assert answer.status == Status.CANCELLED
        assert not gate.opened.is_set()
        gate.opened.set()
        await ready(guest)
        for command in (READ, WRITE, FLUSH):
            assert await status(guest, command) == 0
    await disk.dispose()
    await other.dispose()


async def uas(guest: MemoryGuest, cdb: str, *, tag: int, lun: int = 0) -> tuple[Pending | None, Pending]:
    """Begin a command of USB Attached SCSI. Return its data transfer, if there is one, and its status transfer."""
    reads, writes = cdb == READ, cdb == WRITE
    status = guest.submit_in(STATUS_PIPE, 128, stream_id=tag)
    data = guest.submit_in(BULK_IN, LENGTH, stream_id=tag) if reads else None
    if writes:
        data = guest.submit_out(BULK_OUT, b"x" * LENGTH, stream_id=tag)
    await guest.bulk_out(COMMAND_PIPE, command_iu(bytes.fromhex(cdb), tag, lun=lun))
    return data, status


async def sense(status: Pending) -> int:
    """Return the status in a sense IU."""
    answer = await status
    assert isinstance(answer, packets.BulkPacket)
    return answer.data[6]


@pytest.mark.parametrize("cdb", [READ, WRITE, FLUSH])
async def test_other_commands_and_units_are_not_delayed(store: Store, gate: Gate, cdb: str) -> None:
    disk = disk_device(store, MemoryStore(BLOCKS * 512))
    async with MemoryGuest(disk) as guest:
        await guest.enumerate()
        await guest.set_interface(0, 1)
        await guest.allocate_streams((BULK_IN, BULK_OUT, STATUS_PIPE), 32)
        gate.shut()
        data, status = await uas(guest, cdb, tag=1)
        await until(gate.reached.is_set)
        assert await sense((await uas(guest, TEST_UNIT_READY, tag=2))[1]) == 0
        for command in (READ, WRITE, FLUSH):
            assert await sense((await uas(guest, command, tag=2, lun=1))[1]) == 0
        assert len(await guest.get_descriptor(DescriptorType.DEVICE, length=18)) == 18
        assert not status.done
        if data is not None and not data.done:
            data.cancel()
            assert (await data).status == Status.CANCELLED
        status.cancel()
        assert (await status).status == Status.CANCELLED
        gate.opened.set()
    await disk.dispose()


class SpiceGuest(MemoryGuest):
    """A guest behind a channel of the fake server. The engine of its base class is not used."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def _flush(self) -> None:
        data = b"".join(self._connection.data_to_send())
        if data:
            self._channel.send(message(DATA, data))

    async def serve(self, ponged: Callable[[int], None]) -> None:
        self.resume()
        while True:
            kind, body = await self._channel.receive()
            if kind == PONG:
                ponged(int.from_bytes(body[:4], "little"))
            elif kind == DATA:
                self.data_received(memoryview(body))


@pytest.mark.parametrize("cdb", [READ, WRITE, FLUSH])
async def test_pongs_are_not_delayed(store: Store, gate: Gate, cdb: str) -> None:
    """Two disks in the two channels of one session."""
    happened: list[object] = []
    guests: dict[int, SpiceGuest] = {}

    async def serve(channel: Channel) -> None:
        guest = guests[channel.mess.channel_id] = SpiceGuest(channel)
        await guest.serve(lambda number: happened.append((channel.mess.channel_id, number)))

    def ignore(event: PortEvent) -> None:
        pass

    devices = [disk_device(store), disk_device(MemoryStore(BLOCKS * 512))]
    fake = FakeSpice(vmc_caps=0, usbredir=serve)
    async with running(fake) as number:
        session = await SpiceSession.connect(SpiceTarget(host="127.0.0.1", port=number))
        engines = []
        for device, port in zip(devices, session.ports, strict=True):
            engine = Redirection(port, ignore)
            await engine.open()
            await engine.attach(device)
            engines.append(engine)
        slow, fast = guests[0], guests[1]
        for guest in (slow, fast):
            await guest.wait(lambda guest=guest: guest.connected is not None)  # type: ignore[misc]
            await ready(guest)
        gate.shut()
        pending = begin(slow, cdb)
        await until(gate.reached.is_set)
        for channel in (0, 1):
            fake.of(channel).send(ping(71 + channel))
        fake.main_channel.send(ping(70))
        await until(lambda: len(happened) == 2 and 70 in fake.pongs)
        assert await status(fast, READ) == 0
        happened.append("answered" if pending.done else "still waiting")
        gate.opened.set()
        await pending
        assert sorted(happened[:2]) == [(0, 71), (1, 72)]  # type: ignore[type-var]
        assert happened[2] == "still waiting"
        for engine in engines:
            await engine.close()
        await session.close()
    for device in devices:
        await device.dispose()
