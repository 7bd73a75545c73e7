"""A small SPICE server for tests of the client: real bytes, real tickets, real TLS, and faults on request."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import itertools
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from farplug.errors import FarplugError
from farplug.spice.link import LinkMess, LinkReply
from farplug.spice.types import ChannelType, LinkError

TICKET_KEY = rsa.generate_private_key(65537, 1024)
TICKET_KEY_DER = TICKET_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SESSION_ID = 0x1234


def message(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<HI", kind, len(body)) + body


def ping(number: int, size: int = 0) -> bytes:
    return message(4, struct.pack("<IQ", number, 1000) + bytes(size))


def channels_list(channels: Iterable[tuple[int, int]]) -> bytes:
    pairs = b"".join(struct.pack("<BB", *channel) for channel in channels)
    return message(104, struct.pack("<I", len(pairs) // 2) + pairs)


@dataclass
class Channel:
    """One linked channel, from the server's side.

    Attributes:
        pongs: the numbers of the PINGs that the client has answered.
    """

    mess: LinkMess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    tls: bool
    pongs: list[int] = field(default_factory=list)

    async def receive(self) -> tuple[int, bytes]:
        kind, size = struct.unpack("<HI", await self.reader.readexactly(6))
        body = await self.reader.readexactly(size)
        if kind == 3:
            self.pongs.append(struct.unpack("<IQ", body)[0])
        return kind, body

    async def receive_other_than_pong(self) -> tuple[int, bytes]:
        while (received := await self.receive())[0] == 3:
            pass
        return received

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


Behaviour: TypeAlias = Callable[[Channel], Awaitable[None]]


async def idle(channel: Channel) -> None:
    """Read and drop data until the client disconnects."""
    while await channel.reader.read(1 << 16):
        pass


async def usbredir(channel: Channel) -> None:
    """A free channel: the first bytes are a PING, as libspice-server sends it."""
    channel.send(ping(1))
    await idle(channel)


@dataclass
class FakeSpice:
    """What the server does. All fields may be changed while it runs."""

    password: str = ""
    secured: frozenset[ChannelType] = frozenset()
    """The channels that answer error 5 on the plain port."""
    unsecured: frozenset[ChannelType] = frozenset()
    """The channels that answer error 6 on the TLS port."""
    ticket_error: LinkError = LinkError.OK
    """The result of every ticket."""
    link_error: LinkError = LinkError.OK
    common_caps: int = 0b1011
    vmc_caps: int = 1
    greeting: bytes = b""
    """Instead of a link reply."""
    channels: tuple[tuple[int, int], ...] = ((9, 1), (9, 0), (3, 0))
    after_init: bytes = message(113, struct.pack("<I", 7) + b"testvm\0") + message(114, bytes(range(16)))
    main: Behaviour | None = None
    """Instead of INIT and the channel list."""
    usbredir: Behaviour = usbredir
    side: dict[ChannelType, Behaviour] = field(default_factory=dict)
    """What other channels do."""
    side_caps: int = 0b1000001010011
    linked: list[Channel] = field(default_factory=list)
    pongs: list[int] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError, FarplugError):
                await self._serve(reader, writer, tls)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self.tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: bool) -> None:
        size = struct.unpack("<4sIII", await reader.readexactly(16))[3]
        mess = LinkMess.parse(await reader.readexactly(size))
        if self.greeting:
            writer.write(self.greeting)
            return
        error = self.link_error
        if not tls and mess.channel_type in self.secured:
            error = LinkError.NEED_SECURED
        if tls and mess.channel_type in self.unsecured:
            error = LinkError.NEED_UNSECURED
        if error:
            writer.write(bytes(LinkReply(error)))
            return
        if mess.connection_id and (mess.channel_type, mess.channel_id) not in self.channels:
            return
        caps = self.side_caps if mess.channel_type in self.side else self.vmc_caps
        writer.write(bytes(LinkReply(LinkError.OK, TICKET_KEY_DER, (self.common_caps,), (caps,))))
        if self.common_caps & 1:
            assert await reader.readexactly(4) == struct.pack("<I", 1)
        ticket = await reader.readexactly(128)
        oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
        if TICKET_KEY.decrypt(ticket, oaep) != self.password.encode() + b"\0":
            writer.write(struct.pack("<I", LinkError.PERMISSION_DENIED))
            return
        writer.write(struct.pack("<I", self.ticket_error))
        if self.ticket_error:
            return
        channel = Channel(mess, reader, writer, tls)
        self.linked.append(channel)
        if mess.channel_type in self.side:
            await self.side[mess.channel_type](channel)
        elif mess.channel_type is ChannelType.USBREDIR:
            await self.usbredir(channel)
        elif self.main is not None:
            await self.main(channel)
        else:
            await self._main(channel)

    async def _main(self, channel: Channel) -> None:
        channel.send(message(103, struct.pack("<8I", SESSION_ID, 0, 1, 1, 0, 10, 0, 0)) + self.after_init)
        channel.send(ping(1) + ping(2, 256_000))
        while True:
            kind, body = await channel.receive()
            if kind == 104:
                channel.send(channels_list(self.channels))
            elif kind == 3:
                self.pongs.append(struct.unpack("<IQ", body)[0])

    def of(self, number: int) -> Channel:
        """Return the last linked usbredir channel with this number."""
        kinds = [(channel.mess.channel_type, channel.mess.channel_id) for channel in self.linked]
        return self.linked[len(kinds) - 1 - kinds[::-1].index((ChannelType.USBREDIR, number))]

    @property
    def main_channel(self) -> Channel:
        return next(channel for channel in reversed(self.linked) if channel.mess.channel_type is ChannelType.MAIN)


@contextlib.asynccontextmanager
async def running(
    fake: FakeSpice,
    *,
    tls: ssl.SSLContext | None = None,
    path: Path | None = None,
    host: str = "127.0.0.1",
    backlog: int = 100,
) -> AsyncIterator[int]:
    """Serve on an address (or on a UNIX socket). Returns the port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await fake.serve(reader, writer, tls is not None)

    if path is not None:
        server = await asyncio.start_unix_server(serve, path)
    else:
        server = await asyncio.start_server(serve, host, 0, ssl=tls, backlog=backlog)
    port = 0 if path is not None else server.sockets[0].getsockname()[1]
    try:
        yield port
    finally:
        server.close()
        tasks = [*fake.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Certificates:
    """A CA and certificates that it issues."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name([(NameOID.ORGANIZATION_NAME, "Test, Inc."), (NameOID.COMMON_NAME, "test CA")])
        self.ca = self._issue(self._name, self._key, None, ca=True).public_bytes(Encoding.PEM).decode()

    def server_context(
        self,
        names: Iterable[str] = ("localhost",),
        addresses: Iterable[str] = ("127.0.0.1",),
        *,
        subject: Iterable[tuple[x509.ObjectIdentifier, str]] = (
            (NameOID.ORGANIZATION_NAME, "Test, Inc."),
            (NameOID.COMMON_NAME, "vmhost"),
        ),
        days: int = 10,
    ) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        certificate = self._issue(_name(subject), key, x509.SubjectAlternativeName(alternatives), days=days)
        path = self._folder / "server.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        path.write_bytes(private + certificate.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def _issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        alternatives: x509.SubjectAlternativeName | None,
        *,
        ca: bool = False,
        days: int = 10,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=20))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _name(attributes: Iterable[tuple[x509.ObjectIdentifier, str]]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


class Recorder:
    """A port's listener that stores everything."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.pauses = self.resumes = 0
        self.closed: list[FarplugError | None] = []
        self._changed = asyncio.Event()

    def data_received(self, data: memoryview, more: bool = False) -> None:
        assert not self.closed
        self.data += data
        self._changed.set()

    def pause_writing(self) -> None:
        self.pauses += 1
        self._changed.set()

    def resume_writing(self) -> None:
        self.resumes += 1
        self._changed.set()

    def port_closed(self, error: FarplugError | None) -> None:
        self.closed.append(error)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(100):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def free_port() -> int:
    """Return a TCP port on which nothing listens.

    The kernel gives none below its own range to another program meanwhile, and each process draws its own ones.
    """
    while True:
        try:
            with socket.create_server(("127.0.0.1", next(_ports))) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue


_ports = itertools.cycle(random.sample(range(10_000, 32_768), 1000))
"""Below the default of net.ipv4.ip_local_port_range."""
