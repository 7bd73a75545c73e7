"""Measure the longest turn of the event loop, and the memory, while a hostile guest does its worst.

``tests/test_share.py`` counts the work of the same attacks; here they are timed. Other programs make turns longer, so
each attack runs several times, and its best run counts; and there is the processor time of the event loop's thread.
"""

from __future__ import annotations

import argparse
import asyncio
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

from farplug.store import FileStore, MemoryStore, OverlayStore, Store
from farplug.testing.memory import MemoryGuest
from farplug.transport import memory
from farplug.usb import Speed, Status
from farplug.usb.types import DescriptorType
from farplug.usbredir import packets
from farplug.virtual import disk_device
from farplug.virtual.storage_transport import StorageTransport

GOAL = 0.050
"""Seconds that no turn may take."""
COMMAND_PIPE, STATUS_PIPE, DATA_IN, DATA_OUT = 0x04, 0x83, 0x81, 0x02
BLOCKS = 0xFFFF
PENDING = 4095

Attack: TypeAlias = Callable[[MemoryGuest], Awaitable[None]]


class Turns:
    """Measures turns of the event loop: the time between two callbacks that follow each other.

    Attributes:
        longest: seconds.
        busiest: seconds of processor time of the event loop's thread.
        memory: the most bytes of the guest's share.
    """

    def __init__(self, guest: MemoryGuest) -> None:
        self.longest = self.busiest = 0.0
        self.memory = 0
        self._guest = guest
        self._last: tuple[float, float] | None = None

    def start(self) -> None:
        """Measure from the next turn on."""
        self._last = None
        self._handle = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        """Stop measuring."""
        self._turn()
        self._handle.cancel()

    def _turn(self) -> None:
        now = time.perf_counter(), time.thread_time()
        if self._last is not None:
            self.longest = max(self.longest, now[0] - self._last[0])
            self.busiest = max(self.busiest, now[1] - self._last[1])
        self._last = now
        self.memory = max(self.memory, self._guest.redirection.memory)
        self._handle = asyncio.get_running_loop().call_soon(self._turn)


@contextmanager
def _snapshot(block_size: int) -> Iterator[Store]:
    """Return a snapshot in which every second cluster is in another file."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        image, size = Path(folder) / "disk.raw", (BLOCKS + 1) * block_size
        with image.open("wb") as file:
            file.truncate(size)
        store = OverlayStore.open(image, Path(folder) / "changes", block_size=block_size)
        for cluster in range(0, size // store._header.cluster_size, 2):
            store._file.clusters.mark(cluster, cluster + 1)
        yield store


@contextmanager
def _raw(block_size: int) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        image = Path(folder) / "disk.raw"
        with image.open("wb") as file:
            file.truncate((BLOCKS + 1) * block_size)
        yield FileStore.open(image, block_size=block_size)


@contextmanager
def _memory(block_size: int) -> Iterator[Store]:
    yield MemoryStore((BLOCKS + 1) * block_size, block_size=block_size)


def _bulk(
    guest: MemoryGuest, endpoint: int, data: bytes = b"", *, length: int = 0, stream: int = 0
) -> packets.BulkPacket:
    return packets.BulkPacket(
        id=guest.new_id(),
        endpoint=endpoint,
        status=Status.SUCCESS,
        length=length or len(data),
        data=data,
        stream_id=stream,
    )


def _commands(cdb: bytes, count: int, *, receive: int = 0, piece: int = 1 << 20, send: bytes = b"") -> Attack:
    """Return an attack of ``count`` commands of Attached SCSI at a time."""

    async def attack(guest: MemoryGuest) -> None:
        requests = []
        for tag in range(1, count + 1):
            iu = struct.pack(">BxHBxBx8s16s", 1, tag, 0, 0, bytes(8), cdb)
            requests += [_bulk(guest, DATA_IN, length=piece, stream=tag) for _ in range(receive // piece)]
            requests += [_bulk(guest, DATA_OUT, send[at : at + piece], stream=tag) for at in range(0, len(send), piece)]
            requests += [_bulk(guest, STATUS_PIPE, length=64, stream=tag), _bulk(guest, COMMAND_PIPE, iu)]
        for answer in [guest.request(packet) for packet in requests]:
            await answer

    return attack


def _reads(count: int, piece: int, *, size: int = 8 << 20) -> Attack:
    """Return an attack of ``count`` READs of ``size`` bytes in blocks of 512 bytes, received in pieces."""
    return _commands(struct.pack(">BBQIBB", 0x88, 0, 0, size // 512, 0, 0), count, receive=size, piece=piece)


async def _nothing(guest: MemoryGuest) -> None:
    """Do nothing, for as long as an attack takes: the longest turn is that of the machine."""
    await asyncio.sleep(2)


def _bytes(data: bytes) -> Attack:
    """Return an attack that sends bytes at once."""

    async def attack(guest: MemoryGuest) -> None:
        guest.send_bytes(data)
        await guest.get_descriptor(DescriptorType.DEVICE, length=18)

    return attack


def _cancels(endpoint: int, stream: int, cancel: Callable[[MemoryGuest, list[int]], None]) -> Attack:
    """Return an attack that has many transfers cancelled."""

    async def attack(guest: MemoryGuest) -> None:
        data = b"" if endpoint & 0x80 else b"x"
        sent = [_bulk(guest, endpoint, data, length=0 if data else 512, stream=stream) for _ in range(PENDING)]
        guest.send(*sent)
        while guest.redirection._protocol.pending < PENDING:
            await asyncio.sleep(0)
        cancel(guest, [packet.id for packet in sent])
        while guest.redirection._protocol.pending:
            await asyncio.sleep(0)

    return attack


def _reset(guest: MemoryGuest, ids: list[int]) -> None:
    guest.reset()


def _newest_first(guest: MemoryGuest, ids: list[int]) -> None:
    guest.send(*(packets.CancelDataPacket(id=id) for id in reversed(ids)))


def _filter(number: int, end: bytes = b"") -> bytes:
    text = (f"-1,-1,-1,-1,1|{number:#x},-1,-1,-1,1|" + "0,0,0,0,0|" * 400).encode()[:4080].rpartition(b"|")[0] + end
    return struct.pack("<IIQ", 23, len(text) + 1, 0) + text + b"\0"


VERIFY = struct.pack(">BBQIBB", 0x8F, 0, 0, BLOCKS, 0, 0)
COMPARE = struct.pack(">BBQIBB", 0x8F, 2, 0, 2048, 0, 0)
SAME = struct.pack(">BBQIBB", 0x93, 0, 0, BLOCKS, 0, 0)
NDOB = struct.pack(">BBQIBB", 0x93, 1, 0, BLOCKS, 0, 0)

ATTACKS: dict[str, tuple[Callable[[int], AbstractContextManager[Store]], int, Attack]] = {
    "nothing": (_memory, 512, _nothing),
    "VERIFY, fragmented snapshot": (_snapshot, 4096, _commands(VERIFY, 8)),
    "VERIFY, RAW": (_raw, 4096, _commands(VERIFY, 31)),
    "VERIFY, memory": (_memory, 512, _commands(VERIFY, 31)),
    "compare, fragmented snapshot": (_snapshot, 512, _commands(COMPARE, 31, send=bytes(1 << 20))),
    "compare, memory": (_memory, 512, _commands(COMPARE, 31, send=bytes(1 << 20))),
    "READ of 1 MiB, fragmented snapshot": (_snapshot, 512, _reads(6, 1 << 20)),
    "READ of 16 MiB, fragmented snapshot": (_snapshot, 512, _reads(3, 16 << 20, size=16 << 20)),
    "READ of 4 KiB, fragmented snapshot": (_snapshot, 512, _reads(8, 4096, size=1 << 20)),
    "READ of 1 MiB, RAW": (_raw, 512, _reads(6, 1 << 20)),
    "READ of 16 MiB, memory": (_memory, 512, _reads(3, 16 << 20, size=16 << 20)),
    "WRITE SAME, RAW": (_raw, 512, _commands(SAME, 8, send=b"\xaa" * 512)),
    "WRITE SAME, memory": (_memory, 512, _commands(SAME, 8, send=b"\xaa" * 512)),
    "WRITE SAME with zeros, memory": (_memory, 512, _commands(NDOB, 31)),
    "filters": (_memory, 512, _bytes(b"".join(map(_filter, range(256))))),
    "filters with an error": (_memory, 512, _bytes(b"".join(_filter(number, b"|x|") for number in range(256)))),
    "unknown packets": (_memory, 512, _bytes(struct.pack("<IIQ", 99, 0, 0) * 4000)),
    "streams": (_memory, 512, _bytes(struct.pack("<IIQII", 19, 8, 0, 0xFFFFFFFF, 32) * 4000)),
    "reset, data-out": (_memory, 512, _cancels(DATA_OUT, 1, _reset)),
    "reset, data-in": (_memory, 512, _cancels(DATA_IN, 1, _reset)),
    "reset, status": (_memory, 512, _cancels(STATUS_PIPE, 1, _reset)),
    "cancels, newest first, data-out": (_memory, 512, _cancels(DATA_OUT, 1, _newest_first)),
    "cancels, newest first, data-in": (_memory, 512, _cancels(DATA_IN, 1, _newest_first)),
}
"""The store, the bytes of its blocks, and what the guest does."""


async def _measure(store: Store, attack: Attack) -> Turns:
    device = disk_device(store, transport=StorageTransport.UAS, speeds=(Speed.SUPER,))
    async with MemoryGuest(device, timeout=None) as guest:
        await guest.enumerate()
        for _ in range(3):  # unit attentions
            await _commands(bytes(6), 1)(guest)
        turns = Turns(guest)
        await asyncio.sleep(0)
        turns.start()
        await attack(guest)
        turns.stop()
    await device.dispose()
    return turns


def main() -> None:
    """Run the attacks, and print a line for each. The exit code is 1 if a turn was too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="attacks whose names have one of these words (default: all)")
    parser.add_argument("--piece", type=int, default=256, help="KiB that arrive at once (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each attack (default: %(default)s)")
    options = parser.parse_args()
    memory.PIECE = options.piece << 10
    worst = 0.0
    print(f"{'attack':36}{'longest turn':>14}{'processor time':>16}{'memory':>12}")
    for name, (make, block_size, attack) in ATTACKS.items():
        if options.names and not any(word in name for word in options.names):
            continue
        runs = []
        for _ in range(options.runs):
            with make(block_size) as store:
                runs.append(asyncio.run(_measure(store, attack)))
        longest, busiest = min(run.longest for run in runs), min(run.busiest for run in runs)
        most = max(run.memory for run in runs)
        worst = max(worst, longest)
        line = f"{name:36}{longest * 1e3:11.1f} ms{busiest * 1e3:13.1f} ms{most / 2**20:8.1f} MiB"
        print(line, flush=True)
    sys.exit(worst > GOAL)


if __name__ == "__main__":
    main()
