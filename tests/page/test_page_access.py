"""With a keyboard alone, with a screen reader, on small and large windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tests.page.conftest import Opened
from tests.page.fake_page import FakePage, Refused
from tests.page.test_page_usb import DISK, IMAGES, KEY, ROWS

AXE = (Path(__file__).parent / "vendor/axe.min.js").read_text()
RULES = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
COLOURS = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
"""The rules of axe-core that depend on the colour scheme."""


TRANSITIONS_END = (
    "() => Promise.allSettled(document.getAnimations().filter(one => one instanceof CSSTransition)"
    ".map(one => one.finished))"
)
"""Waits: buttons change their colour, which axe-core measures, in 80 ms."""


def faults(page: Page, rules: Mapping[str, object] = RULES) -> list[Any]:
    """Return what axe-core finds."""
    page.evaluate(TRANSITIONS_END)
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE)
    found: dict[str, Any] = page.evaluate(
        "rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})", rules
    )
    return [
        (one["id"], one["impact"], node["target"], node.get("failureSummary"))
        for one in found["violations"]
        for node in one["nodes"]
    ]


def plugged(fake: FakePage, page: Page) -> None:
    endpoint = {"endpoint": 129, "transfers": 122, "bytes": 4_190_000, "errors": 0}
    fake.attachment(
        "g1.a1", "usbredir 0", figures={"read": 1, "written": 2, "commands": 3, "errors": 4, "endpoints": [endpoint]}
    )
    fake.attachment("g1.a2", "usbredir 1", label="b.raw", state="attached")
    page.get_by_role("button", name="More about scratch.raw").click()
    page.get_by_role("menuitem", name="Show endpoints").click()


def refused(fake: FakePage, page: Page) -> None:
    page.get_by_role("button", name="Plug in YubiKey").click()
    expect(page.get_by_role("alert")).to_be_visible()


def menu(fake: FakePage, page: Page) -> None:
    fake.attachment("g1.a1", "usbredir 0")
    page.get_by_role("button", name="More about scratch.raw").click()
    expect(page.get_by_role("menu")).to_be_visible()


def dialog(fake: FakePage, page: Page) -> None:
    page.get_by_role("button", name="Plug in… Socket 2").click()
    page.get_by_role("radio", name="drivers.raw").check()
    expect(page.get_by_role("dialog").locator("footer code")).to_be_visible()


def text(fake: FakePage, page: Page) -> None:
    page.get_by_role("button", name="Type text").click()
    page.get_by_label("Text", exact=True).fill("größe")
    expect(page.locator(".mirror mark")).to_have_count(2)


def keys(fake: FakePage, page: Page) -> None:
    page.get_by_role("toolbar").get_by_role("button", name="Keys").click()


def lost(fake: FakePage, page: Page) -> None:
    fake.attachment("g1.a1", "usbredir 0")
    fake.event("lost", state="lost", attempt=None, message="the connection was closed", remedy="", level="bad")
    expect(page.get_by_role("alertdialog")).to_be_visible()


def no_display(fake: FakePage, page: Page) -> None:
    fake.emit("screen-state", {"display": 0, "state": "no-display"})
    expect(page.get_by_role("heading", name="This VM has no screen here")).to_be_visible()


def paused(fake: FakePage, page: Page) -> None:
    fake.emit("screen-state", {"display": 0, "state": "paused"})
    expect(page.locator(".banner")).to_be_visible()


def watched(fake: FakePage, page: Page) -> None:
    fake.emit("driving", {"holder": {"name": "Mia", "you": False}, "watchers": 2})
    expect(page.get_by_role("button", name="Take over")).to_be_visible()


def images(fake: FakePage, page: Page) -> None:
    page.get_by_role("tab", name="Images").click()
    expect(page.locator(".devices li")).to_have_count(4)


def browser_files(fake: FakePage, page: Page) -> None:
    page.get_by_role("tab", name="This browser").click()


STATES: list[Callable[[FakePage, Page], None]] = [
    plugged,
    refused,
    menu,
    dialog,
    text,
    keys,
    lost,
    no_display,
    paused,
    watched,
    images,
    browser_files,
]


@pytest.fixture
def fake() -> Any:
    with FakePage() as fake:
        fake.devices = [KEY, DISK]
        fake.files = {"": IMAGES}
        yield fake


def refuse_all(fake: FakePage) -> None:
    attach = fake.handlers["attach"]

    def refuse(params: Any, data: Any) -> Any:
        if params["sources"][0]["kind"] == "usb-device":
            raise Refused(
                "in-use",
                "this machine uses it",
                remedy="unmount it",
                command="umount /x",
                setting="rules.force",
                value=True,
            )
        return attach(params, data)

    fake.handlers["attach"] = refuse


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_no_fault_in_any_state(fake: FakePage, opened: Opened, state: Callable[[FakePage, Page], None]) -> None:
    refuse_all(fake)
    page = opened(fake, (1440, 900), color_scheme="light")
    expect(page.get_by_text("You drive")).to_be_visible()
    state(fake, page)
    assert faults(page) == []
    page.emulate_media(color_scheme="dark")
    assert faults(page, COLOURS) == []


SIZES = ((320, 640), (390, 844), (760, 600), (761, 600), (800, 600), (1001, 700), (1240, 800), (3840, 2160))
DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Waits until the page was drawn for the size of its window: it may ask for a frame when the size changes."""


def resize(page: Page, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function("([width, height]) => innerWidth === width && innerHeight === height", arg=[width, height])
    page.evaluate(DRAWN)


@pytest.mark.parametrize("label", ["a.raw", "results-of-the-night-run-2026-11-28-second-attempt-" * 4 + ".raw"])
def test_nothing_scrolls_sideways(fake: FakePage, opened: Opened, label: str) -> None:
    page = opened(fake, SIZES[0])
    expect(page.locator(".info .size")).to_have_text("320 × 200\u00a0px", use_inner_text=False)
    figures = {"read": 18446e9, "written": 1024e9, "commands": 98_112_400, "errors": 1204}
    fake.attachment("g1.a1", "usbredir 0", label=label, units=[label], figures=figures)
    fake.event("note", device=label, message="x" * 400, level="bad")
    expect(page.locator(".socket .mid").first).to_have_attribute("title", label)
    expect(page.locator(".socket .state").first).to_contain_text("In use")
    expect(page.locator(".log li").filter(has_text="x" * 400)).to_have_count(1)
    for width, height in SIZES:
        resize(page, width, height)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.evaluate("document.documentElement.scrollHeight - innerHeight") <= 0
        for part in (".usb", ".tools", ".info"):
            box = page.locator(part).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        for part in (".usb", ".info", ".info .size", ".info .seg", ".info .leds"):
            assert page.locator(part).evaluate("node => node.scrollWidth - node.clientWidth") <= 0, (part, width)
        hint = ".info .hint span:not([class=phone])" if width > 760 else ".info .hint span.phone"
        assert page.locator(hint).evaluate("node => node.scrollWidth - node.clientWidth") <= 0, "the hint is cut off"


@pytest.mark.parametrize("size", [(320, 640), (390, 844), (800, 600)])
def test_the_tabs_of_the_dialog_are_not_cut_off(fake: FakePage, opened: Opened, size: tuple[int, int]) -> None:
    page = opened(fake, size)
    page.locator(".socket .act").last.click()
    tabs = page.get_by_role("dialog").get_by_role("tab")
    expect(tabs).to_have_count(5)
    for tab in tabs.all():
        box = tab.bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= size[0]


def test_the_board_has_no_fault(opened: Opened) -> None:
    with FakePage(session=None) as fake:
        fake.rows = ROWS
        page = opened(fake, SIZES[0])
        expect(page.get_by_role("link", name="web1")).to_be_visible()
        for width, height in (SIZES[0], (1440, 900)):
            resize(page, width, height)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            assert faults(page) == []


ORDER = [
    "Skip to the USB sockets",
    "All sessions",
    "Type text",
    "Keys",
    "Ctrl+Alt+Del",
    "Save a screenshot",
    "Full screen",
    "USB panel",
    "Screen of testvm, 320 by 200 pixels. Click or press Enter to type into it, Ctrl+Alt to leave.",
    "Fit",
    "1:1",
    "Messages",
    "Record USB",
    "Fold this away",
    "Messages",
    "Plug in… Socket 0",
    "Plug in… Socket 1",
    "Plug in… Socket 2",
    "Plug in… Socket 3",
    "Devices2",
    "Copy the command that plugs in YubiKey 5 NFC",
    "Plug in YubiKey 5 NFC",
    "Plug in anyway…",
]


def test_the_order_of_the_keyboard(fake: FakePage, opened: Opened) -> None:
    page = opened(fake, (1440, 900))
    expect(page.get_by_role("button", name="Plug in YubiKey")).to_be_visible()
    expect(page.get_by_text("You drive")).to_be_visible()
    script = "() => { const one = document.activeElement; return one.getAttribute('aria-label') || one.textContent; }"
    found = []
    for _ in ORDER:
        page.keyboard.press("Tab")
        found.append(page.evaluate(script))
    assert found == ORDER


def test_the_skip_link_and_tabs_by_arrows(fake: FakePage, page: Page) -> None:
    expect(page.locator("#usb")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#usb")).to_be_focused()
    page.get_by_role("tab", name="Devices").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Images")).to_be_focused()
    expect(page.get_by_role("tab", name="Images")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    page.keyboard.press("Home")
    expect(page.get_by_role("tab", name="Devices")).to_be_focused()


def test_focus_and_selection_stay_while_events_come(fake: FakePage, page: Page) -> None:
    page.get_by_role("button", name="Type text").click()
    field = page.get_by_label("Text", exact=True)
    field.fill("some text")
    field.evaluate("node => node.setSelectionRange(2, 4)")
    fake.attachment("g1.a1", "usbredir 0")
    expect(page.get_by_text("1 of 4 in use")).to_be_visible()
    expect(field).to_be_focused()
    assert field.evaluate("node => [node.selectionStart, node.selectionEnd]") == [2, 4]


def test_the_overlay_takes_the_focus_from_the_picture(fake: FakePage, page: Page) -> None:
    page.locator(".picture").click()
    fake.event("lost", state="lost", attempt=None, message="gone", remedy="", level="bad")
    fake.event("closed", state="closed", attempt=None)
    expect(page.get_by_role("button", name="All sessions")).to_be_focused()


def test_slash_finds(fake: FakePage, opened: Opened) -> None:
    with FakePage(session=None) as board:
        board.rows = ROWS
        page = opened(board)
        expect(page.get_by_role("link", name="web1")).to_be_visible()
        page.keyboard.press("/")
        expect(page.get_by_label("Find a session")).to_be_focused()
