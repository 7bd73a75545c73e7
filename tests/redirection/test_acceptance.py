"""Devices that the guest's filter does not allow, and that the guest refuses."""

from __future__ import annotations

import struct

import pytest
from tests.redirection.scripted import ScriptedDevice, kinds, settle

from farplug.errors import Reason, RefusedError
from farplug.redirection import events
from farplug.testing.memory import MemoryGuest
from farplug.usbredir import packets
from farplug.usbredir.wire import PacketType


async def test_a_filter_that_comes_before_the_device() -> None:
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
    async with MemoryGuest() as guest:
        await guest.wait(lambda: events.GuestReady in kinds(guest))
        guest.send_bytes(struct.pack("<IIQ9s", PacketType.FILTER_FILTER, 9, 0, b"nonsense"))
        await guest.wait(lambda: events.PeerViolation in kinds(guest))
        await guest.redirection.attach(ScriptedDevice())
        await guest.wait(lambda: guest.connected is not None)


async def test_a_filter_that_comes_after_the_offer() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(packets.FilterFilter(filter="-1,-1,-1,-1,1"))
        await settle()
        assert guest.redirection.device is device
        guest.send(packets.FilterFilter(filter="-1,0x1209,-1,-1,0|-1,-1,-1,-1,1"))
        await guest.wait(lambda: guest.connected is None)
        await settle()
        assert kinds(guest)[-2:] == [events.Refused, events.Detached]
        assert device.calls == ["open", "close"]


@pytest.mark.parametrize("filter", [None, "-1,0x1209,-1,-1,0|-1,-1,-1,-1,1"])
async def test_refused_after_the_offer(filter: str | None) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        if filter is not None:
            guest.send(packets.FilterFilter(filter=filter))
        guest.send(packets.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await settle()
        refused = next(event for event in guest.events if isinstance(event, events.Refused))
        assert refused.error.reason is (Reason.REJECTED if filter is None else Reason.FILTERED)
        assert kinds(guest)[-1] is events.Detached
        assert device.calls == ["open", "close"]
