"""What the relay passes between a browser and a session."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.web.support import FakeSession, Served, fake_session, reply, send


async def test_a_request_goes_to_the_session_and_its_reply_comes_back(served: Served) -> None:
    async with fake_session(served.folder) as session, served.browser() as browser:
        hello = await browser.call("open", {"session": "web1"})
        assert (hello["session"], hello["target"]) == ("web1", "spice://vmhost:5900")
        assert session.names == ["Mia"]
        result = await browser.call("press", {"keys": "ctrl+alt+Delete"})
        assert result == {"method": "press", "params": {"keys": "ctrl+alt+Delete"}}


async def test_payloads_go_both_ways(served: Served) -> None:
    picture = bytes(range(256)) * 4096 * 4

    async def behave(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        reply(writer, message["id"], None)
        send(writer, {"event": "screen", "data": {"serial": 1}}, picture)
        send(writer, {"event": "cursor", "data": {"visible": False}}, b"")
        await writer.drain()

    async with fake_session(served.folder, behave) as session, served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        await browser.call("media-data", {"media": "m1", "read": 1}, b"\0" * (1 << 20))
        assert session.requests[0][1] == b"\0" * (1 << 20)
        assert await browser.event("screen") == ({"serial": 1}, picture)
        assert await browser.event("cursor") == ({"visible": False}, b"")
        await browser.call("media-data", {"media": "m1", "read": 2, "error": "gone"}, b"")
        assert session.requests[1][1] == b""
