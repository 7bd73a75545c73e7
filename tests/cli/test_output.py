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
from typing import Any

import pytest
from rich.console import Console
from tests.cli.support import Cli, FakeGuest, in_thread

from farplug.app.events import Event, EventStream, Level
from farplug.cli.output import JsonOutput, Output, PlainOutput, SilentOutput, choose, figures_text, size
from farplug.cli.terminal import TerminalOutput
from farplug.errors import Remedy


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
    assert figures_text({"read": 0, "written": 0, "commands": 2, "errors": 1}).endswith("2 commands, 1 error")
    assert figures_text({"read": 0, "written": 0, "commands": 0}) == "0 B read, 0 B written, 0 commands"
    assert figures_text({"read": 1000, "written": 20, "commands": 1}) == "1.0 kB read, 20 B written, 1 command"


def shown_by(output: Output) -> EventStream:
    """A stream of events that an output shows."""
    stream = EventStream()
    stream.subscribe(output.show)
    return stream


def attach(stream: EventStream, id: str, label: str) -> None:
    """A device that is in use, and what it has moved."""

    def publish(name: str, **fields: Any) -> None:
        stream.publish(name, "x", level=Level.DETAIL, attachment=id, device=label, **fields)

    publish("attaching", speed="super", state="connecting")
    publish("configured", state="in use")
    publish("figures", state="in use", read=67_100_000, written=62_900_000, commands=86, rate=0)


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
    stream_of_events = shown_by(output)
    attach(stream_of_events, "a1", "a-disk-with-a-long-name.raw")
    attach(stream_of_events, "a2", "b.raw")
    output.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in shown.splitlines() if line.strip()]
    output.stop()
    assert lines[0].split() == headings
    assert len(lines) == 3, "no row is wrapped"
    assert all(len(line.rstrip()) <= width for line in lines)
    assert ("in use" in lines[1]) is ("state" in headings)
    assert ("67.1 MB" in lines[1]) is ("read" in headings)
    assert lines[2].startswith("b.raw")


def test_lines() -> None:
    stream = io.StringIO()
    outputs = (
        PlainOutput(stream),
        JsonOutput(stream),
        TerminalOutput(Console(file=stream, width=100, color_system=None)),
        SilentOutput(),
    )
    remedy = Remedy("plug it anyway", setting="storage.force", value=True, alternative=Remedy("or convert it"))
    for output in outputs:
        events = shown_by(output)
        events.publish("opened", "port 0: cdrom0 (x.iso)", device="cdrom0", attachment="a1")
        events.publish("drive", "x.iso", device="cdrom0", medium="x.iso", locked=False)
        events.publish("skipped", "it is in use", level=Level.BAD, **remedy.as_dict())
        events.publish("medium-locked", "locked", level=Level.DETAIL, device="cdrom0")
    lines = stream.getvalue().splitlines()
    assert [line[9:] for line in lines[:5]] == [
        "port 0: cdrom0 (x.iso)",
        "cdrom0: x.iso",
        "it is in use",
        "plug it anyway: --force",
        "or convert it",
    ]
    drive = json.loads(lines[6])
    assert (drive["event"], drive["device"], drive["medium"], drive["locked"]) == ("drive", "cdrom0", "x.iso", False)
    assert json.loads(lines[8])["event"] == "medium-locked"
    assert lines[9:] == [
        "· port 0: cdrom0 (x.iso)",
        "· cdrom0: x.iso",
        "✗ it is in use",
        "  plug it anyway: --force",
        "  or convert it",
    ]


def test_the_totals_of_a_device_that_leaves() -> None:
    stream = io.StringIO()
    output = PlainOutput(stream)
    events = shown_by(output)
    attach(events, "a1", "a.raw")
    output.refresh()
    output.refresh()
    events.publish("detached", "detached", level=Level.GOOD, attachment="a1", device="a.raw", state="detached")
    totals = "67.1 MB read, 62.9 MB written, 86 commands"
    assert [line[9:] for line in stream.getvalue().splitlines()] == [f"a.raw: {totals}", f"a.raw: detached ({totals})"]


def test_copies_are_shown_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    events = shown_by(JsonOutput(stream))
    for now[0] in (100.0, 100.5, 101.0, 101.9, 102.1):
        events.publish("copying", "x", level=Level.PROGRESS, device="drivers", done=1, total=2)
    assert len(stream.getvalue().splitlines()) == 3


STAGES = [("reach", "begun"), ("reach", "reached"), ("ticket", "begun"), ("ticket", "failed")]


def stages(output: Output) -> None:
    events = shown_by(output)
    for stage, state in STAGES:
        level = {"begun": Level.PROGRESS, "reached": Level.GOOD, "failed": Level.BAD}[state]
        events.publish("stage", "vm:1", level=level, stage=stage, state=state)


def test_a_stage_is_shown_once_it_is_reached() -> None:
    stream = io.StringIO()
    stages(PlainOutput(stream))
    assert stream.getvalue()[9:] == "reach: vm:1\n"
    listening = Event(1, 0, "stage", "listening on vm:1", fields={"stage": "listen", "state": "begun"})
    PlainOutput(stream).show(listening)
    assert "listen: listening on vm:1\n" in stream.getvalue(), "the user must start the VM"


def test_a_terminal_shows_the_stage_that_failed() -> None:
    stream = io.StringIO()
    output = TerminalOutput(Console(file=stream, force_terminal=True, width=60, color_system=None))
    output.start()
    stages(output)
    output.stop()
    output.stop()
    assert "✓ reach     vm:1\n" in stream.getvalue()
    assert "✗ ticket    vm:1\n" in stream.getvalue()


def test_the_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(as_json=True), JsonOutput)
    assert isinstance(choose(as_json=False), PlainOutput)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(choose(as_json=False), PlainOutput)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(as_json=False), PlainOutput)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose(as_json=False), TerminalOutput)
    assert isinstance(choose(as_json=False, commands=True), PlainOutput)


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
        async with asyncio.timeout(100):
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
            assert configured.wait(100)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b""
    assert warning == b"farplug: warning: output stopped: No space left on device\n"
    assert process.returncode == 0


def test_the_second_interrupt_counts_although_its_reader_is_gone(image: Path) -> None:
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
            assert configured.wait(100)
            process.send_signal(signal.SIGINT)
            for line in process.stdout:
                if b"Ctrl-C again" in line:
                    process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_names_that_look_like_markup(cli: Cli, image: Path) -> None:
    renamed = image.rename(image.with_name("[bold]x[.raw"))
    with in_thread(FakeGuest().listening) as target:
        assert "[bold]x[.raw: attached" in cli("connect", target, "--usb-disk", renamed).out
