"""Ports on a socket: TCP and UNIX sockets to which we connect, and TCP sockets to which QEMU connects."""

from __future__ import annotations

import asyncio
import os
import socket
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from farplug.errors import FarplugError, GuestGoneError, InternalError, Reason, StateError, TargetError
from farplug.transport.connection import (
    Address,
    Connection,
    CurrentWire,
    TcpAddress,
    Timeouts,
    UnixAddress,
    dial,
    start,
    untapped,
    zone_fault,
)
from farplug.transport.port import Port, PortListener
from farplug.transport.session import Session
from farplug.usb.types import Buffer

HELLO_SIZE = 12 + 64
"""The size of the shortest usbredir hello, a header and a version, in bytes."""

ONE_PORT_REMEDY = "give the VM another socket (each carries one device), and connect to it separately"


class SocketSession(Session):
    """A VM behind one usbredir byte stream. The connection is made when its port is opened."""

    exclusive = False
    reached = False
    ends_with_port = True
    no_port_remedy = ONE_PORT_REMEDY

    def __init__(self, port: Port) -> None:
        self.ports = (port,)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def over(self) -> bool:
        return self._ended.done()

    async def closed(self) -> FarplugError | None:
        await asyncio.shield(self._ended)
        return None

    async def close(self) -> None:
        await self.ports[0].close()
        if not self._ended.done():
            self._ended.set_result(None)


class _SocketPort(Port):
    """The common part of socket ports: all but how the socket is connected."""

    def __init__(self, name: str, timeouts: Timeouts, wire: CurrentWire) -> None:
        self.name = name
        self._timeouts = timeouts
        self._wire = wire
        self._connection: Connection | None = None
        self._listener: PortListener | None = None

    async def open(self, listener: PortListener) -> None:
        if self._listener is not None:
            raise StateError(f"port {self.name} is open already")
        self._listener = listener
        try:
            sock = await self._socket()
            wire = self._wire()
            tap = None if wire is None else wire.tap(f"usbredir at {self}")
            connection = Connection(listener, self._lost, tap)
            self._connection = connection
            await start(sock, connection, tls=None, server_hostname="", timeout=self._timeouts.handshake)
        except BaseException:
            if self._connection is not None:
                self._connection.on_lost = _ignore
            self._connection = self._listener = None
            raise

    @abstractmethod
    async def _socket(self) -> socket.socket:
        """Return a connected socket, non-blocking. Raises TargetError."""

    def write(self, buffers: list[Buffer]) -> None:
        if self._connection is not None:
            self._connection.write(buffers)

    def pause_reading(self) -> None:
        if self._connection is not None:
            self._connection.pause_reading()

    def resume_reading(self) -> None:
        if self._connection is not None:
            self._connection.resume_reading()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close(self._timeouts.flush)

    def abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def _lost(self, error: Exception | None) -> None:
        connection, listener = self._connection, self._listener
        self._connection = self._listener = None
        assert connection is not None
        assert listener is not None
        listener.port_closed(None if connection.closing else self._end_error(error, connection.received))

    def _end_error(self, error: Exception | None, received: int) -> FarplugError:
        if isinstance(error, InternalError):
            return error
        if error is None:
            what = "closed the connection"
        else:
            code = error.errno if isinstance(error, OSError) else None
            what = f"broke the connection: {os.strerror(code) if code else error}"
        if received < HELLO_SIZE:
            return TargetError(
                f"the peer at {self} {what}: it sent no usbredir hello",
                reason=Reason.UNREACHABLE,
                remedy="check that this is the address of a usbredir chardev; "
                "for a SPICE server use spice://HOST:PORT or spice+tls://HOST:PORT",
            )
        return GuestGoneError(f"the guest at {self} {what}", remedy="check that the VM still runs, then connect again")


def _ignore(error: Exception | None) -> None:
    """Do nothing: the port was closed before it was open."""


class StreamPort(_SocketPort):
    """A TCP or UNIX socket that QEMU listens on (``-chardev socket,server=on``).

    Args:
        address: where QEMU listens.
        name: the port's, for messages; empty: ``tcp`` or ``unix``.
        timeouts: for connecting and closing.
        wire: taps the connections.
    """

    def __init__(
        self, address: Address, *, name: str = "", timeouts: Timeouts | None = None, wire: CurrentWire = untapped
    ) -> None:
        super().__init__(name or ("unix" if isinstance(address, UnixAddress) else "tcp"), timeouts or Timeouts(), wire)
        self.address = address

    def __str__(self) -> str:
        return str(self.address)

    async def _socket(self) -> socket.socket:
        return await dial(self.address, self._timeouts.connect)


class ListenPort(_SocketPort):
    """A TCP socket that QEMU connects to (``-chardev socket,server=off``).

    :meth:`open` waits without a timeout for one connection. While the port is open, further connections are refused.

    Args:
        address: where to listen. Port 0: any free port, which is kept for later openings.
        on_listening: called with the address each time that the port listens.
        name: the port's, for messages.
        timeouts: for closing.
        wire: taps the connections.
    """

    def __init__(
        self,
        address: TcpAddress,
        *,
        on_listening: Callable[[TcpAddress], None] | None = None,
        name: str = "tcp-listen",
        timeouts: Timeouts | None = None,
        wire: CurrentWire = untapped,
    ) -> None:
        super().__init__(name, timeouts or Timeouts(), wire)
        self.address = address
        self._on_listening = on_listening

    def __str__(self) -> str:
        return str(self.address)

    async def _socket(self) -> socket.socket:
        server = await listening_socket(self.address, 1)
        with server:
            self.address = TcpAddress(self.address.host, server.getsockname()[1])
            if self._on_listening is not None:
                self._on_listening(self.address)
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(server)
            except OSError as error:
                raise TargetError(
                    f"cannot accept a connection on {self.address}: {os.strerror(error.errno or 0)}",
                    reason=Reason.UNREACHABLE,
                ) from error
        return sock


async def listening_socket(address: TcpAddress, backlog: int) -> socket.socket:
    """Return a socket that listens, non-blocking.

    Args:
        address: of this machine. Port 0: any free port.
        backlog: connections that the kernel queues.

    Raises:
        TargetError: the address cannot be used.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise TargetError(
            f"cannot listen on {address}: {zone_fault(address.host) or 'the name cannot be resolved'}",
            reason=Reason.UNRESOLVABLE,
            remedy="give an address of this machine",
        ) from error
    family, _, _, _, sockaddr = found[0]
    try:
        return _listen(family, sockaddr, backlog)
    except OSError as error:
        raise TargetError(
            f"cannot listen on {address}: {zone_fault(address.host) or os.strerror(error.errno or 0)}",
            reason=Reason.NO_PERMISSION if isinstance(error, PermissionError) else Reason.UNREACHABLE,
            remedy="give an address of this machine and a free port above 1023 (0: any)",
        ) from error


def _listen(family: socket.AddressFamily, sockaddr: tuple[Any, ...], backlog: int) -> socket.socket:
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setblocking(False)
        server.bind(sockaddr)
        server.listen(backlog)
    except BaseException:
        server.close()
        raise
    return server
