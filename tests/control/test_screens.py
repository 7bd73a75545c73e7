"""Clients that watch a screen: whole pictures, pacing, slow clients, VMs that are lost."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.app.test_link import running as running_guest
from tests.app.test_run import Vm, vm
from tests.control.support import RawClient, session
from tests.spice.test_display import bitmap, copy, create, fill
from tests.transport.fake_spice import SESSION_ID, Channel, channels_list, message, ping
from tests.transport.test_spice_side import Inputs as FakeInputs
from tests.transport.test_spice_side import Screen as FakeScreen

from farplug.app import retry, watch
from farplug.app.app import App
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.control.client import Client
from farplug.control.messages import MAX_CLIENT_PAYLOAD, MAX_PAYLOAD, Notification
from farplug.control.server import WRITE_AT_ONCE, Server
from farplug.spice.framebuffer import Rect
from farplug.spice.types import ChannelType

WIDTH, HEIGHT = 256, 128
WHOLE = Rect(0, 0, WIDTH, HEIGHT)
PIXELS = bytes(range(256)) * (WIDTH * HEIGHT * 4 // 256)
PICTURE = message(314, create(WIDTH, HEIGHT)) + message(304, copy(WHOLE, bitmap(WIDTH, HEIGHT, PIXELS))) + message(102)
SHAPE = struct.pack("<HQBHHHH", 0, 7, 0, 2, 1, 1, 0) + bytes((10, 20, 30, 60)) + bytes((1, 2, 3, 255))
CURSOR = message(101, struct.pack("<hhHHB", 3, 4, 0, 0, 1) + SHAPE)


class Console:
    """A VM with a display, a pointer and inputs, a session of it, and its clients.

    Attributes:
        screen: the server's display channel.
        inputs: the server's inputs channel.
        pointer: the server's cursor channels.
        server: the session.
    """

    server: Server

    def __init__(self, one: Vm, *pictures: bytes, mice: int = 1) -> None:
        self.one = one
        self.mice = mice
        one.spice.main = self._main
        self.screen = FakeScreen(*(pictures or (PICTURE,)))
        self.inputs = FakeInputs()
        self.pointer: list[Channel] = []
        one.spice.channels += ((2, 0), (3, 0), (4, 0))
        one.spice.side = {
            ChannelType.DISPLAY: self.screen.serve,
            ChannelType.INPUTS: self.inputs.serve,
            ChannelType.CURSOR: self._pointer,
        }

    async def _main(self, channel: Channel) -> None:
        channel.send(message(103, struct.pack("<8I", SESSION_ID, 0, self.mice, 1, 0, 10, 0, 0)))
        while True:
            kind, _ = await channel.receive()
            if kind == 104:
                channel.send(channels_list(self.one.spice.channels))
            elif kind == 105:
                channel.send(message(105, struct.pack("<HH", self.mice, 2)))

    async def _pointer(self, channel: Channel) -> None:
        self.pointer.append(channel)
        channel.send(CURSOR)
        while await channel.reader.read(1 << 16):
            pass

    def draw(self, left: int, top: int, right: int, bottom: int, colour: int) -> None:
        self.screen.links[-1].send(message(302, fill(Rect(left, top, right, bottom), colour)))

    def drawn(self, colour: int) -> bool:
        """Return whether the last pixel of the picture has a colour: all that was drawn before is there, too."""
        picture = next(iter(self.app.guests.values())).screen.shown()
        return picture is not None and bytes(picture.pixels[-4:]) == struct.pack("<I", colour)

    async def until_drawn(self, colour: int) -> None:
        self.draw(WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT, colour)
        while not self.drawn(colour):
            await asyncio.sleep(0.001)

    app: App


@asynccontextmanager
async def console(
    environment: dict[str, str], *pictures: bytes, mice: int = 1, silent: bool = False
) -> AsyncIterator[Console]:
    app = App()
    async with vm(1, silent=silent) as one:
        made = Console(one, *pictures, mice=mice)
        made.app = app
        await app.connect(GuestSettings(TargetSettings(one.target)))
        async with session(app, environment) as made.server:
            yield made
            await app.close()
    assert not made.screen.broken, "QEMU would have crashed"


class Viewer:
    """A client's picture, made of the events."""

    def __init__(self) -> None:
        self.size = (0, 0)
        self.pixels = bytearray()

    def show(self, event: dict[str, Any]) -> None:
        data, payload = event["data"], event["payload"]
        if (data["width"], data["height"]) != self.size:
            self.size = data["width"], data["height"]
            self.pixels = bytearray(b"\xee" * (4 * data["width"] * data["height"]))
        at = 0
        for x, y, width, height in data["rects"]:
            for row in range(y, y + height):
                start = 4 * (row * self.size[0] + x)
                self.pixels[start : start + 4 * width] = payload[at : at + 4 * width]
                at += 4 * width
        assert at == len(payload)


def request(id: Any, method: str, **params: Any) -> dict[str, Any]:
    return {"id": id, "method": method, "params": params}


async def test_a_picture_its_changes_its_pointer_and_the_inputs(environment: dict[str, str]) -> None:
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        assert await client.ask(request(1, "watch-screen")) == {
            "id": 1,
            "ok": True,
            "result": {"width": 0, "height": 0, "serial": 0},
        }
        viewer = Viewer()
        events: dict[str, dict[str, Any]] = {}
        while (
            not {"screen", "screen-state", "cursor", "inputs"} <= events.keys()
            or not events["cursor"]["data"]["visible"]
        ):
            event = await client.next()
            events[event["event"]] = event
        while events["inputs"]["data"]["locks"] != ["num"]:
            events["inputs"] = await client.event("inputs")
        assert events["inputs"]["data"] == {"guest": "g1", "locks": ["num"], "mouse": "relative"}
        assert events["screen-state"]["data"] == {"display": 0, "state": "shown"}
        pointer = events["cursor"]
        assert pointer["data"] == {
            "display": 0,
            "visible": True,
            "x": 3,
            "y": 4,
            "width": 2,
            "height": 1,
            "hot_x": 1,
            "hot_y": 0,
        }
        assert pointer["payload"] == bytes((43, 85, 128, 60, 1, 2, 3, 255))  # not premultiplied
        first = events["screen"]
        serial = first["data"]["serial"]
        assert first["data"] == {
            "display": 0,
            "width": WIDTH,
            "height": HEIGHT,
            "serial": serial,
            "last": True,
            "rects": [[0, 0, WIDTH, 64], [0, 64, WIDTH, 64]],
        }
        viewer.show(first)
        assert viewer.pixels == PIXELS
        assert await client.ask(request(2, "screen-ack", serial=serial)) == {"id": 2, "ok": True, "result": None}
        one.draw(70, 2, 71, 3, 0x010203)
        changed = await client.event("screen")
        assert changed["data"]["rects"] == [[64, 0, 64, 64]]
        viewer.show(changed)
        picture = one.app.guests["g1"].screen.shown()
        assert picture is not None
        assert viewer.pixels == picture.pixels
        assert (await client.ask(request(3, "watch-screen")))["result"]["serial"] == picture.serial
        assert len((await client.event("screen"))["payload"]) == len(PIXELS)
        client.send(request(4, "unwatch-screen"))
        await client.reply(4)
        client.send(request(5, "watch-screen"))
        assert "width" in (await client.event("cursor"))["data"]  # the client has no shape of this watch
        one.pointer[0].send(message(104, struct.pack("<hh", 100, 50)))
        while (event := await client.event("cursor"))["data"]["x"] != 100:
            pass
        assert event["data"] == {"display": 0, "visible": True, "x": 100, "y": 50}
        assert "bytes" not in event
        one.pointer[0].send(message(103, struct.pack("<hhB", 1, 1, 1) + struct.pack("<H", 1)))
        event = await client.event("cursor", x=1)
        assert (event["data"]["width"], event["data"]["height"], event["bytes"]) == (0, 0, 0)


async def test_changes_are_merged_until_the_client_acknowledges(environment: dict[str, str]) -> None:
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        client.send(request(1, "watch-screen"))
        first = await client.event("screen")
        await one.until_drawn(1)
        second = await client.event("screen")
        serials = [first["data"]["serial"], second["data"]["serial"]]
        assert serials[0] < serials[1]
        for number in range(50):
            one.draw(number, 0, number + 1, 1, number)
            one.draw(0, HEIGHT - 1, 1, HEIGHT, number)
        await one.until_drawn(2)
        client.send(request(2, "screen-ack", serial=10**9), request(3, "status"), request(4, "screen-ack"))
        replies = [await client.next() for _ in range(3)]  # and no event is among them
        assert [(reply["id"], reply.get("error", {}).get("code")) for reply in replies] == [
            (2, "bad-setting"),
            (3, None),
            (4, "bad-setting"),
        ]
        client.send(request(5, "screen-ack", serial=serials[0]))
        third = await client.event("screen")
        assert third["data"]["rects"] == [[0, 0, 64, 64], [0, 64, 64, 64], [192, 64, 64, 64]]
        await one.until_drawn(3)
        client.send(request(6, "unwatch-screen"), request(7, "screen-ack", serial=serials[1]), request(8, "status"))
        assert [(await client.next())["ok"] for _ in range(3)] == [True] * 3  # a late acknowledgement has no effect
        client.send(request(9, "watch-screen"))
        await client.event("screen")  # the acknowledgements of the earlier watch are not awaited


async def test_a_large_change_comes_in_bands(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MIN_BAND", 4 * WIDTH * 64)
    monkeypatch.setattr(watch, "MAX_BAND", 4 * WIDTH * 64)
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        client.send(request(1, "watch-screen"))
        viewer = Viewer()
        bands = [await client.event("screen"), await client.event("screen")]
        for band in bands:
            viewer.show(band)
        assert [band["data"]["last"] for band in bands] == [False, True]
        assert bands[0]["data"]["serial"] == bands[1]["data"]["serial"]
        assert viewer.pixels == PIXELS
        for number, band in enumerate(bands):  # both have the same serial
            client.send(request(2 + number, "screen-ack", serial=band["data"]["serial"]))
            assert (await client.reply(2 + number))["ok"] is True
        one.screen.links[0].send(message(314, create(65, 65)) + message(302, fill(Rect(0, 0, 65, 65), 5)))
        while viewer.size != (65, 65):
            viewer.show(band := await client.event("screen"))
            client.send(request("x", "screen-ack", serial=band["data"]["serial"]))
            await client.reply("x")
        while not band["data"]["last"] or viewer.pixels != struct.pack("<I", 5) * 65 * 65:
            viewer.show(band := await client.event("screen"))
            client.send(request("x", "screen-ack", serial=band["data"]["serial"]))
            await client.reply("x")


def test_a_client_gets_as_much_at_a_time_as_it_takes_soon() -> None:
    now = 0.0
    pacing = watch.Pacing(lambda: now)

    def acknowledged_after(seconds: float) -> int:
        nonlocal now
        pacing.sent(1)
        now += seconds
        pacing.acknowledge(1)
        return pacing.band

    assert pacing.band == watch.MIN_BAND
    assert acknowledged_after(10.0) == watch.MIN_BAND
    bands = [acknowledged_after(0.01) for _ in range(8)]
    assert bands == sorted(bands)
    assert bands[-1] == watch.MAX_BAND
    bands = [acknowledged_after(1.0) for _ in range(8)]
    assert bands == sorted(bands, reverse=True)
    assert bands[-1] == watch.MIN_BAND
    pacing.acknowledge(1)
    assert pacing.band == watch.MIN_BAND, "it was acknowledged before"


def test_a_band_holds_a_row_of_cells_of_the_widest_picture() -> None:
    from farplug.spice.framebuffer import CELL, MAX_SIDE, PIXEL

    assert MAX_SIDE * CELL * PIXEL <= watch.MAX_BAND == MAX_PAYLOAD


async def test_a_client_that_reads_nothing_costs_little_and_delays_no_other(environment: dict[str, str]) -> None:
    side = 512  # a whole picture is more than a connection takes whose client does not read
    picture = message(314, create(side, side)) + message(302, fill(Rect(0, 0, side, side), 1)) + message(102)
    async with console(environment, picture) as one, RawClient.connect(one.server.path) as other:
        async with RawClient.connect(one.server.path) as slow:
            slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
            slow.send(request(1, "watch-screen"))
            while not (watching := [peer for peer in one.server._clients if peer.user._screens]):
                await asyncio.sleep(0.001)
            (client,) = watching
            other.send(request(0, "watch-screen"))
            number = 0

            async def shown() -> bytes:
                """Return the last pixel of the next event of the other client, which acknowledges the event."""
                nonlocal number
                event = await other.event("screen")
                number += 1
                other.send(request(number, "screen-ack", serial=event["data"]["serial"]))
                return bytes(event["payload"][-4:])

            await shown()
            while not client._full:
                one.draw(0, 0, side, side, 1)
                await asyncio.sleep(0.001)
            channels = [
                channel
                for channel in one.one.spice.linked
                if channel.mess.channel_type in (ChannelType.MAIN, ChannelType.DISPLAY, ChannelType.USBREDIR)
            ]
            assert len(channels) == 3
            for colour in range(100, 128):
                one.draw(0, 0, side, side, colour)
                for channel in channels:
                    channel.send(ping(colour))
                while await shown() != struct.pack("<I", colour):
                    pass
                while any(colour not in channel.pongs for channel in channels):
                    await asyncio.sleep(0.001)
                assert client._full, "the PONGs came although it has read nothing"
                assert client._transport is not None
                assert client._transport.get_write_buffer_size() <= watch.MIN_BAND + 2 * WRITE_AT_ONCE
                assert len(client._output) <= 4
        other.send(request("end", "unwatch-screen"))
        await other.reply("end")
        display = one.app.guests["g1"].screen._display()
        while display._users:
            await asyncio.sleep(0.001)


async def test_a_watch_survives_a_lost_vm(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DELAYS", (0.01, 0.02))
    monkeypatch.setattr(retry, "FLAP_TIME", 0.0)
    async with vm(1) as one:
        made = Console(one)
        async with running_guest(one.target) as guest:
            made.app = guest.app
            async with session(guest.app, environment) as server, RawClient.connect(server.path) as client:
                client.send(request(1, "watch-screen"))
                serial = (await client.event("screen"))["data"]["serial"]
                linked = [*one.spice.linked]
                for channel in linked:
                    await channel.close()
                lost = (await client.event("screen-state", state="lost"))["data"]
                assert lost["reason"] == "guest-gone"
                assert lost["message"]
                again = await client.event("screen")
                assert len(again["payload"]) == len(PIXELS)
                assert again["data"]["serial"] > serial
    assert not made.screen.broken


async def test_states_of_a_screen_that_cannot_be_shown(environment: dict[str, str]) -> None:
    async with vm(1) as one, App() as app:
        guest = app.add(GuestSettings(TargetSettings(one.target)))
        async with session(app, environment) as server, RawClient.connect(server.path) as client:
            client.send(request(1, "watch-screen"))
            await client.event("screen-state", state="connecting")
            await guest.connect()
            state = (await client.event("screen-state", state="no-display"))["data"]
            assert (state["reason"], state["message"]) == ("no-display", "the VM has no display")
            assert state["remedy"]
            assert (await client.ask(request(2, "watch-screen", guest="g9")))["error"]["code"] == "not-found"
            for number in range(1, watch.MAX_UNACKNOWLEDGED + 14):
                client.send(request("w", "watch-screen", display=number))
                assert (await client.reply("w"))["ok"] is True
            client.send(request("w", "watch-screen", display=99))
            refused = (await client.reply("w"))["error"]
            assert (refused["code"], refused["message"]) == ("bad-setting", "a client watches 16 displays at most")
            await app.close()
            await client.event("screen-state", state="lost")


async def test_raw_bytes_only_where_they_are_taken(environment: dict[str, str]) -> None:
    async with session(App(), environment) as server:
        async with RawClient.connect(server.path) as client:
            client.send(b'{"id": 1, "method": "status", "bytes": 5}\n\n\n{}\n', b'{"id": 2, "method": "status"}\n')
            replies = {reply["id"]: reply for reply in (await client.next(), await client.next())}
            assert replies[1]["error"]["message"] == "status takes no raw bytes"
            assert replies[2]["ok"] is True
        for wrong in (b"-1", b"true", b'"5"', b"1.0", b"%d" % (MAX_CLIENT_PAYLOAD + 1)):
            async with RawClient.connect(server.path) as client:
                client.send(b'{"id": 1, "method": "status", "bytes": %s}\n' % wrong)
                assert f"is not an integer from 0 to {MAX_CLIENT_PAYLOAD}" in await client.refused()
        async with RawClient.connect(server.path) as client:
            client.send(b'{"id": 1, "method": "status", "bytes": 9}\n12345678')
            client.writer.write_eof()
            assert await client.refused() == "the stream ends within a payload, after 8 bytes"


async def test_the_library_s_client(environment: dict[str, str]) -> None:
    async with console(environment) as one:
        events: asyncio.Queue[Notification] = asyncio.Queue()
        async with Client.connect(one.server.path, listener=events.put_nowait) as client:
            subscription = client.subscribe(["note"])
            assert (await anext(subscription))["event"] == "snapshot"
            await client.call("watch-screen")
            while (event := await events.get()).event != "screen":
                pass
            assert event.payload == PIXELS
            one.app.events.publish("note", "x")
            assert (await anext(subscription))["event"] == "note"
