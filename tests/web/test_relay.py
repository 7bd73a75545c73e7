"""What the relay passes between a browser and a session, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.control.support import BlockingApp, RawClient
from tests.control.support import session as real_session
from tests.web.support import Browser, FakeSession, Served, fake_session, obedient, reply, send
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from farplug.app.app import App
from farplug.web import relay, server


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


async def test_a_real_session(served: Served, environment: dict[str, str], tmp_path: Path) -> None:
    app = App()
    async with real_session(app, environment), served.browser() as browser:
        assert [row["name"] for row in await browser.call("sessions")] == ["web"]
        assert (await browser.call("open", {"session": "web"}))["server_name"] == "farplug"
        assert (await browser.call("subscribe"))["snapshot"]["guests"] == {}
        app.events.publish("note", "<b>hello</b>")
        data, _ = await browser.event("note")
        assert data["message"] == "<b>hello</b>"
        assert await browser.refused("detach", {"device": "x"}) != ""
        assert (
            await browser.refused("attach", {"sources": [{"kind": "disk", "path": "/etc/passwd"}]})
            == "outside-web-root"
        )
        assert await browser.refused("eject", {"drive": 3}) == "bad-setting"


async def test_methods_that_do_not_exist_reach_no_session(served: Served) -> None:
    async with fake_session(served.folder) as session, served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        for method in ("screenshot", "x", "hello"):
            assert await browser.refused(method) in ("unknown-command", "wrong-state")
        assert session.requests == []


async def test_a_watcher_reaches_the_session_with_its_methods_only(served: Served) -> None:
    async with fake_session(served.folder) as session, served.browser(served.page.tokens.view) as browser:
        await browser.call("open", {"session": "web1"})
        await browser.call("watch-screen", {"display": 0})
        for method in ("attach", "key", "pointer", "type", "drive", "quit", "media-offer", "capture", "command"):
            assert await browser.refused(method) == "view-only"
        assert session.methods == ["watch-screen"]


async def test_paths_are_those_of_the_web_root(environment: dict[str, str], root: Path) -> None:
    async with (
        Served.serve(environment, web_root=str(root)) as served,
        fake_session(served.folder) as session,
        served.browser() as browser,
    ):
        await browser.call("open", {"session": "web1"})
        disk = {"kind": "cdrom", "path": "iso/debian.iso"}
        await browser.call("attach", {"sources": [disk, {"kind": "cdrom", "path": "client:m1"}]})
        sources = [{**disk, "path": f"{root}/iso/debian.iso"}, {"kind": "cdrom", "path": "client:m1"}]
        assert session.requests[0][0]["params"] == {"sources": sources}
        for path in ("../secret.img", "/etc/passwd", "upload:../secret.img", "upload:none", "iso\0", "a\\b"):
            assert await browser.refused("insert", {"path": path}) in ("outside-web-root", "not-found", "bad-name")
        assert len(session.requests) == 1
        line = (await browser.call("command", {"method": "attach", "params": {"sources": [disk]}}))["command"]
        assert line == f"farplug attach -s web1 --usb-cdrom {root}/iso/debian.iso"
        assert await browser.refused("command", {"method": "insert", "params": {"path": "/x"}}) == "outside-web-root"


# Opening and ending -----------------------------------------------------------------------------------------------


async def test_there_must_be_an_open_session(served: Served) -> None:
    async with served.browser() as browser:
        assert await browser.refused("status") == "wrong-state"
        assert await browser.refused("insert", {"path": "client:m1"}) == "wrong-state"
        assert await browser.refused("command", {"method": "status"}) == "wrong-state"
        assert await browser.call("close") is None


@pytest.mark.parametrize("name", ["none", "", "../x", "a/b", "x" * 200, None, 3, ["a"], "a\0b", "<b>"])
async def test_a_session_that_is_not_there(served: Served, name: object) -> None:
    async with served.browser() as browser:
        assert await browser.refused("open", {"session": name}) in ("no-session", "bad-name", "bad-setting")


async def test_a_page_for_one_session(environment: dict[str, str]) -> None:
    async with (
        Served.serve(environment, session="web1") as served,
        fake_session(served.folder),
        fake_session(served.folder, name="web2"),
    ):
        assert served.page.url.endswith("&session=web1")
        async with served.browser() as browser:
            assert await browser.refused("open", {"session": "web2"}) == "no-session"
            await browser.call("open", {"session": "web1"})
            rows = await browser.call("sessions")
            assert [row["name"] for row in rows] == ["web1"]
        answer = await served.http("GET", "/screenshot.png?session=web2", token=served.page.tokens.full)
        assert answer.status == 404


async def test_another_session_takes_the_place_of_the_one_before(served: Served) -> None:
    async with (
        fake_session(served.folder) as one,
        fake_session(served.folder, name="web2") as two,
        served.browser() as browser,
    ):
        await browser.call("open", {"session": "web1"})
        await browser.call("open", {"session": "web2"})
        await one.until(lambda: one.ended["clients"] == 1)
        await browser.call("press", {"keys": "a"})
        assert (one.methods, two.methods) == ([], ["press"])
        await browser.call("close")
        await two.until(lambda: two.ended["clients"] == 1)
        assert await browser.refused("press", {"keys": "a"}) == "wrong-state"


async def test_requests_that_a_closed_session_did_not_reply_to_fail(served: Served) -> None:
    async def silent(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        pass

    async with fake_session(served.folder, silent) as session, served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        id = await browser.send("press", {"keys": "a"})
        await session.until(lambda: len(session.requests) == 1)
        await browser.send("close")
        message, _ = await browser.next()
        assert (message["id"], message["error"]["code"]) == (id, "session-gone")


async def test_the_session_ends_in_order(served: Served, environment: dict[str, str]) -> None:
    async with served.browser() as browser:
        async with real_session(App(), environment):
            await browser.call("open", {"session": "web"})
            await browser.call("subscribe", {"events": ["note"]})
        assert await browser.event("session-ended") == ({"reason": "ended", "session": "web"}, None)
        assert await browser.refused("status") == "wrong-state"
        async with real_session(App(), environment):
            await browser.call("open", {"session": "web"})


async def test_the_session_dies(served: Served) -> None:
    async def die(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if message["method"] == "quit":
            writer.transport.abort()

    async with fake_session(served.folder, die), served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        lost = [await browser.send("press", {"keys": "a"}), await browser.send("quit")]
        for id in lost:
            message, _ = await browser.next()
            assert (message["id"], message["error"]["code"]) == (id, "session-gone")
        assert await browser.event("session-ended") == ({"reason": "lost", "session": "web1"}, None)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[]\n",
        b'{"id": []}\n',
        b'{"event": "x", "bytes": -1}\n',
        b'{"event": "x", "bytes": 4194305}\n',
        b"x" * ((1 << 20) + 1) + b"\n",
        b'{"event": "\xff"}\n',
    ],
)
async def test_what_is_not_a_session(served: Served, line: bytes) -> None:
    async def babble(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(line)

    async with fake_session(served.folder, babble) as session, served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        await browser.send("press", {"keys": "a"})
        assert (await browser.event("session-ended"))[0]["reason"] == "lost"
        await session.until(lambda: session.ended["clients"] == 1)


async def test_a_session_that_does_not_greet(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.folder.mkdir(mode=0o700)
    monkeypatch.setattr("farplug.web.link.CONNECT_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(served.folder / "web1.sock"))
        async with served.browser() as browser:
            assert await browser.refused("open", {"session": "web1"}) == "no-session"
            listener.listen()
            assert await browser.refused("open", {"session": "web1"}) == "timed-out"
            await browser.call("close")


async def test_the_browser_leaves(served: Served) -> None:
    async with fake_session(served.folder) as session:
        async with served.browser() as browser:
            await browser.call("open", {"session": "web1"})
        await session.until(lambda: session.ended["clients"] == 1)


async def test_the_page_ends(environment: dict[str, str]) -> None:
    async with Served.serve(environment) as served:
        session_of = fake_session(served.folder)
        session = await session_of.__aenter__()
        opened = served.browser()
        browser = await opened.__aenter__()
        await browser.call("open", {"session": "web1"})
    await session.until(lambda: session.ended["clients"] == 1)
    assert await browser.closed() == 1012
    await session_of.__aexit__(None, None, None)


# Hostile browsers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        "nonsense",
        "[]",
        "3",
        '{"id": 1}',
        '{"id": 1, "method": "press", "params": []}',
        '{"id": 1, "method": "press", "bytes": 1048577}',
        '{"id": 1, "method": "press", "params": {"keys": NaN}}',
        "[" * 100_000,
        b"bytes",
        b"",
        json.dumps({"id": 1, "method": "press", "params": {"keys": "ä" * 400_000}}, ensure_ascii=False),
    ],
)
async def test_what_is_not_a_request(served: Served, frame: str | bytes) -> None:
    async with fake_session(served.folder) as session, served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        message = await browser.ask_anything(frame)
        assert (message["id"], message["error"]["code"]) == (None, "protocol")
        assert await browser.closed() == 4400
        await session.until(lambda: session.ended["clients"] == 1)
        assert session.requests == []


@pytest.mark.parametrize("frame", ["x" * ((1 << 20) + 1), bytes((1 << 20) + 1)])
async def test_a_frame_that_is_too_large(served: Served, frame: str | bytes) -> None:
    async with served.browser() as browser:
        await browser.websocket.send(frame)
        assert await browser.closed() == 1009


async def test_a_message_of_many_fragments(served: Served) -> None:
    async with served.browser() as browser:
        with suppress(ConnectionClosed):
            await browser.websocket.send("" for _ in range(server.MAX_FRAGMENTS + 10))
        with pytest.raises(ConnectionClosed):
            await browser.next()


async def test_small_frames_are_parsed_in_many_turns(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    kept: list[int] = []
    parse = WebSocketsSansIOProtocol.data_received

    def counted(self: server._WebSocketProtocol, data: bytes) -> None:
        parsed.append(len(data))
        kept.append(len(self._unparsed))
        parse(self, data)

    monkeypatch.setattr(WebSocketsSansIOProtocol, "data_received", counted)
    async with served.browser() as browser:
        frames = bytearray()
        for id in range(200):
            request = json.dumps({"id": f"{id}", "method": "sessions"}).encode()
            frames += b"\x8a\x80\0\0\0\0" * 3000 + bytes((0x81, 0x80 | len(request))) + bytes(4) + request
        browser.websocket.transport.write(bytes(frames))
        answered: set[str] = set()
        while len(answered) < 200:
            message, _ = await browser.next()
            assert message["ok"]
            answered.add(message["id"])
    assert sum(parsed) >= len(frames)
    assert max(parsed) <= server.PARSE_AT_ONCE
    assert max(kept) <= 512 << 10, "nothing is read while the rest is not parsed"


async def test_text_that_is_not_utf8(served: Served) -> None:
    async with served.browser() as browser:
        await browser.websocket.send(b"\xff\xfe", text=True)
        assert await browser.closed() == 1007


async def test_a_binary_frame_of_another_size(served: Served) -> None:
    async with served.browser() as browser:
        await browser.websocket.send('{"id": 1, "method": "media-data", "bytes": 2}')
        assert "its message has bytes: 2" in (await browser.ask_anything(b"abc"))["error"]["message"]
        assert await browser.closed() == 4400


async def test_a_binary_frame_that_never_comes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "BINARY_TIMEOUT", 0.05)
    async with served.browser() as browser:
        message = await browser.ask_anything('{"id": 1, "method": "media-data", "bytes": 2}')
        assert "no binary frame came" in message["error"]["message"]
        assert await browser.closed() == 4400


async def test_a_hello_that_never_comes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "HELLO_TIMEOUT", 0.05)
    async with served.websocket() as browser:
        assert "no hello came" in (await browser.next())[0]["error"]["message"]
        assert await browser.closed() == 4400


async def test_a_payload_for_a_method_of_the_page(served: Served) -> None:
    async with served.browser() as browser:
        message = await browser.ask("sessions", {}, b"abc")
        assert message["error"]["code"] == "bad-setting"


async def test_the_id_of_a_pending_request(served: Served, environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with real_session(app, environment), served.browser() as browser:
        await browser.call("open", {"session": "web"})
        frame = json.dumps({"id": 77, "method": "detach", "params": {"device": "x"}})
        await browser.websocket.send(frame)
        await app.until(begun=1)
        assert "pending request" in (await browser.ask_anything(frame))["error"]["message"]
        assert await browser.closed() == 4400
        app.go.set()


async def test_more_requests_than_may_be_pending_wait(served: Served, environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with real_session(app, environment), served.browser() as browser:
        await browser.call("open", {"session": "web"})
        ids = [await browser.send("detach", {"device": str(number)}) for number in range(100)]
        await app.until(begun=16)
        async with RawClient.connect(served.folder / "web.sock") as other:  # the session has no more of them
            await other.ask({"id": 1, "method": "status", "params": {}})
        assert len(app.begun) == 16
        app.go.set()
        assert sorted([(await browser.next())[0]["id"] for _ in ids]) == ids


async def test_a_browser_that_leaves_while_its_requests_wait(served: Served) -> None:
    async def silent(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        pass

    async with fake_session(served.folder, silent) as session:
        async with served.browser() as browser:
            await browser.call("open", {"session": "web1"})
            for _ in range(40):
                await browser.send("press", {"keys": "a"})
            await session.until(lambda: len(session.requests) == 16)
        await session.until(lambda: session.ended["clients"] == 1)
        assert len(session.requests) == 16


async def test_a_browser_that_reads_nothing(served: Served) -> None:
    """The relay stops reading the session's connection: the session notices, and bounds what it sends."""
    stopped = asyncio.Event()

    async def flood(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        reply(writer, message["id"], None)
        for serial in range(64):
            send(writer, {"event": "screen", "data": {"serial": serial}}, bytes(1 << 20))
            try:
                async with asyncio.timeout(1):
                    await writer.drain()
            except TimeoutError:
                stopped.set()
                await writer.drain()

    async with fake_session(served.folder, flood), served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        browser.websocket.transport.pause_reading()
        await browser.send("watch-screen", {"display": 0})
        async with asyncio.timeout(100):
            while not stopped.is_set():
                await asyncio.sleep(0.05)
        browser.websocket.transport.resume_reading()
        for serial in range(64):
            data, payload = await browser.event("screen")
            assert data["serial"] == serial
            assert payload is not None
            assert len(payload) == 1 << 20


class TestSlowLines:
    """Pictures for a browser that takes compressed ones."""

    ROWS = b"".join(bytes((line, column % 11, 90, 0)) for line in range(7) for column in range(1280))
    PICTURE = (ROWS * (800 // 7 + 1))[: 800 * 1280 * 4]

    async def show(self, session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Send a picture, and the next one after each acknowledgement."""
        reply(writer, message["id"], None)
        if message["method"] in ("watch-screen", "screen-ack"):
            serial = message["params"].get("serial", 0) + 1
            send(writer, {"event": "screen", "data": {"serial": serial}}, self.PICTURE)
        await writer.drain()

    async def hello(self, browser: Browser, served: Served, encodings: Any) -> None:
        params = {"protocol_version": "1.1", "token": served.page.tokens.full, "encodings": encodings}
        await browser.call("hello", params)
        await browser.call("open", {"session": "web1"})

    async def picture(self, browser: Browser) -> tuple[str | None, bytes]:
        """Return the encoding of the next picture, and its bytes."""
        while True:
            message, payload = await browser.next()
            if message.get("event") == "screen":
                assert payload is not None
                return message.get("encoding"), payload

    async def test_a_picture_through_a_slow_line(self, served: Served) -> None:
        """4 MB come through 10 kB/s, in seconds; another browser has its pictures meanwhile."""
        received = 0

        async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal received
            with suppress(OSError):
                while data := await reader.read(500):
                    received += len(data)
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(len(data) / 10_000)
            writer.close()

        async def line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with socket.socket() as end:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                end.setblocking(False)
                await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", served.port))
                from_page, to_page = await asyncio.open_connection(sock=end.dup(), limit=500)
                down = asyncio.ensure_future(slowly(from_page, writer))
                with suppress(OSError):
                    while data := await reader.read(4096):
                        to_page.write(data)
                        await to_page.drain()
                to_page.close()
                down.cancel()

        proxy = await asyncio.start_server(line, "127.0.0.1", 0, limit=4096)
        uri = f"ws://127.0.0.1:{served.port}/ws"
        port = proxy.sockets[0].getsockname()[1]
        origin = Origin(served.origin)
        async with (
            fake_session(served.folder, self.show),
            connect(uri, origin=origin, port=port, compression=None, max_size=None, proxy=None) as websocket,
            served.websocket() as other,
        ):
            browser = Browser(websocket)
            await self.hello(browser, served, ["x", "deflate"])
            await browser.send("watch-screen")
            await self.hello(other, served, None)
            await other.send("watch-screen")
            for serial in range(1, 4):
                assert await self.picture(other) == (None, self.PICTURE)
                await other.send("screen-ack", {"serial": serial})
            encoding, payload = await self.picture(browser)
            assert encoding == "deflate"
            assert zlib.decompress(payload) == self.PICTURE
            assert received < len(self.PICTURE) / 50
        proxy.close()

    async def test_a_fast_line(self, served: Served) -> None:
        async with fake_session(served.folder, self.show), served.websocket() as browser:
            await self.hello(browser, served, ["deflate"])
            await browser.send("watch-screen")
            encoding, payload = await self.picture(browser)
            assert encoding == "deflate", "what the line is like is not known"
            serial = 1
            while encoding is not None:
                assert zlib.decompress(payload) == self.PICTURE
                await browser.send("screen-ack", {"serial": serial})
                encoding, payload = await self.picture(browser)
                serial += 1
            assert payload == self.PICTURE

    @pytest.mark.parametrize("encodings", [None, [], "deflate", ["gzip"], {"deflate": 1}, [["deflate"]]])
    async def test_a_browser_that_takes_none(self, served: Served, encodings: Any) -> None:
        async with fake_session(served.folder, self.show), served.websocket() as browser:
            await self.hello(browser, served, encodings)
            await browser.send("watch-screen")
            assert await self.picture(browser) == (None, self.PICTURE)


async def test_as_many_browsers_as_a_page_serves(served: Served) -> None:
    async with fake_session(served.folder) as session:
        opened = [served.browser() for _ in range(server.MAX_WEBSOCKETS)]
        browsers: list[Browser] = [await one.__aenter__() for one in opened]
        for browser in browsers:
            await browser.call("open", {"session": "web1"})
        async with served.websocket() as one_more:
            hello = {"protocol_version": "1.1", "token": served.page.tokens.full}
            message = await one_more.ask_anything({"id": 1, "method": "hello", "params": hello})
            assert message["error"]["code"] == "busy"
            assert await one_more.closed() == 4503
        assert await browsers[-1].call("press", {"keys": "a"})
        for one in opened:
            await one.__aexit__(None, None, None)
        await session.until(lambda: session.ended["clients"] == server.MAX_WEBSOCKETS)
        async with served.browser() as browser:
            await browser.call("open", {"session": "web1"})


async def test_websockets_without_a_token_do_not_keep_others_away(served: Served) -> None:
    opened = [served.websocket() for _ in range(server.MAX_GREETINGS)]
    for one in opened:
        await one.__aenter__()
    with pytest.raises(InvalidStatus) as caught:
        async with served.websocket():
            pass
    assert caught.value.response.status_code == 503
    await opened[0].__aexit__(None, None, None)
    while True:
        try:
            async with served.browser():
                break
        except InvalidStatus:
            await asyncio.sleep(0.01)
    for one in opened[1:]:
        await one.__aexit__(None, None, None)


async def test_names_with_markup_stay_text(environment: dict[str, str], root: Path) -> None:
    name = "<img src=x onerror=alert(1)>.iso"
    (root / name).write_bytes(bytes(512))
    async with (
        Served.serve(environment, web_root=str(root)) as served,
        fake_session(served.folder, obedient),
        served.browser() as browser,
    ):
        await browser.call("open", {"session": "web1"})
        assert name in [entry["name"] for entry in (await browser.call("files"))["entries"]]
        line = await browser.call("command", {"method": "insert", "params": {"path": name}})
        assert line["command"] == f"farplug insert -s web1 '{root}/{name}'"
