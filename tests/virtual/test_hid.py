"""The keyboard, the tablet and the mouse, driven by a guest in memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from farplug.errors import Reason, TargetError, UsageError
from farplug.keymap import Stroke, find_layout
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Setup, Speed
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import DescriptorType
from farplug.virtual import Detached, VirtualDevice
from farplug.virtual.hid import (
    Button,
    Gamepad,
    Hat,
    HidFunction,
    Key,
    Keyboard,
    Led,
    MediaKey,
    MediaKeys,
    Mouse,
    ReportsLost,
    Tablet,
    Touchscreen,
)
from farplug.virtual.hid import function as hid_function
from farplug.virtual.hid import keyboard as hid_keyboard

IN, OUT = 0x81, 0x01


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_function, "OPEN_DELAY", 0.0)
    monkeypatch.setattr(hid_keyboard, "_SETTLE_TIME", 0.01)


@asynccontextmanager
async def plugged(function: HidFunction) -> AsyncIterator[MemoryGuest]:
    async with MemoryGuest(VirtualDevice(function, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        await guest.start_receiving(IN)
        yield guest


async def reports(guest: MemoryGuest, count: int) -> list[str]:
    return [(await guest.interrupt_in(IN)).hex() for _ in range(count)]


async def reflect(guest: MemoryGuest, seen: list[bytes], *, drop: int = 0) -> None:
    """Take reports as Linux does: reflect the locks, after dropping the first reports."""
    leds, held = 0, set[int]()
    while True:
        report = await guest.interrupt_in(IN)
        if drop:
            drop -= 1
            continue
        seen.append(report)
        before, held = held, {*report[2:]}
        for key, bit in ((Key.NUM_LOCK, 1), (Key.CAPS_LOCK, 2)):
            if key in held - before:
                leds ^= bit
                await guest.interrupt_out(OUT, bytes((leds,)))


@asynccontextmanager
async def reflecting(guest: MemoryGuest, *, drop: int = 0) -> AsyncIterator[list[bytes]]:
    """Reflect the locks; the value has the reports."""
    seen: list[bytes] = []
    task = asyncio.ensure_future(reflect(guest, seen, drop=drop))
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def text_of(seen: list[bytes], layout: str = "us") -> str:
    """Return what was typed; each key that is pressed counts."""
    characters = {strokes: character for character, strokes in find_layout(layout).strokes.items()}
    typed, held = "", set[int]()
    dead: tuple[Stroke, ...] = ()
    for report in seen:
        before, held = held, {*report[2:]} - {0, Key.NUM_LOCK, Key.CAPS_LOCK}
        for key in held - before:
            strokes = (*dead, Stroke(key, report[0]))
            typed, dead = (typed + characters[strokes], ()) if strokes in characters else (typed, strokes)
    assert not dead
    return typed


@pytest.mark.parametrize(
    ("function", "size", "triple"),
    [
        (Keyboard, 64, (3, 1, 1)),
        (Tablet, 74, (3, 0, 0)),
        (Mouse, 52, (3, 1, 2)),
        (Gamepad, 71, (3, 0, 0)),
        (Touchscreen, 80, (3, 0, 0)),
        (MediaKeys, 23, (3, 0, 0)),
    ],
)
async def test_descriptors(function: type[HidFunction], size: int, triple: tuple[int, int, int]) -> None:
    async with plugged(function()) as guest:
        raw = await guest.get_descriptor(DescriptorType.CONFIGURATION, length=255)
        (interface,) = ConfigurationDescriptor.parse(raw).interfaces
        assert (interface.interface_class, interface.interface_subclass, interface.interface_protocol) == triple
        assert interface.extra == bytes((9, 0x21, 0x11, 1, 0, 1, 0x22, size, 0))
        assert interface.endpoints[0].address == IN
        assert (interface.endpoints[0].max_packet_size, interface.endpoints[0].interval) == (8, 4)
        assert await guest.control_in(Setup(0x81, 6, 0x2100, 0, 255)) == interface.extra
        descriptor = await guest.control_in(Setup(0x81, 6, 0x2200, 0, 255))
        assert len(descriptor) == size
        assert descriptor[-1] == 0xC0
        with pytest.raises(TransferFailed, match="stall"):
            await guest.control_in(Setup(0x81, 6, 0x2300, 0, 255))


async def test_requests_of_the_class() -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        assert await guest.control_in(Setup(0xA1, 3, 0, 0, 1)) == b"\1"
        await guest.control_out(Setup(0x21, 0x0B, 0, 0, 0))
        assert keyboard.boot_protocol
        assert await guest.control_in(Setup(0xA1, 3, 0, 0, 1)) == b"\0"
        await guest.control_out(Setup(0x21, 0x0A, 8 << 8, 0, 0))
        assert await guest.control_in(Setup(0xA1, 2, 0, 0, 1)) == b"\x08"
        assert await guest.control_in(Setup(0xA1, 1, 0x100, 0, 8)) == bytes(8)
        await keyboard.press(Key.A)
        assert await guest.control_in(Setup(0xA1, 1, 0x100, 0, 8)) == bytes.fromhex("0000040000000000")
        await guest.control_out(Setup(0x21, 9, 0x200, 0, 1), b"\xe3")
        assert keyboard.leds == Led.NUM_LOCK | Led.CAPS_LOCK
        await guest.interrupt_out(OUT, b"\4")
        await keyboard.until(lambda: keyboard.leds == Led.SCROLL_LOCK)
        await guest.control_out(Setup(0x21, 9, 0x200, 0, 0))
        assert keyboard.leds == Led(0)
        with pytest.raises(TransferFailed, match="stall"):
            await guest.control_in(Setup(0xA1, 1, 0x300, 0, 8))
        for setup, data in ((Setup(0x21, 9, 0x300, 0, 1), b"x"), (Setup(0x21, 0x0B, 2, 0, 0), b"")):
            with pytest.raises(TransferFailed, match="stall"):
                await guest.control_out(setup, data)
        await guest.set_configuration(1)
        assert not keyboard.boot_protocol
    async with plugged(Tablet()) as guest:
        with pytest.raises(TransferFailed, match="stall"):
            await guest.control_out(Setup(0x21, 9, 0x200, 0, 1), b"x")


async def test_keys() -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        await keyboard.press(Key.LEFT_SHIFT, Key.A)
        await keyboard.press(Key.B, Key.A)
        await keyboard.tap(Key.C)
        await keyboard.release(Key.A)
        await keyboard.release()
        assert await reports(guest, 6) == [
            "0200040000000000",
            "0200040500000000",
            "0200040506000000",
            "0200040500000000",
            "0200050000000000",
            "0000000000000000",
        ]
        await keyboard.tap(Key.LEFT_CTRL, Key.RIGHT_ALT, Key.DELETE)
        assert await reports(guest, 2) == ["41004c0000000000", "0000000000000000"]
        await keyboard.press(*(Key(Key.A + number) for number in range(6)))
        with pytest.raises(ValueError, match="7 keys are pressed"):
            await keyboard.press(Key.Z)
        await keyboard.release(Key.A)
        assert (await reports(guest, 2))[1] == "0000050607080900"


ASCII = "".join(map(chr, range(32, 127))) + "\n\t"


async def test_a_text_that_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one at first, then many keys at a time; Num Lock and Caps Lock are as before at the end."""
    monkeypatch.setattr(hid_keyboard, "TRUSTED_AFTER", 50)
    monkeypatch.setattr(hid_keyboard, "_ATTEMPT_TIMEOUT", 0.2)
    text = ASCII * 4
    counts: list[int] = []
    async with plugged(keyboard := Keyboard()) as guest, reflecting(guest, drop=2) as seen:
        assert await keyboard.type_text(text, progress=counts.append)
        assert text_of(seen) == text
        assert counts[-1] == len(text)
        assert counts[: hid_keyboard.TRUSTED_AFTER] == [*range(1, hid_keyboard.TRUSTED_AFTER + 1)]
        assert counts == sorted(counts)
        assert len(counts) < hid_keyboard.TRUSTED_AFTER + 20
        assert keyboard.leds == Led(0)
        await keyboard.tap(Key.CAPS_LOCK)
        await keyboard.tap(Key.NUM_LOCK)
        await keyboard.until(lambda: keyboard.leds == Led.CAPS_LOCK | Led.NUM_LOCK)
        seen.clear()
        assert await keyboard.type_text("Ab1!x")
        assert text_of(seen) == "Ab1!x"
        await keyboard.until(lambda: keyboard.leds == Led.CAPS_LOCK | Led.NUM_LOCK)
        seen.clear()
        assert await keyboard.type_text("Grüße, \u0065\u0301\r\n^", "de")
        assert text_of(seen, "de") == "Grüße, é\n^"


class Repeating:
    """Takes reports as Linux does: the places one after the other, first a release, then a press.

    A press begins the repetition of its key, which ends the one of another key; the release of any key ends it, too
    (drivers/hid/hid-core.c, hid_input_array_field; drivers/input/input.c). Linux ignores that Num Lock is repeated.
    """

    def __init__(self, pressed: Collection[Key] = ()) -> None:
        self.typed: list[Stroke] = []
        self.repeated: int | None = None
        self.before = bytes((0, 0, *(key for key in pressed if not key.modifier))).ljust(8, b"\0")

    def take(self, report: bytes) -> None:
        for old, new in zip(self.before[2:], report[2:], strict=True):
            if old and old not in report[2:]:
                self.repeated = None
            if new and new not in self.before[2:]:
                self.repeated = new
                self.typed.append(Stroke(new, report[0] & 2))
        self.before = report


@pytest.mark.parametrize("pressed", [(), (Key.LEFT_CTRL, Key.F1), (Key.F1, Key.F2, Key.F3, Key.F4)])
def test_no_key_of_a_run_is_repeated(pressed: tuple[Key, ...]) -> None:
    """Let the guest stand still after each report: it repeats Num Lock, or nothing."""
    keyboard = Keyboard()
    keyboard._pressed = list(pressed)
    strokes = [stroke for one in find_layout("us").type("The quick brown fox: 01 Aa bokeper") for stroke in one]
    strokes = [stroke for last, stroke in pairwise([Stroke(0, 0), *strokes]) if last.key != stroke.key]
    linux = Repeating(pressed)
    reports = list(keyboard._reports_of(strokes))
    for report in reports:
        linux.take(report)
        assert linux.repeated in (None, Key.NUM_LOCK)
    assert [one for one in linux.typed if one.key != Key.NUM_LOCK] == strokes
    assert linux.before[2:] == Repeating(pressed).before[2:]
    if len(pressed) < 4:
        assert len(reports) < 1.4 * len(strokes)


async def test_a_guest_that_stands_still_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type a text with keys that follow themselves, one by one and many at a time."""
    monkeypatch.setattr(hid_keyboard, "TRUSTED_AFTER", 10)
    monkeypatch.setattr(hid_keyboard, "CONFIRM_EVERY", 20)
    text = "aAa  bookkeeper, \n\n\tthe quick brown fox jumps over the lazy dog " * 3
    async with plugged(keyboard := Keyboard()) as guest, reflecting(guest) as seen:
        assert await keyboard.type_text(text)
        assert text_of(seen) == text
        linux = Repeating()
        for report in seen:
            linux.take(report)
            assert linux.repeated in (None, Key.NUM_LOCK)
        await keyboard.press(Key.A, Key.B, Key.C, Key.D, Key.E)
        with pytest.raises(ValueError, match="at most 4 keys"):
            await keyboard.type_text(text)


class Busy:
    """A guest in which Num Lock is on, and which shows the locks late, as they are then.

    Args:
        begin: seconds from when it receives until it shows the locks for the first time.
        late: seconds from a change to when it shows the locks.
        presses: the numbers of reports with which a user presses Num Lock, too.
    """

    def __init__(self, guest: MemoryGuest, begin: float, late: float, presses: Collection[int]) -> None:
        self.seen: list[bytes] = []
        self.leds = 1
        self._guest, self._begin, self._late, self._presses = guest, begin, late, presses
        self._changed = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._show())
            held = set[int]()
            while True:
                report = await self._guest.interrupt_in(IN)
                self.seen.append(report)
                before, held = held, {*report[2:]}
                if Key.NUM_LOCK in held - before:
                    self.toggle()
                if len(self.seen) in self._presses:
                    self.toggle()

    def toggle(self) -> None:
        self.leds ^= 1
        self._changed.set()

    async def _show(self) -> None:
        shown = 0
        await asyncio.sleep(self._begin)
        while True:
            self._changed.clear()
            if shown != self.leds:
                shown = self.leds
                await self._guest.interrupt_out(OUT, bytes((shown,)))
            await self._changed.wait()
            await asyncio.sleep(self._late)


@asynccontextmanager
async def busy(
    guest: MemoryGuest, begin: float = 0, late: float = 0, presses: Collection[int] = ()
) -> AsyncIterator[Busy]:
    one = Busy(guest, begin, late, presses)
    running = asyncio.ensure_future(one.run())
    try:
        yield one
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("late", [0, 0.002])
@pytest.mark.parametrize("begin", [0, 0.03])
async def test_a_guest_that_shows_its_locks_late(monkeypatch: pytest.MonkeyPatch, begin: float, late: float) -> None:
    """Take nothing that a driver shows when it begins for an answer."""
    monkeypatch.setattr(hid_keyboard, "_SETTLE_TIME", 0.1)
    monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 1.0)
    async with plugged(keyboard := Keyboard()) as guest, busy(guest, begin, late) as one:
        assert await keyboard.type_text("hello")
        assert await keyboard.confirm()
        assert text_of(one.seen) == "hello"
        await keyboard.until(lambda: keyboard.leds == Led(one.leds) == Led.NUM_LOCK)


@pytest.mark.parametrize("at", [11, 12, 60])
async def test_a_user_who_presses_num_lock_during_a_text(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The text is whole, or the error has what is certain; the next text is typed as ever."""
    monkeypatch.setattr(hid_keyboard, "TRUSTED_AFTER", 5)
    monkeypatch.setattr(hid_keyboard, "CONFIRM_EVERY", 10)
    monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 1.0)
    text = "the quick brown fox jumps over the lazy dog"
    async with plugged(keyboard := Keyboard()) as guest, busy(guest, presses=(at,)) as one:
        certain = len(text)
        try:
            assert await keyboard.type_text(text)
        except ReportsLost as error:
            certain = error.confirmed
        assert text_of(one.seen)[:certain] == text[:certain]
        first = len(one.seen)
        assert await keyboard.type_text(text)
        assert text_of(one.seen[first:]) == text


async def test_locks_that_change_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """They answer nothing: the text is not confirmed."""
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 0.001)
    monkeypatch.setattr(hid_keyboard, "_SETTLE_TIME", 0.2)

    async def blink(guest: MemoryGuest) -> None:
        for number in itertools.count():
            await guest.interrupt_out(OUT, bytes((number & 1,)))
            await asyncio.sleep(0.001)

    async with plugged(keyboard := Keyboard()) as guest:
        blinking = asyncio.ensure_future(blink(guest))
        await keyboard.until(lambda: bool(keyboard.leds))
        with pytest.raises(ReportsLost, match="0 of 2"):
            await keyboard.type_text("ab", confirm=True)
        assert not await keyboard.type_text("ab")
        assert not await keyboard.confirm()
        blinking.cancel()


async def test_a_guest_that_stops_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 1.0)
    async with plugged(keyboard := Keyboard()) as guest:
        async with reflecting(guest) as seen:
            typing = asyncio.ensure_future(keyboard.type_text("x" * 200))
            await keyboard.until(lambda: len(seen) > 100 or typing.done())
        await guest.stop_receiving(IN)
        with pytest.raises(ReportsLost) as caught:
            await typing
        assert text_of(seen)[: caught.value.confirmed] == "x" * caught.value.confirmed
        assert caught.value.confirmed > 40
        assert not await keyboard.confirm(0.1)
        await guest.start_receiving(IN)
        async with reflecting(guest) as seen:
            assert await keyboard.type_text("y")
            assert text_of(seen) == "y"


async def test_two_texts_do_not_mix() -> None:
    async with plugged(keyboard := Keyboard()) as guest, reflecting(guest) as seen:
        await asyncio.gather(keyboard.type_text("a" * 50), keyboard.type_text("b" * 50))
        assert text_of(seen) == "a" * 50 + "b" * 50


async def test_a_text_that_is_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_keyboard, "_ATTEMPT_TIMEOUT", 0.01)
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 0.001)
    async with plugged(keyboard := Keyboard()) as guest:
        with pytest.raises(ReportsLost, match="0 of 5 characters are certain"):
            await keyboard.type_text("hello", confirm=True)
        attempts = await reports(guest, 2 * (hid_keyboard._ATTEMPTS + 1))  # an even number: Num Lock is as before
        assert set(attempts) == {"0000530000000000", "0000000000000000"}
        assert not await keyboard.type_text("hi")  # the guest is asked once more only
        typed = [bytes.fromhex(report) for report in await reports(guest, 8)]
        assert text_of(typed) == "hi"
        assert sum(report[2] == Key.NUM_LOCK for report in typed) == 2, "Num Lock is as before"
        assert await keyboard.type_text("", confirm=True)


async def test_a_guest_that_ends_to_confirm(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        async with reflecting(guest):
            assert await keyboard.type_text("before")
        monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 0.05)
        with pytest.raises(ReportsLost, match="0 of 5 characters are certain"):
            await asyncio.gather(keyboard.type_text("hello", confirm=True), _answer_once(guest))


async def _answer_once(guest: MemoryGuest) -> None:
    await reports(guest, 2)
    await guest.interrupt_out(OUT, b"\1")


async def test_a_guest_that_stops_to_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 0.001)
    async with plugged(keyboard := Keyboard()) as guest:
        typing = asyncio.ensure_future(keyboard.type_text("x" * 200, confirm=False))
        await guest.interrupt_in(IN)
        await guest.stop_receiving(IN)
        await guest.start_receiving(IN)
        with pytest.raises(ReportsLost, match="0 of 200"):
            await typing


class Dropping:
    """A guest on an EHCI controller: it stops to receive now and then, and drops what waits.

    Args:
        at: the numbers of the reports with which it stops, from 0.
        taken: it takes that report before.
        late: seconds after which it shows that.
    """

    def __init__(self, guest: MemoryGuest, at: set[int], *, taken: bool, late: float = 0) -> None:
        self.seen: list[bytes] = []
        self._guest, self._at, self._taken, self._late = guest, at, taken, late
        self._leds, self._held = 0, set[int]()

    async def run(self) -> None:
        number = 0
        while True:
            report = await self._guest.interrupt_in(IN)
            stops = number in self._at
            if not stops or self._taken:
                await self._take(report, silent=stops)
            if stops:
                await self._guest.stop_receiving(IN)
                await self._guest.start_receiving(IN)
                if self._late:
                    await asyncio.sleep(self._late)
                if self._taken:
                    await self._guest.interrupt_out(OUT, bytes((self._leds,)))
            number += 1

    async def _take(self, report: bytes, *, silent: bool) -> None:
        self.seen.append(report)
        before, self._held = self._held, {*report[2:]}
        for key in (self._held - before) & {Key.NUM_LOCK, Key.CAPS_LOCK}:
            self._leds ^= 1 if key == Key.NUM_LOCK else 2
            if not silent:
                await self._guest.interrupt_out(OUT, bytes((self._leds,)))


@pytest.mark.parametrize(("taken", "late"), [(False, 0), (True, 0), (True, 0.1)])
async def test_keys_that_were_dropped_are_typed_again(
    monkeypatch: pytest.MonkeyPatch, taken: bool, late: float
) -> None:
    monkeypatch.setattr(hid_keyboard, "_SETTLE_TIME", 0.02)
    text = "the quick brown fox"
    async with plugged(keyboard := Keyboard()) as guest:
        dropping = Dropping(guest, {6, 19, 34}, taken=taken, late=late)
        running = asyncio.ensure_future(dropping.run())
        assert await keyboard.type_text(text)
        assert text_of(dropping.seen) == text
        assert keyboard.reports.restarts == 3
        assert not keyboard._is_reliable
        running.cancel()


async def test_many_keys_that_were_dropped_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose some of many keys: which of them the guest has taken cannot be determined."""
    monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 1.0)
    monkeypatch.setattr(hid_keyboard, "TRUSTED_AFTER", 10)
    monkeypatch.setattr(hid_keyboard, "CONFIRM_EVERY", 20)
    text = "abcdefghij" * 10
    run = [stroke for one in find_layout("us").type(text[10:30]) for stroke in one]
    second_run = 2 + 2 * 10 + len(list(Keyboard()._reports_of(run)))
    async with plugged(keyboard := Keyboard()) as guest:
        dropping = Dropping(guest, {second_run + 12}, taken=True)
        running = asyncio.ensure_future(dropping.run())
        with pytest.raises(ReportsLost) as caught:
            await keyboard.type_text(text)
        assert (caught.value.confirmed, caught.value.total) == (31, 100)
        assert text_of(dropping.seen)[:31] == text[:31]
        while dropping.seen[-1] != bytes(8):  # no key remains pressed
            await asyncio.sleep(0.001)
        running.cancel()


async def test_a_reset_in_the_middle_of_a_text() -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        async with reflecting(guest) as seen:
            typing = asyncio.ensure_future(keyboard.type_text("x" * 100))
            await keyboard.until(lambda: len(seen) > 50)
        await guest.set_configuration(1)
        await guest.start_receiving(IN)
        async with reflecting(guest) as seen:
            with pytest.raises(Detached):
                await typing
            assert await keyboard.type_text("again")
            assert text_of(seen) == "again"


async def test_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 0.001)
    async with plugged(keyboard := Keyboard()) as guest:
        await guest.control_out(Setup(0x21, 0x0B, 0, 0, 0))
        assert not await keyboard.type_text("A\n")
        assert text_of([bytes.fromhex(report) for report in await reports(guest, 4)]) == "A\n"


async def test_a_text_for_firmware_that_is_cancelled_leaves_no_key_pressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 60)
    async with plugged(keyboard := Keyboard()) as guest:
        await guest.control_out(Setup(0x21, 0x0B, 0, 0, 0))
        typing = asyncio.ensure_future(keyboard.type_text("A"))
        assert await reports(guest, 1) == ["0200040000000000"]
        typing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await typing
        assert await reports(guest, 1) == ["0000000000000000"]


@pytest.mark.parametrize("call", [lambda keyboard: keyboard.type_text("a"), Keyboard.confirm])
async def test_num_lock_is_as_before_if_a_question_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Keyboard], Coroutine[object, object, bool]]
) -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        asking = asyncio.ensure_future(call(keyboard))
        assert await reports(guest, 2) == ["0000530000000000", "0000000000000000"]
        monkeypatch.setattr(hid_keyboard, "_ATTEMPT_TIMEOUT", 0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(100):
            assert await reports(guest, 2) == ["0000530000000000", "0000000000000000"]


async def test_a_guest_that_reads_late_or_never() -> None:
    async with MemoryGuest(VirtualDevice(keyboard := Keyboard(), speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        with pytest.raises(TargetError, match=r"did not read from the keyboard within 0\.05 s") as caught:
            await keyboard.type_text("a", timeout=0.05)
        assert caught.value.reason is Reason.TIMED_OUT
        typing = asyncio.ensure_future(keyboard.type_text("b"))
        await asyncio.sleep(0)
        await guest.start_receiving(IN)
        async with reflecting(guest) as seen:
            assert await typing
            assert text_of(seen) == "b", "nothing of the first text"


async def test_num_lock_is_not_pressed_if_no_question_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with MemoryGuest(VirtualDevice(keyboard := Keyboard(), speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        asking = asyncio.ensure_future(keyboard.confirm())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(100):
                await asking


class Sharing:
    """A guest with several keyboards: it shows its locks on all of them, as Linux does."""

    def __init__(self, *guests: MemoryGuest) -> None:
        self.guests = guests
        self.seen: list[list[bytes]] = [[] for _ in guests]
        self._leds = 0
        self._changed = [asyncio.Event() for _ in guests]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[list[list[bytes]]]:
        tasks = [asyncio.ensure_future(run(number)) for run in (self._take, self._show) for number in range(2)]
        try:
            yield self.seen
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, number: int) -> None:
        held = set[int]()
        while True:
            report = await self.guests[number].interrupt_in(IN)
            self.seen[number].append(report)
            before, held = held, {*report[2:]}
            if Key.NUM_LOCK in held - before:
                self._leds ^= 1
                for changed in self._changed:
                    changed.set()

    async def _show(self, number: int) -> None:
        while True:
            await self._changed[number].wait()
            self._changed[number].clear()
            await self.guests[number].interrupt_out(OUT, bytes((self._leds,)))


@pytest.mark.parametrize("later", [0, 60])
async def test_two_keyboards_that_type_at_once(monkeypatch: pytest.MonkeyPatch, later: int) -> None:
    """The second one begins after a number of reports of the first one.

    Each text is whole, or its error has what is certain: neither takes the answers to the other for its own."""
    monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 1.0)
    monkeypatch.setattr(hid_keyboard, "TRUSTED_AFTER", 20)
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 0.001)
    texts = "the quick brown fox jumps" * 3, "over the lazy dog" * 3
    keyboards = Keyboard(), Keyboard()
    async with plugged(keyboards[0]) as one, plugged(keyboards[1]) as other, Sharing(one, other).running() as seen:
        first = asyncio.ensure_future(keyboards[0].type_text(texts[0]))
        await keyboards[0].until(lambda: len(seen[0]) >= later or first.done())
        results = await asyncio.gather(first, keyboards[1].type_text(texts[1]), return_exceptions=True)
        for result, reports_seen, text in zip(results, seen, texts, strict=True):
            assert isinstance(result, (bool, ReportsLost)), result
            certain = result.confirmed if isinstance(result, ReportsLost) else len(text) * result
            assert text_of(reports_seen)[:certain] == text[:certain]
            assert result is not True or text_of(reports_seen) == text
        for keyboard, reports_seen, text in zip(keyboards, seen, texts, strict=True):
            before = len(reports_seen)
            assert await keyboard.type_text(text)
            assert text_of(reports_seen[before:]) == text


@pytest.mark.parametrize("answers", [b"", b"\x02", b"\xff", b"\1\0\1"])
async def test_answers_that_are_wrong(monkeypatch: pytest.MonkeyPatch, answers: bytes) -> None:
    """The guest sets other LEDs, in the middle of a text and at its start: nothing is confirmed."""
    monkeypatch.setattr(hid_keyboard, "_TAKEN_TIMEOUT", 0.1)
    monkeypatch.setattr(hid_keyboard, "_ATTEMPT_TIMEOUT", 0.05)
    monkeypatch.setattr(hid_keyboard, "FIRMWARE_PACE", 0.001)

    async def answer(guest: MemoryGuest, right: int) -> None:
        for number in itertools.count():
            await guest.interrupt_in(IN)
            await guest.interrupt_in(IN)
            await guest.interrupt_out(OUT, bytes(((number + 1) & 1,)) if number < right else answers)

    for right in (0, 6):
        async with plugged(keyboard := Keyboard()) as guest:
            answering = asyncio.ensure_future(answer(guest, right))
            with pytest.raises(ReportsLost) as caught:
                await keyboard.type_text("x" * 20, confirm=True)
            assert caught.value.confirmed <= right
            answering.cancel()


async def test_what_the_layout_lacks_is_refused_before_any_key() -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        with pytest.raises(UsageError, match=r"'ä' \(U\+00E4, character 2 of the text\)") as caught:
            await keyboard.type_text("xä")
        assert caught.value.reason is Reason.BAD_KEY
        with pytest.raises(UsageError, match="'klingon' is not a keyboard layout"):
            await keyboard.type_text("x", "klingon")
        await keyboard.tap(Key.Z)
        assert (await reports(guest, 1))[0] == "00001d0000000000"


async def test_detach_while_a_confirmation_is_awaited() -> None:
    async with plugged(keyboard := Keyboard()) as guest:
        confirming = asyncio.ensure_future(keyboard.confirm(60))
        await guest.interrupt_in(IN)
        guest.reset()
        with pytest.raises(Detached):
            await confirming
        with pytest.raises(Detached):
            await keyboard.until(lambda: True)


async def test_tablet() -> None:
    async with plugged(tablet := Tablet()) as guest:
        await tablet.move_to(1, 0x7FFF)
        await tablet.press()
        await tablet.click(Button.RIGHT)
        await tablet.release()
        await tablet.scroll(-200)
        assert await reports(guest, 8) == [
            "000100ff7f00",
            "010100ff7f00",
            "030100ff7f00",
            "010100ff7f00",
            "000100ff7f00",
            "000100ff7f81",
            "000100ff7fb7",
            "000100ff7f00",
        ]
        for place in ((-1, 0), (0, 0x8000)):
            with pytest.raises(ValueError, match="not a valid position"):
                await tablet.move_to(*place)


async def test_mouse() -> None:
    async with plugged(mouse := Mouse()) as guest:
        await mouse.press(Button.MIDDLE)
        await mouse.move(-300, 5)
        await mouse.scroll(1)
        moved = [bytes.fromhex(report) for report in await reports(guest, 7)]
        signed = [tuple(value - 256 if value > 127 else value for value in report[1:]) for report in moved]
        assert {report[0] for report in moved} == {4}
        assert [sum(values) for values in zip(*signed, strict=True)] == [-300, 5, 1]
        assert signed[-1] == (0, 0, 0)
        await guest.set_configuration(1)
        await guest.start_receiving(IN)
        await mouse.move(0, 0)
        assert await reports(guest, 2) == ["00000000"] * 2  # the button was released


async def test_the_first_report_waits_for_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hid_function, "OPEN_DELAY", 0.05)
    async with plugged(keyboard := Keyboard()):
        begun = keyboard.reports.read_since
        await keyboard.tap(Key.A)
        assert asyncio.get_running_loop().time() - begun >= 0.05


async def test_gamepad() -> None:
    async with plugged(gamepad := Gamepad()) as guest:
        await gamepad.press(1, 16)
        await gamepad.move(left=(-127, 127), right=(1, -1), hat=Hat.UP)
        await gamepad.move(hat=Hat.CENTRED)
        await gamepad.release(1)
        await gamepad.release()
        assert await reports(guest, 5) == ["01800000000008", "0180817f01ff00", "0180817f01ff08", "0080817f01ff08"] + [
            "0000817f01ff08"
        ]
        for button in (0, 17):
            with pytest.raises(ValueError, match="is not a button"):
                await gamepad.press(button)
        with pytest.raises(ValueError, match="128 is not a valid position"):
            await gamepad.move(right=(0, 128))
        await guest.set_configuration(1)
        await guest.start_receiving(IN)
        await gamepad.press(2)
        assert await reports(guest, 1) == ["02000000000008"]


async def test_touchscreen() -> None:
    async with plugged(touchscreen := Touchscreen()) as guest:
        assert await guest.control_in(Setup(0xA1, 1, 0x301, 0, 64)) == b"\1\x0a"
        assert await guest.control_in(Setup(0xA1, 1, 0x101, 0, 64)) == bytes.fromhex("0100000000000001")
        with pytest.raises(TransferFailed, match="stall"):
            await guest.control_in(Setup(0xA1, 1, 0x100, 0, 64))
        await touchscreen.touch(1, 0x7FFF)
        await touchscreen.lift()
        await touchscreen.tap(2, 3)
        assert await reports(guest, 4) == [
            "010100" + "0100ff7f" + "01",
            "010000" + "0100ff7f" + "01",
            "010100" + "02000300" + "01",
            "010000" + "02000300" + "01",
        ]
        with pytest.raises(ValueError, match="not a valid position"):
            await touchscreen.tap(0, 0x8000)


async def test_media_keys() -> None:
    async with plugged(media := MediaKeys()) as guest:
        await media.press(MediaKey.VOLUME_UP)
        await media.press(0x3FF)
        assert await reports(guest, 4) == ["e900", "0000", "ff03", "0000"]
        for key in (0, 0x400):
            with pytest.raises(ValueError, match="is not a usage"):
                await media.press(key)
