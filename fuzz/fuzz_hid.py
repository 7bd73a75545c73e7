"""Fuzz input devices: any requests, LEDs, receptions and resets of a guest; and a keyboard with a guest that loses
reports, as QEMU does on EHCI and UHCI controllers.

Each transfer is completed once. A text that was confirmed has arrived whole, each character once; otherwise as much of
it as the error says; and no key remains pressed. Time is simulated.
"""

from __future__ import annotations

import asyncio
import random
import string
import unicodedata
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from farplug.keymap import Key, Stroke, find_layout, packaged_layouts
from farplug.usb import Buffer, Setup, Speed, Transfer, TransferType
from farplug.usb.device import Reception
from farplug.virtual import Detached, VirtualDevice
from farplug.virtual.hid import Gamepad, HidFunction, Keyboard, Led, MediaKeys, Mouse, ReportsLost, Tablet, Touchscreen
from harness import Listener, Transfers, check, counts, raise_logged, run

LAYOUTS = [*packaged_layouts()]
KINDS: tuple[type[HidFunction], ...] = (Keyboard, Tablet, Mouse, Touchscreen, Gamepad, MediaKeys)
LOCKS = {int(Key.NUM_LOCK): 1, int(Key.CAPS_LOCK): 2}
INTERVAL = 0.001
LED_DELAY = 0.05
"""The most seconds that the guest needs for the LEDs: less than the keyboard waits after a restart."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when nothing else can happen."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        wait: Callable[[float], list[Any]] = selector.select

        def select(timeout: float | None = None) -> list[Any]:
            assert timeout is not None, "all tasks wait for something that does not happen"
            self._now += timeout
            return wait(0)

        selector.select = select

    def time(self) -> float:
        return self._now


def simulate(case: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(case)


class Receiver(Listener):
    """Queues reports, as QEMU does."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()

    def received(self, endpoint: int, status: object, data: Buffer) -> bool:
        self.waiting.append(bytes(data))
        return True


class LossyGuest:
    """Takes reports from QEMU's queue, which loses what it holds whenever the guest stops to receive.

    Args:
        source: of the case.
        keyboard: what is plugged in.
        loss: how probable a loss is at each report.
    """

    def __init__(self, source: random.Random, keyboard: Keyboard, loss: float) -> None:
        self.source = source
        self.loss = loss
        self.receiver = Receiver()
        self.device = VirtualDevice(keyboard, speeds=(Speed.HIGH,))
        self.keyboard = keyboard
        self.seen: list[bytes] = []
        self.lost = 0
        self._held: set[int] = set()
        self._leds = source.choice((0, 1, 2, 3))
        self._showing: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        await self.device.open(self.receiver)
        await self.device.set_configuration(1)
        self._start()
        self._set_leds()
        while True:
            await asyncio.sleep(INTERVAL)
            if self.source.random() < self.loss:
                self._lose()
            if self.receiver.waiting:
                self._take(self.receiver.waiting.popleft())

    def _start(self) -> None:
        self.device.start_receiving(Reception(self.keyboard.reports.address_in_device, TransferType.INTERRUPT))

    def _lose(self) -> None:
        self.device.stop_receiving(self.keyboard.reports.address_in_device)
        self.lost += len(self.receiver.waiting) > 0
        self.receiver.waiting.clear()
        self._start()

    def _take(self, report: bytes) -> None:
        self.seen.append(report)
        before, self._held = self._held, {*report[2:]} - {0}
        for key in self._held - before:
            if key in LOCKS:
                self._leds ^= LOCKS[key]
                if self._showing is None:  # as Linux: changes that are close together are one
                    delay = self.source.choice((0, 0, 0.002, self.source.random() * LED_DELAY))
                    self._showing = asyncio.get_running_loop().call_later(delay, self._set_leds)

    def _set_leds(self) -> None:
        self._showing = None
        data = bytes((self._leds,))
        setup = Setup(0x21, 9, 0x200, 0, 1)
        self.device.submit(Transfer(TransferType.CONTROL, 0, lambda transfer: None, length=1, data=data, setup=setup))


def text_of(seen: list[bytes], layout: str) -> str:
    """Return what was typed; each key that is pressed counts."""
    characters = {strokes: character for character, strokes in find_layout(layout).strokes.items()}
    typed, held = "", set[int]()
    dead: tuple[Stroke, ...] = ()
    for report in seen:
        before, held = held, {*report[2:]} - {0, *LOCKS}
        for key in held - before:
            strokes = (*dead, Stroke(key, report[0]))
            typed, dead = (typed + characters[strokes], ()) if strokes in characters else (typed, strokes)
    return typed


async def type_with_losses(source: random.Random) -> None:
    layout = source.choice(LAYOUTS)
    known = [
        character
        for character in find_layout(layout).strokes
        if unicodedata.normalize("NFC", character) == character and not unicodedata.combining(character)
    ]
    text = "".join(source.choices(known, k=source.choice((1, 5, 40, 700))))
    cut = source.choice((0, 0, 1, len(text) // 2))  # two texts, one right after the other
    keyboard = Keyboard()
    guest = LossyGuest(source, keyboard, source.choice((0, 0, 0.0005, 0.005, 0.05)))
    running = asyncio.ensure_future(guest.run())
    while not keyboard.reports.is_read:  # noqa: ASYNC110  (in simulated time)
        await asyncio.sleep(INTERVAL)
    await asyncio.sleep(2 * LED_DELAY)
    before, done = keyboard.leds, 0
    try:
        confirmed = await keyboard.type_text(text[:cut], layout, confirm=True)
        done = cut
        confirmed = await keyboard.type_text(text[cut:], layout, confirm=True) and confirmed
    except ReportsLost as error:
        counts["texts uncertain"] += 1
        check(keyboard.reports.restarts > 0, "the guest did not stop to receive")
        done += error.confirmed
        check(text_of(guest.seen, layout)[:done] == text[:done])
    else:
        counts["texts with losses" if guest.lost else "texts"] += 1
        assert confirmed
        guest.loss = 0
        await asyncio.sleep(1)
        assert text_of(guest.seen, layout) == text
        if not guest.lost:
            assert keyboard.leds & Led.CAPS_LOCK == before & Led.CAPS_LOCK
            assert keyboard.leds == before
    guest.loss = 0
    await asyncio.sleep(1)
    assert not guest.seen or guest.seen[-1] == bytes(8), "a key remains pressed"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await guest.device.close()


def some_setup(source: random.Random, interfaces: int) -> tuple[Setup, bytes]:
    data = source.randbytes(source.choice((0, 1, 1, 2, 8, 64)))
    kind = source.choice((0x21, 0xA1, 0x81, source.randrange(256)))
    value = source.choice((0, 1, 0x100, 0x101, 0x200, 0x300, 0x301, 0x2100, 0x2200, source.randrange(65536)))
    length = source.choice((0, 1, 8, 255, 65535)) if kind & 0x80 else len(data)
    request = source.choice((1, 2, 3, 6, 9, 10, 11, source.randrange(256)))
    return Setup(kind, request, value, source.randrange(interfaces + 1), length), b"" if kind & 0x80 else data


async def use(source: random.Random, function: HidFunction) -> None:
    """Use a device forever, as a program does."""
    while True:
        try:
            match function:
                case Keyboard():
                    await function.type_text("".join(source.choices(string.ascii_letters, k=30)))
                case Tablet():
                    await function.move_to(source.randrange(32768), source.randrange(32768))
                    await function.click()
                case Mouse():
                    await function.move(source.randrange(-500, 500), 3)
                case Touchscreen():
                    await function.tap(source.randrange(32768), 0)
                case Gamepad():
                    await function.press(source.randrange(1, 17))
                case MediaKeys():
                    await function.press(source.randrange(1, 0x400))
        except (Detached, ReportsLost):
            await asyncio.sleep(INTERVAL)


async def attack(source: random.Random) -> None:
    functions = [source.choice(KINDS)() for _ in range(source.randrange(1, 4))]
    device = VirtualDevice(*functions, speeds=(Speed.HIGH,))
    await device.open(Receiver())
    users = [asyncio.ensure_future(use(source, function)) for function in functions]
    transfers = Transfers(device)
    submit = transfers.submit

    for _ in range(source.randrange(100)):
        function = source.choice(functions)
        match source.randrange(8):
            case 0 | 1:
                setup, data = some_setup(source, len(functions))
                endpoint = 0x80 if setup.request_type & 0x80 else 0
                submit(TransferType.CONTROL, endpoint, length=setup.length, data=data, setup=setup)
            case 2:
                if device.configuration:
                    receiving = Reception(function.reports.address_in_device, TransferType.INTERRUPT)
                    device.start_receiving(receiving)
            case 3:
                if device.configuration:
                    device.stop_receiving(function.reports.address_in_device)
            case 4:
                if device.configuration and isinstance(function, Keyboard):
                    data = source.randbytes(source.choice((0, 1, 1, 8)))
                    submit(TransferType.INTERRUPT, function.output.address_in_device, data=data)
            case 5:
                await asyncio.sleep(source.choice((0, INTERVAL, 0.3, 3)))
            case 6:
                await device.set_configuration(source.choice((1, 1, 1, 0)))
            case 7 if source.random() < 0.3:
                await device.reset()
    for user in users:
        user.cancel()
    results = await asyncio.gather(*users, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results
    await device.close()
    transfers.check()


def one_case(source: random.Random) -> None:
    simulate(type_with_losses(source))
    simulate(attack(source))


if __name__ == "__main__":
    raise_logged()
    run("hid", one_case)
