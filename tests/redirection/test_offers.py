"""The best offer that the guest can take."""

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
from farplug.usbredir import packets as p
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


# The policy, with a clock ---------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test moves."""

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
    """A watch, the clock, and the signs that came."""

    def __init__(self, *, used_at_once: bool = True) -> None:
        self.clock = Clock()
        self.signs: list[OfferProblem] = []
        self.watch = OfferWatch(self.signs.append, self.clock.call_later)
        self.device = Optional(used_at_once=used_at_once)
        self.watch.start(self.device)

    def enumerate(self, *setups: Setup, configure: bool = True) -> None:
        """What a guest does with a device after a reset."""
        self.watch.port_reset()
        self.ask(GET_DEVICE, GET_CONFIGURATION, *setups)
        if configure:
            self.watch.configured(1)

    def ask(self, *setups: Setup) -> None:
        for setup in setups:
            self.watch.requested(setup)


class Optional(ScriptedDevice):
    """A device with a part that it can leave out."""

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


def test_a_guest_that_never_looked_is_waited_for() -> None:
    one = Watched()
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.watch.port_reset()  # firmware resets ports of which it knows nothing
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.ask(GET_DEVICE)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.signs == []


def test_configured_and_left_alone() -> None:
    one = Watched()
    one.enumerate(GET_LANGUAGES, GET_SERIAL_NUMBER)
    one.clock.sleep(IDLE_TIMEOUT - 0.1)
    assert one.signs == []
    one.ask(GET_SERIAL_NUMBER, CLEAR_HALT)  # it is looked at: the silence begins again
    one.clock.sleep(IDLE_TIMEOUT - 0.1)
    assert one.signs == []
    one.clock.sleep(0.1)
    assert one.signs == [OfferProblem.NOT_USED]
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.signs == [OfferProblem.NOT_USED]


def test_looked_at_and_not_configured() -> None:
    one = Watched()
    one.enumerate(configure=False)
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.signs == [OfferProblem.NOT_CONFIGURED]


def test_given_up_on_purpose() -> None:
    one = Watched()
    one.enumerate()
    one.watch.configured(0)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.signs == []


@pytest.mark.parametrize("use", [OfferWatch.used, lambda watch: watch.requested(GET_MAX_LUN),
                                 lambda watch: watch.requested(VENDOR_REQUEST)])  # fmt: skip
def test_used_once_is_used(use: Callable[[OfferWatch], None]) -> None:
    """Firmware reads one block and waits at a menu; a system has mounted the disk, and does nothing else with it."""
    one = Watched()
    one.enumerate(GET_LANGUAGES)
    use(one.watch)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.ask(GET_LANGUAGES, GET_SERIAL_NUMBER)  # as lsusb does
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    for _ in range(3):  # a driver resets the port, and has nothing to do for the device then
        one.enumerate(GET_SERIAL_NUMBER)
        one.clock.sleep(1000 * IDLE_TIMEOUT)
        one.ask(GET_LANGUAGES)
        one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.signs == []


def test_a_class_request_before_the_configuration_is_no_use() -> None:
    one = Watched()
    one.enumerate(VENDOR_REQUEST)  # Windows asks for its own descriptors
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.signs == [OfferProblem.NOT_USED]


def test_what_firmware_used_the_next_system_may_not_understand() -> None:
    one = Watched()
    one.enumerate()
    one.watch.used()
    one.enumerate(GET_LANGUAGES)
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.signs == [OfferProblem.NOT_USED]


def test_what_firmware_used_a_boot_loader_may_not_configure() -> None:
    one = Watched()
    one.enumerate()
    one.watch.used()
    one.enumerate(configure=False)
    one.clock.sleep(IDLE_TIMEOUT)
    assert one.signs == [OfferProblem.NOT_CONFIGURED]


def test_the_device_leaves_or_is_reset_meanwhile() -> None:
    one = Watched()
    for end in (one.watch.stop, one.watch.port_reset, lambda: one.watch.start(one.device)):
        one.watch.start(one.device)
        one.enumerate()
        end()
        one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.signs == []


def test_a_device_that_waits_for_a_program_is_left_alone() -> None:
    one = Watched(used_at_once=False)
    one.enumerate(GET_LANGUAGES)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    one.enumerate(configure=False)
    one.clock.sleep(1000 * IDLE_TIMEOUT)
    assert one.signs == []
    for _ in range(FAILED_ENUMERATIONS + 1):  # but it must be understood
        one.watch.port_reset()
        one.ask(GET_DEVICE)
    one.clock.sleep(ENUMERATION_TIMEOUT)
    assert one.signs == [OfferProblem.SPEED]


# In a guest -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for silence."""
    monkeypatch.setattr(offers, "IDLE_TIMEOUT", 0.01)


async def _look(guest: MemoryGuest, device: ScriptedDevice, *setups: Setup) -> None:
    for setup in setups:
        looked = asyncio.ensure_future(guest.control_in(setup))
        await settle()
        device.submitted[-1].complete(Status.SUCCESS, b"x" * 9)
        await looked


async def _until(guest: MemoryGuest, count: int) -> None:
    """Wait until the device was attached so often."""
    await guest.wait(lambda: kinds(guest).count(events.Attached) == count)
    await guest.wait(lambda: guest.connected is not None)


def _steps(guest: MemoryGuest) -> list[tuple[OfferProblem, Offer]]:
    return [(event.why, event.offer) for event in guest.events if isinstance(event, events.OfferChanged)]


@pytest.mark.usefixtures("at_once")
async def test_a_guest_without_a_driver_is_offered_less_and_less_and_then_everything() -> None:
    async with MemoryGuest(device := Optional()) as guest:
        for count in (2, 3, 4):
            await guest.set_configuration(1)
            await _until(guest, count)
        assert _steps(guest) == [
            (OfferProblem.NOT_USED, FAST_LESS), (OfferProblem.NOT_USED, SLOW_LESS), (OfferProblem.ALL, FAST),
        ]  # fmt: skip
        assert device.offer == FAST
        await guest.set_configuration(1)
        await asyncio.sleep(0.05)
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
async def test_what_the_port_cannot_take_is_not_offered_again() -> None:
    async with MemoryGuest(device := Optional()) as guest:
        guest.send(p.FilterReject())
        await _until(guest, 2)
        for count in (3, 4):
            await guest.set_configuration(1)
            await _until(guest, count)
        assert _steps(guest) == [
            (OfferProblem.SPEED, SLOW),
            (OfferProblem.NOT_USED, SLOW_LESS),
            (OfferProblem.ALL, SLOW),
        ]
        guest.send(p.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await guest.redirection.detach()
        await guest.redirection.attach(device)  # another port may take more
        assert device.offer == FAST


@pytest.mark.usefixtures("at_once")
async def test_one_offer_stays() -> None:
    async with MemoryGuest(device := Optional((FAST,))) as guest:
        await _look(guest, device, GET_DEVICE, GET_CONFIGURATION)
        await asyncio.sleep(0.05)
        await guest.set_configuration(1)
        await asyncio.sleep(0.05)
        assert _steps(guest) == []


async def _bulk(guest: MemoryGuest) -> None:
    guest.submit_in(BULK_IN, 512)


async def _interrupt(guest: MemoryGuest) -> None:
    guest.send(p.StartInterruptReceiving(endpoint=INTERRUPT_IN))


async def _setting(guest: MemoryGuest) -> None:
    await guest.set_interface(0, 1)


@pytest.mark.parametrize("use", [_bulk, _interrupt, _setting])
@pytest.mark.usefixtures("at_once")
async def test_a_device_in_use_stays(use: Callable[[MemoryGuest], Awaitable[None]]) -> None:
    async with MemoryGuest(Optional()) as guest:
        await guest.set_configuration(1)
        await use(guest)
        await asyncio.sleep(0.05)
        assert _steps(guest) == []


class Pausing(MemoryGuest):
    """A guest whose acknowledgement does not come while its VM is paused."""

    runs = True

    def send(self, *packets: p.Packet) -> None:
        super().send(*(one for one in packets if self.runs or not isinstance(one, p.DeviceDisconnectAck)))


@pytest.mark.usefixtures("at_once")
async def test_a_vm_that_is_paused_gets_the_other_offer_when_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.02)
    async with Pausing(device := Optional()) as guest:
        await guest.set_configuration(1)
        guest.runs = False
        await guest.wait(lambda: guest.connected is None)
        await asyncio.sleep(0.1)  # the guest has not answered, and nobody waits for it
        assert device.offer == FAST
        assert guest.redirection.state is engine.State.DISCONNECTING
        guest.runs = True
        guest.send(p.DeviceDisconnectAck())
        await _until(guest, 2)
        assert device.offer == FAST_LESS


@pytest.mark.usefixtures("at_once")
async def test_taken_from_a_vm_that_is_paused_while_it_is_to_be_offered_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
        guest.send(p.FilterReject())
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.HIGH)
        guest.send(p.FilterReject())
        await guest.wait(lambda: guest.connected is None)
        await settle()
        assert kinds(guest)[1:] == [
            events.Attached, events.OfferChanged, events.Attached, events.Refused, events.Detached,
        ]  # fmt: skip


class Streaming(Optional):
    """Has streams at SuperSpeed, in its optional part."""

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
        with pytest.raises(RefusedError, match="has no bulk streams, which 1209:") as caught:
            await guest.redirection.attach(device)
        assert caught.value.reason is Reason.CAPABILITY
        assert device.calls == []


async def test_a_guest_that_does_not_understand_super_speed_gets_high_speed() -> None:
    device = ScriptedDevice((Speed.SUPER, Speed.HIGH))
    async with MemoryGuest(device) as guest:
        for _ in range(FAILED_ENUMERATIONS):
            await _look(guest, device, GET_DEVICE)
            guest.reset()
        await _look(guest, device, GET_DEVICE)
        assert events.OfferChanged not in kinds(guest)  # it might go on yet
        await guest.wait(lambda: guest.connected is not None and guest.connected.speed == Speed.HIGH)
        assert device.identity.speed == Speed.HIGH
        for _ in range(FAILED_ENUMERATIONS + 1):  # there is nothing lower: no further try
            guest.reset()
            await _look(guest, device, GET_DEVICE)
        await asyncio.sleep(2 * ENUMERATION_TIMEOUT)
        assert kinds(guest).count(events.OfferChanged) == 1
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
        await asyncio.sleep(2 * ENUMERATION_TIMEOUT)
        assert events.OfferChanged not in kinds(guest)


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
        await guest.wait(lambda: events.OfferChanged in kinds(guest))
        await leave(guest)
        assert guest.redirection.device is None
        assert kinds(guest)[-1] is events.Detached
        assert device.calls[-1] == "close"
