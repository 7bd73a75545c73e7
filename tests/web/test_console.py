"""Browsers of a real session, whose VM has a screen, a keyboard and a mouse."""

from __future__ import annotations

import json

import pytest
from tests.control.test_screens import HEIGHT, PIXELS, WIDTH, Viewer, console
from tests.web.support import Browser, Served


async def show(browser: Browser, viewer: Viewer) -> None:
    """Show the next event of the screen, and acknowledge it."""
    data, payload = await browser.event("screen")
    viewer.show({"data": data, "payload": payload})
    await browser.call("screen-ack", {"serial": data["serial"]})


@pytest.mark.parametrize("role", ["full", "view"])
async def test_the_picture_and_its_changes(served: Served, environment: dict[str, str], role: str) -> None:
    tokens = served.page.tokens
    async with console(environment) as one, served.browser(getattr(tokens, role)) as browser:
        await browser.call("open", {"session": "web"})
        await browser.call("watch-screen")
        viewer = Viewer()
        await show(browser, viewer)
        assert viewer.pixels == PIXELS
        await one.until_drawn(0x010203)
        picture = one.app.guests["g1"].screen.shown()
        assert picture is not None
        while viewer.pixels != picture.pixels:
            await show(browser, viewer)
        small = await served.http("GET", "/screenshot.png?session=web&thumbnail=1", token=tokens.view)
        whole = await served.http("GET", "/screenshot.png?session=web", token=tokens.view)
        assert small.body == whole.body  # it is small enough
        assert whole.body[16:24] == WIDTH.to_bytes(4, "big") + HEIGHT.to_bytes(4, "big")


async def test_who_watches_is_not_shown_what_others_type(served: Served, environment: dict[str, str]) -> None:
    tokens = served.page.tokens
    async with console(environment), served.browser(tokens.view) as watcher, served.browser() as browser:
        for one in (watcher, browser):
            await one.call("open", {"session": "web"})
            await one.call("subscribe", {"events": ["input"]})
        await browser.call("type", {"text": "sesame", "via": "spice"})
        assert (await browser.event("input"))[0]["text"] == "sesame"
        data, _ = await watcher.event("input")
        assert "sesame" not in json.dumps(data)
        assert data["characters"] == 6


async def test_keys_of_a_browser_that_leaves_are_released(served: Served, environment: dict[str, str]) -> None:
    async with console(environment) as one, served.browser(served.page.tokens.view) as watcher:
        await watcher.call("open", {"session": "web"})
        await watcher.call("watch-screen")
        async with served.browser() as browser:
            await browser.call("open", {"session": "web"})
            assert await browser.call("drive", {"take": True}) == {"holder": "Mia"}
            await browser.call("key", {"code": "KeyA", "down": True})
            while (holder := (await watcher.event("driving"))[0]["holder"]) is None:
                pass
            assert holder == {"name": "Mia", "you": False}
            assert await watcher.refused("drive", {"take": True}) == "view-only"
        await one.inputs.until(2)
        assert one.inputs.received == [(104, "1e"), (104, "9e")]
        while (await watcher.event("driving"))[0]["holder"] is not None:
            pass
