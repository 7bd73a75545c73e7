"""The whole of kerbside, as its users have it: a ``.vv`` file of its REST interface, TLS on both sides, real tokens.

It needs a database and takes more than a minute, the life of a token: ``make test-kerbside`` runs it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.guest import command
from tests.guest.conftest import Guests
from tests.guest.kerbside_service import TOKEN_MINUTES, Service, missing, service
from tests.guest.plugging import GUEST_TIMEOUT, MIB, NO_SCAN_DELAY, disk_of, gone

import farplug
from farplug.testing import GuestConfig, QemuGuest, Spice, SpicePort, SpiceTransport
from farplug.virtual.disk import disk_device

CONFIG = GuestConfig(
    ports=(SpicePort(), SpicePort()),
    spice=Spice(transport=SpiceTransport.TLS_REQUIRED, ticket="ticket-of-qemu"),
    kernel_arguments=NO_SCAN_DELAY,
    memory=512,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("FARPLUG_WHOLE_KERBSIDE") != "1", reason="the whole of kerbside: make test-kerbside"
)


@pytest_asyncio.fixture(loop_scope="session")
async def guest(guests: Guests) -> QemuGuest:
    """Return a guest that requires TLS and a ticket."""
    return await guests.get(CONFIG)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kerbside(session_guests: Guests) -> AsyncIterator[Service]:
    """Return kerbside in front of the guest, which the tests share."""
    if reason := missing():
        pytest.fail(reason)
    async with session_guests.lent(CONFIG) as guest, service(guest.spice) as running:
        yield running


async def test_a_downloaded_console_file(kerbside: Service, guest: QemuGuest, tmp_path: Path) -> None:
    """``doctor`` keeps the file, ``connect`` deletes it; the guest reads the disk and writes to it."""
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(8 * MIB))
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    vv = await kerbside.console(tmp_path)
    async with command.farplug("doctor", vv) as running:
        code, out, _ = await running.end()
    assert (code, vv.exists()) == (0, True), out
    async with command.farplug("connect", vv, "--usb-disk", image) as running:
        await running.until("configured by the guest")
        assert not vv.exists()
        async with asyncio.timeout(GUEST_TIMEOUT):
            while (await guest.run("test -b /dev/sda && blockdev --getsize64 /dev/sda")).exit_code:
                await asyncio.sleep(0.05)
        assert (await guest.check("sha256sum </dev/sda")).split()[0] == before
        await guest.check("yes text | dd of=/dev/sda bs=1M count=1 iflag=fullblock conv=notrunc,fsync 2>/dev/null")
        running.process.terminate()
        code, _, err = await running.end()
    assert code == 0, err
    assert image.read_bytes()[:MIB] == b"text\n" * (MIB // 5) + b"text\n"[: MIB % 5]
    await gone(guest, "/dev/sda")


async def test_a_session_that_is_terminated(kerbside: Service, guest: QemuGuest, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    async with command.farplug("connect", await kerbside.console(tmp_path), "--usb-disk", image) as running:
        await running.until("configured by the guest")
        await kerbside.terminate()
        code, _, err = await running.end()
    assert code == 9
    assert "a SPICE proxy may have ended the session" in err
    await gone(guest, "/dev/sda")


async def test_a_token_expires(kerbside: Service, guest: QemuGuest, tmp_path: Path) -> None:
    """Devices are attached and detached as before: the channels were linked at the start."""
    images = [tmp_path / "a.raw", tmp_path / "b.raw"]
    for image in images:
        image.write_bytes(os.urandom(MIB))
    first, second = map(disk_device, images)
    expired = time.monotonic() + 60 * TOKEN_MINUTES + 1
    async with farplug.connect(str(await kerbside.console(tmp_path))) as connection:
        attachment = await connection.plug(first)
        await asyncio.sleep(expired - time.monotonic())
        await connection.plug(second)
        disk = await disk_of(guest, first)
        await attachment.unplug()
        await gone(guest, disk)  # Linux may still be reading from it: the disk that comes back is another one
        await connection.plug(first)
        for device, image in zip((first, second), images, strict=True):
            digest = (await guest.check(f"sha256sum <{await disk_of(guest, device)}")).split()[0]
            assert digest == hashlib.sha256(image.read_bytes()).hexdigest()
    for device in (first, second):
        await device.dispose()
