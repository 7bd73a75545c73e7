"""The camera in Linux: v4l2-ctl gets every frame whole and in order."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tests.guest.plugging import FUNCTIONS, GUEST_TIMEOUT, SPICE, TCP, Port, plugged
from tests.long import LONG, every_value

from farplug.testing import QemuGuest
from farplug.virtual import VirtualDevice
from farplug.virtual.video import Camera, Encoding, Mode, Pattern, camera_device
from farplug.virtual.video.pattern import picture

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

SPLIT = """
import hashlib, json, sys
data, size = open("/tmp/video", "rb").read(), int(sys.argv[1])
if size:
    frames = [data[at:at + size] for at in range(0, len(data), size)]
else:
    frames = [b"\\xff\\xd8" + part for part in data.split(b"\\xff\\xd8")[1:]]
print(json.dumps([hashlib.sha256(frame).hexdigest()[:16] for frame in frames]))
"""
"""Prints the digests of the frames of a file: frames of one size, or JPEG images without a thumbnail."""

FRAMES = 300 if LONG else 60
MODES = {mode: place for place, mode in enumerate(Pattern().modes)}
CHOSEN = [
    Mode(Encoding.YUY2, 320, 240),
    next(mode for mode in MODES if (mode.encoding, mode.width) == (Encoding.MJPEG, 640)),
    next(mode for mode in MODES if (mode.encoding, mode.width) == (Encoding.MJPEG, 1280)),
]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


async def node(guest: QemuGuest) -> str:
    """Return the device of the camera, once the guest's driver has it."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await guest.run("test -c /dev/video0 && v4l2-ctl -d /dev/video0 --all")).exit_code:
            await asyncio.sleep(0.1)
    return "/dev/video0"


async def unplugged(guest: QemuGuest) -> None:
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not (await guest.run("test -c /dev/video0")).exit_code:
            await asyncio.sleep(0.1)


async def read(guest: QemuGuest, device: str, width: int, height: int, encoding: Encoding, count: int) -> list[str]:
    """Return the digests of frames that v4l2-ctl reads."""
    pixels = "YUYV" if encoding is Encoding.YUY2 else "MJPG"
    await guest.check(
        f"v4l2-ctl -d {device} --set-fmt-video=width={width},height={height},pixelformat={pixels} "
        f"--stream-mmap=32 --stream-count={count} --stream-to=/tmp/video 2>&1"
    )
    size = width * height * 2 if encoding is Encoding.YUY2 else 0
    found: list[str] = json.loads(await guest.check(f"python3 -c '{SPLIT}' {size}; rm /tmp/video"))
    return found


@every_value(mode=CHOSEN, port=(TCP, SPICE))
async def test_every_frame_is_whole_and_in_order(guests: Guests, mode: Mode, port: Port) -> None:
    guest = await guests.get(FUNCTIONS)
    camera = Camera(Pattern())
    async with plugged(guest.targets[port], VirtualDevice(camera, product="Virtual Camera")) as hub:
        device = await node(guest)
        for count in (FRAMES, 3):  # the second stream begins with the first frame, too
            found = await read(guest, device, mode.width, mode.height, mode.encoding, count)
            assert found == [digest(picture(mode, number)) for number in range(count)]
            async with asyncio.timeout(GUEST_TIMEOUT):
                while camera.stream is not None:
                    await asyncio.sleep(0.01)
        assert hub.reports() == []
    await unplugged(guest)


async def test_what_the_guest_can_choose(guests: Guests) -> None:
    guest = await guests.get(FUNCTIONS)
    async with plugged(guest.targets[0], camera_device()):
        listed = await guest.check(f"v4l2-ctl -d {await node(guest)} --list-formats-ext")
        assert listed.count("Size: Discrete") == 6
        for text in ("'MJPG'", "'YUYV'", "640x480", "320x240", "1280x720", "(30.000 fps)", "(5.000 fps)"):
            assert text in listed
    await unplugged(guest)


async def test_a_clip(guests: Guests, tmp_path: Path) -> None:
    guest = await guests.get(FUNCTIONS)
    images = []
    for number in range(7):
        data = io.BytesIO()
        Image.effect_noise((160, 120), 30 * number + 1).convert("RGB").save(data, "JPEG", quality=90)
        images.append(data.getvalue())
    path = tmp_path / "clip.mjpeg"
    path.write_bytes(b"".join(images))
    device = camera_device(path)
    try:
        async with plugged(guest.targets[0], device):
            found = await read(guest, await node(guest), 160, 120, Encoding.MJPEG, 20)
        assert found == [digest(images[number % 7]) for number in range(20)]
        await unplugged(guest)
    finally:
        await device.dispose()


async def test_unplugged_while_it_is_read(guests: Guests) -> None:
    guest = await guests.get(FUNCTIONS)
    camera = Camera(Pattern())
    async with plugged(guest.targets[0], VirtualDevice(camera)):
        await guest.check(f"v4l2-ctl -d {await node(guest)} --stream-mmap --stream-to=/dev/null >/dev/null 2>&1 &")
        async with asyncio.timeout(GUEST_TIMEOUT):
            while camera.frames < 10:
                await asyncio.sleep(0.01)
    await unplugged(guest)
    async with plugged(guest.targets[0], camera_device()):
        mode = CHOSEN[0]
        found = await read(guest, await node(guest), mode.width, mode.height, mode.encoding, 3)
        assert found == [digest(picture(mode, number)) for number in range(3)]
    await unplugged(guest)
    assert "Oops" not in await guest.check("dmesg")
