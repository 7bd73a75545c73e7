"""Clients that hold the keyboard and the mouse, one at a time, and leave nothing pressed."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from tests.control.support import RawClient
from tests.control.test_screens import Console, console, request
from tests.docs import ROOT

from farplug.app import client as client_module
from farplug.app.events import Event
from farplug.app.seat import MAX_HELD
from farplug.errors import Reason, UsageError
from farplug.keymap import layout as layout_module
from farplug.spice.physical_keys import PHYSICAL_KEYS, physical_key


async def done(client: RawClient, method: str, /, **params: Any) -> Any:
    """Return the result of a request; skip events."""
    client.send(request(method, method, **params))
    reply = await client.reply(method)
    assert reply["ok"], reply
    return reply["result"]


async def code(client: RawClient, method: str, /, **params: Any) -> str:
    """Return the code of the error of a request; skip events."""
    client.send(request(method, method, **params))
    reply = await client.reply(method)
    assert not reply["ok"], reply
    return str(reply["error"]["code"])


async def received(one: Console, count: int) -> list[tuple[int, str]]:
    await one.inputs.until(count)
    return one.inputs.received


async def test_keys_are_pressed_repeated_and_released_on_every_way_out(environment: dict[str, str]) -> None:
    async with console(environment) as one, AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(RawClient.connect(one.server.path)) for _ in range(2)]
        assert await code(first, "key", code="KeyA", down=True) == "not-driving"
        assert await done(first, "drive", take=True, client="ana\n") == {"holder": "ana\N{REPLACEMENT CHARACTER}"}
        for key, down in (("ControlRight", True), ("KeyA", True), ("KeyA", True), ("KeyA", False), ("KeyB", False)):
            await done(first, "key", code=key, down=down)
        assert await received(one, 4) == [(104, "e01d"), (104, "1e"), (104, "1e"), (104, "9e")]
        await done(first, "key", code="ShiftLeft", down=True)
        await done(first, "keys-up")
        assert (await received(one, 7))[4:] == [(104, "2a"), (104, "aa"), (104, "e09d")]
        # Another client takes the keyboard.
        await done(first, "key", code="KeyA", down=True)
        await done(first, "pointer", buttons=["left", "right"])
        assert (await received(one, 10))[7:] == [(104, "1e"), (113, "010100"), (113, "030500")]
        assert await done(second, "drive", take=True) == {"holder": ""}
        assert (await received(one, 13))[10:] == [(104, "9e"), (114, "010400"), (114, "030000")]
        assert await code(first, "key", code="KeyA", down=True) == "not-driving"
        assert await code(first, "pointer", dx=1) == "not-driving"
        for method, params in (("type", {"text": "a"}), ("press", {"keys": "a"}), ("click", {"x": 1, "y": 1})):
            assert await code(first, method, **params) == "not-driving"
        # It gives the keyboard back.
        await done(second, "key", code="KeyA", down=True)
        assert await done(second, "drive", take=False) == {"holder": None}
        assert (await received(one, 15))[13:] == [(104, "1e"), (104, "9e")]
        # A client leaves.
        await done(second, "drive", take=True)
        await done(second, "key", code="MetaLeft", down=True)
        second.writer.transport.abort()
        assert (await received(one, 17))[15:] == [(104, "e05b"), (104, "e0db")]
        event = await first.event("driving", holder=None)
        assert event["data"] == {"guest": "g1", "holder": None, "watchers": 0}
        # A client ends its output, while the session still types for it.
        await done(first, "drive", take=True)
        await done(first, "key", code="AltLeft", down=True)
        first.send(request("long", "type", text="q" * 8000))
        await first.event("typing")
        first.writer.write_eof()
        assert (await first.reply("long"))["error"]["code"] == "interrupted"
        assert await first.line() == b""
        keys = [body for _, body in one.inputs.received[17:] if body != "1090"]
        assert keys == ["38", "b8"]
        del one.inputs.received[17:]
        first = await stack.enter_async_context(RawClient.connect(one.server.path))
        # The session ends.
        await done(first, "drive", take=True)
        await done(first, "key", code="KeyZ", down=True)
        await one.server.close()
        assert (await received(one, 19))[17:] == [(104, "2c"), (104, "ac")]


async def test_who_holds_the_keyboard_is_reported(environment: dict[str, str]) -> None:
    async with console(environment) as one, AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(RawClient.connect(one.server.path)) for _ in range(3)]
        first.send(request(1, "watch-screen"))
        assert (await first.event("driving"))["data"] == {"guest": "g1", "holder": None, "watchers": 1}
        second.send(request(1, "watch-screen"))
        await first.event("driving", watchers=2)
        second.send(request(2, "drive", take=True, client="ben"))
        others = await first.event("driving", watchers=1)
        assert others["data"]["holder"] == {"name": "ben", "you": False}
        assert (await second.event("driving", watchers=1))["data"]["holder"] == {"name": "ben", "you": True}
        third.send(request(1, "drive", take=False))
        assert (await third.event("driving"))["data"]["holder"] == {"name": "ben", "you": False}
        await done(first, "unwatch-screen")
        await third.event("driving", watchers=0)
        second.writer.transport.abort()
        await third.event("driving", holder=None)
        assert one.app.guests["g1"].seat._members.keys() == {
            peer.user for peer in one.server._clients if peer.user._hands
        }


async def test_bounds_of_keys_and_pointers(environment: dict[str, str]) -> None:
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        await done(client, "drive", take=True)
        keys = [f"Key{letter}" for letter in "ABCDEFGHIJKLMNOPQ"]
        for key in keys[:MAX_HELD]:
            await done(client, "key", code=key, down=True)
        assert await code(client, "key", code=keys[MAX_HELD], down=True) == "bad-key"
        assert await code(client, "key", code="Fn", down=True) == "bad-key"
        begun = time.monotonic()
        await done(client, "keys-up")
        assert time.monotonic() - begun >= (MAX_HELD - 1) * 0.02, "QEMU's queue would lose releases"
        for params in ({"x": 1}, {"dx": 1 << 20}, {"wheel": 16}, {"buttons": ["side"]}, {"x": 1.5, "y": 1}):
            assert await code(client, "pointer", **params) == "bad-setting"
        assert await code(client, "pointer", x=1, y=1) == "no-tablet"
        await done(client, "pointer", dx=3, dy=-200, wheel=-2)
        sent = [body for kind, body in one.inputs.received if kind in (111, 113, 114)]
        assert sent == ["010000009cffffff0000", "020000009cffffff0000"] + ["040800", "040000"] * 2


async def test_buttons_are_released_if_the_pointer_cannot_be_moved(environment: dict[str, str]) -> None:
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        await done(client, "drive", take=True)
        await done(client, "pointer", buttons=["left", "middle"])
        assert await code(client, "pointer", x=1, y=1, buttons=["middle", "right"]) == "no-tablet"
        await done(client, "key", code="KeyA", down=True)
        assert await received(one, 4) == [(113, "010100"), (113, "020300"), (114, "010200"), (104, "1e")]


async def test_positions_are_limited_to_the_display(environment: dict[str, str]) -> None:
    async with console(environment, mice=3) as one, RawClient.connect(one.server.path) as client:
        await done(client, "drive", take=True)
        await client.event("inputs", mouse="absolute")
        await done(client, "pointer", x=9999, y=-5, buttons=["left"])
        await done(client, "pointer", x=3, y=4, buttons=["left"])
        await done(client, "pointer", buttons=[])
        assert await received(one, 4) == [
            (112, "ff00000000000000" + "0000" + "00"),
            (113, "010100"),
            (112, "0300000004000000" + "0100" + "00"),
            (114, "010000"),
        ]
        assert await code(client, "pointer", dx=1) == "bad-setting"


async def test_long_texts_do_not_occupy_the_event_loop(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    walk = layout_module.characters

    def counted(text: str) -> Iterator[tuple[int, str]]:
        threads.append(threading.get_ident())
        return walk(text)

    monkeypatch.setattr(layout_module, "characters", counted)
    monkeypatch.setattr(client_module, "characters", counted)
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        await done(client, "check-text", text="z" * 5000, layout="us")
        client.send(request(1, "type", text="z" * 5000))
        await client.event("typing", total=5000)
        await done(client, "stop-typing")
        assert (await client.reply(1))["error"]["code"] == "interrupted"
        assert await code(client, "type", text="z" * 5000 + "\u20ac") == "bad-key"
    assert len(threads) >= 6
    assert threading.get_ident() not in threads


async def test_typing_is_reported_and_can_be_stopped(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TYPING_INTERVAL", 0.0)
    async with console(environment) as one, RawClient.connect(one.server.path) as client:
        await done(client, "subscribe", events=["input"])
        await done(client, "type", text="a\r\nb")
        client.send(request(1, "type", text="cd"))
        last = await client.event("typing", done=2)
        assert last["data"] == {"guest": "g1", "done": 2, "total": 2}
        event = await client.event("input")
        assert event["data"]["message"] == "a client typed 2 characters"
        assert (event["data"]["action"], event["data"]["text"], event["data"]["characters"]) == ("type", "cd", 2)
        events: list[Event] = []
        unsubscribe = one.app.subscribe(events.append)
        client.send(request(2, "type", text="x" * 8000), request(3, "type", text="y" * 8000))
        await client.event("typing", total=8000)
        await done(client, "stop-typing")
        errors = [await client.reply(2), await client.reply(3)]
        assert {(error["error"]["code"], error["error"]["exit_code"]) for error in errors} == {("interrupted", 130)}
        assert [event.message for event in events if event.name == "input"] == [
            "a client typed 8000 characters, or a part"
        ] * 2
        unsubscribe()
        client.send(request(5, "type", text="secret", hidden=True))
        hidden = await client.event("input")
        assert hidden["data"]["message"] == "a client typed a text"
        assert "secret" not in str(hidden)
        assert "characters" not in hidden["data"]
        client.send(request(6, "press", keys="ctrl+a"))
        assert (await client.event("input"))["data"]["keys"] == "ctrl+a"
        client.send(request(7, "click", x=1, y=2, relative=True))
        clicked = (await client.event("input"))["data"]
        assert (clicked["action"], clicked["x"], clicked["y"], clicked["button"]) == ("click", 1, 2, "left")
        # A client that loses the keyboard types no more.
        await done(client, "drive", take=True, client="ana")
        client.send(request(4, "type", text="z" * 8000))
        await client.event("typing", total=8000)
        async with RawClient.connect(one.server.path) as other:
            await done(other, "drive", take=True)
            assert (await client.reply(4))["error"]["code"] == "interrupted"


async def test_typing_ends_with_the_connection(environment: dict[str, str]) -> None:
    async with console(environment) as one, RawClient.connect(one.server.path) as other:
        await done(other, "subscribe", events=["input"])
        async with RawClient.connect(one.server.path) as client:
            client.send(request(1, "type", text="z" * 100, hidden=True))
            await one.inputs.until(1)
        async with asyncio.timeout(100):
            while len(one.server._clients) > 1:
                await asyncio.sleep(0.01)
        await done(other, "type", text="a")
        bodies = [body for _, body in await received(one, 2)]
        assert bodies.count("2cac") < 100
        assert bodies[-1] == "1e9e"


async def test_keys_of_others_come_between_the_characters_of_a_text(environment: dict[str, str]) -> None:
    async with console(environment) as one, AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(RawClient.connect(one.server.path)) for _ in range(2)]
        await done(first, "drive", take=True)
        second.send(request(1, "type", text="a" * 30))
        await one.inputs.until(1)
        await done(first, "key", code="KeyZ", down=True)
        await done(first, "key", code="KeyZ", down=False)
        assert (await second.reply(1))["ok"] is True
        bodies = [body for _, body in one.inputs.received]
        assert bodies.count("1e9e") == 30
        assert bodies[-1] == "1e9e"
        assert bodies.index("ac") > bodies.index("2c")


def test_physical_keys() -> None:
    assert physical_key("KeyA") == b"\x1e"
    assert physical_key("Pause") == b"\xe0\x46"
    assert physical_key("IntlRo") == b"\x73"
    with pytest.raises(UsageError) as caught:
        physical_key("Hyper")
    assert caught.value.reason is Reason.BAD_KEY
    for name, scancode in PHYSICAL_KEYS.items():
        assert len(scancode) == (2 if scancode[0] == 0xE0 else 1), name
        assert 0 < scancode[-1] < 0x80
    assert len(set(PHYSICAL_KEYS.values())) == len(PHYSICAL_KEYS) - 8, "old names, and two of one key each"


CODES = """
Backquote Backslash BracketLeft BracketRight Comma Digit0 Digit1 Digit2 Digit3 Digit4 Digit5 Digit6 Digit7 Digit8
Digit9 Equal IntlBackslash IntlRo IntlYen KeyA KeyB KeyC KeyD KeyE KeyF KeyG KeyH KeyI KeyJ KeyK KeyL KeyM KeyN KeyO
KeyP KeyQ KeyR KeyS KeyT KeyU KeyV KeyW KeyX KeyY KeyZ Minus Period Quote Semicolon Slash AltLeft AltRight Backspace
CapsLock ContextMenu ControlLeft ControlRight Enter MetaLeft MetaRight ShiftLeft ShiftRight Space Tab Convert KanaMode
Lang1 Lang2 Lang3 Lang4 Lang5 NonConvert Delete End Help Home Insert PageDown PageUp ArrowDown ArrowLeft ArrowRight
ArrowUp NumLock Numpad0 Numpad1 Numpad2 Numpad3 Numpad4 Numpad5 Numpad6 Numpad7 Numpad8 Numpad9 NumpadAdd NumpadComma
NumpadDecimal NumpadDivide NumpadEnter NumpadEqual NumpadMultiply NumpadParenLeft NumpadParenRight NumpadStar
NumpadSubtract Escape F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 F11 F12 F13 F14 F15 F16 F17 F18 F19 F20 F21 F22 F23 F24
PrintScreen ScrollLock Pause BrowserBack BrowserFavorites BrowserForward BrowserHome BrowserRefresh BrowserSearch
BrowserStop Eject LaunchApp1 LaunchApp2 LaunchMail MediaPlayPause MediaSelect MediaStop MediaTrackNext
MediaTrackPrevious Power Sleep AudioVolumeDown AudioVolumeMute AudioVolumeUp WakeUp Again Copy Cut Find Open Paste
Props Undo Hiragana Katakana
"""
"""The codes of W3C UI Events KeyboardEvent code Values, but those of keys that no PC keyboard has."""


def test_all_codes_of_the_specification_are_keys_or_documented_as_missing() -> None:
    codes = CODES.split()
    assert set(codes) <= PHYSICAL_KEYS.keys()
    assert PHYSICAL_KEYS.keys() - set(codes) == {"OSLeft", "OSRight", "VolumeDown", "VolumeMute", "VolumeUp"}
    missing = re.findall(
        r"`(\w+)`", (ROOT / "docs/control.md").read_text().partition("no scancode:")[2].split("\n\n")[0]
    )
    assert set(missing) >= {"Fn", "Hyper", "NumpadClear", "Select"}
    assert not set(missing) & PHYSICAL_KEYS.keys()
