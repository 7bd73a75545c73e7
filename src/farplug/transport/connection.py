"""One connected socket, plain or TLS: input without copies, a bounded output queue. And how to connect it.

We have our own output queue: asyncio's copies what the kernel does not accept at once, so we pass at most one chunk at
a time to asyncio.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeAlias, cast

from farplug.errors import TOO_MANY_OPEN_FILES, InternalError, Reason, Remedy, TargetError, open_files_remedy
from farplug.usb.types import Buffer

RECEIVE_BUFFER = 256 << 10
"""The most bytes of one read."""
SEND_BUFFER = 2 << 20
"""Bytes that the kernel queues on a UNIX socket, as far as net.core.wmem_max permits it. TCP adapts its own."""
WRITE_CHUNK = 256 << 10
"""The most bytes that are passed to asyncio at once."""
JOIN_LIMIT = 16 << 10
"""Buffers smaller than this, in bytes, are joined with their neighbours: a copy costs less than a system call."""
MAX_GATHERED = 256
"""The most buffers of one sendmsg call; the kernel's limit is IOV_MAX, 1024."""
HIGH_WATER = 2 << 20
"""The writer is paused above this number of queued bytes."""
LOW_WATER = 512 << 10
"""A paused writer is resumed below this number of queued bytes."""
TLS_SHUTDOWN_TIMEOUT = 1.0
"""Seconds for the peer's answer to our close_notify."""

CLOSE_LINGER = 0.5
"""Seconds that a plain socket stays half closed until the peer's end of stream.

The kernel resets a socket that is closed with unread bytes, or that receives bytes later: the peer would lose our last
bytes.
"""
KEEPALIVE_IDLE = 15
"""Seconds without traffic on a TCP connection until the kernel sends a keepalive probe."""
KEEPALIVE_INTERVAL = 5
"""Seconds from one keepalive probe to the next."""
KEEPALIVE_COUNT = 3
"""The number of unanswered keepalive probes that ends the connection."""

_KEEPALIVE_OPTIONS = tuple(
    (getattr(socket, name), value)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
    )
    if hasattr(socket, name)
)
_NO_SUCH_NETWORK = (errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""The errors for an IPv6 address on a machine without IPv6: the host may be reachable at another address."""
_spare_buffers: list[memoryview] = []
"""A receive buffer that no connection uses, if there is one: most connections only use one during a call."""
_TCP_QUICKACK: int = getattr(socket, "TCP_QUICKACK", 0)


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or address, and a port (1 to 65535; 0 only to listen)."""

    host: str
    port: int

    def __str__(self) -> str:
        try:
            return f"[{ipaddress.IPv6Address(self.host)}]:{self.port}"
        except ValueError:  # a name, an IPv4 address, a proxy's ticket
            return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A UNIX socket's path."""

    path: str

    def __str__(self) -> str:
        return self.path


Address: TypeAlias = TcpAddress | UnixAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Timeouts, in seconds. There is none for a guest that sends nothing: its VM may be paused.

    Attributes:
        connect: to resolve a name and connect a socket.
        handshake: for each of TLS, the proxy's reply, a SPICE link, and the first messages of a session.
        flush: to send queued data when a port is closed.
    """

    connect: float = 10.0
    handshake: float = 10.0
    flush: float = 3.0


class Reader(Protocol):
    """The receiver of a connection's bytes. Its methods are called on the event loop."""

    def data_received(self, data: memoryview) -> None:
        """Process received bytes. The view is valid during the call, or until reading is resumed if the call paused it.

        An exception is a bug: it ends the connection. Not called after :meth:`Connection.close` or
        :meth:`Connection.abort`.
        """

    def pause_writing(self) -> None:
        """Stop writing: the output queue is above HIGH_WATER."""

    def resume_writing(self) -> None:
        """Continue to write: the output queue is below LOW_WATER again."""


class Tap(Protocol):
    """Sees what a connection sends and receives, in clear even over TLS. Its methods must not raise."""

    def sent(self, buffers: list[Buffer]) -> None:
        """See buffers that are about to be sent."""

    def received(self, data: memoryview) -> None:
        """See received bytes. The view is valid only during the call."""

    def closed(self) -> None:
        """See that the connection has ended."""


class Wire(Protocol):
    """Makes the taps of new connections."""

    def tap(self, name: str) -> Tap:
        """Return the tap of a new connection, with a name for people, which holds no secret."""


CurrentWire: TypeAlias = Callable[[], Wire | None]
"""Returns what taps the connections that are made now; None: nothing does."""


def untapped() -> Wire | None:
    """Return None: no connection is tapped."""
    return None


LostCallback: TypeAlias = Callable[[Exception | None], None]
"""Called once when a connection has ended: with None after an end of stream or our own close, with OSError if the
connection broke, with InternalError if the reader raised an exception."""


class Connection(asyncio.BufferedProtocol):
    """One connected socket.

    Args:
        reader: receives the bytes; may be replaced at any time.
        on_lost: called once, last; may be replaced at any time.
        tap: sees the bytes; None: nothing does.

    Attributes:
        received: the number of received bytes.
    """

    def __init__(self, reader: Reader, on_lost: LostCallback, tap: Tap | None = None) -> None:
        self.reader = reader
        self.on_lost = on_lost
        self._tap = tap
        self.received = 0
        self._receive_buffer: memoryview | None = None
        """In use: from the time that it is asked for until the reader has processed it, or resumes after a pause."""
        self._reading_paused = False
        self._transport: asyncio.Transport | None = None
        self._quick_ack_socket: socket.socket | None = None
        self._plain_socket: socket.socket | None = None
        self._queue: deque[Buffer] = deque()
        self._queued = 0
        self._answered = False
        """Something was written since the last read started."""
        self._transport_paused = False
        self._reader_paused = False
        self._closing = False
        self._internal_error: InternalError | None = None
        self._drained: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_open(self) -> bool:
        """Return whether bytes can still be sent."""
        return not self._closing and not self._lost.done()

    @property
    def lost(self) -> bool:
        """Return whether the connection has ended."""
        return self._lost.done()

    @property
    def closing(self) -> bool:
        """Return whether we closed or aborted the connection."""
        return self._closing

    @property
    def tls(self) -> ssl.SSLObject | None:
        """Return the TLS session; None on a plain socket."""
        assert self._transport is not None
        return cast("ssl.SSLObject | None", self._transport.get_extra_info("ssl_object"))

    def write(self, buffers: list[Buffer]) -> None:
        """Queue buffers in order. They are not copied: the caller must not change them afterwards."""
        if self._closing or self._lost.done():
            return
        self._answered = True
        if self._tap is not None:
            self._tap.sent(buffers)
        sent = self._send_at_once(buffers)
        queue = self._queue
        for buffer in buffers:
            size = len(buffer)
            if sent >= size:
                sent -= size
            else:
                queue.append(memoryview(buffer)[sent:] if sent else buffer)
                self._queued += size - sent
                sent = 0
        if not queue:
            return
        self._flush()
        if self._queued > HIGH_WATER and not self._reader_paused:
            self._reader_paused = True
            self.reader.pause_writing()

    def deliver(self, data: memoryview) -> None:
        """Pass bytes to the reader. An exception of the reader aborts the connection."""
        try:
            self.reader.data_received(data)
        except Exception as error:
            self._abort_after(error)

    def pause_reading(self) -> None:
        """Stop reading from the socket until :meth:`resume_reading`."""
        self._reading_paused = True
        if self.is_open and self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the socket again."""
        self._reading_paused = False
        self._release_buffer()
        if self.is_open and self._transport is not None:
            self._transport.resume_reading()

    async def close(self, timeout: float) -> None:
        """Send the queued data, then close; after ``timeout`` seconds, or when cancelled, abort.

        A plain socket is half closed first. Until the peer has closed its side too, at most for CLOSE_LINGER, received
        data is dropped.
        """
        transport = self._transport
        if transport is None or self._lost.done():
            return
        try:
            async with asyncio.timeout(timeout):
                if not self._closing:
                    self._closing = True
                    if not transport.is_closing():
                        transport.resume_reading()  # to drop data, and to see the peer's end of stream
                    if self._queue or self._transport_paused:
                        self._drained = asyncio.get_running_loop().create_future()
                        await self._drained
                    if self._plain_socket is not None and _half_close(transport):
                        await asyncio.wait([self._lost], timeout=CLOSE_LINGER)
                    transport.close()
                await asyncio.shield(self._lost)
        except TimeoutError:
            transport.abort()
            await asyncio.shield(self._lost)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Close at once; queued data is lost."""
        self._closing = True
        self._drop_queue()
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # Paused as soon as the kernel does not accept all data. Not 0: asyncio's TLS would pause forever.
        self._transport.set_write_buffer_limits(high=0 if self._plain_socket is not None else 1, low=0)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        elif sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A VM's host that vanishes is noticed within 30 seconds; with unacknowledged data, at the kernel's timeout
            # for retransmissions. The host of a paused VM still answers probes.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE_OPTIONS:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            if _TCP_QUICKACK:
                self._quick_ack_socket = self._plain_socket or sock

    def send_directly(self, sock: socket.socket) -> None:
        """Write to this plain socket, the transport's own, without asyncio. Call it before the transport is made.

        The kernel then gathers header and payload, and accepts a reply of 1 MiB in one call. Only the rest that it does
        not accept at once is written by asyncio.
        """
        self._plain_socket = sock

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._receive_buffer is None:
            self._receive_buffer = _spare_buffers.pop() if _spare_buffers else memoryview(bytearray(RECEIVE_BUFFER))
        return self._receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing or self._internal_error is not None:
            return
        buffer = self._receive_buffer
        assert buffer is not None
        self._answered = False
        self.received += nbytes
        if self._tap is not None:
            self._tap.received(buffer[:nbytes])
        self.deliver(buffer[:nbytes])
        if not self._reading_paused:
            self._release_buffer()
        if self._quick_ack_socket is not None and not self._answered:
            # QEMU writes a transfer as several small messages. With Nagle's algorithm at QEMU and a delayed ACK here,
            # each transfer without an answer that carries the ACK would take 40 ms. The kernel resets the option: set
            # it again after each read.
            try:
                self._quick_ack_socket.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 1)
            except OSError:  # the socket is being closed
                self._quick_ack_socket = None

    def _release_buffer(self) -> None:
        if self._receive_buffer is not None and not _spare_buffers:
            _spare_buffers.append(self._receive_buffer)
        self._receive_buffer = None

    def eof_received(self) -> None:
        # The peer has closed: asyncio would first wait, perhaps forever, until the peer has read what we sent.
        if self._transport_paused and not self._closing:
            assert self._transport is not None
            self._transport.abort()

    def pause_writing(self) -> None:
        self._transport_paused = True

    def resume_writing(self) -> None:
        self._transport_paused = False
        self._flush()
        if self._reader_paused and self._queued < LOW_WATER:
            self._reader_paused = False
            try:
                self.reader.resume_writing()
            except Exception as error:
                self._abort_after(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_queue()
        self._receive_buffer = None
        if not self._lost.done():
            self._lost.set_result(None)
        if self._tap is not None:
            self._tap.closed()
        self.on_lost(self._internal_error or exc)

    def _abort_after(self, error: Exception) -> None:
        """Abort after an exception of the reader; asyncio would report the exception as the peer's fault."""
        self._internal_error = InternalError(error)
        self._drop_queue()
        if self._transport is not None:
            # Later: we may be called from asyncio's write, which would end the connection a second time.
            asyncio.get_running_loop().call_soon(self._transport.abort)

    def _flush(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._plain_socket is not None and not transport.get_write_buffer_size():
            self._gather(self._plain_socket)
        while self._queue and not self._transport_paused and not transport.is_closing():  # a write may break it
            chunk = self._next_chunk()
            self._queued -= len(chunk)
            transport.write(chunk)
        if self._drained is not None and not self._queue and not self._transport_paused and not self._drained.done():
            self._drained.set_result(None)

    def _send_at_once(self, buffers: list[Buffer]) -> int:
        """Send what the kernel accepts, if nothing is queued: the usual case. Returns the number of sent bytes."""
        sock, transport = self._plain_socket, self._transport
        if sock is None or transport is None or self._queue or self._transport_paused or transport.is_closing():
            return 0
        try:
            return sock.sendmsg(buffers if len(buffers) <= MAX_GATHERED else buffers[:MAX_GATHERED])
        except OSError:  # it would block, or is broken: asyncio's write will see that
            return 0

    def _gather(self, sock: socket.socket) -> None:
        """Send what the kernel accepts of the queue."""
        queue = self._queue
        while queue:
            try:
                sent = sock.sendmsg(queue if len(queue) <= MAX_GATHERED else list(islice(queue, MAX_GATHERED)))
            except OSError:  # it would block, or is broken: asyncio's write will see that
                return
            self._queued -= sent
            while queue and sent >= len(queue[0]):
                sent -= len(queue.popleft())
            if sent:
                queue[0] = memoryview(queue[0])[sent:]
                return

    def _next_chunk(self) -> Buffer:
        queue = self._queue
        first = queue.popleft()
        if len(first) > WRITE_CHUNK:
            view = memoryview(first)
            queue.appendleft(view[WRITE_CHUNK:])
            return view[:WRITE_CHUNK]
        if len(first) >= JOIN_LIMIT or not queue:
            return first
        parts = [first]
        room = JOIN_LIMIT - len(first)
        while queue and room:
            following = queue.popleft()
            if len(following) > room:
                view = memoryview(following)
                queue.appendleft(view[room:])
                following = view[:room]
            parts.append(following)
            room -= len(following)
        return b"".join(parts)

    def _drop_queue(self) -> None:
        self._queue.clear()
        self._queued = 0
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)


def _half_close(transport: asyncio.Transport) -> bool:
    """Half close a stream with an empty queue. Returns False if the stream has ended or broken."""
    if transport.is_closing():
        return False
    try:
        transport.write_eof()
    except OSError:
        return False
    return True


async def dial(address: Address, timeout: float) -> socket.socket:
    """Connect a socket to the first address of a name that answers.

    Args:
        address: the peer.
        timeout: seconds in all.

    Raises:
        TargetError: the address cannot be reached; the reason says why.
    """
    loop = asyncio.get_running_loop()
    candidates: list[tuple[socket.AddressFamily, tuple[Any, ...] | str]]
    failure: TargetError | None = None
    try:
        async with asyncio.timeout(timeout):
            if isinstance(address, UnixAddress):
                candidates = [(socket.AF_UNIX, address.path)]
            else:
                found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
                candidates = [(family, sockaddr) for family, *_, sockaddr in found]
            for number, (family, sockaddr) in enumerate(candidates, start=1):
                # An address that drops packets must not use up the time for the others.
                share = None if number == len(candidates) else timeout / len(candidates)
                try:
                    async with asyncio.timeout(share):
                        return await _connect(family, sockaddr)
                except OSError as error:  # TimeoutError is one
                    if failure is None or error.errno not in _NO_SUCH_NETWORK:
                        failure = _dial_error(address, error, share or timeout)
    except (OSError, ValueError) as error:  # ValueError: a NUL or an impossible label in a name
        raise _dial_error(address, error, timeout) from error
    assert failure is not None, "getaddrinfo returns at least one address"
    raise failure


async def _connect(family: socket.AddressFamily, sockaddr: tuple[Any, ...] | str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def _dial_error(address: Address, error: OSError | ValueError, timeout: float) -> TargetError:
    reason, why = Reason.UNREACHABLE, str(error)
    remedy: str = "check the network between this machine and the VM's host"
    if isinstance(error, OSError) and error.errno is not None:
        why = os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    fault = zone_fault(address.host) if isinstance(address, TcpAddress) else ""
    match error:
        case _ if fault:
            reason, why = Reason.UNRESOLVABLE, fault
            remedy = Remedy(
                "write the interface after the address: [fe80::1%eth0]; list the interfaces", command="ip -6 address"
            )
        case socket.gaierror() | UnicodeError():
            reason, why, remedy = Reason.UNRESOLVABLE, "the name cannot be resolved", "check the host's name"
        case ConnectionRefusedError():
            reason = Reason.CONNECTION_REFUSED
            remedy = "check that the VM runs, and that it listens on this address and port"
        case TimeoutError():
            reason, why = Reason.TIMED_OUT, f"no answer within {timeout:g} s"
            remedy = "check the address, and that no firewall drops the packets"
        case FileNotFoundError():
            reason, why = Reason.NOT_FOUND, "there is no such socket"
            remedy = "check the path, and that the VM runs: QEMU creates the socket when it starts"
        case PermissionError():
            reason = Reason.NO_PERMISSION
            if isinstance(address, UnixAddress):
                remedy = "a client needs write permission on the socket, and search permission on its folders"
        case OSError() if error.errno in TOO_MANY_OPEN_FILES:
            reason, remedy = Reason.IO_ERROR, open_files_remedy(error)
        case OSError() if error.errno == errno.EADDRNOTAVAIL:
            remedy = "close other connections to this address: this machine may have no port left for another one"
    return TargetError(f"cannot connect to {address}: {why}", reason=reason, remedy=remedy)


def zone_fault(host: str) -> str:
    """Return why the zone of an IPv6 address is not valid on this machine; empty if it is."""
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return ""
    zone = address.scope_id
    if zone is None:
        return "a link-local address needs a network interface" if address.is_link_local else ""
    if zone in {part for number, name in socket.if_nameindex() for part in (str(number), name)}:
        return ""
    return f"this machine has no network interface {zone[:40]!r}"


async def start(
    sock: socket.socket, connection: Connection, *, tls: ssl.SSLContext | None, server_hostname: str, timeout: float
) -> None:
    """Start a connection on a connected socket, with a TLS handshake first if there is a context.

    Args:
        sock: connected, non-blocking. It is closed on failure.
        connection: receives the bytes.
        tls: None: plain.
        server_hostname: the name for SNI and, if the context checks it, for the certificate; empty: no name.
        timeout: seconds for the handshake.

    Raises:
        OSError: as in asyncio; :class:`ssl.SSLError` is an OSError.
    """
    loop = asyncio.get_running_loop()
    try:
        if tls is None:
            connection.send_directly(sock)
            await loop.create_connection(lambda: connection, sock=sock)
        else:
            await loop.create_connection(
                lambda: connection,
                sock=sock,
                ssl=tls,
                server_hostname=server_hostname,
                ssl_handshake_timeout=timeout,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
            )
    except BaseException:
        sock.close()
        raise
