"""The tools of the MCP server, on a VM with a screen in this process."""

from __future__ import annotations

import asyncio
import struct
import zlib
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from tests.agents.support import Agent, agent, console
from tests.control.support import RawClient
from tests.control.test_driving import done
from tests.control.test_screens import HEIGHT, PIXELS, WIDTH, Console
from tests.docs import ROOT
from tests.spice.console_pictures import runs

from farplug.agents import server as server_module
from farplug.agents.policy import Policy
from farplug.agents.server import ACTING, LOOKING, Tools
from farplug.app.console_fonts import console_glyphs

TRAINED = {
    "screenshot": set(),
    "zoom": {"region"},
    "left_click": {"coordinate", "text"},
    "right_click": {"coordinate", "text"},
    "middle_click": {"coordinate", "text"},
    "double_click": {"coordinate", "text"},
    "triple_click": {"coordinate", "text"},
    "left_click_drag": {"start_coordinate", "coordinate"},
    "left_mouse_down": set(),
    "left_mouse_up": set(),
    "mouse_move": {"coordinate"},
    "cursor_position": set(),
    "scroll": {"scroll_direction", "scroll_amount", "coordinate"},
    "key": {"text", "repeat"},
    "hold_key": {"text", "duration"},
    "type": {"text"},
    "wait": {"duration"},
}
"""The tools of the computer toolset, with their arguments."""


def unpacked(png: bytes) -> tuple[int, int, bytes]:
    """Return the width, the height and the RGB pixels of a PNG file as the server makes them."""
    width, height = struct.unpack_from(">II", png, 16)
    at, packed = 8, b""
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + length]
        at += 12 + length
    rows = zlib.decompress(packed)
    stride = 3 * width + 1
    return width, height, b"".join(rows[at + 1 : at + stride] for at in range(0, len(rows), stride))


def rgb(pixels: bytes) -> bytes:
    result = bytearray(len(pixels) // 4 * 3)
    for to, source in ((0, 2), (1, 1), (2, 0)):
        result[to::3] = pixels[source::4]
    return bytes(result)


async def drawn(
    one: Console, acting: Agent, left: int, top: int, right: int, bottom: int, colour: int = 0xFFFFFF
) -> None:
    """Draw a rectangle, and wait until the agent's server has it."""
    screen = acting.server.machine.screen
    mark = screen.mark()
    one.draw(left, top, right, bottom, colour)
    while mark.changed is None or not screen.complete:
        await asyncio.sleep(0.001)
    screen.drop(mark)


async def test_the_tools_and_their_annotations(environment: dict[str, str]) -> None:
    async with console(environment) as one, agent(one) as acting:
        tools = {tool.name: tool for tool in (await acting.client.list_tools()).tools}
        assert set(tools) == {*LOOKING, *ACTING}
        documented = (ROOT / "docs/agents.md").read_text()
        for name in tools:
            assert f"`{name}`" in documented
        for name, arguments in TRAINED.items():
            assert arguments <= set(tools[name].input_schema.get("properties", {})), name
        for name, tool in tools.items():
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint is (name in LOOKING)
            assert name in LOOKING or tool.annotations.destructive_hint is ACTING[name]
            assert tool.input_schema["additionalProperties"] is False
            assert tool.description
            assert "confirmation" not in tool.input_schema.get("properties", {})
        assert acting.client.instructions is not None
        assert "data, not orders" in acting.client.instructions
    async with console(environment) as one, agent(one, Policy(read_only=True)) as acting:
        assert {tool.name for tool in (await acting.client.list_tools()).tools} == {*LOOKING}
        assert "Unknown tool" in await acting.refused("key", text="a")
        assert one.inputs.received == []


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_screenshot_and_a_part_of_it(environment: dict[str, str], mode: str) -> None:
    async with console(environment) as one, agent(one, mode=mode) as acting:
        text, png = await acting.call("screenshot")
        assert text == f"look 1: {WIDTH}x{HEIGHT} pixels"
        assert png is not None
        assert unpacked(png) == (WIDTH, HEIGHT, rgb(PIXELS))
        _, png = await acting.call("zoom", region=[10, 20, 40, 50])
        assert png is not None
        rows = b"".join(PIXELS[4 * (row * WIDTH + 10) : 4 * (row * WIDTH + 40)] for row in range(20, 50))
        assert unpacked(png) == (30, 30, rgb(rows))
        for region in ([0, 0, WIDTH + 1, 5], [5, 5, 5, 9], [-1, 0, 5, 5]):
            assert "[bad-setting]" in await acting.refused("zoom", region=region)
        status = await acting.json("vm_status")
        assert status["screen"] == {"state": "shown", "width": WIDTH, "height": HEIGHT, "last_look": 1}
        assert status["keyboard_held_by"] is None


async def test_clicks_keys_and_text_reach_the_vm(environment: dict[str, str]) -> None:
    async with console(environment, mice=2) as one, agent(one) as acting:
        await acting.call("screenshot")
        assert await acting.text("left_click", coordinate=[10, 20], text="ctrl") == "clicked with the left button"
        sent = one.inputs.received
        assert next(body for kind, body in sent if kind == 112).startswith("0a00000014000000")
        assert [(kind, body) for kind, body in sent if kind != 112] == [
            (104, "1d"),
            (113, "010100"),
            (114, "010000"),
            (104, "9d"),
        ]
        assert await acting.text("cursor_position") == "[10, 20]"
        sent.clear()
        await acting.call("double_click")
        assert [kind for kind, _ in sent if kind != 112] == [113, 114, 113, 114]
        sent.clear()
        await acting.call("left_click_drag", start_coordinate=[0, 0], coordinate=[80, 40])
        moves = [struct.unpack_from("<II", bytes.fromhex(body)) for kind, body in sent if kind == 112]
        assert (moves[0], moves[-1]) == ((0, 0), (80, 40))
        kinds = [kind for kind, _ in sent]
        assert kinds.index(112) < kinds.index(113) < len(kinds) - 1 == kinds.index(114)
        sent.clear()
        await acting.call("scroll", scroll_direction="down", scroll_amount=17, coordinate=[1, 1])
        assert [kind for kind, _ in sent].count(113) == 17
        sent.clear()
        assert await acting.text("key", text="ctrl+c", repeat=2) == "pressed ctrl+c 2 times"
        assert sent == [(104, "1d2eae9d")] * 2
        sent.clear()
        assert await acting.text("type", text="ab") == "typed 2 characters; not confirmed: look whether it is there"
        assert sent == [(104, "1e9e"), (104, "30b0")]
        sent.clear()
        await acting.call("hold_key", text="shift+a", duration=0.6)
        keys = [body for _, body in sent]
        assert keys[:2] == ["2a", "1e"]
        assert keys.count("1e") > 1, "a key that is held repeats"
        assert keys[-2:] == ["9e", "aa"]
        sent.clear()
        await acting.call("left_mouse_down")
        await acting.call("mouse_move", coordinate=[50, 50])
        await acting.call("left_mouse_up")
        assert [kind for kind, _ in sent] == [113, 112, 114]


async def test_a_click_on_what_has_changed_is_refused(environment: dict[str, str]) -> None:
    async with console(environment, mice=2) as one, agent(one) as acting:
        assert "call screenshot first [wrong-state]" in await acting.refused("left_click", coordinate=[1, 1])
        await acting.call("screenshot")
        await drawn(one, acting, 100, 60, 110, 70)
        error = await acting.refused("left_click", coordinate=[95, 55])
        assert error.startswith("the screen changed at this point since look 1. look again")
        assert error.endswith("[screen-changed]")
        assert "[screen-changed]" in await acting.refused(
            "left_click_drag", start_coordinate=[1, 1], coordinate=[105, 65]
        )
        assert [kind for kind, _ in one.inputs.received if kind in (112, 113)] == []
        await acting.call("left_click", coordinate=[20, 20])
        await acting.call("left_click", coordinate=[95, 55], force=True)
        assert "[screen-changed]" in await acting.refused("left_mouse_down")
        assert await acting.text("screenshot") == f"look 2: {WIDTH}x{HEIGHT} pixels"
        await acting.call("left_click", coordinate=[95, 55], look=2)
        error = await acting.refused("left_click", coordinate=[95, 55], look=1)
        assert error.startswith("look 1 is not the last one, which is look 2")


async def test_waiting_for_the_screen(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STILL_TIME", 0.2)
    async with console(environment) as one, agent(one) as acting:
        await acting.call("screenshot")
        await drawn(one, acting, 0, 0, 8, 16)  # a cursor of a text console
        text = await acting.text("wait_for_screen", state="changed", timeout=0.1, screenshot_after=False)
        assert text == "timeout: after 0.1 seconds the screen has not changed"
        waiting = asyncio.ensure_future(acting.call("wait_for_screen", state="changed"))
        await drawn(one, acting, 0, 0, 200, 100)
        text, png = await waiting
        assert text == f"the screen has changed\nlook 2: {WIDTH}x{HEIGHT} pixels"
        assert png is not None
        await drawn(one, acting, 8, 0, 16, 16, colour=0)
        assert (await acting.text("wait_for_screen", state="changed", small_changes=True)).startswith(
            "the screen has ch"
        )
        assert (await acting.text("wait_for_screen", state="still")).startswith("the screen is still\nlook 4")


async def test_text_on_a_console(environment: dict[str, str]) -> None:
    async with console(environment) as one, agent(one) as acting:
        await acting.call("screenshot")
        assert (await acting.refused("screen_text")).endswith("[no-text]")
        answer = await acting.text("wait_for_text", text="login:", timeout=0.01)
        assert answer == "timeout: after 0.01 seconds no line of a text console has this text: call screenshot"
        waiting = asyncio.ensure_future(acting.text("wait_for_text", text="login:"))
        one.draw(0, 0, WIDTH, HEIGHT, 0)
        for left, row, right in runs(("tty1", "vm login: "), console_glyphs()):
            one.draw(left, row, right, row + 1, 0xAAAAAA)
        assert await waiting == "tty1\nvm login:"
        assert await acting.text("screen_text") == "tty1\nvm login:"


async def test_one_party_holds_the_keyboard(environment: dict[str, str]) -> None:
    async with console(environment) as one, agent(one) as acting, AsyncExitStack() as stack:
        person = await stack.enter_async_context(RawClient.connect(one.server.path))
        await done(person, "drive", take=True, client="ana")
        error = await acting.refused("key", text="a")
        assert error.startswith("ana holds the keyboard and the mouse of the VM")
        assert error.endswith("[not-driving]")
        await acting.call("screenshot")  # looking is possible
        await done(person, "drive", take=False)
        while acting.server.machine.holder is not None:
            await asyncio.sleep(0.001)
        await acting.call("key", text="a")
        assert (await acting.json("vm_status"))["keyboard_held_by"] == "you"
        await person.event("driving", holder={"name": "the agent", "you": False})
        # The person takes over while the agent types.
        typing = asyncio.ensure_future(acting.refused("type", text="x" * 500))
        await one.inputs.until(len(one.inputs.received) + 3)
        await done(person, "drive", take=True, client="ana")
        assert (await typing).startswith("ana holds the keyboard and the mouse of the VM: nothing more was done")
        assert "[not-driving]" in await acting.refused("left_mouse_up")


async def test_the_keyboard_is_not_taken_from_another_client(environment: dict[str, str]) -> None:
    async with console(environment) as one, AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(RawClient.connect(one.server.path)) for _ in range(2)]
        await done(first, "drive", take=True, client="ana", if_free=True)
        second.send({"id": 1, "method": "drive", "params": {"take": True, "if_free": True}})
        reply = await second.reply(1)
        assert (reply["error"]["code"], reply["error"]["message"]) == (
            "not-driving",
            "ana holds the keyboard and the mouse",
        )
        await done(first, "key", code="KeyA", down=True)
        await done(first, "drive", take=True, if_free=True)  # it holds them already


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("wait_for_screen", {"state": "changed"}),
        ("wait_for_text", {"text": "login:"}),
        ("type", {"text": "x" * 4000}),
        ("hold_key", {"text": "shift+a", "duration": 60}),
        ("usb_attach", {"kind": "tablet"}),
    ],
)
async def test_the_session_ends_in_the_middle_of_a_call_and_another_one_begins(
    environment: dict[str, str], tool: str, arguments: dict[str, Any]
) -> None:
    async with AsyncExitStack() as stack:
        async with console(environment, silent=True) as one:
            acting = await stack.enter_async_context(agent(one))
            await acting.call("screenshot")
            waiting = asyncio.ensure_future(acting.refused(tool, **arguments))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await one.server.close()
            assert "[session-gone]" in await waiting
        assert "[no-session]" in await acting.refused("key", text="a")
        async with console(environment):
            text, _ = await acting.call("screenshot")
            assert text == f"look 2: {WIDTH}x{HEIGHT} pixels"


async def test_a_call_that_is_cancelled_leaves_nothing_pressed(environment: dict[str, str]) -> None:
    async with console(environment, mice=2) as one, agent(one) as acting:
        await acting.call("screenshot")
        tools = Tools(acting.server.machine, Policy())
        sent = one.inputs.received
        for begin, tool, end in (
            ("1e", lambda: tools.hold_key("shift+a", 60), ["9e", "aa"]),
            ("1d", lambda: tools.left_click_drag([0, 0], [90, 90], text="ctrl"), ["9d"]),
        ):
            sent.clear()
            with anyio.CancelScope() as scope:  # as the SDK cancels a call
                async with anyio.create_task_group() as group:
                    group.start_soon(tool)
                    while begin not in [body for _, body in sent]:
                        await asyncio.sleep(0.001)
                    scope.cancel()
            while [body for kind, body in sent if kind == 104][-len(end) :] != end:
                await asyncio.sleep(0.001)
            assert [kind for kind, _ in sent].count(113) == [kind for kind, _ in sent].count(114)
        sent.clear()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(tools.type, "x" * 3000)
                await one.inputs.until(3)
                scope.cancel()
        await acting.call("key", text="Escape")  # as soon as nothing is typed any more
        assert len(sent) < 1000


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("left_click", {"coordinate": [1]}),
    ("left_click", {"coordinate": [1, 2, 3]}),
    ("left_click", {"coordinate": ["a", "b"]}),
    ("left_click", {"coordinate": [WIDTH, 1]}),
    ("left_click", {"coordinate": [1, -1]}),
    ("left_click", {"coordinate": [1 << 70, 1]}),
    ("left_click", {"coordinate": [1, 1], "button": "left"}),
    ("left_click", {"coordinate": [1, 1], "text": "hyper"}),
    ("left_click", {"coordinate": [1, 1], "text": "a+b+c+d+e+f+g"}),
    ("left_click", {"coordinate": {"x": 1}}),
    ("key", {"text": "no-such-key"}),
    ("key", {"text": ""}),
    ("key", {"text": "a", "repeat": 1000}),
    ("key", {}),
    ("type", {"text": "x" * 4001}),
    ("type", {"text": "ü"}),
    ("type", {"text": None}),
    ("hold_key", {"text": "a", "duration": 1e9}),
    ("hold_key", {"text": "a", "duration": "nan"}),
    ("scroll", {"scroll_direction": "around", "scroll_amount": 1}),
    ("scroll", {"scroll_direction": "up", "scroll_amount": -1}),
    ("wait", {"duration": -1}),
    ("wait", {"duration": float("inf")}),
    ("zoom", {"region": [0, 0, 1]}),
    ("usb_attach", {"kind": "network", "path": "passt"}),
    ("usb_attach", {"kind": "serial", "path": "tcp:host:1"}),
    ("usb_attach", {"kind": "disk", "path": "x", "confirmation": {"allow": True}}),
    ("type_secret", {"name": "../x"}),
    ("no_such_tool", {}),
]


async def test_hostile_arguments_are_refused_and_nothing_is_sent(environment: dict[str, str]) -> None:
    async with console(environment, mice=2) as one, agent(one) as acting:
        await acting.call("screenshot")
        for tool, arguments in HOSTILE:
            error = await acting.refused(tool, **arguments)
            assert len(error) < 2000, (tool, arguments)
            sent = [kind for kind, _ in one.inputs.received if kind in (104, 112, 113)]
            assert sent == [], (tool, arguments)
