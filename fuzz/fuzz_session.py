"""Fuzz whole sessions: hostile SPICE servers on sockets, and the application with a disk plugged in.

The servers send valid and damaged messages: lists of channels, LZ4, ACK windows, text, floods of PINGs that they do not
read the answers of, and moves of the VM to each other, to other hosts and ports, and to garbage; they close connections
anywhere.

Only FarplugError ends a session. farplug connects to the target and to hosts that a server named, to nothing else; it
never connects without TLS if the target has TLS; the password is in no error, event or log line; a session ends soon
after it is cancelled.

Sockets have their own time, so a seed repeats a failure often, but not always.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import shutil
import socket
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import lz4.block
import pytest
from tests.transport.fake_spice import Certificates, Channel, FakeSpice, channels_list, idle, message, ping

from farplug.app import retry
from farplug.app.app import App
from farplug.app.events import Event
from farplug.app.settings import GuestSettings, ReconnectSettings, Source, TargetSettings
from farplug.errors import FarplugError, ImageError, Reason, TargetError
from farplug.redirection import engine
from farplug.spice.host import plain_host
from farplug.spice.messages import SwitchHost
from farplug.store import FileStore
from farplug.transport import connection, dialer
from farplug.transport.connection import TcpAddress, Timeouts, UnixAddress
from farplug.usbredir.protocol import Connection, Role
from harness import check, counts, run

PASSWORD = "s3cret-ticket"
HOST = "127.0.0.1"
LOCAL = (HOST, "localhost")
FOLDER = Path(tempfile.mkdtemp(prefix="farplug-fuzz-"))
END_LIMIT = 30
"""Seconds within which a session ends after it is cancelled."""


class Watch(logging.Handler):
    """Checks every log line."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        assert PASSWORD not in line
        assert line.isprintable(), line
        if record.exc_info and not isinstance(record.exc_info[1], (FarplugError, OSError)):
            raise AssertionError(line) from record.exc_info[1]
        counts["log lines"] += 1


class Contacts:
    """The addresses that farplug may connect to, and those that it connected to."""

    def __init__(self) -> None:
        self.allowed: set[tuple[str, int]] = set()
        self.dialled: set[tuple[str, int]] = set()
        self.secured: set[bool] = set()
        """Whether the connections used TLS."""

    def named(self, body: bytes) -> None:
        """Note that a server named a host."""
        with contextlib.suppress(FarplugError):
            where = SwitchHost.parse(body)
            hosts = (plain_host(where.host),) if where.host else LOCAL
            self.allowed |= {(host, port) for host in hosts for port in (where.port, where.tls_port) if port}

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """Record the connections of farplug. Those to other hosts fail."""
        dial, start = connection.dial, connection.start

        async def dial_recorded(address: TcpAddress | UnixAddress, timeout: float) -> socket.socket:
            assert isinstance(address, TcpAddress)
            self.dialled.add((address.host, address.port))
            if address.host not in LOCAL:
                raise TargetError(f"cannot reach {address}", reason=Reason.UNREACHABLE)
            return await dial(address, timeout)

        async def start_recorded(sock: socket.socket, end: connection.Connection, **options: Any) -> None:
            self.secured.add(options["tls"] is not None)
            await start(sock, end, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialer, "dial", dial_recorded)
            patch.setattr(dialer, "start", start_recorded)
            yield


class HostileServer:
    """A SPICE server with a plain port and a TLS port."""

    def __init__(self, rng: random.Random, contacts: Contacts) -> None:
        self.fake = FakeSpice(
            password=PASSWORD,
            channels=tuple((9, number) for number in range(256)),
            main=self._main,
            usbredir=self._usbredir,
            vmc_caps=rng.choice((0, 1)),
        )
        self.port = self.tls_port = 0
        self.others: list[HostileServer] = []
        self._rng = rng
        self._contacts = contacts
        self._keeps_rules = rng.random() < 0.5
        """Sends only messages that the protocol allows."""

    @contextlib.asynccontextmanager
    async def running(self, context: ssl.SSLContext) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for tls in (None, context):

                async def serve(
                    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secured: bool = tls is not None
                ) -> None:
                    await self.fake.serve(reader, writer, secured)

                server = await asyncio.start_server(serve, HOST, 0, ssl=tls)
                stack.callback(server.close)
                number = server.sockets[0].getsockname()[1]
                if tls is None:
                    self.port = number
                else:
                    self.tls_port = number
            yield
            for channel in self.fake.linked:
                channel.writer.transport.abort()
            tasks = list(self.fake.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _main(self, channel: Channel) -> None:
        first = message(103, struct.pack("<8I", 7, 1, 3, 1, 0, 0, 0, 0))
        if self._rng.random() < 0.9:
            first += channels_list([(9, number) for number in range(self._rng.choice((1, 2)))])
        await self._talk(channel, first, is_main=True)

    async def _usbredir(self, channel: Channel) -> None:
        guest = Connection(Role.GUEST)
        guest.start()
        packets = b"".join(bytes(buffer) for buffer in guest.data_to_send())
        if self._rng.random() < 0.3:
            for _ in range(self._rng.randrange(20)):
                body = self._rng.randbytes(self._rng.choice((0, 1, 10)))
                kind = self._rng.choice((3, 7, 21, 24, 100, 101))
                packets += struct.pack("<IIQ", kind, len(body), self._rng.randrange(9)) + body
        await self._talk(channel, ping(1) + message(101, packets), is_main=False)

    async def _talk(self, channel: Channel, first: bytes, *, is_main: bool) -> None:
        rng = self._rng
        channel.send(first)
        reading = asyncio.ensure_future(idle(channel)) if rng.random() < 0.9 else None
        try:
            await asyncio.sleep(rng.choice((0, 0.1, 0.2)))  # a session that began follows a move
            for _ in range(rng.randrange(30)):
                channel.send(self._message(is_main))
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.choice((0, 0.002, 0.02)))
                if rng.random() < 0.02:
                    return
            if reading is not None:
                await reading
            await asyncio.sleep(1)
        finally:
            if reading is not None:
                reading.cancel()

    def _message(self, is_main: bool) -> bytes:
        rng = self._rng
        text = rng.choice((b"vm\0", b"\x1b[31mred\x07\0", b"\xff\xfe", b"", "\u202ex".encode(), b"a" * 2000))
        case = rng.randrange(16)
        if self._keeps_rules and case in (1, 2, 3, 6, 10, 11, 12):
            return b""
        match case:
            case 0:
                return ping(rng.getrandbits(32), rng.choice((0, 5, 70_000)))
            case 1:
                return message(3, struct.pack("<II", rng.getrandbits(32), rng.choice((0, 1, 2, 2**32 - 1))))
            case 2:
                size = rng.choice((len(text), len(text), 2**31))
                return message(7, struct.pack("<QIIII", 0, rng.randrange(4), 0, 0, size) + text)
            case 3:
                return message(5, b"\2" + struct.pack("<BBQ", 1, 0, 5) * 2)
            case 4 if rng.random() < 0.1:
                return message(6, struct.pack("<QI", 1, rng.choice((0, 8, 99))))
            case 5 if rng.random() < 0.2:
                return message(1, struct.pack("<I", rng.choice((0, 1, 2, 3))))
            case 6 if is_main:
                return channels_list([(9, rng.randrange(256)) for _ in range(rng.choice((0, 1, 3, 300)))])
            case 7 if is_main:
                return message(113, struct.pack("<I", len(text)) + text)
            case 8 | 9 if is_main and rng.random() < 0.4:
                return self._move(text)
            case 10 if not is_main:
                data = rng.choice((bytes(1 << 20), rng.randbytes(300), b""))
                size = rng.choice((len(data), len(data), 2**31))
                return message(102, struct.pack("<BI", rng.choice((1, 1, 0, 7)), size) + lz4.block.compress(data)[4:])
            case 11 if rng.random() < 0.2:
                return message(rng.randrange(2, 300), rng.randbytes(rng.choice((0, 3, 40))))
            case 12 if rng.random() < 0.05:
                return struct.pack("<HI", rng.randrange(300), rng.choice((2**24, 2**24 + 1, 2**32 - 1)))
            case 13 if rng.random() < 0.2:
                return ping(1) * rng.choice((1, 1000, 20_000))
        return b""

    def _move(self, text: bytes) -> bytes:
        """Return a message that names another host; MIGRATE_BEGIN, or MIGRATE_SWITCH_HOST."""
        rng = self._rng
        other = rng.choice(self.others)
        port = rng.choice((other.port, other.port, 0, 0xFFFF, 1, other.tls_port))
        tls_port = rng.choice((other.tls_port, other.tls_port, 0, 0xFFFF, 1, other.port))
        known = (HOST.encode() + b"\0",) * 8
        host = rng.choice((*known, b"", b"evil.example\0", b"[::1]", b"127.0.0.1:1", text))
        subject = rng.choice((b"", b"", b"", b"O=Test\\, Inc.,CN=vmhost\0", b"CN=other\0", text))
        if rng.random() < 0.6:
            port, tls_port, host, subject = other.port, other.tls_port, HOST.encode(), b""
        body = struct.pack("<HHIIII", port, tls_port, len(host), 20, len(subject), 20 + len(host)) + host + subject
        if not self._keeps_rules and rng.random() < 0.1:
            body = body[: rng.randrange(len(body))]
        self._contacts.named(body)
        counts["moves"] += 1
        return message(rng.choice((101, 111, 111)), body)


def settings(rng: random.Random, server: HostileServer, ca: Path, image: Path) -> tuple[GuestSettings, bool]:
    """Return the settings of a guest, and whether its target has TLS."""
    plain, tls = f"spice://{HOST}:{server.port}", f"spice+tls://{HOST}:{server.tls_port}"
    target = rng.choice((plain, tls, f"{plain}?tls-port={server.tls_port}"))
    subject = rng.choice((*(None,) * 8, "O=Test\\, Inc.,CN=vmhost", "CN=other"))
    has_tls = target != plain
    where = TargetSettings(
        target,
        password=PASSWORD,
        ca_file=str(ca) if has_tls else None,
        host_subject=subject if has_tls else None,
    )
    reconnect = rng.choice((None, None, ReconnectSettings(0.3)))
    return GuestSettings(where, (Source.disk(image),), stay=rng.random() < 0.5, reconnect=reconnect), has_tls


class Fuzzer:
    """What the cases share: certificates, and a disk."""

    def __init__(self) -> None:
        certificates = Certificates(FOLDER)
        self._context = certificates.server_context()
        self._ca = FOLDER / "ca.pem"
        self._ca.write_text(certificates.ca)
        self._image = FOLDER / "disk.raw"
        self._image.write_bytes(bytes(1 << 16))

    def one_case(self, rng: random.Random) -> None:
        asyncio.run(self._case(rng))

    async def _case(self, rng: random.Random) -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        contacts = Contacts()
        servers = [HostileServer(rng, contacts) for _ in range(2)]
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contacts.observed())
            for server in servers:
                server.others = servers
                await stack.enter_async_context(server.running(self._context))
            guest, has_tls = settings(rng, servers[0], self._ca, self._image)
            contacts.allowed |= {(HOST, servers[0].port), (HOST, servers[0].tls_port)}
            await self._session(rng, guest)
        assert contacts.dialled <= contacts.allowed, contacts.dialled - contacts.allowed
        assert not has_tls or contacts.secured <= {True}, "a connection without TLS"
        counts["moves followed"] += bool(contacts.dialled & {(HOST, servers[1].port), (HOST, servers[1].tls_port)})
        # The servers of asyncio report TLS handshakes that fail.
        bugs = [context for context in failures if not isinstance(context.get("exception"), (OSError, type(None)))]
        assert not bugs, bugs
        await self._image_closed()

    async def _image_closed(self) -> None:
        """Wait until the image is closed: a session that is cancelled while it ends does not wait for its image."""
        while True:
            try:
                store = FileStore.open(self._image)
            except ImageError as error:
                check(error.reason is Reason.IN_USE)
                await asyncio.sleep(0.01)
            else:
                await store.close()
                return

    async def _session(self, rng: random.Random, settings: GuestSettings) -> None:
        app = App()
        app.subscribe(_check_event)
        guest = app.add(settings)
        session = asyncio.ensure_future(app.run(guest))
        await asyncio.wait([session], timeout=rng.choice((0.05, 0.3, 0.6, 1.0)))
        assert PASSWORD not in json.dumps(app.snapshot())
        session.cancel()
        try:
            async with asyncio.timeout(END_LIMIT):
                await session
        except FarplugError as error:
            check(PASSWORD not in f"{error} {error.as_dict()}")
            check(error.reason is not Reason.INTERNAL_ERROR, str(error))
            counts[f"ended: {error.reason}"] += 1
        except asyncio.CancelledError:
            counts["cancelled"] += 1


def _check_event(event: Event) -> None:
    assert PASSWORD not in f"{event} {json.dumps(event.to_json())}"
    if event.name in ("attached", "moved", "back", "lost"):
        counts[event.name] += 1


if __name__ == "__main__":
    logging.getLogger("farplug").addHandler(Watch())
    logging.getLogger("farplug").setLevel(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it warns of servers that write to closed connections
    engine.ACK_TIMEOUT = 0.1
    Timeouts.__init__.__defaults__ = (1.0, 0.5, 0.2)
    for name, value in {"DELAYS": (0.01, 0.02), "MOVED_DELAY": 0.01, "MOVED_LIMIT": 0.3, "FLAP_TIME": 0.0}.items():
        setattr(retry, name, value)
    try:
        run("session", Fuzzer().one_case)
    finally:
        shutil.rmtree(FOLDER)
