"""Fuzz USB/IP: the parsers of both sides, the server with a hostile client and a device that does anything, and the
client with a hostile server.

Parsers raise only RemoteProtocolError, whatever the pieces are, and return what was encoded. The server replies to each
URB exactly once (a reply, or the success of an unlink command), with no more data than was requested; when the client
has left, nothing is pending, and the next client is served. The client completes each transfer exactly once, whatever
the server replies, and raises only DeviceError.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tests.redirection.scripted import BULK_IN, BULK_OUT, INTERRUPT_IN, INTERRUPT_OUT, ISO_IN, ISO_OUT

from farplug.errors import DeviceError, FarplugError, RemoteProtocolError
from farplug.redirection import Redirection
from farplug.remote import RemoteDevice, connection, device
from farplug.transport.connection import TcpAddress
from farplug.transport.usbip_session import UsbipPort
from farplug.usb import Buffer, Reception, Setup, Speed, Status, Transfer, TransferType
from farplug.usb.share import MAX_MEMORY
from farplug.usbip import messages as m
from fuzz_engine import RestlessDevice
from harness import check, counts, run

ENDPOINTS = (0, 0x80, BULK_IN, BULK_OUT, INTERRUPT_IN, INTERRUPT_OUT, ISO_IN, ISO_OUT, 0x8F)


# Parsers --------------------------------------------------------------------------------------------------------------


def some_packets(rng: random.Random, length: int) -> tuple[m.IsoPacket, ...]:
    """Return packets of an isochronous URB; most of them fit into its buffer."""
    if rng.random() < 0.6:
        return ()
    count = rng.choice((1, 2, 8, 33, 1024, 1025 if rng.random() < 0.1 else 3))
    each = length // count
    extra = rng.random() < 0.05
    return tuple(m.IsoPacket(number * each, each + extra, rng.randrange(each + 1), 0) for number in range(count))


def some_command(rng: random.Random) -> m.ClientCommand:
    number, device = rng.getrandbits(32), rng.getrandbits(32)
    if rng.random() < 0.2:
        return m.Unlink(number, device, rng.getrandbits(32))
    endpoint = rng.choice(ENDPOINTS)
    length = rng.choice((0, 1, 8, 512, 5000))
    data = b"" if endpoint & 0x80 else rng.randbytes(length)
    packets = some_packets(rng, length)
    return m.Submit(number, device, endpoint, length, data, rng.randbytes(8), packets, rng.getrandbits(32), 4)


def some_device(rng: random.Random) -> m.ExportedDevice:
    interfaces = tuple((rng.randrange(256), 6, 80) for _ in range(rng.choice((0, 1, 2, 32))))
    vendor, product, version = (rng.randrange(65536) for _ in range(3))
    name = f"{rng.randrange(99)}-{rng.randrange(99)}"
    speed = rng.choice(list(Speed))
    return m.ExportedDevice(name, 1, 2, speed, vendor, product, version, interfaces=interfaces, path=f"/sys/{name}")


def parsed(rng: random.Random, parser: m.Parser[Any], stream: Buffer) -> list[Any] | None:
    """Return the messages of a stream that arrives in pieces; None if the parser refuses it."""
    found: list[Any] = []
    at = 0
    while at < len(stream):
        size = rng.choice((1, 48, 100, 4096, len(stream)))
        parser.receive_data(memoryview(stream)[at : at + size])
        at += size
        try:
            while (message := parser.next_message()) is not None:
                found.append(message)
        except RemoteProtocolError:
            return None
    return found


def damaged(rng: random.Random, stream: bytes) -> bytearray:
    data = bytearray(stream)
    for _ in range(rng.choice((1, 3, 10)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def commands(rng: random.Random) -> None:
    sent = [some_command(rng) for _ in range(rng.randrange(6))]
    stream = b"".join(bytes(part) for command in sent for part in command.encode())
    received = parsed(rng, m.CommandParser(), stream)
    bad = any(
        isinstance(one, m.Submit)
        and (
            len(one.packets) > m.MAX_ISO_PACKETS
            or any(p.offset + p.length > one.length for p in one.packets)
            or sum(p.length for p in one.packets) > one.length
        )
        for one in sent
    )
    assert received is None if bad else received == sent
    parsed(rng, m.CommandParser(), damaged(rng, stream))


def replies(rng: random.Random) -> None:
    pending: dict[int, m.Submit] = {}
    sent: list[m.ServerReply] = []
    for number in range(rng.randrange(6)):
        endpoint = rng.choice(ENDPOINTS)
        length = rng.choice((0, 1, 8, 512, 5000))
        packets = some_packets(rng, length)[: m.MAX_ISO_PACKETS]
        pending[number] = m.Submit(number, 1, endpoint, length, packets=packets)
        actual = sum(packet.actual for packet in packets) if packets else rng.randrange(length + 1)
        data = rng.randbytes(actual) if endpoint & 0x80 and actual <= length else b""
        if actual <= length:
            sent.append(m.Submitted(number, rng.choice((0, -32)), actual, data, packets))
        sent.append(m.Unlinked(rng.getrandbits(32), rng.choice((0, -104))))
    stream = b"".join(bytes(part) for one in sent for part in one.encode())
    assert parsed(rng, m.ReplyParser(pending.get), stream) == sent
    parsed(rng, m.ReplyParser(pending.get), damaged(rng, stream))


def operations(rng: random.Random) -> None:
    device = some_device(rng)
    cases: list[tuple[Callable[[], m.Parser[Any]], bytes, object]] = [
        (m.RequestParser, bytes.fromhex("0111 8005 00000000"), m.ListRequest()),
        (m.RequestParser, m.encode_request(m.ImportRequest("1-1")), m.ImportRequest("1-1")),
    ]
    for parser, stream, message in cases:
        assert parsed(rng, parser(), stream) == [message]
        parsed(rng, parser(), damaged(rng, stream))
        parsed(rng, parser(), rng.randbytes(rng.randrange(400)))
    (imported,) = parsed(rng, m.ImportParser(), m.encode_import(device)) or [None]
    assert imported is not None
    assert (imported.busid, imported.speed) == (device.busid, device.speed)
    for refusal in m.Refusal:
        assert parsed(rng, m.ImportParser(), m.encode_import(refusal)) == [refusal]
    parsed(rng, m.ImportParser(), damaged(rng, m.encode_import(device)))


# The server -----------------------------------------------------------------------------------------------------------


class Client:
    """A client, which the port serves without a socket."""

    def __init__(self, rng: random.Random, port: UsbipPort) -> None:
        self.pending: dict[int, m.Submit] = {}
        self.unlinks: dict[int, int] = {}
        self.gone = self.violated = False
        self._rng = rng
        self._port = port
        self._number = 0

    # What the port needs of a connection

    def reply(self, message: m.ServerReply) -> None:
        assert not self.gone, "a reply without a client"
        counts["replies"] += 1
        if isinstance(message, m.Unlinked):
            unlinked = self.unlinks.pop(message.number)
            if message.status:
                del self.pending[unlinked]
            return
        urb = self.pending.pop(message.number)
        assert 0 <= message.actual <= urb.length
        assert len(message.packets) == len(urb.packets)
        if urb.endpoint & 0x80:
            assert len(message.data) == message.actual
        else:
            assert not len(message.data)

    def device_gone(self) -> None:
        self.gone = True

    def flush(self) -> None:
        pass

    def resume(self) -> None:
        pass

    # What it does

    def act(self) -> None:
        rng = self._rng
        self._number += 1
        command: m.ClientCommand
        if rng.random() < 0.25:
            number = rng.choice([*self.pending, self._number + 7, 0])
            self.unlinks[self._number] = number
            command = m.Unlink(self._number, 1, number)
        else:
            command = self._urb()
            if command.number in self.pending:
                self.violated = True
            else:
                self.pending[command.number] = command
        try:
            self._port.exporter.handle(command)
            check(not self.violated, "a number that is in use")
        except RemoteProtocolError:
            check(self.violated)
        if rng.random() < 0.7:
            self._port.deliver()

    def _urb(self) -> m.Submit:
        rng = self._rng
        number = rng.choice([*self.pending]) if self.pending and rng.random() < 0.003 else self._number
        endpoint = rng.choice(ENDPOINTS)
        length = rng.choice((0, 1, 8, 18, 512, 5000, 1 << 20, (1 << 24) + 1))
        packets: Sequence[m.IsoPacket] = ()
        setup = bytes(8)
        if not endpoint & 0x0F:
            request = rng.choice(((0x80, 6, 0x100, 0), (0, 9, 1, 0), (1, 11, 1, 0), (1, 11, 0, 0), (0, 5, 3, 0)))
            if rng.random() < 0.2:
                request = tuple(rng.randrange(256) for _ in range(4))  # type: ignore[assignment]
            length = rng.choice((0, 18)) if request[0] & 0x80 else 0
            setup = struct.pack("<BBHHH", *request, length)
        elif (endpoint in (ISO_IN, ISO_OUT)) is (rng.random() < 0.95):
            length = min(length, 5000)
            each = length // 4
            packets = tuple(m.IsoPacket(place * each, each) for place in range(4))
        data = b"" if endpoint & 0x80 or length > m.MAX_TRANSFER else bytes(length)
        flags = rng.choice((0, m.ZERO_PACKET))
        return m.Submit(number, 1, endpoint, length, data, setup, packets, flags)


async def server(rng: random.Random) -> None:
    device = RestlessDevice(rng)
    port = UsbipPort(1, "")
    redirection = Redirection(port)
    await redirection.open()
    await redirection.attach(device)
    for _ in range(rng.choice((1, 2, 5))):
        for _ in range(200):
            device.act()
            await asyncio.sleep(0)
            if port.exporter.device is not None or redirection.device is None:
                break
        if port.exporter.device is None:
            break
        client = Client(rng, port)
        port.serve(client)  # type: ignore[arg-type]
        for _ in range(rng.choice((1, 20, 200))):
            if client.gone or client.violated:
                break
            client.act()
            if rng.random() < 0.3:
                device.act()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            assert redirection.memory <= MAX_MEMORY + (1 << 24)
        counts["clients"] += 1
        if client.gone:
            break
        port.end(client)  # type: ignore[arg-type]
        client.gone = True
        assert not port.exporter.in_use
        for _ in range(50):
            await asyncio.sleep(0)
    try:
        await redirection.close()
    except FarplugError:
        counts["not closed"] += 1
    for transfer in device.submitted:
        if transfer.status is None:
            transfer.complete()
    assert not redirection.memory, f"{redirection.memory} bytes are still counted"


# The client -----------------------------------------------------------------------------------------------------------

CONFIGURATION = bytes.fromhex(
    "09023200 01010080 32  09040000 05ff0000 00"
    "07058102 000200 07050202 000200 07058303 080004 07058505 000401 07050605 000401"
)
DESCRIPTORS = {
    1: bytes.fromhex("12010002 00000040 09120100 00010102 0001"),
    2: CONFIGURATION[:2] + len(CONFIGURATION).to_bytes(2, "little") + CONFIGURATION[4:],
    3: b"\x04\x03\x09\x04",
}


class HostileServer:
    """A server that exports a device, and soon replies with anything."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._honest = rng.choice((0, 3, 8, 8, 8, 8))
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rng = self._rng
        await reader.readexactly(40)
        imported = m.encode_import(rng.choice((*[m.ExportedDevice("1-1", 1, 2, Speed.HIGH, 1, 2)] * 20, *m.Refusal)))
        writer.write(damaged(rng, imported) if rng.random() < 0.05 else imported)
        parser, pending = m.CommandParser(), list[m.Submit]()
        while data := await reader.read(1 << 16):
            parser.receive_data(data)
            while (command := parser.next_message()) is not None:
                if isinstance(command, m.Unlink):
                    found = [urb for urb in pending if urb.number == command.unlinked]
                    pending = [urb for urb in pending if urb not in found]
                    lie = rng.random() < 0.05
                    status = -104 if bool(found) is not lie else 0
                    self._send(writer, m.Unlinked(command.number, status).encode())
                else:
                    pending.append(command)
            rng.shuffle(pending)
            while pending and (self._honest > 0 or rng.random() < 0.8):
                self._send(writer, self._reply(pending.pop()).encode())
                self._honest -= 1

    def _reply(self, urb: m.Submit) -> m.Submitted:
        rng = self._rng
        inwards = bool(urb.endpoint & 0x80)
        known = DESCRIPTORS.get(urb.setup[3], b"")[: urb.length]
        if not urb.endpoint & 0x0F and urb.setup[1] == 6 and self._honest > 0:
            return m.Submitted(urb.number, 0, len(known), known)
        actual = rng.choice((0, urb.length, rng.randrange(urb.length + 1)))
        packets = [m.IsoPacket(p.offset, p.length, p.length, rng.choice((0, -32))) for p in urb.packets]
        if packets:
            actual = sum(packet.actual for packet in packets)
        if rng.random() < 0.01:
            actual += 1
        status = rng.choice((0, 0, 0, -32, -75, -104, -108, 7))
        return m.Submitted(urb.number, status, actual, bytes(actual) if inwards else b"", packets)

    def _send(self, writer: asyncio.StreamWriter, buffers: list[Buffer]) -> None:
        rng = self._rng
        data = b"".join(map(bytes, buffers))
        if self._honest <= 0 and rng.random() < 0.01:
            data = bytes(damaged(rng, data)) if rng.random() < 0.7 else data[:20]
        writer.write(data)
        if self._honest <= 0 and rng.random() < 0.005:
            writer.close()


class Reports:
    """The listener of a remote device."""

    def __init__(self) -> None:
        self.losses = 0

    def happened(self, event: object) -> None:
        raise AssertionError

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        counts["packets"] += 1
        return True

    def reception_ended(self, endpoint: int, status: Status) -> None:
        counts["receptions ended"] += 1

    def lost(self, error: Exception | None) -> None:
        self.losses += 1
        assert self.losses == 1


async def remote(rng: random.Random) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    hostile = HostileServer(rng)
    server = await asyncio.start_server(hostile.serve, "127.0.0.1", 0)
    where = TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    transfers: list[Transfer] = []
    try:
        device = await RemoteDevice.connect(where, "1-1")
        reports = Reports()
        await device.open(reports)
        counts["remote devices"] += 1
        try:
            await use(rng, device, transfers)
        finally:
            await device.close()
        assert all(transfer.status is not None for transfer in transfers), "a transfer was not completed"
    except DeviceError:
        counts["refused"] += 1
    finally:
        server.close()
        for writer in hostile.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    assert not failures, failures


async def use(rng: random.Random, device: RemoteDevice, transfers: list[Transfer]) -> None:
    async def operation(call: Coroutine[Any, Any, Status]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await call

    await operation(device.set_configuration(1))
    for _ in range(rng.choice((5, 50))):
        match rng.randrange(12):
            case 0:
                await operation(rng.choice((device.reset, lambda: device.set_interface(0, 0)))())
                await operation(device.set_configuration(1))
            case 1 | 2:
                kind = rng.choice((TransferType.INTERRUPT, TransferType.ISOCHRONOUS, TransferType.BULK))
                endpoint = rng.choice((BULK_IN, INTERRUPT_IN, ISO_IN, ISO_OUT))
                size = 512 if kind is TransferType.BULK else 0
                device.start_receiving(Reception(endpoint, kind, 4, rng.choice((1, 8)), size))
            case 3:
                device.stop_receiving(rng.choice((BULK_IN, INTERRUPT_IN, ISO_IN, ISO_OUT)))
            case 4 if transfers:
                device.cancel(rng.choice(transfers))
            case 5:
                await asyncio.sleep(0.001)
            case 6:
                transfers.append(Transfer(TransferType.ISOCHRONOUS, ISO_OUT, lambda done: None, data=bytes(100)))
                device.submit(transfers[-1])
            case _:
                endpoint = rng.choice((BULK_IN, BULK_OUT, 0x80))
                length = rng.choice((0, 8, 512, 5000))
                setup = Setup(0x80, 6, 0x100, 0, length) if endpoint == 0x80 else None
                kind = TransferType.BULK if setup is None else TransferType.CONTROL
                data = b"" if endpoint & 0x80 else bytes(length)
                transfers.append(Transfer(kind, endpoint, lambda done: None, length=length, data=data, setup=setup))
                device.submit(transfers[-1])
        await asyncio.sleep(0)


def one_case(rng: random.Random) -> None:
    for _ in range(5):
        commands(rng)
        replies(rng)
        operations(rng)
    asyncio.run(server(rng))
    asyncio.run(remote(rng))


if __name__ == "__main__":
    connection.IMPORT_TIMEOUT = device.DESCRIPTORS_TIMEOUT = 0.1
    run("usbip", one_case)
