from __future__ import annotations

import asyncio
import os
import re
import shlex
from pathlib import Path

import pytest

from farplug.app.app import App
from farplug.app.commands import Command, Eject, Insert, ListDrives, Quit, help_lines
from farplug.app.events import Event
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.cli.commands import MAX_LINE, parse, serve
from farplug.errors import DeviceError, Reason, UsageError
from farplug.store import MemoryStore
from farplug.virtual import CdromDrive


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("insert /a b", Insert("b", "/a")),
        ("insert 'a b.iso'", Insert("a b.iso")),
        ("force insert x.iso", Insert("x.iso", force=True)),
        ("eject", Eject()),
        ("list", ListDrives()),
        ("help", None),
        ("quit", Quit()),
        ("force eject two.iso", Eject("two.iso", force=True)),
    ],
)
def test_commands(line: str, command: Command | None) -> None:
    assert parse(line) == command


@pytest.mark.parametrize(
    "line", ["insert", "force", "open", "eject a b", "insert a b c", "insert 'a", "é" * 5000, "force quit", "list x"]
)
def test_no_commands(line: str) -> None:
    with pytest.raises(UsageError, match="is not a command") as caught:
        parse(line)
    assert len(str(caught.value)) < 300
    assert "eject [DRIVE]" in caught.value.remedy


def drive(name: str) -> CdromDrive:
    store = MemoryStore(4096, block_size=2048)
    store.name = name
    return CdromDrive(store)


class Host(App):
    """An application with a guest that has just these drives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *drives: tuple[str, CdromDrive]) -> None:
        super().__init__(quit=self._leave_now)
        self.shown: list[Event] = []
        self.left = 0
        guest = self.add(GuestSettings(TargetSettings("tcp://127.0.0.1:1")))
        monkeypatch.setattr(guest, "drives", lambda: dict(drives))
        self.subscribe(self.shown.append)

    def _leave_now(self) -> None:
        self.left += 1

    @property
    def notes(self) -> list[str]:
        return [str(event) for event in self.shown if event.name in ("note", "drive")]

    @property
    def failures(self) -> list[str]:
        return [event.message for event in self.shown if event.name == "command-refused"]

    async def obey(self, line: str) -> object:
        command = parse(line)
        assert command is not None
        return await self.do(command)


async def test_which_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = drive("/isos/one.iso"), drive("two.iso"), drive("other/two.iso")
    host = Host(monkeypatch, ("cdrom0", one), ("cdrom1", two), ("cdrom2", three))
    names = "name one of: cdrom0 (one.iso), cdrom1 (two.iso), cdrom2 (two.iso)"
    for words, said in (
        ("eject", "several drives are plugged in"),
        ("eject c", "there is no drive 'c'"),
        ("insert c x.iso", "there is no drive 'c'"),
        ("eject two.iso/", "there is no drive"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)) as caught:
            await host.obey(words)
        assert caught.value.remedy == names
    with pytest.raises(UsageError, match="no CD-ROM drive is plugged in"):
        await Host(monkeypatch).obey("eject")
    await host.obey("eject other/two.iso")
    assert (one.medium, two.medium, three.medium) == ("/isos/one.iso", "two.iso", None)
    await host.obey("eject cdrom1")
    await host.obey("eject one.iso")
    assert (one.medium, two.medium) == (None, None)
    with pytest.raises(UsageError, match=re.escape("there is no drive 'one.iso'")) as caught:
        await host.obey("eject one.iso")
    assert "cdrom0 (empty)" in caught.value.remedy
    assert host.notes == []
    await host.obey("eject cdrom0")
    assert host.notes == ["cdrom0 is empty"]


async def test_the_same_name_in_two_drives_is_not_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, ("cdrom0", drive("a/x.iso")), ("cdrom1", drive("b/x.iso")))
    with pytest.raises(UsageError, match="several drives are plugged in") as caught:
        await host.obey("eject x.iso")
    assert caught.value.reason is Reason.AMBIGUOUS


async def test_list_help_and_quit(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = drive("one.iso"), drive("two.iso")
    one.scsi.execute(bytes.fromhex("1e 00 00 00 01 00"))
    await two.eject()
    host = Host(monkeypatch, ("cdrom0", one), ("cdrom1", two))
    await host.obey("list")
    assert host.notes == ["cdrom0: one.iso, locked by the guest", "cdrom1: empty"]
    empty = Host(monkeypatch)
    await empty.obey("list")
    assert empty.notes == ["no CD-ROM drive is plugged in"]
    assert [line.split()[0] for line in help_lines()] == [
        *("insert", "eject", "capture", "stop-capture", "screenshot", "screen-text", "type", "press", "click", "touch"),
        *("force", "force", "refuse", "list", "quit", "help"),
    ]
    assert host.left == 0
    await host.obey("quit")
    assert host.left == 1


async def test_a_locked_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    one = drive("one")
    one.scsi.execute(bytes.fromhex("1e 00 00 00 01 00"))
    with pytest.raises(DeviceError, match="locked by the guest"):
        await Host(monkeypatch, ("a", one)).obey("eject")
    await Host(monkeypatch, ("a", one)).obey("force eject")
    assert one.medium is None


async def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = drive("one")
    host = Host(monkeypatch, ("a", one))
    text = (
        f"\n  \neject\nnonsense\ninsert {shlex.quote(str(tmp_path / 'none'))}\ninsert {'x' * 3 * MAX_LINE}\n\xff\neject"
    )
    script = tmp_path / "script"
    script.write_bytes(text.encode("latin-1"))
    with script.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        await serve(host, host.guest(), host._leave_now)
    assert one.medium is None
    assert ["no such file" in error for error in host.failures] == [False, True, False, False]
    assert len(host.failures) == 4


async def test_a_path_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iso = tmp_path / os.fsdecode(b"b\xe9.iso")
    content = bytearray(1 << 20)
    content[32768:32775] = b"\x01CD001\x01"
    iso.write_bytes(content)
    one = drive("one")
    host = Host(monkeypatch, ("a", one))
    script = tmp_path / "script"
    script.write_bytes(os.fsencode(f"insert {iso}\ninsert {iso}"))
    with script.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        await serve(host, host.guest(), host._leave_now)
    assert (one.medium, host.failures) == (str(iso), [])
    await one.close()


async def test_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open("w") as file:  # noqa: ASYNC230  (it cannot be read)
        monkeypatch.setattr("sys.stdin", file)
        async with asyncio.timeout(100):
            host = Host(monkeypatch)
            await serve(host, host.guest(), host._leave_now)
