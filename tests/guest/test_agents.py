"""An agent with a real VM: by calls of tools alone it boots from an ISO, logs in, and reads a disk."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp_types import ImageContent, TextContent
from tests.app.test_screen import decode_png
from tests.guest.conftest import Guests
from tests.guest.firmware import lacking, program
from tests.guest.plugging import GUEST_TIMEOUT, NO_SCAN_DELAY, console_font
from tests.guest.test_screen import dump

from farplug.testing import GuestConfig, SpicePort

COMMAND = (sys.executable, "-c", "from farplug.cli.script import main; main()", "mcp")

SECRET = "pass word 1!"
INITTAB = """\
::sysinit:/etc/start
::sysinit:loadfont </etc/font.psf
tty1::respawn:/sbin/getty 38400 tty1 linux
"""
GRUB_SETTINGS = """\
terminal_output console
set timeout=-1
menuentry "Install" { true }
menuentry "Start the system" { exit }
"""
NOT_USED = "the VM does not use it yet: firmware looks for devices only when it starts"


def run(*command: object, stdin: bytes = b"") -> str:
    """Run a program of this machine; return its output."""
    words = [program(str(command[0])), *map(str, command[1:])]
    return subprocess.run(words, input=stdin, check=True, capture_output=True, timeout=60).stdout.decode()


def machine(folder: Path) -> GuestConfig:
    """Return a VM that waits for a key before it boots; its system asks for a name on the screen, and has nothing else.

    Args:
        folder: for files of the system.
    """
    hashed = run("openssl", "passwd", "-1", "-stdin", stdin=SECRET.encode()).strip()
    contents = {
        "/etc/inittab": INITTAB.encode(),
        "/etc/group": b"root:x:0:\n",
        "/etc/passwd": f"root:{hashed}:0:0:root:/root:/bin/sh\n".encode(),
        "/etc/font.psf": console_font(),
    }
    files = []
    for path, content in contents.items():
        file = folder / path.replace("/", "_")
        file.write_bytes(content)
        files.append((path, file))
    return GuestConfig(
        ports=(SpicePort(),) * 4,
        paused=True,
        kernel_arguments=(*NO_SCAN_DELAY, "quiet", "console=tty0"),
        modules=("bochs", "usbhid", "hid_generic", "cdc_acm"),
        files=tuple(files),
        extra_arguments=(
            *("-device", "VGA,id=screen", "-action", "reboot=reset"),
            *("-boot", "menu=on,splash-time=60000"),
        ),
    )


def grub_iso(path: Path) -> None:
    """Make a CD with GRUB and its menu, of a folder."""
    if not Path("/usr/lib/grub/i386-pc/cdboot.img").exists():
        lacking("GRUB for a PC's BIOS is not installed (Debian: grub-pc-bin)")
    folder = path.with_suffix("")
    (folder / "boot/grub").mkdir(parents=True)
    (folder / "boot/grub/grub.cfg").write_text(GRUB_SETTINGS)
    image = folder / "boot/grub/eltorito.img"
    modules = ("biosdisk", "iso9660", "normal", "minicmd")
    run("grub-mkimage", "-O", "i386-pc-eltorito", "-p", "/boot/grub", "-o", image, *modules)
    run(
        *("xorrisofs", "-quiet", "-r", "-b", "boot/grub/eltorito.img", "-no-emul-boot", "-boot-load-size", "4"),
        *("-boot-info-table", "-o", path, folder),
    )


def disk_with(path: Path, name: str, content: str) -> bytes:
    """Make a disk with a file system that has one file; return what is on it."""
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / name).write_text(content)
    run("mke2fs", "-q", "-t", "ext4", "-d", folder, path, "4M")
    return path.read_bytes()


class Agent:
    """An agent that can do nothing but call tools."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def call(self, tool: str, **arguments: Any) -> tuple[str, bytes]:
        """Return the text and the image of a result, which is empty if there is none."""
        result = await self._client.call_tool(tool, arguments)
        assert not result.is_error, result.content
        image = b"".join(base64.b64decode(one.data) for one in result.content if isinstance(one, ImageContent))
        return "\n".join(one.text for one in result.content if isinstance(one, TextContent)), image

    async def text(self, tool: str, **arguments: Any) -> str:
        return (await self.call(tool, **arguments))[0]

    async def sees(self, text: str) -> list[str]:
        """Wait until a text is on the screen; return all lines."""
        answer = await self.text("wait_for_text", text=text, timeout=100)
        assert not answer.startswith("timeout"), await self.text("screen_text")
        return answer.splitlines()


@asynccontextmanager
async def agent(*arguments: object) -> AsyncIterator[Agent]:
    """Start ``farplug mcp`` as an agent's program does, over stdio, with a session of its own."""
    with tempfile.TemporaryDirectory(prefix="farplug-") as runtime:  # short: for sockets
        parameters = StdioServerParameters(
            command=COMMAND[0],
            args=[*COMMAND[1:], *map(str, arguments)],
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
        )
        async with Client(stdio_client(parameters)) as client:
            yield Agent(client)
        assert [*Path(runtime).glob("farplug/*.sock")] == [], "the session ends with the server"


async def test_from_the_firmware_to_a_file_on_a_disk(guests: Guests, tmp_path: Path) -> None:
    allowed, secrets = tmp_path / "allowed", tmp_path / "secrets"
    allowed.mkdir()
    grub_iso(allowed / "grub.iso")
    content = disk_with(allowed / "disk.raw", "report", f"what was found: {os.urandom(8).hex()}\n")
    secrets.touch(mode=0o600)
    secrets.write_text(f"root={SECRET}\n")
    async with (
        guests.fresh(machine(tmp_path)) as guest,
        agent(guest.spice.target, "--allow", allowed, "--secrets", secrets) as acting,
    ):
        await guest.qmp.execute("cont")  # the user switches it on

        # The firmware looks for drives and keyboards when it starts.
        await acting.sees("Press ESC for boot menu")
        (drive,) = json.loads(await acting.text("usb_attach", kind="cdrom", path="grub.iso"))
        assert (drive["state"], drive["note"]) == ("attached", NOT_USED)
        await acting.text("usb_attach", kind="keyboard")
        await acting.text("key", text="ctrl+alt+Delete")
        while json.loads(await acting.text("usb_list"))["attached"][0]["state"] != "in use":
            await acting.text("wait", duration=0.2)
        await acting.sees("Press ESC for boot menu")
        await acting.text("key", text="Escape")
        lines = await acting.sees("DVD/CD")
        await acting.text("key", text=next(line for line in lines if "DVD/CD" in line).strip()[0])

        # The menu; its picture is QEMU's own.
        lines = await acting.sees("Start the system")
        assert any("*Install" in line for line in lines), lines
        async with asyncio.timeout(GUEST_TIMEOUT):
            while decode_png((await acting.call("screenshot"))[1]) != await dump(guest, tmp_path):
                await asyncio.sleep(0.2)
        await acting.text("key", text="Down")
        await acting.sees("*Start the system")
        await acting.text("key", text="Return")

        # The login.
        await acting.sees("login:")
        await acting.text("type", text="root\n")
        await acting.sees("Password:")
        assert (await acting.text("type_secret", name="root")).startswith("typed the secret root;")
        await acting.text("key", text="Return")
        await acting.sees("#")
        assert SECRET not in await acting.text("screen_text")

        # The disk: its file on the screen, and by a command without the screen.
        (disk,) = json.loads(await acting.text("usb_attach", kind="disk", path="disk.raw"))
        wait = "until mount /dev/sda /mnt 2>/dev/null; do sleep 0.1; done"
        text = f"clear; {wait}; cat /mnt/report\n"
        typed = await acting.text("type", text=text)
        assert typed == f"typed {len(text)} characters; confirmed: the VM took all of it"
        report = (allowed / "disk/report").read_text()
        await acting.sees(report.strip())
        ran = json.loads(await acting.text("run", command=["cat", "/mnt/report", "/none"]))
        assert (ran["exit_code"], ran["stdout"]) == (1, report)
        assert "No such file" in ran["stderr"]
        ran = json.loads(await acting.text("run", command=["sha256sum", "/dev/sr0"], timeout=100))
        assert ran["stdout"].split()[0] == hashlib.sha256((allowed / "grub.iso").read_bytes()).hexdigest()

        # The VM writes, and the image stays as it is.
        ran = json.loads(
            await acting.text("run", command=["sh", "-c", "echo lost >/mnt/report && umount /mnt && echo done"])
        )
        assert ran["stdout"] == "done\n"
        assert await acting.text("usb_detach", device=disk["label"]) == f"detached {disk['label']}"
        assert (allowed / "disk.raw").read_bytes() == content

        # A serial line, with a shell on it. It speaks first: Linux forgets what comes while nothing has the line open.
        assert await acting.text("serial_read") == ""
        wait = "until stty -F /dev/ttyACM0 -echo; do sleep 0.1; done"
        shell = "{ echo ready; exec sh; } </dev/ttyACM0 >/dev/ttyACM0"
        await acting.text("type", text=f"{wait}; {shell}\n")
        assert "ready" in await acting.text("serial_expect", text="ready", timeout=100)
        await acting.text("serial_write", text="echo sum: $((40+2))\n")
        assert "sum: 42" in await acting.text("serial_expect", text="42", timeout=100)
