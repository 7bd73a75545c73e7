"""The camera: pictures compared with Pillow's decoder, files, descriptors, and streams to a guest in memory."""

from __future__ import annotations

import asyncio
import io
import os
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from farplug.errors import DeviceError, ImageError, Reason
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Buffer, Setup, Speed
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import DescriptorType
from farplug.virtual import VirtualDevice
from farplug.virtual.video import Camera, Encoding, FrameSource, MjpegFile, MjpegFolder, Mode, Pattern, camera_device
from farplug.virtual.video import frames as module
from farplug.virtual.video.jpeg import Finder, JpegError
from farplug.virtual.video.pattern import picture
from farplug.virtual.video.uvc import PAYLOAD_SIZE, RATES, Streaming, payloads

IN = 0x81
PROBE, COMMIT = 0x100, 0x200
SMALL = Mode(Encoding.YUY2, 320, 240)


def jpeg(width: int = 32, height: int = 16, colour: int = 0, **options: object) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 255 - colour, 99)).save(data, "JPEG", **options)
    return data.getvalue()


def clip(path: Path, *images: bytes) -> Path:
    path.write_bytes(b"".join(images))
    return path


# Pictures -----------------------------------------------------------------------------------------------------------


def blocks_of(mode: Mode, data: bytes) -> list[list[Any]]:
    """Return the brightness of each block of 16x16 pixels, of which all must be equal."""
    if mode.encoding is Encoding.YUY2:
        brightness = Image.frombytes("L", (mode.width, mode.height), data[::2])
    else:
        image = Image.open(io.BytesIO(data))
        image.draft("YCbCr", None)
        brightness = image.convert("YCbCr").getchannel("Y")
    assert brightness.size == (mode.width, mode.height)
    rows: list[list[Any]] = []
    for top in range(0, mode.height, 16):
        row: list[Any] = []
        for left in range(0, mode.width, 16):
            low, high = brightness.crop((left, top, left + 16, top + 16)).getextrema()
            assert low == high
            row.append(low)
        rows.append(row)
    return rows


@pytest.mark.parametrize("mode", Pattern().modes, ids=str)
def test_the_pattern_shows_its_number(mode: Mode) -> None:
    seen = set()
    for number in (0, 1, 2, 40, 12345, 65535):
        data = picture(mode, number)
        assert len(data) <= mode.largest_frame
        rows = blocks_of(mode, data)
        assert sum((value > 200) << 15 - bit for bit, value in enumerate(rows[0][:16])) == number
        assert {rows[1][column] for column in (0, -1)} == {235, 16}
        assert rows[-1][number % len(rows[-1])] == 235
        seen.add(data)
    assert len(seen) == 6


# Files --------------------------------------------------------------------------------------------------------------


async def test_a_clip(tmp_path: Path) -> None:
    images = [jpeg(colour=n, quality=quality) for n, quality in ((1, 90), (2, 10), (3, 50))]
    source = MjpegFile.open(clip(tmp_path / "a.mjpeg", *images[:2], b"\0 between \xff", images[2], b"trailing"))
    (mode,) = source.modes
    assert (mode.width, mode.height, mode.largest_frame) == (32, 16, max(map(len, images)))
    assert [await source.frame(mode, n) for n in range(7)] == [*images, *images, images[0]]
    (tmp_path / "a.mjpeg").unlink()  # it is open
    assert await source.frame(mode, 0) == images[0]
    await source.close()
    source = MjpegFile.open(clip(tmp_path / "b.mjpeg", *images))
    clip(tmp_path / "b.mjpeg", images[0])
    with pytest.raises(ImageError, match="was changed") as caught:
        await source.frame(mode, 2)
    assert caught.value.reason is Reason.CHANGED
    await source.close()


def test_images_with_restarts_and_comments() -> None:
    plain = jpeg()
    commented = plain[:2] + b"\xff\xff\xfe\0\4hi" + plain[2:]
    assert Finder(commented).image(0).end == len(commented)
    restarting = jpeg(64, 64, restart_marker_blocks=1)
    assert any(bytes((0xFF, 0xD0 + n)) in restarting for n in range(8))
    assert Finder(restarting).image(0).end == len(restarting)


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (b"", Reason.EMPTY, "is empty"),
        (b"RIFF....AVI ", Reason.WRONG_FORMAT, "does not begin as a JPEG"),
        (jpeg()[:-2], Reason.WRONG_FORMAT, "truncated"),
        (jpeg()[:100], Reason.WRONG_FORMAT, "truncated"),
        (b"\xff\xd8\xff\xd9", Reason.WRONG_FORMAT, "sides"),
        (b"\xff\xd8\xff\xd8", Reason.WRONG_FORMAT, "wrong place"),
        (b"\xff\xd8\xff\xc4\0\1", Reason.WRONG_FORMAT, "truncated"),
        (b"\xff\xd8" + b"\xff" * 99, Reason.WRONG_FORMAT, "truncated"),
        (jpeg(progressive=True), Reason.WRONG_FORMAT, "progressive"),
        (jpeg() + jpeg()[:-2], Reason.DAMAGED, "image 1: it is truncated"),
        (jpeg() + jpeg(16, 16), Reason.WRONG_FORMAT, "image 1 has 16x16 pixels, the first image 32x16"),
    ],
)
def test_what_is_not_a_clip(tmp_path: Path, content: bytes, reason: Reason, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        camera_device(clip(tmp_path / "a b.mjpeg", content))
    assert caught.value.reason is reason
    assert caught.value.remedy


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError) as caught:
        camera_device(tmp_path / "missing")
    assert caught.value.reason is Reason.NOT_FOUND
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError) as caught:
        camera_device(tmp_path / "pipe")
    assert caught.value.reason is Reason.NOT_A_FILE
    monkeypatch.setattr(module, "MAX_FRAMES", 2)
    with pytest.raises(ImageError, match="more than 2 images"):
        camera_device(clip(tmp_path / "long.mjpeg", *[jpeg()] * 3))


@pytest.mark.parametrize("path", ["x" * 300, "nul\0", "missing"])
def test_paths_that_cannot_be_used(tmp_path: Path, path: str) -> None:
    with pytest.raises(ImageError) as caught:
        module.open_frames(tmp_path / path)
    assert caught.value.reason is Reason.NOT_FOUND


async def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ImageError, match="has no JPEG images") as caught:
        MjpegFolder.open(tmp_path)
    assert caught.value.reason is Reason.EMPTY
    images = [jpeg(colour=n) for n in range(3)]
    for name, image in zip(("b.jpg", "a.JPEG", "c.jpeg"), images, strict=True):
        (tmp_path / name).write_bytes(image)
    outside = tmp_path.with_name("outside.jpg")
    outside.write_bytes(jpeg(colour=9))
    (tmp_path / "aa.jpg").symlink_to(outside)
    source = MjpegFolder.open(tmp_path)
    (mode,) = source.modes
    assert [await source.frame(mode, n) for n in range(4)] == [images[1], images[0], images[2], images[1]]
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(ImageError) as caught:
        await source.frame(mode, 1)
    assert caught.value.reason is Reason.NOT_FOUND
    for content in (jpeg(16, 16), b"no image"):
        (tmp_path / "b.jpg").write_bytes(content)
        with pytest.raises(ImageError):
            await source.frame(mode, 1)
        with pytest.raises(ImageError, match=r"b\.jpg"):
            camera_device(tmp_path)


def test_modes() -> None:
    for arguments in (
        (Encoding.YUY2, 3, 2),
        (Encoding.YUY2, 0, 2),
        (Encoding.MJPEG, 9000, 2),
        (Encoding.YUY2, 8192, 8192),
    ):
        with pytest.raises(ValueError, match="frame"):
            Mode(*arguments)
    with pytest.raises(ValueError, match="different modes"):
        Streaming([])
    with pytest.raises(ValueError, match="different modes"):
        Streaming([SMALL, SMALL])
    with pytest.raises(JpegError):
        Finder(jpeg()).image(1)


def test_payloads() -> None:
    for size in (1, PAYLOAD_SIZE - 2, PAYLOAD_SIZE - 1, 3 * (PAYLOAD_SIZE - 2)):
        parts = list(payloads(bytes(size), 1))
        assert [len(part) for part in parts[:-1]] == [PAYLOAD_SIZE] * (len(parts) - 1)
        assert [part[:2].hex() for part in parts] == ["0281"] * (len(parts) - 1) + ["0283"]
        assert sum(len(part) - 2 for part in parts) == size


# A guest in memory --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def plugged(source: FrameSource) -> AsyncIterator[tuple[MemoryGuest, Camera]]:
    camera = Camera(source)
    async with MemoryGuest(VirtualDevice(camera, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        yield guest, camera
    await camera.dispose()


async def start(guest: MemoryGuest, format: int, frame: int, rate: int = 30) -> int:
    """Negotiate and start a stream as Linux does; return dwMaxVideoFrameSize."""
    proposal = struct.pack("<HBBI18x", 1, format, frame, 10_000_000 // rate)
    await guest.control_out(Setup(0x21, 1, PROBE, 1, 26), proposal)
    parameters = await guest.control_in(Setup(0xA1, 0x81, PROBE, 1, 26))
    await guest.control_out(Setup(0x21, 1, COMMIT, 1, 26), parameters)
    chosen = struct.unpack("<HBBIHHHHHII", parameters)
    assert chosen[1:4] == (format, frame, 10_000_000 // rate)
    assert chosen[-1] == PAYLOAD_SIZE
    return int(chosen[-2])


async def frame(guest: MemoryGuest) -> tuple[int, bytes]:
    """Return the toggle bit and the data of the next frame."""
    data = bytearray()
    toggles = set()
    while True:
        payload = await guest.bulk_in(IN, PAYLOAD_SIZE)
        assert payload[0] == 2
        toggles.add(payload[1] & 1)
        data += payload[2:]
        if payload[1] & 2:
            (toggle,) = toggles
            return toggle, bytes(data)


async def test_descriptors() -> None:
    async with plugged(Pattern()) as (guest, _):
        raw = await guest.get_descriptor(DescriptorType.CONFIGURATION, length=4096)
        control, streaming = ConfigurationDescriptor.parse(raw).interfaces
        assert (control.interface_class, control.interface_subclass, control.endpoints) == (14, 1, ())
        assert control.extra[:13].hex() == "0d24010001" + "2800" + "006cdc02" + "0101"
        assert (
            streaming.extra[:13].hex() == "0f240102" + struct.pack("<H", len(streaming.extra)).hex() + "81000200000001"
        )
        frames = []
        at = 0
        while at < len(streaming.extra):
            size, kind, subtype = streaming.extra[at : at + 3]
            assert kind == 0x24
            if subtype in (5, 7):
                frames.append((subtype, *struct.unpack_from("<HH", streaming.extra, at + 5)))
            at += size
        sizes = [(640, 480), (320, 240), (1280, 720)]
        assert frames == [*((7, *size) for size in sizes), *((5, *size) for size in sizes)]


async def test_frames_arrive_whole_and_in_order() -> None:
    async with plugged(Pattern()) as (guest, camera):
        for format, place, mode in ((2, 2, SMALL), (1, 2, Pattern().modes[1])):
            size = await start(guest, format, place)
            assert size == mode.largest_frame
            for number in range(5):
                assert await frame(guest) == (number & 1, picture(mode, number))
            assert camera.stream is not None
            await guest.clear_halt(IN)  # stop
            assert camera.stream is None
        assert camera.frames == 10


async def test_a_stream_that_is_started_again_begins_with_a_frame() -> None:
    async with plugged(Pattern()) as (guest, _):
        await start(guest, 2, 2)
        await guest.bulk_in(IN, PAYLOAD_SIZE)  # a part of a frame
        await start(guest, 2, 2)
        assert (await frame(guest))[1] == picture(SMALL, 0)
        await guest.bulk_in(IN, PAYLOAD_SIZE)
        await guest.set_configuration(1)
        await start(guest, 2, 2)
        assert (await frame(guest))[1] == picture(SMALL, 0)


async def test_requests() -> None:
    async with plugged(Pattern()) as (guest, _):
        assert await guest.control_in(Setup(0xA1, 0x85, PROBE, 1, 2)) == b"\x1a\0"
        assert await guest.control_in(Setup(0xA1, 0x86, PROBE, 1, 1)) == b"\3"
        default = await guest.control_in(Setup(0xA1, 0x87, PROBE, 1, 26))
        assert default[2:8] == bytes((1, 1)) + (10_000_000 // 30).to_bytes(4, "little")
        for request in (0x81, 0x82, 0x83, 0x84):
            assert await guest.control_in(Setup(0xA1, request, PROBE, 1, 26)) == default
        for value, index in ((0x300, 1), (PROBE, 0), (PROBE, 0x101), (PROBE + 1, 1)):
            with pytest.raises(TransferFailed, match="stall"):
                await guest.control_in(Setup(0xA1, 0x81, value, index, 26))
        for data in (b"", bytes(26), b"\xff" * 26, b"\xff" * 34, b"\1"):
            await guest.control_out(Setup(0x21, 1, PROBE, 1, len(data)), data)
            parameters = await guest.control_in(Setup(0xA1, 0x81, PROBE, 1, 26))
            assert parameters[2] in (1, 2)
            assert 10_000_000 // int.from_bytes(parameters[4:8], "little") in RATES


class Made(FrameSource):
    """Frames of a program, of which some fail."""

    def __init__(self, *frames: bytes | Exception) -> None:
        self.made = frames
        self.closed = 0

    @property
    def modes(self) -> Sequence[Mode]:
        return [Mode(Encoding.YUY2, 2, 1), Mode(Encoding.MJPEG, 2, 1, 8)]

    async def frame(self, mode: Mode, number: int) -> Buffer:
        await asyncio.sleep(0)
        made = self.made[min(number, len(self.made) - 1)]
        if isinstance(made, Exception):
            raise made
        return made

    async def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("wrong", [RuntimeError("no picture"), b"too long", b"", b"abc"])
async def test_frames_from_python(wrong: bytes | Exception) -> None:
    source = Made(b"good", wrong, b"last")

    async def use() -> None:
        async with plugged(source) as (guest, _):
            await start(guest, 1, 1)
            assert [(await frame(guest))[1] for _ in range(3)] == [b"good", b"good", b"last"]

    with pytest.raises((RuntimeError, DeviceError), match=r"no picture|a frame of yuy2 2x1 has . bytes, not 4"):
        await use()
    source.closed = 0


async def test_a_source_without_a_first_frame() -> None:
    source = Made(RuntimeError("no picture"), b"x" * 8, b"x" * 9, b"x")

    async def use() -> None:
        async with plugged(source) as (guest, _):
            await start(guest, 2, 1)
            assert [(await frame(guest))[1] for _ in range(3)] == [b"x" * 8, b"x" * 8, b"x"]

    with pytest.raises((RuntimeError, ExceptionGroup)):
        await use()


class Slow(Made):
    """A program that makes no frame, and takes a while to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.making = self.most = 0
        self.begun = asyncio.Event()

    async def frame(self, mode: Mode, number: int) -> Buffer:
        self.making += 1
        self.begun.set()
        self.most = max(self.most, self.making)
        try:
            await asyncio.Event().wait()
            return b""
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            self.making -= 1


async def test_one_frame_is_made_at_a_time_whatever_is_reset() -> None:
    async with plugged(source := Slow()) as (guest, _):
        for _ in range(3):
            await start(guest, 1, 1)
            await source.begun.wait()
            source.begun.clear()
            await guest.set_configuration(1)
        await start(guest, 1, 1)
        await source.begun.wait()
    assert (source.making, source.most) == (0, 1)
