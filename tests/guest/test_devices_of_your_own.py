"""Devices made with the kit, used by Linux: a keyboard, pointers, endpoints of every type, in one composite device."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import string
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from tests.guest.plugging import (
    FUNCTIONS,
    GUEST_TIMEOUT,
    beside,
    comes,
    plugged,
    raw,
    until,
    usb_folder,
    usb_node,
)
from tests.leaks import Left, no_more_than
from tests.long import ATTACH_ROUNDS

from farplug.testing import QemuGuest, SpicePort, TcpPort
from farplug.usb import Setup, Speed
from farplug.virtual import (
    AsyncFunction,
    Detached,
    Setting,
    VirtualDevice,
    bulk_in,
    bulk_out,
    control_in,
    interrupt_in,
    isochronous_in,
    isochronous_out,
)
from farplug.virtual.hid import Button, Gamepad, Key, Keyboard, Led, Mouse, Tablet

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

GUEST = replace(FUNCTIONS, ports=(TcpPort(), SpicePort()))
"""A guest that has only input devices, here and in ``test_typing.py``."""

Event: TypeAlias = tuple[int, int, int]

EV_KEY, EV_REL, EV_ABS = 1, 2, 3
REL_X, REL_Y, REL_WHEEL = 0, 1, 8
ABS_X, ABS_Y = 0, 1
KEY_ESC, KEY_LEFTSHIFT, BTN_LEFT, BTN_EXTRA = 1, 42, 0x110, 0x114
LOCKS = (KEY_ESC, 58, 69)
"""Keys that are not characters: Escape, Caps Lock, Num Lock, which confirms."""

ROWS = (
    (2, "1234567890-=", "!@#$%^&*()_+"),
    (15, "\tqwertyuiop[]\n", "\tQWERTYUIOP{}\n"),
    (30, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
    (43, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (57, " ", " "),
)
CHARACTERS = {first + place: pair for first, *rows in ROWS for place, pair in enumerate(zip(*rows, strict=True))}
"""The characters of Linux's key codes on a US keyboard, without and with Shift."""

KEYBOARD, TABLET, MOUSE, LOOPBACK, SAMPLER = range(5)
"""The interfaces of the composite device."""


class Loopback(AsyncFunction):
    received = bulk_out()
    sent = bulk_in()
    alive = 0

    async def run(self) -> None:
        self.alive += 1
        try:
            async for data in self.received:
                await self.sent.write(data)
        finally:
            self.alive -= 1

    @control_in(0x42)
    async def answer(self, setup: Setup) -> bytes:
        await asyncio.sleep(0.001)
        return b"forty-two"


class Sampler(AsyncFunction):
    """Numbers its packets in both periodic transfer types, and keeps what it is sent."""

    settings = (Setting(), Setting(alternate=1))
    ticks = interrupt_in(8, microseconds=4000)
    samples = isochronous_in(64, alternate=1)
    played = isochronous_out(64, alternate=1)

    def __init__(self) -> None:
        self.packets: list[bytes] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sample())
            async for packet in self.played:
                self.packets.append(packet)

    async def sample(self) -> None:
        number = 0
        while True:
            number += await self.samples.write(number.to_bytes(4, "little"))


class Everything:
    """The functions of a composite device."""

    def __init__(self, speed: Speed = Speed.HIGH) -> None:
        self.keyboard, self.tablet, self.mouse = Keyboard(), Tablet(), Mouse()
        self.loopback, self.sampler = Loopback(), Sampler()
        self.device = VirtualDevice(
            *(self.keyboard, self.tablet, self.mouse, self.loopback, self.sampler),
            vendor_id=0x1209,
            product_id=0x0001,
            product="Everything",
            speeds=(speed,),
            landing_page="https://example.org/",
        )


@asynccontextmanager
async def reading(
    guest: QemuGuest, interface: int, last: int, task: asyncio.Future[Any] | None = None
) -> AsyncIterator[list[Event]]:
    """Collect the events of an input device, from when it is open until the key with the code ``last`` is released.

    If ``task``, which causes the events, fails before, its error is raised.
    """
    output = f"/tmp/events-{interface}"
    # The shell may return before the program behind it has opened the file: an earlier one must not be there.
    await guest.check(f"rm -f {output}; python3 /scripts/input_events.py :1.{interface}/ {last} >{output} 2>&1 &")
    await shows(guest, output, 1, task)
    events: list[Event] = []
    yield events
    lines = await shows(guest, output, 2, task)
    assert lines[1].startswith("["), await guest.check(f"cat {output}")
    events += [tuple(event) for event in json.loads(lines[1])]


async def shows(guest: QemuGuest, path: str, lines: int, task: asyncio.Future[Any] | None = None) -> list[str]:
    """Return the lines of a file once it has them."""
    waiting = until(guest, f"[ -e {path} ] && [ $(wc -l <{path}) -ge {lines} ]")
    await (waiting if task is None else beside(task, waiting))
    return (await guest.check(f"cat {path}")).splitlines()


async def bound(guest: QemuGuest) -> None:
    """Wait until Linux has a driver for the keyboard and both pointers.

    Linux reads their descriptors on the thread of its hubs. QEMU's xHCI does not complete a request of a device that
    was unplugged, so a device that is unplugged meanwhile blocks the hubs until the requests time out, 5 s each.
    """
    await has_inputs(guest, 3)


async def has_inputs(guest: QemuGuest, count: int) -> None:
    """Wait until Linux has a driver for each of ``count`` functions; 0: it has taken note that all were unplugged.

    The shell looks itself: in an emulated guest a program takes longer to begin than Linux to bind a driver.
    """
    condition = "[ -e $1 ]" if count else "[ ! -e $1 ]"
    await until(guest, f"set -- /sys/bus/hid/devices/*:1209:0001.*/input/input*; {condition} && [ $# -ge {count} ]")


def text_of(events: list[Event]) -> str:
    """Return what was typed. A key that repeats is typed again."""
    shift, typed = 0, ""
    for kind, code, value in events:
        if kind == EV_KEY and code == KEY_LEFTSHIFT:
            shift = value
        elif kind == EV_KEY and value and code not in LOCKS:
            typed += CHARACTERS[code][shift]
    return typed


async def quiet_guest(guests: Guests) -> QemuGuest:
    """Return the guest without devices and kernel messages of earlier tests, some of which provoke complaints."""
    guest = await guests.get(GUEST)
    await until(guest, "! busybox grep -qsx farplug /sys/bus/usb/devices/*/manufacturer")
    await guest.check("dmesg -c >/dev/null")
    return guest


async def trouble(guest: QemuGuest) -> str:
    """Return the kernel's complaints since :func:`quiet_guest`."""
    return await guest.check("dmesg | grep -E 'BUG|WARNING|Oops|Call Trace|usb.*(error|failed|timed out)'; :")


@pytest.mark.parametrize("port", [0, 1], ids=["tcp", "spice"])
async def test_a_text_arrives_and_is_confirmed(guests: Guests, port: int) -> None:
    guest = await quiet_guest(guests)
    everything = Everything()
    keyboard = everything.keyboard
    text = "".join(
        random.Random(port).choices(string.ascii_letters + string.digits + string.punctuation + " \n\t", k=1000)
    )
    async with plugged(guest.targets[port], everything.device):
        async with reading(guest, KEYBOARD, KEY_ESC) as events:
            assert await keyboard.type_text(text)
            await keyboard.tap(Key.ESCAPE)
        assert text_of(events) == text
        assert not keyboard.boot_protocol
        before = keyboard.leds
        await keyboard.tap(Key.CAPS_LOCK)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while keyboard.leds == before:
                await asyncio.sleep(0.01)
        assert keyboard.leds ^ before == Led.CAPS_LOCK
        async with reading(guest, KEYBOARD, KEY_ESC) as events:
            assert await keyboard.type_text("Caps Lock is on")
            await keyboard.tap(Key.ESCAPE)
        assert text_of(events) == "Caps Lock is on"  # it was off meanwhile
        assert keyboard.leds ^ before == Led.CAPS_LOCK
        await keyboard.tap(Key.CAPS_LOCK)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while keyboard.leds != before:
                await asyncio.sleep(0.01)
    assert await trouble(guest) == ""


async def test_pointers(guests: Guests) -> None:
    guest = await quiet_guest(guests)
    everything = Everything()
    async with plugged(guest.targets[0], everything.device):
        tablet, mouse = everything.tablet, everything.mouse
        async with reading(guest, TABLET, BTN_EXTRA) as events:
            for place in range(1, 301):
                await tablet.move_to(place, 32767 - place)
            await tablet.click()
            await tablet.scroll(-2)
            await tablet.click(Button.EXTRA)
        assert [value for kind, code, value in events if (kind, code) == (EV_ABS, ABS_X)] == list(range(1, 301))
        assert [value for kind, code, value in events if (kind, code) == (EV_ABS, ABS_Y)][-1] == 32767 - 300
        assert [(code, value) for kind, code, value in events if kind == EV_KEY][:2] == [(BTN_LEFT, 1), (BTN_LEFT, 0)]
        assert [value for kind, code, value in events if (kind, code) == (EV_REL, REL_WHEEL)] == [-2]
        async with reading(guest, MOUSE, BTN_EXTRA) as events:
            await mouse.move(300, -1000)
            await mouse.scroll(1)
            await mouse.click(Button.EXTRA)
        moved = {axis: sum(v for kind, code, v in events if (kind, code) == (EV_REL, axis)) for axis in (REL_X, REL_Y)}
        assert moved == {REL_X: 300, REL_Y: -1000}
    assert await trouble(guest) == ""


@pytest.mark.parametrize("speed", [Speed.HIGH, Speed.SUPER], ids=str)
async def test_endpoints_of_every_type(guests: Guests, speed: Speed) -> None:
    guest = await quiet_guest(guests)
    everything = Everything(speed)
    sampler = everything.sampler
    async with plugged(guest.targets[0], everything.device):
        node = await usb_node(guest, await usb_folder(guest, everything.device))
        out, into = everything.loopback.received.address_in_device, everything.loopback.sent.address_in_device
        data = random.Random(0).randbytes(100_000)
        results = await raw(
            guest,
            node,
            ("control", "c042000000004000"),
            ("claim", LOOPBACK),
            *[
                operation
                for start in range(0, len(data), 10_000)
                for operation in (("send", out, data[start : start + 10_000]), ("receive", into, 10_001))
            ],
        )
        assert results[0] == b"forty-two"
        assert b"".join(result for result in results[3::2] if isinstance(result, bytes)) == data
        played = [number.to_bytes(4, "little") for number in range(200)]
        samples, speaker = sampler.samples.address_in_device, sampler.played.address_in_device
        *_, recorded, _ = await raw(
            guest,
            node,
            ("claim", SAMPLER),
            ("set_interface", SAMPLER, 1),
            ("listen", samples, 64, 8, 4, 500),
            ("play", speaker, 8, 4, *played),
        )
        assert isinstance(recorded, bytes)
        numbers = [int.from_bytes(recorded[start + 2 : start + 6], "little") for start in range(0, len(recorded), 6)]
        assert len(numbers) >= 500
        assert all(after - before > 0 for before, after in itertools.pairwise(numbers)), numbers
        async with asyncio.timeout(GUEST_TIMEOUT):
            while not sampler.packets or sampler.packets[-1] != played[-1]:
                await asyncio.sleep(0.05)
        assert sampler.packets == played
    assert await trouble(guest) == ""


async def test_detach_in_the_middle_of_a_text(guests: Guests) -> None:
    guest = await quiet_guest(guests)
    everything = Everything()
    keyboard = everything.keyboard
    for _ in range(2):  # the same device is plugged in again
        async with plugged(guest.targets[0], everything.device):
            await bound(guest)
            typing = asyncio.ensure_future(keyboard.type_text("x" * 100_000))
            async with reading(guest, KEYBOARD, 45, typing):  # KEY_X
                pass
            assert not typing.done()
        with pytest.raises(Detached):
            await typing
        assert everything.loopback.alive == 0
        with pytest.raises(Detached):
            await keyboard.tap(Key.A)
    async with plugged(guest.targets[0], everything.device), reading(guest, KEYBOARD, KEY_ESC) as events:
        await keyboard.type_text("it works")
        await keyboard.tap(Key.ESCAPE)
    assert text_of(events) == "it works"
    assert await trouble(guest) == ""


def objects() -> Counter[str]:
    """Return how many objects of farplug there are, by class."""
    gc.collect()
    kinds = (type(one) for one in gc.get_objects())
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if kind.__module__.startswith("farplug."))


async def test_rounds_of_attach_and_detach_leak_nothing(guests: Guests) -> None:
    """Plug two devices in and out: Linux serves the hub of each speed on its own, so both at a time."""
    guest = await quiet_guest(guests)
    keyboards = Keyboard(), Keyboard()
    devices = [
        VirtualDevice(
            *(keyboard, Tablet(), Gamepad()), vendor_id=0x1209, product_id=0x0001, product="Inputs", speeds=(speed,)
        )
        for keyboard, speed in zip(keyboards, (Speed.HIGH, Speed.SUPER), strict=True)
    ]
    before: tuple[Left, Counter[str]] | None = None
    for number in range(ATTACH_ROUNDS):
        async with AsyncExitStack() as stack:
            targets = guest.targets if number % 2 else reversed(guest.targets)
            places = zip(targets, devices, strict=True)
            await asyncio.gather(*(stack.enter_async_context(plugged(*place)) for place in places))
            await has_inputs(guest, 6)
            if number % 10 == 0:
                assert await keyboards[0].confirm()
        await has_inputs(guest, 0)
        if number == 1:  # each device once over each port
            before = Left.now(), objects()
    assert before is not None
    await no_more_than(before[0])
    await comes(lambda: not objects() - before[1])
    assert await trouble(guest) == ""


async def test_rounds_of_functions_that_run_leak_nothing(guests: Guests) -> None:
    guest = await quiet_guest(guests)
    everything = Everything()
    before: Left | None = None
    for number in range(6):
        async with plugged(guest.targets[number % 2], everything.device):
            await bound(guest)
            if number % 3 == 0:
                assert await everything.keyboard.confirm()
        await has_inputs(guest, 0)
        assert everything.loopback.alive == 0
        if number == 1:  # once over each port
            before = Left.now()
    assert before is not None
    await no_more_than(before)
    assert await trouble(guest) == ""
