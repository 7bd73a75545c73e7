from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from farplug.cli.commands import MAX_LINE, Command, obey
from farplug.cli.output import drive_line
from farplug.errors import DeviceError, FarplugError, UsageError
from farplug.store import MemoryStore
from farplug.virtual import CdromDrive


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("insert /a b", Command("insert", False, "/a", "b")),
        ("insert 'a b.iso'", Command("insert", False, None, "a b.iso")),
        ("force insert x.iso", Command("insert", True, None, "x.iso")),
        ("eject", Command("eject", False, None, "")),
        ("list", Command("list")),
        ("help", Command("help")),
        ("quit", Command("quit")),
        ("force eject two.iso", Command("eject", True, "two.iso", "")),
    ],
)
def test_commands(line: str, command: Command) -> None:
    assert Command.parse(line) == command


@pytest.mark.parametrize(
    "line", ["insert", "force", "open", "eject a b", "insert a b c", "insert 'a", "é" * 5000, "force quit", "list x"]
)
def test_no_commands(line: str) -> None:
    with pytest.raises(UsageError, match="is not a command") as caught:
        Command.parse(line)
    assert len(str(caught.value)) < 300
    assert "eject [DRIVE]" in caught.value.remedy


def drive(name: str) -> CdromDrive:
    store = MemoryStore(4096, block_size=2048)
    store.name = name
    return CdromDrive(store)


class FakeHost:
    def __init__(self, *drives: tuple[str, CdromDrive]) -> None:
        self._drives = drives
        self.notes: list[str] = []
        self.failures: list[FarplugError] = []
        self.left = 0

    def drives(self) -> Sequence[tuple[str, CdromDrive]]:
        return self._drives

    def note(self, text: str) -> None:
        self.notes.append(text)

    def listed(self, name: str, drive: CdromDrive) -> None:
        self.notes.append(drive_line(name, drive))

    def refused(self, error: FarplugError) -> None:
        self.failures.append(error)

    def quit(self) -> None:
        self.left += 1


async def test_which_drive() -> None:
    one, two, three = drive("/isos/one.iso"), drive("two.iso"), drive("other/two.iso")
    host = FakeHost(("cdrom0", one), ("cdrom1", two), ("cdrom2", three))
    names = "the drives are: cdrom0 (one.iso), cdrom1 (two.iso), cdrom2 (two.iso)"
    for words, said in (
        ("eject", "eject: which drive?"),
        ("eject c", "eject: there is no drive 'c'"),
        ("insert c x.iso", "insert: there is no drive 'c'"),
        ("eject two.iso/", "there is no drive"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)) as caught:
            await Command.parse(words).run(host)
        assert caught.value.remedy == names
    with pytest.raises(UsageError, match="eject: no drive is plugged in"):
        await Command.parse("eject").run(FakeHost())
    await Command.parse("eject other/two.iso").run(host)
    assert (one.medium, two.medium, three.medium) == ("/isos/one.iso", "two.iso", None)
    await Command.parse("eject cdrom1").run(host)
    await Command.parse("eject one.iso").run(host)
    assert (one.medium, two.medium) == (None, None)
    with pytest.raises(UsageError, match=re.escape("there is no drive 'one.iso'")) as caught:
        await Command.parse("eject one.iso").run(host)
    assert "cdrom0 (empty)" in caught.value.remedy
    assert host.notes == []
    await Command.parse("eject cdrom0").run(host)
    assert host.notes == ["cdrom0 is empty"]


async def test_the_same_name_in_two_drives_is_not_clear() -> None:
    host = FakeHost(("cdrom0", drive("a/x.iso")), ("cdrom1", drive("b/x.iso")))
    with pytest.raises(UsageError, match=re.escape("eject: which drive?")):
        await Command.parse("eject x.iso").run(host)


async def test_list_help_and_quit() -> None:
    one, two = drive("one.iso"), drive("two.iso")
    one.scsi.execute(bytes.fromhex("1e 00 00 00 01 00"))
    await two.eject()
    host = FakeHost(("cdrom0", one), ("cdrom1", two))
    await Command.parse("list").run(host)
    assert host.notes == ["cdrom0: one.iso, locked by the guest", "cdrom1: empty"]
    empty = FakeHost()
    await Command.parse("list").run(empty)
    assert empty.notes == ["no drive is plugged in"]
    await Command.parse("help").run(empty)
    for verb in ("insert", "eject", "force", "list", "quit", "help"):
        assert any(line.startswith(verb) for line in empty.notes[1:])
    assert host.left == 0
    await Command.parse("quit").run(host)
    assert host.left == 1


async def test_a_locked_drive() -> None:
    one = drive("one")
    one.scsi.execute(bytes.fromhex("1e 00 00 00 01 00"))
    with pytest.raises(DeviceError, match="locked by the guest"):
        await Command.parse("eject").run(FakeHost(("a", one)))
    await Command.parse("force eject").run(FakeHost(("a", one)))
    assert one.medium is None


async def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = drive("one")
    host = FakeHost(("a", one))
    failures = host.failures
    text = (
        f"\n  \neject\nnonsense\ninsert {shlex.quote(str(tmp_path / 'none'))}\ninsert {'x' * 3 * MAX_LINE}\n\xff\neject"
    )
    script = tmp_path / "script"
    script.write_bytes(text.encode("latin-1"))
    with script.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        await obey(host)
    assert one.medium is None
    assert ["no such file" in str(error) for error in failures] == [False, True, False, False]
    assert len(failures) == 4


async def test_a_path_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iso = tmp_path / os.fsdecode(b"b\xe9.iso")
    content = bytearray(1 << 20)
    content[32768:32775] = b"\x01CD001\x01"
    iso.write_bytes(content)
    one = drive("one")
    host = FakeHost(("a", one))
    failures = host.failures
    script = tmp_path / "script"
    script.write_bytes(os.fsencode(f"insert {iso}\ninsert {iso}"))
    with script.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        await obey(host)
    assert (one.medium, failures) == (str(iso), [])
    await one.close()


async def test_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open("w") as file:  # noqa: ASYNC230  (it cannot be read)
        monkeypatch.setattr("sys.stdin", file)
        async with asyncio.timeout(10):
            await obey(FakeHost())
