"""What one guest may use of this process: work in a turn of the event loop, and memory.

Work is counted, not timed (:mod:`tests.turns`): ``bench/turns.py`` measures the same attacks.
"""

from __future__ import annotations

import asyncio
import random
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.long import every_pair
from tests.redirection.scripted import BULK_IN, ScriptedDevice
from tests.turns import TurnMeter

from farplug.redirection import pending_requests
from farplug.store import FileStore, MemoryStore, OverlayStore, Store
from farplug.store.base import ZERO_STEP, Stopped, never_stopped
from farplug.store.threaded import MAX_INLINE, ThreadedStore
from farplug.testing.memory import MemoryGuest
from farplug.usb import Speed, Status
from farplug.usb.share import MAX_MEMORY, PACKET_WORK, TURN_WORK
from farplug.usb.types import DescriptorType
from farplug.usbredir import packets
from farplug.virtual import VirtualDevice, disk_device
from farplug.virtual.disk import Disk
from farplug.virtual.job import STEP_MEMORY
from farplug.virtual.storage_transport import StorageTransport

SIZE = 32 << 20
RECEIVED = 24 << 20
"""Bytes that the guest takes of a READ, all of them requested before the command."""
BLOCKS = 0xFFFF
"""The most blocks of a command, nearly all of the disk."""
COMMAND_PIPE, STATUS_PIPE, DATA_IN, DATA_OUT = 0x04, 0x83, 0x81, 0x02

COMMANDS: dict[str, tuple[bytes, int, bytes]] = {
    "READ": (struct.pack(">BBQIBB", 0x88, 0, 0, BLOCKS, 0, 0), BLOCKS * 512, b""),
    "READ FUA": (struct.pack(">BBQIBB", 0x88, 8, 0, BLOCKS, 0, 0), BLOCKS * 512, b""),
    "VERIFY": (struct.pack(">BBQIBB", 0x8F, 0, 0, BLOCKS, 0, 0), 0, b""),
    "VERIFY(10)": (struct.pack(">BBIBHB", 0x2F, 0, 0, 0, BLOCKS, 0), 0, b""),
    "VERIFY BYTCHK": (struct.pack(">BBQIBB", 0x8F, 2, 0, 16384, 0, 0), 0, bytes(8 << 20)),
    "WRITE": (struct.pack(">BBQIBB", 0x8A, 0, 0, 16384, 0, 0), 0, bytes(8 << 20)),
    "WRITE AND VERIFY": (struct.pack(">BBQIBB", 0x8E, 0, 0, 16384, 0, 0), 0, bytes(8 << 20)),
    "WRITE SAME": (struct.pack(">BBQIBB", 0x93, 0, 0, BLOCKS, 0, 0), 0, b"\xaa" * 512),
    "WRITE SAME zeros": (struct.pack(">BBQIBB", 0x93, 0, 0, BLOCKS, 0, 0), 0, bytes(512)),
    "WRITE SAME NDOB": (struct.pack(">BBQIBB", 0x93, 1, 0, BLOCKS, 0, 0), 0, b""),
    "UNMAP": (
        struct.pack(">BBIBHB", 0x42, 0, 0, 0, 8 + 16 * 256, 0),
        0,
        struct.pack(">HH4x", 6 + 16 * 256, 16 * 256)
        + b"".join(struct.pack(">QI4x", number * 255, 255) for number in range(256)),
    ),
    "SYNCHRONIZE CACHE": (struct.pack(">BBIBHB", 0x35, 0, 0, 0, 0, 0), 0, b""),
}
"""Every command that takes longer for more blocks: its CDB, the data-in that it returns, its data-out."""


def make_image(folder: Path) -> Path:
    path = folder / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def raw(path: Path) -> Store:
    return FileStore.open(make_image(path))


def fragmented(path: Path) -> Store:
    """Return a snapshot in which every second cluster is in another file."""
    store = OverlayStore.open(make_image(path), path / "changes")
    for cluster in range(0, SIZE // 4096, 2):
        store._file.clusters.mark(cluster, cluster + 1)
    return store


def memory(path: Path) -> Store:
    store = MemoryStore(SIZE)
    store.unmaps = True
    return store


@asynccontextmanager
async def plugged(device: VirtualDevice) -> AsyncIterator[MemoryGuest]:
    async with MemoryGuest(device, timeout=60) as guest:
        await guest.enumerate()
        yield guest
    await device.dispose()


def commands_of_uas(guest: MemoryGuest, cdb: bytes, receive: int, send: bytes, count: int) -> list[packets.BulkPacket]:
    """Return the packets of ``count`` commands at a time."""
    found: list[packets.BulkPacket] = []
    for tag in range(1, count + 1):
        iu = struct.pack(">BxHBxBx8s16s", 1, tag, 0, 0, bytes(8), cdb)
        found.append(bulk(guest, STATUS_PIPE, length=64, stream=tag))
        found += [bulk(guest, DATA_IN, length=1 << 20, stream=tag) for _ in range(min(RECEIVED, receive) >> 20)]
        found.append(bulk(guest, COMMAND_PIPE, iu))
        step = 1 << 20
        found += [bulk(guest, DATA_OUT, send[at : at + step], stream=tag) for at in range(0, len(send), step)]
    return found


def commands_of_bot(guest: MemoryGuest, cdb: bytes, receive: int, send: bytes, count: int) -> list[packets.BulkPacket]:
    found: list[packets.BulkPacket] = []
    for tag in range(1, count + 1):
        length = receive or len(send)
        flags = 0x80 if receive else 0
        found += [bulk(guest, DATA_IN, length=1 << 20) for _ in range(min(RECEIVED, receive) >> 20)]
        found.append(bulk(guest, DATA_OUT, struct.pack("<4sIIBBB16s", b"USBC", tag, length, flags, 0, len(cdb), cdb)))
        step = 4 << 20
        found += [bulk(guest, DATA_OUT, send[at : at + step]) for at in range(0, len(send), step)]
        if not receive:
            found.append(bulk(guest, DATA_IN, length=13))
    return found


def bulk(
    guest: MemoryGuest, endpoint: int, data: bytes = b"", *, length: int = 0, stream: int = 0
) -> packets.BulkPacket:
    length = length or len(data)
    stream = 0 if endpoint == COMMAND_PIPE else stream
    return packets.BulkPacket(
        id=guest.new_id(), endpoint=endpoint, status=Status.SUCCESS, length=length, data=data, stream_id=stream
    )


@every_pair(make=[raw, fragmented, memory], transport=[StorageTransport.UAS, StorageTransport.BOT], name=COMMANDS)
async def test_no_command_works_long_in_one_turn(
    make: Callable[[Path], Store],
    transport: StorageTransport,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cdb, receive, send = COMMANDS[name]
    store = make(tmp_path)
    uas = transport is StorageTransport.UAS
    if name == "UNMAP" and not store.unmaps:
        pytest.skip("this file system cannot release space")
    meter = TurnMeter(monkeypatch)
    async with plugged(disk_device(store, transport=transport)) as guest:
        for _ in range(3):  # unit attentions
            ready = (commands_of_uas if uas else commands_of_bot)(guest, bytes(6), 0, b"", 1)
            for answer in [guest.request(packet) for packet in ready]:
                await answer
        count = 1 if receive else 2
        pending = (commands_of_uas if uas else commands_of_bot)(guest, cdb, receive, send, count)
        async with meter:
            answers = [guest.request(packet) for packet in pending]
            for answer, packet in zip(answers, pending, strict=True):
                # No READ ends here: the guest does not take all of its data.
                if not uas or not receive or packet.endpoint != STATUS_PIPE:
                    assert (await answer).status is Status.SUCCESS
    # One turn of the meter may see the end of one turn of the engine, and the next.
    assert meter.most["calls"] <= 2 * (TURN_WORK + MAX_INLINE) // 4096
    assert meter.most["bytes"] <= 2 * (TURN_WORK + max(MAX_INLINE, ZERO_STEP))
    assert meter.most["packets"] <= 2 * TURN_WORK // PACKET_WORK


@pytest.mark.parametrize("make", [raw, fragmented])
async def test_verify_leaves_the_event_loop_alone(
    make: Callable[[Path], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = TurnMeter(monkeypatch)
    async with plugged(disk_device(make(tmp_path), transport=StorageTransport.UAS)) as guest:
        for cdb in [bytes(6)] * 3 + [COMMANDS["VERIFY"][0]] * 2:
            async with meter:
                for answer in [guest.request(packet) for packet in commands_of_uas(guest, cdb, 0, b"", 1)]:
                    await answer
    assert meter.total["calls"] == 0


# Packets with text or lists


def rules(number: int, size: int) -> bytes:
    text = f"-1,-1,-1,-1,1|{number:#x},-1,-1,-1,1|" + "0,0,0,0,0|" * size
    return text[: packets.FilterFilter.MAX_PAYLOAD - 12].rpartition("|")[0].encode()


def filter_packet(text: bytes) -> bytes:
    return struct.pack("<IIQ", 23, len(text) + 1, 0) + text + b"\0"


TEXTS: dict[str, list[bytes]] = {
    "filters that change": [filter_packet(rules(number, 5000)) for number in range(64)],
    "filters with an error at the end": [filter_packet(rules(number, 5000) + b"|x|") for number in range(64)],
    "filters that are too long": [filter_packet(b"0,0,0,0,0|" * 6500) for _ in range(64)],
    "filters of separators": [filter_packet(b"|" * 4000 + b"-1,-1,-1,-1,1") for _ in range(64)],
    "hello again": [struct.pack("<IIQ", 0, 64 + 4 * 32, 0) + b"x" * 64 + bytes(128) for _ in range(300)],
    "long hello again": [struct.pack("<IIQ", 0, 64 + (1 << 20), 0) + bytes(64 + (1 << 20)) for _ in range(4)],
    "alloc_bulk_streams": [struct.pack("<IIQII", 19, 8, 0, 0xFFFFFFFF, 32) for _ in range(300)],
    "free_bulk_streams": [struct.pack("<IIQI", 20, 4, 0, 0xFFFFFFFF) for _ in range(300)],
    "interface_info": [struct.pack("<IIQI128x", 4, 132, 0, 32) for _ in range(300)],
    "ep_info": [struct.pack("<IIQ288x", 5, 288, 0) for _ in range(300)],
    "unknown packets": [struct.pack("<IIQ", 99, 0, 0) for _ in range(300)],
}
"""Packets that carry text or lists, and those that are refused."""


@pytest.mark.parametrize("name", TEXTS)
async def test_no_packets_work_long_in_one_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.transport.memory.PIECE", 16 << 20)
    meter = TurnMeter(monkeypatch)
    async with plugged(disk_device(MemoryStore(1 << 20))) as guest:
        async with meter:
            guest.send_bytes(b"".join(TEXTS[name]))
            while meter.total["packets"] + meter._now["packets"] < len(TEXTS[name]):
                await asyncio.sleep(0)
        assert len(await guest.get_descriptor(DescriptorType.DEVICE, length=18)) == 18
    assert meter.most["text"] <= 2 * packets.FilterFilter.MAX_PAYLOAD
    assert meter.most["packets"] <= 2 * TURN_WORK // PACKET_WORK


async def test_the_same_filter_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = TurnMeter(monkeypatch)
    text = rules(0xEF, 1000)
    async with plugged(disk_device(MemoryStore(1 << 20))) as guest, meter:
        guest.send_bytes(filter_packet(text) * 100)
        while meter.total["packets"] + meter._now["packets"] < 100:
            await asyncio.sleep(0)
    assert meter.total["text"] <= len(text)


# Memory


class Gate(ThreadedStore):
    """A store on a medium that answers when the test opens the gate.

    Attributes:
        occupied: bytes of buffers in the threads.
        most: the most of them.
        zeroed: bytes that were zeroed.
    """

    name = "slow"
    serial_number = "0123456789ABCDEF"
    block_count = 1 << 20

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.zeroing = threading.Event()
        self.occupied = self.most = self.zeroed = 0
        self._lock = threading.Lock()

    def _wait(self, size: int) -> None:
        with self._lock:
            self.occupied += size
            self.most = max(self.most, self.occupied)
        assert self.gate.wait(60)
        with self._lock:
            self.occupied -= size

    def _read_cached(self, data: memoryview, offset: int) -> int:
        return 0

    def _read_blocking(self, data: memoryview, offset: int) -> None:
        self._wait(len(data))

    def _write_blocking(self, data: memoryview, offset: int) -> None:
        self._wait(len(data))

    def _zero_blocking(self, offset: int, length: int, unmap: bool, stopped: Stopped = never_stopped) -> None:
        for _ in range(0, length, 1 << 20):
            if stopped():
                return
            self.zeroing.set()
            self._wait(0)
            self.zeroed += min(length, 1 << 20)

    def _flush_blocking(self) -> None:
        self._wait(0)

    def _close_files(self) -> None: ...


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.gate.set()


@pytest.mark.parametrize("speed", [Speed.HIGH, Speed.SUPER])
@pytest.mark.parametrize("name", ["READ", "VERIFY", "VERIFY BYTCHK", "WRITE", "WRITE SAME", "WRITE SAME NDOB", "UNMAP"])
async def test_commands_that_are_aborted_again_and_again_take_no_memory(
    name: str, speed: Speed, gates: list[Gate]
) -> None:
    units = 4
    gates += [Gate() for _ in range(units)]
    for store in gates:
        store.unmaps = True
    device = VirtualDevice(Disk(*gates, transport=StorageTransport.UAS), serial_number="0" * 16, speeds=(speed,))
    cdb, receive, send = COMMANDS[name]
    sent = send[: 256 << 10]
    streams = speed is Speed.SUPER
    tags = 30 if streams else 200
    most = 0
    async with plugged(device) as guest:

        async def out(data: bytes) -> None:
            nonlocal most
            await guest.bulk_out(COMMAND_PIPE, data)
            most = max(most, guest.redirection.memory)

        for unit in range(units):
            lun = bytes((0, unit)) + bytes(6)
            for _ in range(4):
                for tag in range(1, tags + 1):
                    await out(struct.pack(">BxHBxBx8s16s", 1, tag, 0, 0, lun, cdb))
                    stream = tag if streams else 0
                    if receive:
                        guest.request(bulk(guest, DATA_IN, length=1 << 20, stream=stream)).cancel()
                    if sent:
                        guest.request(bulk(guest, DATA_OUT, sent, stream=stream)).cancel()
                await out(struct.pack(">BxHBxH8s", 5, 31 if streams else 999, 2, 0, lun))  # ABORT TASK SET
        assert most <= MAX_MEMORY
        for store in gates:
            store.gate.set()
        while guest.redirection.memory:
            await asyncio.sleep(0.01)
    assert sum(store.most for store in gates) <= MAX_MEMORY + units * 2 * STEP_MEMORY


@pytest.mark.parametrize("transport", [StorageTransport.UAS, StorageTransport.BOT])
async def test_cancelled_transfers_count_until_the_store_has_finished(
    transport: StorageTransport, gates: list[Gate]
) -> None:
    gates.append(store := Gate())
    device = disk_device(store, transport=transport)
    cdb = struct.pack(">BBQIBB", 0x8A, 0, 0, 4096, 0, 0)
    async with plugged(device) as guest:
        make = commands_of_uas if transport is StorageTransport.UAS else commands_of_bot
        for _ in range(3):
            for answer in [guest.request(packet) for packet in make(guest, bytes(6), 0, b"", 1)]:
                await answer
        written = [guest.request(packet) for packet in make(guest, cdb, 0, bytes(2 << 20), 1)]
        while not store.occupied:
            await asyncio.sleep(0)
        guest.reset()
        for answer in written:
            await answer
        assert guest.redirection.memory >= store.occupied > 0
        store.gate.set()
        while guest.redirection.memory:
            await asyncio.sleep(0.01)


async def test_answers_that_wait_for_the_port_count() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, timeout=60) as guest:
        device.submitted.clear()
        pending = [guest.submit_in(BULK_IN, 1 << 20) for _ in range(8)]
        while len(device.submitted) < 8:
            await asyncio.sleep(0)
        assert guest.redirection.memory == 8 << 20
        for transfer in device.submitted:
            transfer.complete(Status.SUCCESS, bytes(1 << 20))
        assert 8 << 20 >= guest.redirection.memory >= 4 << 20
        for answer in pending:
            await answer
        while guest.redirection.memory:
            await asyncio.sleep(0)


async def test_no_answer_of_a_port_that_closed_counts() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, timeout=60) as guest:
        pending = [guest.submit_in(BULK_IN, 1 << 20) for _ in range(8)]
        while len(device.submitted) < 8:
            await asyncio.sleep(0)
        for transfer in device.submitted:
            transfer.complete(Status.SUCCESS, bytes(1 << 20))
        guest.redirection.port.abort()
        assert pending
        await guest.redirection.closed()
        assert guest.redirection.memory == 0


async def test_a_detach_waits_for_no_zeros_of_aborted_commands(gates: list[Gate]) -> None:
    gates.append(store := Gate())
    device = disk_device(store, transport=StorageTransport.UAS, speeds=(Speed.HIGH,))
    cdb = struct.pack(">BBQIBB", 0x93, 1, 0, 1 << 20, 0, 0)
    async with plugged(device) as guest:
        for _ in range(4):
            for tag in range(1, 201):
                await guest.bulk_out(COMMAND_PIPE, struct.pack(">BxHBxBx8s16s", 1, tag, 0, 0, bytes(8), cdb))
            for number in (998, 999):
                await guest.bulk_out(COMMAND_PIPE, struct.pack(">BxHBxH8s", 5, number, 2, 0, bytes(8)))
        assert store.zeroing.wait(60)
        assert store._writer is not None
        assert store._writer._calls.qsize() == 0
        store.gate.set()
        await guest.redirection.detach()
        assert store.zeroed <= 1 << 20  # not even the rest of the step


# Cancels


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of times that requests were compared or hashed, which is what a search costs."""
    count = [0]

    def equal(one: object, other: object) -> bool:
        count[0] += 1
        return one is other

    def hash_of(one: object) -> int:
        count[0] += 1
        return object.__hash__(one)

    monkeypatch.setattr(pending_requests.Request, "__eq__", equal)
    monkeypatch.setattr(pending_requests.Request, "__hash__", hash_of)
    return count


async def do_reset(guest: MemoryGuest, ids: list[int]) -> None:
    guest.reset()


async def do_detach(guest: MemoryGuest, ids: list[int]) -> None:
    await guest.redirection.detach()


async def do_configure(guest: MemoryGuest, ids: list[int]) -> None:
    await guest.set_configuration(1)


async def do_select(guest: MemoryGuest, ids: list[int]) -> None:
    await guest.set_interface(0, 0)


async def do_cut(guest: MemoryGuest, ids: list[int]) -> None:
    guest.redirection.port.abort()


async def do_newest_first(guest: MemoryGuest, ids: list[int]) -> None:
    guest.send(*(packets.CancelDataPacket(id=id) for id in reversed(ids)))


async def do_oldest_first(guest: MemoryGuest, ids: list[int]) -> None:
    guest.send(*(packets.CancelDataPacket(id=id) for id in ids))


async def do_shuffled(guest: MemoryGuest, ids: list[int]) -> None:
    guest.send(*(packets.CancelDataPacket(id=id) for id in random.Random(5).sample(ids, len(ids))))


CANCELS = [do_reset, do_detach, do_configure, do_select, do_cut, do_newest_first, do_oldest_first, do_shuffled]
QUEUES = [
    (StorageTransport.UAS, Speed.SUPER, DATA_OUT, 1),
    (StorageTransport.UAS, Speed.SUPER, DATA_IN, 1),
    (StorageTransport.UAS, Speed.SUPER, STATUS_PIPE, 1),
    (StorageTransport.UAS, Speed.HIGH, STATUS_PIPE, 0),
    (StorageTransport.BOT, Speed.HIGH, DATA_IN, 0),
    (StorageTransport.BOT, Speed.HIGH, DATA_OUT, 0),
]


@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.parametrize(("transport", "speed", "endpoint", "stream"), QUEUES)
async def test_cancels_take_linear_time(
    cancel: Callable[[MemoryGuest, list[int]], Awaitable[None]],
    transport: StorageTransport,
    speed: Speed,
    endpoint: int,
    stream: int,
    steps: list[int],
) -> None:
    device = disk_device(MemoryStore(1 << 20), transport=transport, speeds=(speed,))
    async with plugged(device) as guest:
        if transport is StorageTransport.BOT and endpoint == DATA_OUT:  # nothing is taken from the queue before its CSW
            await guest.bulk_out(DATA_OUT, struct.pack("<4sIIBBB16s", b"USBC", 1, 0, 0, 0, 6, bytes(6)))
        data = b"" if endpoint & 0x80 else b"x"
        sent = [bulk(guest, endpoint, data, length=0 if data else 512, stream=stream) for _ in range(1000)]
        guest.send(*sent)
        while guest.redirection._protocol.pending < len(sent):
            await asyncio.sleep(0)
        before = steps[0]
        await cancel(guest, [packet.id for packet in sent])
        while guest.redirection._protocol.pending:
            await asyncio.sleep(0)
        assert steps[0] - before <= 20 * len(sent)


async def test_cancels_of_a_device_that_does_not_answer(steps: list[int]) -> None:
    device = ScriptedDevice()
    device.cancels = False
    async with MemoryGuest(device, timeout=60) as guest:
        sent = [bulk(guest, BULK_IN, length=4) for _ in range(1000)]
        guest.send(*sent)
        while len(device.submitted) < len(sent):
            await asyncio.sleep(0)
        before = steps[0]
        await do_shuffled(guest, [packet.id for packet in sent])
        while guest.redirection._protocol.pending:
            await asyncio.sleep(0)
        assert steps[0] - before <= 20 * len(sent)
