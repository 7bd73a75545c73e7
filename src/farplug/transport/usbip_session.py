"""Devices for USB/IP clients: a listening socket, and the ports behind it.

Each port is a bus id: ``1-1``, ``1-2`` and so on. A client lists the devices, or imports one; its connection then
carries URBs, which :class:`~farplug.usbip.exporter.Exporter` translates. To the engine the port is one of a guest that
always runs.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Final, TypeAlias

from farplug.errors import FarplugError, InternalError, RemoteProtocolError, StateError
from farplug.rate_limit import RateLimit, limited_logger
from farplug.shell import shell_quote
from farplug.transport.connection import Connection, CurrentWire, TcpAddress, Timeouts, start, untapped
from farplug.transport.port import Port, PortListener
from farplug.transport.session import Session
from farplug.transport.stream import listening_socket
from farplug.usb.share import PACKET_WORK, Turn
from farplug.usb.types import Buffer
from farplug.usbip.exporter import CAPS, Exporter
from farplug.usbip.messages import (
    PORT,
    CommandParser,
    ListRequest,
    Refusal,
    RequestParser,
    ServerReply,
    encode_import,
    encode_list,
)
from farplug.usbredir import packets, protocol
from farplug.usbredir.protocol import Role

PORTS: Final = 16
"""Devices of one server: Linux's vhci_hcd takes 8 of each speed at a client by default."""
MAX_CLIENTS: Final = 64
"""Connections; a further one is closed at once."""
REQUEST_TIMEOUT: Final = 10.0
"""Seconds that a client has for its request."""
BACKLOG: Final = 16
"""Connections that the kernel queues."""
FLUSH_ABOVE: Final = 64 << 10
"""Queued bytes above which replies are sent at once."""
ACCEPT_PAUSE: Final = 1.0
"""Seconds until the next attempt to accept a connection, after this process had too many open files."""

Note: TypeAlias = Callable[[str], None]
"""Called with what users may want to know."""

log = limited_logger(__name__)


class UsbipPort(Port):
    """A port whose guest is the USB/IP client that imports its device.

    Args:
        number: from 1: the port of bus 1.
        use: the command that attaches the device at a client.

    Attributes:
        exporter: what the client sees.
        engine_paused: whether the engine takes no packets now.
    """

    offers_again = False

    def __init__(self, number: int, use: str) -> None:
        self.name = f"1-{number}"
        self.use = use
        self.engine_paused = False
        self.exporter = Exporter(self.name, number, self._to_engine, asyncio.get_running_loop())
        self._guest = protocol.Connection(Role.GUEST, caps=CAPS)
        self._listener: PortListener | None = None
        self._client: _Client | None = None
        self._scheduled = False

    async def open(self, listener: PortListener) -> None:
        if self._listener is not None:
            raise StateError(f"port {self.name} is open already")
        self._listener = listener
        self._guest = protocol.Connection(Role.GUEST, caps=CAPS)
        self.engine_paused = False
        self._guest.start()
        self._schedule()

    def serve(self, client: _Client) -> None:
        """Let a client have the device."""
        self._client = client
        self.exporter.attach(client.reply, client.device_gone)

    def end(self, client: _Client) -> None:
        """Take note that a client has left."""
        if self._client is client:
            self._client = None
            self.exporter.detach()
            self.resume_writing()

    # The engine ---------------------------------------------------------------------------------------------------

    def _to_engine(self, packet: packets.Packet) -> None:
        if self._listener is not None:
            self._guest.send(packet)
            self._schedule()

    def deliver(self) -> None:
        """Pass the packets to the engine, as long as it takes them. Not called while the engine handles a packet."""
        while not self.engine_paused and self._listener is not None and self._guest.unsent:
            for buffer in self._guest.data_to_send():
                self._listener.data_received(memoryview(buffer))

    def _schedule(self) -> None:
        """Deliver in the next turn of the event loop: the engine may be handling a packet now."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        self._scheduled = False
        self.deliver()
        if self._client is not None:
            self._client.resume()

    def write(self, buffers: list[Buffer]) -> None:
        if self._listener is None:
            return
        for buffer in buffers:
            self._guest.receive_data(buffer)
        while (event := self._guest.next_event()) is not None:
            if isinstance(event, (protocol.Violation, protocol.Oversized)):
                log.error("%s: %s", self.name, event)
            else:
                self.exporter.received(event)
        if self._client is not None:
            self._client.flush()

    def pause_reading(self) -> None:
        self.engine_paused = True

    def resume_reading(self) -> None:
        self.engine_paused = False
        self._schedule()

    def pause_writing(self) -> None:
        """Let the engine pause: the client does not take its replies."""
        if self._listener is not None:
            self._listener.pause_writing()

    def resume_writing(self) -> None:
        """Let the engine go on."""
        if self._listener is not None:
            self._listener.resume_writing()

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self.exporter.gone()
            listener.port_closed(None)


class _Client:
    """The connection of one client: its request, and then the URBs of the device that it has imported.

    Args:
        session: the server.
        peer: the client's address, for messages.
    """

    def __init__(self, session: UsbipSession, peer: str) -> None:
        self.peer = peer
        self.connection: Connection | None = None
        self._session = session
        self._request: RequestParser | None = RequestParser()
        self._commands = CommandParser()
        self._port: UsbipPort | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(REQUEST_TIMEOUT, self.abort)
        self._turn = Turn(loop.call_soon)
        self._output: list[Buffer] = []
        self._output_size = 0
        self._handling = self._writing_paused = False
        self._reading_paused = False

    # The socket ---------------------------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:
        """Handle bytes of the client."""
        if self._request is not None:
            self._request.receive_data(data)
            try:
                self._handle_request(self._request)
            except RemoteProtocolError as error:
                self._violated(error)
        else:
            self._commands.receive_data(data)
            self._turn.spend(len(data))
            self.resume()

    def pause_writing(self) -> None:
        """Take note that the client does not read."""
        self._writing_paused = True
        if self._port is not None:
            self._port.pause_writing()

    def resume_writing(self) -> None:
        """Take note that the client reads again."""
        self._writing_paused = False
        if self._port is not None:
            self._port.resume_writing()
        self.resume()

    def lost(self, error: Exception | None) -> None:
        """End: the connection is closed."""
        self._timer.cancel()
        port, self._port = self._port, None
        if port is not None:
            port.end(self)
            self._session.note("left", f"{port.name}: the client {self.peer} has left")
        if isinstance(error, InternalError):
            log.error("internal error of a USB/IP connection", exc_info=error.__cause__)
        self._session.left(self)

    def abort(self) -> None:
        """Close the connection at once."""
        if self.connection is not None:
            self.connection.abort()

    # The request --------------------------------------------------------------------------------------------------

    def _handle_request(self, parser: RequestParser) -> None:
        request = parser.next_message()
        if request is None:
            return
        self._request = None
        self._timer.cancel()
        if isinstance(request, ListRequest):
            devices = (port.exporter.device for port in self._session.ports if not port.exporter.in_use)
            self._close_after(encode_list([device for device in devices if device is not None]))
            return
        found = next((port for port in self._session.ports if port.name == request.busid), None)
        device = None if found is None else found.exporter.device
        if found is None or device is None:
            self._close_after(encode_import(Refusal.NO_DEVICE))
        elif found.exporter.in_use:
            self._close_after(encode_import(Refusal.BUSY))
        else:
            self._port = found
            found.serve(self)
            self._write([encode_import(device)])
            self._session.note("imported", f"{found.name}: attached by the client {self.peer}")
            self._commands.receive_data(parser.rest())
            self.resume()

    def _close_after(self, reply: bytes) -> None:
        self._write([reply])
        assert self.connection is not None
        self._session.keep(asyncio.ensure_future(self.connection.close(REQUEST_TIMEOUT)))

    # Commands -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Handle commands, until the engine has enough to do, or the work of this turn is done."""
        port = self._port
        if port is None or self._handling:
            return
        self._handling = True
        try:
            while not (paused := self._writing_paused or port.engine_paused or self._turn.left <= 0):
                command = self._commands.next_message()
                if command is None:
                    break
                self._turn.spend(PACKET_WORK)
                port.exporter.handle(command)
                port.deliver()
        except RemoteProtocolError as error:
            self._violated(error)
            return
        finally:
            self._handling = False
            self.flush()
        if self._turn.left <= 0:
            self._turn.call_next(self.resume)
        if paused is not self._reading_paused and self.connection is not None:
            self._reading_paused = paused
            if paused:
                self.connection.pause_reading()
            else:
                self.connection.resume_reading()

    def reply(self, message: ServerReply) -> None:
        """Queue a message to the client."""
        buffers = message.encode()
        self._output += buffers
        self._output_size += sum(map(len, buffers))

    def flush(self) -> None:
        """Send the queued messages; while commands are handled only if they are many."""
        if self._output and (not self._handling or self._output_size > FLUSH_ABOVE):
            output, self._output, self._output_size = self._output, [], 0
            self._write(output)

    def _write(self, buffers: list[Buffer]) -> None:
        if self.connection is not None:
            self.connection.write(buffers)

    def device_gone(self) -> None:
        """Close the connection: the device was unplugged."""
        port, self._port = self._port, None
        if port is not None:
            port.end(self)
        self.abort()

    def _violated(self, error: RemoteProtocolError) -> None:
        self._session.note("violation", f"the client {self.peer} violated the protocol: {error}")
        self.abort()


class UsbipSession(Session):
    """A server for USB/IP clients. Made by :meth:`listen`.

    Attributes:
        address: where it listens.
    """

    ports: tuple[UsbipPort, ...]
    exclusive = False
    reached = True
    no_port_remedy = f"start another server: one has at most {PORTS} devices"

    def __init__(self, server: socket.socket, address: TcpAddress, note: Note, wire: CurrentWire) -> None:
        self.address = address
        self._server = server
        self._wire = wire
        self._notes: RateLimit[tuple[str, str]] = RateLimit(
            lambda item: note(item[1]),
            lambda last, count: (last, (last[0], f"{count} more like this")),
            asyncio.get_running_loop,
        )
        self._clients: set[_Client] = set()
        self._without_clients = asyncio.Event()
        self._without_clients.set()
        self._closing: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ports = tuple(UsbipPort(number, self._command(number)) for number in range(1, PORTS + 1))
        self._accepting = asyncio.ensure_future(self._accept())

    @classmethod
    async def listen(cls, address: TcpAddress, note: Note, *, wire: CurrentWire = untapped) -> UsbipSession:
        """Listen for clients.

        Args:
            address: of this machine. Port 0: any free port.
            note: called with what users may want to know: clients that come and go.
            wire: taps the connections.

        Raises:
            TargetError: the address cannot be used.
        """
        server = await listening_socket(address, BACKLOG)
        where = TcpAddress(address.host, server.getsockname()[1])
        bound = server.getsockname()[0]
        note(f"listening on {where} for USB/IP clients")
        if not ipaddress.ip_address(bound.partition("%")[0]).is_loopback:
            note(
                f"warning: USB/IP has no passwords and no encryption: anyone who reaches {where} can use these devices"
            )
        return cls(server, where, note, wire)

    @property
    def over(self) -> bool:
        return self._ended.done()

    async def closed(self) -> FarplugError | None:
        await asyncio.shield(self._ended)
        return None

    async def close(self) -> None:
        for port in self.ports:
            port.abort()
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._server.close()
        for client in list(self._clients):
            client.abort()
        await self._without_clients.wait()
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._notes.release()
        if not self._ended.done():
            self._ended.set_result(None)

    def note(self, kind: str, text: str) -> None:
        """Pass on what users may want to know, within the limit for each kind."""
        self._notes.add(kind, (kind, text))

    def keep(self, task: asyncio.Task[None]) -> None:
        """Wait for a task when the session is closed."""
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def left(self, client: _Client) -> None:
        """Take note that a connection has ended."""
        self._clients.discard(client)
        if not self._clients:
            self._without_clients.set()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._server)
            except OSError as error:  # too many open files; a connection that was reset before
                logging.getLogger(__name__).debug("accepting a USB/IP client: %s", error)
                if error.errno != errno.ECONNABORTED:
                    await asyncio.sleep(ACCEPT_PAUSE)
                continue
            if len(self._clients) >= MAX_CLIENTS:
                sock.close()
                continue
            where = str(TcpAddress(peer[0], peer[1]))
            client = _Client(self, where)
            self._clients.add(client)
            self._without_clients.clear()
            tap = None if (tapped := self._wire()) is None else tapped.tap(f"USB/IP client {where}")
            client.connection = Connection(client, client.lost, tap)
            try:
                await start(sock, client.connection, tls=None, server_hostname="", timeout=Timeouts().handshake)
            except OSError as error:
                client.lost(error)

    def _command(self, number: int) -> str:
        """Return the command that attaches a device at a client."""
        host, port = self.address.host, self.address.port
        if _is_any(host):
            host = socket.gethostname()
        option = "" if port == PORT else f"--tcp-port {port} "
        return f"usbip {option}attach -r {shell_quote(host)} -b 1-{number}"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
