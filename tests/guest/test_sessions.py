"""A session in the background, used through the installed package, from another folder, without privileges."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.docs import ROOT
from tests.guest.plugging import GUEST_TIMEOUT, MIB, blank, disk_with, gone

from farplug.store.image import serial_number
from farplug.target import open_session, parse_target
from farplug.testing import QemuGuest


class Installed:
    """The command ``farplug`` of a wheel in an empty virtual environment.

    Attributes:
        folder: the working directory of the commands.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "elsewhere"
        self.folder.mkdir()
        runtime = root / "run"
        runtime.mkdir(mode=0o700)
        self._program = root / "venv/bin/farplug"
        drop = shutil.which("setpriv")
        self._unprivileged = [] if drop is None else [drop, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_STATE_HOME": str(root / "state"),
            "PYTHONUNBUFFERED": "1",
        }

    @asynccontextmanager
    async def running(self, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a command; kill it at the end if it still runs."""
        process = await asyncio.create_subprocess_exec(
            *self._unprivileged,
            self._program,
            *map(str, arguments),
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def __call__(self, *arguments: object, code: int = 0) -> str:
        """Run a command that ends with an exit code; return its standard output, or its error."""
        async with asyncio.timeout(GUEST_TIMEOUT), self.running(*arguments) as process:
            out, err = await process.communicate()
        assert (process.returncode, err.decode() if code == 0 else "") == (code, ""), (arguments, out, err)
        return out.decode() if code == 0 else err.decode()

    async def json(self, *arguments: object) -> Any:
        """Run a command with ``--json``; return the value that it printed."""
        return json.loads(await self(*arguments, "--json"))


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    """Build a wheel, and install it in an empty virtual environment."""
    root = Path(tempfile.mkdtemp(prefix="farplug-"))  # short: it has a socket
    try:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        build = subprocess.run(
            [*pip, "wheel", "--no-deps", "-w", str(root / "dist"), str(ROOT)], capture_output=True, text=True
        )
        if build.returncode != 0:
            if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
                pytest.fail(build.stderr)
            pytest.skip("no wheel can be built: is the package index reachable?")
        # An own copy of pip would cost as much as the wheel does.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
        (wheel,) = (root / "dist").glob("*.whl")
        install = [*pip, "--python", str(root / "venv/bin/python"), "install", "--no-compile", str(wheel)]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        yield Installed(root)
    finally:
        shutil.rmtree(root)


async def test_a_session(guest: QemuGuest, installed: Installed) -> None:
    farplug, folder = installed, installed.folder
    drivers = folder / "drivers.raw"
    with drivers.open("wb") as file:
        file.write(b"drivers\n")
        file.truncate(MIB)
    for name in ("logs", "one", "two"):
        (folder / name).mkdir()
        (folder / name / "name.txt").write_text(name)
    for name in ("one", "two"):
        await farplug("image", "create", "--format", "iso9660", "--from", name)

    assert await farplug("connect", guest.targets[0], "--name", "web1", "--detach") == "web1\n"
    (entry,) = await farplug.json("ls")
    assert (entry["name"], entry["state"], len(entry["ports"]), entry["devices"]) == ("web1", "connected", 2, [])
    async with farplug.running("watch", "-s", "web1", "--json") as watching:
        assert watching.stdout is not None
        assert json.loads(await watching.stdout.readline())["event"] == "snapshot"

        out = await farplug("attach", "-s", "web1", "--usb-disk", "drivers.raw", "--usb-folder", "./logs")
        assert out.count("configured by the guest") >= 2
        disk = await disk_with(guest, serial_number(drivers))
        assert await guest.check(f"head -c 8 {disk}") == "drivers\n"
        await guest.check(f"printf written | dd of={disk} conv=notrunc,fsync 2>/dev/null")
        status = await farplug.json("status", "-s", "web1")
        assert {one["label"]: (one["state"], one["reason"]) for one in status["devices"]} == {
            "drivers.raw": ("in use", None),
            "logs": ("in use", None),
        }
        async with asyncio.timeout(GUEST_TIMEOUT):  # figures are published once in a while
            while not all(one["read"] > 0 for one in status["devices"]):
                status = await farplug.json("status", "-s", "web1")
        assert sorted(port["device"] for port in status["ports"]) == ["drivers.raw", "logs"]
        assert Path(status["log"]).stat().st_mode & 0o777 == 0o600

        await farplug("detach", "-s", "web1", "drivers.raw")
        await gone(guest, disk)
        assert drivers.read_bytes()[:8] == b"written\n"
        assert "no such file" in await farplug("attach", "--usb-disk", "missing.raw", code=3)

        await farplug("attach", "-s", "web1", "--usb-cdrom", "one.iso")
        assert await _text_on_cdrom(guest) == "one"
        await farplug("insert", "-s", "web1", "two.iso")
        assert await _text_on_cdrom(guest) == "two"
        await farplug("eject", "-s", "web1", "--force")
        assert "is empty" in await farplug("eject", "-s", "web1")

        await farplug("detach", "all")
        await farplug("attach", "--usb-keyboard", "--usb-tablet")
        await _has_products(guest, "Virtual Keyboard 03/01/01", "Virtual Tablet 03/00/00")
        await farplug("detach", "all")
        await farplug("attach", "--usb-disk", "drivers.raw")
        await farplug("attach", "--usb-keyboard", "--usb-tablet")  # in the port that is left
        await _has_products(guest, "Virtual Devices 03/00/00", "Virtual Devices 03/01/01")
        await farplug("detach", "all")
        assert (await farplug.json("status"))["devices"] == []
        assert "the session web1 has ended" in await farplug("stop", "-s", "web1")
        events = [json.loads(line)["event"] async for line in watching.stdout]
        assert await watching.wait() == 0
    assert events.count("attached") == events.count("detached") >= 3
    assert {"medium-inserted", "medium-ejected"} <= set(events)
    assert await farplug.json("ls") == []


async def _has_products(guest: QemuGuest, *expected: str) -> None:
    """Wait until the guest has these products of farplug, and disks, each with class and protocol of an interface.

    Linux makes the folders of the interfaces when it has configured a device, and serves the hub of each speed on its
    own: a drive that has left may still be there when it has configured a keyboard.
    """
    script = """
    for interface in /sys/bus/usb/devices/*:*; do
        device=${interface%%:*}
        grep -q farplug $device/manufacturer 2>/dev/null || continue
        case "$(cat $device/product)" in *Disk) continue ;; esac
        cd $interface
        echo $(cat $device/product) $(cat bInterfaceClass)/$(cat bInterfaceSubClass)/$(cat bInterfaceProtocol)
    done | sort
    """
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await guest.check(script)).splitlines() != list(expected):
            await asyncio.sleep(0.1)


async def _text_on_cdrom(guest: QemuGuest) -> str:
    """Return the text of the file on the medium, once the guest can mount it."""
    script = (
        "mount -t iso9660 -o ro /dev/sr0 /mnt 2>/dev/null && { cat /mnt/name.txt || cat /mnt/NAME.TXT; umount /mnt; }"
    )
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (result := await guest.run(script)).exit_code != 0:
            await asyncio.sleep(0.2)
    return result.output.strip()


async def test_a_vm_that_was_lost_gets_its_disk_back(guest: QemuGuest, installed: Installed) -> None:
    """A console takes the VM over, which ends the connection; the session connects again, and plugs the disk in."""
    image = blank(installed.folder / "disk.raw")
    await installed("connect", guest.targets[0], "--name", "again", "--detach", "--usb-disk", image)
    async with installed.running("watch", "-s", "again", "--json") as watching:
        assert watching.stdout is not None
        await disk_with(guest, serial_number(image))
        assert json.loads(await watching.stdout.readline())["event"] == "snapshot"
        console = await open_session(parse_target(guest.targets[0]))
        await console.close()
        wanted = ["lost", "reconnecting", "back", "attached", "configured"]
        async with asyncio.timeout(GUEST_TIMEOUT):
            while wanted:
                if json.loads(await watching.stdout.readline())["event"] == wanted[0]:
                    wanted.pop(0)
    disk = await disk_with(guest, serial_number(image))
    await installed("stop", "-s", "again")
    await gone(guest, disk)
