"""The board: sessions, and pictures of their screens."""

from __future__ import annotations

import asyncio
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.control.support import session as real_session
from tests.web.support import FakeSession, Served, fake_session, reply

from farplug.app.app import App
from farplug.app.png import encode_png
from farplug.web import server
from farplug.web.thumbnail import scaled


def size_of(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def pixels_of(png: bytes) -> list[bytes]:
    """Return the rows of a PNG file whose rows have no filter."""
    length = struct.unpack(">I", png[33:37])[0]
    assert png[37:41] == b"IDAT"
    raw = zlib.decompress(png[41 : 41 + length])
    stride = 3 * size_of(png)[0] + 1
    return [raw[at + 1 : at + stride] for at in range(0, len(raw), stride)]


def picture(width: int, height: int, colour: bytes = b"\x01\x02\x03\xff") -> bytes:
    return encode_png(width, height, colour * (width * height))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1280, 800, (320, 200)),
        (1920, 1080, (320, 180)),
        (321, 200, (160, 100)),
        (320, 240, (320, 240)),
        (1, 1, (1, 1)),
        (4096, 1, (315, 1)),
        (1366, 768, (273, 153)),
    ],
)
def test_small_pictures(width: int, height: int, expected: tuple[int, int]) -> None:
    small = scaled(picture(width, height), 320)
    assert size_of(small) == expected
    assert set(b"".join(pixels_of(small))) == {1, 2, 3}


def test_a_pixel_is_a_mean_of_four() -> None:
    """Left half black and right half white in stripes of one pixel: grey in between."""
    row = (b"\x00\x00\x00\xff" + b"\x00\x00\x00\xff" + b"\xfe\xfe\xfe\xff" + b"\xfe\xfe\xfe\xff") * 100
    small = scaled(encode_png(400, 400, row * 400), 100)
    assert size_of(small) == (100, 100)
    assert set(b"".join(pixels_of(small))) == {0x7F}


@pytest.mark.parametrize("cut", [0, 8, 20, 33, 60])
def test_a_picture_that_is_cut_off(cut: int) -> None:
    with pytest.raises(ValueError):
        scaled(picture(640, 400)[:cut], 320)


@pytest.mark.parametrize("size", [(0, 10), (1 << 31, 1 << 31), (100_000, 100_000), (640, 401), (640, 399)])
def test_a_picture_with_another_size_than_its_header_says(size: tuple[int, int]) -> None:
    whole = picture(640, 400)
    with pytest.raises(ValueError):
        scaled(whole[:16] + struct.pack(">II", *size) + whole[24:], 320)


def pictured(png: bytes) -> Any:
    """Return the behaviour of a session with a screen."""

    async def behave(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if message["method"] == "screenshot":
            path = Path(message["params"]["path"])
            assert path.is_absolute()
            assert path.parent.stat().st_mode & 0o777 == 0o700
            path.write_bytes(png)
        reply(writer, message["id"], None)

    return behave


async def test_a_screenshot(served: Served) -> None:
    png = picture(640, 400)
    tokens = served.page.tokens
    async with fake_session(served.folder, pictured(png)) as session:
        for token in (tokens.full, tokens.view):
            answer = await served.http("GET", "/screenshot.png?session=web1&display=2", token=token)
            assert (answer.status, answer.headers["content-type"], answer.body) == (200, "image/png", png)
        assert session.requests[0][0]["params"]["display"] == 2
        assert [path.name for path in served.page.private.iterdir()] == []


async def test_a_browser_that_does_not_take_its_picture(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that are sent have a bound, and a time: another browser gets its own afterwards."""
    png = os.urandom(16 << 20)  # more than the buffers of the sockets have
    monkeypatch.setattr(server, "MAX_PICTURE_BYTES", len(png))
    monkeypatch.setattr(server, "SEND_TIMEOUT", 5.0)
    async with Served.serve(environment) as served, fake_session(served.folder, pictured(png)):
        path, token = "/screenshot.png?session=web1", served.page.tokens.full
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 12)
        writer.write(served.request("GET", path, token=token))
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        answer = await served.http("GET", path, token=token)
        assert (answer.status, answer.json["error"]["code"]) == (503, "busy")
        while (answer := await served.http("GET", path, token=token)).status == 503:
            await asyncio.sleep(0.05)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, png, str(len(png)))
        with suppress(ConnectionResetError):
            assert len(await reader.read()) < len(png)
        writer.close()


@pytest.mark.parametrize(
    "query", ["", "session=web1&display=-1", "session=web1&display=x", "session=../x", "session=web1%00"]
)
async def test_a_screenshot_that_is_not_valid(served: Served, query: str) -> None:
    answer = await served.http("GET", f"/screenshot.png?{query}", token=served.page.tokens.full)
    assert answer.status == 400


async def test_a_small_picture_only_of_a_screen_that_is_watched(served: Served) -> None:
    """The board never makes the session link a screen."""
    url = "/screenshot.png?session=web1&display=0&thumbnail=1"
    token = served.page.tokens.view
    async with fake_session(served.folder, pictured(picture(640, 400))) as session:
        assert (await served.http("GET", url, token=token)).status == 404
        async with served.browser() as browser:
            await browser.call("open", {"session": "web1"})
            assert (await served.http("GET", url, token=token)).status == 404
            await browser.call("watch-screen", {"display": 0})
            await browser.call("watch-screen", {"display": 0})
            answer = await served.http("GET", url, token=token)
            assert (answer.status, size_of(answer.body)) == (200, (320, 200))
            assert (await served.http("GET", url, token=token)).body == answer.body
            assert session.methods.count("screenshot") == 1  # for all boards
            assert [row["thumbnail"] for row in await browser.call("sessions")] == [True]
            await browser.call("unwatch-screen", {"display": 0})
            assert (await served.http("GET", url, token=token)).status == 404
            await browser.call("watch-screen")
            await browser.call("close")
            assert (await served.http("GET", url, token=token)).status == 404
            await browser.call("open", {"session": "web1"})
            await browser.call("watch-screen")
        await session.until(lambda: "web1" in session.names or session.ended["clients"] >= 2)
        while (await served.http("GET", url, token=token)).status != 404:
            await asyncio.sleep(0.01)


async def test_a_picture_that_is_not_one(served: Served) -> None:
    async with fake_session(served.folder, pictured(b"nonsense")), served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        await browser.call("watch-screen")
        answer = await served.http("GET", "/screenshot.png?session=web1&thumbnail=1", token=served.page.tokens.full)
        assert (answer.status, answer.json["error"]["code"]) == (502, "protocol")


async def silent(session: FakeSession, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Reply to no request."""


async def test_a_session_that_writes_no_picture(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.web.board.SCREENSHOT_TIMEOUT", 0.05)

    async with fake_session(served.folder, silent):
        answer = await served.http("GET", "/screenshot.png?session=web1", token=served.page.tokens.full)
        assert (answer.status, answer.json["error"]["code"]) == (504, "timed-out")


async def test_a_session_that_hangs_delays_no_picture_of_another(served: Served) -> None:
    png, token = picture(640, 400), served.page.tokens.full
    async with fake_session(served.folder, silent) as hanging, fake_session(served.folder, pictured(png), "web2"):
        waiting = asyncio.create_task(served.http("GET", "/screenshot.png?session=web1", token=token))
        await hanging.until(lambda: hanging.methods == ["screenshot"])
        answer = await served.http("GET", "/screenshot.png?session=web2", token=token)
        assert (answer.status, answer.body, waiting.done()) == (200, png, False)
        waiting.cancel()


async def test_the_board_shows_changes(
    served: Served, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farplug.web.relay.INTERVAL", 0.01)
    monkeypatch.setattr("farplug.web.board.MAX_AGE", 0.01)
    async with served.browser(served.page.tokens.view) as browser:
        await browser.call("watch-sessions")
        assert (await browser.event("sessions"))[0] == {"sessions": []}
        async with real_session(App(), environment):
            data, _ = await browser.event("sessions")
            assert [(row["name"], row["thumbnail"]) for row in data["sessions"]] == [("web", False)]
        while (await browser.event("sessions"))[0]["sessions"]:
            pass
        await browser.call("unwatch-sessions")
        await browser.call("watch-sessions")
        assert (await browser.event("sessions"))[0] == {"sessions": []}


async def test_what_is_not_a_session_is_in_the_list(served: Served) -> None:
    async with fake_session(served.folder, pictured(b"")), served.browser() as browser:
        (row,) = await browser.call("sessions")
        assert (row["name"], row["state"], row["reason"]) == ("web1", "not responding", "protocol")
