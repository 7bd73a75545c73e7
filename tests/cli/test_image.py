from __future__ import annotations

import asyncio
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.cli.support import Cli
from tests.image.support import MIB, make_folder, run
from tests.store.support import make_snapshot

from farplug.cli.image import parse_size
from farplug.errors import UsageError
from farplug.exit_codes import ExitCode
from farplug.store import OverlayStore, overlay


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a folder ``drivers`` in it."""
    make_folder(tmp_path / "drivers", {"net/virtio net.inf": b"driver"})
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("8K", 8192), ("8k", 8192), ("512M", 512 * MIB), ("8GiB", 8 << 30), ("3T", 3 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8X", "8GB", "-1", "1.5G", "G", "8 G", "٣", "9" * 30, "8G\n"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid size"):
        parse_size(text)


def test_a_fat32_image(cli: Cli, here: Path) -> None:
    result = cli("image", "create", "64M", "--format", "fat32", "--partition", "gpt", "--from", "drivers")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("drivers.raw: 67.1 MB, FAT32 'DRIVERS' in GPT; ")
    assert (here / "drivers.raw").stat().st_size == 64 * MIB
    assert run("mtype", "-i", "drivers.raw@@1M", "::/net/virtio net.inf") == "driver"
    again = cli("image", "create", "64M", "--from", "drivers")
    assert (again.code, again.out) == (ExitCode.IMAGE, "")
    assert "drivers.raw already exists" in again.err


def test_as_large_as_needed(cli: Cli, here: Path) -> None:
    os.mkfifo("drivers/pipe")
    result = cli("image", "create", "--from", "drivers", "-o", "x.raw", "--label", "my disk", "--block-size", "4096")
    assert result.code == 0
    assert result.out.startswith("x.raw: 271 MB, FAT32 'MY DISK' in MBR; ")
    assert result.err == "farplug: warning: drivers: left out, a pipe: pipe\n"


def test_an_empty_image(cli: Cli, here: Path) -> None:
    assert cli("image", "create", "40M", "--format", "ext4", "--output", "x.raw").code == 0
    assert (here / "x.raw").stat().st_size == 40 * MIB


def test_names_that_steer_a_terminal_or_are_not_text(cli: Cli, here: Path) -> None:
    disk = os.fsdecode(b"\x1b]0;x\x07\xe9.raw")
    made = cli("image", "create", "64M", "-o", disk)
    assert (made.code, made.err) == (0, "")
    asyncio.run(OverlayStore.open(disk, "snapshot").close())
    info = cli("image", "info", "snapshot")
    assert (info.code, info.err) == (0, "")
    for out in (made.out, info.out):
        assert all(char.isprintable() for char in out.replace("\n", "")), out


@pytest.fixture
def snapshot(here: Path) -> Path:
    """A snapshot of ``my disk.raw`` with a changed cluster."""
    (here / "my disk.raw").write_bytes(bytes(MIB))
    asyncio.run(make_snapshot(here / "my disk.raw", here / "changes"))
    return here / "changes"


def test_a_commit_to_the_image_that_was_named(cli: Cli, snapshot: Path) -> None:
    result = cli("image", "commit", "changes", "--image", "my disk.raw")
    assert (result.code, result.err) == (0, "")
    assert result.out == "4.1 kB written to my disk.raw; changes removed\n"
    assert (snapshot.parent / "my disk.raw").read_bytes()[:512] == b"x" * 512


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_no_commit_to_an_image_that_was_not_named(cli: Cli, here: Path, snapshot: Path, options: tuple[str]) -> None:
    result = cli("image", "commit", "changes", *options)
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    message, _, command = result.err.strip().split("\n")
    assert message == f"farplug: changes recorded {here}/my disk.raw as its image, which was not confirmed"
    assert command.strip().split(" --force") == [
        f"farplug image commit changes --image '{here}/my disk.raw'",
        *([""] if options else []),
    ]
    assert not any((here / "my disk.raw").read_bytes())
    assert cli(*shlex.split(command)[1:]).code == 0


@pytest.mark.parametrize(("typed", "code"), [(b"y\n", 0), (b"n\n", 2), (b"\n", 2), (b"\x04", 130)])
def test_a_commit_that_is_confirmed_on_the_terminal(here: Path, snapshot: Path, typed: bytes, code: int) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        program = "from farplug.cli.main import main; main()"
        os.execv(sys.executable, [sys.executable, "-c", program, "image", "commit", "changes"])
    watchdog = threading.Timer(30, os.kill, [pid, signal.SIGKILL])
    watchdog.start()
    shown = b""
    with suppress(OSError):  # it ended
        while data := os.read(terminal, 4096):
            shown += data
            if shown.endswith(b"[y/N]: "):
                os.write(terminal, typed)
    watchdog.cancel()
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert f"Write 4.1 kB of changes to {here}/my disk.raw? [y/N]: " in shown.decode().replace("\r\n", "")
    assert os.waitstatus_to_exitcode(status) == code
    assert snapshot.exists() == bool(code)
    assert any((here / "my disk.raw").read_bytes()) == (code == 0)


def test_a_hostile_path_is_shown_without_control_characters(cli: Cli, here: Path) -> None:
    disk = here / "\x1b]0;x\x07\u202edisk\n.raw"
    disk.write_bytes(bytes(MIB))
    asyncio.run(make_snapshot(disk, here / "changes"))
    result = cli("image", "commit", "changes")
    assert result.code == ExitCode.USAGE
    assert all(char.isprintable() for char in result.err.replace("\n", ""))
    command = result.err.strip().split("\n")[-1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert os.fsencode(disk) in words.split(b"\0")


def test_info_of_a_half_committed_snapshot_names_no_image_of_its_own(cli: Cli, here: Path, snapshot: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overlay.commit(snapshot, here / "my disk.raw", progress=stop)
    assert cli("image", "info", "changes").out.endswith(": farplug image commit changes --image IMAGE\n")
    target = ("tcp://127.0.0.1:9",)
    result = cli("connect", *target, "--usb-disk", "my disk.raw", "--snapshot-file", "changes")
    assert "  farplug image commit changes --image 'my disk.raw'\n" in result.err
    assert cli("image", "commit", "changes", "--image", "my disk.raw").code == 0


def test_an_iso_image(cli: Cli, here: Path) -> None:
    result = cli("image", "create", "--format", "iso9660", "--from", "drivers")
    assert result.out.startswith("drivers.iso: ")
    assert "'/net/virtio net.inf'" in run("xorriso", "-indev", "drivers.iso", "-find", "/", "-exec", "lsdl")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("", ExitCode.USAGE, "the image has no name"),
        ("8X -o x.raw", ExitCode.USAGE, "'8X' is not a valid size"),
        ("-o x.raw", ExitCode.USAGE, "needs a size"),
        ("8M -o x.raw", ExitCode.IMAGE, "8388608 bytes are too small for FAT32"),
        ("9000000T -o x.raw", ExitCode.IMAGE, "too large"),
        ("64M -o x.raw --format zfs", ExitCode.USAGE, "zfs"),
        ("64M -o x.raw --partition bsd", ExitCode.USAGE, "bsd"),
        ("64M -o x.raw --block-size 1024", ExitCode.USAGE, "1024"),
        ("64M -o x.raw --label a/b", ExitCode.USAGE, "'a/b' is not a valid label"),
        ("--from nowhere -o x.raw", ExitCode.IMAGE, "no such file"),
        ("--from drivers -o drivers/x.raw", ExitCode.IMAGE, "is inside the folder"),
        ("--from drivers -o nowhere/x.raw", ExitCode.IMAGE, "nowhere/x.raw cannot be created"),
        ("--from drivers/net/x -o x.raw", ExitCode.IMAGE, "cannot be read"),
        ("--format iso9660 -o x.iso", ExitCode.USAGE, "needs a folder"),
        ("64M --format iso9660 --from drivers", ExitCode.USAGE, "no size"),
        ("--format iso9660 --from drivers --partition gpt", ExitCode.USAGE, "no size, partition table"),
        ("--format iso9660 --from drivers --block-size 512", ExitCode.USAGE, "block size"),
    ],
)
def test_refusals(cli: Cli, here: Path, arguments: str, code: ExitCode, text: str) -> None:
    result = cli("image", "create", *arguments.split())
    assert (result.code, result.out) == (code, "")
    assert text in result.err
    assert os.listdir(here) == ["drivers"]


def test_the_command_alone(cli: Cli) -> None:
    assert cli("image").code == ExitCode.USAGE
    assert "create" in cli("image", "--help").out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_by_a_signal(here: Path, number: signal.Signals) -> None:
    """No image, no tool and no temporary file is left."""
    (here / "bin").mkdir()
    tool = here / "bin" / "mke2fs"
    tool.write_text('#!/bin/sh\necho $$ >"$PWD/pid"\nexec sleep 1000\n')
    tool.chmod(0o755)
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from farplug.cli.main import main; main()"),
            *("image", "create", "--from", "drivers", "--format", "ext4"),
        ],
        env={**os.environ, "PATH": f"{here}/bin:{os.environ['PATH']}", "TMPDIR": str(here)},
        stderr=subprocess.PIPE,
    )
    try:
        while not (here / "pid").exists() or not (here / "pid").read_text().strip():
            time.sleep(0.02)
        tool_pid = int((here / "pid").read_text())
        process.send_signal(number)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert sorted(os.listdir(here)) == ["bin", "drivers", "pid"]
    if number is signal.SIGKILL:
        os.kill(tool_pid, signal.SIGKILL)  # it cannot know
    else:
        assert process.returncode == ExitCode.INTERRUPTED
        assert errors == b"farplug: interrupted\n"
        assert not Path(f"/proc/{tool_pid}").exists()
