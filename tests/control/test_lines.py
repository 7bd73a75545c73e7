"""Serial lines that clients of a session open."""

from __future__ import annotations

import asyncio

from tests.control.support import RawClient
from tests.control.test_driving import code, done
from tests.control.test_media import offering
from tests.control.test_screens import request

from farplug.app.app import App
from farplug.app.client import MAX_LINES
from farplug.app.lines import MAX_CHUNK, MAX_UNACKNOWLEDGED
from farplug.ends.base import MAX_UNSENT
from farplug.ends.client import BACKLOG, ClientEnd
from farplug.virtual import VirtualDevice

SOURCES = [{"kind": "serial", "path": "client"}, {"kind": "serial", "path": "pty"}]


async def line_of(app: App) -> ClientEnd:
    """Return the end of the serial line, and let nothing else in this process be the guest."""
    for attachment in app.guests["g1"].attachments:
        assert isinstance(attachment.device, VirtualDevice)
        await attachment.device.set_configuration(0)
    return app.guests["g1"].line("serial0")


async def write(client: RawClient, line: int, data: bytes, id: int = 99) -> None:
    """Send ``serial-write``, without waiting for the reply."""
    client.send({**request(id, "serial-write", line=line), "bytes": len(data)}, data)


async def read(client: RawClient, line: int, size: int, acknowledge: bool = True) -> bytes:
    """Return what the guest has sent, as the client receives it."""
    data = b""
    while len(data) < size:
        event = await client.event("serial", line=line, ended=False)
        data += event["payload"]
        if acknowledge:
            position = event["data"]["position"] + len(event["payload"])
            client.send(request(f"ack {position}", "serial-ack", line=line, position=position))
    return data


async def test_bytes_there_and_back(environment: dict[str, str]) -> None:
    async with offering(environment, 2) as (app, server), RawClient.connect(server.path) as client:
        attached = await done(client, "attach", sources=SOURCES)
        assert attached["attachments"][0]["details"] == ["client"]
        end = await line_of(app)
        assert await end.write([b"before"])
        opened = await done(client, "serial-open", device="serial0")
        assert opened == {"line": 1, "position": 0}
        assert await read(client, 1, 6) == b"before"
        async with RawClient.connect(server.path) as other:  # each gets everything
            line = (await done(other, "serial-open", device="serial0"))["line"]
            assert await end.write([b"login", b": "])
            assert await read(other, line, 13) == b"beforelogin: "
            await write(other, line, b"root\r")
            assert await end.read() == (b"root\r",)
        assert await read(client, 1, 7) == b"login: "
        await done(client, "serial-close", line=1)
        again = await done(client, "serial-open", device="serial0")
        assert again == {"line": 2, "position": 0}
        assert await read(client, 2, 13) == b"beforelogin: "
        client.send(request("detach", "detach", device="serial0"))
        assert (await client.event("serial"))["data"] == {"line": 2, "position": 13, "ended": True}
        assert (await client.reply("detach"))["ok"]
        assert await code(client, "serial-write", line=2) == "not-found"


async def test_a_client_that_does_not_read_makes_the_guest_wait(environment: dict[str, str]) -> None:
    async with offering(environment, 1) as (app, server), RawClient.connect(server.path) as client:
        await done(client, "attach", sources=SOURCES[:1])
        end = await line_of(app)
        sent = bytes(range(256)) * 4096
        assert await end.write([sent])  # no client has it open: the last bytes are kept
        opened = await done(client, "serial-open", device="serial0")
        assert opened["position"] == len(sent) - BACKLOG
        kept = await read(client, 1, MAX_UNACKNOWLEDGED, acknowledge=False)
        assert kept == sent[-BACKLOG:][:MAX_UNACKNOWLEDGED]
        writing = asyncio.ensure_future(end.write([sent]))
        assert await code(client, "serial-ack", line=1, position=2 * len(sent)) == "bad-setting"
        assert not writing.done()
        client.send(request(97, "serial-ack", line=1, position=opened["position"] + len(kept)))
        rest = await read(client, 1, len(sent) + BACKLOG - len(kept))
        assert kept + rest == sent[-BACKLOG:] + sent
        assert await writing
        writing = asyncio.ensure_future(end.write([sent]))
        await read(client, 1, MAX_UNACKNOWLEDGED, acknowledge=False)
        assert not writing.done()
        client.writer.transport.abort()  # the guest does not wait for a client that has gone
        assert await writing


async def test_a_guest_that_does_not_read_makes_the_client_wait(environment: dict[str, str]) -> None:
    async with offering(environment, 1) as (app, server), RawClient.connect(server.path) as client:
        await done(client, "attach", sources=SOURCES[:1])
        end = await line_of(app)
        await done(client, "serial-open", device="serial0")
        await write(client, 1, bytes(MAX_UNSENT), 1)
        assert (await client.reply(1))["ok"]
        await write(client, 1, b"more", 2)
        await done(client, "status")
        assert [*await end.read()] == [bytes(MAX_UNSENT)]
        assert (await client.reply(2))["ok"]
        assert await end.read() == (b"more",)
        await write(client, 1, bytes(MAX_UNSENT), 3)
        await write(client, 1, b"waits", 4)
        assert (await client.reply(3))["ok"]
        await done(client, "detach", device="serial0")
        assert (await client.reply(4))["error"]["code"] == "not-found"


async def test_lines_that_cannot_be_opened(environment: dict[str, str]) -> None:
    async with offering(environment, 2) as (_, server), RawClient.connect(server.path) as client:
        await done(client, "attach", sources=SOURCES)
        for device in ("serial1", "serial2", "client", ""):
            assert await code(client, "serial-open", device=device) == "not-found"
        for _ in range(MAX_LINES):
            await done(client, "serial-open", device="serial0")
        assert await code(client, "serial-open", device="serial0") == "bad-setting"
        assert await code(client, "serial-ack", line=MAX_LINES + 1, position=0) == "not-found"
        assert await code(client, "serial-ack", line=1, position=-1) == "bad-setting"
        assert await code(client, "serial-close", line=0) == "not-found"
        assert MAX_CHUNK <= MAX_UNACKNOWLEDGED
