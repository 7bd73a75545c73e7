"""A session that several clients use at the same time, with a real guest."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

from tests.control.support import RawClient, descriptors
from tests.guest.conftest import GuestPool
from tests.guest.plugging import GUEST_TIMEOUT
from tests.guest.test_spice_session import TWO_PORTS

from farplug.app.app import App
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.app.state import apply
from farplug.control import names
from farplug.control.client import Client
from farplug.control.server import Server
from farplug.testing import QemuGuest

ROUNDS = 5


async def use(path: Path, image: Path, guest: QemuGuest) -> None:
    """Attach an image, read it in the guest, detach it, again and again; and follow the state meanwhile."""
    content = image.read_bytes()[:5].decode()
    async with Client.connect(path) as client, asyncio.timeout(GUEST_TIMEOUT * 2):
        events = client.subscribe()
        state = await anext(events)
        for _ in range(ROUNDS):
            result = await client.call("attach", {"sources": [{"kind": "disk", "path": str(image)}]})
            id = result["attachments"][0]["id"]
            while content not in await guest.check("head -qc 5 /dev/sd? 2>/dev/null; :"):
                await asyncio.sleep(0.05)
            await client.call("detach", {"device": image.name})
            while True:
                event = await anext(events)
                assert event["event"] != "dropped"
                state = apply(state, event)
                if event["event"] == "removed" and event["attachment"] == id:
                    break
            ((guest_id, now),) = state["guests"].items()
            assert id not in now["attachments"]
        assert (await client.call("status"))["guests"].keys() == {guest_id}


async def test_two_clients_attach_and_detach_while_a_third_one_reads_nothing(guests: GuestPool, tmp_path: Path) -> None:
    guest = await guests.get(TWO_PORTS)
    images = []
    for name in ("alpha", "gamma"):
        images.append(tmp_path / f"{name}.raw")
        images[-1].write_bytes(name.encode().ljust(1 << 20, b"\0"))
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {"XDG_RUNTIME_DIR": str(tmp_path / "runtime")}
    async with App() as app:
        await app.connect(GuestSettings(TargetSettings(guest.targets[0])))
        server = Server(app, names.reserve("web", environment=environment), target=guest.targets[0])
        await server.start()
        before = descriptors()
        async with RawClient.connect(server.path) as silent:
            silent.reader._transport.pause_reading()  # type: ignore[attr-defined]
            silent.send({"id": 1, "method": "subscribe"})
            await asyncio.gather(*(use(server.path, image, guest) for image in images))
        while server._clients:
            await asyncio.sleep(0)
        gc.collect()
        assert descriptors() == before
        await server.close()
    assert os.listdir(server.path.parent) == []
