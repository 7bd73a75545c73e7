"""The command line run in this process, against peers that are served by a thread."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from tests.transport.fake_spice import Channel, message

from farplug.cli.main import run
from farplug.usb import Status
from farplug.usb.types import Buffer
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Role

_T = TypeVar("_T")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Cli:
    """Runs the command line; what every run has in common is checked here."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Result:
        self._capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        assert "Traceback" not in err
        assert "internal error" not in err
        return Result(int(code), out, err)


@contextmanager
def in_thread(serve: Callable[[], AbstractAsyncContextManager[_T]]) -> Iterator[_T]:
    """Run an asynchronous context in a thread of its own; its value."""
    loop = asyncio.new_event_loop()
    entered: list[_T] = []
    failed: list[BaseException] = []
    ready = threading.Event()
    leave = asyncio.Event()

    async def main() -> None:
        try:
            async with serve() as value:
                entered.append(value)
                ready.set()
                await leave.wait()
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=loop.run_until_complete, args=[main()])
    thread.start()
    ready.wait(100)
    try:
        if failed:
            raise failed[0]
        yield entered[0]
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join(100)
        loop.close()
    if failed:
        raise failed[0]


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, interrupt)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class FakeGuest:
    """A guest's end of a usbredir stream: configures each device that it is offered.

    Args:
        when_configured: called then; by default Ctrl-C.
        caps: what it announces.
        filter: what it sends after its hello.
        rejects: answer a device with filter_reject.
        silent: never say hello.
    """

    def __init__(
        self,
        when_configured: Callable[[], None] = interrupt,
        *,
        caps: Cap = ALL_CAPS,
        filter: str | None = None,
        rejects: bool = False,
        silent: bool = False,
    ) -> None:
        self.seen: list[packets.Packet] = []
        self._when_configured = when_configured
        self._caps = caps
        self._filter = filter
        self._rejects = rejects
        self._silent = silent
        self._connection = Connection(Role.GUEST, caps=caps)

    def start(self) -> list[Buffer]:
        self._connection = Connection(Role.GUEST, caps=self._caps)
        if not self._silent:
            self._connection.start()
        return self._connection.data_to_send()

    def receive(self, data: bytes) -> list[Buffer]:
        self._connection.receive_data(data)
        if not self._silent:
            while (event := self._connection.next_event()) is not None:
                assert isinstance(event, packets.Packet), event
                self.seen.append(event)
                self._answer(event)
        return self._connection.data_to_send()

    def _answer(self, packet: packets.Packet) -> None:
        match packet:
            case packets.Hello() if self._filter is not None:
                self._connection.send(packets.FilterFilter(filter=self._filter))
            case packets.DeviceConnect() if self._rejects:
                self._connection.send(packets.FilterReject())
            case packets.DeviceConnect():
                self._connection.send(packets.SetConfiguration(id=1, configuration=1))
            case packets.ConfigurationStatus() if packet.status is Status.SUCCESS:
                self._when_configured()
            case packets.DeviceDisconnect() if self._caps & Cap.DEVICE_DISCONNECT_ACK:
                self._connection.send(packets.DeviceDisconnectAck())

    async def behave(self, channel: Channel) -> None:
        """As a usbredir channel of the fake SPICE server."""
        port = copy(self)  # with a connection of its own; what all ports have seen is one list
        channel.send(message(101, b"".join(port.start())))
        while True:
            kind, body = await channel.receive_other_than_pong()
            if kind == 101:
                for buffer in port.receive(body):
                    channel.send(message(101, bytes(buffer)))

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve on a TCP port; the target."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                writer.writelines([bytes(buffer) for buffer in self.start()])
                while data := await reader.read(1 << 16):
                    writer.writelines([bytes(buffer) for buffer in self.receive(data)])
            except OSError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await asyncio.sleep(0.05)


@asynccontextmanager
async def saying(greeting: bytes) -> AsyncIterator[int]:
    """A TCP server that says something to everybody, then closes; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4)
        writer.write(greeting)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.sleep(0.05)


def blank(path: Path, size: int = 1 << 20) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def wait_for(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
