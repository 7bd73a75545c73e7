"""Kinds of sources: one table, and sources that are not images, alone and beside images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.app.test_link import running
from tests.app.test_run import vm
from tests.cli.support import blank
from tests.docs import ROOT

from farplug.app.commands import Attach, Detach
from farplug.app.kinds import KINDS, Kind, Opening, Parts
from farplug.app.settings import DeviceRules, Names, Source, SourceKind, StorageSettings, UsbSpeed
from farplug.cli.device_options import DeviceOptions, Devices
from farplug.errors import PortError, Reason, UsageError
from farplug.virtual import AsyncFunction, Function, bulk_in
from farplug.virtual.fido.key_file import KeyFile
from farplug.virtual.hid import Keyboard

SOFTWARE = [kind for kind in SourceKind if kind.names is not Names.FILE and kind is not SourceKind.USB_DEVICE]


def test_each_kind_has_a_row_an_option_and_a_name_in_the_specification() -> None:
    assert set(KINDS) == set(SourceKind) - {SourceKind.USB_DEVICE}
    row = re.search(r"^\| `sources` .*$", (ROOT / "docs/control.md").read_text(), re.MULTILINE)
    assert row is not None
    for kind in SourceKind:
        assert f"`{kind}`" in row[0]
    for kind in set(SOFTWARE) - {SourceKind.REMOTE_DEVICE}:  # that is an usb_device with a URL
        assert f"usb_{kind.replace('-', '_')}" in DeviceOptions.__slots__


def test_paths() -> None:
    assert Source.keyboard().name == "keyboard"
    assert Source.from_json({"kind": "tablet"}) == Source.tablet()
    with pytest.raises(UsageError, match="path has no meaning for a keyboard"):
        Source.from_json({"kind": "keyboard", "path": "x"})
    with pytest.raises(UsageError, match="path is missing"):
        Source.from_json({"kind": "folder", "path": ""})
    here = Devices((Source.keyboard(), Source.usb_device("1-1"), Source.disk("a", snapshot="b")), *_settings())
    assert here.absolute().sources == (
        Source.keyboard(),
        Source.usb_device("1-1"),
        Source.disk(Path("a").absolute(), snapshot=Path("b").absolute()),
    )


def _settings() -> tuple[StorageSettings, DeviceRules]:
    return StorageSettings(), DeviceRules()


async def test_a_keyboard_comes_and_goes() -> None:
    async with vm(3) as one, running(one.target) as session:
        await session.named("ready")
        settings = StorageSettings(speed=UsbSpeed.SUPER)  # concerns images only
        command = Attach((Source.keyboard(), Source.tablet(), Source.keyboard()), settings)
        attached = (await session.app.do(command))["attachments"]
        assert [one["label"] for one in attached] == ["keyboard0", "tablet0", "keyboard1"]
        assert {one["speed"] for one in attached} == {"high"}
        assert [one["identity"] for one in attached][:2] == [
            "1d6b:0104 farplug Virtual Keyboard",
            "1d6b:0104 farplug Virtual Tablet",
        ]
        with pytest.raises(UsageError, match="fits several devices"):
            await session.app.do(Detach("keyboard"))
        assert await session.app.do(Detach("tablet")) == {"detached": ["tablet0"]}
        assert await session.app.do(Detach("keyboard0")) == {"detached": ["keyboard0"]}
        (again,) = (await session.app.do(Attach((Source.keyboard(),))))["attachments"]
        assert again["label"] == "keyboard0"


async def test_what_has_one_port_shares_it(tmp_path: Path) -> None:
    """Images come first: their logical unit numbers are their positions."""
    image = blank(tmp_path / "a.raw")
    sources = (Source.keyboard(), Source.disk(image), Source.tablet(), Source.disk(image, read_only=True))
    async with vm(1) as one, running(one.target, *sources[:3]) as session:
        await session.named("ready")
        (opened,) = [event for event in session.events if event.name == "opened"]
        assert opened.message == "port 0: a.raw, keyboard0, tablet0"
        await session.app.do(Detach("all"))
        (attached,) = (
            await session.app.do(Attach((*sources[:1], *sources[2:], Source.disk(image, snapshot=tmp_path / "s"))))
        )["attachments"]
        assert attached["units"] == ["a.raw", "a.raw-2", "keyboard0", "tablet0"]
        assert attached["details"] == ["", "", "", ""]
        assert attached["sources"] == [
            {"kind": "read-only-disk", "snapshot": False},
            {"kind": "disk", "snapshot": True},
            {"kind": "keyboard", "snapshot": False},
            {"kind": "tablet", "snapshot": False},
        ]
        message = [event for event in session.events if event.name == "opened"][-1].message
        assert message == "port 0: LUN 0 a.raw, LUN 1 a.raw-2, keyboard0, tablet0"


async def test_separate_devices_share_no_port(tmp_path: Path) -> None:
    sources = (Source.keyboard(), Source.disk(blank(tmp_path / "a.raw")))
    async with vm(2) as one:
        async with running(one.target, *sources, Source.tablet(), separate=True) as session:
            with pytest.raises(PortError, match="3 devices need a port each, but the VM has 2 for them") as caught:
                await session.run
            assert caught.value.reason is Reason.NO_FREE_PORT
            assert caught.value.remedy.startswith("let them share a port, plug fewer, or ")
            assert session.guest.attachments == []
        async with running(one.target, *sources, separate=True) as session:
            await session.named("ready")
            assert sorted(session.places) == ["a.raw", "keyboard0"]
            await session.app.do(Detach("a.raw"))
            with pytest.raises(PortError, match="2 devices need a port each, but the VM has 1 for them"):
                await session.app.do(Attach((sources[1], Source.tablet()), separate=True))
            assert sorted(session.places) == ["keyboard0"]
            (shared,) = (await session.app.do(Attach((sources[1], Source.tablet()))))["attachments"]
            assert shared["units"] == ["a.raw", "tablet0"]


@pytest.mark.parametrize("separate", [False, True])
async def test_what_is_refused_is_released(tmp_path: Path, separate: bool) -> None:
    """A socket, a key file, a link to a terminal: each is free again after a refusal, of the start or of a command."""
    key, link = tmp_path / "keys.json", tmp_path / "link"
    sources = (Source.serial(f"unix-listen:{tmp_path}/line"), Source.fido(key), Source.serial(f"pty:{link}"))

    async def check() -> None:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.json"]
        await KeyFile.open(key).close()

    async with vm(1) as one:
        if separate:
            async with running(one.target, *sources, separate=True) as session:
                with pytest.raises(PortError, match="3 devices need a port each"):
                    await session.run
            await check()
        async with running(one.target, Source.keyboard()) as session:
            await session.named("ready")
            with pytest.raises(PortError, match="no free port"):
                await session.app.do(Attach(sources, separate=separate))
            await check()
            await session.app.do(Detach("all"))
            await session.app.do(Attach(sources))


class _Many(AsyncFunction):
    """More endpoints than fit twice."""

    locals().update({f"endpoint{number}": bulk_in() for number in range(8)})


class _Failing(Keyboard):
    async def dispose(self) -> None:
        raise OSError("it cannot be released")


async def test_a_kind_is_a_row(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Plug, show and release what an opener returns; its functions share a port if they fit."""
    released: list[str] = []

    def kind(*functions: Function, detail: str = "") -> Kind:
        async def open(source: Source, opening: Opening) -> Parts:
            async def close() -> None:
                released.append(source.name)

            return Parts(functions, "Thing", detail, close)

        return Kind(open, "thing")

    monkeypatch.setitem(KINDS, SourceKind.KEYBOARD, kind(_Failing(), Keyboard(), detail="/dev/pts/7"))
    monkeypatch.setitem(KINDS, SourceKind.TABLET, kind(_Many()))
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        (attached,) = (await session.app.do(Attach((Source.keyboard(),))))["attachments"]
        assert (attached["label"], attached["details"]) == ("thing0", ["/dev/pts/7"])
        (again,) = (await session.app.do(Attach((Source.keyboard(),))))["attachments"]
        assert (again["id"], session.events[-1].message) == (
            attached["id"],
            "'keyboard' is plugged in already, as thing0",
        )
        await session.app.do(Detach("all"))
        assert released == ["keyboard"]
        assert "it cannot be released" in caplog.text
        monkeypatch.setitem(KINDS, SourceKind.KEYBOARD, kind(_Many()))
        with pytest.raises(PortError, match="cannot share one port: a device has at most 15 IN endpoints") as caught:
            await session.app.do(Attach((Source.keyboard(), Source.tablet())))
        assert caught.value.reason is Reason.NO_FREE_PORT
        assert sorted(released) == ["keyboard", "keyboard", "tablet"]


async def test_a_port_is_chosen(tmp_path: Path) -> None:
    image = blank(tmp_path / "a.raw")
    async with vm(3) as one, running(one.target) as session:
        await session.named("ready")
        (keyboard,) = (await session.app.do(Attach((Source.keyboard(),), port=2)))["attachments"]
        (disk,) = (await session.app.do(Attach((Source.disk(image),), port=1)))["attachments"]
        (tablet,) = (await session.app.do(Attach((Source.tablet(),))))["attachments"]
        ports = [port["name"] for port in next(iter(session.app.snapshot()["guests"].values()))["ports"]]
        assert [keyboard["port"], disk["port"], tablet["port"]] == [ports[2], ports[1], ports[0]]
        await session.app.do(Detach(disk["id"]))
        with pytest.raises(PortError, match="port 2 is in use") as busy:
            await session.app.do(Attach((Source.disk(image),), port=2))
        assert busy.value.reason is Reason.NO_FREE_PORT
        with pytest.raises(UsageError, match="port 3 does not exist") as unknown:
            await session.app.do(Attach((Source.disk(image),), port=3))
        assert (unknown.value.reason, unknown.value.remedy) == (Reason.BAD_SETTING, "ports: 0 to 2")
        with pytest.raises(UsageError, match="a port is chosen for one source"):
            await session.app.do(Attach((Source.keyboard(), Source.tablet()), port=1))
        (again,) = (await session.app.do(Attach((Source.disk(image),), port=1)))["attachments"]
        assert again["port"] == ports[1]
