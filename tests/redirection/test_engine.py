"""The engine, with a guest in memory and a device that the test controls."""

from __future__ import annotations

import asyncio

import pytest
from tests.redirection.scripted import BULK_IN, INTERRUPT_IN, ISO_OUT, ScriptedDevice, kinds, settle

from farplug.errors import DeviceError, GuestGoneError, Reason, RemoteProtocolError, StateError
from farplug.redirection import Redirection, State, engine, events
from farplug.testing.memory import MemoryGuest
from farplug.transport.memory import memory_ports
from farplug.usb import Status
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap


async def test_a_device_with_isochronous_endpoints_is_not_compressed() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        assert not guest.redirection.port.compress
        await guest.set_interface(0, 1)
        assert guest.redirection.port.compress


async def test_device_lost() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        assert device.listener is not None
        device.listener.lost(OSError("unplugged"))
        assert (await pending).status is Status.CANCELLED
        await guest.wait(lambda: guest.connected is None)
        await settle()
        detached = guest.events[-1]
        assert isinstance(detached, events.Detached)
        assert detached.error is not None
        assert detached.error.reason is Reason.DEVICE_LOST
        assert guest.redirection.state is State.EMPTY
        other = ScriptedDevice()
        await guest.redirection.attach(other)
        await guest.wait(lambda: guest.connected is not None)


async def test_detach_answers_pending_requests_and_waits_for_the_guest() -> None:
    device = ScriptedDevice()
    device.cancels = False
    async with MemoryGuest(device) as guest:
        for _ in range(20):
            pending = guest.submit_in(BULK_IN, 10)
            await settle()
            detaching = asyncio.ensure_future(guest.redirection.detach())
            assert (await pending).status is Status.CANCELLED
            await detaching
            assert guest.connected is None
            assert guest.redirection.device is None
            await guest.redirection.attach(device)
            await guest.wait(lambda: guest.connected is not None)
    assert device.calls.count("open") == device.calls.count("close") == 21


async def test_requests_for_a_device_that_is_being_detached_fail() -> None:
    device = ScriptedDevice()
    host, end = memory_ports()
    redirection = Redirection(host)
    guest = MemoryGuest()
    guest._end, guest.redirection = end, redirection
    answers: list[packets.Packet] = []
    deliver = guest._packet_received

    def late(packet: packets.Packet) -> None:
        if isinstance(packet, packets.DeviceDisconnect):
            for request in (
                packets.BulkPacket(id=90, endpoint=BULK_IN, status=Status.SUCCESS, length=4),
                packets.Reset(),
                packets.SetConfiguration(id=91, configuration=1),
                packets.GetConfiguration(id=92),
                packets.SetAltSetting(id=93, interface=0, alt=0),
                packets.GetAltSetting(id=94, interface=0),
                packets.AllocBulkStreams(id=95, endpoints=0, streams=1),
                packets.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=0),
                packets.StartInterruptReceiving(id=96, endpoint=INTERRUPT_IN),
                packets.FilterReject(),
            ):
                guest.send(request)
        answers.append(packet)
        deliver(packet)

    guest._packet_received = late  # type: ignore[method-assign]
    async with guest:
        await redirection.attach(device)
        await guest.wait(lambda: guest.connected is not None)
        answers.clear()
        await redirection.detach()
        await settle()
    late_answers = {packet.id: getattr(packet, "status", None) for packet in answers if 90 <= packet.id <= 96}
    assert late_answers == {
        **dict.fromkeys((90, 91, 92, 93, 94, 95), Status.IO_ERROR),
        96: Status.STALL,
    }
    assert device.submitted == []


async def test_a_device_that_is_not_used_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "UNUSED_AFTER", 0.01)
    async with MemoryGuest(ScriptedDevice()) as guest:
        await guest.wait(lambda: events.Unused in kinds(guest))
        await guest.set_configuration(1)
        guest.reset()
        await guest.wait(lambda: events.PortReset in kinds(guest))
        await guest.redirection.detach()
        await guest.redirection.attach(ScriptedDevice())
        await guest.wait(lambda: kinds(guest).count(events.Unused) == 2)
    assert kinds(guest).count(events.Unused) == 2


@pytest.mark.parametrize("use", ["reset", "set_configuration", "submit_in", "detach"])
async def test_a_device_that_is_used_is_not_reported(use: str) -> None:
    async with MemoryGuest(ScriptedDevice()) as guest:
        timer = guest.redirection._unused
        assert timer is not None
        match use:
            case "reset":
                guest.reset()
            case "set_configuration":
                await guest.set_configuration(1)
            case "submit_in":
                guest.submit_in(BULK_IN, 10)
            case _:
                await guest.redirection.detach()
        await settle()
        if not timer.cancelled():
            guest.redirection._report_unused()
        assert events.Unused not in kinds(guest)


async def test_a_device_that_waits_for_the_guest_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "UNUSED_AFTER", 0)
    monkeypatch.setattr(engine, "HELLO_TIMEOUT", 0.01)
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(ScriptedDevice()))
        await guest.wait(lambda: events.WaitingForGuest in kinds(guest))
        assert guest.redirection._unused is None
        guest.resume()
        await attaching
        await guest.wait(lambda: events.Unused in kinds(guest))


async def test_a_device_that_cannot_be_offered_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ScriptedDevice()
    async with MemoryGuest() as guest:
        monkeypatch.setattr(engine, "device_connect", lambda device: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await guest.redirection.attach(device)
        assert guest.redirection._unused is not None
        assert guest.redirection._unused.cancelled()


async def test_a_guest_that_never_acknowledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.05)
    monkeypatch.setattr(engine, "HELLO_TIMEOUT", 0.01)
    device, next_device = ScriptedDevice(), ScriptedDevice()
    async with MemoryGuest(device) as guest:
        received: list[packets.Packet] = []
        with monkeypatch.context() as paused:
            paused.setattr(guest, "_packet_received", received.append)
            await guest.redirection.detach()
            assert guest.redirection.state is State.DISCONNECTING
            assert device.calls == ["open", "close"]
            attaching = asyncio.ensure_future(guest.redirection.attach(next_device))
            while events.WaitingForGuest not in kinds(guest):
                await asyncio.sleep(0.01)
        assert next_device.calls == [], "late packets of the guest would be taken for requests to it"
        for packet in received:
            guest._packet_received(packet)
        await attaching
        assert next_device.calls == ["open"]
        assert guest.redirection.device is next_device


async def test_without_the_capability_detach_does_not_wait_for_an_acknowledgement() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, caps=ALL_CAPS & ~Cap.DEVICE_DISCONNECT_ACK) as guest:
        await guest.redirection.detach()
        assert guest.redirection.state is State.EMPTY


async def test_attach_waits_for_a_paused_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HELLO_TIMEOUT", 0.01)
    device = ScriptedDevice()
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(device))
        await asyncio.sleep(0.05)
        assert kinds(guest) == [events.WaitingForGuest]
        with pytest.raises(StateError):
            await guest.redirection.attach(ScriptedDevice())
        guest.resume()
        await attaching
        await guest.wait(lambda: guest.connected is not None)


async def test_the_guest_goes_while_attach_waits_for_it() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(device))
        await settle()
        guest._end.abort()
        with pytest.raises(GuestGoneError):
            await attaching
    assert device.calls == []


async def test_the_guest_goes_while_a_device_is_in_use() -> None:
    device = ScriptedDevice()
    device.close_error = DeviceError("the disk is full", reason=Reason.IO_ERROR)
    async with MemoryGuest(device) as guest:
        guest.submit_in(BULK_IN, 10)
        await settle()
        guest._end.abort()
        error = await guest.redirection.closed()
        assert isinstance(error, GuestGoneError)
        detached = guest.events[-1]
        assert isinstance(detached, events.Detached)
        assert detached.error is error
        assert device.cancelled == device.submitted
        assert device.calls == ["open", "close"]
        assert guest.faults == [device.close_error]
        guest.faults.clear()


async def test_an_error_of_close_is_reported() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        device.close_error = DeviceError("the disk is full", reason=Reason.IO_ERROR)
        with pytest.raises(DeviceError, match="full"):
            await guest.redirection.detach()
        detached = guest.events[-1]
        assert isinstance(detached, events.Detached)
        assert detached.error is device.close_error


async def test_a_peer_that_does_not_use_usbredir() -> None:
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(ScriptedDevice()))
        await settle()
        guest.send_bytes(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        with pytest.raises(RemoteProtocolError, match="does not use the usbredir protocol"):
            await attaching


async def test_a_spice_server_is_recognized() -> None:
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(ScriptedDevice()))
        await settle()
        # QEMU 7.2's answer to a usbredir hello: several packets, of which the first one is what counts
        guest.send_bytes(b"REDQ" + bytes.fromhex("02000000 02000000 b2000000 02000000") + bytes(174))
        with pytest.raises(RemoteProtocolError, match=r"a SPICE server answers at .*, not a usbredir") as caught:
            await attaching
    assert "spice://HOST:PORT" in caught.value.remedy


async def test_calls_at_the_wrong_time() -> None:
    async with MemoryGuest(ScriptedDevice()) as guest:
        with pytest.raises(StateError, match="port memory is already open"):
            await guest.redirection.open()
        with pytest.raises(StateError, match="port memory already has a device"):
            await guest.redirection.attach(ScriptedDevice())
    await guest.redirection.detach()
    with pytest.raises(GuestGoneError, match="was closed"):
        await guest.redirection.attach(ScriptedDevice())
    unopened = Redirection(memory_ports()[0])
    assert await unopened.closed() is None
    with pytest.raises(StateError, match="was not opened"):
        await unopened.attach(ScriptedDevice())
