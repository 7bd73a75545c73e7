from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farplug.vm.qemu_config import Boot, GuestConfig, Spice, SpicePort, TcpPort, UsbDisk
from farplug.vm.qmp import Qmp, QmpError
from farplug.vm.snapshots import Snapshot, can_be_restored, saved_config


@pytest.mark.parametrize(
    "changes",
    [
        {"boot": Boot.BIOS},
        {"paused": True},
        {"accelerator": "kvm"},
        {"machine": True},
        {"disks": (UsbDisk(image=Path("x")),)},
        {"extra_arguments": ("-incoming", "defer")},
    ],
)
def test_guests_that_boot(changes: dict[str, Any]) -> None:
    assert can_be_restored(GuestConfig())
    assert not can_be_restored(replace(GuestConfig(), **changes))


def test_guests_with_other_ports_share_a_snapshot(tmp_path: Path) -> None:
    def snapshot(config: GuestConfig) -> Snapshot:
        return Snapshot.of(saved_config(config), tmp_path)

    plain = snapshot(GuestConfig())
    assert snapshot(GuestConfig(ports=(TcpPort(), SpicePort()), spice=Spice(ticket="x"))) == plain
    assert snapshot(GuestConfig(memory=300)) != plain
    # A tablet has the number after the ports.
    tablet = GuestConfig(ports=(TcpPort(),), extra_arguments=("-device", "usb-tablet"))
    assert snapshot(replace(tablet, ports=(SpicePort(),))) == snapshot(tablet)
    assert snapshot(replace(tablet, ports=(TcpPort(), TcpPort()))) != snapshot(tablet)


def test_file_that_has_changed_needs_another_snapshot(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("old")
    config = GuestConfig(files=(("/script", script),))
    old = Snapshot.of(config, tmp_path)
    assert Snapshot.of(config, tmp_path) == old
    script.write_text("new!")
    assert Snapshot.of(config, tmp_path) != old


async def test_one_saves_while_others_wait(tmp_path: Path) -> None:
    snapshot = Snapshot.of(GuestConfig(), tmp_path)
    inside: list[str] = []

    async def other() -> None:
        async with snapshot.locked():
            inside.append("other")

    async with snapshot.locked():
        task = asyncio.create_task(other())
        await asyncio.sleep(0.1)
        inside.append("first")
    await task
    assert inside == ["first", "other"]


class Monitor(Qmp):
    """QEMU's monitor: the migration has one status after the other."""

    def __init__(self, *statuses: str) -> None:
        super().__init__()
        self.statuses = list(statuses)
        self.uri = ""

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if command == "migrate":
            assert arguments is not None
            self.uri = arguments["uri"]

    async def event(self, name: str, timeout: float = 30) -> dict[str, Any]:
        assert name == "MIGRATION"
        return {"event": name, "data": {"status": self.statuses.pop(0)}}


async def test_snapshot_exists_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    snapshot = Snapshot.of(GuestConfig(), folder)
    assert not snapshot.exists()
    with pytest.raises(QmpError, match="QEMU refused migrate: the migration failed"):
        await snapshot.save(Monitor("setup", "active", "failed"), "console")
    assert not snapshot.exists()
    monitor = Monitor("setup", "active", "completed")
    await snapshot.save(monitor, "console")
    assert monitor.uri == f"exec:cat >'{snapshot.state}'"
    assert snapshot.exists()
    assert snapshot.console.read_text() == "console"
    assert os.listdir(folder) == [snapshot.console.name]
