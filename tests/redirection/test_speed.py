"""The best speed that the guest can take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.redirection.scripted import ScriptedDevice, kinds, settle

from farplug.errors import Reason, RefusedError
from farplug.redirection import events
from farplug.redirection.speed import FRUITLESS_RESETS, PATIENCE
from farplug.testing.memory import MemoryGuest
from farplug.usb import Setup, Speed, Status
from farplug.usb.types import DescriptorType
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap

GET_DEVICE = Setup(0x80, 6, DescriptorType.DEVICE << 8, 0, 18)


GET_CONFIGURATION = Setup(0x80, 6, DescriptorType.CONFIGURATION << 8, 0, 9)


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
