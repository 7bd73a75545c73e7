"""Four functions in one device leave in the middle of their work, are reset again and again, and come back.

The guest is in memory.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.cli.key_guest import INIT, SELECT
from tests.leaks import Left, no_more_than

from farplug.ends import parse_network_end, parse_serial_end
from farplug.testing.memory import MemoryGuest, Pending
from farplug.usb import Setup, Speed
from farplug.virtual import NetworkAdapter, SerialLine, VirtualDevice
from farplug.virtual.fido import Presence, SecurityKey
from farplug.virtual.ntb import BlockReader, BlockWriter
from farplug.virtual.video import Camera, Pattern
from farplug.virtual.video.pattern import picture
from farplug.virtual.video.uvc import PAYLOAD_SIZE

ROUNDS = 100
FRAME = bytes(range(60))
PROBE, COMMIT = 0x100, 0x200


class Together:
    """The device, its guest, and the peers of its ends.

    Attributes:
        begun: transfers of the guest that wait for data.
    """

    def __init__(self, guest: MemoryGuest, folder: Path, *functions: object) -> None:
        self.guest = guest
        self._folder = folder
        line, network, key, camera = functions
        assert isinstance(line, SerialLine)
        assert isinstance(network, NetworkAdapter)
        assert isinstance(key, SecurityKey)
        assert isinstance(camera, Camera)
        self.line, self.network, self.key, self.camera = line, network, key, camera
        self.begun: list[Pending] = []

    async def connect(self) -> None:
        """Connect with the ends."""
        paths = (self._folder / "line", self._folder / "net")
        (self.typed, self.typist), (self.frames, self.sender) = [await asyncio.open_unix_connection(p) for p in paths]
        while self.line.end is None or self.network.end is None or not (self.line.end.peer and self.network.end.peer):
            await asyncio.sleep(0)

    async def configure(self) -> None:
        """Do what the drivers do first."""
        await self.guest.enumerate()
        await self.guest.set_interface(self.network.host.numbers.interface(1), 1)

    async def ask(self) -> None:
        """Let a program of the guest use the key, until it asks its user."""
        await self.guest.start_receiving(self.key.reports.address_in_device)
        for report in (INIT, SELECT):
            await self.guest.interrupt_out(self.key.received.address_in_device, report.ljust(64, b"\0"))
        async with asyncio.timeout(100):
            while self.key.question is None:
                await asyncio.sleep(0)

    async def stream(self) -> None:
        """Start the camera."""
        streaming = self.camera.host.numbers.interface(1)
        proposal = struct.pack("<HBBI18x", 1, 2, 2, 333333)
        await self.guest.control_out(Setup(0x21, 1, PROBE, streaming, 26), proposal)
        parameters = await self.guest.control_in(Setup(0xA1, 0x81, PROBE, streaming, 26))
        await self.guest.control_out(Setup(0x21, 1, COMMIT, streaming, 26), parameters)

    async def begin(self) -> None:
        """Let all of them work, so that each is in the middle of it."""
        submit = self.guest.submit_in
        self.begun = [submit(self.line.sent.address_in_device, 512) for _ in range(4)]
        self.begun += [submit(self.network.sent.address_in_device, 16384) for _ in range(4)]
        self.begun += [
            self.guest.submit_out(self.line.received.address_in_device, bytes(100_000)),
            self.guest.submit_out(self.line.received.address_in_device, bytes(100_000)),
        ]
        self.typist.write(bytes(5000))
        self.sender.write((struct.pack(">I", len(FRAME)) + FRAME) * 200)
        await self.stream()
        await self.guest.bulk_in(self.camera.video.address_in_device, PAYLOAD_SIZE)
        self.begun.append(submit(self.camera.video.address_in_device, PAYLOAD_SIZE))
        await self.ask()

    async def each_works(self) -> None:
        """Use each of them once, from the beginning to the end."""
        into, out = self.line.sent.address_in_device, self.line.received.address_in_device
        await self.guest.bulk_out(out, b"login: ")
        assert await self.typed.readexactly(7) == b"login: "
        self.typist.write(b"root\n")
        assert await self.guest.bulk_in(into, 512) == b"root\n"
        (block,) = BlockWriter().blocks([FRAME], 16384)
        await self.guest.bulk_out(self.network.received.address_in_device, block)
        assert await self.frames.readexactly(4 + len(FRAME)) == struct.pack(">I", len(FRAME)) + FRAME
        self.sender.write(struct.pack(">I", len(FRAME)) + FRAME)
        block = await self.guest.bulk_in(self.network.sent.address_in_device, 16384)
        assert [bytes(frame) for frame in BlockReader(1514).frames(block)] == [FRAME]
        await self.ask()
        self.key.answer(True)
        reports = self.key.reports.address_in_device
        while (report := await self.guest.interrupt_in(reports))[4] != 0x90:
            pass
        assert report[7] == 0
        await self.stream()
        data = bytearray()
        while True:
            payload = await self.guest.bulk_in(self.camera.video.address_in_device, PAYLOAD_SIZE)
            data += payload[2:]
            if payload[1] & 2:
                break
        assert data == picture(Pattern().modes[4], 0)

    async def forget(self) -> None:
        """Take note that the transfers of :meth:`begin` are over: each has its reply."""
        await asyncio.gather(*self.begun, return_exceptions=True)
        self.begun.clear()

    def leave(self) -> None:
        """Leave the ends."""
        self.typist.transport.abort()
        self.sender.transport.abort()


@asynccontextmanager
async def plugged(folder: Path) -> AsyncIterator[Together]:
    functions = (
        SerialLine(parse_serial_end(f"unix-listen:{folder}/line")),
        NetworkAdapter(parse_network_end(f"unix-listen:{folder}/net")),
        SecurityKey(presence=Presence.ASK),
        Camera(Pattern()),
    )
    device = VirtualDevice(*functions, speeds=(Speed.HIGH,))
    async with MemoryGuest(device) as guest:
        one = Together(guest, folder, *functions)
        await one.configure()
        await one.connect()
        yield one
    await device.dispose()
    assert not list(folder.iterdir())
    assert one.key.question is None
    one.leave()


async def test_a_detach_in_the_middle_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before: Left | None = None
    for number in range(ROUNDS):
        async with plugged(tmp_path) as one:
            if number % 10 == 1:
                await one.each_works()
            await one.begin()
        await one.forget()
        if number == 1:
            before = Left.now()
    assert before is not None
    await no_more_than(before)
    assert caplog.records == []


@pytest.mark.parametrize("how", ["reset", "configure", "choose"])
async def test_a_storm_of_resets(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    async with plugged(tmp_path) as one:
        for number in range(20):
            await one.begin()
            for _ in range(1 + number % 3):
                match how:
                    case "reset":
                        one.guest.reset()
                    case "configure":
                        await one.guest.set_configuration(number % 2)
                    case "choose":
                        for interface in range(7):
                            await one.guest.set_interface(interface, 0)
            await one.forget()
            await one.configure()
        tasks = len(asyncio.all_tasks())
        one.leave()  # what was sent before is lost with its connection
        while one.line.end is None or one.line.end.peer is not None:
            await asyncio.sleep(0)
        await one.connect()
        await one.configure()
        await one.each_works()
        assert len(asyncio.all_tasks()) <= tasks + 1
    assert caplog.records == []
