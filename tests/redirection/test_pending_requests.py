"""Each request has one answer, in order on its endpoint, whatever the device does."""

from __future__ import annotations

import asyncio

import pytest
from tests.redirection.scripted import BULK_IN, BULK_OUT, STREAM_IN, ScriptedDevice, kinds, settle

from farplug.errors import DeviceError
from farplug.redirection import events, port_protocol
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Status
from farplug.usb.share import MAX_MEMORY
from farplug.usbredir import packets


async def test_answers_keep_their_order_on_each_endpoint_whatever_the_device_does() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        first, second, third = (guest.submit_in(BULK_IN, 512) for _ in range(3))
        other = guest.submit_out(BULK_OUT, b"x" * 100)
        await settle()
        device.submitted[2].complete(Status.SUCCESS, b"third")
        device.submitted[1].complete(Status.SUCCESS, b"second")
        device.submitted[3].complete(Status.SUCCESS)
        assert (await other).length == 100
        assert not first.done
        assert not second.done
        device.submitted[0].complete(Status.SUCCESS, b"first")
        assert [bytes((await pending).data) for pending in (first, second, third)] == [b"first", b"second", b"third"]
        figures = {f.endpoint: f for f in guest.redirection.figures}
        assert (figures[BULK_IN].transfers, figures[BULK_IN].bytes) == (3, 16)
        assert (figures[BULK_OUT].transfers, figures[BULK_OUT].bytes) == (1, 100)


async def test_answers_on_bulk_streams_may_come_in_any_order() -> None:
    device = ScriptedDevice()
    device.alternate = 1
    async with MemoryGuest(device) as guest:
        first = guest.submit_in(STREAM_IN, 512, stream_id=1)
        second = guest.submit_in(STREAM_IN, 512, stream_id=2)
        await settle()
        device.submitted[1].complete(Status.SUCCESS, b"second")
        assert (await second).data == b"second"
        assert not first.done
        device.submitted[0].complete(Status.STALL)
        assert (await first).status is Status.STALL


async def test_cancel_is_answered_at_once_and_a_late_completion_is_ignored() -> None:
    device = ScriptedDevice()
    device.cancels = False
    async with MemoryGuest(device) as guest:
        stuck, waiting = guest.submit_in(BULK_IN, 512), guest.submit_in(BULK_IN, 512)
        await settle()
        device.submitted[1].complete(Status.SUCCESS, b"waiting")
        stuck.cancel()
        answer = await stuck
        assert (answer.status, answer.length, answer.data) == (Status.CANCELLED, 0, b"")
        assert (await waiting).data == b"waiting"
        assert device.cancelled == [device.submitted[0]]
        answers = len(guest.received)
        device.submitted[0].complete(Status.SUCCESS, b"late")
        stuck.cancel()  # its id is unknown now: no answer
        await settle()
        assert len(guest.received) == answers


async def test_cancel_of_a_completed_transfer_that_waits_for_its_turn() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        first, second = guest.submit_in(BULK_IN, 512), guest.submit_in(BULK_IN, 512)
        await settle()
        device.submitted[1].complete(Status.SUCCESS, b"second")
        second.cancel()
        assert (await second).status is Status.CANCELLED
        assert device.cancelled == []
        device.submitted[0].complete(Status.SUCCESS, b"first")
        assert (await first).data == b"first"


async def test_an_id_may_be_reused_after_its_answer() -> None:
    device = ScriptedDevice()
    device.cancels = False
    async with MemoryGuest(device) as guest:
        old = guest.submit_in(BULK_IN, 10)
        await settle()
        old.cancel()
        await old
        again = guest.request(
            packets.BulkPacket(id=old.id, endpoint=BULK_OUT, status=Status.SUCCESS, length=3, data=b"new")
        )
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"old")
        device.submitted[1].complete(Status.SUCCESS)
        assert ((await again).endpoint, (await again).length) == (BULK_OUT, 3)


async def test_a_second_request_with_a_pending_id_is_invalid() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        first = guest.submit_in(BULK_IN, 10)
        guest.send(packets.BulkPacket(id=first.id, endpoint=BULK_OUT, status=Status.SUCCESS, length=3, data=b"dup"))
        answer = await first  # the duplicate's: one answer for each request
        assert (answer.endpoint, answer.status) == (BULK_OUT, Status.INVALID)
        await settle()
        assert len(device.submitted) == 1
        device.submitted[0].complete(Status.SUCCESS, b"real")
        await settle()
        assert [packet.data for packet in guest.received if isinstance(packet, packets.BulkPacket)] == [b"", b"real"]


async def test_more_than_the_bound_in_flight_is_answered_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.usb.share.Memory.__init__.__defaults__", (1000,))
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        first, second = guest.submit_in(BULK_IN, 600), guest.submit_in(BULK_IN, 600)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"first")
        assert (await first).data == b"first"
        assert (await second).status is Status.IO_ERROR
        third = guest.submit_in(BULK_IN, 600)
        await settle()
        device.submitted[1].complete(Status.SUCCESS, b"third")
        assert (await third).data == b"third"


async def test_an_exception_of_the_device_becomes_one_stall() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        device.raises = ZeroDivisionError("a bug in the device")
        with pytest.raises(TransferFailed) as caught:
            await guest.bulk_in(BULK_IN, 10)
        assert caught.value.status is Status.STALL
        device.raises = None
        again = guest.submit_in(BULK_IN, 10)
        await settle()
        device.submitted[1].complete(Status.SUCCESS, b"fine")
        assert (await again).data == b"fine"
        faults = [event for event in guest.events if isinstance(event, events.DeviceFault)]
        assert [type(fault.error) for fault in faults] == [ZeroDivisionError]
        guest.faults.clear()


async def test_a_device_that_completes_twice_gets_an_error_and_the_guest_one_answer() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"once")
        with pytest.raises(DeviceError, match="completed twice"):
            device.submitted[0].complete(Status.SUCCESS, b"twice")
        assert (await pending).data == b"once"
        await settle()
        assert sum(isinstance(packet, packets.BulkPacket) for packet in guest.received) == 1


async def test_a_reply_that_is_too_long_becomes_a_babble() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 4)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"too much")
        answer = await pending
        assert (answer.status, bytes(answer.data)) == (Status.BABBLE, b"too ")


async def test_a_refused_request_holds_no_memory_while_it_waits_for_its_turn() -> None:
    device = ScriptedDevice()
    device.cancels = False
    async with MemoryGuest(device) as guest:
        first = guest.submit_out(BULK_OUT, b"x")
        size = 8 * 2**20
        more = [guest.submit_out(BULK_OUT, bytes(size)) for _ in range(12)]
        accepted = 1 + (MAX_MEMORY - 1) // size
        async with asyncio.timeout(100):
            while guest.redirection._protocol.pending < 13:
                await asyncio.sleep(0.01)
        assert len(device.submitted) == accepted
        held = sum(len(request.data) for request in guest.redirection._requests._queues[BULK_OUT])
        assert held <= MAX_MEMORY
        assert guest.redirection.memory <= MAX_MEMORY
        for transfer in device.submitted:
            transfer.complete()
        assert (await first).status is Status.SUCCESS
        statuses = [(await pending).status for pending in more]
        assert statuses == [Status.SUCCESS] * (accepted - 1) + [Status.IO_ERROR] * (13 - accepted)


async def test_ids_used_twice_are_bounded_and_answered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_protocol, "MAX_PENDING", 50)
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(*[packets.BulkPacket(id=77, endpoint=BULK_IN, status=Status.SUCCESS, length=4)] * 200)
        await settle()
        assert guest.redirection._protocol.pending == 50
        device.submitted[0].complete(Status.SUCCESS, b"once")
        await guest.wait(lambda: sum(isinstance(packet, packets.BulkPacket) for packet in guest.received) == 50)
        await settle()
        assert guest.redirection._protocol.pending == 50
        await guest.redirection.detach()
        await settle()
        assert not guest.redirection._protocol.pending
        answers = [packet.status for packet in guest.received if isinstance(packet, packets.BulkPacket)]
        assert len(answers) == 200


@pytest.mark.parametrize("reply", [memoryview(b"abcdef")[::2], "text", [1, 2]])
async def test_a_reply_that_cannot_be_encoded_becomes_an_error(reply: object) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, reply)  # type: ignore[arg-type]
        assert (await pending).status is Status.IO_ERROR
        assert events.DeviceFault in kinds(guest)
        guest.faults.clear()
