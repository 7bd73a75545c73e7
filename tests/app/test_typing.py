"""Typing in a guest: which device is used, what becomes of it, and scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.app.test_link import running
from tests.app.test_run import vm
from tests.app.test_screen import Machine
from tests.cli.support import blank

from farplug.app.app import App
from farplug.app.commands import Attach, CheckText, Layouts, Press, TypeText, Via
from farplug.app.ducky import MAX_STEPS, Delay, parse_ducky
from farplug.app.guest import Guest
from farplug.app.screen import Inputs
from farplug.app.settings import Source
from farplug.errors import DeviceError, FarplugError, PortError, Reason, TargetError, UsageError
from farplug.target import open_session, parse_target
from farplug.virtual import Detached
from farplug.virtual.hid import Keyboard, Mouse, ReportsLost, Tablet


class Reading:
    """A guest that reads from each keyboard; what is typed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.layouts: list[str] = []
        self.error: Exception | None = None
        self.begun = asyncio.Event()
        self.gate: asyncio.Event | None = None
        reading = self

        async def read_by_guest(endpoint: object) -> None: ...

        async def type_text(keyboard: Keyboard, text: str, layout: str, progress: object) -> bool:
            assert callable(progress)
            progress(1)
            reading.begun.set()
            if reading.gate is not None:
                await reading.gate.wait()
            if reading.error is not None:
                raise reading.error
            reading.texts.append(text)
            reading.layouts.append(layout)
            return True

        monkeypatch.setattr("farplug.app.typing.READ_TIMEOUT", 100)
        monkeypatch.setattr("farplug.virtual.endpoints.InterruptIn.read_by_guest", read_by_guest)
        monkeypatch.setattr("farplug.virtual.endpoints.InterruptIn.is_read", property(lambda self: True))
        monkeypatch.setattr(Keyboard, "type_text", type_text)


async def test_a_keyboard_is_plugged_in_and_stays_until_its_port_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reading = Reading(monkeypatch)
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        for number in range(2):
            assert await session.app.do(TypeText(f"text {number}", "de")) == {"confirmed": True, "via": "usb"}
        assert (reading.texts, reading.layouts) == (["text 0", "text 1"], ["de", "de"])
        (attachment,) = session.guest.attachments
        assert attachment.label == "keyboard0"
        await session.app.do(Attach((Source.disk(blank(tmp_path / "a.raw")),)))
        assert attachment.over
        assert [one.label for one in session.guest.attachments] == ["a.raw"]
        assert "keyboard0 is unplugged: its port is needed" in [event.message for event in session.events]
        with pytest.raises(PortError) as caught:
            await session.app.do(TypeText("x", via=Via.USB))
        assert caught.value.reason is Reason.NO_FREE_PORT


async def test_a_keyboard_makes_room_in_the_port_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Reading(monkeypatch)
    async with vm(2) as one, running(one.target) as session:
        await session.named("ready")
        await session.app.do(TypeText("x"))
        (keyboard,) = session.guest.attachments
        port = keyboard.port.number
        sources = (Source.disk(blank(tmp_path / "a.raw")),)
        await session.app.do(Attach(sources, port=1 - port))
        assert not keyboard.over
        await session.guest.detach("a.raw")
        (disk,) = (await session.app.do(Attach(sources, port=port)))["attachments"]
        assert keyboard.over
        assert disk["port"] == keyboard.port.name


async def test_a_keyboard_of_the_user_is_used_and_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reading = Reading(monkeypatch)
    async with vm(1) as one, running(one.target, Source.keyboard()) as session:
        await session.named("ready")
        assert (await session.app.do(TypeText("x")))["confirmed"]
        assert reading.texts == ["x"]
        with pytest.raises(PortError, match="no free port"):
            await session.app.do(Attach((Source.disk(blank(tmp_path / "a.raw")),)))
        assert [one.label for one in session.guest.attachments] == ["keyboard0"]


async def test_what_is_plugged_in_on_demand_keeps_no_session_alive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Reading(monkeypatch)
    async with vm(2) as one, running(one.target, Source.disk(blank(tmp_path / "a.raw")), stay=False) as session:
        await session.named("ready")
        await session.app.do(TypeText("x"))
        await session.guest.detach("a.raw")
        await session.run


async def test_two_calls_share_a_keyboard(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch)
    async with vm(2) as one, running(one.target) as session:
        await session.named("ready")
        await asyncio.gather(*(session.app.do(TypeText(text)) for text in "ab"))
        assert sorted(reading.texts) == ["a", "b"]
        assert len(session.guest.attachments) == 1


async def test_a_call_waits_until_the_device_in_the_only_port_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch)
    done: list[str] = []

    async def move(mouse: Mouse, x: int, y: int) -> None:
        done.append("moved")

    async def click(mouse: Mouse, button: object) -> None:
        done.append("clicked")

    monkeypatch.setattr(Mouse, "move", move)
    monkeypatch.setattr(Mouse, "click", click)
    reading.gate = asyncio.Event()
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        typing = asyncio.ensure_future(session.app.do(TypeText("text")))
        await reading.begun.wait()
        clicking = asyncio.ensure_future(session.guest.typing.click_at_distance(1, 1))
        second = asyncio.ensure_future(session.app.do(TypeText("more")))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not clicking.done()
        assert [one.label for one in session.guest.attachments] == ["keyboard0"]
        reading.gate.set()
        assert await typing == {"confirmed": True, "via": "usb"}
        await clicking
        await second
        assert (done, reading.texts) == (["moved", "clicked"], ["text", "more"])


async def test_a_device_that_a_user_wants_in_the_port_comes_first_and_the_text_has_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reading = Reading(monkeypatch)
    reading.gate = asyncio.Event()
    reading.error = Detached("gone")
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        typing = asyncio.ensure_future(session.app.do(TypeText("text")))
        await reading.begun.wait()
        await session.app.do(Attach((Source.disk(blank(tmp_path / "a.raw")),)))
        reading.gate.set()
        with pytest.raises(DeviceError) as caught:
            await typing
        assert caught.value.message == (
            "the keyboard was unplugged on this side: something else needed its port, or a user unplugged it: "
            "1 of 4 characters are certain"
        )


@pytest.mark.parametrize(
    ("error", "certain"),
    [(ReportsLost(2, 5), 2), (Detached("gone"), 1)],
)
async def test_an_uncertain_text(monkeypatch: pytest.MonkeyPatch, error: Exception, certain: int) -> None:
    reading = Reading(monkeypatch)
    reading.error = error
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        with pytest.raises(DeviceError, match=f"{certain} of 5 characters are certain") as caught:
            await session.app.do(TypeText("hello"))
        assert caught.value.reason is Reason.UNCONFIRMED
        with pytest.raises(UsageError):
            await session.app.do(TypeText("\N{SNOWMAN}"))
        typed = [event.message for event in session.events if " typed " in event.message]
        assert typed == ["a client typed 5 characters, or a part"]


async def test_a_keyboard_is_plugged_in_again_once_a_port_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Reading(monkeypatch)
    typed: list[str] = []

    async def type_through_spice(self: object, text: str, *arguments: object, **options: object) -> None:
        typed.append(text)

    monkeypatch.setattr(Inputs, "are_there", True)
    monkeypatch.setattr(Inputs, "type", type_through_spice)
    async with vm(1) as one, running(one.target, Source.disk(blank(tmp_path / "a.raw"))) as session:
        await session.named("ready")
        assert (await session.app.do(TypeText("a")))["via"] == "spice"
        await session.guest.detach("a.raw")
        assert (await session.app.do(TypeText("b")))["via"] == "usb"
    assert typed == ["a"]


async def test_a_guest_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        with pytest.raises(TargetError, match="did not use the USB keyboard within") as caught:
            await session.app.do(TypeText("x", via=Via.USB))
        assert caught.value.reason is Reason.TIMED_OUT
        assert caught.value.remedy.endswith("a VM that is paused uses none")
        with pytest.raises(TargetError, match="did not use the USB tablet within") as caught:
            async with session.guest.typing._devices.use(Tablet, Source.tablet(), Via.USB):
                pass
        assert caught.value.remedy.endswith("a VM that is paused uses none, a text console no pointer")
        with pytest.raises(TargetError, match="did not use"):  # there are no inputs that SPICE reaches
            await session.app.do(Press("a"))


@asynccontextmanager
async def alone(machine: Machine) -> AsyncIterator[tuple[App, Guest]]:
    async with machine.serving() as port, App() as app:
        guest = Guest(session=await open_session(parse_target(f"spice://127.0.0.1:{port}")), stream=app.events)
        app.guests[guest.id] = guest
        yield app, guest


async def test_spice_where_no_keyboard_can_be_plugged_in() -> None:
    machine = Machine()
    async with asyncio.timeout(60), alone(machine) as (app, _):
        assert await app.do(TypeText("a")) == {"confirmed": False, "via": "spice"}
        assert await app.do(TypeText("b", via=Via.SPICE)) == {"confirmed": False, "via": "spice"}
        assert await app.do(Press("ctrl+c")) == {"confirmed": False, "via": "spice"}
        with pytest.raises(FarplugError) as caught:
            await app.do(TypeText("c", via=Via.USB))
        assert caught.value.reason is Reason.NO_USBREDIR_CHANNEL
    assert [body for kind, body in machine.inputs.received if kind == 104] == ["1e9e", "30b0", "1d2eae9d"]


async def test_layouts_and_texts_are_checked() -> None:
    app = App()
    app.guests["g1"] = guest = Guest(stream=app.events)
    found = await app.do(Layouts())
    assert {"name": "de", "title": "German"} in found["layouts"]
    assert found["current"] == "us"
    with pytest.raises(FarplugError):
        await guest.typing.type("x", "de")  # there is no connection
    assert (await app.do(Layouts()))["current"] == "de"
    assert await app.do(CheckText("abc")) == {"missing": []}
    (missing,) = (await app.do(CheckText("ab\N{EURO SIGN}")))["missing"]
    assert (missing["index"], missing["char"], "de" in missing["layouts"]) == (2, "€", True)


async def test_a_secret_is_not_quoted() -> None:
    machine = Machine()
    async with asyncio.timeout(60), alone(machine) as (app, _):
        with pytest.raises(UsageError, match="character 3 of the secret") as caught:
            await app.do(TypeText("abß", hidden=True))
        assert "ß" not in str(caught.value.as_dict())
    assert "hunter2" not in repr(TypeText("hunter2"))


def test_ducky() -> None:
    script = "\r\n".join(
        (
            "REM a comment",
            "DEFAULT_DELAY 10",
            "GUI r",
            "DELAY 500",
            "STRING  two spaces ",
            "STRINGLN x",
            "REPEAT 2",
            "CTRL-ALT DELETE",
            "SHIFT F10",
            "DOWNARROW",
            "ctrl -",
        )
    )
    pause = Delay(0.01)
    line = TypeText("x\n", "de", Via.USB)
    assert parse_ducky(script, "de", Via.USB) == [
        *(Press("GUI+r", Via.USB), pause, Delay(0.5), pause, TypeText(" two spaces ", "de", Via.USB), pause),
        *(line, pause, line, pause, line, pause, Press("CTRL+ALT+DELETE", Via.USB), pause),
        *(Press("SHIFT+F10", Via.USB), pause, Press("down", Via.USB), pause, Press("ctrl+-", Via.USB), pause),
    ]
    assert parse_ducky("", "us", Via.AUTO) == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("ENTER\nFROBNICATE", "line 2: 'FROBNICATE' is not a key"),
        ("STRING ß", "line 1: the keyboard layout us has no key for 'ß'"),
        ("DELAY soon", "line 1: 'soon' is not a number"),
        ("DELAY 3600001", "is not a number from 0 to 3600000"),
        ("DELAY ²", "is not a number"),
        ("REPEAT 1", "line 1: there is nothing to repeat"),
        (f"ENTER\nREPEAT {MAX_STEPS}", "line 2: more than 100000 steps"),
        ("a b c d e f g", "7 keys at a time"),
        ("x" * ((1 << 20) + 1), "at most 1048576"),
    ],
)
def test_scripts_that_are_not_valid(script: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ducky(script, "us", Via.AUTO)
    assert message in caught.value.message
