"""Run ``farplug demo --page``, use its page in Chromium, and store what it looks like as docs/page.png, for README.md.

python scripts/page_picture.py [FILE]

The requirements are those of ``farplug demo``, and the browser of the tests (``scripts/setup dev`` installs them).
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1280, 800)
TIMEOUT = 60_000
LINK = re.compile(r"http://\S+#token=\S+")
COMMANDS = ("mount /dev/sda /mnt", "ls -l /mnt", "cat /mnt/hello.txt", "df -h /mnt")


def draw(url: str, chromium: str, target: Path) -> None:
    """Type commands into the VM of a page, and store the page's picture."""
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.goto(url)
        expect(page.get_by_text("In use", exact=True)).to_be_visible()
        picture = page.locator("canvas").first
        expect(picture).to_be_visible()
        page.get_by_role("tab", name="Images").click()
        picture.click()
        for command in COMMANDS:
            page.keyboard.type(f"{command}\n", delay=40)
            page.wait_for_timeout(1500)
        page.screenshot(path=target)
        browser.close()


def main() -> None:
    """Run the demo until its page is served, and draw the page."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/page.png"
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is not installed: run scripts/setup dev")
    farplug = Path(sys.executable).with_name("farplug")
    demo = subprocess.Popen([farplug, "demo", "--page"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    assert demo.stdout is not None
    try:
        url = next((found[0] for line in demo.stdout if (found := LINK.search(line))), None)
        if url is None:
            sys.exit(f"farplug demo --page ended with exit code {demo.wait()} before it served a page")
        draw(url, chromium, target)
    finally:
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()
        demo.wait()


if __name__ == "__main__":
    main()
