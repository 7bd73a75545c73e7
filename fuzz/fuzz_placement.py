"""Fuzz where data lands: every block that a guest writes has its number, and a number of its command.

The guest cuts data anywhere, cancels transfers (with streams it never sends them again, otherwise it does, in order, as
QEMU), aborts commands, and resets pipes and the device; the store is late. It uses Bulk-Only Transport, and Attached
SCSI with and without streams.

No block is in a wrong place or torn; a block has the data of a command that was not finished before another one, which
succeeded, began; a read-only disk does not change; each transfer is completed once.
"""

from __future__ import annotations

import asyncio
import random
import struct
from bisect import insort
from collections import deque
from dataclasses import dataclass

from farplug.usb import Setup, Speed, Status, Transfer, TransferType
from farplug.virtual import StorageTransport, VirtualDevice, disk_device
from farplug.virtual.iu import IuId, TaskFunction
from harness import Listener, counts, raise_logged, run
from late_store import BLOCK_SIZE, LateStore

BLOCKS = 64
MAGIC = 0xB10C
HEADER = struct.Struct("<HHI")
COMMAND, STATUS, DATA_IN, DATA_OUT = 0x04, 0x83, 0x81, 0x02
MAX_TAG = 30
MANAGEMENT_TAG = 31
STATUS_READS = 4


def block(lba: int, serial: int) -> bytes:
    return HEADER.pack(MAGIC, lba, serial) * (BLOCK_SIZE // HEADER.size)


@dataclass(eq=False)
class Write:
    """A WRITE (10). Times are numbers of actions of the guest."""

    serial: int
    lba: int
    count: int
    begun: int
    ended: int | None = None
    good: bool = False

    def covers(self, lba: int) -> bool:
        return self.lba <= lba < self.lba + self.count

    @property
    def data(self) -> bytes:
        return b"".join(block(self.lba + number, self.serial) for number in range(self.count))

    def cdb(self, rng: random.Random) -> bytes:
        return struct.pack(">BBIBHB6x", 0x2A, rng.choice((0, 8)), self.lba, 0, self.count, 0)


class Guest:
    """What the guests of both transports have in common."""

    def __init__(self, rng: random.Random, device: VirtualDevice, speed: Speed) -> None:
        self.rng = rng
        self.device = device
        self.packet_size = 1024 if speed is Speed.SUPER else 512
        self.now = 0
        self.writes: list[Write] = []
        self.submitted: list[Transfer] = []
        self.completed: list[Transfer] = []
        self._processed = 0

    def submit(self, endpoint: int, *, data: bytes = b"", length: int = 0, stream: int = 0) -> Transfer:
        transfer = Transfer(
            TransferType.BULK, endpoint, self.completed.append, length=length, data=data, stream_id=stream
        )
        self.submitted.append(transfer)
        self.device.submit(transfer)
        return transfer

    def control(self, setup: Setup) -> None:
        transfer = Transfer(TransferType.CONTROL, setup.request_type & 0x80, self.completed.append, setup=setup)
        self.submitted.append(transfer)
        self.device.submit(transfer)

    @property
    def pending(self) -> list[Transfer]:
        return [transfer for transfer in self.submitted if transfer.status is None]

    def new_write(self) -> Write:
        lba = self.rng.randrange(BLOCKS)
        count = self.rng.randrange(1, min(BLOCKS - lba, 12) + 1)
        write = Write(len(self.writes) + 1, lba, count, self.now)
        self.writes.append(write)
        return write

    def cut(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return pieces of data with their offsets."""
        pieces = []
        at, size = 0, self.packet_size
        while at < len(data):
            length = self.rng.choice((size, 2 * size, 512, len(data), len(data), size * self.rng.randrange(1, 9)))
            pieces.append((at, data[at : at + length]))
            at += length
        return pieces

    def cancel(self) -> None:
        """Cancel a transfer."""
        if self.pending:
            self.device.cancel(self.rng.choice(self.pending))
            counts["cancels"] += 1

    async def reset(self) -> None:
        for write in self.writes:
            if write.ended is None:
                write.ended = self.now
        await self.device.reset()
        await self.device.set_configuration(1)
        self.process()
        self.forget()
        counts["resets"] += 1

    def process(self) -> None:
        """Handle the completed transfers."""
        while self._processed < len(self.completed):
            transfer = self.completed[self._processed]
            self._processed += 1
            self.handle(transfer)

    async def act(self) -> None:
        self.now += 1
        match self.rng.randrange(10):
            case 0 | 1 | 2:
                self.write()
            case 3 | 4 | 5 | 6:
                self.send()
            case 7:
                self.cancel()
            case 8:
                self.abort()
            case _ if self.rng.random() < 0.15:
                await self.reset()
        self.process()

    def handle(self, transfer: Transfer) -> None:
        raise NotImplementedError

    def write(self) -> None:
        """Begin a command."""
        raise NotImplementedError

    def send(self) -> None:
        """Send the next piece of data."""
        raise NotImplementedError

    def abort(self) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what is not sent yet, after a reset."""
        raise NotImplementedError


class BulkOnlyGuest(Guest):
    """Sends everything in one order, and may send commands before the status of those before them.

    It either cancels all OUT transfers from the newest one to some other, and sends them again in order, or it cancels
    one that others follow, and never sends its data.
    """

    def __init__(self, rng: random.Random, device: VirtualDevice, speed: Speed) -> None:
        super().__init__(rng, device, speed)
        self._unsent: deque[bytes] = deque()
        self._sends_again = rng.random() < 0.7

    def cancel(self) -> None:
        out = [transfer for transfer in self.pending if transfer.endpoint == DATA_OUT]
        if not out or self.rng.random() < 0.3:
            out = [transfer for transfer in self.pending if transfer.endpoint == DATA_IN][:1]
        elif self._sends_again:
            out = out[self.rng.randrange(len(out)) :]
        elif len(out) > 1:
            out = [self.rng.choice(out[:-1])]
        else:
            return
        for transfer in reversed(out):
            self.device.cancel(transfer)
            counts["cancels"] += 1

    def write(self) -> None:
        write = self.new_write()
        cbw = struct.pack("<4sIIBBB16s", b"USBC", write.serial, len(write.data), 0, 0, 10, write.cdb(self.rng))
        self._unsent += [cbw, *(data for _, data in self.cut(write.data))]

    def send(self) -> None:
        if self._unsent:
            data = self._unsent.popleft()
            self.submit(DATA_OUT, data=data)
            if data.startswith(b"USBC"):
                self.submit(DATA_IN, length=13)

    def handle(self, transfer: Transfer) -> None:
        if transfer.endpoint == DATA_OUT and transfer.status is Status.CANCELLED:
            if self._sends_again:
                self._unsent.appendleft(bytes(transfer.data))
        elif transfer.endpoint == DATA_IN and transfer.status is Status.CANCELLED:
            self.submit(DATA_IN, length=13)
        elif transfer.endpoint == DATA_IN and len(transfer.reply) == 13:
            _, serial, _, status = struct.unpack("<4sIIB", transfer.reply)
            write = self.writes[serial - 1]
            write.ended, write.good = self.now, status == 0
            counts["good" if write.good else "failed"] += 1

    def abort(self) -> None:
        """Reset the function (Bulk-Only Transport, chapter 5.3.4)."""
        if self.rng.random() < 0.3:
            for transfer in self.pending:
                self.device.cancel(transfer)
            self.control(Setup(0x21, 0xFF))
            self.control(Setup(0x02, 1, 0, DATA_IN))
            self.control(Setup(0x02, 1, 0, DATA_OUT))
            for write in self.writes:
                if write.ended is None:
                    write.ended = self.now
            self.process()
            self.forget()

    def forget(self) -> None:
        self._unsent.clear()
        for transfer in self.pending:
            self.device.cancel(transfer)
        self._processed = len(self.completed)


class AttachedGuest(Guest):
    """Sends data with streams at any time, otherwise after a READY IU."""

    def __init__(self, rng: random.Random, device: VirtualDevice, speed: Speed) -> None:
        super().__init__(rng, device, speed)
        self._streams = speed is Speed.SUPER
        self._by_tag: dict[int, Write] = {}
        self._unsent: dict[int, list[tuple[int, bytes]]] = {}
        """The pieces of data to send, by tag, in order."""
        self._ready = 0
        """The tag of the last READY IU."""
        self._tags: dict[Transfer, int] = {}
        """The tags of data transfers, and of status transfers with streams."""
        self._origins: dict[Transfer, tuple[Write, int]] = {}
        """The command and the offset of each data transfer: its tag may belong to another command by now."""

    def _read_status(self, tag: int) -> None:
        if self._streams:
            self._tags[self.submit(STATUS, length=96, stream=tag)] = tag
        else:
            while sum(transfer.endpoint == STATUS for transfer in self.pending) < STATUS_READS:
                self.submit(STATUS, length=96)
                self.process()

    def write(self) -> None:
        free = [tag for tag in range(1, MAX_TAG + 1) if tag not in self._by_tag]
        if not free:
            return
        tag, write = self.rng.choice(free), self.new_write()
        self._by_tag[tag] = write
        self._unsent[tag] = self.cut(write.data)
        self._read_status(tag)
        if self._streams and self.rng.random() < 0.4:
            while self._unsent[tag]:
                self._send(tag)
        attribute = self.rng.choice((0, 0, 0, 1, 2))
        cdb = write.cdb(self.rng)
        self.submit(COMMAND, data=struct.pack(">BxHBxBx8s16s", IuId.COMMAND, tag, attribute, 0, bytes(8), cdb))

    def _send(self, tag: int) -> None:
        offset, data = self._unsent[tag].pop(0)
        stream = tag if self._streams else 0
        transfer = Transfer(
            TransferType.BULK, DATA_OUT, self.completed.append, length=len(data), data=data, stream_id=stream
        )
        self._tags[transfer], self._origins[transfer] = tag, (self._by_tag[tag], offset)
        self.submitted.append(transfer)
        self.device.submit(transfer)

    def send(self) -> None:
        tags = [tag for tag, pieces in self._unsent.items() if pieces and (self._streams or tag == self._ready)]
        if tags:
            self._send(self.rng.choice(tags))

    def handle(self, transfer: Transfer) -> None:
        tag = self._tags.get(transfer, 0)
        if transfer.endpoint == DATA_OUT and transfer.status is Status.CANCELLED:
            write, offset = self._origins[transfer]
            if not self._streams and self._by_tag.get(tag) is write:  # else the data is never sent: the command fails
                insort(self._unsent[tag], (offset, bytes(transfer.data)))
        elif transfer.endpoint == STATUS and transfer.status is Status.CANCELLED:
            self._read_status(tag)
        elif transfer.endpoint == STATUS and transfer.reply:
            kind, tag = struct.unpack_from(">BxH", transfer.reply)
            if kind == IuId.WRITE_READY:
                self._ready = tag
            elif kind == IuId.SENSE and tag in self._by_tag:
                write = self._end(tag)
                write.good = not transfer.reply[6]
                counts["good" if write.good else "failed"] += 1
            if not self._streams:
                self._read_status(0)

    def _end(self, tag: int) -> Write:
        write = self._by_tag.pop(tag)
        write.ended = self.now
        del self._unsent[tag]
        if self._ready == tag:
            self._ready = 0
        return write

    def abort(self) -> None:
        functions = (
            TaskFunction.ABORT_TASK,
            TaskFunction.ABORT_TASK_SET,
            TaskFunction.LOGICAL_UNIT_RESET,
            TaskFunction.I_T_NEXUS_RESET,
        )
        function, managed = self.rng.choice(functions), self.rng.randrange(1, MAX_TAG + 1)
        self._read_status(MANAGEMENT_TAG)
        self.process()
        iu = struct.pack(">BxHBxH8s", IuId.TASK_MANAGEMENT, MANAGEMENT_TAG, function, managed, bytes(8))
        self.submit(COMMAND, data=iu)
        # A guest that aborts a command cancels its transfers, and sends no more of its data.
        aborted = [managed] if function is TaskFunction.ABORT_TASK else list(self._by_tag)
        for tag in aborted:
            if tag in self._by_tag:
                self._end(tag)
                for transfer in self.pending:
                    if transfer.stream_id == tag:
                        self.device.cancel(transfer)
        self._processed = len(self.completed)
        counts["aborts"] += 1

    def forget(self) -> None:
        self._by_tag.clear()
        self._unsent.clear()
        self._ready = 0
        self._processed = len(self.completed)


def check_blocks(store: LateStore, writes: list[Write]) -> None:
    for lba in range(BLOCKS):
        good = [write for write in writes if write.good and write.covers(lba)]
        content = bytes(store.content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE])
        if not any(content):
            assert not good, f"block {lba}: the data of command {good[-1].serial} is missing"
            continue
        assert not store.read_only
        magic, number, serial = HEADER.unpack_from(content)
        assert content == content[: HEADER.size] * (BLOCK_SIZE // HEADER.size), f"block {lba} is torn"
        assert (magic, number) == (MAGIC, lba), f"block {lba} has the data of block {number}"
        found = writes[serial - 1]
        assert found.covers(lba)
        for other in good:
            assert other is found or found.ended is None or found.ended >= other.begun, (
                f"block {lba} has the data of command {serial}, command {other.serial} is later"
            )
        counts["blocks written"] += 1


async def case(rng: random.Random) -> None:
    speed = rng.choice((Speed.SUPER, Speed.HIGH))
    transport = rng.choice((StorageTransport.UAS, StorageTransport.UAS, StorageTransport.BOT))
    store = LateStore(rng, BLOCKS, read_only=rng.random() < 0.1)
    device = disk_device(store, transport=transport, speeds=(speed,))
    kind = BulkOnlyGuest if transport is StorageTransport.BOT else AttachedGuest
    guest: Guest = kind(rng, device, speed)
    await device.open(Listener())
    await guest.reset()
    for _ in range(rng.randrange(200)):
        await guest.act()
        store.go(rng.choice((0, 0, 1, 3)))
        guest.process()
    store.go_all()
    guest.process()
    await device.close()
    await device.dispose()
    assert len(guest.completed) == len(guest.submitted) == len(set(guest.completed))
    check_blocks(store, guest.writes)
    counts["commands"] += len(guest.writes)


def one_case(rng: random.Random) -> None:
    asyncio.run(case(rng))


if __name__ == "__main__":
    raise_logged()
    run("placement", one_case)
