"""The page with a real server and a real session, and a guest that is a part of the test."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.cli.key_guest import KeyGuest

from farplug.app.app import App
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.control import names
from farplug.control.server import Server
from farplug.web.server import Page as ServedPage
from farplug.web.server import PageSettings

TIMEOUT = 20.0


class Session:
    """A session and its page, in a thread of their own.

    Attributes:
        guest: what is at the other end; it asks for a touch of each key.
        url: with all rights.
        view_url: with which one can only watch.
    """

    def __init__(self, root: Path) -> None:
        self.guest = KeyGuest(lambda: self.answered.set())
        self.answered = threading.Event()
        self.url = self.view_url = ""
        self._root = root
        self._runtime = tempfile.mkdtemp(prefix="farplug-", dir="/tmp")
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(TIMEOUT)
        assert self._failed is None
        return self

    def __exit__(self, *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(TIMEOUT)
        shutil.rmtree(self._runtime)
        assert self._failed is None

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failed = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        environment = {"XDG_RUNTIME_DIR": self._runtime, "XDG_CACHE_HOME": f"{self._runtime}/cache"}
        settings = PageSettings(session="web1", view_only=True, web_root=str(self._root))
        app = App()
        async with self.guest.listening() as target:
            await app.connect(GuestSettings(TargetSettings(target)))
            server = Server(app, names.reserve("web1", environment=environment), target=target)
            await server.start()
            async with ServedPage.serve(settings, environment) as page:
                self.url, self.view_url = page.url, page.view_url or ""
                self._ready.set()
                await self._end.wait()
            await server.close()
            await app.close()


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with Session(tmp_path) as session:
        yield session


@pytest.fixture
def page(browser: Browser, session: Session) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(session.url)
    expect(page.get_by_text("0 of 1 in use")).to_be_visible()
    yield page
    page.close()


def plug_in_key(page: Page) -> None:
    page.get_by_role("tab", name="Virtual").click()
    page.get_by_role("button", name="Plug in USB security key").click()


@pytest.mark.parametrize(("button", "status", "words"), [("Touch", 0, "allowed"), ("Refuse", 0x27, "refused")])
def test_a_security_key_asks(
    session: Session, page: Page, browser: Browser, tmp_path: Path, button: str, status: int, words: str
) -> None:
    """Check what becomes of the answer, and that a page that may only watch shows the question without buttons."""
    watcher = browser.new_page()
    watcher.goto(session.view_url)
    plug_in_key(page)
    for one in (page, watcher):
        row = one.get_by_role("alertdialog", name="Asks for a touch: fido0")
        expect(row).to_contain_text("A program in the VM wants to know which key to use.")
        expect(row).to_contain_text("s left")
    expect(watcher.get_by_role("alertdialog").get_by_role("button")).to_have_count(0)
    assert json.loads((tmp_path / "keys.json").read_text())
    page.get_by_role("alertdialog").get_by_role("button", name=button).click()
    assert session.answered.wait(TIMEOUT)
    assert session.guest.replies == [status]
    for one in (page, watcher):
        expect(one.get_by_role("alertdialog")).to_have_count(0)
        expect(one.locator(".socket .state")).to_contain_text("In use · security key")
        expect(one.locator(".log")).to_contain_text(words)
    watcher.close()


def test_a_page_that_is_opened_later_has_the_question(session: Session, page: Page) -> None:
    plug_in_key(page)
    expect(page.get_by_role("alertdialog")).to_be_visible()
    page.reload()
    page.get_by_role("alertdialog", name="Asks for a touch: fido0").get_by_role("button", name="Touch").click()
    assert session.answered.wait(TIMEOUT)
    page.get_by_role("button", name="Unplug fido0").click()
    expect(page.get_by_text("0 of 1 in use")).to_be_visible()


def test_a_serial_line_has_the_path_of_its_terminal(page: Page) -> None:
    page.get_by_role("tab", name="Virtual").click()
    page.get_by_role("button", name="Plug in USB serial line").click()
    path = page.locator(".socket .detail code")
    expect(path).to_contain_text("/dev/pts/")
    assert Path(path.inner_text()).is_char_device()
    expect(page.locator(".socket .state")).to_contain_text("In use · serial line")
    page.get_by_role("button", name="More about serial0").click()
    expect(page.get_by_role("menuitem").first).to_contain_text("farplug attach -s web1 --usb-serial pty")


def test_a_clip_is_listed_and_what_is_none_is_refused_at_the_socket(page: Page, tmp_path: Path) -> None:
    (tmp_path / "a.mjpeg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(600))
    page.get_by_role("tab", name="Virtual").click()
    page.get_by_role("button", name="Show a clip").click()
    page.get_by_role("radio", name="a.mjpeg").check()
    expect(page.locator("footer code")).to_have_text(f"$ farplug attach -s web1 --usb-camera {tmp_path}/a.mjpeg")
    page.get_by_role("dialog").get_by_role("button", name="Plug in", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("a.mjpeg")
    expect(page.locator(".socket.refused")).to_have_count(1)
