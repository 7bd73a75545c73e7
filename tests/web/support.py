"""A page in this process, browsers of it, and a session that answers what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Origin

from farplug.web.server import Page, PageSettings

HELLO: dict[str, Any] = {
    "server_name": "farplug",
    "protocol_version": "1.0",
    "farplug_version": "0",
    "session": "web1",
    "target": "spice://vmhost:5900",
    "pid": 1,
    "started": 1.0,
    "log": None,
    "supported_methods": [],
    "supported_events": [],
}


class FakeSession:
    """A session's socket: it greets, and a test does the rest.

    Attributes:
        requests: what came after ``hello``, each with its payload.
        names: how the clients named themselves.
        writers: the connections of clients that are open.
    """

    def __init__(self, behave: Callable[[FakeSession, dict[str, Any], asyncio.StreamWriter], Awaitable[None]]) -> None:
        self.requests: list[tuple[dict[str, Any], bytes | None]] = []
        self.names: list[str] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.changed = asyncio.Condition()
        self.ended: Counter[str] = Counter()
        self._behave = behave

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while line := await reader.readline():
                message = json.loads(line)
                payload = await reader.readexactly(message["bytes"]) if "bytes" in message else None
                if message["method"] == "hello":
                    self.names.append(message["params"]["client_name"])
                    reply(writer, message["id"], HELLO)
                    continue
                async with self.changed:
                    self.requests.append((message, payload))
                    self.changed.notify_all()
                await self._behave(self, message, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.writers.remove(writer)
            async with self.changed:
                self.ended["clients"] += 1
                self.changed.notify_all()
            writer.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true after a request, or after a client left."""
        async with self.changed:
            await self.changed.wait_for(condition)

    @property
    def methods(self) -> list[str]:
        return [message["method"] for message, _ in self.requests]


def send(writer: asyncio.StreamWriter, message: Mapping[str, Any], payload: bytes | None = None) -> None:
    whole = dict(message) if payload is None else {**message, "bytes": len(payload)}
    writer.write(json.dumps(whole).encode() + b"\n" + (payload or b""))


def reply(writer: asyncio.StreamWriter, id: Any, result: Any = None, payload: bytes | None = None) -> None:
    send(writer, {"id": id, "ok": True, "result": result}, payload)


async def obedient(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Reply to each request with its parameters."""
    reply(writer, message["id"], {"method": message["method"], "params": message["params"]})


@asynccontextmanager
async def fake_session(
    folder: Path,
    behave: Callable[[FakeSession, dict[str, Any], asyncio.StreamWriter], Awaitable[None]] = obedient,
    name: str = "web1",
) -> AsyncIterator[FakeSession]:
    """Serve a session's socket."""
    folder.mkdir(mode=0o700, exist_ok=True)
    session = FakeSession(behave)
    server = await asyncio.start_unix_server(session.serve, folder / f"{name}.sock", limit=1 << 21)
    try:
        yield session
    finally:
        server.close()
        for writer in session.writers:
            writer.transport.abort()
        await session.until(lambda: not session.writers)
        (folder / f"{name}.sock").unlink(missing_ok=True)


class Browser:
    """A browser's websocket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.events: list[tuple[dict[str, Any], bytes | None]] = []
        self._id = 0

    async def next(self) -> tuple[dict[str, Any], bytes | None]:
        """Return the next message, with its payload."""
        text = await self.websocket.recv()
        assert isinstance(text, str)
        message: dict[str, Any] = json.loads(text)
        if "bytes" not in message:
            return message, None
        payload = await self.websocket.recv()
        assert isinstance(payload, bytes)
        assert len(payload) == message["bytes"]
        return message, payload

    async def send(self, method: str, params: Any = None, payload: bytes | None = None) -> int:
        """Send a request; return its id."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": {} if params is None else params}
        if payload is not None:
            message["bytes"] = len(payload)
        await self.websocket.send(json.dumps(message))
        if payload is not None:
            await self.websocket.send(payload)
        return self._id

    async def ask(self, method: str, params: Any = None, payload: bytes | None = None) -> dict[str, Any]:
        """Send a request; return its reply. Events that come meanwhile are kept."""
        id = await self.send(method, params, payload)
        while True:
            message, received = await self.next()
            if "event" in message:
                self.events.append((message, received))
                continue
            assert message["id"] == id, message
            return message

    async def call(self, method: str, params: Any = None, payload: bytes | None = None) -> Any:
        """Send a request; return its result."""
        message = await self.ask(method, params, payload)
        assert message["ok"] is True, message
        return message["result"]

    async def refused(self, method: str, params: Any = None) -> str:
        """Send a request that fails; return the code."""
        message = await self.ask(method, params)
        assert message["ok"] is False, message
        code: str = message["error"]["code"]
        return code

    async def ask_anything(self, frame: Any) -> dict[str, Any]:
        """Send a frame, a value as JSON; return the next message."""
        await self.websocket.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))
        return (await self.next())[0]

    async def event(self, name: str) -> tuple[dict[str, Any], bytes | None]:
        """Return the next event with a name."""
        while True:
            message, payload = self.events.pop(0) if self.events else await self.next()
            if message.get("event") == name:
                return message["data"], payload

    async def closed(self) -> int:
        """Return the code with which the page closes the websocket."""
        await self.websocket.wait_closed()
        code = self.websocket.close_code
        assert code is not None
        return code


@dataclass
class Served:
    """A page, and what a test needs of it."""

    page: Page
    port: int
    folder: Path

    @classmethod
    @asynccontextmanager
    async def serve(cls, environment: dict[str, str], **settings: Any) -> AsyncIterator[Self]:
        async with asyncio.timeout(60), Page.serve(PageSettings(**settings), environment) as page:
            yield cls(page, page.port, Path(environment["XDG_RUNTIME_DIR"]) / "farplug")

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def websocket(self, origin: str | None = None, path: str = "/ws") -> AsyncIterator[Browser]:
        """Connect without a greeting."""
        uri = f"ws://127.0.0.1:{self.port}{path}"
        async with connect(
            uri,
            origin=Origin(origin or self.origin),
            compression=None,
            max_size=None,
            proxy=None,
        ) as websocket:
            yield Browser(websocket)

    @asynccontextmanager
    async def browser(self, token: str | None = None) -> AsyncIterator[Browser]:
        """Connect and greet."""
        async with self.websocket() as browser:
            params = {"protocol_version": "1.1", "client_name": "Mia", "token": token or self.page.tokens.full}
            await browser.call("hello", params)
            yield browser

    async def http(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        *,
        token: str | None = None,
    ) -> Answer:
        """Send a request with exactly these headers, besides Host and Content-Length if they are missing."""
        return await self.raw(self.request(method, path, headers, body, token=token))

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        *,
        token: str | None = None,
    ) -> bytes:
        fields = {"Host": f"127.0.0.1:{self.port}", "Connection": "close", **(headers or {})}
        if token is not None:
            fields["Authorization"] = f"Bearer {token}"
        if body or method == "PUT":
            fields.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def raw(self, data: bytes) -> Answer:
        """Send bytes; return what comes until the page closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status, *lines = head.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines)
        return Answer(int(status.split()[1]) if status else 0, fields, body)


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)
