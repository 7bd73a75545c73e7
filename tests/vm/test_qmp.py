from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from farplug.errors import GuestGoneError, RemoteProtocolError
from farplug.vm.qmp import MAX_EVENTS, Qmp, QmpError

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}


class Monitor:
    """QEMU's end of the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def receive(self) -> Any:
        return json.loads(await self.reader.readline())

    def send(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[socket.socket, Monitor]]:
    ours, theirs = socket.socketpair()
    monitor = Monitor(*await asyncio.open_connection(sock=theirs))
    yield ours, monitor
    await monitor.close()
    ours.close()


@pytest.fixture
async def connected(ends: tuple[socket.socket, Monitor]) -> AsyncIterator[tuple[Qmp, Monitor]]:
    ours, monitor = ends
    qmp = Qmp()
    monitor.send(GREETING)
    connecting = asyncio.create_task(qmp.connect(ours))
    assert (await monitor.receive())["execute"] == "qmp_capabilities"
    monitor.send({"return": {}, "id": 1})
    await connecting
    yield qmp, monitor
    await qmp.close()


async def test_replies_are_matched_by_id(connected: tuple[Qmp, Monitor]) -> None:
    qmp, monitor = connected
    first = asyncio.create_task(qmp.execute("a", {"some-name": 1}))
    second = asyncio.create_task(qmp.execute("b"))
    assert await monitor.receive() == {"execute": "a", "arguments": {"some-name": 1}, "id": 2}
    assert await monitor.receive() == {"execute": "b", "id": 3}
    monitor.send({"return": 99, "id": 77})
    monitor.send({"return": [2], "id": 3})
    monitor.send({"error": {"class": "GenericError", "desc": "no such thing"}, "id": 2})
    assert await second == [2]
    with pytest.raises(QmpError, match="QEMU refused a: no such thing") as error:
        await first
    assert error.value.error_class == "GenericError"


async def test_human_monitor(connected: tuple[Qmp, Monitor]) -> None:
    qmp, monitor = connected
    running = asyncio.create_task(qmp.human("info usb"))
    assert (await monitor.receive())["arguments"] == {"command-line": "info usb"}
    monitor.send({"return": "none\r\n", "id": 2})
    assert await running == "none\r\n"


async def test_events_are_kept_until_they_are_returned(connected: tuple[Qmp, Monitor]) -> None:
    qmp, monitor = connected
    for number in range(MAX_EVENTS + 1):
        monitor.send({"event": "OLD", "data": number})
    monitor.send({"event": "STOP", "data": 1})
    monitor.send({"event": "STOP", "data": 2})
    assert (await qmp.event("STOP"))["data"] == 1
    assert (await qmp.event("STOP"))["data"] == 2
    assert (await qmp.event("OLD"))["data"] == 3, "only the newest are kept"
    waiting = asyncio.create_task(qmp.event("RESUME"))
    await asyncio.sleep(0)
    monitor.send({"event": "RESUME"})
    assert (await waiting)["event"] == "RESUME"
    with pytest.raises(TimeoutError):
        await qmp.event("RESUME", timeout=0.01)


async def test_closed_monitor_fails_commands_in_flight(connected: tuple[Qmp, Monitor]) -> None:
    qmp, monitor = connected
    waiting = [asyncio.create_task(qmp.execute("stop")), asyncio.create_task(qmp.event("STOP"))]
    await monitor.receive()
    await monitor.close()
    for task in (*waiting, qmp.execute("cont"), qmp.event("STOP")):
        with pytest.raises(GuestGoneError, match="monitor"):
            await task


async def test_a_peer_that_is_not_a_qmp_server(ends: tuple[socket.socket, Monitor]) -> None:
    ours, monitor = ends
    qmp = Qmp()
    monitor.writer.write(b"SSH-2.0-x\r\n")
    with pytest.raises(RemoteProtocolError, match="not a line of JSON"):
        await qmp.connect(ours)
    await qmp.close()


@pytest.mark.parametrize("greeting", [[], {}, {"event": "x"}, 1])
async def test_an_invalid_greeting(ends: tuple[socket.socket, Monitor], greeting: object) -> None:
    ours, monitor = ends
    qmp = Qmp()
    monitor.send(greeting)
    with pytest.raises(RemoteProtocolError, match=r"not a QMP greeting|not a JSON object"):
        await qmp.connect(ours)
    await qmp.close()


async def test_end_before_the_greeting(ends: tuple[socket.socket, Monitor]) -> None:
    ours, monitor = ends
    qmp = Qmp()
    await monitor.close()
    with pytest.raises(GuestGoneError, match="before the greeting"):
        await qmp.connect(ours)
    await qmp.close()
