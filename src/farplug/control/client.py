"""A client of a running session.

::

    async with Client.connect(path) as client:
        await client.call("attach", {"source": {"kind": "disk", "path": "/tmp/a.raw"}})
        async for event in client.subscribe():
            print(event)
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from farplug.control.messages import (
    CLIENT_EVENTS,
    DROPPED,
    ENDED,
    HELLO,
    MAX_PAYLOAD,
    PROTOCOL_VERSION,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Buffer,
    Failure,
    FromServer,
    Hello,
    Id,
    Notification,
    Receiver,
    Reply,
    Request,
    encode,
    parse_reply,
)
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    LocalProtocolError,
    Reason,
    RemoteProtocolError,
    SetupError,
    StateError,
    TargetError,
    UsageError,
    from_oserror,
)

CONNECT_TIMEOUT: Final = 10.0
"""Seconds until a session has answered ``hello``."""
RETRY_INTERVAL: Final = 0.05
"""Seconds between attempts to connect while too many clients wait for the session."""
Listener: TypeAlias = Callable[[Notification], None]
MAX_EVENTS: Final = 1000
"""Events that wait for the reader of a subscription; of more the oldest are dropped."""


class Client:
    """A connection to a session. Made by :meth:`connect`.

    Attributes:
        path: of the session's socket.
        hello: what the session is.
    """

    hello: Hello

    def __init__(self, path: Path, connection: _Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = CONNECT_TIMEOUT,
        name: str = "farplug",
        listener: Listener | None = None,
    ) -> AsyncIterator[Self]:
        """Return a context manager that connects to the session at a socket.

        Args:
            path: of the socket.
            timeout: seconds until the session has answered.
            name: of this client, for people.
            listener: called with each event for this client alone, such as ``screen``; None: they are ignored.

        Raises:
            UsageError: ``no-session``: no session listens there.
            SetupError: this user may not use the socket, or this system has none.
            TargetError: ``timed-out``: the session does not answer.
            RemoteProtocolError: the peer is not a session, or has another version of the protocol.
            GuestGoneError: ``session-gone``: the session ended meanwhile.
        """
        connection = _Connection(Path(path), listener)
        client = cls(Path(path), connection)
        try:
            try:
                async with asyncio.timeout(timeout):
                    await _open(connection, os.fspath(path))
                    params = {"client_name": name, "protocol_version": PROTOCOL_VERSION}
                    client.hello = Hello.parse(await client.call(HELLO, params))
            except TimeoutError:
                raise TargetError(f"the session at {path} does not answer", reason=Reason.TIMED_OUT) from None
            yield client
        finally:
            connection.abort()

    async def call(self, method: str, params: Mapping[str, Any] | None = None, payload: Buffer | None = None) -> Any:
        """Call a method of the session; return its result, of JSON's types.

        If the caller is cancelled, the session carries the request out nevertheless.

        Raises:
            SessionError: the session refused the request: the reason, remedy and exit code are those of its error.
            GuestGoneError: ``session-gone``: the session ended before it replied.
            RemoteProtocolError: the session violated the protocol.
            LocalProtocolError: the parameters are too large for a message.

        Args:
            method: the name of the method.
            params: its parameters.
            payload: raw bytes beside them, for a method that takes some.
        """
        return await self._connection.call(method, params or {}, payload)

    def subscribe(self, events: Sequence[str] | None = None) -> Subscription:
        """Return an asynchronous iterator over what happens in the session.

        It yields a snapshot first: ``{"event": "snapshot", "last_event": ..., "guests": ...}``; then every event after
        the snapshot, as :meth:`farplug.app.events.Event.to_json` returns it. If the reader or the connection is too
        slow, ``{"event": "dropped", "id": ..., "count": ...}`` and a new snapshot stand in the place of the events that
        were lost. The iteration ends when the session ends in order.

        Args:
            events: the names of the events to yield; None: all of them.

        Raises:
            StateError: there is another subscription of this client.
            GuestGoneError: by the iterator: ``session-gone``: the session ended unexpectedly.
        """
        return Subscription(self, self._connection, events)


class Subscription(AsyncIterator[dict[str, Any]]):
    """Yields the events of a session. Made by :meth:`Client.subscribe`."""

    def __init__(self, client: Client, connection: _Connection, events: Sequence[str] | None) -> None:
        if connection.subscription is not None:
            raise StateError("this client has a subscription already")
        connection.subscription = self
        self._client = client
        self._connection = connection
        self._params: dict[str, Any] = {} if events is None else {"events": list(events)}
        self._events: deque[Notification] = deque()
        self._lost = self._last_lost = 0
        self._needs_snapshot = True
        self._last_event = 0
        self._closed = False
        self._there = asyncio.Event()

    def put(self, event: Notification) -> None:
        """Add an event of the session; drop the oldest one if too many wait."""
        if len(self._events) >= MAX_EVENTS:
            oldest = self._events.popleft()
            self._lost += _number(oldest, "count") if oldest.event == DROPPED else 1
            self._last_lost = _number(oldest, "id")
        self._events.append(event)
        self._there.set()

    def wake(self) -> None:
        """Take note that the connection ended."""
        self._there.set()

    async def close(self) -> None:
        """End the subscription: the client can subscribe again."""
        if not self._closed:
            self._closed = True
            self._connection.subscription = None
            if not self._connection.over:
                await self._client.call(UNSUBSCRIBE)

    async def __anext__(self) -> dict[str, Any]:
        if self._closed:
            raise StopAsyncIteration
        if self._needs_snapshot:
            result = await self._client.call(SUBSCRIBE, self._params)
            snapshot = result.get("snapshot") if isinstance(result, dict) else None
            if not isinstance(snapshot, dict) or type(snapshot.get("last_event")) is not int:
                raise RemoteProtocolError("the reply to subscribe has no snapshot")
            self._needs_snapshot = False
            self._last_event = snapshot["last_event"]
            return {"event": "snapshot", **snapshot}
        while True:
            lost, self._lost = self._lost, 0
            if lost and self._last_lost > self._last_event:
                return self._dropped(self._last_lost, lost)
            if not self._events:
                if self._connection.over:
                    raise self._connection.gone()
                self._there.clear()
                await self._there.wait()
                continue
            event = self._events.popleft()
            if event.event == ENDED:
                self._closed = True
                raise StopAsyncIteration
            id = _number(event, "id")
            if id <= self._last_event:
                continue  # the snapshot holds it
            if event.event == DROPPED:
                return self._dropped(id, _number(event, "count"))
            return {"event": event.event, **event.data}

    def _dropped(self, id: int, count: int) -> dict[str, Any]:
        self._needs_snapshot = True
        return {"event": DROPPED, "id": id, "count": count}


def _number(event: Notification, field: str) -> int:
    value = event.data.get(field)
    return value if isinstance(value, int) else 0


async def _open(connection: _Connection, path: str) -> None:
    if sys.platform == "win32":
        raise SetupError(
            "sessions with a name need UNIX sockets, which Python does not have on Windows",
            reason=Reason.UNSUPPORTED_SYSTEM,
        )
    end = socket.socket(socket.AF_UNIX)
    try:
        end.setblocking(False)
        await _connect(end, path)
        await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=end)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise UsageError(f"the session {Path(path).stem} is not running", reason=Reason.NO_SESSION) from error
    except TimeoutError:
        raise
    except (OSError, ValueError) as error:
        raise from_oserror(path, error, as_=SetupError, problem="cannot be used") from error
    finally:
        if connection.transport is None:
            end.close()


async def _connect(end: socket.socket, path: str) -> None:
    """Connect a socket. Try again while too many clients wait to be accepted, which the system does not wait for."""
    while True:
        try:
            end.connect(path)
            return
        except BlockingIOError:
            await asyncio.sleep(RETRY_INTERVAL)


class _Connection(asyncio.Protocol):
    """The client's end of the socket: requests with their replies, and the subscription."""

    def __init__(self, path: Path, listener: Listener | None) -> None:
        self._listener = listener
        self.subscription: Subscription | None = None
        self.over = False
        self._path = path
        self._receiver: Receiver[FromServer] = Receiver(parse_reply, MAX_PAYLOAD)
        self._pending: dict[Id, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._error: FarplugError | None = None
        self.transport: asyncio.Transport | None = None

    def gone(self) -> FarplugError:
        """Return why there is no connection any more."""
        return self._error or GuestGoneError(f"the session at {self._path} has ended", reason=Reason.SESSION_GONE)

    async def call(self, method: str, params: Mapping[str, Any], payload: Buffer | None) -> Any:
        """Send a request, and wait for its reply."""
        if self.over or self.transport is None:
            raise self.gone()
        id = next(self._ids)
        try:
            line = encode(Request(id, method, params, payload))
        except ValueError as error:
            raise LocalProtocolError(f"the request {method} cannot be sent: {error}") from error
        self._pending[id] = future = asyncio.get_running_loop().create_future()
        self.transport.write(line)
        return await future

    def abort(self) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._receiver.receive_data(data)
        try:
            while not self.over and (message := self._receiver.next_message()) is not None:
                self._received(message)
        except RemoteProtocolError as error:
            self._end(RemoteProtocolError(f"the peer at {self._path} is not a session: {error.message}"))

    def eof_received(self) -> None:
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(None)

    def _received(self, message: FromServer) -> None:
        match message:
            case Notification() if message.event in CLIENT_EVENTS:
                if self._listener is not None:
                    self._listener(message)
            case Notification():
                if self.subscription is not None:
                    self.subscription.put(message)
            case Failure(id=None):
                self._end(message.error.error())
            case Reply() | Failure():
                future = self._pending.pop(message.id, None)  # type: ignore[arg-type]  # None is the case above
                if future is None:
                    raise RemoteProtocolError(f"a reply to {message.id!r}, which is not a pending request")
                if future.done():
                    return  # the caller was cancelled
                if isinstance(message, Reply):
                    future.set_result(message.result)
                else:
                    future.set_exception(message.error.error())

    def _end(self, error: FarplugError | None) -> None:
        if self.over:
            return
        self.over = True
        self._error = error
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self.gone())
        self._pending.clear()
        if self.subscription is not None:
            self.subscription.wake()
        self.abort()
