"""A snapshot and the events after it give any later snapshot, whatever happens."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.app.test_guest import BrokenStore, FakePort, FakeSession, Peer, settle
from tests.clock import FakeClock

from farplug.app import guest as guest_module
from farplug.app import link as link_module
from farplug.app import retry
from farplug.app.app import App
from farplug.app.commands import Capture, Eject, Insert, StopCapture
from farplug.app.events import MAX_QUEUED, Event, Level
from farplug.app.guest import Guest
from farplug.app.settings import GuestSettings, ReconnectSettings, Source, TargetSettings
from farplug.app.state import apply
from farplug.errors import FarplugError, GuestGoneError, PortError, Reason, TargetError
from farplug.rate_limit import BURST, INTERVAL
from farplug.redirection import engine
from farplug.spice.messages import SwitchHost
from farplug.store import MemoryStore
from farplug.transport.moved import GuestMoved
from farplug.transport.session import Session
from farplug.transport.spice_target import Stage
from farplug.usb.device import Device
from farplug.usb.transfer import Status
from farplug.usbredir import packets as p
from farplug.virtual.disk import disk_device


class NamedSession(FakeSession):
    def __init__(self, name: str, ports: list[FakePort]) -> None:
        super().__init__(ports)
        self.name, self.uuid = name, f"uuid of {name}"
        self._ended: asyncio.Future[FarplugError | None] = asyncio.get_running_loop().create_future()

    @property
    def over(self) -> bool:
        return self._ended.done()

    async def closed(self) -> FarplugError | None:
        return await asyncio.shield(self._ended)

    async def close(self) -> None:
        self.lose(None)

    def lose(self, error: FarplugError | None) -> None:
        if not self._ended.done():
            self._ended.set_result(error)


class Clients:
    """Clients that took a snapshot at some time, and apply each event after it; one of them at each event."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._states: list[dict[str, Any]] = []
        self.names: set[str] = set()
        app.subscribe(self._event)
        self.join()

    def join(self) -> None:
        self._states.append(json.loads(json.dumps(self._app.snapshot(), allow_nan=False)))

    def _event(self, event: Event) -> None:
        self.names.add(event.name)
        data = json.loads(json.dumps(event.to_json(), allow_nan=False))
        before = json.dumps(self._states)
        states = [apply(state, data) for state in self._states]
        assert json.dumps(self._states) == before, "apply() changes nothing in place"
        self._states = states
        self.check(f"at {data}")

    def check(self, when: str) -> None:
        snapshot = json.loads(json.dumps(self._app.snapshot(), allow_nan=False))
        for state in self._states:
            assert state == snapshot, when
        assert list(self._states[0]["guests"]) == list(snapshot["guests"])


class World:
    """An application with guests in memory, to which things happen at random."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, image: str, iso: str) -> None:
        self.seed, self.image, self.iso = seed, image, iso
        self.random = random.Random(seed)
        self.app = App()
        self.clients = Clients(self.app)
        self.peers: dict[int, Peer] = {}
        self.tasks: list[asyncio.Future[Any]] = []
        self.sessions = 0
        monkeypatch.setattr(link_module, "open_session", self._open_session)

    async def _open_session(
        self,
        target: object,
        begin: Callable[[Stage, str], None] = lambda stage, text: None,
        *,
        wire: object,
        note: object = None,
    ) -> Session:
        begin(Stage.REACH, "connecting")
        await asyncio.sleep(0)
        if self.random.random() < 0.2:
            raise TargetError("refused", reason=Reason.CONNECTION_REFUSED)
        begin(Stage.CHANNELS, "linking")
        self.sessions += 1
        ports = [self._port(f"p{number}") for number in range(self.random.randrange(1, 4))]
        return NamedSession(f"vm{self.sessions}", ports)

    def _port(self, name: str) -> FakePort:
        fate = self.random.random()
        busy = PortError("in use", reason=Reason.CHANNEL_IN_USE) if fate < 0.15 else None
        return FakePort(name, fails=busy, hangs=0.15 < fate < 0.2)

    @property
    def guest(self) -> Guest | None:
        guests = list(self.app.guests.values())
        return self.random.choice(guests) if guests else None

    async def add_guest(self) -> None:
        if len(self.app.guests) < 4:
            reconnect = ReconnectSettings(0.05) if self.random.random() < 0.8 else None
            await self.app.connect(GuestSettings(TargetSettings("spice://:secret@h:1"), reconnect=reconnect))

    async def remove_guest(self) -> None:
        if (guest := self.guest) is not None and self.random.random() < 0.3:
            await self.app.remove(guest)

    def device(self) -> Device:
        store = BrokenStore(bytes(4096)) if self.random.random() < 0.2 else MemoryStore(bytes(4096))
        return disk_device(store)

    async def plug(self) -> None:
        if (guest := self.guest) is not None:
            self.start_peers(guest)
            await guest.plug(self.device(), label=self.random.choice(["", "disk", "a.raw"]))

    async def plug_source(self) -> None:
        if (guest := self.guest) is not None:
            self.start_peers(guest)
            await guest.plug(Source.disk(self.random.choice([self.image, "/no/file"]), read_only=True))

    async def plug_drive(self) -> None:
        if (guest := self.guest) is not None:
            self.start_peers(guest)
            await guest.plug(Source.cdrom(self.iso))

    async def medium(self) -> None:
        if (guest := self.guest) is not None and guest.drives():
            label = self.random.choice(list(guest.drives()))
            command = self.random.choice([Eject(label, guest=guest.id), Insert(self.iso, label, guest=guest.id)])
            await self.app.do(command)

    def start_peers(self, guest: Guest) -> None:
        for port in guest.session.ports:
            assert isinstance(port, FakePort)
            if id(port) not in self.peers and port.peer._listener is None and self.random.random() < 0.95:
                refuses = "-1,-1,-1,-1,0" if self.random.random() < 0.15 else None
                peer = Peer(port, filter=refuses, configures=self.random.random() < 0.8)
                self.peers[id(port)] = peer
                self.tasks.append(asyncio.ensure_future(self._one(peer.start)))

    async def unplug(self) -> None:
        if (guest := self.guest) is not None and guest.attachments:
            await guest.unplug(self.random.choice(guest.attachments))

    async def packet(self) -> None:
        """The guest resets, configures, refuses, breaks the protocol, or leaves."""
        guest = self.guest
        attached = [one for one in guest.attachments if not one.over] if guest is not None else []
        if not attached:
            return
        attachment = self.random.choice(attached)
        peer = self.peers.get(id(attachment.port.port))
        if peer is None:
            return
        packet = self.random.choice(
            [
                p.Reset(),
                p.SetConfiguration(id=7, configuration=1),
                p.SetConfiguration(id=8, configuration=0),
                p.SetAltSetting(id=9, interface=7, alt=3),
                p.FilterReject(),
                None,
                "lost",
            ]
        )
        if packet is None:
            peer.leave()
        elif packet == "lost":
            listener = getattr(attachment.device, "_listener", None)
            if listener is not None:
                listener.lost(self.random.choice([None, OSError("pulled out")]))
        else:
            assert isinstance(packet, p.Packet)
            for _ in range(self.random.choice([1, 1, 1, 1, 100])):
                peer._connection.send(packet)
            peer._flush()

    async def lose(self) -> None:
        """The VM is gone, as a whole; where it is contacted again, its devices find guests at their ports."""
        if (guest := self.guest) is None or not isinstance(guest.session, NamedSession):
            return
        session = guest.session
        moved = self.random.random() < 0.3
        session.lose(GuestMoved(SwitchHost(5900, None, "other")) if moved else GuestGoneError("lost"))
        for port in session.ports:
            if (peer := self.peers.get(id(port))) is not None:
                peer.leave()
        for _ in range(self.random.choice([0, 10, 50])):
            await asyncio.sleep(0)
        self.start_peers(guest)

    async def capture(self) -> None:
        if (guest := self.guest) is not None:
            path = self.random.choice([f"{self.image}.pcapng", "/no/folder/file"])
            await self.app.do(self.random.choice([Capture(path, guest=guest.id), StopCapture(guest=guest.id)]))

    async def note(self) -> None:
        if (guest := self.guest) is not None:
            guest.note("note")

    async def _one(self, step: Callable[[], Awaitable[None]]) -> None:
        with suppress(FarplugError):
            await step()

    async def run(self, steps: int) -> None:
        kinds = [
            self.add_guest,
            self.add_guest,
            self.remove_guest,
            self.plug,
            self.plug,
            self.plug_source,
            self.plug_drive,
            self.medium,
            self.unplug,
            self.capture,
            self.packet,
            self.packet,
            self.packet,
            self.lose,
            self.note,
        ]
        for _ in range(steps):
            self.tasks.append(asyncio.ensure_future(self._one(self.random.choice(kinds))))
            for _ in range(self.random.choice([0, 1, 5, 30])):
                await asyncio.sleep(0)
            self.clients.check(f"history {self.seed}")
            if self.random.random() < 0.2:
                self.clients.join()
        await settle()
        self.clients.check(f"history {self.seed}, at rest")
        await self._one(self.app.close)
        for task in self.tasks:
            task.cancel()
        for result in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
        self.clients.check(f"history {self.seed}, at the end")
        assert self.app.snapshot()["guests"] == {}


HISTORIES = 25
USUAL = {
    "attached",
    "attaching",
    "capture-ended",
    "capture-started",
    "back",
    "closed",
    "configured",
    "connected",
    "detached",
    "offer-changed",
    "figures",
    "guest",
    "guest-removed",
    "lost",
    "medium-ejected",
    "medium-inserted",
    "opened",
    "port",
    "reconnecting",
    "refused",
    "removed",
    "repeated",
    "stage",
    "port-reset",
}


async def test_any_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.05)
    monkeypatch.setattr(engine, "HELLO_TIMEOUT", 0.0)
    monkeypatch.setattr(retry, "DELAYS", (0.0, 0.001))
    monkeypatch.setattr(retry, "FLAPS", 5)
    monkeypatch.setattr(guest_module, "FIGURES_INTERVAL", 0.0)
    image, iso = tmp_path / "a.raw", tmp_path / "a.iso"
    image.write_bytes(bytes(4096))
    iso.write_bytes(bytes(32768) + b"\1CD001\1".ljust(2048, b"\0") + b"\xffCD001\1".ljust(2048, b"\0"))
    seen: set[str] = set()
    for seed in range(HISTORIES):
        world = World(seed, monkeypatch, str(image), str(iso))
        await world.run(60)
        seen |= world.clients.names
    assert seen >= USUAL, "the histories are long enough"
    assert "listener-failed" not in seen, caplog.text


EMPTY: dict[str, Any] = {"last_event": 4, "guests": {}}


def test_events_that_the_snapshot_holds_change_nothing() -> None:
    assert apply(EMPTY, {"id": 4, "event": "guest", "guest": "g1", "target": "x", "message": ""}) == EMPTY


def test_events_that_concern_no_guest_are_counted() -> None:
    assert apply(EMPTY, {"id": 5, "event": "listener-failed", "message": ""}) == {"last_event": 5, "guests": {}}


@pytest.mark.parametrize("name", ["closed", "note", "removed", "attaching", "connected"])
def test_a_guest_that_was_removed_does_not_come_back(name: str) -> None:
    event = {"id": 5, "event": name, "guest": "g1", "attachment": "g1.a1", "message": ""}
    assert apply(EMPTY, event) == {"last_event": 5, "guests": {}}


async def test_a_reader_that_lost_events_needs_a_new_snapshot() -> None:
    app = App()
    state = app.snapshot()
    reader = app.iterate()
    for _ in range(MAX_QUEUED + 2):
        app.add(GuestSettings(TargetSettings("vm.vv")))
    with pytest.raises(ValueError, match="2 events dropped: the reader is too slow; take a new snapshot"):
        apply(state, (await anext(reader)).to_json())
    state = app.snapshot()
    app.add(GuestSettings(TargetSettings("vm.vv")))
    for _ in range(MAX_QUEUED + 1):
        state = apply(state, (await anext(reader)).to_json()) if reader._queue._events else state
    assert state == app.snapshot()


async def test_the_state_after_a_flood_is_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest sets configurations and resets the port without pause."""
    port = FakePort("a")
    peer = Peer(port)
    await peer.start()
    app = App()
    guest = app.guests["g1"] = Guest(session=FakeSession([port]), stream=app.events)
    device = disk_device(MemoryStore(bytes(4096)))
    attachment = await guest.plug(device)
    await attachment.configured()
    clock = FakeClock()
    attachment.port._redirection._events._limit._clock = lambda: clock
    configure, done = device.set_configuration, 0

    async def counted(value: int) -> Status:
        nonlocal done
        status = await configure(value)
        done += 1
        return status

    monkeypatch.setattr(device, "set_configuration", counted)
    states, seen = [app.snapshot()], list[Event]()

    def listen(event: Event) -> None:
        seen.append(event)
        states[0] = apply(states[0], event.to_json())

    app.subscribe(listen)
    for last, state in [(1, "in use"), (0, "attached"), (1, "in use")]:
        done = 0
        for number in range(300):
            peer.configure(number % 2)
            if number % 3 == 0:
                peer._connection.send(p.Reset())
                peer._flush()
        peer.configure(last)
        while done < 301:
            await asyncio.sleep(0)
        await settle()
        clock.advance(INTERVAL)
        assert str(attachment.state) == state
        assert states[0] == app.snapshot()
    published = [event for event in seen if event.name != "figures"]
    assert len(published) <= 3 * 2 * (BURST + 2)
    repeated = [event for event in published if event.name == "repeated"]
    assert {event.fields["of"] for event in repeated} == {"configured", "port-reset"}
    assert {event.device for event in repeated} == {attachment.label}
    assert {event.level for event in repeated} == {Level.GOOD, Level.INFO}, "those of the events that were dropped"
    await guest.close()
    await device.dispose()
