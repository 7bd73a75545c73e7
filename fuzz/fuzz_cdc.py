"""Fuzz a serial line and a network adapter: any blocks, data, requests, cancels, settings and resets of a guest, and
peers that come, leave, send anything, and do not read.

Each transfer is completed once, frames of the guest are those of valid blocks, and both functions work afterwards.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Sequence

from farplug.ends.base import End, Peer
from farplug.ends.frames import FrameReader
from farplug.usb import Buffer, Setup, Speed, TransferType
from farplug.usb.device import Reception
from farplug.virtual import NetworkAdapter, SerialLine, VirtualDevice
from farplug.virtual.endpoints import InterruptIn
from farplug.virtual.ntb import BlockReader, BlockWriter
from harness import Listener, Transfers, counts, raise_logged, run

MAX_FRAME, MAX_BLOCK = 1514, 16384


class FuzzListener(Listener):
    def received(self, endpoint: int, status: object, data: Buffer) -> bool:
        return True


class FuzzPeer(Peer):
    """Sends what the case has for it, and reads sometimes."""

    def __init__(self, source: random.Random, items: Sequence[bytes]) -> None:
        self.name = "a peer"
        self._source = source
        self._items = list(items)

    async def read(self) -> Sequence[bytes]:
        await asyncio.sleep(0)
        if not self._items:
            if self._source.random() < 0.5:
                raise ConnectionResetError(104, "Connection reset by peer")
            return ()
        return (self._items.pop(),)

    async def write(self, items: Sequence[Buffer]) -> None:
        for _ in range(self._source.choice((0, 0, 1, 5))):
            await asyncio.sleep(0)
        if self._source.random() < 0.1:
            raise BrokenPipeError(32, "Broken pipe")


class GoodPeer(Peer):
    def __init__(self) -> None:
        self.name = "a good peer"
        self.got: list[bytes] = []
        self._changed = asyncio.Event()

    async def read(self) -> Sequence[bytes]:
        never: asyncio.Future[Sequence[bytes]] = asyncio.get_running_loop().create_future()
        return await never

    async def write(self, items: Sequence[Buffer]) -> None:
        self.got += map(bytes, items)
        self._changed.set()

    async def has(self, expected: list[bytes]) -> None:
        while self.got != expected:
            self._changed.clear()
            await self._changed.wait()


class FuzzEnd(End):
    async def _open(self) -> None: ...

    async def _close(self) -> None: ...


def some_frame(source: random.Random) -> bytes:
    return source.randbytes(source.choice((14, 60, 100, 1514, source.randrange(14, 1515))))


def some_block(source: random.Random) -> bytes:
    """Return a block that is valid, nearly valid, or not valid."""
    frames = [some_frame(source) for _ in range(source.randrange(1, 9))]
    block = bytearray(next(BlockWriter().blocks(frames, source.choice((2048, MAX_BLOCK)))))
    match source.randrange(8):
        case 0:
            for _ in range(source.randrange(1, 6)):
                block[source.randrange(min(len(block), 64))] = source.choice((0, 1, 0x7F, 0xFF, source.randrange(256)))
        case 1:
            del block[source.randrange(len(block) + 1) :]
        case 2:  # a table that leads to a table
            struct.pack_into("<H", block, 18, source.choice((12, 16, len(block) & ~3, source.randrange(65536))))
        case 3:  # entries that overlap
            for place in range(20, 20 + 4 * len(frames), 4):
                struct.pack_into("<HH", block, place, source.choice((12, 28, 200)), source.randrange(65536))
        case 4:
            return source.randbytes(source.randrange(100))
        case 5:
            return bytes(block[:12]) + source.randbytes(source.randrange(400))
    return bytes(block)


def valid_frames(block: bytes) -> list[bytes]:
    """Return the frames of a block, after a check of what the parser promises."""
    try:
        frames = BlockReader(MAX_FRAME).frames(block)
    except ValueError:
        counts["blocks refused"] += 1
        return []
    counts["blocks taken"] += 1
    assert sum(map(len, frames)) <= len(block)
    assert all(14 <= len(frame) <= MAX_FRAME for frame in frames)
    return [bytes(frame) for frame in frames]


def some_setup(source: random.Random, interface: int) -> tuple[Setup, bytes]:
    data = source.randbytes(source.choice((0, 0, 4, 7, 8, source.randrange(20))))
    requests = (0x20, 0x21, 0x22, 0x23, 0x43, 0x80, 0x83, 0x84, 0x85, 0x86, source.randrange(256))
    kind = source.choice((0x21, 0x21, 0xA1, source.randrange(256)))
    value = source.choice((0, 1, 3, 0xFFFF, source.randrange(65536)))
    length = source.randrange(70) if kind & 0x80 else len(data)
    return Setup(kind, source.choice(requests), value, interface, length), b"" if kind & 0x80 else data


async def attack(source: random.Random) -> None:
    ends = FuzzEnd("serial"), FuzzEnd("network")
    line, adapter = SerialLine(ends[0]), NetworkAdapter(ends[1])
    device = VirtualDevice(line, adapter, speeds=(Speed.HIGH,))
    await device.open(FuzzListener())
    transfers = Transfers(device)
    submit = transfers.submit

    async def plug() -> None:
        await device.reset()
        await device.set_configuration(1)
        await device.set_interface(3, 1)
        for state in (line.states, adapter.states):
            receive(state)

    def receive(state: InterruptIn) -> None:
        device.start_receiving(Reception(state.address_in_device, TransferType.INTERRUPT))

    def peer() -> FuzzPeer:
        return FuzzPeer(source, [source.randbytes(source.choice((1, 60, 1514, 1515, 70000))) for _ in range(5)])

    await plug()
    for _ in range(source.randrange(120)):
        match source.randrange(12):
            case 0 | 1 | 2:
                submit(TransferType.BULK, adapter.received.address_in_device, data=some_block(source))
            case 3:
                submit(
                    TransferType.BULK, line.received.address_in_device, data=source.randbytes(source.randrange(3000))
                )
            case 4 | 5:
                endpoint = source.choice((line.sent, adapter.sent)).address_in_device
                submit(TransferType.BULK, endpoint, length=source.choice((0, 1, 512, 1024, 2048, MAX_BLOCK, 1 << 20)))
            case 6 | 7:
                setup, data = some_setup(source, source.randrange(5))
                endpoint = 0x80 if setup.request_type & 0x80 else 0
                submit(TransferType.CONTROL, endpoint, length=setup.length, data=data, setup=setup)
            case 8:
                transfers.cancel_one(source)
            case 9:
                end = source.choice(ends)
                if end.peer is None:
                    end.came(peer())
                else:
                    end.left(end.peer)
            case 10:
                for _ in range(source.randrange(8)):
                    await asyncio.sleep(0)
            case 11 if source.random() < 0.3:
                await device.set_interface(source.randrange(5), source.randrange(3))
                if source.random() < 0.3:
                    await plug()
    # both functions still work for a correct guest
    await plug()
    for end in ends:
        if end.peer is not None:
            end.left(end.peer)
    peers = GoodPeer(), GoodPeer()
    for end, friend in zip(ends, peers, strict=True):
        end.came(friend)
    frames = [some_frame(source) for _ in range(3)]
    (block,) = BlockWriter().blocks(frames, MAX_BLOCK)
    submit(TransferType.BULK, adapter.received.address_in_device, data=block)
    submit(TransferType.BULK, line.received.address_in_device, data=b"it works")
    await asyncio.gather(peers[0].has([b"it works"]), peers[1].has(frames))
    await device.close()
    transfers.check()
    for end in ends:
        await end.close()


def one_case(source: random.Random) -> None:
    for _ in range(20):
        valid_frames(some_block(source))
    stream = b"".join(struct.pack(">I", len(frame)) + frame for frame in (some_frame(source) for _ in range(5)))
    reader = FrameReader()
    try:
        frames = reader.feed(stream[: source.randrange(len(stream))] + source.randbytes(source.randrange(50)))
        assert sum(map(len, frames)) <= len(stream) + 50
    except ValueError:
        counts["streams refused"] += 1
    asyncio.run(attack(source))


if __name__ == "__main__":
    raise_logged()
    run("cdc", one_case)
