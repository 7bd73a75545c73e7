"""A small Bulk-Only initiator in memory, for the tests of the disk."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farplug.store import MemoryStore, ReadDone, WriteDone
from farplug.store.base import Stopped, never_stopped
from farplug.usb import Buffer, DeviceEvent, Setup, Speed, Status, Transfer, TransferType
from farplug.virtual import VirtualDevice, disk_device

IN, OUT, CONTROL_IN, CONTROL_OUT = 0x81, 0x02, 0x80, 0x00


class Listener:
    """Keeps the events of a virtual device without receptions."""

    def __init__(self) -> None:
        self.events: list[DeviceEvent] = []

    def happened(self, event: DeviceEvent) -> None:
        self.events.append(event)

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        raise AssertionError

    def reception_ended(self, endpoint: int, status: Status) -> None:
        raise AssertionError

    def lost(self, error: Exception | None) -> None:
        raise AssertionError


class Pattern(MemoryStore):
    """A store in memory that can fail, and that can hold its completions until they are released."""

    def __init__(self, blocks: int = 64, *, read_only: bool = False, unmaps: bool = False) -> None:
        content = b"".join(struct.pack("<I", block) * 128 for block in range(blocks))
        super().__init__(content, read_only=read_only, serial_number="0123456789ABCDEF")
        self.unmaps = unmaps
        self.original = content
        self.log: list[str] = []
        self.error: OSError | None = None
        self.holding = False
        self.held: list[tuple[WriteDone | None, ReadDone | None, Buffer]] = []

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        self.log.append(f"read {offset} {length}")
        data = b"" if self.error else bytes(self.content[offset : offset + length])
        if self.holding:
            self.held.append((None, done, data))
        else:
            done(data, self.error)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        self.log.append(f"write {offset} {len(data)}")
        if self.error is None:
            self.content[offset : offset + len(data)] = data
        if self.holding:
            self.held.append((done, None, b""))
        else:
            done(self.error)

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self.log.append(f"{'unmap' if unmap else 'zero'} {offset} {length}")
        if self.error is None:
            self.content[offset : offset + length] = bytes(length)
        if self.holding:
            self.held.append((done, None, b""))
        else:
            done(self.error)

    def flush(self, done: WriteDone) -> None:
        self.log.append("flush")
        if self.holding:
            self.held.append((done, None, b""))
        else:
            done(self.error)

    def release(self, count: int = 1000) -> None:
        for _ in range(min(count, len(self.held))):
            write_done, read_done, data = self.held.pop(0)
            if write_done is not None:
                write_done(self.error)
            elif read_done is not None:
                read_done(data, self.error)


@dataclass
class Result:
    """The result of a command: the status of the CSW (None: there was none), residue and data."""

    status: int | None
    residue: int
    data: bytes

    @property
    def sense(self) -> tuple[int, int, int]:
        """Return the sense of a REQUEST SENSE."""
        return self.data[2], self.data[12], self.data[13]


def pieces(length: int, sizes: Iterable[int]) -> list[int]:
    """Cut a length into transfers of these sizes, the last one repeated."""
    cut: list[int] = []
    size = length
    iterator = iter(sizes)
    while length:
        size = next(iterator, size)
        cut.append(min(size, length))
        length -= cut[-1]
    return cut


class Guest:
    """Drives a device with one disk. Each transfer must be completed once."""

    def __init__(self, device: VirtualDevice) -> None:
        self.device = device
        self.listener = Listener()
        self.tag = 0
        self.completed: list[Transfer] = []

    @classmethod
    async def plug(cls, device: VirtualDevice, *, attention: bool = False) -> Guest:
        guest = cls(device)
        await device.open(guest.listener)
        await guest.enumerate()
        if not attention:
            assert guest.command("00 00 00 00 00 00").status == 1
        return guest

    async def enumerate(self) -> None:
        assert await self.device.reset() is Status.SUCCESS
        assert await self.device.set_configuration(1) is Status.SUCCESS

    def send(self, data: bytes) -> Transfer:
        return self._submit(Transfer(TransferType.BULK, OUT, self.completed.append, data=data))

    def receive(self, length: int) -> Transfer:
        return self._submit(Transfer(TransferType.BULK, IN, self.completed.append, length=length))

    def control(self, setup: bytes, data: bytes = b"") -> Transfer:
        parsed = Setup.parse(setup[:8])
        endpoint = CONTROL_IN if parsed.request_type & 0x80 else CONTROL_OUT
        transfer = Transfer(
            TransferType.CONTROL, endpoint, self.completed.append, length=parsed.length, data=data, setup=parsed
        )
        return self._submit(transfer)

    def _submit(self, transfer: Transfer) -> Transfer:
        self.device.submit(transfer)
        return transfer

    def cbw(self, cdb: bytes, length: int, to_host: bool, *, lun: int = 0, cdb_length: int | None = None) -> bytes:
        self.tag += 1
        flags = 0x80 if to_host else 0
        size = len(cdb) if cdb_length is None else cdb_length
        return struct.pack("<4sIIBBB16s", b"USBC", self.tag, length, flags, lun, size, cdb.ljust(16, b"\xff"))

    def csw(self, transfer: Transfer) -> tuple[int, int]:
        """Return status and residue of a CSW."""
        assert transfer.status is Status.SUCCESS
        signature, tag, residue, status = struct.unpack("<4sIIB", transfer.reply)
        assert (signature, tag) == (b"USBS", self.tag)
        return status, residue

    def command(
        self,
        cdb: str | bytes,
        *,
        receive: int = 0,
        send: bytes = b"",
        lun: int = 0,
        cdb_length: int | None = None,
        sizes: Sequence[int] = (),
        early: bool = False,
    ) -> Result:
        """Issue a command whose transfers all end immediately.

        Args:
            cdb: hex digits, or bytes.
            receive: H, for data-in.
            send: the data of a data-out; its length is H.
            lun: bCBWLUN.
            cdb_length: bCBWCBLength, if it is to be another than the CDB's.
            sizes: of the transfers in the data phase.
            early: queue the reads before the CBW is sent.
        """
        raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
        wrapper = self.cbw(raw, receive or len(send), bool(receive), lun=lun, cdb_length=cdb_length)
        cuts = pieces(receive or len(send), sizes)
        queued = [self.receive(size) for size in (*(cuts if receive else ()), 13)] if early else []
        assert self.send(wrapper).status is Status.SUCCESS
        data = bytearray()
        if receive:
            for index, size in enumerate(cuts):
                transfer = queued[index] if early else self.receive(size)
                assert transfer.status is Status.SUCCESS
                data += transfer.reply
                if transfer.actual < size:
                    assert not early
                    break
        else:
            for size in cuts:
                transfer = self.send(send[len(data) : len(data) + size])
                assert (transfer.status, transfer.actual) == (Status.SUCCESS, size)
                data += send[len(data) : len(data) + size]
        status, residue = self.csw(queued[-1] if early else self.receive(13))
        return Result(status, residue, bytes(data) if receive else b"")

    def sense(self) -> tuple[int, int, int]:
        result = self.command("03 00 00 00 12 00", receive=18)
        assert (result.status, result.residue, len(result.data)) == (0, 0, 18)
        return result.sense


def make(store: Pattern, speed: Speed = Speed.SUPER) -> VirtualDevice:
    return disk_device(store, speeds=(speed,))


def read10(lba: int, count: int) -> bytes:
    return struct.pack(">BBIxHx", 0x28, 0, lba, count)


def write10(lba: int, count: int, *, fua: bool = False) -> bytes:
    return struct.pack(">BBIxHx", 0x2A, 8 * fua, lba, count)


async def settle(transfer: Transfer) -> Transfer:
    """Wait for a transfer that ends later."""
    if transfer.status is None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        on_complete = transfer.on_complete

        def complete(transfer: Transfer) -> None:
            on_complete(transfer)
            ended.set_result(None)

        transfer.on_complete = complete
        await ended
    return transfer
