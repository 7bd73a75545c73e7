"""Displays, pointers and inputs of a session, with servers that do what a server may do, and more."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import lz4.block
import pytest
from tests.spice.test_display import bitmap, copy, create, fill, lz4_image
from tests.transport.fake_spice import SESSION_ID, Channel, FakeSpice, message, running

from farplug.errors import FarplugError, GuestGoneError, InternalError, Reason, RemoteProtocolError, TargetError
from farplug.spice import display as display_module
from farplug.spice.channel import Message
from farplug.spice.cursor import Cursor
from farplug.spice.display import MESSAGE_WORK
from farplug.spice.framebuffer import Picture, Rect
from farplug.spice.images import Unsupported, decode_image
from farplug.spice.inputs import Button, MouseMode
from farplug.spice.keys import key_code
from farplug.spice.messages import MouseModes
from farplug.spice.types import ChannelType
from farplug.transport import dialer, spice_side
from farplug.transport.connection import Timeouts
from farplug.transport.spice_session import SpiceSession
from farplug.transport.spice_side import SpiceDisplay
from farplug.transport.spice_target import SpiceTarget

CHANNELS = ((2, 0), (3, 0), (4, 0), (9, 0))
SET_ACK = message(3, struct.pack("<II", 1, 2))
OPENING = bytes.fromhex("670001000000" + "01" + "670001000000" + "07" + "65000e000000" + "00" * 14)
WHOLE = Rect(0, 0, 4, 4)
PICTURE = message(314, create(4, 4)) + message(304, copy(WHOLE, bitmap(4, 4, b"abc\0" * 16))) + message(102)


async def receive(channel: Channel) -> tuple[int, bytes]:
    async with asyncio.timeout(60):
        return await channel.receive()


class Screen:
    """A server's display channel.

    Attributes:
        links: the channels that were linked.
        early: what a channel does between the client's first messages and the server's first one.
        broken: a client closed the connection before the server's first message: QEMU would have crashed.
    """

    def __init__(self, *pictures: bytes) -> None:
        self.pictures = pictures or (PICTURE,)
        self.links: list[Channel] = []
        self.acks = 0
        self.broken = 0
        self.go = asyncio.Event()
        self.go.set()
        self.opened = asyncio.Event()
        self.gone = asyncio.Event()

    async def serve(self, channel: Channel) -> None:
        assert await channel.reader.readexactly(len(OPENING)) == OPENING
        self.links.append(channel)
        self.opened.set()
        going = asyncio.ensure_future(self.go.wait())
        reading = asyncio.ensure_future(channel.reader.read(1))
        await asyncio.wait((going, reading), return_when=asyncio.FIRST_COMPLETED)
        if not going.done():
            self.broken += 1
            going.cancel()
            return
        channel.send(SET_ACK + self.pictures[min(len(self.links), len(self.pictures)) - 1])
        try:
            first = await reading
            while first:
                rest = await channel.reader.readexactly(5)
                kind, size = struct.unpack("<HI", first + rest)
                body = await channel.reader.readexactly(size)
                self.acks += kind == 2
                if kind == 3:
                    channel.pongs.append(struct.unpack("<IQ", body)[0])
                first = await channel.reader.read(1)
        finally:
            self.gone.set()


@asynccontextmanager
async def session(
    screen: Screen | None = None, timeouts: Timeouts | None = None, **fake: object
) -> AsyncIterator[SpiceSession]:
    side = {} if screen is None else {ChannelType.DISPLAY: screen.serve}
    server = FakeSpice(channels=CHANNELS, side={**side, **fake.pop("side", {})}, **fake)  # type: ignore[arg-type, dict-item]
    async with running(server) as port:
        made = await SpiceSession.connect(SpiceTarget(host="127.0.0.1", port=port), timeouts=timeouts)
        try:
            yield made
        finally:
            await made.close()
            assert screen is None or not screen.broken, "QEMU would have crashed"


async def until(display: SpiceDisplay, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await display.changed()


async def test_a_display_is_linked_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_side, "LINGER", 0.05)
    screen = Screen()
    async with session(screen) as made:
        display = made.displays[0]
        assert not display.is_linked
        async with display.used(), display.used():
            picture = await display.picture()
            assert bytes(picture.pixels) == b"abc\0" * 16
            screen.links[0].send(message(302, fill(Rect(0, 0, 1, 1), 0x010203)))
            await until(display, lambda: picture.pixels[0] == 3)
        async with display.used():  # soon enough
            await display.picture()
        async with asyncio.timeout(60):
            await screen.gone.wait()
        assert not display.is_linked
        async with display.used():
            await display.picture()
        assert len(screen.links) == 2
        mess = screen.links[0].mess
        assert (mess.connection_id, mess.channel_caps) == (SESSION_ID, (0x162,))


async def test_acknowledgements_are_sent() -> None:
    screen = Screen(PICTURE + message(302, fill(WHOLE, 1)) * 97)
    async with session(screen) as made, made.displays[0].used():
        await made.displays[0].picture()
        async with asyncio.timeout(60):
            while screen.acks < 50:
                await asyncio.sleep(0.001)
        assert screen.acks == 50  # one for two of the 100 messages


async def test_drawing_takes_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_side, "TURN_WORK", 64)
    fills = b"".join(message(302, fill(WHOLE, colour)) for colour in range(1, 200))
    screen = Screen(PICTURE + fills)
    async with session(screen) as made, made.displays[0].used():
        picture = await made.displays[0].picture()
        turns = 0
        async with asyncio.timeout(60):
            while picture.pixels[0] != 199:
                turns += 1
                await asyncio.sleep(0)
        assert turns > 100


async def test_pointers_take_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []
    handle = Cursor.handle

    def counted(self: Cursor, message: Message) -> None:
        handled.append(len(message.body))
        handle(self, message)

    monkeypatch.setattr(Cursor, "handle", counted)
    moves = b"".join(message(104, struct.pack("<hh", 1, x)) for x in range(10_000))

    async def serve(channel: Channel) -> None:
        channel.send(SET_ACK + moves)
        await channel.reader.read()

    async with session(side={ChannelType.CURSOR: serve}) as made, made.cursors[0].used():
        turns = [0]
        before = len(handled)  # in the turns of the link
        handled.clear()
        async with asyncio.timeout(60):
            while made.cursors[0].cursor.y != 9_999:
                await asyncio.sleep(0)
                turns.append(len(handled))
                handled.clear()
        assert before + sum(turns) == 10_000
        assert len(turns) > 20
        assert max(turns) <= 2 * spice_side.TURN_WORK // MESSAGE_WORK


def _image(colour: int) -> bytes:
    """A message with an LZ4 image of the whole screen."""
    pixels = bytes((colour, 0, 0, 0)) * 16
    return message(304, copy(WHOLE, lz4_image(4, 4, [lz4.block.compress(pixels, store_size=False)])))


class _Decoder:
    """Decodes images when it may, and counts those in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may = threading.Event()
        self.may.set()
        self.begun = threading.Event()
        self.count = 0
        self.error: Exception | None = None
        self._loop = threading.get_ident()
        monkeypatch.setattr(display_module, "LARGE", 16)
        monkeypatch.setattr(spice_side, "decode_image", self)

    def __call__(self, body: memoryview, offset: int) -> Picture:
        assert threading.get_ident() != self._loop
        self.count += 1
        self.begun.set()
        assert self.may.wait(60)
        if self.error is not None:
            raise self.error
        return decode_image(body, offset)


async def test_large_images_are_decoded_in_a_thread_and_drawn_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = _Decoder(monkeypatch)
    decoder.may.clear()
    one = Rect(0, 0, 1, 1)
    images = b"".join(_image(colour) + message(302, fill(one, 100 + colour)) for colour in range(1, 6))
    async with session(Screen(PICTURE + images)) as made, made.displays[0].used():
        picture = await made.displays[0].picture()
        async with asyncio.timeout(60):
            while not decoder.begun.is_set():
                await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (picture.pixels[0], decoder.count) == (ord("a"), 1), "what follows waits"
        decoder.may.set()
        await until(made.displays[0], lambda: picture.pixels[0] == 105)
        assert bytes(picture.pixels[4:]) == b"\5\0\0\0" * 15
        assert decoder.count == 5


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RemoteProtocolError("damaged"), RemoteProtocolError), (AttributeError("a bug"), InternalError)],
)
async def test_a_large_image_that_cannot_be_decoded(
    error: Exception, kind: type[FarplugError], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = _Decoder(monkeypatch)
    decoder.error = error
    screen = Screen(PICTURE + _image(1), PICTURE)
    async with session(screen) as made:
        shown = made.displays[0]
        async with shown.used():
            with pytest.raises(kind):
                await until(shown, lambda: False)
        assert not made.ended.done()
        async with shown.used():
            await shown.picture()


async def test_a_large_image_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_side, "RELINK_INTERVAL", 0.05)
    decoder = _Decoder(monkeypatch)
    decoder.error = Unsupported("an image of another kind")
    screen = Screen(PICTURE + _image(1), PICTURE.replace(b"abc\0", b"xyz\0"))
    async with session(screen) as made, made.displays[0].used():
        await until(made.displays[0], lambda: len(screen.links) == 2 and made.displays[0].display.complete)
        assert bytes((await made.displays[0].picture()).pixels) == b"xyz\0" * 16


@pytest.mark.parametrize("end", ["display", "session", "again"])
async def test_a_display_is_closed_while_an_image_is_decoded(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = _Decoder(monkeypatch)
    decoder.may.clear()
    screen = Screen(PICTURE + _image(1), PICTURE + message(302, fill(WHOLE, 7)))
    async with session(screen) as made:
        shown = made.displays[0]
        async with shown.used():
            await shown.picture()
            async with asyncio.timeout(60):
                while not decoder.begun.is_set():
                    await asyncio.sleep(0)
        closing = None
        if end == "session":
            closing = asyncio.ensure_future(made.close())
            await asyncio.sleep(0.01)
        else:
            shown.close()
        if end == "again":  # the new link does not wait for the old image
            async with shown.used():
                await until(shown, lambda: shown.display.shown is not None and shown.display.shown.pixels[0] == 7)
                decoder.may.set()
                await shown.finished()
                assert (await shown.picture()).pixels[0] == 7
        decoder.may.set()
        if closing is not None:
            await closing


@pytest.mark.parametrize("how", ["cancelled", "closed", "timeout", "main lost"])
async def test_the_link_of_a_display_is_never_interrupted(how: str) -> None:
    screen = Screen()
    screen.go.clear()
    async with session(screen, Timeouts(handshake=0.2 if how == "timeout" else 60)) as made:
        display = made.displays[0]

        async def use() -> None:
            async with display.used():
                await display.picture()

        user = asyncio.ensure_future(use())
        async with asyncio.timeout(60):
            await screen.opened.wait()
        closing: asyncio.Future[None] | None = None
        match how:
            case "cancelled":
                user.cancel()
                display.close()  # as after LINGER
            case "closed":
                user.cancel()
                closing = asyncio.ensure_future(made.close())
                for _ in range(20):
                    await asyncio.sleep(0.001)
                    closing.cancel()  # a signal
            case "timeout":
                with pytest.raises(TargetError) as caught:
                    await user
                assert caught.value.reason is Reason.TIMED_OUT
            case "main lost":
                made.moved()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not screen.gone.is_set()
        assert closing is None or not closing.done()
        screen.go.set()
        async with asyncio.timeout(60):
            await screen.gone.wait()
            if closing is not None:
                with pytest.raises(asyncio.CancelledError):
                    await closing
        if how == "main lost":
            with pytest.raises(GuestGoneError):
                await user
        elif how != "timeout":
            with pytest.raises(asyncio.CancelledError):
                await user


async def test_a_use_while_an_abandoned_link_ends() -> None:
    screen = Screen()
    screen.go.clear()
    async with session(screen) as made:
        display = made.displays[0]
        user = asyncio.ensure_future(display.used().__aenter__())
        async with asyncio.timeout(60):
            await screen.opened.wait()
            user.cancel()
            display.close()
            screen.go.set()
            async with display.used():
                await display.picture()
        assert len(screen.links) == 2


async def test_a_display_that_never_answers_is_closed_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "FRAGILE_TIMEOUT", 0.1)
    screen = Screen()
    screen.go.clear()
    server = FakeSpice(channels=CHANNELS, side={ChannelType.DISPLAY: screen.serve})
    async with running(server) as port:
        target = SpiceTarget(host="127.0.0.1", port=port)
        made = await SpiceSession.connect(target, timeouts=Timeouts(handshake=0.1))
        with pytest.raises(TargetError):
            async with made.displays[0].used():
                pass
        await made.close()
        async with asyncio.timeout(60):
            while not screen.broken:
                await asyncio.sleep(0.001)


async def test_what_is_not_supported_is_answered_by_a_new_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_side, "RELINK_INTERVAL", 0.05)
    second = PICTURE.replace(b"abc\0", b"xyz\0")
    screen = Screen(PICTURE, PICTURE + message(310, bytes(50)), second)
    async with session(screen) as made, made.displays[0].used():
        display = made.displays[0]
        first = await display.picture()
        screen.links[0].send(message(311, bytes(50)))
        await until(display, lambda: len(screen.links) == 3 and display.display.complete)
        picture = await display.picture()
        assert bytes(picture.pixels) == b"xyz\0" * 16
        assert [*picture.changed_since(first.serial)] == [WHOLE]


async def test_a_display_without_users_is_not_linked_again() -> None:
    screen = Screen()
    async with session(screen) as made:
        display = made.displays[0]
        async with display.used():
            await display.picture()
        screen.links[0].send(message(311, bytes(50)))
        async with asyncio.timeout(60):
            await screen.gone.wait()
        assert len(screen.links) == 1
        async with display.used():
            await display.picture()
        assert len(screen.links) == 2


async def test_a_violation_ends_the_display_and_not_the_session() -> None:
    screen = Screen(PICTURE, PICTURE)
    async with session(screen) as made:
        display = made.displays[0]
        async with display.used():
            await display.picture()
            screen.links[0].send(message(314, create(0, 0)))
            with pytest.raises(RemoteProtocolError, match="0x0"):
                await until(display, lambda: False)
        assert not made.ended.done()
        async with display.used():  # the next use links again
            await display.picture()


async def test_a_display_without_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_side, "PICTURE_TIMEOUT", 0.1)
    async with session(Screen(b"")) as made, made.displays[0].used():
        with pytest.raises(TargetError, match="no picture") as caught:
            await made.displays[0].picture()
        assert caught.value.reason is Reason.TIMED_OUT


async def test_the_server_closes_a_display() -> None:
    screen = Screen()
    async with session(screen) as made:
        display = made.displays[0]
        async with display.used():
            await display.picture()
            await screen.links[0].close()
            with pytest.raises(GuestGoneError, match="display 0: the SPICE server closed the channel"):
                await until(display, lambda: False)


async def test_the_end_of_the_session_ends_its_channels() -> None:
    async with session(Screen()) as made:
        display = made.displays[0]
        async with display.used():
            await display.picture()
            waiting = asyncio.ensure_future(until(display, lambda: False))
            await asyncio.sleep(0)
            await made.close()
            with pytest.raises(GuestGoneError):
                await waiting
        with pytest.raises(FarplugError):
            async with display.used():
                pass


async def test_a_channel_that_is_still_in_use_at_the_server_is_tried_again() -> None:
    screen, refused = Screen(), 0

    async def serve(channel: Channel) -> None:
        nonlocal refused
        if screen.links and refused < 2:
            refused += 1
            return
        await screen.serve(channel)

    async with session(side={ChannelType.DISPLAY: serve}) as made:
        display = made.displays[0]
        async with display.used():
            await display.picture()
        display.close()
        async with display.used():
            await display.picture()
        assert refused == 2


class Inputs:
    """A server's inputs channel: stores what it receives."""

    def __init__(self) -> None:
        self.received: list[tuple[int, str]] = []
        self.changed = asyncio.Event()
        self.over = asyncio.Event()

    async def serve(self, channel: Channel) -> None:
        channel.send(message(101, struct.pack("<H", 2)))
        try:
            while True:
                kind, body = await channel.receive()
                self.received.append((kind, body.hex()))
                self.changed.set()
        finally:
            self.over.set()

    async def until(self, number: int) -> None:
        async with asyncio.timeout(60):
            while len(self.received) < number:
                self.changed.clear()
                await self.changed.wait()


async def test_what_is_held_is_released_when_the_last_user_leaves() -> None:
    server = Inputs()
    async with session(side={ChannelType.INPUTS: server.serve}) as made:
        inputs = made.inputs
        assert inputs is not None

        async def fail() -> None:
            async with inputs.used():
                assert inputs.channel is not None
                inputs.channel.press(key_code("a"))
                inputs.channel.press_button(Button.LEFT)
                inputs.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        await server.until(4)
        assert server.received == [(104, "1e"), (113, "010100"), (104, "9e"), (114, "010000")]
        async with inputs.used():
            assert inputs.channel is not None
            inputs.channel.press(key_code("a"))
            inputs.flush()
            await made.close()
        async with asyncio.timeout(60):
            await server.over.wait()
        assert server.received[4:] == [(104, "1e"), (104, "9e")]


async def test_the_mouse_mode_of_positions_is_preferred_while_inputs_are_used() -> None:
    requests: list[bytes] = []
    mains: list[Channel] = []

    async def main(channel: Channel) -> None:
        mains.append(channel)
        channel.send(message(103, struct.pack("<8I", SESSION_ID, 0, 1, 1, 0, 10, 0, 0)))
        while True:
            kind, body = await receive(channel)
            if kind == 104:
                channel.send(message(104, struct.pack("<I", 1) + bytes([3, 0])))
            elif kind == 105:
                requests.append(body)
                channel.send(message(105, struct.pack("<HH", 3, 2)))

    async with session(main=main, side={ChannelType.INPUTS: Inputs().serve}) as made:
        inputs = made.inputs
        assert inputs is not None
        assert not inputs.is_absolute
        mains[0].send(message(105, struct.pack("<HH", 3, 1)))  # the guest has begun to use its tablet
        async with asyncio.timeout(60):
            while inputs.mouse_modes != 3:
                await asyncio.sleep(0.001)
            assert not requests, "the inputs are not used"
            async with inputs.used():
                while not inputs.is_absolute:
                    await inputs.changed()
        assert requests == [b"\2\0"]
        assert inputs.mouse_mode == MouseMode.CLIENT
    with pytest.raises(RemoteProtocolError):
        MouseModes.parse(b"")


async def test_pointers() -> None:
    async def serve(channel: Channel) -> None:
        shape = struct.pack("<HQBHHHH", 0, 7, 0, 1, 1, 0, 0) + b"abcd"
        channel.send(message(101, struct.pack("<hhHHB", 3, 4, 0, 0, 1) + shape))
        await channel.reader.read()

    async with session(side={ChannelType.CURSOR: serve}) as made, made.cursors[0].used():
        async with asyncio.timeout(60):
            while made.cursors[0].cursor.shape is None:
                await made.cursors[0].changed()
        assert (made.cursors[0].cursor.x, made.cursors[0].cursor.y) == (3, 4)


async def test_a_server_that_reads_no_answers_is_left() -> None:
    async def serve(channel: Channel) -> None:
        channel.send(SET_ACK)
        ping = message(4, struct.pack("<IQ", 1, 1)) * 4000
        while True:
            channel.send(ping)
            await channel.writer.drain()

    async with session(side={ChannelType.CURSOR: serve}) as made, made.cursors[0].used():

        async def until_it_ends() -> None:
            while True:
                await made.cursors[0].changed()

        with pytest.raises(RemoteProtocolError, match="does not read"):
            await asyncio.wait_for(until_it_ends(), 100)
