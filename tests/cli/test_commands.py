from __future__ import annotations

import asyncio
import os
import shlex
from pathlib import Path

import pytest

from farplug.cli.commands import MAX_LINE, Command, obey
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
        ("force eject two.iso", Command("eject", True, "two.iso", "")),
    ],
)
def test_commands(line: str, command: Command) -> None:
    assert Command.parse(line) == command


@pytest.mark.parametrize("line", ["insert", "force", "open", "eject a b", "insert a b c", "insert 'a", "é" * 5000])
def test_no_commands(line: str) -> None:
    with pytest.raises(UsageError, match="is no command") as caught:
        Command.parse(line)
    assert len(str(caught.value)) < 300


def drive(name: str) -> CdromDrive:
    store = MemoryStore(4096, block_size=2048)
    store.name = name
    return CdromDrive(store)


async def test_which_drive() -> None:
    one, two = drive("one"), drive("two")
    drives = [("a", one), ("b", two)]
    for words, said in (("eject", "which drive: a, b"), ("eject c", "there is no such drive: a, b")):
        with pytest.raises(UsageError, match=said):
            await Command.parse(words).run(drives)
    with pytest.raises(UsageError, match="no drive is plugged in"):
        await Command.parse("eject").run([])
    await Command.parse("eject b").run(drives)
    assert (one.medium, two.medium) == ("one", None)
    await Command.parse("eject").run([("a", one)])
    assert one.medium is None


async def test_a_locked_drive() -> None:
    one = drive("one")
    one.scsi.execute(bytes.fromhex("1e 00 00 00 01 00"))
    with pytest.raises(DeviceError, match="locked by the guest"):
        await Command.parse("eject").run([("a", one)])
    await Command.parse("force eject").run([("a", one)])
    assert one.medium is None


async def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, failures = drive("one"), list[FarplugError]()
    text = (
        f"\n  \neject\nnonsense\ninsert {shlex.quote(str(tmp_path / 'none'))}\ninsert {'x' * 3 * MAX_LINE}\n\xff\neject"
    )
    script = tmp_path / "script"
    script.write_bytes(text.encode("latin-1"))
    with script.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        await obey(lambda: [("a", one)], failures.append)
    assert one.medium is None
    assert ["no such file" in str(error) for error in failures] == [False, True, False, False]
    assert len(failures) == 4


async def test_a_path_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iso = tmp_path / os.fsdecode(b"b\xe9.iso")
    content = bytearray(1 << 20)
    content[32768:32775] = b"\x01CD001\x01"
    iso.write_bytes(content)
    one, failures = drive("one"), list[FarplugError]()
    script = tmp_path / "script"
    script.write_bytes(os.fsencode(f"insert {iso}\ninsert {iso}"))
    with script.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        await obey(lambda: [("a", one)], failures.append)
    assert (one.medium, failures) == (str(iso), [])
    await one.close()


async def test_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open("w") as file:  # noqa: ASYNC230  (it cannot be read)
        monkeypatch.setattr("sys.stdin", file)
        async with asyncio.timeout(10):
            await obey(list, lambda error: None)
