from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console
from tests.cli.support import Cli, FakeGuest, in_thread

from farplug.app.guest import Attachment, AttachmentState
from farplug.cli.output import (
    Figures,
    JsonOutput,
    PlainOutput,
    SilentOutput,
    TerminalOutput,
    _Rate,
    choose,
    port_line,
    size,
)
from farplug.errors import Reason, TargetError
from farplug.redirection import events
from farplug.store import MemoryStore
from farplug.usb.types import Speed
from farplug.virtual.cdrom import CdromDrive


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (64_000_000, "64.0 MB"),
        (2 * 10**12, "2.0 TB"),
        (5 * 10**18, "5000 PB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def test_figures() -> None:
    assert str(Figures()) == "0 B read, 0 B written, 0 commands"
    assert str(Figures(1000, 20, 1)) == "1.0 kB read, 20 B written, 1 command"


def attachment(label: str, figures: Figures) -> tuple[str, Attachment]:
    device = SimpleNamespace(figures=figures, identity=SimpleNamespace(speed=Speed.SUPER))
    return label, cast(Attachment, SimpleNamespace(device=device, state=AttachmentState.CONFIGURED))


def test_the_first_rate_is_not_what_moved_before() -> None:
    rate = _Rate()
    assert rate.look(Figures(read=5_000_000)) == 0
    assert rate.look(Figures(read=6_000_000)) > 0
    assert rate.look(Figures(read=10)) == 0, "the device was plugged in again"


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (100, ["device", "state", "speed", "read", "written", "rate", "commands"]),
        (60, ["device", "state", "speed", "read", "written", "rate", "commands"]),
        (59, ["device", "state", "speed", "read", "written", "rate"]),
        (45, ["device", "state", "read", "written", "rate"]),
        (40, ["device", "state", "read", "written"]),
        (30, ["device", "state", "read"]),
        (20, ["device", "state"]),
        (12, ["device"]),
    ],
)
def test_a_narrow_table_drops_columns(width: int, headings: list[str]) -> None:
    stream = io.StringIO()
    output = TerminalOutput(Console(file=stream, force_terminal=True, width=width, color_system=None))
    output.start()
    figures = Figures(read=67_100_000, written=62_900_000, commands=86)
    output.figures([attachment("a-disk-with-a-long-name.raw", figures), attachment("b.raw", figures)])
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in shown.splitlines() if line.strip()]
    output.stop()
    assert lines[0].split() == headings
    assert len(lines) == 3, "no row is wrapped"
    assert all(len(line.rstrip()) <= width for line in lines)
    assert ("in use" in lines[1]) is ("state" in headings)
    assert ("67.1 MB" in lines[1]) is ("read" in headings)
    assert lines[2].startswith("b.raw")


def test_what_is_in_a_port_and_in_a_drive() -> None:
    assert port_line(["a.raw"], events.Opened("tcp", 0)) == "port 0: a.raw"
    assert port_line(["a.raw", "cdrom0 (x.iso)"], events.Opened("usbredir 1", 1)) == (
        "port 1: LUN 0 a.raw, LUN 1 cdrom0 (x.iso)"
    )
    stream = io.StringIO()
    store = MemoryStore(4096, block_size=2048)
    store.name = "x.iso"
    for output in (
        PlainOutput(stream),
        JsonOutput(stream),
        TerminalOutput(Console(file=stream, width=100, color_system=None)),
        SilentOutput(),
    ):
        output.opened("cdrom0", ["cdrom0 (x.iso)"], events.Opened("tcp", 0))
        output.drive("cdrom0", CdromDrive(store))
        output.drive("cdrom1", CdromDrive())
    text = stream.getvalue()
    assert text.count("port 0: cdrom0 (x.iso)") == 3
    assert text.count("cdrom0: x.iso") == text.count("cdrom1: empty") == 3
    line = json.loads(text.splitlines()[4])
    assert (line["event"], line["device"], line["medium"], line["locked"]) == ("drive", "cdrom0", "x.iso", False)


def test_a_stage_is_told_once_it_is_reached() -> None:
    stream = io.StringIO()
    output = PlainOutput(stream)
    output.stage("reach", "vm:1")
    assert stream.getvalue() == ""
    output.stage("ticket", "vm:1")
    assert stream.getvalue()[9:] == "reach: vm:1\n"
    output.failed(TargetError("no", reason=Reason.WRONG_PASSWORD))
    output.reached()
    assert "ticket" not in stream.getvalue()


def test_a_terminal_shows_the_stage_that_failed() -> None:
    stream = io.StringIO()
    output = TerminalOutput(Console(file=stream, force_terminal=True, width=60, color_system=None))
    output.start()
    output.stage("reach", "vm:1")
    output.stage("ticket", "vm:1")
    output.failed(TargetError("no", reason=Reason.WRONG_PASSWORD))
    output.stop()
    output.stop()
    assert "✓ reach     vm:1\n" in stream.getvalue()
    assert "✗ ticket    vm:1\n" in stream.getvalue()


def test_the_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(as_json=True), JsonOutput)
    assert isinstance(choose(as_json=False), PlainOutput)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(as_json=False), PlainOutput)


def test_on_a_terminal(image: Path) -> None:
    configured = threading.Event()
    with in_thread(FakeGuest(configured.set).listening) as target:
        pid, terminal = pty.fork()
        if pid == 0:
            code = "from farplug.cli.main import main; main()"
            environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
            os.execve(
                sys.executable,
                [sys.executable, "-c", code, "connect", target, "--usb-disk", str(image)],
                environment,
            )
        watchdog = threading.Timer(100, os.kill, [pid, signal.SIGKILL])
        watchdog.start()
        shown = b""
        try:
            left = False
            while True:
                shown += os.read(terminal, 4096)
                if not left and b"in use" in shown:
                    left = True
                    os.kill(pid, signal.SIGINT)
        except OSError:  # it ended
            pass
        watchdog.cancel()
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert configured.is_set()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "✓ disk.raw: configured by the guest" in text
    assert re.search(r"disk\.raw +in use +super +0 B +0 B +0 B/s +0", text)
    assert "✓ disk.raw: detached (0 B read" in text
    assert shown.endswith(b"\x1b[2K"), "the table is gone in the end"
    assert b"\x1b[?25h" in shown, "and the cursor is back"


def test_a_reader_that_leaves_ends_the_session(image: Path) -> None:
    async def session() -> tuple[int, bytes]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "from farplug.cli.main import main; main()", "connect", target, "--usb-disk", str(image)),
            stdout=write,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(write)
        async with asyncio.timeout(30):
            _, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, errors

    read, write = os.pipe()
    os.close(read)
    guest = FakeGuest(lambda: None)
    with in_thread(guest.listening) as target:
        assert asyncio.run(session()) == (0, b"")


def test_a_full_disk_does_not_end_the_session(image: Path) -> None:
    configured = threading.Event()
    with in_thread(FakeGuest(configured.set).listening) as target, Path("/dev/full").open("wb") as full:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from farplug.cli.main import main; main()"),
                *("connect", target, "--usb-disk", str(image)),
            ],
            stdout=full,
            stderr=subprocess.PIPE,
        )
        with process:
            assert process.stderr is not None
            warning = process.stderr.readline()
            assert configured.wait(30)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b""
    assert warning == b"farplug: warning: nothing more is told on standard output: No space left on device\n"
    assert process.returncode == 0


def test_the_second_interrupt_counts_although_nobody_reads_it(image: Path) -> None:
    """The first one ended ``tee`` too, and the guest does not let go of its device."""

    def stop_listening() -> None:
        guest.receive = lambda data: []  # type: ignore[method-assign]
        configured.set()

    configured = threading.Event()
    guest = FakeGuest(stop_listening)
    read, write = os.pipe()
    os.close(read)
    with in_thread(guest.listening) as target:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from farplug.cli.main import main; main()"),
                *("connect", target, "--usb-disk", str(image)),
            ],
            stdout=subprocess.PIPE,
            stderr=write,
        )
        os.close(write)
        with process:
            assert process.stdout is not None
            assert configured.wait(30)
            process.send_signal(signal.SIGINT)
            for line in process.stdout:
                if b"interrupt again" in line:
                    process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_names_that_look_like_markup(cli: Cli, image: Path) -> None:
    renamed = image.rename(image.with_name("[bold]x[.raw"))
    with in_thread(FakeGuest().listening) as target:
        assert "[bold]x[.raw: attached" in cli("connect", target, "--usb-disk", renamed).out
