"""The page in a real browser, with a real session of a real guest."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright, expect
from tests.guest.command import farplug
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, MIB, SCREEN, read_line
from tests.guest.test_screen import dump

from farplug.testing import QemuGuest

PIXELS = (
    "() => { const picture = document.querySelector('.picture');"
    " const data = picture.getContext('2d').getImageData(0, 0, picture.width, picture.height).data;"
    " let text = ''; for (let at = 0; at < data.length; at++) if (at % 4 < 3) text += String.fromCharCode(data[at]);"
    " return [picture.width, picture.height, btoa(text)]; }"
)


@asynccontextmanager
async def page_of(guest: QemuGuest, root: Path, name: str) -> AsyncIterator[Page]:
    """Start a session and its page; yield the page in Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    expect.set_options(timeout=GUEST_TIMEOUT * 1000)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(farplug("connect", guest.spice.target, "--name", name, "--json"))
        await session.until('"ready"')
        server = await stack.enter_async_context(farplug("page", "-s", name, "--web-root", root, "--json"))
        playwright = await stack.enter_async_context(async_playwright())
        url = json.loads(await server.until('"url"'))["url"]
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(error.message))
        await page.goto(url)
        await expect(page.get_by_text("You drive")).to_be_visible()
        yield page
        await browser.close()
        assert problems == []


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not await condition():
            await asyncio.sleep(0.2)


async def test_picture_keys_and_sockets(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(SCREEN)
    root = tmp_path / "images"
    root.mkdir()
    content = os.urandom(MIB)
    (root / "disk.raw").write_bytes(content)
    async with page_of(guest, root, "page1") as page:
        # The picture is QEMU's own.
        async def same() -> bool:
            width, height, pixels = await dump(guest, tmp_path)
            shown = await page.evaluate(PIXELS)
            return shown[:2] == [width, height] and base64.b64decode(shown[2]) == pixels

        await until(same)

        # Keys, text.
        async def keys() -> None:
            await page.locator(".picture").click()
            await page.keyboard.type("keys az9 ")
            await page.keyboard.press("Shift+A")
            await page.keyboard.press("Enter")
            await page.keyboard.press("Control+Alt")

        assert await read_line(guest, keys) == "keys az9 A"

        async def text() -> None:
            await page.get_by_role("button", name="Type text").click()
            await page.get_by_label("Text", exact=True).fill("Text: | ~ \\ #1\n")
            await page.get_by_role("button", name="Type it").click()

        assert await read_line(guest, text) == "Text: | ~ \\ #1"

        # A disk from the page's folder.
        await page.get_by_role("button", name="Plug in… Socket 1").click()
        await page.get_by_role("radio", name="disk.raw").check()
        await page.get_by_role("button", name="Plug in", exact=True).click()
        await expect(page.locator(".socket[data-port='1'] .state")).to_contain_text("In use")

        async def read() -> bool:
            sums = await guest.check(
                "for disk in /sys/block/sd*; do md5sum /dev/${disk##*/}; done 2> /dev/null || true"
            )
            return hashlib.md5(content).hexdigest() in sums

        await until(read)
        await expect(page.locator(".socket[data-port='1'] .figures")).to_contain_text("MB")
        await page.get_by_role("button", name="Unplug disk.raw").click()
        await expect(page.locator(".socket[data-port='1'] h3")).to_have_text("Empty")


async def test_an_iso_of_the_browser(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(SCREEN)
    image = bytearray(os.urandom(3 * MIB))
    image[32768:32774] = b"\x01CD001"
    path = tmp_path / "debian.iso"
    path.write_bytes(image)
    async with page_of(guest, tmp_path, "page2") as page:
        await page.get_by_role("tab", name="This browser").click()
        async with page.expect_file_chooser() as chooser:
            await page.get_by_role("button", name="Choose a file…").click()
        await (await chooser.value).set_files(path)
        place = page.locator(".socket[data-port='0']")
        await expect(place.locator(".state")).to_contain_text("In use · CD-ROM from this browser")

        async def read() -> bool:
            return hashlib.md5(image).hexdigest() in await guest.check("md5sum /dev/sr0 2> /dev/null || true")

        await until(read)
        await expect(place.locator("figcaption")).to_contain_text("100\u00a0% touched")
        await page.get_by_role("button", name="Eject debian.iso").click()
        await expect(place.locator("h3")).to_have_text("CD-ROM drive, empty")
