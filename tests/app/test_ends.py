"""Serial lines and network adapters as sources: what a user is shown, and what stays while the VM goes and returns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.app.test_link import lose, running
from tests.app.test_run import vm

from farplug.app import retry
from farplug.app.commands import Attach, Detach
from farplug.app.settings import Source
from farplug.errors import DeviceError, FarplugError, Reason, UsageError
from farplug.virtual.network import stable_mac


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DELAYS", (0.01, 0.02))
    monkeypatch.setattr(retry, "FLAP_TIME", 0.0)


async def test_the_path_of_a_terminal_is_in_the_events_and_in_the_state(tmp_path: Path) -> None:
    link = tmp_path / "line"
    async with vm(2) as one, running(one.target, Source.serial("pty"), Source.serial(f"pty:{link}")) as session:
        await session.named("ready")
        opened = [event.message for event in session.events if event.name == "opened"]
        states = session.guest.snapshot()["attachments"].values()
        (path,), (linked,) = (state["details"] for state in states)
        assert path.startswith("/dev/pts/")
        assert sorted(opened) == [f"port 0: serial0 ({path})", f"port 1: serial1 ({linked})"]
        assert linked == str(link)
        terminal = os.open(link, os.O_RDWR | os.O_NOCTTY)
        changed = await session.named("end-changed")
        assert (changed.device, changed.fields["connected"]) == ("serial1", True)
        await lose(one)
        await session.named("back")
        assert link.is_symlink()
        os.close(terminal)
        assert await session.app.do(Detach(f"pty:{link}")) == {"detached": ["serial1"]}
        assert not link.is_symlink()
        assert os.path.exists(path)


async def test_ends_are_attached_and_released(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    async with vm(3) as one, running(one.target) as session:
        await session.named("ready")
        serial, network = Source.serial(f"unix-listen:{socket}"), Source.network(f"unix-listen:{socket}2")
        sources = (serial, network, Source.network(f"unix-listen:{socket}3", mac="02-00-00-00-00-07"))
        attached = (await session.app.do(Attach(sources)))["attachments"]
        first = stable_mac(f"{one.target} network0").hex(":")
        assert [state["details"] for state in attached] == [
            [f"unix-listen:{socket}"],
            [f"unix-listen:{socket}2, {first}"],
            [f"unix-listen:{socket}3, 02:00:00:00:00:07"],
        ]
        assert [state["label"] for state in attached] == ["serial0", "network0", "network1"]
        for label in ("serial0", "network0", "network1"):
            await session.app.do(Detach(label))
        assert list(tmp_path.iterdir()) == []
        (again,) = (await session.app.do(Attach((network,))))["attachments"]
        assert again["details"] == [f"unix-listen:{socket}2, {first}"]


@pytest.mark.parametrize(
    ("source", "kind", "reason"),
    [
        (Source.serial("-"), UsageError, Reason.BAD_SETTING),
        (Source.serial(""), UsageError, Reason.BAD_OPTION),
        (Source.serial("passt"), UsageError, Reason.BAD_OPTION),
        (Source.network("pty"), UsageError, Reason.BAD_OPTION),
        (Source.network("unix:/x", mac="ff:ff:ff:ff:ff:ff"), UsageError, Reason.BAD_SETTING),
        (Source.network("unix:/nowhere/socket"), DeviceError, Reason.NOT_FOUND),
    ],
)
async def test_what_cannot_be_attached(source: Source, kind: type[FarplugError], reason: Reason) -> None:
    async with vm(1) as one, running(one.target) as session:
        await session.named("ready")
        with pytest.raises(kind) as caught:
            await session.app.do(Attach((source,)))
        assert caught.value.reason is reason
        assert session.guest.snapshot()["attachments"] == {}


async def test_an_end_that_cannot_be_opened_is_an_error_before_the_vm_is_contacted(tmp_path: Path) -> None:
    async with vm(1) as one, running(one.target, Source.serial(f"unix:{tmp_path}/socket")) as session:
        with pytest.raises(DeviceError, match="socket cannot be reached"):
            await session.run
        assert one.spice.linked == []


def test_sources_as_json_and_with_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"kind": "network", "path": "unix:socket", "mac": "020000000001"}
    source = Source.from_json(data)
    assert source == Source.network("unix:socket", mac="020000000001")
    assert source.absolute() == Source.network(f"unix:{tmp_path}/socket", mac="020000000001")
    for path, absolute in (
        ("pty:line", f"pty:{tmp_path}/line"),
        ("file:log", f"file:{tmp_path}/log"),
        ("unix-listen:a", f"unix-listen:{tmp_path}/a"),
        ("unix:///run/a", "unix:///run/a"),
        ("tcp-listen://:4000", "tcp-listen://:4000"),
        ("pty", "pty"),
        ("-", "-"),
    ):
        assert Source.serial(path).absolute() == Source.serial(absolute)
    with pytest.raises(UsageError, match="mac has no meaning for a serial"):
        Source.from_json({"kind": "serial", "path": "pty", "mac": "020000000001"})


def test_addresses_of_adapters_differ() -> None:
    assert len({stable_mac(f"spice://host{host} network{number}") for host in range(9) for number in range(9)}) == 81
    assert stable_mac("a")[0] == 2
