"""A session whose ticket expires, whose VM moves, and whose VM is killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from tests.app.test_link import Running, running
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY
from tests.transport.fake_spice import free_port

from farplug.app.commands import Attach, Detach
from farplug.app.settings import Source
from farplug.errors import Reason, TargetError
from farplug.target import open_session, parse_target
from farplug.testing import GuestConfig, QemuGuest, Spice, SpicePort

TWO = (SpicePort(), SpicePort())


def images(folder: Path) -> list[Path]:
    """Make two disks, each of which begins with its name."""
    paths = [folder / "alpha.raw", folder / "gamma.raw"]
    for path in paths:
        path.write_bytes(path.stem.encode().ljust(1 << 20, b"\0"))
    return paths


async def read(guest: QemuGuest, *names: str) -> None:
    """Wait until the guest has read the names of disks."""
    command = "for disk in /dev/sd?; do head -c 5 $disk; echo; done 2>/dev/null; :"
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not set(names) <= set((await guest.check(command)).split()):
            await asyncio.sleep(0.1)


async def in_use(session: Running, *labels: str) -> None:
    """Wait until the guest has configured devices, in the order of their ports."""
    await session.in_use()
    assert [label for label, _ in sorted(session.places.items(), key=lambda item: item[1][1])] == list(labels)


async def test_devices_come_and_go_after_the_ticket_has_expired(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(replace(LABORATORY, ports=TWO, spice=Spice(ticket="once")))
    await guest.booted(GUEST_TIMEOUT)
    target = guest.targets[0]
    async with asyncio.timeout(4 * GUEST_TIMEOUT), running(target, reconnect=None) as session:
        await session.named("ready")
        await guest.qmp.execute("expire_password", {"protocol": "spice", "time": "now"})
        with pytest.raises(TargetError) as refused:
            await open_session(parse_target(target))
        assert refused.value.reason is Reason.WRONG_PASSWORD
        for path in [*images(tmp_path), tmp_path / "alpha.raw"]:
            await session.app.do(Attach((Source.disk(path),)))
            await read(guest, path.stem)
            await session.app.do(Detach(path.name))
    await guest.qmp.execute("expire_password", {"protocol": "spice", "time": "never"})


async def test_a_vm_that_is_killed_and_started_again_has_its_devices_back(guests: Guests, tmp_path: Path) -> None:
    config = replace(LABORATORY, ports=TWO, spice=Spice(port=free_port()))
    sources = [Source.disk(path) for path in images(tmp_path)]
    async with asyncio.timeout(4 * GUEST_TIMEOUT), AsyncExitStack() as stack:
        async with guests.fresh(config) as guest:
            session = await stack.enter_async_context(running(guest.targets[0], *sources))
            await read(guest, "alpha", "gamma")
            os.kill(guest.pid, signal.SIGKILL)
        await session.named("reconnecting", 2)
        async with guests.fresh(config) as guest:
            await session.named("back")
            await in_use(session, "alpha.raw", "gamma.raw")
            await read(guest, "alpha", "gamma")


async def test_a_vm_that_migrates_has_its_devices_back(tmp_path: Path) -> None:
    config = GuestConfig(ports=TWO)
    incoming = GuestConfig(ports=TWO, extra_arguments=("-incoming", "defer"))
    sources = [Source.disk(path) for path in images(tmp_path)]
    async with (
        asyncio.timeout(4 * GUEST_TIMEOUT),
        QemuGuest(config) as guest,
        QemuGuest(incoming) as other,
        running(guest.targets[0], *sources, reconnect=None) as session,
    ):
        await guest.booted(GUEST_TIMEOUT)
        await read(guest, "alpha", "gamma")
        where = f"tcp:127.0.0.1:{free_port()}"
        await other.qmp.execute("migrate-incoming", {"uri": where})
        spice = {"protocol": "spice", "hostname": "127.0.0.1", "port": other.spice.port}
        await guest.qmp.execute("client_migrate_info", spice)
        await guest.qmp.execute("migrate", {"uri": where})
        await session.named("back")
        assert (await session.named("lost")).fields["reason"] == "guest-moved"
        await in_use(session, "alpha.raw", "gamma.raw")
        assert (await other.qmp.execute("query-status"))["status"] == "running"
