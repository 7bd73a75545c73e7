"""The engine against a guest in memory and a device that does what the test says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from tests.redirection.scripted import (
    BULK_IN,
    BULK_OUT,
    INTERRUPT_IN,
    INTERRUPT_OUT,
    ISO_IN,
    ISO_OUT,
    STREAM_IN,
    ScriptedDevice,
)

from farplug import events
from farplug.errors import DeviceError, GuestGoneError, LocalProtocolError, Reason, RefusedError, RemoteProtocolError
from farplug.redirection import Redirection, State, engine
from farplug.redirection.speed import FRUITLESS_RESETS, PATIENCE
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.transport.memory import memory_ports
from farplug.usb import Reception, Setup, Speed, Status, TransferType
from farplug.usb.types import Buffer, DescriptorType
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap

GET_DEVICE = Setup(0x80, 6, DescriptorType.DEVICE << 8, 0, 18)
GET_CONFIGURATION = Setup(0x80, 6, DescriptorType.CONFIGURATION << 8, 0, 9)


def kinds(guest: MemoryGuest) -> list[type]:
    return [type(event) for event in guest.events]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_attach_describes_the_device_before_it_connects_it() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        sent = [type(packet) for packet in guest.received]
        assert sent == [p.Hello, p.InterfaceInfo, p.EndpointInfo, p.DeviceConnect]
        assert guest.connected == p.DeviceConnect(
            speed=Speed.HIGH,
            device_class=0,
            device_subclass=0,
            device_protocol=0,
            vendor_id=0x1209,
            product_id=1,
            device_version=0x0100,
        )
        assert guest.interfaces == p.InterfaceInfo(interfaces=(p.InterfaceEntry(0, 255, 1, 2),))
        assert guest.endpoints is not None
        table = guest.endpoints.endpoints
        assert table[0].type == table[16].type == TransferType.CONTROL
        assert table[1].type == 255
        assert table[p.endpoint_index(BULK_IN)] == p.EndpointEntry(2, 0, 0, 512, 0)
        assert table[p.endpoint_index(INTERRUPT_IN)] == p.EndpointEntry(3, 4, 0, 8, 0)
    assert device.calls == ["open", "close"]
    assert kinds(guest) == [events.GuestReady, events.Attached, events.Detached]
    assert not guest.violations


async def test_an_interval_of_zero_is_mended_because_qemu_rejects_it() -> None:
    device = ScriptedDevice()
    device.interval = 0
    async with MemoryGuest(device) as guest:
        assert guest.endpoints is not None
        assert guest.endpoints.endpoints[p.endpoint_index(INTERRUPT_IN)].interval == 1


async def test_super_speed_plus_is_told_as_super() -> None:
    async with MemoryGuest(ScriptedDevice((Speed.SUPER_PLUS,))) as guest:
        assert guest.connected is not None
        assert guest.connected.speed == Speed.SUPER


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


async def test_the_order_on_bulk_streams_is_free() -> None:
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


async def test_cancel_is_answered_at_once_and_a_late_completion_is_swallowed() -> None:
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


async def test_an_id_may_come_back_as_soon_as_it_is_answered() -> None:
    device = ScriptedDevice()
    device.cancels = False
    async with MemoryGuest(device) as guest:
        old = guest.submit_in(BULK_IN, 10)
        await settle()
        old.cancel()
        await old
        again = guest.request(p.BulkPacket(id=old.id, endpoint=BULK_OUT, status=Status.SUCCESS, length=3, data=b"new"))
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"old")
        device.submitted[1].complete(Status.SUCCESS)
        assert ((await again).endpoint, (await again).length) == (BULK_OUT, 3)


async def test_an_id_that_is_still_pending_is_not_taken_twice() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        first = guest.submit_in(BULK_IN, 10)
        guest.send(p.BulkPacket(id=first.id, endpoint=BULK_OUT, status=Status.SUCCESS, length=3, data=b"dup"))
        answer = await first  # the duplicate's: one answer for each request
        assert (answer.endpoint, answer.status) == (BULK_OUT, Status.INVALID)
        await settle()
        assert len(device.submitted) == 1
        device.submitted[0].complete(Status.SUCCESS, b"real")
        await settle()
        assert [packet.data for packet in guest.received if isinstance(packet, p.BulkPacket)] == [b"", b"real"]


@pytest.mark.parametrize(
    ("packet", "status"),
    [
        pytest.param(
            p.BulkPacket(id=7, endpoint=0x8A, status=Status.SUCCESS, length=10), Status.INVALID, id="no such endpoint"
        ),
        pytest.param(
            p.BulkPacket(id=7, endpoint=INTERRUPT_IN, status=Status.SUCCESS, length=8), Status.INVALID, id="not bulk"
        ),
        pytest.param(
            p.BulkPacket(id=7, endpoint=BULK_IN, status=Status.SUCCESS, length=2**20 + 1),
            Status.INVALID,
            id="too large",
        ),
        pytest.param(
            p.BulkPacket(id=7, endpoint=BULK_OUT, status=Status.SUCCESS, length=2**20 + 1, data=bytes(2**20 + 1)),
            Status.INVALID,
            id="too large to store",
        ),
        pytest.param(
            p.InterruptPacket(id=7, endpoint=INTERRUPT_OUT, status=Status.SUCCESS, length=9, data=bytes(9)),
            Status.INVALID,
            id="more than a packet",
        ),
        pytest.param(
            p.ControlPacket(
                id=7, endpoint=0x81, request=6, request_type=0x80, status=Status.SUCCESS, value=0, index=0, length=8
            ),
            Status.INVALID,
            id="control on a bulk endpoint",
        ),
    ],
)
async def test_requests_that_make_no_sense_are_answered_with_an_error(packet: p.Packet, status: Status) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, max_transfer=2**20) as guest:
        answer = await guest.request(packet)
        assert (answer.status, answer.length) == (status, 0)
        assert device.submitted == []
        alive = guest.submit_in(BULK_IN, 4)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"good")
        assert (await alive).data == b"good"


async def test_control_and_interrupt_bodies_too_large_to_store() -> None:
    async with MemoryGuest(ScriptedDevice(), max_transfer=64) as guest:
        control = guest.request(
            p.ControlPacket(
                id=1,
                endpoint=0,
                request=9,
                request_type=0x21,
                status=Status.SUCCESS,
                value=0,
                index=0,
                length=65,
                data=bytes(65),
            )
        )
        interrupt = guest.request(
            p.InterruptPacket(id=2, endpoint=INTERRUPT_OUT, status=Status.SUCCESS, length=65, data=bytes(65))
        )
        assert (await control).status is Status.INVALID
        assert (await interrupt).status is Status.INVALID


async def test_more_than_the_bound_in_flight_is_answered_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.redirection.ledger.MAX_IN_FLIGHT", 1000)
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


async def test_too_many_pending_transfers_stop_the_reading_not_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_PENDING", 4)
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = [guest.submit_in(BULK_IN, 1) for _ in range(10)]
        await settle()
        assert len(device.submitted) == 4
        for index in range(10):
            device.submitted[index].complete(Status.SUCCESS, b"x")
            await settle()
        assert all([(await item).data == b"x" for item in pending])


async def test_what_a_guest_sends_at_once_leaves_the_event_loop_its_turns() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = [guest.submit_in(BULK_IN, 1) for _ in range(10 * engine.PACKETS_AT_ONCE)]
        seen = [0]
        while seen[-1] < len(pending):
            await asyncio.sleep(0)
            seen.append(len(device.submitted))
        assert max(later - earlier for earlier, later in itertools.pairwise(seen)) == engine.PACKETS_AT_ONCE
        for transfer in device.submitted:
            transfer.complete(Status.SUCCESS, b"x")
        assert all([(await item).data == b"x" for item in pending])


def record_writes(guest: MemoryGuest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the engine hands to its port at once, each time."""
    sizes: list[int] = []
    port = guest.redirection.port
    write = port.write

    def recorded(buffers: list[Buffer]) -> None:
        sizes.append(sum(map(len, buffers)))
        write(buffers)

    monkeypatch.setattr(port, "write", recorded)
    return sizes


async def test_answers_made_while_one_batch_of_input_is_looked_at_leave_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = ScriptedDevice()
    monkeypatch.setattr(device, "submit", lambda transfer: transfer.complete(Status.SUCCESS, bytes(transfer.length)))
    async with MemoryGuest(device) as guest:
        sizes = record_writes(guest, monkeypatch)
        answers = [guest.submit_in(BULK_IN, 512) for _ in range(8)]
        assert [len((await answer).data) for answer in answers] == [512] * 8
        assert len(sizes) == 1
        sizes.clear()
        answers = [guest.submit_in(BULK_IN, engine.FLUSH_ABOVE // 4) for _ in range(12)]
        assert all([len((await answer).data) == engine.FLUSH_ABOVE // 4 for answer in answers])
        assert len(sizes) == 3, "they are not held back without a bound"


async def test_answers_that_a_device_makes_later_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        sizes = record_writes(guest, monkeypatch)
        small, other, large = (
            guest.submit_in(BULK_IN, 1),
            guest.submit_out(BULK_OUT, b"x"),
            guest.submit_in(BULK_IN, 1 << 20),
        )
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"x")
        device.submitted[1].complete()
        assert not sizes
        assert ((await small).data, (await other).length) == (b"x", 1)
        assert len(sizes) == 1
        device.submitted[2].complete(Status.SUCCESS, bytes(1 << 20))
        assert len(sizes) == 2, "what is large does not wait"
        assert len((await large).data) == 1 << 20


async def test_a_device_that_raises_costs_one_stall() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        device.raises = ZeroDivisionError("a defect in the device")
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


async def test_a_device_that_raises_on_cancel_and_on_reset() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        device.raises = ZeroDivisionError("again")
        pending.cancel()
        assert (await pending).status is Status.CANCELLED
        guest.reset()
        await guest.wait(lambda: events.WasReset in kinds(guest))
        assert kinds(guest).count(events.DeviceFault) == 2
        device.raises = None


async def test_a_device_that_completes_twice_is_told_so_and_the_guest_sees_one_answer() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"once")
        with pytest.raises(DeviceError, match="completed twice"):
            device.submitted[0].complete(Status.SUCCESS, b"twice")
        assert (await pending).data == b"once"
        await settle()
        assert sum(isinstance(packet, p.BulkPacket) for packet in guest.received) == 1


async def test_a_device_that_gives_too_much_becomes_a_babble() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 4)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"too much")
        answer = await pending
        assert (answer.status, bytes(answer.data)) == (Status.BABBLE, b"too ")


async def test_reset_cancels_what_is_pending_and_ends_receptions() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(p.InterruptReceivingStatus, INTERRUPT_IN)
        guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.SUCCESS
        pending = guest.submit_in(BULK_IN, 10)
        guest.reset()
        assert (await pending).status is Status.CANCELLED
        assert (await status()).status is Status.STALL
        guest.reset()  # nothing happened since: skipped
        await settle()
        assert device.calls.count("reset") == 1
        assert kinds(guest).count(events.WasReset) == 1


async def test_configurations() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        answer = await guest.request(p.GetConfiguration(id=101))
        assert (answer.status, answer.configuration) == (Status.SUCCESS, 0)
        pending = guest.submit_in(BULK_IN, 10)
        before = len(guest.received)
        answer = await guest.request(p.SetConfiguration(id=102, configuration=1))
        assert (answer.status, answer.configuration) == (Status.SUCCESS, 1)
        assert (await pending).status is Status.CANCELLED
        assert [type(packet) for packet in guest.received[before:]] == [
            p.BulkPacket,
            p.InterfaceInfo,
            p.EndpointInfo,
            p.ConfigurationStatus,
        ]
        device.operation_status = Status.STALL
        answer = await guest.request(p.SetConfiguration(id=103, configuration=2))
        assert (answer.status, answer.configuration) == (Status.IO_ERROR, 1)
        assert [event for event in guest.events if isinstance(event, events.Configured)] == [
            events.Configured("memory", 1)
        ]


async def test_alternate_settings() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        before = len(guest.received)
        answer = await guest.request(p.SetAltSetting(id=101, interface=0, alt=1))
        assert (answer.status, answer.alt) == (Status.SUCCESS, 1)
        assert (await pending).status is Status.CANCELLED
        assert [type(packet) for packet in guest.received[before:]] == [
            p.BulkPacket,
            p.InterfaceInfo,
            p.EndpointInfo,
            p.AltSettingStatus,
        ]
        assert guest.endpoints is not None
        assert guest.endpoints.endpoints[p.endpoint_index(STREAM_IN)].max_streams == 16
        assert guest.endpoints.endpoints[p.endpoint_index(BULK_IN)].type == 255
        answer = await guest.request(p.GetAltSetting(id=102, interface=0))
        assert (answer.status, answer.alt) == (Status.SUCCESS, 1)
        for packet in (p.SetAltSetting(id=103, interface=9, alt=0), p.GetAltSetting(id=105, interface=9)):
            answer = await guest.request(packet)
            assert (answer.status, answer.alt) == (Status.INVALID, 255)
        before = len(guest.received)
        device.operation_status = Status.STALL
        answer = await guest.request(p.SetAltSetting(id=104, interface=0, alt=7))
        assert (answer.status, answer.alt) == (Status.IO_ERROR, 1)
        assert len(guest.received) == before + 1  # no infos


async def test_what_carries_sound_is_not_compressed() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        assert not guest.redirection.port.compress
        await guest.set_interface(0, 1)
        assert guest.redirection.port.compress


async def test_packets_wait_while_an_operation_is_under_way() -> None:
    device = ScriptedDevice()
    gate = asyncio.Event()
    reset = device.reset

    async def slow_reset() -> Status:
        await gate.wait()
        return await reset()

    device.reset = slow_reset  # type: ignore[method-assign]
    async with MemoryGuest(device) as guest:
        guest.send(p.SetConfiguration(id=101, configuration=1))
        guest.reset()
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        assert device.submitted == []
        gate.set()
        await guest.wait(lambda: events.WasReset in kinds(guest))
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"after")
        assert (await pending).data == b"after"


async def test_streams() -> None:
    device = ScriptedDevice()
    device.alternate = 1
    mask = 1 << p.endpoint_index(STREAM_IN) | 1 << p.endpoint_index(BULK_OUT)
    async with MemoryGuest(device) as guest:
        status = guest.stream(p.BulkStreamsStatus, 0)
        table = [
            (p.AllocBulkStreams(endpoints=mask, streams=16), Status.SUCCESS, 16),
            (p.AllocBulkStreams(endpoints=mask, streams=17), Status.INVALID, 17),
            (p.AllocBulkStreams(endpoints=mask | 1 << 9, streams=16), Status.INVALID, 16),
            (p.FreeBulkStreams(endpoints=mask), Status.SUCCESS, 0),
        ]
        for packet, expected, count in table:
            guest.send(packet)
            answer = await status()
            assert answer == p.BulkStreamsStatus(endpoints=mask_of(packet), streams=count, status=expected)
        assert ("allocate_streams", (BULK_OUT, STREAM_IN), 16) in device.calls
        assert ("free_streams", (BULK_OUT, STREAM_IN)) in device.calls


def mask_of(packet: p.Packet) -> int:
    assert isinstance(packet, (p.AllocBulkStreams, p.FreeBulkStreams))
    return packet.endpoints


async def test_interrupt_receiving() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(p.InterruptReceivingStatus, INTERRUPT_IN)
        data = guest.stream(p.InterruptPacket, INTERRUPT_IN)
        guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.SUCCESS
        assert device.calls[-1] == Reception(INTERRUPT_IN, TransferType.INTERRUPT)
        assert device.listener is not None
        for key in (b"a", b"b"):
            device.listener.received(INTERRUPT_IN, Status.SUCCESS, key)
        assert [(packet.id, packet.data) for packet in (await data(), await data())] == [(0, b"a"), (1, b"b")]
        guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.INVALID
        device.listener.reception_ended(INTERRUPT_IN, Status.IO_ERROR)
        assert (await status()).status is Status.IO_ERROR
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"c")
        assert (await data()).id == 2
        guest.send(p.StopInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.SUCCESS
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"nobody")
        device.listener.reception_ended(INTERRUPT_IN, Status.STALL)
        await settle()
        assert guest._streams[p.InterruptPacket, INTERRUPT_IN].empty()
        assert guest._streams[p.InterruptReceivingStatus, INTERRUPT_IN].empty()


async def test_a_reception_that_stalls_can_be_started_again() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(p.InterruptReceivingStatus, INTERRUPT_IN)
        data = guest.stream(p.InterruptPacket, INTERRUPT_IN)
        for _ in range(2):
            guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
            assert (await status()).status is Status.SUCCESS
            assert device.listener is not None
            device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"x")
            assert (await data()).id == 0
            device.listener.reception_ended(INTERRUPT_IN, Status.STALL)
            assert (await status()).status is Status.STALL


def start_bulk(size: int, transfers: int) -> p.StartBulkReceiving:
    return p.StartBulkReceiving(stream_id=0, bytes_per_transfer=size, endpoint=BULK_IN, transfers=transfers)


@pytest.mark.parametrize(
    ("packet", "kind"),
    [
        (p.StartInterruptReceiving(endpoint=BULK_IN), p.InterruptReceivingStatus),
        (p.StartInterruptReceiving(endpoint=0x8C), p.InterruptReceivingStatus),
        (p.StartIsoStream(endpoint=ISO_IN, packets_per_urb=0, urbs=4), p.IsoStreamStatus),
        (p.StartIsoStream(endpoint=ISO_IN, packets_per_urb=33, urbs=4), p.IsoStreamStatus),
        (p.StartIsoStream(endpoint=ISO_IN, packets_per_urb=8, urbs=17), p.IsoStreamStatus),
        (start_bulk(500, 5), p.BulkReceivingStatus),
        (start_bulk(0, 5), p.BulkReceivingStatus),
        (start_bulk(512, 17), p.BulkReceivingStatus),
        (start_bulk(2**25, 1), p.BulkReceivingStatus),
    ],
)
async def test_receptions_that_make_no_sense_stall(
    packet: p.StartInterruptReceiving,
    kind: type[p.InterruptReceivingStatus | p.IsoStreamStatus | p.BulkReceivingStatus],
) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(kind, packet.endpoint)
        guest.send(packet)
        answer = await status()
        assert answer.status is Status.STALL
        assert device.calls == ["open"]


@pytest.mark.parametrize("fails", ["raises", "stalls"])
async def test_a_reception_that_the_device_cannot_start(fails: str) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        if fails == "raises":
            device.raises = ZeroDivisionError()
        else:
            device.receiving_status = Status.STALL
        status = guest.stream(p.InterruptReceivingStatus, INTERRUPT_IN)
        guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert [(await status()).status, (await status()).status] == [Status.SUCCESS, Status.STALL]
        device.raises = None


async def test_buffered_bulk_and_isochronous() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(p.BulkReceivingStatus, BULK_IN)
        data = guest.stream(p.BufferedBulkPacket, BULK_IN)
        guest.send(p.StartBulkReceiving(stream_id=0, bytes_per_transfer=1024, endpoint=BULK_IN, transfers=5))
        assert (await status()).status is Status.SUCCESS
        assert device.listener is not None
        device.listener.received(BULK_IN, Status.SUCCESS, b"buffered")
        assert bytes((await data()).data) == b"buffered"
        guest.send(p.StopBulkReceiving(stream_id=0, endpoint=BULK_IN))
        assert (await status()).status is Status.SUCCESS

        iso_status = guest.stream(p.IsoStreamStatus, ISO_IN)
        iso = guest.stream(p.IsoPacket, ISO_IN)
        guest.send(p.StartIsoStream(endpoint=ISO_IN, packets_per_urb=8, urbs=4))
        assert (await iso_status()).status is Status.SUCCESS
        assert device.calls[-1] == Reception(ISO_IN, TransferType.ISOCHRONOUS, 4, 8)
        device.listener.received(ISO_IN, Status.SUCCESS, b"sound")
        assert bytes((await iso()).data) == b"sound"
        guest.send(p.StopIsoStream(endpoint=ISO_IN))
        assert (await iso_status()).status is Status.SUCCESS

        guest.send(p.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=4, data=b"lost"))  # not started
        out_status = guest.stream(p.IsoStreamStatus, ISO_OUT)
        guest.send(p.StartIsoStream(endpoint=ISO_OUT, packets_per_urb=8, urbs=4))
        assert (await out_status()).status is Status.SUCCESS
        guest.send(p.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=5, data=b"music"))
        await settle()
        (transfer,) = device.submitted
        assert (transfer.type, bytes(transfer.data)) == (TransferType.ISOCHRONOUS, b"music")
        transfer.complete(Status.SUCCESS)
        device.raises = ZeroDivisionError()
        guest.send(p.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=5, data=b"music"))
        guest.send(p.StopIsoStream(endpoint=ISO_OUT))
        assert (await out_status()).status is Status.SUCCESS
        assert kinds(guest).count(events.DeviceFault) == 2
        device.raises = None
        figures = {f.endpoint: f for f in guest.redirection.figures}
        assert (figures[ISO_OUT].transfers, figures[ISO_OUT].bytes) == (1, 5)


async def test_packets_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.redirection.receptions.MAX_UNTAKEN", 3)
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        guest.send(p.StartIsoStream(endpoint=ISO_IN, packets_per_urb=8, urbs=4))
        await settle()
        assert device.listener is not None
        guest.redirection.pause_writing()
        for _ in range(5):
            device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"k")
        device.listener.received(ISO_IN, Status.SUCCESS, b"s")
        figures = {f.endpoint: f for f in guest.redirection.figures}
        assert (figures[INTERRUPT_IN].transfers, figures[INTERRUPT_IN].dropped) == (3, 2)
        assert (figures[ISO_IN].transfers, figures[ISO_IN].dropped) == (0, 1)
        guest.redirection.resume_writing()
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"k")
        assert {f.endpoint: f.transfers for f in guest.redirection.figures}[INTERRUPT_IN] == 4


async def test_what_a_device_says_and_the_protocol_cannot_is_a_fault() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        await settle()
        assert device.listener is not None
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, bytes(70_000))
        assert kinds(guest).count(events.DeviceFault) == 1
        assert not guest.violations


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


async def test_detach_answers_what_is_pending_and_waits_for_the_guest() -> None:
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


async def test_while_it_leaves_requests_for_the_old_device_fail() -> None:
    device = ScriptedDevice()
    host, end = memory_ports()
    redirection = Redirection(host)
    guest = MemoryGuest()
    guest._end, guest.redirection = end, redirection
    answers: list[p.Packet] = []
    heard = guest._heard

    def late(packet: p.Packet) -> None:
        if isinstance(packet, p.DeviceDisconnect):
            for request in (
                p.BulkPacket(id=90, endpoint=BULK_IN, status=Status.SUCCESS, length=4),
                p.Reset(),
                p.SetConfiguration(id=91, configuration=1),
                p.GetConfiguration(id=92),
                p.SetAltSetting(id=93, interface=0, alt=0),
                p.GetAltSetting(id=94, interface=0),
                p.AllocBulkStreams(id=95, endpoints=0, streams=1),
                p.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=0),
                p.StartInterruptReceiving(id=96, endpoint=INTERRUPT_IN),
                p.FilterReject(),
            ):
                guest.send(request)
        answers.append(packet)
        heard(packet)

    guest._heard = late  # type: ignore[method-assign]
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


async def test_a_guest_that_never_acknowledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACK_PATIENCE", 0.05)
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        monkeypatch.setattr(guest, "_heard", lambda packet: None)
        await guest.redirection.detach()
        assert guest.redirection.state is State.CLOSED
        assert device.calls == ["open", "close"]


async def test_without_the_capability_nobody_waits_for_an_acknowledgement() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, caps=ALL_CAPS & ~Cap.DEVICE_DISCONNECT_ACK) as guest:
        await guest.redirection.detach()
        assert guest.redirection.state is State.EMPTY


async def test_a_paused_guest_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HELLO_PATIENCE", 0.01)
    device = ScriptedDevice()
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(device))
        await asyncio.sleep(0.05)
        assert kinds(guest) == [events.WaitingForGuest]
        with pytest.raises(LocalProtocolError):
            await guest.redirection.attach(ScriptedDevice())
        guest.resume()
        await attaching
        await guest.wait(lambda: guest.connected is not None)


async def test_the_guest_goes_while_it_is_waited_for() -> None:
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


async def test_what_cannot_be_made_durable_is_told() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        device.close_error = DeviceError("the disk is full", reason=Reason.IO_ERROR)
        with pytest.raises(DeviceError, match="full"):
            await guest.redirection.detach()
        detached = guest.events[-1]
        assert isinstance(detached, events.Detached)
        assert detached.error is device.close_error


async def test_the_guests_filter_known_before() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(filter="0x08,-1,-1,-1,1|-1,-1,-1,-1,0") as guest:
        await guest.wait(lambda: events.GuestReady in kinds(guest))
        await settle()
        with pytest.raises(RefusedError, match="filter does not allow 1209:0001") as caught:
            await guest.redirection.attach(device)
        assert caught.value.reason is Reason.FILTERED
        assert device.calls == []
        assert guest.connected is None


async def test_a_filter_that_cannot_be_read_is_ignored() -> None:
    async with MemoryGuest(filter="nonsense") as guest:
        await guest.redirection.attach(ScriptedDevice())
        await guest.wait(lambda: guest.connected is not None)


async def test_a_filter_that_comes_after_the_offer() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(p.FilterFilter(filter="-1,-1,-1,-1,1"))
        await settle()
        assert guest.redirection.device is device
        guest.send(p.FilterFilter(filter="-1,0x1209,-1,-1,0|-1,-1,-1,-1,1"))
        await guest.wait(lambda: guest.connected is None)
        await settle()
        assert kinds(guest)[-2:] == [events.Refused, events.Detached]
        assert device.calls == ["open", "close"]


@pytest.mark.parametrize("filter", [None, "-1,0x1209,-1,-1,0|-1,-1,-1,-1,1"])
async def test_refused_after_the_offer(filter: str | None) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        if filter is not None:
            guest.send(p.FilterFilter(filter=filter))
        guest.send(p.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await settle()
        refused = next(event for event in guest.events if isinstance(event, events.Refused))
        assert refused.error.reason is (Reason.REJECTED if filter is None else Reason.FILTERED)
        assert kinds(guest)[-1] is events.Detached
        assert device.calls == ["open", "close"]


async def test_refused_at_one_speed_offered_at_the_next() -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        guest.send(p.FilterReject())
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.HIGH)
        guest.send(p.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await settle()
        assert kinds(guest)[1:] == [
            events.Attached, events.FellBack, events.Attached, events.Refused, events.Detached,
        ]  # fmt: skip


class Streaming(ScriptedDevice):
    """Has streams from SuperSpeed on."""

    @property
    def has_streams(self) -> bool:
        return self.identity.speed >= Speed.SUPER


@pytest.mark.parametrize("caps", [ALL_CAPS, ALL_CAPS & ~Cap.BULK_STREAMS])
async def test_a_guest_without_streams_is_offered_none(caps: Cap) -> None:
    device = Streaming((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device, caps=caps) as guest:
        assert guest.connected is not None
        assert guest.connected.speed == (Speed.SUPER if caps is ALL_CAPS else Speed.HIGH)
        fell_back = [event for event in guest.events if isinstance(event, events.FellBack)]
        assert [(one.speed, one.needs_streams) for one in fell_back] == [(Speed.HIGH, True)] * (caps is not ALL_CAPS)


async def test_a_device_that_needs_streams_is_refused_to_a_guest_without() -> None:
    device = Streaming((Speed.SUPER,))
    async with MemoryGuest(caps=ALL_CAPS & ~Cap.BULK_STREAMS) as guest:
        with pytest.raises(RefusedError, match="has no bulk streams, which 1209:") as caught:
            await guest.redirection.attach(device)
        assert caught.value.reason is Reason.CAPABILITY
        assert device.calls == []


async def _look(guest: MemoryGuest, device: ScriptedDevice, *setups: Setup) -> None:
    for setup in setups:
        looked = asyncio.ensure_future(guest.control_in(setup))
        await settle()
        device.submitted[-1].complete(Status.SUCCESS, b"x" * 9)
        await looked


async def test_a_guest_that_does_not_understand_super_speed_gets_high_speed() -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        for _ in range(FRUITLESS_RESETS):
            await _look(guest, device, GET_DEVICE)
            guest.reset()
        await _look(guest, device, GET_DEVICE)
        assert events.FellBack not in kinds(guest)  # it might go on yet
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.HIGH)
        assert device.identity.speed == Speed.HIGH
        for _ in range(FRUITLESS_RESETS + 1):  # there is nothing lower: no further try
            guest.reset()
            await _look(guest, device, GET_DEVICE)
        await asyncio.sleep(2 * PATIENCE)
        assert kinds(guest).count(events.FellBack) == 1
        await guest.redirection.detach()
        await guest.redirection.attach(device)
        # Another port may take more.
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.SUPER)


async def test_resets_of_a_guest_that_understands_are_no_reason_to_fall_back() -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        for _ in range(10):
            await _look(guest, device, GET_DEVICE, GET_CONFIGURATION)
            guest.reset()
            await _look(guest, device, GET_DEVICE, GET_DEVICE)
        for _ in range(10):
            guest.reset()
            await _look(guest, device, GET_DEVICE)
            await guest.set_configuration(1)
        await asyncio.sleep(2 * PATIENCE)
        assert events.FellBack not in kinds(guest)


async def _unplug(guest: MemoryGuest) -> None:
    await guest.redirection.detach()


async def _vanish(guest: MemoryGuest) -> None:
    guest._end.abort()
    await guest.redirection.closed()


@pytest.mark.parametrize("leave", [_unplug, _vanish])
async def test_leaving_while_it_falls_back(leave: Callable[[MemoryGuest], Awaitable[None]]) -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        guest.send(p.FilterReject())
        await guest.wait(lambda: events.FellBack in kinds(guest))
        await leave(guest)
        assert guest.redirection.device is None
        assert kinds(guest)[-1] is events.Detached
        assert device.calls[-1] == "close"


async def test_violations_are_told_a_bounded_number_of_times() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send_bytes(b"".join(p_bytes(99) for _ in range(100)))
        await settle()
        assert kinds(guest).count(events.PeerViolation) == engine.MAX_REPORTED_VIOLATIONS
        alive = guest.submit_in(BULK_IN, 4)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"good")
        assert (await alive).data == b"good"


def p_bytes(type: int) -> bytes:
    return type.to_bytes(4, "little") + (0).to_bytes(4, "little") + bytes(8)


async def test_something_that_does_not_speak_usbredir() -> None:
    async with MemoryGuest(paused=True) as guest:
        attaching = asyncio.ensure_future(guest.redirection.attach(ScriptedDevice()))
        await settle()
        guest.send_bytes(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        with pytest.raises(RemoteProtocolError, match="does not speak usbredir"):
            await attaching


async def test_misuse() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        with pytest.raises(LocalProtocolError):
            await guest.redirection.open()
        with pytest.raises(LocalProtocolError):
            await guest.redirection.attach(ScriptedDevice())
    await guest.redirection.detach()
    assert await Redirection(memory_ports()[0]).closed() is None
