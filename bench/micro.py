"""Measure packets per second of farplug, and of libusbredirparser called through ctypes.

The packets are those of a disk: for each command a 31-byte bulk OUT (the CBW), an IN request, 4 KiB of data, and the
13-byte status; on the side of the usb-host and of the usb-guest. Bytes arrive in chunks of 64 KiB. Large payloads are
measured separately, in MB/s.

The last lines are commands of a disk through the engine, in memory: without a capture, and with one. What the code for
captures costs while there is none is the difference of the first of these lines between two versions.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.usbredir import oracle
from tests.usbredir.support import connect, hello

from farplug.capture.recording import Recording
from farplug.store import MemoryStore
from farplug.testing.memory import MemoryGuest
from farplug.usb.transfer import Status
from farplug.usbredir import Connection, Role
from farplug.usbredir.caps import ALL_CAPS
from farplug.usbredir.packets import BulkPacket, Packet
from farplug.virtual.disk import disk_device
from farplug.virtual.storage_transport import StorageTransport
from rows import Row, add_rows_option, write_rows

COMMANDS = 2000
CHUNK = 65536
OUT, IN = 0x02, 0x81


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table.

    Attributes:
        name: the name of the measurement.
        unit: the unit of both figures.
        ours: the figure of farplug.
        theirs: the figure of libusbredirparser through ctypes; None if it is not installed.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None


def requests(count: int) -> list[Packet]:
    """Return the packets of a guest for ``count`` commands: CBW, request for data, request for the status."""
    packets: list[Packet] = []
    for id_ in range(0, 3 * count, 3):
        packets.append(BulkPacket(id=id_, endpoint=OUT, status=Status.SUCCESS, length=31, data=bytes(31)))
        packets.append(BulkPacket(id=id_ + 1, endpoint=IN, status=Status.SUCCESS, length=4096))
        packets.append(BulkPacket(id=id_ + 2, endpoint=IN, status=Status.SUCCESS, length=13))
    return packets


def answers(count: int, size: int = 4096) -> list[Packet]:
    """Return the packets of a host for ``count`` commands."""
    packets: list[Packet] = []
    data = memoryview(bytes(size))
    for id_ in range(0, 3 * count, 3):
        packets.append(BulkPacket(id=id_, endpoint=OUT, status=Status.SUCCESS, length=31))
        packets.append(BulkPacket(id=id_ + 1, endpoint=IN, status=Status.SUCCESS, length=size, data=data))
        packets.append(BulkPacket(id=id_ + 2, endpoint=IN, status=Status.SUCCESS, length=13, data=bytes(13)))
    return packets


class Library:
    """libusbredirparser as a Python program would use it: bulk packets only, with callbacks that discard the data."""

    def __init__(self, library: CDLL, role: Role) -> None:
        self.oracle = oracle.Oracle(library, role, ALL_CAPS)
        self.oracle.receive(hello())
        self._send = library.usbredirparser_send_bulk_packet
        self._send.restype = None
        self._do_read = library.usbredirparser_do_read
        self._layout = layout = struct.Struct("<BBHIH")
        self._address = self._end = 0
        parser, free = self.oracle.parser, library.usbredirparser_free_packet_data
        libc = ctypes.CDLL(None)
        move = libc.memmove
        move.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        move.restype = None

        def read(_: int, data: int, count: int) -> int:
            address = self._address
            count = min(count, self._end - address)
            move(data, address, count)
            self._address = address + count
            return count

        def bulk_packet(_: int, id_: int, header: int, data: int | None, size: int) -> None:
            layout.unpack(ctypes.string_at(header, 10))
            if data:
                ctypes.string_at(data, size)
                free(parser, data)

        self._callbacks = (oracle.READ(read), oracle.DATA_PACKET(bulk_packet))
        parser.contents.read, bulk = self._callbacks
        parser.contents.bulk_packet = ctypes.cast(bulk, ctypes.c_void_p)

    def encode(self, packets: Sequence[Packet]) -> None:
        parser, send, pack = self.oracle.parser, self._send, self._layout.pack
        for packet in packets:
            assert isinstance(packet, BulkPacket)
            length = packet.length
            header = pack(packet.endpoint, packet.status, length & 0xFFFF, packet.stream_id, length >> 16)
            data = bytes(packet.data)
            send(parser, ctypes.c_uint64(packet.id), header, data or None, len(data))
            self.oracle.flush()
        self.oracle.sent.clear()

    def decode(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            self._address = ctypes.cast(ctypes.c_char_p(chunk), ctypes.c_void_p).value or 0
            self._end = self._address + len(chunk)
            self._do_read(self.oracle.parser)
            assert self._address == self._end


def _encode(connection: Connection, packets: Sequence[Packet]) -> None:
    for packet in packets:
        connection.send(packet)
        connection.data_to_send()


def _decode(connection: Connection, chunks: Sequence[bytes]) -> None:
    for chunk in chunks:
        connection.receive_data(chunk)
        while connection.next_event() is not None:
            pass


def _chunks(role: Role, packets: Sequence[Packet]) -> list[bytes]:
    sender = connect(role)
    for packet in packets:
        sender.send(packet)
    stream = b"".join(sender.data_to_send())
    return [stream[at : at + CHUNK] for at in range(0, len(stream), CHUNK)]


def _rate(work: Callable[[], None], amount: float) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return amount / best


def figures() -> list[Figure]:
    """Measure everything, in about five seconds."""
    library = oracle.load()
    host, guest = connect(Role.HOST), connect(Role.GUEST)
    their_host = Library(library, Role.HOST) if library else None
    their_guest = Library(library, Role.GUEST) if library else None
    result = []

    def measure(name: str, unit: str, amount: float, ours: Callable[[], None], theirs: Callable[[], None]) -> None:
        result.append(Figure(name, unit, _rate(ours, amount), _rate(theirs, amount) if library else None))

    asked, answered = requests(COMMANDS), answers(COMMANDS)
    small = [packet for packet in asked if isinstance(packet, BulkPacket) and packet.data]
    for name, packets in (("31-byte bulk OUT", small * 3), ("requests of a disk", asked)):
        chunks = _chunks(Role.GUEST, packets)
        thousands = len(packets) / 1e3
        measure(
            f"host parses {name}",
            "k packets/s",
            thousands,
            lambda chunks=chunks: _decode(host, chunks),  # type: ignore[misc]
            lambda chunks=chunks: their_host.decode(chunks) if their_host else None,  # type: ignore[misc]
        )
        measure(
            f"guest encodes {name}",
            "k packets/s",
            thousands,
            lambda packets=packets: _encode(guest, packets),  # type: ignore[misc]
            lambda packets=packets: their_guest.encode(packets) if their_guest else None,  # type: ignore[misc]
        )
    chunks = _chunks(Role.HOST, answered)
    thousands = len(answered) / 1e3
    measure(
        "host encodes answers of a disk",
        "k packets/s",
        thousands,
        lambda: _encode(host, answered),
        lambda: their_host.encode(answered) if their_host else None,
    )
    measure(
        "guest parses answers of a disk",
        "k packets/s",
        thousands,
        lambda: _decode(guest, chunks),
        lambda: their_guest.decode(chunks) if their_guest else None,
    )
    large = answers(32, 1 << 20)
    large_chunks = _chunks(Role.HOST, large)
    measure(
        "guest parses payloads of 1 MiB",
        "MB/s",
        32 * (1 << 20) / 1e6,
        lambda: _decode(guest, large_chunks),
        lambda: their_guest.decode(large_chunks) if their_guest else None,
    )
    return result


async def _commands(path: str | None) -> float:
    """Return the READ(10) commands of 4 KiB in a second over Bulk-Only Transport, with a capture if it has a path."""
    cdb = bytes.fromhex("28000000000700000800")
    wrapper = struct.pack("<4sIIBBB16s", b"USBC", 1, 4096, 0x80, 0, len(cdb), cdb)
    disk = disk_device(MemoryStore(1 << 20), transport=StorageTransport.BOT)
    best = float("inf")
    async with AsyncExitStack() as stack:
        capture = None if path is None else await stack.enter_async_context(Recording(path))
        guest = await stack.enter_async_context(MemoryGuest(disk, capture=capture))
        await guest.enumerate()
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(COMMANDS):
                await guest.bulk_out(OUT, wrapper)
                await guest.bulk_in(IN, 4096)
                await guest.bulk_in(IN, 13)
            best = min(best, time.perf_counter() - start)
        assert capture is None or not (capture.cut or capture.dropped[0])
    return COMMANDS / best


def capture_figures() -> list[Figure]:
    """Measure what a capture costs."""
    with TemporaryDirectory() as folder:
        return [
            Figure(f"commands of a disk{name}", "commands/s", asyncio.run(_commands(path)), None)
            for name, path in (("", None), (", captured", f"{folder}/trace.pcapng"))
        ]


def table(results: Sequence[Figure]) -> str:
    """Return the figures as text."""
    lines = [f"{'':34}{'farplug':>10}{'C + ctypes':>12}{'ratio':>8}"]
    for row in results:
        theirs = f"{row.theirs:12.0f}{row.ratio:8.2f}" if row.theirs and row.ratio else f"{'-':>12}{'-':>8}"
        lines.append(f"{row.name:34}{row.ours:10.0f}{theirs}  {row.unit}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows_option(parser)
    options = parser.parse_args()
    results = [*figures(), *capture_figures()]
    print(table(results))
    write_rows(
        options.rows,
        [
            Row(
                "packets; beside libusbredirparser through ctypes",
                one.name,
                f"{one.ours:.0f} {one.unit}",
                f"{one.theirs:.0f} {one.unit}" if one.theirs else "",
                one.ratio,
            )
            for one in results
        ],
    )


if __name__ == "__main__":
    main()
