"""Fuzz the camera: clips, what the guest negotiates, and a camera in a guest in memory that sends any request.

JpegError and ImageError are expected. Any other exception is a bug. The camera must send whole frames afterwards.
"""

from __future__ import annotations

import asyncio
import random
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from farplug.errors import ImageError
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Setup, Speed
from farplug.virtual import VirtualDevice
from farplug.virtual.video import Camera, Encoding, MjpegFile, Mode, Pattern
from farplug.virtual.video.frames import _Parts
from farplug.virtual.video.jpeg import Finder, JpegError
from farplug.virtual.video.pattern import picture
from farplug.virtual.video.uvc import PAYLOAD_SIZE, RATES, Request, Streaming
from harness import check, counts, raise_logged, run

SMALL = Mode(Encoding.MJPEG, 320, 240)
IMAGES = tuple(picture(SMALL, number) for number in range(3))


def damage(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        at = rng.choice((rng.randrange(len(damaged) + 1), rng.randrange(min(700, len(damaged)) + 1)))
        match rng.randrange(3):
            case 0:
                damaged[at : at + 1] = rng.randbytes(1)
            case 1:
                del damaged[at : at + rng.choice((1, 20, 1000))]
            case _:
                damaged[at:at] = rng.choice((b"\xff", b"\xff\xd8", b"\xff\xd9", b"\xff\xc0\xff\xff", bytes(5)))
    return bytes(damaged)


def fuzz_clip(rng: random.Random) -> None:
    whole = [rng.choice(IMAGES) for _ in range(rng.randrange(1, 4))]
    data = damage(rng, b"".join(whole))
    try:
        found = Finder(data).image(0)
    except JpegError as refused:
        check(data != b"".join(whole) and str(refused).isprintable())
    else:
        assert 0 < found.end <= len(data)
        assert data[found.end - 2 : found.end] == b"\xff\xd9"
        counts["images"] += 1
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="farplug-") as folder:
        path = Path(folder, "clip.mjpeg")
        path.write_bytes(data)
        with path.open("rb") as file:
            parts = _Parts(file.fileno())
            parts.SIZE = rng.choice((2, 7, 100, 1 << 20))  # type: ignore[misc]
            for _ in range(20):
                start, size = rng.randrange(len(data) + 9), rng.randrange(300)
                assert parts[start : start + size] == data[start : start + size]
                part = rng.choice((b"\xff", b"\xff\xd8", b"\xff\xd9"))
                assert parts.find(part, start) == data.find(part, start)
        try:
            source = MjpegFile.open(path)
        except ImageError as refused:
            check(str(refused).isprintable() and len(str(refused)) < 300)
        else:
            (mode,) = source.modes
            for number in range(4):
                frame = asyncio.run(_frame(source, mode, number))
                assert 0 < len(frame) <= mode.largest_frame
                counts["frames"] += 1
            asyncio.run(source.close())


async def _frame(source: MjpegFile, mode: Mode, number: int) -> bytes:
    return bytes(await source.frame(mode, number))


def fuzz_negotiation(rng: random.Random) -> None:
    streaming = Streaming(rng.sample(Pattern().modes, rng.randrange(1, 7)))
    for _ in range(20):
        streaming.set(rng.choice((rng.randbytes(rng.randrange(60)), proposal(rng))))
        parameters = streaming.get(Request.GET_CUR)
        assert parameters is not None
        chosen = streaming.probe
        assert chosen.rate in RATES
        streaming.set(parameters)
        assert streaming.probe == chosen
        for request in range(0x81, 0x90):
            streaming.get(request)


def proposal(rng: random.Random) -> bytes:
    interval = rng.choice((0, 1, 333333, 666666, 2_000_000, 0xFFFFFFFF))
    return struct.pack("<HBBI18x", 1, rng.randrange(4), rng.randrange(5), interval)


async def camera(rng: random.Random) -> None:
    device = VirtualDevice(Camera(Pattern()), speeds=(Speed.HIGH,))
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        for _ in range(rng.randrange(20)):
            value, index = rng.choice((0x100, 0x200, 0, 0x300, 0x101)), rng.choice((1, 0, 0x101, 7))
            with suppress(TransferFailed):
                match rng.randrange(5):
                    case 0:
                        data = rng.choice((proposal(rng), rng.randbytes(rng.randrange(40))))
                        await guest.control_out(Setup(0x21, 1, value, index, len(data)), data)
                    case 1:
                        await guest.control_in(Setup(0xA1, rng.randrange(0x80, 0x90), value, index, rng.randrange(40)))
                    case 2:
                        await guest.clear_halt(0x81)
                    case 3:
                        pending = guest.submit_in(0x81, rng.choice((1, 512, PAYLOAD_SIZE)))
                        await asyncio.sleep(0)
                        if not pending.done:
                            pending.cancel()
                    case _:
                        await guest.set_configuration(1)
        await guest.control_out(Setup(0x21, 1, 0x200, 1, 26), struct.pack("<HBBI18x", 1, 1, 2, 333333))
        data = b""
        while True:
            payload = await guest.bulk_in(0x81, PAYLOAD_SIZE)
            data += payload[2:]
            if payload[1] & 2:
                break
        assert data == IMAGES[0]


def fuzz_camera(rng: random.Random) -> None:
    asyncio.run(camera(rng))


def one_case(rng: random.Random) -> None:
    rng.choice((*[fuzz_clip] * 5, *[fuzz_negotiation] * 5, fuzz_camera))(rng)


if __name__ == "__main__":
    raise_logged()
    run("camera", one_case)
