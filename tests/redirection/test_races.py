"""Overlaps of detach, changes of the offer, open, operations, and a guest that goes, in every order that can fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.redirection.scripted import BULK_IN, INTERRUPT_IN, ScriptedDevice, kinds, settle

from farplug.errors import DeviceError, GuestGoneError, Reason, RefusedError, RemoteProtocolError
from farplug.redirection import State, events, operations
from farplug.testing.memory import MemoryGuest
from farplug.usb import DeviceListener, Speed, Status
from farplug.usbredir import packets
from farplug.usbredir.protocol import Connection, Role


class Slow(ScriptedDevice):
    """A device whose open, close and set_configuration wait for events of the test."""

    def __init__(self, speeds: Sequence[Speed] = (Speed.HIGH,)) -> None:
        super().__init__(speeds)
        self.gate = asyncio.Event()
        self.gate.set()
        self.operation_gate = asyncio.Event()
        self.operation_gate.set()

    async def open(self, listener: DeviceListener) -> None:
        self.calls.append("opening")
        await self.gate.wait()
        await super().open(listener)

    async def close(self) -> None:
        self.calls.append("closing")
        await self.gate.wait()
        await super().close()

    async def set_configuration(self, value: int) -> Status:
        await self.operation_gate.wait()
        return await super().set_configuration(value)


@pytest.mark.parametrize("how", ["detach", "vanish", "close"])
async def test_detach_while_the_offer_changes_and_the_device_is_slow(how: str) -> None:
    device = Slow((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        device.gate.clear()
        guest.send(packets.FilterReject())
        await guest.wait(lambda: events.OfferChanged in kinds(guest))
        await settle()
        assert device.calls[-1] == "closing"
        leaving: asyncio.Task[None] | None = None
        if how == "vanish":
            guest._end.abort()
        else:
            leave = guest.redirection.detach if how == "detach" else guest.redirection.close
            leaving = asyncio.create_task(leave())
        await settle()
        device.gate.set()
        async with asyncio.timeout(100):
            if leaving is not None:
                await leaving
            if how != "detach":
                await guest.redirection.closed()
        assert guest.redirection.device is None
        assert kinds(guest).count(events.Attached) == kinds(guest).count(events.Detached) == 1
        assert guest.redirection.state is (State.EMPTY if how == "detach" else State.CLOSED)


async def opening(guest: MemoryGuest, device: Slow) -> asyncio.Task[None]:
    """Begin to attach a device, which opens when its gate is set."""
    await settle()
    device.gate.clear()
    attaching = asyncio.create_task(guest.redirection.attach(device))
    await settle()
    return attaching


async def test_the_guest_vanishes_while_the_device_opens() -> None:
    device = Slow()
    async with MemoryGuest() as guest:
        attaching = await opening(guest, device)
        guest._end.abort()
        await settle()
        device.gate.set()
        with pytest.raises(GuestGoneError):
            await attaching
        await guest.redirection.closed()
        assert kinds(guest) == [events.GuestReady]
        assert device.calls.count("close") == 1


async def test_a_filter_that_comes_while_the_device_opens() -> None:
    device = Slow()
    async with MemoryGuest() as guest:
        attaching = await opening(guest, device)
        guest.send(packets.FilterFilter(filter="0x03,-1,-1,-1,1"))
        await settle()
        device.gate.set()
        with pytest.raises(RefusedError, match="the guest's filter does not allow"):
            await attaching
        assert kinds(guest) == [events.GuestReady]
        assert device.calls[-1] == "close"


async def test_attach_is_cancelled_while_the_guest_vanishes() -> None:
    device = Slow()
    async with MemoryGuest() as guest:
        await settle()
        device.gate.clear()
        attaching = asyncio.ensure_future(guest.redirection.attach(device))
        await settle()
        attaching.cancel()
        guest._end.abort()
        await settle()
        assert attaching.cancelled()
        await guest.redirection.closed()
        assert guest.redirection.device is None


@pytest.mark.parametrize("opens", [True, False])
async def test_a_device_that_is_lost_while_it_opens(opens: bool) -> None:
    class Lost(ScriptedDevice):
        gone = True

        async def open(self, listener: DeviceListener) -> None:
            if self.gone:
                listener.lost(OSError("unplugged"))
                if not opens:
                    raise DeviceError("it cannot be opened", reason=Reason.DEVICE_LOST)
            await super().open(listener)

    device = Lost()
    async with MemoryGuest() as guest:
        await settle()
        with pytest.raises(DeviceError) as caught:
            await guest.redirection.attach(device)
        assert caught.value.reason is Reason.DEVICE_LOST
        device.gone = False
        await guest.redirection.attach(device)
        await settle()
        await guest.redirection.detach()
        assert kinds(guest) == [events.GuestReady, events.Attached, events.Detached]
        assert device.calls[-2:] == ["open", "close"]


async def test_an_operation_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "OPERATION_TIMEOUT", 0.05)
    device = Slow()
    async with MemoryGuest(device) as guest:
        device.operation_gate.clear()
        answer = await guest.request(packets.SetConfiguration(id=100, configuration=1))
        assert answer.status is Status.IO_ERROR
        guest.send(packets.SetConfiguration(id=101, configuration=1))
        await settle()
        async with asyncio.timeout(100):
            await guest.redirection.close()
        guest.faults.clear()


async def test_no_operation_starts_for_a_device_that_is_being_detached() -> None:
    class Thorough(ScriptedDevice):
        async def set_configuration(self, value: int) -> Status:
            await asyncio.sleep(0.02)
            return await super().set_configuration(value)

    async with MemoryGuest(Thorough()) as guest:
        guest.send(packets.SetConfiguration(id=100, configuration=1), packets.SetConfiguration(id=101, configuration=1))
        await settle()
        await guest.redirection.detach()
        await asyncio.sleep(0.1)
        sent = [type(packet) for packet in guest.received]
        assert packets.EndpointInfo not in sent[sent.index(packets.DeviceDisconnect) :]
        assert kinds(guest)[-1] is events.Detached


async def test_an_error_of_close_is_reported_when_the_guest_is_gone_too() -> None:
    device = ScriptedDevice()
    device.close_error = DeviceError("what was written may be lost", reason=Reason.IO_ERROR)
    async with MemoryGuest(device) as guest:
        guest._end.abort()
        await guest.redirection.closed()
        faults = [event.error for event in guest.events if isinstance(event, events.DeviceFault)]
        assert faults == [device.close_error]
        guest.faults.clear()


async def test_an_exception_of_close_becomes_a_device_error() -> None:
    device = ScriptedDevice()
    device.close_error = RuntimeError("boom")
    async with MemoryGuest(device) as guest:
        with pytest.raises(DeviceError, match="could not be closed: RuntimeError: boom"):
            await guest.redirection.detach()
        detached = guest.events[-1]
        assert isinstance(detached, events.Detached)
        assert detached.error is not None
        assert detached.error.reason is Reason.DEVICE_FAULT


async def test_a_port_can_be_opened_again() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        await guest.redirection.close()
        guest._connection = Connection(Role.GUEST)
        await guest._end.open(guest)
        await guest.redirection.open()
        guest.resume()
        await guest.redirection.attach(device)
        await guest.wait(lambda: guest.connected is not None)


async def test_a_hello_after_an_invalid_packet_is_too_late() -> None:
    async with MemoryGuest(paused=True) as guest:
        guest._connection.start()
        guest.send_bytes((99).to_bytes(4, "little") + bytes(8) + b"".join(guest._connection.data_to_send()))
        await settle()
        assert guest.redirection.state is State.CLOSED
        assert isinstance(await guest.redirection.closed(), RemoteProtocolError)
        assert kinds(guest) == []


# The guest in memory must detect what makes QEMU abort.


async def test_the_guest_in_memory_detects_answers_out_of_order_and_twice() -> None:
    device = ScriptedDevice()

    async def misbehave(*order: int) -> None:
        async with MemoryGuest(device) as guest:
            pending = [guest.submit_in(BULK_IN, 8), guest.submit_in(BULK_IN, 8)]
            await settle()
            for number in order:
                guest.redirection._protocol.send(
                    packets.BulkPacket(id=pending[number].id, endpoint=BULK_IN, status=Status.SUCCESS, length=0)
                )
            guest.redirection._protocol.flush()
            await settle()
            guest.redirection._requests._queues.clear()
            guest.redirection._requests._by_id.clear()

    with pytest.raises(RemoteProtocolError, match="a reply out of order"):
        await misbehave(1, 0)
    with pytest.raises(RemoteProtocolError, match="a second reply"):
        await misbehave(0, 0)


async def test_a_packet_of_a_reception_is_not_an_answer() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        pending = guest.submit_in(BULK_IN, 8)
        await settle()
        assert device.listener is not None
        for _ in range(pending.id + 1):
            device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"k")
        await settle()
        assert not pending.done


@pytest.mark.parametrize("sent_hello", [True, False])
async def test_the_guest_is_gone_before_a_device_is_offered(sent_hello: bool) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(paused=not sent_hello) as guest:
        await settle()
        guest._end.abort()
        await settle()
        with pytest.raises(GuestGoneError):
            await guest.redirection.attach(device)
        assert device.calls == []
