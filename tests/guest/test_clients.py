"""Clients of a session that watch the screen, use the keyboard, and offer a CD: with a real guest."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.control.support import RawClient
from tests.control.test_driving import done
from tests.control.test_screens import Viewer, request
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, SCREEN, read_line, until
from tests.guest.test_cdrom import make_iso
from tests.guest.test_screen import dump
from tests.guest.test_spice_session import TWO_PORTS

from farplug.app.app import App
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.control import names
from farplug.control.server import Server
from farplug.store.remote import CHUNK

OFFERER = Path(__file__).parent / "scripts/offerer.py"


@asynccontextmanager
async def serving(target: str, folder: Path) -> AsyncIterator[Server]:
    """Run a session of a guest."""
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    async with App() as app:
        await app.connect(GuestSettings(TargetSettings(target)))
        server = Server(app, names.reserve("web", environment={"XDG_RUNTIME_DIR": str(runtime)}), target=target)
        await server.start()
        try:
            yield server
        finally:
            await server.close()


@asynccontextmanager
async def offerer(*arguments: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", OFFERER, *map(str, arguments), stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def printed(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(GUEST_TIMEOUT):
        return (await process.stdout.readline()).decode().strip()


async def test_a_cd_of_a_client_is_read_and_its_client_is_killed(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(TWO_PORTS)
    content = random.Random(1).randbytes(24 * CHUNK)
    iso = make_iso(tmp_path / "a.iso", random=content)
    whole = hashlib.sha256(iso.read_bytes()).hexdigest()
    async with serving(guest.targets[0], tmp_path) as server, RawClient.connect(server.path) as client:
        await done(client, "subscribe", events=["medium-ejected", "medium-failed"])
        async with offerer(server.path, iso, "attach") as first:
            assert await printed(first) == "ready"
            is_readable = "busybox head -c 1 /dev/sr* >/dev/null 2>&1"
            drive = (await until(guest, f"{{ {is_readable} && busybox ls /dev/sr*; }}")).strip()
            read = f"head -c {iso.stat().st_size} {drive} | sha256sum"
            assert (await guest.run(read, timeout=GUEST_TIMEOUT)).output.split()[0] == whole
            mounted = await guest.run(
                f"mount -t iso9660 -o ro {drive} /mnt && sha256sum < /mnt/random && umount /mnt", timeout=GUEST_TIMEOUT
            )
            assert mounted.output.split()[0] == hashlib.sha256(content).hexdigest()
        ejected = (await client.event("medium-ejected"))["data"]
        assert "its client has gone" in ejected["message"]
        assert (await done(client, "list"))[0]["medium"] is None
        # The next one is killed in the middle of a read, while its medium is mounted.
        async with offerer(server.path, iso, "insert", 6) as second:
            assert await printed(second) == "ready"
            reading = asyncio.ensure_future(
                guest.run(f"mount -t iso9660 -o ro {drive} /mnt; cat /mnt/random > /dev/null", timeout=GUEST_TIMEOUT)
            )
            assert await printed(second) == "silent"
            second.kill()
            result = await reading
            assert result.exit_code != 0
            assert "Input/output error" in result.output
        assert "its client has gone" in (await client.event("medium-ejected"))["data"]["message"]
        await guest.check("umount /mnt || :")
        # And the drive works with the next medium.
        async with offerer(server.path, iso, "insert") as third:
            assert await printed(third) == "ready"
            assert (await guest.run(read, timeout=GUEST_TIMEOUT)).output.split()[0] == whole
        assert guest.alive
        await client.event("medium-ejected")
        await done(client, "detach", device="all")


async def test_a_screen_is_watched_while_keys_are_pressed(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(SCREEN)
    async with serving(guest.targets[0], tmp_path) as server, RawClient.connect(server.path) as client:
        client.send(request("watch", "watch-screen"), request("drive", "drive", take=True))
        viewer = Viewer()
        await guest.check("dmesg -n 1; echo watched-screen > /dev/tty1")

        async def press() -> None:
            for number, key in enumerate(("ShiftLeft", "KeyV", "ShiftLeft", "KeyM", "Digit7", "NumpadEnter")):
                client.send(request(f"a{number}", "key", code=key, down=key != "ShiftLeft" or number == 0))
                if key != "ShiftLeft":
                    client.send(request(f"b{number}", "key", code=key, down=False))

        assert await read_line(guest, press) == "Vm7"
        await guest.qmp.execute("stop")
        try:
            expected = await dump(guest, tmp_path)
            async with asyncio.timeout(GUEST_TIMEOUT):
                while (*viewer.size, rgb(viewer.pixels)) != expected:
                    event = await client.event("screen")
                    viewer.show(event)
                    serial = event["data"]["serial"]
                    client.send(request(f"ack {serial} {id(event)}", "screen-ack", serial=serial))
                    expected = await dump(guest, tmp_path)
        finally:
            await guest.qmp.execute("cont")


def rgb(pixels: bytearray) -> bytes:
    """Return RGB pixels of BGRX ones."""
    result = bytearray(len(pixels) // 4 * 3)
    for channel in range(3):
        result[channel::3] = pixels[2 - channel :: 4]
    return bytes(result)


def test_pixels_are_converted() -> None:
    assert rgb(bytearray(struct.pack("<II", 0x010203, 0x040506))) == bytes((1, 2, 3, 4, 5, 6))
