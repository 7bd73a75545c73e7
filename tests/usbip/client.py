"""A USB/IP client that sends what a test wants, also what no kernel sends. It has its own code for the messages."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from farplug.app.guest import Guest
from farplug.target import open_session, parse_target
from farplug.transport.usbip_session import UsbipSession
from farplug.usb import Device

TIMEOUT = 100
DEVICE = 65537

SET_CONFIGURATION = struct.pack("<BBHHH", 0, 9, 1, 0, 0)


def set_interface(number: int, alternate: int) -> bytes:
    return struct.pack("<BBHHH", 1, 11, alternate, number, 0)


def get_descriptor(kind: int, length: int) -> bytes:
    return struct.pack("<BBHHH", 0x80, 6, kind << 8, 0, length)


@dataclass
class Answer:
    """The reply to an URB or to an unlink command."""

    command: int
    number: int
    status: int
    actual: int = 0
    data: bytes = b""
    packets: tuple[tuple[int, int, int, int], ...] = ()


class Client:
    """A connection to a USB/IP server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.number = 0
        self.inwards: dict[int, bool] = {}

    @classmethod
    async def connect(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            return await self.reader.readexactly(size)

    async def closed(self) -> None:
        """Wait until the server has closed the connection."""
        async with asyncio.timeout(TIMEOUT):
            try:
                while await self.reader.read(1 << 16):
                    pass
            except ConnectionError:
                pass

    async def close(self) -> None:
        self.writer.close()

    async def list(self) -> list[tuple[str, int, int, int, list[bytes]]]:
        """Return bus id, speed, vendor, product and interfaces of the devices."""
        self.writer.write(struct.pack(">HHI", 0x0111, 0x8005, 0))
        assert await self.read(8) == struct.pack(">HHI", 0x0111, 0x0005, 0)
        found = []
        for _ in range(struct.unpack(">I", await self.read(4))[0]):
            fields = struct.unpack(">256s32sIIIHHH6B", await self.read(312))
            interfaces = [await self.read(4) for _ in range(fields[-1])]
            found.append((fields[1].rstrip(b"\0").decode(), fields[4], fields[5], fields[6], interfaces))
        assert await self.reader.read() == b""
        return found

    async def import_(self, busid: str = "1-1") -> int:
        """Import a device; return the status of the reply."""
        self.writer.write(struct.pack(">HHI32s", 0x0111, 0x8003, 0, busid.encode()))
        version, code, status = struct.unpack(">HHI", await self.read(8))
        assert (version, code) == (0x0111, 3)
        if status == 0:
            assert (await self.read(312))[256:].startswith(busid.encode() + b"\0")
        return int(status)

    def submit(
        self,
        endpoint: int,
        length: int = 0,
        data: bytes = b"",
        *,
        setup: bytes = bytes(8),
        packets: Sequence[int] = (),
        flags: int = 0,
        number: int | None = None,
    ) -> int:
        """Send an URB; return its number."""
        self.number += 1
        number = self.number if number is None else number
        inwards = bool(endpoint & 0x80)
        self.inwards[number] = inwards
        size = length if inwards else len(data)
        head = struct.pack(">5I", 1, number, DEVICE, inwards, endpoint & 0x0F)
        head += struct.pack(">IiIII8s", flags, size, 0, len(packets), 0, setup)
        offset, table = 0, b""
        for one in packets:
            table += struct.pack(">IIIi", offset, one, 0, 0)
            offset += one
        self.writer.write(head + data + table)
        return number

    def unlink(self, number: int) -> int:
        """Send an unlink command; return its number."""
        self.number += 1
        head = struct.pack(">5I", 2, self.number, DEVICE, 0, 0)
        self.writer.write((head + struct.pack(">I", number)).ljust(48, b"\0"))
        return self.number

    async def answer(self) -> Answer:
        """Return the next reply."""
        head = await self.read(48)
        command, number, device, direction, endpoint = struct.unpack_from(">5I", head)
        assert (device, direction, endpoint) == (0, 0, 0)
        (status,) = struct.unpack_from(">i", head, 20)
        if command == 4:
            return Answer(command, number, status)
        assert command == 3
        actual, start, count, errors = struct.unpack_from(">iIIi", head, 24)
        data = await self.read(actual) if self.inwards[number] else b""
        packets = tuple([struct.unpack(">IIIi", await self.read(16)) for _ in range(count)])
        assert (start, errors) == (0, sum(packet[3] != 0 for packet in packets))
        return Answer(command, number, status, actual, data, packets)

    async def do(self, *arguments: object, **options: object) -> Answer:
        """Send an URB, and return its reply, which must be the next one."""
        number = self.submit(*arguments, **options)  # type: ignore[arg-type]
        answer = await self.answer()
        assert answer.number == number
        return answer

    async def configure(self, busid: str = "1-1") -> None:
        """Import a device, and set its configuration."""
        assert await self.import_(busid) == 0
        assert (await self.do(0, setup=SET_CONFIGURATION)).status == 0


class Server:
    """farplug as a USB/IP server.

    Attributes:
        guest: the application's model.
        session: the server.
        notes: its lines for the user.
    """

    def __init__(self, guest: Guest, session: UsbipSession, notes: list[str]) -> None:
        self.guest = guest
        self.session = session
        self.notes = notes
        self.clients: list[Client] = []

    @property
    def port(self) -> int:
        return self.session.address.port

    async def client(self) -> Client:
        """Connect a client, which is closed at the end."""
        client = await Client.connect(self.port)
        self.clients.append(client)
        return client

    async def until(self, *texts: str) -> None:
        """Wait until a note has each of the texts."""
        async with asyncio.timeout(TIMEOUT):
            while not all(any(text in note for note in self.notes) for text in texts):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(*devices: Device, listed: bool = True) -> AsyncIterator[Server]:
    """Serve devices for the block, on any port."""
    notes: list[str] = []
    session = await open_session(parse_target("usbip-listen://127.0.0.1:0"), note=notes.append)
    assert isinstance(session, UsbipSession)
    async with Guest(session=session) as guest:
        server = Server(guest, session, notes)
        try:
            for device in devices:
                await guest.plug(device)
            async with asyncio.timeout(TIMEOUT):
                while sum(port.exporter.device is not None for port in session.ports) < len(devices):
                    await asyncio.sleep(0.01)
            yield server
        finally:
            for client in server.clients:
                await client.close()
