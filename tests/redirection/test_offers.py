"""The engine finds the best offer that the guest accepts and uses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
from tests.redirection.scripted import BULK_IN, INTERRUPT_IN, ScriptedDevice, kinds, settle

from farplug.errors import Reason, RefusedError
from farplug.redirection import engine, events, offers
from farplug.redirection.events import OfferProblem
from farplug.redirection.offers import ENUMERATION_TIMEOUT, FAILED_ENUMERATIONS, IDLE_TIMEOUT, OfferWatch
from farplug.testing.memory import MemoryGuest
from farplug.usb import Offer, Setup, Speed, Status
from farplug.usb.types import DescriptorType
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap

GET_DEVICE = Setup(0x80, 6, DescriptorType.DEVICE << 8, 0, 18)
GET_CONFIGURATION = Setup(0x80, 6, DescriptorType.CONFIGURATION << 8, 0, 9)
GET_LANGUAGES = Setup(0x80, 6, DescriptorType.STRING << 8, 0, 255)
GET_SERIAL_NUMBER = Setup(0x80, 6, DescriptorType.STRING << 8 | 3, 0x0409, 255)
CLEAR_HALT = Setup(0x02, 1, 0, 0x81, 0)
GET_MAX_LUN = Setup(0xA1, 0xFE, 0, 0, 1)
VENDOR_REQUEST = Setup(0xC0, 0x20, 0, 4, 16)

FAST, SLOW = Offer(Speed.SUPER), Offer(Speed.HIGH)
FAST_LESS, SLOW_LESS = Offer(Speed.SUPER, "legs"), Offer(Speed.HIGH, "legs")


# OfferWatch, with a clock ---------------------------------------------------------------------------------------------


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[_Timer] = []

    def call_later(self, seconds: float, call: Callable[[OfferProblem], None], problem: OfferProblem) -> _Timer:
        timer = _Timer(self.now + seconds, call, problem)
        self._timers.append(timer)
        return timer

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for timer in self._timers:
            if timer.due <= self.now and not timer.over:
                timer.over = True
                timer.call(timer.problem)


@dataclass
class _Timer:
    due: float
    call: Callable[[OfferProblem], None]
    problem: OfferProblem
    over: bool = False

    def cancel(self) -> None:
        self.over = True


class Watched:
    """A watch, its clock, and the problems that the watch reported."""

    def __init__(self, *, used_at_once: bool = True) -> None:
        self.clock = Clock()
        self.problems: list[OfferProblem] = []
        self.watch = OfferWatch(self.problems.append, self.clock.call_later)
        self.device = Optional(used_at_once=used_at_once)
        self.watch.start(self.device)

    def enumerate(self, *setups: Setup, configure: bool = True) -> None:
        """Do what a guest does with a device after a reset."""
        self.watch.port_reset()
        self.request(GET_DEVICE, GET_CONFIGURATION, *setups)
        if configure:
            self.watch.configured(1)

    def request(self, *setups: Setup) -> None:
        for setup in setups:
            self.watch.requested(setup)


class Optional(ScriptedDevice):
    """A device with an optional part."""

    def __init__(
        self, offers: Sequence[Offer] = (FAST, FAST_LESS, SLOW, SLOW_LESS), *, used_at_once: bool = True
    ) -> None:
        super().__init__([offer.speed for offer in offers])
        self._offers = offers
        self._offer = offers[0]
        self._used_at_once = used_at_once

    @property
    def offers(self) -> Sequence[Offer]:
        return self._offers

    @property
    def offer(self) -> Offer:
        return self._offer

    @property
    def used_at_once(self) -> bool:
        return self._used_at_once

    def select(self, offer: Offer) -> None:
        super().select(offer)
        self._offer = offer


def test_a_guest_that_reads_no_descriptor_has_no_problem() -> None:
    one = Watched()
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.watch.port_reset()  # firmware resets all ports
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.request(GET_DEVICE)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.problems == []


def test_configured_and_not_used() -> None:
    one = Watched()
    one.enumerate(GET_LANGUAGES, GET_SERIAL_NUMBER)
    one.clock.sleep(IDLE_TIMEOUT - 0.1)
    assert one.problems == []
    one.request(GET_SERIAL_NUMBER, CLEAR_HALT)  # a request: the timeout starts again
    one.clock.sleep(IDLE_TIMEOUT - 0.1)
    assert one.problems == []
    one.clock.sleep(0.1)
    assert one.problems == [OfferProblem.NOT_USED]
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.problems == [OfferProblem.NOT_USED]


def test_read_and_not_configured() -> None:
    one = Watched()
    one.enumerate(configure=False)
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.problems == [OfferProblem.NOT_CONFIGURED]


def test_unconfigured_by_the_guest() -> None:
    one = Watched()
    one.enumerate()
    one.watch.configured(0)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.problems == []


@pytest.mark.parametrize("use", [OfferWatch.used, lambda watch: watch.requested(GET_MAX_LUN),
                                 lambda watch: watch.requested(VENDOR_REQUEST)])  # fmt: skip
def test_used_once_is_used(use: Callable[[OfferWatch], None]) -> None:
    """Firmware reads one block and shows a menu; a system mounts the disk, and then sends no more requests."""
    one = Watched()
    one.enumerate(GET_LANGUAGES)
    use(one.watch)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.request(GET_LANGUAGES, GET_SERIAL_NUMBER)  # as lsusb does
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    for _ in range(3):  # a driver resets the port, and then sends no requests
        one.enumerate(GET_SERIAL_NUMBER)
        one.clock.sleep(1000 * IDLE_TIMEOUT)
        one.request(GET_LANGUAGES)
        one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.problems == []


def test_a_vendor_request_before_the_configuration_is_not_use() -> None:
    one = Watched()
    one.enumerate(VENDOR_REQUEST)  # Windows reads its own descriptors
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.problems == [OfferProblem.NOT_USED]


def test_the_next_system_may_not_use_what_firmware_used() -> None:
    one = Watched()
    one.enumerate()
    one.watch.used()
    one.enumerate(GET_LANGUAGES)
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.problems == [OfferProblem.NOT_USED]


def test_a_boot_loader_may_not_configure_what_firmware_used() -> None:
    one = Watched()
    one.enumerate()
    one.watch.used()
    one.enumerate(configure=False)
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.problems == [OfferProblem.NOT_CONFIGURED]


def test_the_device_is_detached_or_reset_meanwhile() -> None:
    one = Watched()
    for end in (one.watch.stop, one.watch.port_reset, lambda: one.watch.start(one.device)):
        one.watch.start(one.device)
        one.enumerate()
        end()
        one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.problems == []


def test_a_device_that_is_not_used_at_once_keeps_its_offer() -> None:
    one = Watched(used_at_once=False)
    one.enumerate(GET_LANGUAGES)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.enumerate(configure=False)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.problems == []
    for _ in range(FAILED_ENUMERATIONS + 1):  # but the guest must accept its speed
        one.watch.port_reset()
        one.request(GET_DEVICE)
    one.clock.sleep(ENUMERATION_TIMEOUT)
    assert one.problems == [OfferProblem.SPEED]


# With a guest ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeout; a busy machine must not turn the guest's next step into idleness."""
    monkeypatch.setattr(offers, "IDLE_TIMEOUT", 0.3)


async def _look(guest: MemoryGuest, device: ScriptedDevice, *setups: Setup) -> None:
    for setup in setups:
        looked = asyncio.ensure_future(guest.control_in(setup))
        await settle()
        device.submitted[-1].complete(Status.SUCCESS, b"x" * 9)
        await looked


async def _until(guest: MemoryGuest, count: int) -> None:
    """Wait until the device was attached ``count`` times."""
    await guest.wait(lambda: kinds(guest).count(events.Attached) == count)
    await guest.wait(lambda: guest.connected is not None)


def _steps(guest: MemoryGuest) -> list[tuple[OfferProblem, Offer]]:
    return [(event.why, event.offer) for event in guest.events if isinstance(event, events.OfferChanged)]


@pytest.mark.usefixtures("at_once")
async def test_a_guest_without_a_driver_gets_each_offer_and_then_the_best_again() -> None:
    async with MemoryGuest(device := Optional()) as guest:
        for count in (2, 3, 4):
            await guest.set_configuration(1)
            await _until(guest, count)
        assert _steps(guest) == [
            (OfferProblem.NOT_USED, FAST_LESS), (OfferProblem.NOT_USED, SLOW_LESS), (OfferProblem.ALL, FAST),
        ]  # fmt: skip
        assert device.offer == FAST
        await guest.set_configuration(1)
        await asyncio.sleep(0.7)  # longer than the timeout
        assert len(_steps(guest)) == 3


@pytest.mark.usefixtures("at_once")
async def test_a_guest_that_does_not_configure_the_device_gets_a_lower_speed_first() -> None:
    async with MemoryGuest(device := Optional()) as guest:
        for count in (2, 3, 4):
            await _look(guest, device, GET_DEVICE, GET_CONFIGURATION)
            await _until(guest, count)
        assert _steps(guest) == [
            (OfferProblem.NOT_CONFIGURED, SLOW), (OfferProblem.NOT_CONFIGURED, SLOW_LESS), (OfferProblem.ALL, FAST),
        ]  # fmt: skip


@pytest.mark.usefixtures("at_once")
async def test_a_speed_that_the_port_does_not_support_is_not_offered_again() -> None:
    async with MemoryGuest(device := Optional()) as guest:
        guest.send(packets.FilterReject())
        await _until(guest, 2)
        for count in (3, 4):
            await guest.set_configuration(1)
            await _until(guest, count)
        assert _steps(guest) == [
            (OfferProblem.SPEED, SLOW),
            (OfferProblem.NOT_USED, SLOW_LESS),
            (OfferProblem.ALL, SLOW),
        ]
        guest.send(packets.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await guest.redirection.detach()
        await guest.redirection.attach(device)  # another port may support more
        assert device.offer == FAST


@pytest.mark.usefixtures("at_once")
async def test_a_device_with_one_offer_keeps_it() -> None:
    async with MemoryGuest(device := Optional((FAST,))) as guest:
        await _look(guest, device, GET_DEVICE, GET_CONFIGURATION)
        await asyncio.sleep(0.7)  # longer than the timeout
        await guest.set_configuration(1)
        await asyncio.sleep(0.7)  # longer than the timeout
        assert _steps(guest) == []


async def _bulk(guest: MemoryGuest) -> None:
    guest.submit_in(BULK_IN, 512)


async def _interrupt(guest: MemoryGuest) -> None:
    guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))


async def _setting(guest: MemoryGuest) -> None:
    await guest.set_interface(0, 1)


@pytest.mark.parametrize("use", [_bulk, _interrupt, _setting])
@pytest.mark.usefixtures("at_once")
async def test_a_device_in_use_keeps_its_offer(use: Callable[[MemoryGuest], Awaitable[None]]) -> None:
    async with MemoryGuest(Optional()) as guest:
        await guest.set_configuration(1)
        await use(guest)
        await asyncio.sleep(0.7)  # longer than the timeout
        assert _steps(guest) == []


class Pausing(MemoryGuest):
    """A guest that does not acknowledge a disconnect while its VM is paused."""

    runs = True

    def send(self, *sent: packets.Packet) -> None:
        super().send(*(one for one in sent if self.runs or not isinstance(one, packets.DeviceDisconnectAck)))


@pytest.mark.usefixtures("at_once")
async def test_a_paused_vm_gets_the_next_offer_when_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.02)
    async with Pausing(device := Optional()) as guest:
        await guest.set_configuration(1)
        guest.runs = False
        await guest.wait(lambda: guest.connected is None)
        await asyncio.sleep(0.1)  # longer than the timeout of a detach
        assert device.offer == FAST
        assert guest.redirection.state is engine.State.DISCONNECTING
        guest.runs = True
        guest.send(packets.DeviceDisconnectAck())
        await _until(guest, 2)
        assert device.offer == FAST_LESS


@pytest.mark.usefixtures("at_once")
async def test_a_device_is_detached_while_a_paused_vm_is_to_get_the_next_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.02)
    async with Pausing(device := Optional()) as guest:
        await guest.set_configuration(1)
        guest.runs = False
        await guest.wait(lambda: guest.connected is None)
        await asyncio.sleep(0.1)
        await guest.redirection.detach()
        assert device.calls[-1] == "close"
        assert guest.redirection.device is None
        assert kinds(guest)[-1] is events.Detached


async def test_refused_at_one_speed_offered_at_the_next() -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        guest.send(packets.FilterReject())
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.HIGH)
        guest.send(packets.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await settle()
        assert kinds(guest)[1:] == [
            events.Attached, events.OfferChanged, events.Attached, events.Refused, events.Detached,
        ]  # fmt: skip


class Streaming(Optional):
    """A device with streams at SuperSpeed, in its optional part."""

    @property
    def has_streams(self) -> bool:
        return self.offer == FAST


@pytest.mark.parametrize(
    ("offers", "steps"),
    [
        ((FAST, FAST_LESS, SLOW, SLOW_LESS), [(OfferProblem.STREAMS, SLOW)]),
        ((FAST, FAST_LESS), [(OfferProblem.STREAMS, FAST_LESS)]),
    ],
)
async def test_a_guest_without_streams_is_offered_none(
    offers: Sequence[Offer], steps: list[tuple[OfferProblem, Offer]]
) -> None:
    async with MemoryGuest(Streaming(offers)) as guest:
        assert _steps(guest) == []
    async with MemoryGuest(device := Streaming(offers), caps=ALL_CAPS & ~Cap.BULK_STREAMS) as guest:
        assert _steps(guest) == steps
        assert guest.connected is not None
        assert guest.connected.speed == device.offer.speed


async def test_a_device_that_needs_streams_is_refused_to_a_guest_without() -> None:
    device = Streaming((FAST,))
    async with MemoryGuest(caps=ALL_CAPS & ~Cap.BULK_STREAMS) as guest:
        with pytest.raises(RefusedError, match="has no bulk streams, but 1209:") as caught:
            await guest.redirection.attach(device)
        assert caught.value.reason is Reason.CAPABILITY
        assert (caught.value.remedy.setting, caught.value.remedy.value) == ("storage.usb_storage", "bot")
        assert device.calls == []


async def test_a_guest_that_rejects_super_speed_gets_high_speed() -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        for _ in range(FAILED_ENUMERATIONS):
            await _look(guest, device, GET_DEVICE)
            guest.reset()
        await _look(guest, device, GET_DEVICE)
        assert events.OfferChanged not in kinds(guest)  # the guest may still continue
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.HIGH)
        assert device.identity.speed == Speed.HIGH
        for _ in range(FAILED_ENUMERATIONS + 1):  # there is no lower speed: the offer stays
            guest.reset()
            await _look(guest, device, GET_DEVICE)
        await asyncio.sleep(2 * ENUMERATION_TIMEOUT)
        assert kinds(guest).count(events.OfferChanged) == 1
        await guest.redirection.detach()
        await guest.redirection.attach(device)
        # Another port may support more.
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.SUPER)


async def test_resets_of_a_guest_that_accepts_the_speed_change_no_offer() -> None:
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
        await asyncio.sleep(2 * ENUMERATION_TIMEOUT)
        assert events.OfferChanged not in kinds(guest)


async def _unplug(guest: MemoryGuest) -> None:
    await guest.redirection.detach()


async def _vanish(guest: MemoryGuest) -> None:
    guest._end.abort()
    await guest.redirection.closed()


@pytest.mark.parametrize("leave", [_unplug, _vanish])
async def test_detach_while_the_offer_changes(leave: Callable[[MemoryGuest], Awaitable[None]]) -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        guest.send(packets.FilterReject())
        await guest.wait(lambda: events.OfferChanged in kinds(guest))
        await leave(guest)
        assert guest.redirection.device is None
        assert kinds(guest)[-1] is events.Detached
        assert device.calls[-1] == "close"
