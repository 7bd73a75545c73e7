"""Receptions: interrupt, isochronous and buffered bulk."""

from __future__ import annotations

import struct

import pytest
from tests.redirection.scripted import BULK_IN, INTERRUPT_IN, ISO_IN, ISO_OUT, ScriptedDevice, kinds, settle

from farplug.redirection import events
from farplug.testing.memory import MemoryGuest
from farplug.usb import Reception, Status, TransferType
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap


async def test_interrupt_receiving() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(packets.InterruptReceivingStatus, INTERRUPT_IN)
        data = guest.stream(packets.InterruptPacket, INTERRUPT_IN)
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.SUCCESS
        assert device.calls[-1] == Reception(INTERRUPT_IN, TransferType.INTERRUPT)
        assert device.listener is not None
        for key in (b"a", b"b"):
            device.listener.received(INTERRUPT_IN, Status.SUCCESS, key)
        assert [(packet.id, packet.data) for packet in (await data(), await data())] == [(0, b"a"), (1, b"b")]
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.INVALID
        device.listener.reception_ended(INTERRUPT_IN, Status.IO_ERROR)
        assert (await status()).status is Status.IO_ERROR
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"c")
        assert (await data()).id == 2
        guest.send(packets.StopInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.SUCCESS
        assert not device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"unread")
        device.listener.reception_ended(INTERRUPT_IN, Status.STALL)
        await settle()
        assert guest._streams[packets.InterruptPacket, INTERRUPT_IN].empty()
        assert guest._streams[packets.InterruptReceivingStatus, INTERRUPT_IN].empty()


async def test_a_reception_that_stalls_can_be_started_again() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(packets.InterruptReceivingStatus, INTERRUPT_IN)
        data = guest.stream(packets.InterruptPacket, INTERRUPT_IN)
        for _ in range(2):
            guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
            assert (await status()).status is Status.SUCCESS
            assert device.listener is not None
            device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"x")
            assert (await data()).id == 0
            device.listener.reception_ended(INTERRUPT_IN, Status.STALL)
            assert (await status()).status is Status.STALL


def start_bulk(size: int, transfers: int) -> packets.StartBulkReceiving:
    return packets.StartBulkReceiving(stream_id=0, bytes_per_transfer=size, endpoint=BULK_IN, transfers=transfers)


@pytest.mark.parametrize(
    ("packet", "kind"),
    [
        (packets.StartInterruptReceiving(endpoint=BULK_IN), packets.InterruptReceivingStatus),
        (packets.StartInterruptReceiving(endpoint=0x8C), packets.InterruptReceivingStatus),
        (packets.StartIsoStream(endpoint=ISO_IN, packets_per_urb=0, urbs=4), packets.IsoStreamStatus),
        (packets.StartIsoStream(endpoint=ISO_IN, packets_per_urb=33, urbs=4), packets.IsoStreamStatus),
        (packets.StartIsoStream(endpoint=ISO_IN, packets_per_urb=8, urbs=17), packets.IsoStreamStatus),
        (start_bulk(500, 5), packets.BulkReceivingStatus),
        (start_bulk(0, 5), packets.BulkReceivingStatus),
        (start_bulk(512, 17), packets.BulkReceivingStatus),
        (start_bulk(2**25, 1), packets.BulkReceivingStatus),
    ],
)
async def test_receptions_with_invalid_parameters_stall(
    packet: packets.StartInterruptReceiving,
    kind: type[packets.InterruptReceivingStatus | packets.IsoStreamStatus | packets.BulkReceivingStatus],
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
        status = guest.stream(packets.InterruptReceivingStatus, INTERRUPT_IN)
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert [(await status()).status, (await status()).status] == [Status.SUCCESS, Status.STALL]
        device.raises = None
        assert len(guest.faults) == (fails == "raises")
        guest.faults.clear()


async def test_buffered_bulk_and_isochronous() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(packets.BulkReceivingStatus, BULK_IN)
        data = guest.stream(packets.BufferedBulkPacket, BULK_IN)
        guest.send(packets.StartBulkReceiving(stream_id=0, bytes_per_transfer=1024, endpoint=BULK_IN, transfers=5))
        assert (await status()).status is Status.SUCCESS
        assert device.listener is not None
        device.listener.received(BULK_IN, Status.SUCCESS, b"buffered")
        assert bytes((await data()).data) == b"buffered"
        guest.send(packets.StopBulkReceiving(stream_id=0, endpoint=BULK_IN))
        assert (await status()).status is Status.SUCCESS

        iso_status = guest.stream(packets.IsoStreamStatus, ISO_IN)
        iso = guest.stream(packets.IsoPacket, ISO_IN)
        guest.send(packets.StartIsoStream(endpoint=ISO_IN, packets_per_urb=8, urbs=4))
        assert (await iso_status()).status is Status.SUCCESS
        assert device.calls[-1] == Reception(ISO_IN, TransferType.ISOCHRONOUS, 4, 8)
        device.listener.received(ISO_IN, Status.SUCCESS, b"sound")
        assert bytes((await iso()).data) == b"sound"
        guest.send(packets.StopIsoStream(endpoint=ISO_IN))
        assert (await iso_status()).status is Status.SUCCESS

        guest.send(packets.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=4, data=b"lost"))  # not started
        out_status = guest.stream(packets.IsoStreamStatus, ISO_OUT)
        guest.send(packets.StartIsoStream(endpoint=ISO_OUT, packets_per_urb=8, urbs=4))
        assert (await out_status()).status is Status.SUCCESS
        guest.send(packets.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=5, data=b"music"))
        await settle()
        (transfer,) = device.submitted
        assert (transfer.type, bytes(transfer.data)) == (TransferType.ISOCHRONOUS, b"music")
        transfer.complete(Status.SUCCESS)
        device.raises = ZeroDivisionError()
        guest.send(packets.IsoPacket(endpoint=ISO_OUT, status=Status.SUCCESS, length=5, data=b"music"))
        guest.send(packets.StopIsoStream(endpoint=ISO_OUT))
        assert (await out_status()).status is Status.SUCCESS
        assert kinds(guest).count(events.DeviceFault) == 2
        device.raises = None
        guest.faults.clear()
        figures = {f.endpoint: f for f in guest.redirection.figures}
        assert (figures[ISO_OUT].transfers, figures[ISO_OUT].bytes) == (1, 5)


async def test_packets_are_bounded_while_the_port_does_not_accept_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.redirection.port_protocol.MAX_UNREQUESTED", 3)
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        guest.send(packets.StartIsoStream(endpoint=ISO_IN, packets_per_urb=8, urbs=4))
        await settle()
        assert device.listener is not None
        guest.redirection._protocol.pause_writing()
        sent = [device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"k") for _ in range(5)]
        assert sent == [True, True, True, False, False]
        assert not device.listener.received(ISO_IN, Status.SUCCESS, b"s")
        figures = {f.endpoint: f for f in guest.redirection.figures}
        assert (figures[INTERRUPT_IN].transfers, figures[INTERRUPT_IN].dropped) == (3, 2)
        assert (figures[ISO_IN].transfers, figures[ISO_IN].dropped) == (0, 1)
        guest.redirection._protocol.resume_writing()
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, b"k")
        assert {f.endpoint: f.transfers for f in guest.redirection.figures}[INTERRUPT_IN] == 4


async def test_bytes_are_bounded_while_the_port_does_not_accept_output(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(packets.StartBulkReceiving(stream_id=0, bytes_per_transfer=512, endpoint=BULK_IN, transfers=5))
        await settle()
        guest.redirection._protocol.pause_writing()
        assert device.listener is not None
        for _ in range(10):
            device.listener.received(BULK_IN, Status.SUCCESS, bytes(2**20))
        figures = {f.endpoint: f for f in guest.redirection.figures}
        assert (figures[BULK_IN].transfers, figures[BULK_IN].dropped) == (4, 6)
        guest.redirection._protocol.resume_writing()


@pytest.mark.parametrize(
    ("lacking", "body"),
    [
        (Cap.BULK_RECEIVING, struct.pack("<IIQIIBB", 25, 10, 7, 0, 512, BULK_IN, 4)),
        (Cap.BULK_RECEIVING, struct.pack("<IIQIB", 26, 5, 7, 0, BULK_IN)),
        (Cap.BULK_STREAMS, struct.pack("<IIQII", 18, 8, 7, 1 << 17, 4)),
        (Cap.BULK_STREAMS, struct.pack("<IIQI", 19, 4, 7, 1 << 17)),
    ],
    ids=["start_bulk_receiving", "stop_bulk_receiving", "alloc_bulk_streams", "free_bulk_streams"],
)
async def test_a_request_that_the_guest_cannot_get_an_answer_to_is_not_carried_out(lacking: Cap, body: bytes) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, caps=ALL_CAPS & ~lacking) as guest:
        guest.send_bytes(body)
        await settle()
        assert device.calls == ["open"]
        (violation,) = [event for event in guest.events if isinstance(event, events.PeerViolation)]
        assert f"without the capability {lacking.names[0]}, cannot receive its answer" in str(violation)
        assert not guest.faults
