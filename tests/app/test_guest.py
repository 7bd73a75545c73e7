from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from farplug.app import attachment as attachment_module
from farplug.app.attachment import Attachment, AttachmentState
from farplug.app.events import Event
from farplug.app.guest import Guest
from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    PortError,
    Reason,
    RefusedError,
    StateError,
    TargetError,
)
from farplug.redirection import events
from farplug.redirection.events import PortEvent
from farplug.store import MemoryStore
from farplug.transport.memory import memory_ports
from farplug.transport.port import Port, PortListener
from farplug.transport.session import Session
from farplug.usb.types import Buffer, Speed
from farplug.usbredir import packets
from farplug.usbredir.protocol import Connection, Role
from farplug.virtual.cdrom import cdrom_device, drives_of
from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import disk_device
from farplug.virtual.events import MediumEjected, MediumInserted


class FakePort(Port):
    """A memory port whose opening can fail or take forever."""

    def __init__(self, name: str, *, fails: FarplugError | None = None, hangs: bool = False) -> None:
        self.name = name
        self.inner, self.peer = memory_ports(name)
        self._fails = fails
        self._hangs = hangs

    async def open(self, listener: PortListener) -> None:
        if self._hangs:
            await asyncio.Event().wait()
        if self._fails is not None:
            raise self._fails
        await self.inner.open(listener)

    def write(self, buffers: list[Buffer]) -> None:
        self.inner.write(buffers)

    def pause_reading(self) -> None:
        self.inner.pause_reading()

    def resume_reading(self) -> None:
        self.inner.resume_reading()

    async def close(self) -> None:
        await self.inner.close()

    def abort(self) -> None:
        self.inner.abort()


class Peer:
    """The guest's side of a port: says hello, configures what it is offered, acknowledges."""

    def __init__(self, port: FakePort, *, filter: str | None = None, configures: bool = True) -> None:
        self._end = port.peer
        self._filter = filter
        self._configures = configures
        self._connection = Connection(Role.GUEST)

    async def start(self) -> None:
        await self._end.open(self)
        if self._filter is None:
            self._connection.start()
        self._flush()

    def data_received(self, data: memoryview, more: bool = False) -> None:
        if self._filter is not None and self._connection.peer_caps is None:
            self._connection.start()  # so that its filter comes together with its hello
        self._connection.receive_data(data)
        while (event := self._connection.next_event()) is not None:
            if isinstance(event, packets.Hello) and self._filter is not None:
                self._connection.send(packets.FilterFilter(filter=self._filter))
            elif isinstance(event, packets.DeviceConnect) and self._configures:
                self.configure(1)
            elif isinstance(event, packets.DeviceDisconnect):
                self._connection.send(packets.DeviceDisconnectAck())
        self._flush()

    def configure(self, value: int) -> None:
        self._connection.send(packets.SetConfiguration(id=1, configuration=value))
        self._flush()

    def leave(self) -> None:
        self._end.abort()

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def port_closed(self, error: FarplugError | None) -> None: ...

    def _flush(self) -> None:
        self._end.write(self._connection.data_to_send())


class FakeSession(Session):
    exclusive = reached = True
    no_port_remedy = "add one"

    def __init__(self, ports: Sequence[Port]) -> None:
        self.ports = ports
        self.left = False

    @property
    def over(self) -> bool:
        return False

    async def closed(self) -> FarplugError | None:
        await asyncio.Event().wait()
        return None

    async def close(self) -> None:
        self.left = True


class BrokenStore(MemoryStore):
    def flush(self, done: object) -> None:
        assert callable(done)
        done(OSError(5, "Input/output error"))


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def watch(guest: Guest) -> list[PortEvent]:
    """Return the list that collects the engine's events from now on."""
    seen: list[PortEvent] = []
    guest.stream.subscribe(lambda event: None if event.source is None else seen.append(event.source))
    return seen


def disk() -> VirtualDevice:
    return disk_device(MemoryStore(bytes(4096)))


async def test_a_life() -> None:
    port = FakePort("a")
    peer = Peer(port)
    await peer.start()
    guest = Guest(session=FakeSession([port]))
    seen: list[Event] = []
    unsubscribe = guest.stream.subscribe(lambda event: seen.append(event) if event.source is not None else None)
    device = disk()
    attachment = await guest.plug(device)
    await attachment.configured()
    assert guest.attachments == [attachment]
    assert not attachment.over
    assert [(type(event.source), event.fields["state"]) for event in seen] == [
        (events.Opened, AttachmentState.WAITING),
        (events.GuestReady, AttachmentState.WAITING),
        (events.Attached, AttachmentState.ATTACHED),
        (events.Configured, AttachmentState.CONFIGURED),
    ]
    assert {event.attachment for event in seen} == {attachment.id}
    peer.configure(0)
    while attachment.state is not AttachmentState.ATTACHED:
        await asyncio.sleep(0)
    with pytest.raises(StateError, match="is plugged in already"):
        await guest.plug(device)
    with pytest.raises(PortError, match="its only port is taken") as caught:
        await guest.plug(disk())
    assert caught.value.reason is Reason.NO_FREE_PORT
    unsubscribe()
    count = len(seen)
    await attachment.unplug()
    await attachment.unplug()
    assert len(seen) == count, "no listener"
    assert attachment.over
    assert attachment.state is AttachmentState.DETACHED
    assert await attachment.ended() is None
    again = await guest.plug(device)
    assert guest.attachments == [again], "what is over makes room"
    await guest.close()
    assert again.over
    assert isinstance(guest.session, FakeSession)
    assert guest.session.left
    with pytest.raises(GuestGoneError):
        await guest.plug(device)


async def test_media_come_and_go_while_a_drive_is_plugged() -> None:
    port = FakePort("a")
    await Peer(port).start()
    guest = Guest(session=FakeSession([port]))
    seen = watch(guest)
    device = cdrom_device()
    attachment = await guest.plug(device)
    await attachment.configured()
    (drive,) = drives_of(device)
    before = len(seen)
    await drive.insert(MemoryStore(4096, block_size=2048))
    await drive.eject()
    assert seen[before:] == [
        events.DeviceReport("a", MediumInserted("memory")),
        events.DeviceReport("a", MediumEjected("memory", by_guest=False)),
    ]
    assert attachment.state is AttachmentState.CONFIGURED
    await attachment.unplug()
    count = len(seen)
    await drives_of(device)[0].insert(MemoryStore(4096, block_size=2048))
    assert len(seen) == count, "it is not in the guest"
    await guest.close()
    await device.dispose()


async def test_ports_in_use_are_passed_over_side_by_side() -> None:
    busy = PortError("it is in use", reason=Reason.CHANNEL_IN_USE)
    ports = [FakePort("a", fails=busy), FakePort("b"), FakePort("c")]
    for port in ports[1:]:
        await Peer(port).start()
    guest = Guest(session=FakeSession(ports))
    attachments = await asyncio.gather(guest.plug(disk()), guest.plug(disk()))
    assert sorted(attachment.port.name for attachment in attachments) == ["b", "c"]
    with pytest.raises(PortError, match="it is in use"):
        await guest.plug(disk())
    assert sorted(attachment.port.name for attachment in guest.attachments) == ["b", "c"]
    await guest.close()


async def test_places_keep_their_ports_and_their_order() -> None:
    ports = [FakePort(name) for name in "abcd"]
    guest = Guest(session=FakeSession(ports))
    places = guest.reserve(3)
    offered: list[str] = []
    opened: dict[str, int] = {}

    def note(event: Event) -> None:
        match event.source:
            case events.Attached(port=port):
                offered.append(port)
            case events.Opened(port=port, number=number):
                opened[port] = number

    guest.stream.subscribe(note)
    places[1].give_way()
    other, last, first = disk(), disk(), disk()
    plugging = [asyncio.ensure_future(task) for task in (guest.plug(other), guest.plug(last, places[2]))]
    for port in ports[::-1]:
        await Peer(port).start()
    await settle()
    assert (offered, opened) == ([], {"d": 3, "c": 2}), "both ports are ready, and wait for the first place"
    plugging.append(asyncio.ensure_future(guest.plug(first, places[0])))
    await asyncio.gather(*plugging)
    assert sorted(offered) == ["a", "c", "d"]
    assert offered[0] == "a"
    with pytest.raises(PortError, match="taken, or kept for a device that was named"):
        await guest.plug(disk())
    assert (await guest.plug(disk(), places[1])).port.port is ports[1]
    await guest.close()


@pytest.mark.parametrize("ends", ["timeout", "port"])
async def test_a_place_whose_port_is_not_ready_delays_no_other_for_long(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachment_module, "TURN_TIMEOUT", 0.01 if ends == "timeout" else 100.0)
    ports = [FakePort(name) for name in "ab"]
    guest = Guest(session=FakeSession(ports))
    places = guest.reserve(2)
    silent = asyncio.ensure_future(guest.plug(disk(), places[0]))  # its guest says no hello
    peer = Peer(ports[1])
    await peer.start()
    plugging = asyncio.ensure_future(guest.plug(disk(), places[1]))
    if ends == "timeout":
        assert (await plugging).port.port is ports[1]
    else:
        await settle()
        assert not plugging.done()
        peer.leave()
        with pytest.raises(GuestGoneError):
            await plugging
    assert not silent.done()
    await guest.close()
    with pytest.raises(GuestGoneError):
        await silent


async def test_a_place_whose_port_is_in_use() -> None:
    busy = PortError("it is in use", reason=Reason.CHANNEL_IN_USE)
    ports = [FakePort("a", fails=busy), FakePort("b"), FakePort("c")]
    for port in ports[1:]:
        await Peer(port).start()
    guest = Guest(session=FakeSession(ports))
    places = guest.reserve(2)
    attachments = await asyncio.gather(*(guest.plug(disk(), place) for place in places))
    assert [attachment.port.name for attachment in attachments] == ["c", "b"]
    await guest.close()
    with pytest.raises(PortError, match="4 devices, but the VM has 3 ports"):
        guest.reserve(4)
    assert guest.reserve(0) == ()


async def test_no_room() -> None:
    guest = Guest(session=FakeSession([]))
    with pytest.raises(PortError, match="no usbredir channel") as caught:
        await guest.plug(disk())
    assert caught.value.reason is Reason.NO_USBREDIR_CHANNEL
    assert caught.value.remedy == "add one"
    with pytest.raises(PortError, match="3 devices, but the VM has 1 port for them") as caught:
        Guest(session=FakeSession([FakePort("a")])).check_room(3)
    assert caught.value.remedy == "plug fewer, or add one"


async def test_what_cannot_be_reached_leaves_nothing() -> None:
    guest = Guest(session=FakeSession([FakePort("a", fails=TargetError("no", reason=Reason.CONNECTION_REFUSED))]))
    for _ in range(2):
        with pytest.raises(TargetError, match="no"):
            await guest.plug(disk())
    assert guest.attachments == []
    await asyncio.wait_for(guest.close(), 100)


async def test_refused() -> None:
    port = FakePort("a")
    await Peer(port, filter="-1,-1,-1,-1,0").start()
    guest = Guest(session=FakeSession([port]))
    seen: list[Event] = []
    guest.stream.subscribe(seen.append)
    with pytest.raises(RefusedError, match="filter"):
        await guest.plug(disk())
    refused = next(event for event in seen if isinstance(event.source, events.Refused))
    assert refused.fields["state"] == AttachmentState.REFUSED
    assert (seen[-1].name, seen[-1].fields["state"]) == ("removed", AttachmentState.REFUSED)
    assert guest.attachments == []
    await guest.close()


@pytest.mark.parametrize("hangs", [False, True], ids=["waiting for hello", "opening"])
async def test_closed_while_plugging(hangs: bool) -> None:
    guest = Guest(session=FakeSession([FakePort("a", hangs=hangs)]))
    device = disk()
    plugging = asyncio.ensure_future(guest.plug(device))
    await asyncio.sleep(0.01)
    expected = AttachmentState.OPENING if hangs else AttachmentState.WAITING
    assert [attachment.state for attachment in guest.attachments] == [expected]
    await asyncio.wait_for(guest.close(), 100)
    with pytest.raises(GuestGoneError, match="closed before"):
        await plugging


@pytest.mark.parametrize("hangs", [False, True])
async def test_plugging_can_be_cancelled(hangs: bool) -> None:
    guest = Guest(session=FakeSession([FakePort("a", hangs=hangs)]))
    plugging = asyncio.ensure_future(guest.plug(disk()))
    await asyncio.sleep(0.01)
    plugging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await plugging
    assert guest.attachments == []
    await asyncio.wait_for(guest.close(), 100)


async def test_the_guest_leaves() -> None:
    port = FakePort("a")
    peer = Peer(port, configures=False)
    await peer.start()
    guest = Guest(session=FakeSession([port]))
    attachment = await guest.plug(disk())
    peer.leave()
    error = await attachment.ended()
    assert isinstance(error, GuestGoneError)
    assert (attachment.error, attachment.state) == (error, AttachmentState.DETACHED)
    with pytest.raises(GuestGoneError):
        await attachment.configured()
    await guest.close()


async def test_what_could_not_be_made_durable_is_reported() -> None:
    ports = [FakePort("a"), FakePort("b")]
    for port in ports:
        await Peer(port).start()
    guest = Guest(session=FakeSession(ports))
    broken = await guest.plug(disk_device(BrokenStore(bytes(4096))))
    good = await guest.plug(disk())
    with pytest.raises(DeviceError, match="may be lost"):
        await guest.close()
    assert broken.over
    assert good.over
    assert isinstance(guest.session, FakeSession)
    assert guest.session.left


async def test_a_device_that_left_by_itself_leaves_the_port_free() -> None:
    port = FakePort("a")
    peer = Peer(port)
    await peer.start()
    guest = Guest(session=FakeSession([port]))
    device = disk()
    attachment = await guest.plug(device)
    await attachment.configured()
    assert device._listener is not None
    device._listener.lost(OSError("unplugged"))
    error = await attachment.ended()
    assert error is not None
    assert error.reason is Reason.DEVICE_LOST
    again = await guest.plug(disk())
    await again.configured()
    await guest.close()


async def test_a_refused_device_leaves_the_port_free() -> None:
    port = FakePort("a")
    peer = Peer(port, configures=False)
    await peer.start()
    guest = Guest(session=FakeSession([port]))
    device = disk_device(MemoryStore(bytes(4096)), speeds=(Speed.HIGH,))
    attachment = await guest.plug(device)
    peer._connection.send(packets.FilterReject())
    peer._flush()
    error = await attachment.ended()
    assert isinstance(error, RefusedError)
    assert attachment.state is AttachmentState.REFUSED
    peer._configures = True
    again = await guest.plug(device)
    await again.configured()
    await guest.close()


async def test_unplugging_while_the_port_is_opened_gives_up() -> None:
    guest = Guest(session=FakeSession([FakePort("a", hangs=True)]))
    plugging = asyncio.ensure_future(guest.plug(disk()))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(100):
        await guest.attachments[0].unplug()
    with pytest.raises(GuestGoneError):
        await plugging
    assert guest.attachments == []


async def test_what_could_not_be_made_durable_is_reported_when_the_guest_is_gone() -> None:
    port = FakePort("a")
    peer = Peer(port)
    await peer.start()
    guest = Guest(session=FakeSession([port]))
    seen = watch(guest)
    attachment = await guest.plug(disk_device(BrokenStore(4096)))
    await attachment.configured()
    peer.leave()
    assert isinstance(await attachment.ended(), GuestGoneError)
    assert any("may be lost" in str(event) for event in seen)
    await guest.close()


async def test_the_end_of_the_block_unplugs_and_leaves_also_after_an_error() -> None:
    port, device = FakePort("a"), disk()
    await Peer(port).start()
    session = FakeSession([port])
    attachments: list[Attachment] = []

    async def fail() -> None:
        async with Guest(session=session) as guest:
            attachments.append(await guest.plug(device))
            await attachments[0].configured()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert attachments[0].state is AttachmentState.DETACHED
    assert session.left
