"""The picture: rectangles, acknowledgements, pointer, keys, what stops it."""

from __future__ import annotations

import base64
import time
import zlib

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.page.conftest import CHROMIUM, Opened
from tests.page.fake_page import FakePage

RED, GREEN, BLUE = bytes((0, 0, 255, 9)), bytes((0, 255, 0, 9)), bytes((255, 0, 0, 9))


def pixel(page: Page, x: int, y: int) -> list[int]:
    script = "([x, y]) => [...document.querySelector('.picture').getContext('2d').getImageData(x, y, 1, 1).data]"
    found: list[int] = page.evaluate(script, [x, y])
    return found


def wait_for_pixel(page: Page, x: int, y: int, colour: list[int]) -> None:
    script = (
        "([x, y, colour]) => { const context = document.querySelector('.picture').getContext('2d');"
        " return String([...context.getImageData(x, y, 1, 1).data]) === String(colour); }"
    )
    page.wait_for_function(script, arg=[x, y, colour])


def screen(page: Page) -> dict[str, float]:
    box = page.locator(".picture").bounding_box()
    assert box is not None
    return {name: float(value) for name, value in box.items()}  # type: ignore[arg-type]


def at(page: Page, x: float, y: float) -> tuple[float, float]:
    """Return the position in the window of a position in the VM."""
    box = screen(page)
    return box["x"] + (x + 0.5) * box["width"] / 320, box["y"] + (y + 0.5) * box["height"] / 200


class TestRectangles:
    def test_pixels_are_where_and_what_they_are(self, fake: FakePage, page: Page) -> None:
        """Rectangles that do not fit their bytes are left out; each message is acknowledged."""
        fake.wait("screen-ack")
        fake.picture(320, 200, RED * 6 + GREEN, (10, 20, 2, 3), (319, 199, 1, 1))
        wait_for_pixel(page, 319, 199, [0, 255, 0, 255])
        assert pixel(page, 10, 20) == pixel(page, 11, 22) == [255, 0, 0, 255]
        assert pixel(page, 12, 20) == pixel(page, 12, 22) == [*sample_at(12), 255]
        fake.wait("screen-ack", 2)
        fake.picture(320, 200, RED, (0, 0, 1, 1), (1, 0, 100, 100))
        fake.wait("screen-ack", 3)
        wait_for_pixel(page, 0, 0, [255, 0, 0, 255])
        assert pixel(page, 1, 0) == [*sample_at(1), 255]
        for last in (False, False, True):
            fake.picture(320, 200, GREEN, (5, 5, 1, 1), last=last)
        fake.wait("screen-ack", 6)

    def test_one_to_one_and_a_new_size(self, fake: FakePage, page: Page) -> None:
        page.get_by_role("button", name="1:1").click()
        page.wait_for_function("() => document.querySelector('.picture').clientWidth === 320")
        page.get_by_role("button", name="Fit").click()
        page.wait_for_function("() => document.querySelector('.picture').clientWidth > 320")
        fake.picture(64, 48, BLUE * (64 * 48))
        expect(page.locator(".info .size")).to_have_text("64 × 48\u00a0px")
        wait_for_pixel(page, 63, 47, [0, 0, 255, 255])
        box = screen(page)
        assert box["width"] / box["height"] == pytest.approx(64 / 48, rel=0.01)

    def test_pictures_of_a_slow_line(self, fake: FakePage, page: Page) -> None:
        assert fake.of("hello")[0].params["encodings"] == ["deflate"]
        fake.picture(320, 200, zlib.compress(RED * (320 * 200)), encoding="deflate")
        fake.picture(320, 200, GREEN, (5, 5, 1, 1))  # comes while the first one is decoded, and is drawn after it
        fake.picture(320, 200, zlib.compress(BLUE * 2), (6, 5, 2, 1), encoding="deflate")
        wait_for_pixel(page, 7, 5, [0, 0, 255, 255])
        assert [pixel(page, x, 5)[:3] for x in range(4, 9)] == [
            [255, 0, 0],
            [0, 255, 0],
            [0, 0, 255],
            [0, 0, 255],
            [255, 0, 0],
        ]
        fake.wait("screen-ack", 4)

    def test_a_hidden_tab_acknowledges_too(self, fake: FakePage, page: Page) -> None:
        fake.wait("screen-ack")
        page.evaluate(
            "() => { Object.defineProperty(document, 'hidden', {get: () => true});"
            " window.requestAnimationFrame = () => 1; document.dispatchEvent(new Event('visibilitychange')); }"
        )
        fake.picture(320, 200, GREEN, (5, 5, 1, 1))
        fake.wait("screen-ack", 2)

    def test_a_tab_that_gets_no_frames_is_drawn(self, fake: FakePage, opened: Opened) -> None:
        page = opened(fake, script="window.requestAnimationFrame = () => 1")
        expect(page.get_by_text("You drive")).to_be_visible()
        fake.wait("screen-ack")


def test_a_page_that_lacks_a_script_says_what_to_do(fake: FakePage, browser: Browser) -> None:
    """A network that changes while a page loads makes Chromium give up what it has not loaded."""
    page = browser.new_page()
    page.route("**/parts.js", lambda route: route.abort())
    page.goto(fake.url)
    text = page.get_by_text("load the page again")
    expect(text).to_be_visible()
    page.unroute("**/parts.js")
    page.reload()
    expect(page.get_by_text("You drive")).to_be_visible()
    expect(text).to_have_count(0)
    page.close()


def sample_at(x: int) -> list[int]:
    return [20 + x * 30 // 320, 30 + x * 60 // 320, 60 + x * 120 // 320]


class TestCursor:
    SHAPE = bytes((0, 0, 255, 255)) * 4

    def cursor(self, fake: FakePage, **fields: object) -> None:
        data = {"display": 0, "visible": True, "x": 100, "y": 50, "width": 2, "height": 2, "hot_x": 1, "hot_y": 0}
        fake.emit("cursor", {**data, **fields}, self.SHAPE)

    def test_it_is_the_pointer_of_the_browser_and_drawn_for_who_watches(self, fake: FakePage, page: Page) -> None:
        self.cursor(fake)
        page.wait_for_function("() => document.querySelector('.held').style.cursor.startsWith('url(\"blob:')")
        assert page.locator(".held").evaluate("node => node.style.cursor").endswith("1 0, default")
        self.cursor(fake, visible=False)
        page.wait_for_function("() => document.querySelector('.held').style.cursor === 'none'")
        fake.emit("driving", {"holder": {"name": "Mia", "you": False}, "watchers": 1})
        self.cursor(fake)
        expect(page.locator(".vmpointer")).to_be_visible()
        box = page.locator(".vmpointer").bounding_box()
        assert box is not None
        left, top = at(page, 99, 50)
        scale = screen(page)["width"] / 320
        assert (box["x"], box["y"]) == pytest.approx((left - scale / 2, top - scale / 2), abs=1.5)


class TestKeys:
    def enter(self, page: Page) -> None:
        page.locator(".screen").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_text("Keys go to the VM.")).to_be_visible()

    def codes(self, fake: FakePage) -> list[tuple[str, bool]]:
        return [(call.params["code"], call.params["down"]) for call in fake.of("key")]

    def test_physical_keys(self, fake: FakePage, page: Page) -> None:
        """The page sends them only from the picture, and a repeated key once."""
        page.keyboard.press("a")
        page.locator(".screen").focus()
        page.keyboard.press("b")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") != "screen"
        self.enter(page)
        page.keyboard.press("Shift+A")
        page.keyboard.press("Tab")
        fake.wait("key", 6)
        assert self.codes(fake) == [
            ("ShiftLeft", True),
            ("KeyA", True),
            ("KeyA", False),
            ("ShiftLeft", False),
            ("Tab", True),
            ("Tab", False),
        ]
        for _ in range(3):
            page.keyboard.down("x")
        page.keyboard.up("x")
        fake.wait("key", 8)
        assert self.codes(fake)[6:] == [("KeyX", True), ("KeyX", False)]

    def test_ctrl_alt_alone_lets_go(self, fake: FakePage, page: Page) -> None:
        self.enter(page)
        for key in ("Control", "Alt", "Delete"):
            page.keyboard.down(key)
        for key in ("Delete", "Alt", "Control"):
            page.keyboard.up(key)
        fake.wait("key", 6)
        expect(page.get_by_text("Keys go to the VM.")).to_be_visible()
        page.keyboard.press("Control+Alt")
        expect(page.get_by_text("Click the picture to type into the VM")).to_be_visible()
        fake.wait("keys-up")

    def test_a_modifier_is_held_for_the_next_key_and_all_keys_are_released_when_the_focus_leaves(
        self, fake: FakePage, page: Page
    ) -> None:
        page.get_by_role("toolbar").get_by_role("button", name="Keys").click()
        page.get_by_role("button", name="Super").click()
        self.enter(page)
        page.keyboard.press("e")
        fake.wait("key", 4)
        assert self.codes(fake) == [("MetaLeft", True), ("KeyE", True), ("KeyE", False), ("MetaLeft", False)]
        page.keyboard.down("a")
        fake.wait("key", 5)
        page.get_by_role("tab", name="Messages").focus()
        fake.wait("keys-up")
        page.keyboard.up("a")
        assert self.codes(fake)[4:] == [("KeyA", True)]

    def test_keys_that_were_pressed_before_it_lets_go_are_sent(self, fake: FakePage, page: Page) -> None:
        self.enter(page)
        page.evaluate(
            "() => { const screen = document.querySelector('.screen'); for (const type of ['keydown', 'keyup'])"
            " for (let key = 0; key < 10; key++) screen.dispatchEvent(new KeyboardEvent(type, {code: `Digit${key}`}));"
            " screen.blur(); }"
        )
        fake.wait("keys-up")
        assert [code for code, down in self.codes(fake) if down] == [f"Digit{key}" for key in range(10)]
        assert fake.calls.index(fake.of("keys-up")[0]) > fake.calls.index(fake.of("key")[-1])


class TestPointer:
    def test_positions_buttons_and_the_wheel(self, fake: FakePage, page: Page) -> None:
        page.mouse.move(*at(page, 100, 50))
        page.mouse.down()
        page.mouse.move(*at(page, 160, 100))
        page.mouse.up()
        last = fake.wait("pointer", matching=lambda params: params == {"x": 160, "y": 100, "buttons": []})
        pressed = [call.params for call in fake.of("pointer") if call.params["buttons"] == ["left"]]
        assert pressed[0] == {"x": 100, "y": 50, "buttons": ["left"]}
        assert pressed[-1]["x"] == last.params["x"]
        page.mouse.wheel(0, 120)
        turned = fake.wait("pointer", matching=lambda params: "wheel" in params)
        assert turned.params["wheel"] > 0
        page.mouse.move(*at(page, 10, 10))
        page.mouse.down(button="right")
        page.mouse.down(button="middle")
        fake.wait("pointer", matching=lambda params: params["buttons"] == ["middle", "right"])
        page.mouse.up(button="middle")
        page.mouse.up(button="right")

    def test_nothing_without_the_keys_and_positions_stay_on_the_display(self, fake: FakePage, page: Page) -> None:
        page.mouse.move(*at(page, 10, 10))
        page.mouse.move(*at(page, 20, 10))
        page.mouse.down()
        page.mouse.up()
        fake.wait("pointer", 2)
        assert fake.of("pointer")[0].params["buttons"] == ["left"]
        page.mouse.move(*at(page, 300, 100))
        page.mouse.down()
        box = screen(page)
        page.mouse.move(box["x"] + box["width"] + 400, box["y"] - 30)
        page.mouse.up()
        fake.wait("pointer", matching=lambda params: params == {"x": 319, "y": 0, "buttons": ["left"]})

    @pytest.mark.parametrize("browser", [CHROMIUM], indirect=True)
    def test_without_a_tablet_the_pointer_is_locked_and_moves_by_distances(self, fake: FakePage, page: Page) -> None:
        fake.emit("inputs", {"locks": ["num"], "mouse": "relative"})
        expect(page.locator(".leds .lit")).to_have_count(1)
        page.mouse.move(*at(page, 100, 50))
        page.mouse.down()
        page.mouse.up()
        page.wait_for_function("() => document.pointerLockElement !== null")
        page.mouse.move(*at(page, 140, 70))
        moved = fake.wait("pointer", matching=lambda params: params.get("dx", 0) > 0)
        assert set(moved.params) == {"dx", "dy", "buttons"}
        page.keyboard.press("Control+Alt")
        page.wait_for_function("() => document.pointerLockElement === null")


class TestFingers:
    @pytest.fixture
    def phone(self, fake: FakePage, opened: Opened) -> Page:
        page = opened(fake, (390, 844), has_touch=True)
        expect(page.get_by_text("You drive")).to_be_visible()
        expect(page.locator(".info .size")).to_have_text("320 × 200\u00a0px", use_inner_text=False)
        return page

    @pytest.fixture
    def unhurried(self, phone: Page) -> Page:
        """Return a page for which no press is a long one: on a busy machine any may take longer than 500 ms."""
        phone.evaluate(
            "() => { const set = setTimeout; window.setTimeout = (run, ms) => set(run, ms === 500 ? 3_600_000 : ms); }"
        )
        return phone

    def test_a_tap_clicks(self, fake: FakePage, unhurried: Page) -> None:
        unhurried.touchscreen.tap(*at(unhurried, 100, 50))
        fake.wait("pointer", 3)
        assert [call.params["buttons"] for call in fake.of("pointer")] == [[], ["left"], []]
        assert fake.of("pointer")[1].params["x"] == pytest.approx(100, abs=1)

    @pytest.fixture(autouse=True)
    def _fingers(self, phone: Page) -> None:
        self.session = phone.context.new_cdp_session(phone)

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        self.session.send(
            "Input.dispatchTouchEvent",
            {
                "type": kind,
                "touchPoints": [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)],
            },
        )

    def test_a_long_press_is_the_right_button(self, fake: FakePage, phone: Page) -> None:
        self.touch("touchStart", at(phone, 100, 50))
        fake.wait("pointer", matching=lambda params: params["buttons"] == ["right"])
        self.touch("touchEnd")
        fake.wait("pointer", matching=lambda params: params["buttons"] == [])
        assert all("left" not in call.params["buttons"] for call in fake.of("pointer"))

    def test_two_fingers_turn_the_wheel(self, fake: FakePage, unhurried: Page) -> None:
        self.touch("touchStart", at(unhurried, 100, 50), at(unhurried, 150, 50))
        for step in range(1, 9):
            self.touch("touchMove", at(unhurried, 100, 50 + 10 * step), at(unhurried, 150, 50 + 10 * step))
        turned = fake.wait("pointer", matching=lambda params: params.get("wheel", 0) != 0)
        assert turned.params["wheel"] < 0
        self.touch("touchEnd")
        assert all(call.params["buttons"] == [] for call in fake.of("pointer"))

    def test_one_finger_drags(self, fake: FakePage, unhurried: Page) -> None:
        self.touch("touchStart", at(unhurried, 100, 50))
        self.touch("touchMove", at(unhurried, 130, 60))
        self.touch("touchMove", at(unhurried, 160, 60))
        self.touch("touchEnd")
        fake.wait("pointer", matching=lambda params: params["buttons"] == ["left"] and abs(params["x"] - 160) < 2)
        fake.wait("pointer", matching=lambda params: params["buttons"] == [] and abs(params["x"] - 160) < 2)


class TestWhatStopsIt:
    def lose(self, fake: FakePage) -> None:
        fake.event(
            "lost", state="lost", attempt=None, message="the connection was closed", remedy="check the VM", level="bad"
        )

    def test_no_display_no_picture_or_paused(self, fake: FakePage, page: Page) -> None:
        fake.emit("screen-state", {"display": 0, "state": "no-display", "message": "the target is not SPICE"})
        expect(page.get_by_role("heading", name="This VM has no screen here")).to_be_visible()
        expect(page.locator(".card")).to_contain_text("The target is not SPICE.")
        fake.emit("screen-state", {"display": 0, "state": "no-picture"})
        expect(page.locator(".card")).to_contain_text("nothing was drawn on it yet")
        fake.emit("screen-state", {"display": 0, "state": "paused"})
        expect(page.locator(".banner")).to_contain_text(
            "The VM is paused. Its picture stands still; what you type waits."
        )
        expect(page.locator(".banner code")).to_contain_text("virsh resume testvm")

    def test_lost_and_reconnecting_and_the_connection_ended(self, fake: FakePage, page: Page) -> None:
        page.locator(".picture").click()
        expect(page.get_by_text("Keys go to the VM.")).to_be_visible()
        self.lose(fake)
        fake.event(
            "reconnecting", state="reconnecting", attempt={"number": 3, "time": time.time() + 60}, level="progress"
        )
        card = page.get_by_role("alertdialog", name="The VM does not answer")
        expect(card).to_contain_text("The connection was closed.")
        expect(card).to_contain_text("to try 3")
        expect(card).to_contain_text("farplug doctor spice+tls://vmhost.lab:5901")
        expect(page.get_by_text("Keys go nowhere")).to_be_visible()
        fake.wait("keys-up")
        expect(page.get_by_role("button", name="Plug in…")).to_have_count(0)
        card.get_by_role("button", name="Try now").click()
        assert fake.wait("reconnect").params == {}
        card.get_by_role("button", name="Stop trying").click()
        assert fake.wait("reconnect", 2).params == {"give_up": True}
        fake.event("closed", state="closed", attempt=None)
        card = page.get_by_role("alertdialog", name="The connection to the VM ended")
        expect(card).to_contain_text("The connection was closed. Check the VM.")
        expect(card).to_contain_text("farplug connect spice+tls://vmhost.lab:5901 --name web1 --detach")

    def test_another_client_took_over(self, fake: FakePage, page: Page) -> None:
        """While the session connects again, and when it does not."""
        fake.event("lost", state="lost", attempt=None, message="closed", remedy="", reason="taken-over", level="bad")
        fake.event(
            "reconnecting", state="reconnecting", attempt={"number": 1, "time": time.time() + 60}, level="progress"
        )
        card = page.get_by_role("alertdialog", name="Another client has probably taken the VM")
        expect(card).to_contain_text("connecting again ends the session of the other client")
        expect(card).not_to_contain_text("farplug doctor")
        fake.event("closed", state="closed", attempt=None)
        expect(card).to_contain_text("To connect again:")

    def test_the_session_ended(self, fake: FakePage, page: Page) -> None:
        fake.emit("session-ended", {"reason": "", "session": "web1"})
        expect(page.get_by_role("alertdialog", name="The session has ended")).to_be_visible()
        page.get_by_role("button", name="All sessions").click()
        fake.wait("close")
        expect(page.get_by_role("heading", name="No session runs yet")).to_be_visible()

    def test_the_server_of_the_page_is_gone_and_returns(self, fake: FakePage, page: Page) -> None:
        fake.refuses = True
        fake.drop()
        card = page.get_by_role("alertdialog", name="The page’s server does not answer")
        expect(card).to_contain_text("its devices stay plugged in")
        expect(card).to_contain_text("to try")
        fake.refuses = False
        expect(card).to_have_count(0)
        fake.wait("open", 2)
        expect(page.get_by_text("You drive")).to_be_visible()

    def test_the_token_leaves_the_address_and_a_wrong_token(self, page: Page) -> None:
        assert "secret" not in page.url
        page.evaluate("sessionStorage.setItem('farplug-token', 'wrong')")
        page.reload()
        expect(page.get_by_role("alertdialog", name="The token is not valid")).to_be_visible()
        page.evaluate("sessionStorage.clear()")
        page.reload()
        expect(page.get_by_role("alertdialog", name="This address has no token")).to_be_visible()


class TestWhoDrives:
    def test_another_one_takes_over_and_back(self, fake: FakePage, page: Page) -> None:
        page.locator(".picture").click()
        fake.emit("driving", {"holder": {"name": "Mia Kowalski", "you": False}, "watchers": 1})
        expect(page.locator(".driver")).to_contain_text("Mia Kowalski drives")
        expect(page.get_by_text("You watch: keys and clicks stay here")).to_be_visible()
        expect(page.get_by_role("button", name="Plug in…")).to_have_count(0)
        before = len(fake.of("key"))
        page.keyboard.press("a")
        page.locator(".picture").click()
        page.get_by_role("button", name="Take over").click()
        fake.wait("drive", 2)
        expect(page.get_by_text("You drive")).to_be_visible()
        assert len(fake.of("key")) == before

    def test_a_page_that_opens_leaves_the_drive_to_its_holder(self, fake: FakePage, opened: Opened) -> None:
        fake.driver = {"holder": {"name": "Mia", "you": False}, "watchers": 1}
        page = opened(fake)
        expect(page.locator(".driver")).to_contain_text("Mia drives")
        assert fake.of("drive") == []

    def test_a_link_that_can_only_watch_has_no_actions(self, opened: Opened) -> None:
        with FakePage(role="view") as fake:
            fake.attachment("g1.a1", "usbredir 0")
            page = opened(fake)
            expect(page.get_by_text("View-only link")).to_be_visible()
            expect(page.get_by_text("scratch.raw", exact=True)).to_be_visible()
            fake.wait("screen-ack")
            names = {
                button.inner_text() or button.get_attribute("aria-label") for button in page.get_by_role("button").all()
            }
            assert names == {"Save a screenshot", "Full screen", "USB panel", "Fit", "1:1", "Fold this away"}
            page.locator(".picture").click()
            page.keyboard.press("Enter")
            page.keyboard.press("a")
            methods = {"hello", "open", "subscribe", "list", "watch-screen", "layouts", "screen-ack"}
            assert {call.method for call in fake.calls} <= methods


def test_a_screenshot_is_saved(page: Page) -> None:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save a screenshot").click()
    assert download.value.suggested_filename.startswith("web1-")
    data = download.value.path().read_bytes()
    assert data.startswith(b"\x89PNG")
    size = page.evaluate(
        "async text => { const bytes = Uint8Array.from(atob(text), one => one.charCodeAt(0));"
        " const image = await createImageBitmap(new Blob([bytes])); return [image.width, image.height]; }",
        base64.b64encode(data).decode(),
    )
    assert size == [320, 200]


@pytest.mark.parametrize("browser", [CHROMIUM], indirect=True)
def test_full_screen(fake: FakePage, page: Page) -> None:
    page.get_by_role("button", name="Full screen").click()
    page.wait_for_function("() => document.fullscreenElement !== null")
    expect(page.get_by_text("Click the picture to type into the VM")).to_be_visible()
