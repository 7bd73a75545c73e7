"""Text that is typed on a USB keyboard in a real guest: whole, once, and confirmed; or an error that says how far."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import string
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, disk_with, plugged, with_controller
from tests.guest.test_devices_of_your_own import KEY_ESC, quiet_guest, reading, text_of, trouble
from tests.long import LONG

from farplug.app.commands import Via
from farplug.app.guest import Guest
from farplug.app.settings import Source
from farplug.errors import DeviceError
from farplug.store.image import serial_number
from farplug.target import open_session, parse_target
from farplug.usb import Speed
from farplug.virtual import VirtualDevice
from farplug.virtual.hid import Gamepad, Hat, MediaKey, MediaKeys, Touchscreen
from farplug.vm.qemu_config import Controller

CHARACTERS = 2000 if LONG else 500
"""Characters that are typed beside two busy processes."""
ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n\t"


def random_text(seed: int, count: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=count))


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[Guest]:
    guest = Guest(session=await open_session(parse_target(target)))
    try:
        yield guest
    finally:
        await guest.close()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep processors of this machine busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("port", [0, 1], ids=["tcp", "spice"])
async def test_a_keyboard_is_plugged_in_for_a_text(guests: Guests, port: int, tmp_path: Path) -> None:
    """It stays for the next one, and leaves when its port is needed."""
    guest = await quiet_guest(guests)
    async with connected(guest.targets[port]) as farplug:
        typed = await farplug.typing.type("x", via=Via.AUTO)
        assert (typed.via, typed.confirmed) == (Via.USB, True)
        (attachment,) = farplug.attachments
        assert attachment.label == "keyboard0"
        text = random_text(port, 700)
        async with reading(guest, 0, KEY_ESC) as events:
            typed = await farplug.typing.type(text)
            assert (typed.via, typed.confirmed) == (Via.USB, True)
            pressed = await farplug.typing.press("Escape")
            assert (pressed.via, pressed.confirmed) == (Via.USB, True)
        assert text_of(events) == text
        async with reading(guest, 0, KEY_ESC) as events:
            assert (await farplug.typing.type("Grüße äöü", "de")).confirmed
            await farplug.typing.press("Escape")
        assert text_of(events) == "Gr[-e ';[", "the same keys on a US keyboard"
        assert farplug.attachments == [attachment]
        image = tmp_path / f"{port}.raw"
        image.write_bytes(bytes(1 << 20))
        (disk,) = await farplug.attach([Source.disk(image)])
        await disk_with(guest, serial_number(image))
        assert attachment.over
        await farplug.unplug(disk)
    assert await trouble(guest) == ""


async def test_a_click_on_a_tablet_that_is_plugged_in_for_it(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.app.typing.READ_TIMEOUT", GUEST_TIMEOUT)  # Python in the guest needs seconds to start
    guest = await quiet_guest(guests)
    async with connected(guest.targets[1]) as farplug:
        width, height = await farplug.screen.size()
        clicking = asyncio.ensure_future(farplug.typing.click(width // 2, height + 1000))
        # BTN_LEFT; Linux reads a tablet only while a program does
        async with reading(guest, 0, 0x110, clicking) as events:
            assert (await clicking).via is Via.USB
        assert [(code, value) for kind, code, value in events if kind == 1] == [(0x110, 1), (0x110, 0)]
        places = {code: value for kind, code, value in events if kind == 3}
        assert abs(places[0] - 16384) < 100
        assert places[1] == 32767


@pytest.mark.parametrize("port", [0, 1], ids=["tcp", "spice"])
async def test_a_busy_machine_loses_nothing(guests: Guests, port: int) -> None:
    """Many characters, with two busy processes beside the guest."""
    guest = await quiet_guest(guests)
    text = random_text(7 + port, CHARACTERS)
    async with connected(guest.targets[port]) as farplug:
        await farplug.typing.type("x", via=Via.USB)
        async with reading(guest, 0, KEY_ESC) as events:
            with busy(2):
                assert (await farplug.typing.type(text, via=Via.USB)).confirmed
            await farplug.typing.press("Escape")
        assert text_of(events) == text


async def test_a_vm_that_stands_still_repeats_nothing(guests: Guests) -> None:
    """Stop QEMU again and again, for longer than Linux waits before it repeats a key that is pressed."""
    guest = await quiet_guest(guests)
    text = random_text(5, 250) + "bookkeeper  aA\n\n" * 20

    async def stop() -> None:
        while True:
            os.kill(guest.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.4)
            finally:
                os.kill(guest.pid, signal.SIGCONT)
            await asyncio.sleep(0.2)

    async with connected(guest.targets[0]) as farplug:
        await farplug.typing.type("x", via=Via.USB)
        async with reading(guest, 0, KEY_ESC) as events:
            stopping = asyncio.ensure_future(stop())
            try:
                assert (await farplug.typing.type(text, via=Via.USB)).confirmed
            finally:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
            await farplug.typing.press("Escape")
        assert text_of(events) == text


@pytest.mark.parametrize("controller", [Controller.EHCI, Controller.UHCI], ids=str)
async def test_controllers_that_lose_reports(guests: Guests, controller: Controller) -> None:
    """The text arrives whole, or what has certainly arrived is a part of it, which the error says."""
    guest = await guests.get(with_controller(controller))
    text = random_text(3, CHARACTERS // 4)
    async with connected(guest.targets[0]) as farplug:
        await farplug.typing.type("x", via=Via.USB)
        async with reading(guest, 0, KEY_ESC) as events:
            with busy(2):
                certain = await _typed(farplug, text)
            await farplug.typing.press("Escape")
        assert text_of(events)[:certain] == text[:certain]
        if certain == len(text):
            assert text_of(events) == text


async def _typed(farplug: Guest, text: str) -> int:
    try:
        typed = await farplug.typing.type(text, via=Via.USB)
    except DeviceError as error:
        return int(error.message.split(": ")[1].split()[0])
    return len(text) if typed.confirmed else 0


async def test_a_guest_that_configures_the_keyboard_again(guests: Guests) -> None:
    """Interrupt a text; the error says how far it is certain, and the keyboard works again, untouched."""
    guest = await quiet_guest(guests)
    async with connected(guest.targets[0]) as farplug:
        await farplug.typing.type("x", via=Via.USB)
        typing = asyncio.ensure_future(farplug.typing.type("y" * 50_000, via=Via.USB))
        async with reading(guest, 0, 21, typing):  # KEY_Y
            pass
        device = "$(dirname $(grep -l farplug /sys/bus/usb/devices/*/manufacturer))"
        await guest.check(f"echo 0 > {device}/bConfigurationValue")
        with pytest.raises(DeviceError, match="of 50000 characters are certain"):
            await typing
        await guest.check(f"echo 1 > {device}/bConfigurationValue")
        assert (await farplug.typing.type("again", via=Via.USB)).confirmed


async def test_other_input_devices(guests: Guests) -> None:
    """Linux binds a driver to each, and gets what they do."""
    guest = await quiet_guest(guests)
    gamepad, touchscreen, media = Gamepad(), Touchscreen(), MediaKeys()
    device = VirtualDevice(gamepad, touchscreen, media, product="Controls", speeds=(Speed.HIGH,))
    async with plugged(guest.targets[0], device):
        async with reading(guest, 0, 0x130) as events:  # BTN_SOUTH
            await gamepad.move(left=(-127, 127), hat=Hat.RIGHT)
            await gamepad.press(1)
            await gamepad.release(1)
        assert {(code, value) for kind, code, value in events if kind == 3} >= {(0, -127), (1, 127), (16, 1)}
        async with reading(guest, 1, 0x14A) as events:  # BTN_TOUCH
            await touchscreen.tap(16384, 8192)
        places = {code: value for kind, code, value in events if kind == 3}
        assert (places[0], places[1]) == (16384, 8192)
        async with reading(guest, 2, 140) as events:  # KEY_CALC
            await media.press(MediaKey.VOLUME_UP)
            await media.press(MediaKey.CALCULATOR)
        assert [code for kind, code, value in events if kind == 1 and value] == [115, 140]
    assert await trouble(guest) == ""


async def test_resets_during_a_text(guests: Guests) -> None:
    """Reset the port again and again: each interrupted text is an error, and the keyboard works afterwards."""
    guest = await quiet_guest(guests)
    async with connected(guest.targets[0]) as farplug:
        await farplug.typing.type("x", via=Via.USB)
        device = "$(dirname $(grep -l farplug /sys/bus/usb/devices/*/manufacturer))"
        for _ in range(5):
            typing = asyncio.ensure_future(farplug.typing.type("y" * 50_000, via=Via.USB))
            async with reading(guest, 0, 21, typing):  # KEY_Y
                pass
            await guest.check(f"for i in 1 2 3; do echo 0 >{device}/authorized; echo 1 >{device}/authorized; done")
            with pytest.raises(DeviceError, match="of 50000 characters are certain"):
                await typing
        text = random_text(11, 300)
        async with reading(guest, 0, KEY_ESC) as events:
            assert (await farplug.typing.type(text, via=Via.USB)).confirmed
            await farplug.typing.press("Escape")
        assert text_of(events) == text


async def test_two_texts_at_once_on_two_keyboards(guests: Guests) -> None:
    """A session types one text after the other, on one of its keyboards: Linux shows its locks on all of them."""
    guest = await quiet_guest(guests)
    texts = ["a" + random_text(seed, 400) for seed in (12, 13)]
    async with connected(guest.targets[0]) as farplug:
        await farplug.attach([Source.keyboard(), Source.keyboard()])
        async with reading(guest, 0, KEY_ESC) as events:
            typed = await asyncio.gather(*(farplug.typing.type(text, via=Via.USB) for text in texts))
            assert all(one.confirmed for one in typed)
            await farplug.typing.press("Escape")
        assert text_of(events) in ("".join(texts), "".join(reversed(texts)))
    assert await trouble(guest) == ""
