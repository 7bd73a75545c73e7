"""The screen and the inputs of a guest, with a SPICE server in this process."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.spice.console_pictures import console_picture
from tests.spice.test_display import bitmap, copy, create, fill
from tests.transport.fake_spice import SESSION_ID, Behaviour, Channel, FakeSpice, message, running
from tests.transport.test_spice_side import Inputs as FakeInputs
from tests.transport.test_spice_side import Screen as FakeScreen

from farplug.app import screen as screen_module
from farplug.app.app import App
from farplug.app.commands import ButtonName, Click, Press, Screenshot, ScreenText, TypeText, from_words
from farplug.app.console_fonts import console_glyphs
from farplug.app.guest import Guest
from farplug.app.png import encode_png, write_png
from farplug.app.settings import TargetSettings
from farplug.errors import FarplugError, Reason, RefusedError, SetupError, TargetError, UsageError
from farplug.spice.framebuffer import Rect
from farplug.spice.inputs import Button, Locks
from farplug.spice.types import ChannelType
from farplug.target import open_session, parse_target

WHOLE = Rect(0, 0, 128, 64)
PIXELS = bytes(range(256)) * 128
PICTURE = message(314, create(128, 64)) + message(304, copy(WHOLE, bitmap(128, 64, PIXELS))) + message(102)


class Machine:
    """A VM with a display and inputs.

    Attributes:
        screen: its display channel.
        inputs: its inputs channel.
        mice: the mouse modes that it supports, a mask.
    """

    def __init__(self, channels: tuple[tuple[int, int], ...] = ((2, 0), (3, 0)), mice: int = 3) -> None:
        self.screen = FakeScreen(PICTURE)
        self.inputs = FakeInputs()
        self.channels = channels
        self.mice = mice
        self.app = App()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Serve; the port."""
        self.loop = asyncio.get_running_loop()
        side: dict[ChannelType, Behaviour] = {
            ChannelType.DISPLAY: self.screen.serve,
            ChannelType.INPUTS: self.inputs.serve,
        }
        fake = FakeSpice(main=self._main, channels=self.channels, side=side)
        async with running(fake) as port:
            yield port

    @asynccontextmanager
    async def guest(self) -> AsyncIterator[Guest]:
        """Serve, and connect; the guest."""
        async with self.serving() as port, self.app:
            yield await self.app.connect_screen(TargetSettings(f"spice://127.0.0.1:{port}"))
        assert not self.screen.broken

    async def _main(self, channel: Channel) -> None:
        channel.send(message(103, struct.pack("<8I", SESSION_ID, 0, self.mice, 1, 0, 10, 0, 0)))
        while True:
            kind, _ = await channel.receive()
            if kind == 104:
                listed = b"".join(bytes(pair) for pair in self.channels)
                channel.send(message(104, struct.pack("<I", len(self.channels)) + listed))
            elif kind == 105:
                channel.send(message(105, struct.pack("<HH", self.mice, 2)))


def decode_png(data: bytes) -> tuple[int, int, bytes]:
    """Return width, height and RGB pixels of a PNG file without filters; check its structure."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    position, chunks = 8, {}
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, position + 8 + size)[0]
        chunks[kind] = body
        position += size + 12
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == height * (1 + 3 * width)
    assert not any(rows[:: 1 + 3 * width])
    return width, height, b"".join(rows[at + 1 : at + 1 + 3 * width] for at in range(0, len(rows), 1 + 3 * width))


def rgb(pixels: bytes) -> bytes:
    return b"".join(
        pixels[at + 2 : at + 3] + pixels[at + 1 : at + 2] + pixels[at : at + 1] for at in range(0, len(pixels), 4)
    )


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (64, 1), (1, 65)])
def test_png(width: int, height: int) -> None:
    pixels = os.urandom(4 * width * height)
    assert decode_png(encode_png(width, height, pixels)) == (width, height, rgb(pixels))


def test_png_files_replace_png_files_only(tmp_path: Path) -> None:
    data = encode_png(1, 1, b"abcd")
    path = tmp_path / "a.png"
    old = os.umask(0o027)
    try:
        write_png(str(path), data)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.png"
    link.symlink_to(path)
    write_png(str(link), data)
    assert link.is_symlink()
    other = tmp_path / "disk.raw"
    other.write_bytes(bytes(100))
    for wrong, reason in (
        (other, Reason.WRONG_FORMAT),
        (tmp_path, Reason.NOT_A_FILE),
        (Path("/dev/null"), Reason.NOT_A_FILE),
        (tmp_path / "none/a.png", Reason.NOT_FOUND),
    ):
        with pytest.raises(UsageError) as caught:
            write_png(str(wrong), data)
        assert caught.value.reason is reason
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.png", "link.png", "disk.raw"}


async def test_frames_and_changes() -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest, guest.screen.used():
        frame = await guest.screen.frame()
        assert (frame.width, frame.height, frame.pixels) == (128, 64, PIXELS)
        assert frame.pixel(1, 0) == (6, 5, 4)
        assert await guest.screen.size() == (128, 64)
        assert await guest.screen.changes(frame.serial) == []
        waiting = asyncio.ensure_future(guest.screen.wait_for_change(frame.serial))
        await asyncio.sleep(0)
        machine.screen.links[0].send(message(302, fill(Rect(100, 0, 101, 1), 0x010203)))
        changed = await waiting
        assert changed.pixel(100, 0) == (1, 2, 3)
        assert frame.pixels == PIXELS, "a frame does not change"
        assert await guest.screen.changes(frame.serial) == [Rect(64, 0, 128, 64)]
        assert await guest.screen.wait_for_change(frame.serial) == changed, "it has changed already"


async def test_stillness() -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest, guest.screen.used():
        await guest.screen.frame()

        async def change(rect: Rect) -> None:
            for colour in range(10_000):
                machine.screen.links[0].send(message(302, fill(rect, colour)))
                await asyncio.sleep(0.005)

        changing = asyncio.ensure_future(change(Rect(0, 0, 1, 1)))
        waiting = asyncio.ensure_future(guest.screen.wait_until_still(0.3))
        await guest.screen.wait_until_still(0.3, cells=1)
        assert not waiting.done(), "the blinking cell counts there"
        changing.cancel()
        await waiting


async def test_displays_that_do_not_exist() -> None:
    async with asyncio.timeout(60):
        async with Machine().guest() as guest:
            with pytest.raises(TargetError, match="no display 7") as caught:
                await guest.screen_of(7).frame()
            assert (caught.value.reason, str(caught.value.remedy)) == (Reason.NO_DISPLAY, "its displays are: 0")
        async with Machine(channels=((9, 0),)).guest() as guest:
            with pytest.raises(TargetError, match="no display"):
                await guest.screen.frame()
            with pytest.raises(TargetError) as caught:
                await guest.inputs.press("a")
            assert caught.value.reason is Reason.NO_INPUTS
        async with Guest(session=await open_session(parse_target("unix:/nowhere"))) as guest:  # nothing is opened
            for call in (guest.screen.frame(), guest.inputs.press("a")):
                with pytest.raises(TargetError) as caught:
                    await call
                assert caught.value.reason in (Reason.NO_DISPLAY, Reason.NO_INPUTS)
                assert "spice://" in caught.value.remedy


async def test_text_and_keys() -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest:
        typed: list[int] = []
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await guest.inputs.type("aB\n", typed.append)
        assert loop.time() - begun >= 3 * screen_module.KEY_INTERVAL
        assert typed == [1, 2, 3]
        await guest.inputs.press("ctrl+alt+Delete")
        assert [body for _, body in machine.inputs.received] == ["1e9e", "2a30b0aa", "1c9c", "1d38e053e0d3b89d"]
        with pytest.raises(UsageError):
            await guest.inputs.type("aß")
        with pytest.raises(UsageError):
            await guest.inputs.press("nokey")
        assert await guest.inputs.locks() == Locks.NUM
        await guest.inputs.set_locks(Locks.CAPS)
        await machine.inputs.until(5)
        assert machine.inputs.received[4:] == [(103, "0400")], "a text that cannot be typed is not begun"


async def test_two_texts_are_not_mixed() -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest:
        await asyncio.gather(guest.inputs.type("aaaa"), guest.inputs.type("bbbb"))
        bodies = [body for _, body in machine.inputs.received]
        assert bodies in (["1e9e"] * 4 + ["30b0"] * 4, ["30b0"] * 4 + ["1e9e"] * 4)


class LockedInputs(FakeInputs):
    """An inputs channel of a VM with Caps Lock on, which reports each change of the lock keys."""

    async def serve(self, channel: Channel) -> None:
        channel.send(message(101, struct.pack("<H", Locks.CAPS)))
        while True:
            kind, body = await channel.receive()
            self.received.append((kind, body.hex()))
            self.changed.set()
            if kind == 103:
                channel.send(message(102, body))


async def test_two_texts_with_caps_lock_on() -> None:
    machine = Machine()
    machine.inputs = LockedInputs()
    async with asyncio.timeout(60), machine.guest() as guest, guest.inputs.used():
        await asyncio.gather(guest.inputs.type("aa"), guest.inputs.type("bb"), guest.inputs.press("ctrl+c"))
        await machine.inputs.until(9)
        off, on = (103, "0000"), (103, "0400")
        a, b = (104, "1e9e"), (104, "30b0")
        assert machine.inputs.received == [off, a, a, on, off, b, b, on, (104, "1d2eae9d")]


async def test_held_keys_are_released_when_the_block_is_cancelled() -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest, guest.inputs.used():

        async def hold() -> None:
            async with guest.inputs.hold("shift", "Left"):
                await asyncio.Event().wait()

        holding = asyncio.ensure_future(hold())
        await machine.inputs.until(2)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await machine.inputs.until(4)
        assert [body for _, body in machine.inputs.received] == ["2a", "e04b", "e0cb", "aa"]


async def test_clicks_at_positions() -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest:
        await guest.inputs.click(5000, 7, Button.RIGHT)
        await guest.inputs.wheel(-1)
        await machine.inputs.until(5)
        assert machine.inputs.received == [
            (112, struct.pack("<IIHB", 127, 7, 0, 0).hex()),
            *((113, "030400"), (114, "030000"), (113, "040800"), (114, "040000")),
        ]
        with pytest.raises(UsageError, match="moved to positions"):
            await guest.inputs.move_by(1, 1)


async def test_clicks_without_a_tablet() -> None:
    machine = Machine(mice=1)
    async with asyncio.timeout(60), machine.guest() as guest:
        with pytest.raises(RefusedError) as caught:
            await guest.inputs.click(1, 1)
        assert caught.value.reason is Reason.NO_TABLET
        await machine.app.do(Click(-300, 10, ButtonName.MIDDLE, relative=True))
        await machine.inputs.until(5)
        moves = [struct.unpack("<iiH", bytes.fromhex(body)) for kind, body in machine.inputs.received if kind == 111]
        assert [sum(move[axis] for move in moves) for axis in (0, 1)] == [-300, 10]
        assert all(abs(move[0]) <= 127 for move in moves)
        assert machine.inputs.received[-2:] == [(113, "020200"), (114, "020000")]


async def test_commands(tmp_path: Path) -> None:
    machine = Machine()
    path = tmp_path / "out.png"
    async with asyncio.timeout(60), machine.guest():
        result = await machine.app.do(Screenshot(str(path)))
        assert result == {"path": str(path), "width": 128, "height": 64}
        assert decode_png(path.read_bytes()) == (128, 64, rgb(PIXELS))
        await machine.app.do(TypeText("a"))
        await machine.app.do(Press("F1"))
        await machine.app.do(Click(1, 2))
        await machine.inputs.until(5)
        assert [kind for kind, _ in machine.inputs.received] == [104, 104, 112, 113, 114]
        for command in (Click(1 << 40, 0), Screenshot("/dev/null"), Screenshot(str(path), display=3), Press("")):
            with pytest.raises(FarplugError):
                await machine.app.do(command)


async def test_the_text_of_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    async with asyncio.timeout(60), machine.guest() as guest:
        with pytest.raises(TargetError) as caught:
            await guest.screen.text()
        assert caught.value.reason is Reason.NO_TEXT
        lines = ["login: root", "# _"]
        picture = guest.screen.shown()
        assert picture is not None
        pixels, *size = console_picture((*lines, "", ""), console_glyphs(), columns=16)
        assert size == [picture.width, picture.height]
        picture.pixels[:] = pixels
        result = await machine.app.do(ScreenText())
        assert result == {"lines": [*lines, "", ""], "columns": 16, "unknown": 0}
        monkeypatch.setattr("farplug.app.console_fonts.VGA_FOLDERS", ())
        monkeypatch.setattr("farplug.app.console_fonts.PSF_FOLDERS", ())
        with pytest.raises(SetupError) as missing:
            await machine.app.do(ScreenText())
        assert missing.value.reason is Reason.MISSING_PROGRAM


def test_commands_in_words() -> None:
    assert from_words(["screen-text"]) == ScreenText()
    assert from_words(["screenshot", "a.png"]) == Screenshot("a.png")
    assert from_words(["type", "a b"]) == TypeText("a b")
    assert from_words(["press", "F1"]) == Press("F1")
    assert from_words(["click", "1", "20"]) == Click(1, 20)
    for words in (["click", "1"], ["click", "-1", "2"], ["click", "x", "2"], ["force", "press", "F1"]):
        assert from_words(words) is None
