"""Leaving while the VM may not have finished writing to a disk."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests import starter
from tests.cli.support import Cli, FakeGuest, blank, in_thread, interrupt

from farplug.app.events import Event
from farplug.app.settings import GuestSettings, Source, TargetSettings
from farplug.app.sources import device_of
from farplug.cli import session
from farplug.cli.output import SilentOutput
from farplug.cli.session import _Session
from farplug.usb import Status
from farplug.usbredir import packets
from farplug.virtual.unit import LogicalUnit

WRITE = "2a 00 00 00 00 01 00 00 01 00"
WRITE_FUA = "2a 08 00 00 00 01 00 00 01 00"
FLUSH = "35 00 00 00 00 00 00 00 00 00"
STOP = "1b 00 00 00 02 00"
LEAVING = "the VM may not have finished writing to disk.raw: unmount it there before farplug leaves"
ASKING = "the VM may not have finished writing to disk.raw: unmount it there first; interrupt again to leave"
COMMAND = (*starter.COMMAND, "connect")


class WritingGuest(FakeGuest):
    """A guest that issues commands over Bulk-Only Transport to the disk that it configured, one after the other."""

    def __init__(self, *cdbs: str, when_done: Callable[[], None] = interrupt) -> None:
        super().__init__(self._next)
        self._cdbs = list(cdbs)
        self._when_done = when_done

    def _next(self) -> None:
        if not self._cdbs:
            self._when_done()
            return
        cdb = bytes.fromhex(self._cdbs.pop(0))
        data = bytes(512) if cdb[0] == 0x2A else b""
        wrapper = struct.pack("<4sIIBBB16s", b"USBC", 1, len(data), 0, 0, len(cdb), cdb)
        for id, part in enumerate((wrapper, data)):
            if part:
                self._connection.send(
                    packets.BulkPacket(id=10 + id, endpoint=2, status=Status.SUCCESS, length=len(part), data=part)
                )
        self._connection.send(packets.BulkPacket(id=12, endpoint=0x81, status=Status.SUCCESS, length=13))

    def _answer(self, packet: packets.Packet) -> None:
        if isinstance(packet, packets.BulkPacket) and packet.id == 12:
            assert bytes(packet.data)[12] == 0, "the command succeeded"
            self._next()
        else:
            super()._answer(packet)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_without_a_terminal_a_signal_leaves_with_a_warning(cli: Cli, image: Path, number: signal.Signals) -> None:
    with in_thread(WritingGuest(WRITE, when_done=lambda: os.kill(os.getpid(), number)).listening) as target:
        result = cli("connect", target, "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    lines = [line.partition(" ")[2] for line in result.out.splitlines()]
    assert lines.index(LEAVING) == lines.index("detaching; press Ctrl-C again to quit immediately") - 1


def test_before_the_vm_has_a_device_there_is_nothing_to_detach(image: Path) -> None:
    command = [*COMMAND, "tcp-listen://127.0.0.1:0", "--usb-disk", str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "waiting for QEMU to connect" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        shown = [line[9:] for line in process.stdout.read().splitlines()]
    assert process.returncode == 130
    assert "leaving; press Ctrl-C again to quit immediately" in shown


def test_json(cli: Cli, image: Path) -> None:
    with in_thread(WritingGuest(WRITE).listening) as target:
        result = cli("connect", target, "--usb-disk", image, "--json")
    assert (result.code, result.err) == (0, "")
    (warning,) = [line for line in map(json.loads, result.out.splitlines()) if line["event"] == "unfinished-writes"]
    assert (warning["disks"], warning["leaving"], warning["message"]) == (["disk.raw"], True, LEAVING)


@pytest.mark.parametrize(
    ("cdbs", "options", "warned"),
    [
        ([], [], False),
        ([WRITE, FLUSH], [], False),
        ([WRITE, STOP], [], False),
        ([WRITE_FUA], [], False),
        ([WRITE, FLUSH, WRITE_FUA], [], False),
        ([WRITE, WRITE_FUA], [], True),
        ([FLUSH, WRITE], [], True),
        ([WRITE], ["--snapshot"], False),
        ([WRITE], ["--snapshot-file", "changes"], True),
        ([WRITE], ["--cache", "unsafe"], True),
        ([WRITE, FLUSH], ["--cache", "unsafe"], False),
        ([WRITE], ["--cache", "writethrough"], True),
        ([WRITE], ["--force"], True),
    ],
)
def test_what_is_warned_about(
    cli: Cli, image: Path, monkeypatch: pytest.MonkeyPatch, cdbs: list[str], options: list[str], warned: bool
) -> None:
    monkeypatch.chdir(image.parent)
    with in_thread(WritingGuest(*cdbs).listening) as target:
        result = cli("connect", target, "--usb-disk", image, *options)
    assert (result.code, result.err) == (0, "")
    assert (LEAVING in result.out) is warned


def test_a_reader_that_leaves_is_reported_on_standard_error(image: Path) -> None:
    written = threading.Event()
    with in_thread(WritingGuest(WRITE, when_done=written.set).listening) as target:
        process = starter.Popen(
            [*COMMAND, target, "--usb-disk", str(image), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert written.wait(100)
            process.stdout.close()
            assert process.stderr.read().decode() == f"farplug: warning: {LEAVING}\n"
    assert process.returncode == 0


@pytest.mark.parametrize(("options", "asks"), [((), True), (("--force",), False)])
def test_on_a_terminal_the_first_interrupt_asks(image: Path, options: tuple[str, ...], asks: bool) -> None:
    with in_thread(WritingGuest(WRITE, when_done=lambda: os.kill(pid, signal.SIGINT)).listening) as target:
        pid, terminal = pty.fork()
        if pid == 0:
            environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
            os.execve(sys.executable, [*COMMAND, target, "--usb-disk", str(image), *options], environment)
        watchdog = threading.Timer(100, os.kill, [pid, signal.SIGKILL])
        watchdog.start()
        shown = b""
        asked = False
        try:
            while True:
                shown += os.read(terminal, 4096)
                if not asked and b"interrupt again to leave\r" in shown:
                    asked = True
                    assert b"detaching" not in shown
                    os.write(terminal, b"\x03")
        except OSError:  # it ended
            pass
        watchdog.cancel()
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    text = shown.decode()
    assert (asked, ASKING in text, LEAVING in text) == (asks, asks, not asks)
    assert "detaching; press Ctrl-C again to quit immediately" in text
    assert "disk.raw: detached (0 B read, 512 B written" in text


class Recorder(SilentOutput):
    def __init__(self) -> None:
        self.shown: list[object] = []

    def show(self, event: Event) -> None:
        if event.name == "unfinished-writes":
            self.shown.append((event.fields["disks"], event.fields["leaving"]))
        elif event.name == "note":
            self.shown.append(event.message.partition(";")[0])


@asynccontextmanager
async def opened(*paths: Path) -> AsyncIterator[tuple[_Session, Recorder, dict[str, LogicalUnit]]]:
    """A session whose disks are open, its output, and the logical units."""
    output = Recorder()
    settings = GuestSettings(TargetSettings("tcp://127.0.0.1:1"), tuple(Source.disk(path) for path in paths))
    run = _Session(settings, output, commands=False)
    guest = run._guest
    await guest._sources.open(settings.sources, settings.storage, lambda *_: None)
    group = guest._sources.opened
    guest._holdings.hold(device_of(group, settings.storage), group)
    yield run, output, {one.label: one.unit for one in group if one.unit is not None}
    await guest.close()


async def test_a_flush_ends_a_warning_and_further_writes_begin_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_on_terminal", lambda: True)
    async with opened(*(blank(tmp_path / name) for name in ("a", "b"))) as (run, output, units):
        run._work = asyncio.get_running_loop().create_task(asyncio.sleep(1000))

        def interrupted(number: signal.Signals = signal.SIGINT) -> list[object]:
            output.shown.clear()
            run._interrupt(number)
            return list(output.shown)

        units["a"].unflushed.wrote()
        assert interrupted() == [(["a"], False)]
        units["a"].unflushed.flushed(units["a"].unflushed.writes)
        units["a"].unflushed.wrote()
        assert interrupted() == [(["a"], False)], "other writes than those of the warning"
        units["b"].unflushed.wrote()
        assert interrupted() == [(["a", "b"], False)]
        units["a"].unflushed.wrote()
        assert run._work.cancelling() == 0
        assert interrupted() == ["leaving"], "more of the same writes change nothing"
        assert run._work.cancelling() == 1
        await asyncio.wait([run._work])


async def test_sigterm_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_on_terminal", lambda: True)
    async with opened(blank(tmp_path / "a")) as (run, output, units):
        units["a"].unflushed.wrote()
        run._interrupt(signal.SIGTERM)
        assert output.shown == [(["a"], True), "leaving"]


def test_several_disks() -> None:
    text = session.unfinished_writes(["a", "b"], leaving=False)
    assert text.endswith("to a, b: unmount them there first; interrupt again to leave")
