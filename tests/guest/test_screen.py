"""The screen, the keyboard and the mouse of real guests."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.app.test_screen import decode_png
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, SCREEN, read_line
from tests.guest.plugging import until as until_in

from farplug.app.guest import Guest
from farplug.app.png import write_png
from farplug.app.screen import Frame
from farplug.app.settings import Source
from farplug.errors import Reason, RefusedError, TargetError
from farplug.spice.inputs import Locks
from farplug.target import open_session, parse_target
from farplug.testing import Boot, GuestConfig, QemuGuest, Spice

DEVICES = ("VGA", "qxl-vga", "virtio-vga")


async def connect(guest: QemuGuest) -> Guest:
    return Guest(session=await open_session(parse_target(guest.spice.target)))


async def dump(guest: QemuGuest, folder: Path, device: str = "screen", head: int = 0) -> tuple[int, int, bytes]:
    """Return QEMU's own picture of a display: width, height, and RGB pixels."""
    path = folder / "dump.ppm"
    await guest.qmp.execute("screendump", {"filename": str(path), "device": device, "head": head})
    kind, size, depth, pixels = path.read_bytes().split(b"\n", 3)
    assert (kind, depth) == (b"P6", b"255")
    width, height = map(int, size.split())
    return width, height, pixels


def colours(frame: Frame) -> int:
    return len({frame.pixels[at : at + 3] for at in range(0, len(frame.pixels), 4)})


def shown_text(frame: Frame) -> str:
    """Return the text of the console; none if there is none."""
    try:
        return str(frame.text())
    except TargetError:
        return ""


async def until(farplug: Guest, condition: Callable[[Frame], bool], display: int = 0) -> Frame:
    """Return the first frame that is as wanted."""
    screen = farplug.screen_of(display)
    async with asyncio.timeout(300), screen.used():
        frame = await screen.frame()
        while not condition(frame):
            frame = await screen.wait_for_change(frame.serial)
        return frame


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boot", [Boot.BIOS, Boot.UEFI])
async def test_screenshots_equal_those_of_qemu(guests: Guests, device: str, boot: Boot, tmp_path: Path) -> None:
    config = GuestConfig(
        spice=Spice(), boot=boot, extra_arguments=("-device", f"{device},id=screen", "-boot", "menu=on")
    )
    async with guests.fresh(config) as guest, await connect(guest) as farplug:
        # The firmware prints text: in text mode, or in a graphics mode.
        frame = await until(farplug, lambda frame: colours(frame) > 1)
        assert frame.width >= 640
        if boot is Boot.BIOS:
            await until(farplug, lambda frame: "SeaBIOS" in shown_text(frame))
        await guest.qmp.execute("stop")
        # QEMU draws what the VM has written before the stop some time later.
        async with asyncio.timeout(300):
            while True:
                frame = await farplug.screen.frame()
                expected = await dump(guest, tmp_path)
                write_png(str(tmp_path / "out.png"), frame.png())
                if decode_png((tmp_path / "out.png").read_bytes()) == expected:
                    break
                await farplug.screen.wait_for_change(frame.serial)
        # A new link while the VM is paused.
        display = farplug.session.displays[0]
        display.close()
        again = await farplug.screen.frame()
        assert decode_png(again.png()) == expected
        await guest.qmp.execute("cont")


async def test_interrupted_links_do_not_crash_qemu(guests: Guests) -> None:
    config = GuestConfig(spice=Spice(), boot=Boot.BIOS, extra_arguments=("-device", "VGA,id=screen"))
    async with guests.fresh(config) as guest:
        for number in range(60):
            farplug = await connect(guest)
            looking = asyncio.ensure_future(farplug.screen.frame())
            await asyncio.sleep(0.001 * (number % 30))
            looking.cancel()
            await farplug.close()
            await asyncio.gather(looking, return_exceptions=True)
        assert guest.alive
        async with await connect(guest) as farplug:
            await farplug.screen.frame()


async def test_two_displays(guests: Guests, tmp_path: Path) -> None:
    config = GuestConfig(
        spice=Spice(),
        boot=Boot.BIOS,
        extra_arguments=("-device", "VGA,id=screen", "-device", "secondary-vga,id=other"),
    )
    async with guests.fresh(config) as guest, await connect(guest) as farplug:
        await until(farplug, lambda frame: colours(frame) > 1)
        second = await farplug.screen_of(1).frame()
        assert decode_png(second.png()) == await dump(guest, tmp_path, "other")
        with pytest.raises(TargetError) as caught:
            await farplug.screen_of(2).frame()
        assert caught.value.reason is Reason.NO_DISPLAY


async def test_a_vm_without_a_display(guests: Guests) -> None:
    config = GuestConfig(spice=Spice(), boot=Boot.BIOS)
    async with guests.fresh(config) as guest, await connect(guest) as farplug:
        with pytest.raises(TargetError) as caught:
            await farplug.screen.frame()
        assert caught.value.reason is Reason.NO_DISPLAY


TEXT = 'The quick (brown) fox; jumps over {13} lazy~dogs & "cats" @ $5.00 = 100% #1!'


KEY, ABSOLUTE, BTN_LEFT = 1, 3, 0x110


def events(dump: str) -> list[tuple[int, int, int]]:
    """Return type, code and value of the events of an input device, from their bytes in hexadecimal."""
    data = bytes.fromhex("".join(dump.split()))
    return [struct.unpack_from("<HHi", data, at + 16) for at in range(0, len(data) - 23, 24)]


async def typed(guest: QemuGuest, farplug: Guest, text: str) -> str:
    """Type a line on the guest's console, which has no shell; return what a program there reads."""
    return await read_line(guest, lambda: farplug.inputs.type(text + "\n"))


async def test_keys_and_clicks_arrive_while_a_disk_is_plugged_in(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(SCREEN)
    image = tmp_path / "a.raw"
    image.write_bytes(b"x" * (1 << 20))
    async with await connect(guest) as farplug, farplug.plug(Source.disk(str(image))) as attachment:
        await attachment.configured()
        assert await typed(guest, farplug, TEXT) == TEXT

        await farplug.inputs.press("Caps_Lock")
        async with asyncio.timeout(GUEST_TIMEOUT):
            while Locks.CAPS not in await farplug.inputs.locks():
                await asyncio.sleep(0.1)
        assert await typed(guest, farplug, "Caps Lock") == "Caps Lock"
        await farplug.inputs.press("Caps_Lock")

        node = (await guest.check("grep -l 'QEMU USB Tablet' /sys/class/input/event*/device/name")).split("/")[4]
        width, height = await farplug.screen.size()
        await guest.check(f"cat /dev/input/{node} > /tmp/events 2> /dev/null & echo $! > /tmp/reader")
        await until_in(guest, f"ls -l /proc/$(cat /tmp/reader)/fd 2>/dev/null | grep -q {node}")
        await farplug.inputs.click(width // 2, height // 4)
        async with asyncio.timeout(GUEST_TIMEOUT):
            while (found := events(await guest.check("od -An -v -tx1 /tmp/events")))[-2:-1] != [(KEY, BTN_LEFT, 0)]:
                await asyncio.sleep(0.1)
        await guest.check("kill $(cat /tmp/reader)")
        positions = {code: value for kind, code, value in found if kind == ABSOLUTE}
        assert abs(positions[0] / 32767 - 0.5) < 0.01
        assert abs(positions[1] / 32767 - 0.25) < 0.01
        assert [value for kind, code, value in found if (kind, code) == (KEY, BTN_LEFT)] == [1, 0]


async def test_firmware_has_no_tablet(guests: Guests) -> None:
    config = GuestConfig(spice=Spice(), boot=Boot.BIOS, extra_arguments=("-device", "VGA,id=screen"))
    async with guests.fresh(config) as guest, await connect(guest) as farplug:
        with pytest.raises(RefusedError) as caught:
            await farplug.inputs.click(1, 1)
        assert caught.value.reason is Reason.NO_TABLET
