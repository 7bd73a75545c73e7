"""What a real SPICE server does with a session: passwords, other clients, channels that are removed from the VM."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tests.guest.command import farplug
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY, blank, plugged
from tests.transport.fake_spice import free_port

from farplug.errors import GuestGoneError, Reason, TargetError
from farplug.redirection import Redirection, events
from farplug.spice.messages import SwitchHost
from farplug.target import parse_target
from farplug.testing import GuestConfig, QemuGuest, Spice, SpicePort, SpiceTransport
from farplug.transport.moved import GuestMoved, moved_target
from farplug.transport.spice_session import SpiceSession
from farplug.transport.spice_target import SpiceTarget
from farplug.virtual.disk import disk_device
from farplug.vm.qmp import QmpError

TWO_PORTS = replace(LABORATORY, ports=(SpicePort(), SpicePort()))


async def test_passwords_at_the_limit(guests: Guests) -> None:
    async with guests.fresh(GuestConfig(spice=Spice(ticket="secret"), paused=True)) as guest:

        async def set_password(password: str) -> None:
            await guest.qmp.execute("set_password", {"protocol": "spice", "password": password})
            await guest.qmp.execute("expire_password", {"protocol": "spice", "time": "never"})

        async def try_password(password: str) -> None:
            target = SpiceTarget(host="127.0.0.1", port=guest.spice.port, password=password)
            session = await SpiceSession.connect(target)
            await session.close()

        for password in ("x" * 58, "x" * 59, "x" * 60, "é" * 30):
            await set_password(password)
            await try_password(password)
            with pytest.raises(TargetError) as caught:
                await try_password("x" * 57)
            assert caught.value.reason is Reason.WRONG_PASSWORD
        with pytest.raises(QmpError):  # QEMU does not accept a longer one
            await set_password("x" * 61)


async def encrypted(guest: QemuGuest) -> dict[str, bool]:
    """Return whether QEMU's channels use TLS, by the type of the channel."""
    names = {1: "main", 9: "usbredir"}
    channels = (await guest.qmp.execute("query-spice"))["channels"]
    return {names[channel["channel-type"]]: channel["tls"] for channel in channels}


async def open_first_port(target: SpiceTarget, guest: QemuGuest) -> dict[str, bool]:
    """Open a session and its first port; return which channels use TLS."""
    session = await SpiceSession.connect(target)
    try:
        redirection = Redirection(session.ports[0], lambda event: None)
        try:
            await redirection.open()
            return await encrypted(guest)
        finally:
            await redirection.close()
    finally:
        await session.close()
        async with asyncio.timeout(GUEST_TIMEOUT):
            while await encrypted(guest):  # QEMU lists a channel until its own thread has closed it
                await asyncio.sleep(0.05)


def tls_target(guest: QemuGuest, port: int | None) -> SpiceTarget:
    ca_file = guest.spice.ca_file
    assert ca_file is not None
    return SpiceTarget(
        host=guest.spice.host,
        port=port,
        tls_port=guest.spice.tls_port,
        password=guest.spice.ticket,
        ca=ca_file.read_text(),
        host_subject=guest.spice.host_subject,
    )


async def test_tls_first_where_both_ports_serve_all_channels(guests: Guests, tmp_path: Path) -> None:
    port = free_port()
    spice = Spice(transport=SpiceTransport.TLS, ticket="secret")
    config = GuestConfig(ports=(SpicePort(),), spice=spice, extra_arguments=("-spice", f"port={port}"), paused=True)
    async with guests.fresh(config) as guest:
        target = tls_target(guest, port)
        assert await open_first_port(target, guest) == {"main": True, "usbredir": True}
        vv = tmp_path / "console.vv"
        vv.write_text(replace(guest.spice, port=port).vv + "secure-channels=main\n")
        from_file = parse_target(str(vv))
        assert isinstance(from_file, SpiceTarget)
        assert (from_file.port, from_file.tls_port) == (port, guest.spice.tls_port)
        assert await open_first_port(from_file, guest) == {"main": True, "usbredir": True}
        plain = SpiceTarget(host=guest.spice.host, port=port, password=guest.spice.ticket)
        assert await open_first_port(plain, guest) == {"main": False, "usbredir": False}


async def test_a_channel_that_qemu_serves_only_without_tls(guests: Guests) -> None:
    spice = Spice(transport=SpiceTransport.TLS_REQUIRED, ticket="secret")
    config = GuestConfig(
        ports=(SpicePort(),), spice=spice, extra_arguments=("-spice", "plaintext-channel=usbredir"), paused=True
    )
    async with guests.fresh(config) as guest:
        target = tls_target(guest, guest.spice.port)
        with pytest.raises(TargetError, match="does not serve the channel usbredir over TLS") as caught:
            await open_first_port(target, guest)
        assert caught.value.reason is Reason.NEEDS_TLS
        mixed = {"main": True, "usbredir": False}
        assert await open_first_port(replace(target, allow_plain=True), guest) == mixed
        with pytest.raises(TargetError, match="as secure-channels requires"):
            await open_first_port(replace(target, allow_plain=True, secure_channels=frozenset({"usbredir"})), guest)


async def test_another_client_takes_the_session_over(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(TWO_PORTS)
    images = [blank(tmp_path / f"{name}.raw") for name in "abc"]
    arguments = ("--usb-disk", images[0], "--usb-disk", images[1])
    async with farplug("connect", guest.targets[0], *arguments) as first:
        await first.until("configured by the guest")
        await first.until("configured by the guest")
        async with farplug("connect", guest.targets[0], "--usb-disk", images[2]) as second:
            code, out, err = await first.end()
            assert code == 9
            assert "and still answers: another SPICE client has probably connected" in err
            assert "still runs and has the channel" not in out + err
            await second.until("configured by the guest")


async def test_each_port_names_the_other_client(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(TWO_PORTS)
    devices = [disk_device(blank(tmp_path / f"{name}.raw")) for name in "ab"]
    async with plugged(guest.targets[0], *devices) as hub:
        session = await SpiceSession.connect(_target(guest))
        try:
            async with asyncio.timeout(GUEST_TIMEOUT):
                while hub.kinds().count(events.Detached) < 2:
                    await asyncio.sleep(0.01)
        finally:
            await session.close()
        errors = [event.error for event in hub.seen if isinstance(event, events.Detached)]
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, GuestGoneError)
        assert "the SPICE server closed the session" in error.message
        assert "another client may have taken over the session" in error.remedy
    for device in devices:
        await device.dispose()


async def test_a_channel_that_is_taken_out_of_the_vm(guests: Guests, tmp_path: Path) -> None:
    async with (
        guests.fresh(TWO_PORTS) as guest,
        farplug("connect", guest.targets[0], "--usb-disk", blank(tmp_path / "disk.raw")) as running,
    ):
        await running.until("configured by the guest")
        await guest.qmp.execute("device_del", {"id": "redir0"})
        await guest.qmp.execute("device_del", {"id": "redir1"})
        code, _, err = await running.end()
    assert code == 9
    assert "the SPICE server closed the channel" in err
    assert "still runs and has the channel" in err


async def test_a_vm_that_migrates(guests: Guests) -> None:
    """The client follows. QEMU's client_migrate_info without a TLS port sends -1 for it."""
    config = GuestConfig(spice=Spice(), paused=True)
    incoming = replace(config, extra_arguments=("-incoming", f"tcp:127.0.0.1:{(number := free_port())}"))
    async with guests.fresh(config) as source, guests.fresh(incoming) as destination:
        session = await SpiceSession.connect(_target(source))
        where = {"hostname": "127.0.0.1", "port": destination.spice.port, "cert-subject": "CN=new"}
        await source.qmp.execute("client_migrate_info", {"protocol": "spice", **where})
        await source.qmp.execute("migrate", {"uri": f"tcp:127.0.0.1:{number}"})
        async with asyncio.timeout(GUEST_TIMEOUT):
            error = await session.closed()
            assert isinstance(error, GuestMoved)
            assert error.where == SwitchHost(destination.spice.port, None, "127.0.0.1", "CN=new")
            new = await SpiceSession.connect(moved_target(session.target, error.where))
            assert [port.name for port in new.ports] == [port.name for port in session.ports]
            await new.close()


def _target(guest: QemuGuest) -> SpiceTarget:
    target = parse_target(guest.spice.target)
    assert isinstance(target, SpiceTarget)
    return target
