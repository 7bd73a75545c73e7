"""The server of a session's socket: requests to :meth:`~farplug.app.app.App.do`, events to those who subscribed.

::

    with names.reserve("web1") as reservation:
        server = Server(app, reservation, target="spice://vmhost:5900")
        await server.start()
        ...
        await server.close()
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from farplug.app.app import App
from farplug.app.codec import decode
from farplug.app.events import Event
from farplug.app.outlet import ClientEvent, Outlet
from farplug.control.messages import (
    CLIENT_EVENTS,
    DROPPED,
    ENDED,
    HELLO,
    MAX_CLIENT_PAYLOAD,
    PROTOCOL_VERSION,
    VERSION_REMEDY,
    ErrorData,
    Failure,
    Hello,
    Id,
    Notification,
    Receiver,
    Reply,
    Request,
    encode,
    major,
    parse_request,
)
from farplug.control.names import Reservation
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    InternalError,
    LocalProtocolError,
    Reason,
    RemoteProtocolError,
    SetupError,
    StateError,
    from_oserror,
)
from farplug.rate_limit import limited_logger
from farplug.text import printable, shown, without_credentials
from farplug.version import __version__

if TYPE_CHECKING:
    from farplug.app.client import AppClient

log = limited_logger(__name__)

MAX_CLIENTS: Final = 64
"""Clients of a session at a time; further ones get an error."""
MAX_PENDING: Final = 16
"""Requests of a client whose replies are not written; with more the session reads nothing more of the client.

So at most this number of replies, each of :data:`~farplug.control.messages.MAX_LINE`, waits for a client that reads
none of them.
"""
MAX_REQUESTS: Final = MAX_CLIENTS * MAX_PENDING
"""Requests of all clients, also of those that have left, that are being carried out; further ones get an error."""
MAX_EVENTS: Final = 1000
"""Events that wait for a client; of more the oldest are dropped."""
MAX_EVENT_BYTES: Final = 1 << 20
"""Bytes of the events that wait for a client; of more the oldest are dropped."""
WRITE_AT_ONCE: Final = 1 << 16
"""Bytes passed to the transport at a time, and above which the transport accepts no more."""
CLOSE_TIMEOUT: Final = 2.0
"""Seconds in which clients read what is left for them when the session ends."""
BACKLOG: Final = 64
"""Clients that connected and wait to be accepted."""

_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_SIZE = 0, 1, 76
"""macOS: the socket option, and ``struct xucred`` of <sys/ucred.h>, which begins with its version and the user."""

EVENTS: Final = (
    *("attached", "attaching", "back", "capture-ended", "capture-started", "closed", "command-refused"),
    *("configured", "connected", "copying", "detached", "device-fault", "drive", "end-changed", "figures"),
    *("function-raised", "guest", "guest-ready", "guest-removed", "input", "key-used", "line-break"),
    *("line-changed", "listener-failed", "lost", "medium-ejected", "medium-failed", "medium-inserted"),
    *("medium-locked", "note", "offer-changed", "opened", "peer-violation", "port", "port-reset"),
    *("presence-answered", "presence-asked", "ready", "reconnecting", "refused", "removed", "repeated"),
    *("skipped", "stage", "unfinished-writes", "unused", "waiting-for-guest"),
)
"""The names of the application's events."""


@dataclass(frozen=True, slots=True)
class _HelloParams:
    protocol_version: str
    client_name: str = ""


@dataclass(frozen=True, slots=True)
class _SubscribeParams:
    events: tuple[str, ...] | None = None


class Server:
    """The server of a session's socket.

    Args:
        app: carries out the commands, and publishes the events.
        reservation: the session's name; released by :meth:`close`.
        target: where the VM is. Clients get it without its password.
        log: path of the session's log file; None: there is none.

    Attributes:
        path: of the socket.
    """

    def __init__(self, app: App, reservation: Reservation, *, target: str, log: str | None = None) -> None:
        self._target = without_credentials(target)
        self._started = round(time.time(), 3)
        self._log = log
        self.path = reservation.path
        self._app = app
        self._reservation = reservation
        self._clients: set[_Client] = set()
        self._requests: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Future[None]] = set()
        """What clients that have left had begun, and is ending."""
        self._listener: asyncio.AbstractServer | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._closing = False

    @cached_property
    def hello(self) -> Hello:
        """Return what the session is."""
        from farplug.control.methods import METHODS  # the commands, which a session without clients does not need

        return Hello(
            session=self._reservation.name,
            target=self._target,
            pid=os.getpid(),
            started=self._started,
            log=self._log,
            farplug_version=__version__,
            protocol_version=PROTOCOL_VERSION,
            supported_methods=METHODS,
            supported_events=(*EVENTS, *CLIENT_EVENTS, DROPPED, ENDED),
        )

    async def start(self) -> None:
        """Listen on the session's socket.

        Raises:
            SetupError: the socket cannot be made.
        """
        if sys.platform == "win32":
            raise SetupError("Python has no UNIX sockets on Windows", reason=Reason.UNSUPPORTED_SYSTEM)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(os.fspath(self.path))
            os.chmod(self.path, 0o600)  # before listen: until then every connection is refused
            self._listener = await asyncio.get_running_loop().create_unix_server(
                lambda: _Client(self), sock=listener, backlog=BACKLOG
            )
        except OSError as error:
            listener.close()
            raise from_oserror(self.path, error, as_=SetupError, problem="cannot be made") from error
        self._unsubscribe = self._app.subscribe(self._event)

    async def close(self) -> None:
        """Cancel pending requests, send what is left, close all connections, and release the name.

        Close the application's guests first: their last events reach the clients then. A second call has no effect.
        """
        if self._closing:
            return
        self._closing = True
        try:
            if self._listener is not None:
                self._listener.close()
            if self._unsubscribe is not None:
                self._unsubscribe()
            for request in self._requests:
                request.cancel()
            if self._requests:
                await asyncio.wait(self._requests)
            clients = list(self._clients)
            for client in clients:
                client.end_session()
            await _closed(clients, CLOSE_TIMEOUT)
            for client in clients:
                client.abort()
            await _closed(clients, None)
            if self._ending:
                await asyncio.wait(self._ending)
        finally:
            self._reservation.release()

    # For clients --------------------------------------------------------------------------------------------------

    def joined(self, client: _Client) -> None:
        """Accept a client.

        Raises:
            SetupError: there are too many, or the session is ending.
        """
        if self._closing:
            raise GuestGoneError("the session is ending", reason=Reason.SESSION_GONE)
        if len(self._clients) >= MAX_CLIENTS:
            raise SetupError(
                f"the session has {MAX_CLIENTS} clients", reason=Reason.BUSY, remedy="close one of them, and try again"
            )
        self._clients.add(client)

    def left(self, client: _Client) -> None:
        """Forget a client. Its requests are carried out nevertheless."""
        self._clients.discard(client)
        client.user.close()
        self._ending.add(ending := asyncio.ensure_future(client.user.closed()))
        ending.add_done_callback(self._ending.discard)

    def user(self, outlet: Outlet) -> AppClient:
        """Return a client of the application."""
        return self._app.client(outlet)

    def begin(self, client: _Client, request: Request) -> None:
        """Begin to carry out a request."""
        task = asyncio.get_running_loop().create_task(self._carry_out(client, request))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _carry_out(self, client: _Client, request: Request) -> None:
        try:
            line = encode_reply(Reply(request.id, await self._result(client, request)))
        except asyncio.CancelledError:
            gone = GuestGoneError("the session ended before the request was done", reason=Reason.SESSION_GONE)
            line = encode(Failure(request.id, ErrorData.of(gone)))
        except FarplugError as error:
            line = encode(Failure(request.id, ErrorData.of(error)))
        except Exception as error:
            log.exception("the request %s failed", request.method)
            line = encode(Failure(request.id, ErrorData.of(InternalError(error))))
        client.replied(request.id, line)

    async def _result(self, client: _Client, request: Request) -> Any:
        if request.method == HELLO:
            return self._greet(client, request)
        if not client.greeted:
            raise StateError("the first request must be hello")
        match request.method:
            case "subscribe":
                return self._subscribe(client, decode(_SubscribeParams, request.params, ignore_unknown=True))
            case "unsubscribe":
                wanted = decode(_SubscribeParams, request.params, ignore_unknown=True).events
                removed = client.events if wanted is None else client.events.intersection(wanted)
                client.events -= removed
                return {"unsubscribed": sorted(removed)}
        from farplug.control.methods import parse_command

        if len(self._requests) > MAX_REQUESTS:
            raise SetupError(
                f"the session carries {MAX_REQUESTS} requests out, also those of clients that have left",
                reason=Reason.BUSY,
                remedy="wait until some of them are done, and try again",
            )
        command = parse_command(request.method, request.params)
        return await client.user.do(command, request.payload)

    def _greet(self, client: _Client, request: Request) -> Any:
        params = decode(_HelloParams, request.params, ignore_unknown=True)
        if major(params.protocol_version) != major(PROTOCOL_VERSION):
            raise RemoteProtocolError(
                f"the session has version {PROTOCOL_VERSION} of the control protocol, the client has "
                f"{shown(params.protocol_version)}",
                remedy=VERSION_REMEDY,
            )
        from farplug.app.client import MAX_NAME

        client.greeted = True
        client.user.name = printable(params.client_name, MAX_NAME)
        return self.hello.to_json()

    def _subscribe(self, client: _Client, params: _SubscribeParams) -> Any:
        client.events |= frozenset(EVENTS if params.events is None else params.events).intersection(EVENTS)
        snapshot = self._app.snapshot()
        client.last_event = snapshot["last_event"]
        return {"subscribed": sorted(client.events), "snapshot": snapshot}

    def _event(self, event: Event) -> None:
        interested = [one for one in self._clients if event.name in one.events and event.id > one.last_event]
        if not interested:
            return
        data = event.to_json()
        del data["event"]
        try:
            line = encode(Notification(event.name, data))
        except ValueError:  # too long
            line = b""
        for client in interested:
            client.happened(event.id, line)


def encode_reply(reply: Reply) -> bytes:
    """Return the line of a reply.

    Raises:
        LocalProtocolError: the result is too large for a message.
    """
    try:
        return encode(reply)
    except ValueError as error:
        raise LocalProtocolError(f"the result cannot be sent: {error}") from error


async def _closed(clients: list[_Client], timeout: float | None) -> None:
    if clients:
        await asyncio.wait([client.closed for client in clients], timeout=timeout)


class _Client(asyncio.Protocol):
    """The server's end of a client's connection.

    Attributes:
        greeted: ``hello`` was successful.
        events: the names of the events that the client subscribed to.
        last_event: the id of the last event in the snapshot that the client got.
        user: the client as the application has it.
        closed: is done when the connection is closed.
    """

    def __init__(self, server: Server) -> None:
        self.greeted = False
        self.user = server.user(self)
        self.events: frozenset[str] = frozenset()
        self.last_event = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server = server
        self._receiver: Receiver[Request] = Receiver(parse_request, MAX_CLIENT_PAYLOAD)
        self._transport: asyncio.Transport | None = None
        self._pending: set[Id] = set()
        """Ids of the requests whose replies were not passed to the transport yet."""
        self._output: deque[_Line] = deque()
        self._posted: dict[Hashable, Callable[[], ClientEvent | None]] = {}
        """Events for this client alone, which are made when the transport accepts them."""
        self._event_count = self._event_bytes = self._dropped = self._last_dropped = 0
        self._full = False
        """The transport accepts no more."""
        self._writing = False
        self._eof = False
        self._finishing = False
        """Nothing more is read; the connection is closed when the output is written."""

    # From the transport -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if _peer_uid(transport.get_extra_info("socket")) not in (os.geteuid(), 0):
            transport.abort()
            self._finishing = True
            return
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_AT_ONCE)
        try:
            self._server.joined(self)
        except FarplugError as error:
            self._refuse(error)

    def data_received(self, data: bytes) -> None:
        if not self._finishing:
            self._receiver.receive_data(data)
            self._read()

    def eof_received(self) -> bool:
        self._eof = True
        self._read()
        return True  # replies can still be sent

    def connection_lost(self, error: Exception | None) -> None:
        self._finishing = True
        self._transport = None
        self._output.clear()
        self._posted.clear()
        self._server.left(self)
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._write()
        self._read()

    # Input --------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Begin requests until enough are pending."""
        try:
            while not self._finishing and len(self._pending) < MAX_PENDING:
                request = self._receiver.next_message()
                if request is None:
                    break
                if request.id in self._pending:
                    raise RemoteProtocolError(f"id: {shown(request.id)} is that of a pending request")
                self._pending.add(request.id)
                self._server.begin(self, request)
            else:
                if self._transport is not None and not self._eof:
                    self._transport.pause_reading()
                return
            if self._eof:
                self._receiver.receive_eof()
                # The client cannot acknowledge, answer or release anything. Requests that have begun come first.
                asyncio.get_running_loop().call_soon(self.user.close)
                if not self._pending:
                    self._finish()
            elif self._transport is not None:
                self._transport.resume_reading()
        except RemoteProtocolError as error:
            self._refuse(error)

    def _refuse(self, error: FarplugError) -> None:
        """Send an error that concerns the connection, and close it."""
        log.info("a client of the control socket is refused: %s", error.reason)  # the message quotes what it sent
        self._queue(_Line(encode(Failure(None, ErrorData.of(error)))))
        self._finish()
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort)  # a client that does not read it

    # Output -------------------------------------------------------------------------------------------------------

    def replied(self, id: Id, line: bytes) -> None:
        """Send the reply to a request."""
        self._queue(_Line(line, id=id))
        self._read()

    def happened(self, id: int, line: bytes) -> None:
        """Send an event, or drop the oldest ones that wait. An empty line is an event that cannot be sent."""
        if self._finishing:
            return
        if line:
            self._event_count += 1
            self._event_bytes += len(line)
            self._queue(_Line(line, event=id))
        else:
            self._dropped, self._last_dropped = self._dropped + 1, id
            self._write()
        while self._event_count > MAX_EVENTS or self._event_bytes > MAX_EVENT_BYTES:
            index, oldest = next((index, line) for index, line in enumerate(self._output) if line.event)
            self._event_count -= 1
            self._event_bytes -= len(oldest.data)
            self._dropped, self._last_dropped = self._dropped + 1, oldest.event
            del self._output[index]

    def post(self, key: Hashable, make: Callable[[], ClientEvent | None]) -> None:
        """Send an event when the transport accepts it; see :meth:`farplug.app.watch.Outlet.post`."""
        if self._transport is None or self._finishing:
            return
        waits = key in self._posted
        self._posted[key] = make
        if not waits:
            self._queue(_Line(posted=key))

    def end_session(self) -> None:
        """Send the last event to a client that subscribed, and close the connection."""
        if self.events and not self._finishing:
            self._queue(_Line(encode(Notification(ENDED))))
        self._finish()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _queue(self, line: _Line) -> None:
        if self._transport is None or self._finishing:
            return
        self._output.append(line)
        self._write()

    def _write(self) -> None:
        """Pass output to the transport until it accepts no more, or the client has gone."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._writing:
            return  # an event that is being made posts another one
        self._writing = True
        try:
            while (self._output or self._dropped) and not self._full and not transport.is_closing():
                batch = self._batch()
                transport.write(batch[0] if len(batch) == 1 else b"".join(batch))
        finally:
            self._writing = False
        if self._finishing and not self._output:
            transport.close()

    def _batch(self) -> list[bytes]:
        """Take lines that are written together from the output."""
        batch: list[bytes] = []
        size = 0
        if self._dropped and (not self._output or self._output[0].event):
            batch.append(encode(Notification(DROPPED, {"id": self._last_dropped, "count": self._dropped})))
            self._dropped = 0
        while self._output and size < WRITE_AT_ONCE and not (self._dropped and self._output[0].event):
            line = self._output.popleft()
            if line.event:
                self._event_count -= 1
                self._event_bytes -= len(line.data)
            elif line.id is not None:
                self._pending.discard(line.id)
            data = line.data if line.posted is None else self._made(line.posted)
            batch.append(data)
            size += len(data)
        return batch

    def _made(self, key: Hashable) -> bytes:
        """Return an event for this client alone; empty: there is none any more."""
        event = self._posted.pop(key)()
        return b"" if event is None else encode(Notification(event.name, event.data, event.payload))

    def _finish(self) -> None:
        """Read nothing more, and close the connection when the output is written."""
        self._finishing = True
        self.events = frozenset()
        if self._transport is not None:
            if not self._eof:
                self._transport.pause_reading()
            self._write()


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that waits to be sent.

    Attributes:
        data: the line.
        event: the id of the event, which may be dropped; 0: it is not an event.
        id: of the request that it is the reply to.
        posted: the key of an event for this client alone, whose line is made when it is sent; None: it is not such.
    """

    data: bytes = b""
    event: int = 0
    id: Id | None = None
    posted: Hashable = None


def _peer_uid(connection: socket.socket) -> int:
    """Return the user of the process at the other end of a UNIX socket, when it connected: unix(7)."""
    if sys.platform == "linux":
        _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(uid)
    try:
        credentials = connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_SIZE)
    except OSError:  # the peer has gone
        return -1
    _, uid = struct.unpack_from("II", credentials)
    return int(uid)
