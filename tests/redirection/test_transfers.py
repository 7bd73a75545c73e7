"""Invalid requests for transfers."""

from __future__ import annotations

import pytest
from tests.redirection.scripted import BULK_IN, BULK_OUT, INTERRUPT_IN, INTERRUPT_OUT, ScriptedDevice, settle

from farplug.testing.memory import MemoryGuest
from farplug.usb import Status
from farplug.usbredir import packets


@pytest.mark.parametrize(
    ("packet", "status"),
    [
        pytest.param(
            packets.BulkPacket(id=7, endpoint=0x8A, status=Status.SUCCESS, length=10),
            Status.INVALID,
            id="no such endpoint",
        ),
        pytest.param(
            packets.BulkPacket(id=7, endpoint=INTERRUPT_IN, status=Status.SUCCESS, length=8),
            Status.INVALID,
            id="not bulk",
        ),
        pytest.param(
            packets.BulkPacket(id=7, endpoint=BULK_IN, status=Status.SUCCESS, length=2**20 + 1),
            Status.INVALID,
            id="too large",
        ),
        pytest.param(
            packets.BulkPacket(id=7, endpoint=BULK_OUT, status=Status.SUCCESS, length=2**20 + 1, data=bytes(2**20 + 1)),
            Status.INVALID,
            id="too large to store",
        ),
        pytest.param(
            packets.InterruptPacket(id=7, endpoint=INTERRUPT_OUT, status=Status.SUCCESS, length=9, data=bytes(9)),
            Status.INVALID,
            id="more than a packet",
        ),
        pytest.param(
            packets.ControlPacket(
                id=7, endpoint=0x81, request=6, request_type=0x80, status=Status.SUCCESS, value=0, index=0, length=8
            ),
            Status.INVALID,
            id="control on a bulk endpoint",
        ),
    ],
)
async def test_invalid_requests_are_answered_with_an_error(packet: packets.Packet, status: Status) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device, max_transfer=2**20) as guest:
        answer = await guest.request(packet)
        assert (answer.status, answer.length) == (status, 0)
        assert device.submitted == []
        alive = guest.submit_in(BULK_IN, 4)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"good")
        assert (await alive).data == b"good"


async def test_control_and_interrupt_payloads_too_large_to_store() -> None:
    async with MemoryGuest(ScriptedDevice(), max_transfer=64) as guest:
        control = guest.request(
            packets.ControlPacket(
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
            packets.InterruptPacket(id=2, endpoint=INTERRUPT_OUT, status=Status.SUCCESS, length=65, data=bytes(65))
        )
        assert (await control).status is Status.INVALID
        assert (await interrupt).status is Status.INVALID
