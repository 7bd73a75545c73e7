"""A session that several clients use at the same time, with a real guest."""

from __future__ import annotations

import asyncio
import gc
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from tests.control.support import RawClient
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, comes, disk_with, until
from tests.guest.test_spice_session import TWO_PORTS
from tests.leaks import descriptors
from tests.long import ATTACH_ROUNDS

from farplug.app.app import App
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.app.state import apply
from farplug.control import names
from farplug.control.client import Client
from farplug.control.server import Server
from farplug.store.image import serial_number
from farplug.testing import QemuGuest, Spice


async def use(path: Path, image: Path, guest: QemuGuest) -> None:
    """Attach an image, read it in the guest, detach it, again and again; and follow the state meanwhile.

    Two clients of each of two sessions do so: in ``make stress`` they attach 200 times in all.

    The next device comes when Linux has removed this one. Linux asks a device that is there in place of one that it has
    not removed yet whether it is the same (hub_port_connect_change in drivers/usb/core/hub.c), gets no reply, and waits
    for five seconds; meanwhile it misses what happens on the other ports.
    """
    content, serial = image.read_bytes()[:5].decode(), serial_number(image)
    async with Client.connect(path) as client, asyncio.timeout(GUEST_TIMEOUT * 6):
        events = client.subscribe()
        state = await anext(events)
        for _ in range(ATTACH_ROUNDS):
            result = await client.call("attach", {"sources": [{"kind": "disk", "path": str(image)}]})
            (attachment,) = result["attachments"]
            assert attachment["state"] == "in use"
            disk = await disk_with(guest, serial)
            assert await guest.check(f"head -c 5 {disk}") == content
            assert await client.call("detach", {"device": image.name}) == {"detached": [image.name]}
            while True:
                event = await anext(events)
                assert event["event"] != "dropped"
                state = apply(state, event)
                if event["event"] == "removed" and event["attachment"] == attachment["id"]:
                    break
            ((guest_id, now),) = state["guests"].items()
            assert attachment["id"] not in now["attachments"]
            await until(guest, f"! busybox grep -qsx {serial} /sys/bus/usb/devices/*/serial")
        assert (await client.call("status"))["guests"].keys() == {guest_id}


async def test_two_sessions_with_two_clients_each_while_a_third_one_reads_nothing(
    guests: Guests, tmp_path: Path
) -> None:
    vms = [await guests.get(config) for config in (TWO_PORTS, replace(TWO_PORTS, spice=Spice()))]
    images = []
    for name in ("alpha", "gamma", "delta", "kappa"):
        images.append(tmp_path / f"{name}.raw")
        images[-1].write_bytes(name.encode().ljust(1 << 20, b"\0"))
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {"XDG_RUNTIME_DIR": str(tmp_path / "runtime")}
    async with AsyncExitStack() as stack:
        servers = []
        for number, guest in enumerate(vms):
            app = await stack.enter_async_context(App())
            await app.connect(GuestSettings(TargetSettings(guest.targets[0])))
            server = Server(app, names.reserve(f"web{number}", environment=environment), target=guest.targets[0])
            await server.start()
            servers.append(server)
            (guest_id,) = app.snapshot()["guests"]
            while {port["state"] for port in app.snapshot()["guests"][guest_id]["ports"]} != {"ready"}:
                await asyncio.sleep(0.01)  # the second port is linked later
        before = len(descriptors())
        clients = []
        for number, (guest, server) in enumerate(zip(vms, servers, strict=True)):
            silent = await stack.enter_async_context(RawClient.connect(server.path))
            silent.reader._transport.pause_reading()  # type: ignore[attr-defined]
            silent.send({"id": 1, "method": "subscribe"})
            clients += [use(server.path, image, guest) for image in images[2 * number : 2 * number + 2]]
        await asyncio.gather(*clients)
        for server in servers:
            while len(server._clients) > 1:
                await asyncio.sleep(0)
            ((_, state),) = server._app.snapshot()["guests"].items()
            assert (state["attachments"], [port["state"] for port in state["ports"]]) == ({}, ["ready", "ready"])
        gc.collect()
        await comes(lambda: len(descriptors()) <= before + 2 * len(vms))  # both ends of the silent clients
        for server in servers:
            await server.close()
    assert os.listdir(servers[0].path.parent) == []
