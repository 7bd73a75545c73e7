"""Fixtures for tests of the page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.page.fake_page import FakePage

TIMEOUT = 60_000
WIDE = (1280, 800)
CHROMIUM = "chromium"
SHELL = "chromium-headless-shell"

Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def browsers() -> Iterator[Callable[[str], Browser]]:
    """Return a function that returns a browser by the name of its program, started once.

    For each module: while Playwright runs, no other event loop can run in this thread.
    """
    if shutil.which(CHROMIUM) is None:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    expect.set_options(timeout=TIMEOUT)
    running: dict[str, Browser] = {}
    with sync_playwright() as playwright:

        def started(program: str) -> Browser:
            if program not in running:
                path = shutil.which(program) or shutil.which(CHROMIUM)
                running[program] = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            return running[program]

        yield started
        for browser in running.values():
            browser.close()


@pytest.fixture
def browser(browsers: Callable[[str], Browser], request: pytest.FixtureRequest) -> Browser:
    """Return Debian's Chromium without its user interface, where it is installed: a page costs a third in it.

    A test of what the shell lacks, such as pointer lock, is parametrized with :data:`CHROMIUM`.
    """
    return browsers(getattr(request, "param", SHELL))


@pytest.fixture
def fake() -> Iterator[FakePage]:
    with FakePage() as fake:
        yield fake


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Return a function that opens a page, after a script of the test.

    A script of the page that raises, is not loaded, or violates the security policy fails the test.
    """
    problems: list[str] = []
    pages: list[Page] = []

    def open(fake: FakePage, size: tuple[int, int] = WIDE, script: str = "", **options: object) -> Page:
        width, height = size
        context = browser.new_context(viewport={"width": width, "height": height}, **options)  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: problems.append(f"{error.message} {error.stack}"))
        page.on(
            "console",
            lambda message: problems.append(message.text) if "Content Security Policy" in message.text else None,
        )
        page.on(
            "requestfailed",
            lambda request: (
                problems.append(f"{request.url}: {request.failure}") if request.resource_type == "script" else None
            ),
        )
        if script:
            page.add_init_script(script)
        page.goto(fake.url)
        pages.append(page)
        return page

    yield open
    for page in pages:
        page.context.close()
    assert problems == []


@pytest.fixture
def page(fake: FakePage, opened: Opened) -> Page:
    """Return the page of a VM that this page drives."""
    page = opened(fake)
    expect(page.get_by_text("You drive")).to_be_visible()
    expect(page.locator(".info .size")).to_have_text("320 × 200\u00a0px")
    return page
