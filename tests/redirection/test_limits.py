"""Whatever the guest or the device does without an end, events are bounded, and the last one of a kind is emitted."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable

import pytest
from tests.clock import FakeClock
from tests.redirection.scripted import BULK_IN, ISO_OUT, ScriptedDevice, settle

from farplug.errors import DeviceError
from farplug.rate_limit import BURST, INTERVAL
from farplug.redirection import events
from farplug.redirection.events import DeviceReport, PortEvent, Repeated
from farplug.testing.memory import MemoryGuest
from farplug.usb import Status, Transfer
from farplug.usb.device import DeviceEvent
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.virtual.events import FunctionRaised, MediumEjected, MediumInserted, MediumLocked

MANY = 300


class Custom(DeviceEvent):
    """An event of a device that we do not know."""

    name = "medium-locked"

    def __str__(self) -> str:
        return "custom"


def clock_of(guest: MemoryGuest) -> FakeClock:
    clock = FakeClock()
    guest.redirection._events._limit._clock = lambda: clock
    return clock


def configurations(guest: MemoryGuest, device: ScriptedDevice) -> None:
    for number in range(MANY):
        guest.send(p.SetConfiguration(id=10**6 + number, configuration=number % 3))


def resets(guest: MemoryGuest, device: ScriptedDevice) -> None:
    for number in range(MANY):  # a second reset in a row does nothing
        guest.send(p.SetConfiguration(id=10**6 + number, configuration=1), p.Reset())


def unknown_packets(guest: MemoryGuest, device: ScriptedDevice) -> None:
    guest.send_bytes(struct.pack("<IIQ", 99, 0, 0) * MANY)


def unanswerable_receptions(guest: MemoryGuest, device: ScriptedDevice) -> None:
    guest.send_bytes(struct.pack("<IIQIIBB", 25, 10, 0, 0, 512, BULK_IN, 4) * MANY)


def unanswerable_streams(guest: MemoryGuest, device: ScriptedDevice) -> None:
    guest.send_bytes(struct.pack("<IIQII", 18, 8, 0, 1 << 17, 4) * MANY)


def bad_filters(guest: MemoryGuest, device: ScriptedDevice) -> None:
    guest.send_bytes((struct.pack("<IIQ", 23, 6, 0) + b"1,2,3\0") * MANY)


def raises(guest: MemoryGuest, device: ScriptedDevice) -> None:
    device.raises = ZeroDivisionError("a defect")
    for number in range(MANY):
        guest.send(p.BulkPacket(id=10**6 + number, endpoint=BULK_IN, status=Status.SUCCESS, length=4))


def raises_in_a_setting(guest: MemoryGuest, device: ScriptedDevice) -> None:
    device.raises = ZeroDivisionError("a defect")
    for number in range(MANY):
        guest.send(p.SetConfiguration(id=10**6 + number, configuration=1))


def raises_in_a_stream(guest: MemoryGuest, device: ScriptedDevice) -> None:
    def submit(transfer: Transfer) -> None:
        raise ZeroDivisionError("a defect")

    device.submit = submit  # type: ignore[method-assign]
    guest.send(p.StartIsoStream(endpoint=ISO_OUT, packets_per_urb=1, urbs=1))
    for number in range(MANY):
        guest.send(p.IsoPacket(id=number, endpoint=ISO_OUT, status=Status.SUCCESS, length=0))


def reports(event: Callable[[int], DeviceEvent]) -> Callable[[MemoryGuest, ScriptedDevice], None]:
    def flood(guest: MemoryGuest, device: ScriptedDevice) -> None:
        assert device.listener is not None
        for number in range(MANY):
            device.listener.happened(event(number))

    return flood


FLOODS: dict[str, tuple[Callable[[MemoryGuest, ScriptedDevice], None], int]] = {
    # what is done, and how many kinds of events it causes
    "set_configuration": (configurations, 1),
    "reset": (resets, 2),
    "unknown packets": (unknown_packets, 1),
    "receptions without an answer": (unanswerable_receptions, 1),
    "streams without an answer": (unanswerable_streams, 1),
    "filters": (bad_filters, 1),
    "transfers on a device that raises": (raises, 1),
    "settings of a device that raises": (raises_in_a_setting, 1),
    "packets of a stream on a device that raises": (raises_in_a_stream, 1),
    "lock": (reports(lambda number: MediumLocked(locked=number % 2 == 0)), 1),
    "lock two drives": (reports(lambda number: MediumLocked(lun=number % 2, locked=number % 4 < 2)), 2),
    "functions that raise": (reports(lambda number: FunctionRaised("Echo", ValueError(str(number)))), 1),
    "events of another device": (reports(lambda number: Custom()), 1),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood(name: str) -> None:
    flood, count = FLOODS[name]
    device = ScriptedDevice()
    async with MemoryGuest(device, caps=ALL_CAPS & ~(Cap.BULK_RECEIVING | Cap.BULK_STREAMS)) as guest:
        clock = clock_of(guest)
        before = len(guest.events)
        flood(guest, device)
        while not clock.pending:  # a refused packet ends a turn of the event loop
            await asyncio.sleep(0)
        for _ in range(10 * MANY):
            await settle()
            if not guest.redirection._protocol.busy and not guest.redirection._protocol._pump_scheduled:
                break
        during = guest.events[before:]
        assert len(during) <= count * BURST
        clock.advance(INTERVAL)
        everything = guest.events[before:]
        assert len(everything) <= count * (BURST + 2)
        repeated = [event for event in everything if isinstance(event, Repeated)]
        assert 1 <= len(repeated) <= count
        for one in repeated:
            assert everything[everything.index(one) - 1] is one.last
        counted = sum(one.count for one in repeated) + len(everything) - len(repeated)
        assert counted >= MANY, "all are counted"
        device.raises = None
        guest.faults.clear()
        clock.advance(100 * INTERVAL)
        assert guest.events[before:] == everything, "a flood that has ended causes nothing more"
        await guest.set_configuration(1)  # the guest lives
        guest.faults.clear()


def test_every_event_has_a_flood_or_is_bounded() -> None:
    unbounded = {kind.__name__ for kind in events.PortEvent.__subclasses__() if kind.bounded is False}
    assert unbounded == {"Configured", "PortReset", "PeerViolation", "DeviceFault", "Repeated"}
    assert not DeviceReport("p", Custom()).bounded
    assert not DeviceReport("p", MediumLocked(locked=True)).bounded
    assert not DeviceReport("p", FunctionRaised("Echo", ValueError())).bounded
    assert DeviceReport("p", MediumInserted("a.iso")).bounded
    assert DeviceReport("p", MediumEjected("a.iso", by_guest=True)).bounded


def shown(all_events: Iterable[PortEvent]) -> list[PortEvent]:
    return [event for event in all_events if not isinstance(event, Repeated)]


async def test_the_last_event_of_each_kind_is_emitted_in_order() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        clock = clock_of(guest)
        for number in range(MANY):
            await guest.set_configuration(1)
            guest.reset()
            if number % 10 == 0:
                await guest.set_configuration(0)
        await guest.set_configuration(1)
        clock.advance(INTERVAL)
        assert shown(guest.events)[-2:] == [events.PortReset("memory"), events.Configured("memory", 1)]


async def test_what_ends_an_attachment_is_not_held_and_comes_last() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        clock_of(guest)
        for _ in range(MANY):
            await guest.set_configuration(1)
        await guest.redirection.detach()
        *_, last, repeated, detached = guest.events
        assert last == events.Configured("memory", 1)
        assert isinstance(repeated, Repeated)
        assert isinstance(detached, events.Detached)


async def test_a_port_that_is_closed_holds_nothing() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        clock = clock_of(guest)
        guest.send_bytes(struct.pack("<IIQ", 99, 0, 0) * MANY)
        while not clock.pending:  # a refused packet ends a turn of the event loop
            await asyncio.sleep(0)
        await settle()
        guest._end.abort()
        await guest.wait(lambda: isinstance(guest.events[-1], events.Detached))
        assert any(isinstance(event, Repeated) for event in guest.events)
        assert not clock.pending
        assert isinstance(guest.events[-1], events.Detached)
        assert not isinstance(guest.events[-1].error, DeviceError)


async def test_a_device_that_is_attached_again_and_again_is_reported_at_once() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        clock = clock_of(guest)
        for _ in range(2 * BURST):
            await guest.set_configuration(1)
            assert guest.events[-1] == events.Configured("memory", 1)
            await guest.redirection.detach()
            await guest.redirection.attach(device)
        assert not clock.pending
