"""An agent with a real VM: ``farplug mcp`` as its program starts it, over stdio."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp_types import ImageContent, TextContent
from tests.app.test_screen import decode_png
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, MIB, NO_SCAN_DELAY, read_line
from tests.guest.test_screen import dump

from farplug.testing import GuestConfig, SpicePort

CONFIG = GuestConfig(
    ports=(SpicePort(), SpicePort()),
    kernel_arguments=(*NO_SCAN_DELAY, "console=tty0"),
    modules=("usbhid", "hid_generic", "evdev"),
    extra_arguments=("-device", "VGA,id=screen", "-device", "usb-tablet,bus=usb.0"),
)
COMMAND = (sys.executable, "-c", "from farplug.cli.script import main; main()", "mcp")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not await condition():
            await asyncio.sleep(0.2)


async def call(client: Client, tool: str, **arguments: Any) -> tuple[str, bytes]:
    """Return the text and the image of a result, which is empty if there is none."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    image = b"".join(base64.b64decode(one.data) for one in result.content if isinstance(one, ImageContent))
    return "\n".join(one.text for one in result.content if isinstance(one, TextContent)), image


async def test_an_agent_looks_types_and_plugs_a_disk_in(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(CONFIG)
    content = os.urandom(MIB)
    (tmp_path / "disk.raw").write_bytes(content)
    with tempfile.TemporaryDirectory(prefix="farplug-") as runtime:  # short: for sockets
        parameters = StdioServerParameters(
            command=COMMAND[0],
            args=[*COMMAND[1:], guest.spice.target, "--allow", str(tmp_path)],
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
        )
        async with Client(stdio_client(parameters)) as client:
            # The picture is QEMU's own.
            async def same() -> bool:
                _, png = await call(client, "screenshot")
                return decode_png(png) == await dump(guest, tmp_path)

            await until(same)

            # Text is read exactly: the firmware's, which the VM shows until a driver draws.
            assert "SeaBIOS" in (await call(client, "wait_for_text", text="Booting from ROM"))[0].splitlines()[0]

            # Text and keys: the screen changes by them.
            answers: list[str] = []

            async def text() -> None:
                answers.append((await call(client, "type", text="agent: | ~ \\ #1"))[0])
                await call(client, "key", text="shift+a")
                await call(client, "wait_for_screen", state="still", small_changes=False)
                await call(client, "key", text="Return")

            assert await read_line(guest, text) == "agent: | ~ \\ #1A"
            assert answers == ["typed 15 characters; confirmed: the VM took all of it"]

            # A disk, which the VM reads and writes; the image stays as it is.
            (disk,) = json.loads((await call(client, "usb_attach", kind="disk", path="disk.raw"))[0])

            async def read() -> bool:
                sums = await guest.check(
                    "for disk in /sys/block/sd*; do md5sum /dev/${disk##*/}; done 2> /dev/null || true"
                )
                return hashlib.md5(content).hexdigest() in sums

            await until(read)
            await guest.check(
                "for disk in /sys/block/sd*; do dd if=/dev/zero of=/dev/${disk##*/} bs=4k count=4; sync; done"
            )
            assert (await call(client, "usb_detach", device=disk["label"]))[0] == f"detached {disk['label']}"
            assert (tmp_path / "disk.raw").read_bytes() == content
        assert [*Path(runtime).glob("farplug/*.sock")] == [], "the session ends with the server"
