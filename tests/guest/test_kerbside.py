"""The whole path through the real SPICE proxy kerbside: farplug, TLS, proxy, QEMU, the guest's driver."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from tests.guest import command
from tests.guest.conftest import Guests
from tests.guest.kerbside import SESSION, Kerbside, require_kerbside
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY, MIB, STORAGE, Plugged, blank, disk_of, gone
from tests.long import in_full
from tests.transport.fake_spice import Recorder

import farplug
from farplug.app.guest import Guest
from farplug.app.settings import GuestSettings, ReconnectSettings, TargetSettings
from farplug.errors import GuestGoneError, PortError, Reason, TargetError
from farplug.target import open_session, parse_target
from farplug.testing import QemuGuest, Spice, SpicePort
from farplug.transport import spice_port
from farplug.transport.connection import Timeouts
from farplug.transport.spice_session import SpiceSession
from farplug.transport.spice_target import SpiceTarget
from farplug.usb import Device
from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import disk_device
from farplug.virtual.storage_transport import StorageTransport
from farplug.vm.qemu_config import SpiceAddress

TICKET = "ticket-of-qemu"
CONFIG = replace(LABORATORY, ports=(SpicePort(), SpicePort()), spice=Spice(ticket=TICKET))
LATER_CHANNELS = 2, 3


@pytest_asyncio.fixture(loop_scope="session")
async def guest(guests: Guests) -> QemuGuest:
    """Return a guest with a ticket and two SPICE ports."""
    require_kerbside()
    return await guests.get(CONFIG)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kerbside() -> AsyncIterator[Kerbside]:
    """Return the proxy, which the tests share."""
    require_kerbside()
    async with Kerbside() as kerbside:
        yield kerbside


@asynccontextmanager
async def connected(kerbside: Kerbside, guest: QemuGuest) -> AsyncIterator[Plugged]:
    """Connect to the guest through the proxy, with a new token."""
    vv = await kerbside.allow(guest.spice)
    connection = Plugged(await open_session(parse_target(str(vv))))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def random_disk(
    path: Path, transport: StorageTransport = StorageTransport.AUTO, size: int = 8 * MIB
) -> AsyncIterator[VirtualDevice]:
    """Make a disk of random bytes."""
    path.write_bytes(os.urandom(size))
    device = disk_device(path, transport=transport)
    try:
        yield device
    finally:
        await device.dispose()


async def plug(connection: Plugged, guest: QemuGuest, device: Device) -> str:
    """Plug a disk in; return its block device in the guest."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        attachment = await connection.plug(device)
        await attachment.configured()
    return await disk_of(guest, device)


async def digest(guest: QemuGuest, disk: str) -> str:
    """Return the SHA-256 of a disk, as the guest reads it from the device."""
    return (await guest.check(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum <{disk}")).split()[0]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("storage", ["uas", *in_full("bot")])  # a real disk has the other
async def test_a_disk(
    storage: str, kerbside: Kerbside, guest: QemuGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read, gets a filesystem, is read again; data is compressed in both directions."""
    caplog.set_level("DEBUG", "farplug.spice.channel")
    image = tmp_path / "disk.raw"
    async with (
        random_disk(image, STORAGE[storage].transport, 16 * MIB) as device,
        connected(kerbside, guest) as connection,
    ):
        disk = await plug(connection, guest, device)
        drivers = await guest.check(f"readlink -f $(readlink -f /sys/block/{disk[5:]}/device/../../..)/driver")
        assert drivers.strip().endswith(f"/{STORAGE[storage].driver}")
        assert await digest(guest, disk) == digest_of(image)
        await guest.check(
            f"""set -e
            mke2fs -q -F -t ext4 {disk}; mount {disk} /mnt
            yes 'compressible text' | head -c 3000000 >/mnt/text; head -c 1000000 /dev/urandom >/mnt/noise
            sha256sum /mnt/text /mnt/noise >/tmp/sums; umount /mnt; echo 3 >/proc/sys/vm/drop_caches
            mount {disk} /mnt; sha256sum -c /tmp/sums; umount /mnt; e2fsck -fn {disk}"""
        )
        assert await digest(guest, disk) == digest_of(image)
        for direction in "<>":
            assert f"{direction} usbredir 0: COMPRESSED_DATA" in caplog.text


async def test_two_disks_on_two_channels(kerbside: Kerbside, guest: QemuGuest, tmp_path: Path) -> None:
    images = [tmp_path / "a.raw", tmp_path / "b.raw"]
    since = len(kerbside.records)
    async with (
        random_disk(images[0]) as first,
        random_disk(images[1]) as second,
        connected(kerbside, guest) as connection,
    ):
        disks = await asyncio.gather(*(plug(connection, guest, device) for device in (first, second)))
        digests = await asyncio.gather(*(digest(guest, disk) for disk in disks))
    assert digests == [digest_of(image) for image in images]
    authorized = kerbside.authorized(since)
    assert authorized[0] == (["main", 0], True)
    assert sorted(authorized[1:]) == [(["usbredir", 0], True), (["usbredir", 1], True)]


async def test_a_token_that_is_refused(kerbside: Kerbside, tmp_path: Path) -> None:
    vv = kerbside.vv(token="another-token")
    async with command.farplug("connect", vv, "--usb-disk", blank(tmp_path / "a.raw")) as running:
        code, _, err = await running.end()
    assert code == 6
    assert "the password is wrong or has expired" in err
    assert "new .vv file" in err


async def test_attach_and_detach_after_the_life_of_the_token(
    kerbside: Kerbside, guest: QemuGuest, tmp_path: Path
) -> None:
    """All channels are linked at the start, and stay linked."""
    images = [tmp_path / "a.raw", tmp_path / "b.raw"]
    since = len(kerbside.records)
    vv = await kerbside.allow(guest.spice)
    async with (
        random_disk(images[0]) as first,
        random_disk(images[1]) as second,
        farplug.connect(str(vv)) as connection,
    ):
        attachment = await connection.plug(first)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while len(kerbside.authorized(since)) < 3:
                await asyncio.sleep(0.01)
        await kerbside.revoke()
        await connection.plug(second)
        for device, image in zip((first, second), images, strict=True):
            assert await digest(guest, await disk_of(guest, device)) == digest_of(image)
        disk = await disk_of(guest, first)
        await attachment.unplug()
        await gone(guest, disk)
        await connection.plug(first)
        assert await digest(guest, await disk_of(guest, first)) == digest_of(images[0])
        assert len(kerbside.authorized(since)) == 3


async def test_a_channel_that_is_linked_after_the_life_of_the_token(
    kerbside: Kerbside, guest: QemuGuest, tmp_path: Path
) -> None:
    """The channel is denied; the device that is plugged in continues to work."""
    image = tmp_path / "a.raw"
    async with (
        random_disk(image) as first,
        random_disk(tmp_path / "b.raw") as second,
        connected(kerbside, guest) as connection,
    ):
        disk = await plug(connection, guest, first)
        await kerbside.revoke()
        with pytest.raises(TargetError) as caught:
            await connection.plug(second)
        assert caught.value.reason is Reason.CHANNEL_DENIED
        assert "the ticket has expired" in caught.value.message
        assert await digest(guest, disk) == digest_of(image)


async def test_a_firewall_without_usbredir(kerbside: Kerbside, guest: QemuGuest, tmp_path: Path) -> None:
    vv = await kerbside.allow(guest.spice)
    await kerbside.request("permit", channels=[1, *LATER_CHANNELS])
    try:
        async with command.farplug("connect", vv, "--usb-disk", blank(tmp_path / "a.raw")) as running:
            code, _, err = await running.end()
    finally:
        await kerbside.request("permit", channels=[])
    assert code == 6
    assert "proxy does not permit the channel" in err
    assert "administrator of the proxy" in err


@pytest.mark.parametrize("end", ["by the control plane", "killed"])
async def test_a_session_that_the_proxy_ends(end: str, kerbside: Kerbside, guest: QemuGuest, tmp_path: Path) -> None:
    """The guest loses the disk; the next session has it again."""
    image = tmp_path / "a.raw"
    async with random_disk(image) as device:
        async with connected(kerbside, guest) as connection:
            disk = await plug(connection, guest, device)
            if end == "killed":
                await kerbside.kill_proxy()
            else:
                await kerbside.request("terminate", session=SESSION)
            async with asyncio.timeout(GUEST_TIMEOUT):
                error = await connection.closed()
                assert await connection.attachments[0].ended() is error
            assert isinstance(error, GuestGoneError)
            assert "a SPICE proxy may have ended the session" in error.remedy
            await gone(guest, disk)
        if end == "killed":
            await kerbside.start_proxy()
        async with connected(kerbside, guest) as connection:
            disk = await plug(connection, guest, device)
            assert await digest(guest, disk) == digest_of(image)


async def test_a_proxy_that_is_killed_and_comes_back(kerbside: Kerbside, guest: QemuGuest, tmp_path: Path) -> None:
    """A session that connects again has the disk again."""
    image = tmp_path / "a.raw"
    vv = await kerbside.allow(guest.spice)
    settings = GuestSettings(TargetSettings(str(vv)), reconnect=ReconnectSettings())
    async with random_disk(image) as device:
        connection = Guest(settings)
        try:
            await connection.connect()
            await connection.plug(device)
            disk = await disk_of(guest, device)
            await kerbside.kill_proxy()
            await gone(guest, disk)
            await kerbside.start_proxy()
            assert await digest(guest, await disk_of(guest, device)) == digest_of(image)
        finally:
            await connection.close()


async def test_a_certificate_of_another_host(kerbside: Kerbside, tmp_path: Path) -> None:
    """The token is not sent."""
    since = len(kerbside.records)
    vv = kerbside.vv(subject="O=farplug,CN=elsewhere")
    async with command.farplug("connect", vv, "--usb-disk", blank(tmp_path / "a.raw")) as running:
        code, _, err = await running.end()
    assert code == 5
    assert "elsewhere" in err
    assert kerbside.authorized(since) == []


async def test_the_control_plane_is_down() -> None:
    require_kerbside()
    async with Kerbside() as kerbside:
        await kerbside.stop_control()
        with pytest.raises(TargetError) as caught:
            await open_session(parse_target(str(kerbside.vv())))
    assert caught.value.reason is Reason.LINK_REFUSED
    assert "SPICE proxy" in caught.value.remedy
    assert "spice+tls" not in caught.value.remedy, "the connection has TLS"


async def test_a_vm_that_sends_nothing(kerbside: Kerbside) -> None:
    async def send_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            await reader.read()

    async with await asyncio.start_server(send_nothing, "127.0.0.1", 0) as server:
        target = parse_target(str(await kerbside.allow(_address_of(server))))
        assert isinstance(target, SpiceTarget)
        with pytest.raises(TargetError) as caught:
            await SpiceSession.connect(target, timeouts=Timeouts(handshake=5))
    assert caught.value.reason is Reason.TIMED_OUT
    assert "SPICE proxy" in caught.value.remedy


async def test_a_channel_in_use_behind_a_slow_way(
    kerbside: Kerbside, guest: QemuGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy reports success before it has asked QEMU, whose refusal arrives when open() has returned."""
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 0.05)
    is_open = asyncio.Event()
    is_open.set()

    async def slow_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await is_open.wait()
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", guest.spice.port)
        await asyncio.gather(_copy(reader, onward), _copy(onward_reader, writer))

    async with await asyncio.start_server(slow_way, "127.0.0.1", 0) as server:
        target = parse_target(str(await kerbside.allow(_address_of(server))))
        assert isinstance(target, SpiceTarget)
        session = await SpiceSession.connect(target)
        port = session.ports[0]
        assert isinstance(port, spice_port.SpicePort)
        mine, other = Recorder(), Recorder()
        await port.open(mine)
        await mine.until(lambda: bool(mine.data))
        is_open.clear()
        again = spice_port.SpicePort(port.number, session, port._dialer, port._timeouts)
        await again.open(other)
        is_open.set()
        await other.until(lambda: bool(other.closed))
        (error,) = other.closed
        assert isinstance(error, PortError)
        assert error.reason is Reason.CHANNEL_IN_USE
        assert not mine.closed
        await session.close()


def _address_of(server: asyncio.Server) -> SpiceAddress:
    return SpiceAddress(port=server.sockets[0].getsockname()[1], ticket=TICKET)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError), contextlib.closing(writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
