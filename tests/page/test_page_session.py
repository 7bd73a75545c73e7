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
from tests.cli.key_guest import KeyGuest, nothing
from tests.cli.support import FakeGuest

from farplug.app.app import App
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.control import names
from farplug.control.server import Server
from farplug.usb import Status
from farplug.usbredir import packets
from farplug.web.server import Page as ServedPage
from farplug.web.server import PageSettings

TIMEOUT = 100.0


class LineGuest(FakeGuest):
    """Has a program on a serial line: it sends a greeting, and then back what it receives.

    Attributes:
        received: by the program.
    """

    GREETING = b"\x1b[1;38;2;90;200;120mweb1\x1b[0m login: "

    def __init__(self) -> None:
        super().__init__(nothing)
        self.received = bytearray()
        self._last = 100

    def _request(self, endpoint: int, length: int, data: bytes = b"") -> None:
        self._last += 1
        self._connection.send(
            packets.BulkPacket(id=self._last, endpoint=endpoint, status=Status.SUCCESS, length=length, data=data)
        )

    def _answer(self, packet: packets.Packet) -> None:
        super()._answer(packet)
        match packet:
            case packets.ConfigurationStatus() if packet.status is Status.SUCCESS:
                self._request(0x01, len(self.GREETING), self.GREETING)
                self._request(0x81, 512)
            case packets.BulkPacket(endpoint=0x81, data=data) if packet.status is Status.SUCCESS:
                self.received += data
                self._request(0x01, len(data), bytes(data))
                self._request(0x81, 512)


class Session:
    """A session and its page, in a thread of their own.

    Args:
        root: the folder of the page.
        guest: what is at the other end; by default it asks for a touch of each key.

    Attributes:
        key_guest: a guest that asks for a touch of each key.
        url: with all rights.
        view_url: with which one can only watch.
    """

    def __init__(self, root: Path, guest: FakeGuest | None = None) -> None:
        self.answered = threading.Event()
        self.key_guest = KeyGuest(self.answered.set)
        self._guest = self.key_guest if guest is None else guest
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
        async with self._guest.listening() as target:
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
    assert session.key_guest.replies == [status]
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
    page.get_by_role("button", name="Plug in USB serial line to a program").click()
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


def rows(page: Page) -> str:
    """Return what the terminal shows."""
    return page.locator(".xterm-rows").inner_text()


def test_the_terminal_of_a_serial_line(browser: Browser, tmp_path: Path) -> None:
    """Type and paste into it, change its size, load the page again: the line stays."""
    problems: list[str] = []
    guest = LineGuest()
    with Session(tmp_path, guest) as session:
        page = browser.new_page()
        page.on("pageerror", lambda error: problems.append(f"{error.message} {error.stack}"))
        page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
        page.goto(session.url)
        page.get_by_role("tab", name="Virtual").click()
        page.get_by_role("button", name="Plug in USB serial line", exact=True).click()
        terminal = page.locator(".xterm-rows")
        expect(terminal).to_contain_text("web1 login:")
        colour = page.locator(".xterm-rows span", has_text="web1").first
        assert colour.evaluate("one => getComputedStyle(one).color") == "rgb(90, 200, 120)"
        assert colour.evaluate("one => getComputedStyle(one).fontWeight") == "700"
        expect(page.get_by_role("textbox", name="Terminal of serial0")).to_be_focused()
        page.keyboard.type("alice")
        expect(terminal).to_contain_text("web1 login: alice")
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        page.keyboard.press("Control+c")
        text = "".join(f"{number:07d}" for number in range(20_000))
        page.evaluate(
            """text => {
                const data = new DataTransfer();
                data.setData("text/plain", text);
                const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
                document.activeElement.dispatchEvent(paste);
            }""",
            text,
        )
        expect(terminal).to_contain_text("0019999")
        assert guest.received.decode() == f"alice\r\x1b\x03{text}"
        before = page.get_by_role("button", name="Send the size").inner_text()
        page.set_viewport_size({"width": 900, "height": 700})
        expect(page.get_by_role("button", name="Send the size")).not_to_have_text(before)
        page.get_by_role("button", name="Send the size").click()
        size = page.get_by_role("button", name="Send the size").inner_text().rpartition(": ")[2].split("\u00a0")
        expect(terminal).to_contain_text(f"stty rows {size[2]} cols {size[0]}")
        page.keyboard.press("Control+Alt")
        expect(page.get_by_role("tab", name="serial0")).to_be_focused()
        page.reload()
        expect(terminal).to_contain_text(f"stty rows {size[2]} cols {size[0]}")
        page.keyboard.type("here")
        expect(terminal).to_contain_text("here")
        page.get_by_role("tab", name="Messages").click()
        expect(terminal).to_have_count(0)
        page.get_by_role("button", name="Terminal", exact=True).click()
        expect(terminal).to_contain_text("here")
        page.get_by_role("button", name="Unplug serial0").click()
        expect(page.get_by_role("tab", name="serial0")).to_have_count(0)
        expect(page.locator(".tty")).to_have_count(0)
        page.close()
    assert problems == []
