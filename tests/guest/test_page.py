"""``farplug page`` with a real VM: its picture, an upload in its drive, and its end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, SCREEN, gone
from tests.web.support import Browser, Served

from farplug.testing import QemuGuest

COMMAND = (sys.executable, "-c", "from farplug.cli.script import main; main()", "page", "--json", "--view-only")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the user's files, with a short path: it has sockets."""
    path = Path(tempfile.mkdtemp(prefix="farplug-", dir="/tmp"))
    (path / "run").mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


class Remote(Served):
    """The page of another process."""

    def __init__(self, printed: dict[str, Any]) -> None:
        self.port = printed["port"]
        self.token, self.view_token = (
            printed[name].partition("#token=")[2].partition("&")[0] for name in ("url", "view_url")
        )


async def picture(browser: Browser) -> tuple[int, int]:
    """Wait for the whole picture of the screen, with text, not only a background; return width and height.

    QEMU sends a blank picture first, and draws what the VM has written a moment later.
    """
    await browser.call("watch-screen", {"display": 0})
    pixels, covered = bytearray(), 0
    while True:
        data, payload = await browser.event("screen")
        assert payload is not None
        width, height = data["width"], data["height"]
        if len(pixels) != 4 * width * height:
            pixels, covered = bytearray(4 * width * height), 0
        at = 0
        for x, y, columns, rows in data["rects"]:
            for row in range(y, y + rows):
                start = 4 * (row * width + x)
                pixels[start : start + 4 * columns] = payload[at : at + 4 * columns]
                at += 4 * columns
            covered += columns * rows
        assert at == len(payload)
        await browser.call("screen-ack", {"serial": data["serial"]})
        colours = {bytes(pixels[at : at + 3]) for at in range(0, len(pixels), 4)}
        if data["last"] and covered >= width * height and len(colours) > 1:
            return width, height


async def read_cdrom(guest: QemuGuest, size: int) -> str:
    """Return the SHA-256 of the medium in the guest's drive, once it can be read."""
    script = f"head -c {size} /dev/sr0 2>/dev/null | sha256sum"
    empty = hashlib.sha256().hexdigest()
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (digest := (await guest.check(script)).split()[0]) == empty:
            await asyncio.sleep(0.2)
    return digest


async def test_a_vm_in_the_browser(guests: Guests, folder: Path) -> None:
    environment = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XDG_STATE_HOME": str(folder),
        "XDG_CACHE_HOME": str(folder),
    }
    iso = bytes(32768) + b"\1CD001\1" + os.urandom(3_000_000 - 32775 - 3_000_000 % 2048)
    async with guests.fresh(SCREEN) as guest, asyncio.timeout(2 * GUEST_TIMEOUT):
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "-s", guest.targets[0], env=environment, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            page = Remote(json.loads(await process.stdout.readline()))
            async with page.browser(page.token) as driver, page.browser(page.view_token) as watcher:
                (row,) = await driver.call("sessions")
                assert (row["state"], len(row["ports"])) == ("connected", 2)
                for browser in (driver, watcher):
                    await browser.call("open", {"session": row["name"]})
                    width, height = await picture(browser)
                    assert width >= 640
                    assert height >= 400
                for headers in (page.view_token, page.token):
                    small = await page.http("GET", f"/screenshot.png?session={row['name']}&thumbnail=1", token=headers)
                    assert (small.status, small.body[:4]) == (200, b"\x89PNG")

                answer = await page.http("PUT", "/media/installer.iso", body=iso, token=page.token)
                assert answer.json["sha256"] == hashlib.sha256(iso).hexdigest()
                source = {"kind": "cdrom", "path": answer.json["path"]}
                assert await watcher.refused("attach", {"sources": [source]}) == "view-only"
                result = await driver.call("attach", {"sources": [source]})
                assert [one["label"] for one in result["attachments"]] == ["cdrom0"]
                assert await read_cdrom(guest, len(iso)) == answer.json["sha256"]
                line = await driver.call("command", {"method": "attach", "params": {"sources": [source]}})
                assert line["command"].endswith("/installer.iso")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
            await gone(guest, "/dev/sr0")
            assert list((folder / "farplug").glob("page-*")) == []
            assert list((folder / "run" / "farplug").glob("*.sock")) == []
        finally:
            if process.returncode is None:
                process.terminate()  # not kill: the session that it started would stay
                await process.wait()
