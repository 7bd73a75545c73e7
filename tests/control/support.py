"""A session in this process, and clients of it that send any bytes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self

from farplug.app.app import App
from farplug.app.commands import Command, Detach, Eject, Insert
from farplug.app.screen import Progress
from farplug.control import names
from farplug.control.server import Server

HELLO: dict[str, Any] = {"id": 0, "method": "hello", "params": {"protocol_version": "1.0"}}


class BlockingApp(App):
    """An application whose ``detach`` waits for :attr:`go`, and whose ``insert`` has a result as long as its path."""

    def __init__(self) -> None:
        super().__init__(quit=lambda: self.done.append("quit"))
        self.go = asyncio.Event()
        self.begun: list[str] = []
        self.done: list[str] = []
        self.changed = asyncio.Event()

    async def do(self, command: Command, client: str = "", progress: Progress = lambda done: None) -> Any:
        match command:
            case Detach(device=device):
                self.begun.append(device)
                self.changed.set()
                await self.go.wait()
                self.done.append(device)
                self.changed.set()
                return device
            case Insert(path=path):
                return path * 1000
            case Eject(drive=drive):
                raise ZeroDivisionError(f"a bug{drive or ''}")
        return await super().do(command, client, progress)

    async def until(self, begun: int = 0, done: int = 0) -> None:
        """Wait until these numbers of calls of ``detach`` have begun, and are done."""
        while len(self.begun) < begun or len(self.done) < done:
            self.changed.clear()
            await self.changed.wait()

    def note(self, text: str) -> None:
        """Publish an event."""
        self.events.publish("note", text)


@asynccontextmanager
async def session(app: App, environment: dict[str, str], name: str = "web") -> AsyncIterator[Server]:
    """Run a session."""
    server = Server(app, names.reserve(name, environment=environment), target="spice://vmhost:5900")
    await server.start()
    try:
        async with asyncio.timeout(60):
            yield server
    finally:
        await server.close()


class RawClient:
    """A client that sends any bytes, and reads lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._replies: dict[Any, dict[str, Any]] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, path: Path, *, hello: bool = True) -> AsyncIterator[Self]:
        client = cls(*await asyncio.open_unix_connection(path, limit=1 << 24))
        try:
            if hello:
                assert (await client.ask(HELLO))["ok"] is True
            yield client
        finally:
            client.writer.transport.abort()

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    async def line(self) -> bytes:
        """Return the next line; empty: the connection is closed."""
        try:
            return await self.reader.readline()
        except ConnectionError:
            return b""

    async def next(self) -> dict[str, Any]:
        line = await self.line()
        assert line.endswith(b"\n"), line[:1000]
        message: dict[str, Any] = json.loads(line)
        if "bytes" in message:
            message["payload"] = await self.reader.readexactly(message["bytes"])
        return message

    async def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Return the next event with a name and these fields of its data; skip other events."""
        while True:
            message = await self.next()
            if "id" in message:
                self._replies[message["id"]] = message
            elif message.get("event") == name and fields.items() <= message["data"].items():
                return message

    async def reply(self, id: Any) -> dict[str, Any]:
        """Return the reply to a request; skip events."""
        while id not in self._replies:
            message = await self.next()
            if "id" in message:
                self._replies[message["id"]] = message
        return self._replies.pop(id)

    async def ask(self, message: Any) -> dict[str, Any]:
        """Send a message; return the next one."""
        self.send(message)
        return await self.next()

    async def refused(self) -> str:
        """Return the message of the error that ends the connection."""
        message = await self.next()
        assert (message["id"], message["ok"], message["error"]["exit_code"]) == (None, False, 10)
        assert message["error"]["code"] == "protocol"
        assert await self.line() == b""
        text: str = message["error"]["message"]
        return text


@contextmanager
def silent_socket(path: Path) -> Iterator[socket.socket]:
    """Listen on a socket, and do nothing else."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(8)
        yield listener
