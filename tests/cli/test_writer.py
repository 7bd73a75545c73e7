"""Unread output stops nothing: the queue before a stream, and whole sessions."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from tests import starter
from tests.cli.support import FakeGuest, in_thread, wait_for

from farplug.app.events import EventStream, Level
from farplug.cli import writer
from farplug.cli.output import JsonOutput, PlainOutput
from farplug.cli.writer import MAX_QUEUED, QueuedStream, _Writer, left_out_line
from farplug.usb import Status
from farplug.usbredir import packets

SMALL_PIPE = 4096
COMMAND = (*starter.COMMAND, "connect")


class Pipe:
    """A pipe whose reader the test is, and a queued stream on its other end."""

    def __init__(self) -> None:
        self.read_end, write_end = os.pipe()
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
        self.file = os.fdopen(write_end, "w", encoding="utf-8", errors="backslashreplace")
        self.writer = _Writer(self.file.fileno())
        self.stream = QueuedStream(self.file, self.writer)

    def fill(self) -> int:
        """Write lines until the queue is full; return their number."""
        count = 0
        while not self.stream.full:
            self.stream.write(f"line {count} {'x' * 1000}\n")
            count += 1
        return count

    def read_until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            data += os.read(self.read_end, 1 << 16)
        return data


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    with os.fdopen(pipe.read_end, "rb") as reader:
        reading = threading.Thread(target=reader.read)
        reading.start()
        pipe.writer.close()
        assert pipe.writer.drain(time.monotonic() + 100)
        pipe.file.close()
        reading.join()


def test_all_arrives_in_order(pipe: Pipe) -> None:
    read = threading.Thread(target=lambda: received.append(pipe.read_until(b"last\n")))
    received: list[bytes] = []
    read.start()
    expected = ""
    for number in range(500):
        text = f"{number} é \N{SNOWMAN} \udcff\n"
        expected += f"{number} é \N{SNOWMAN} \\udcff\n"
        pipe.stream.write(text)
        while not pipe.stream.idle:
            time.sleep(0)
    pipe.stream.write("la")
    pipe.stream.write("st\n")
    read.join()
    assert received[0].decode() == expected + "last\n"


def test_what_is_not_flushed_waits_for_its_line_end(pipe: Pipe) -> None:
    pipe.stream.write("half")
    assert pipe.stream.idle
    pipe.stream.flush()
    assert pipe.read_until(b"half") == b"half"


def test_unread_output_is_left_out_and_counted(pipe: Pipe) -> None:
    count = pipe.fill()
    for _ in range(10_000):
        pipe.stream.write("left out\n")
    assert pipe.writer._queued <= MAX_QUEUED + 2000
    note = left_out_line(10_000).encode()
    text = pipe.read_until(note)  # although nothing more is written
    assert text.count(b"\n") == count + 1
    assert b"left out\n" not in text
    pipe.stream.write("again\n")
    assert pipe.read_until(b"again\n") == b"again\n"


def test_the_note_stands_where_lines_are_missing(pipe: Pipe) -> None:
    count = pipe.fill()
    pipe.stream.write("left out\n")
    text = b""
    while pipe.stream.full:
        text += os.read(pipe.read_end, SMALL_PIPE)
    assert pipe.writer._queued, "the queue is not empty yet"
    pipe.stream.write("next\n")
    text += pipe.read_until(b"next\n")
    lines = text.decode().splitlines(keepends=True)
    assert lines[count:] == [left_out_line(1), "next\n"]


def test_the_last_lines_are_not_left_out(pipe: Pipe) -> None:
    pipe.fill()
    pipe.stream.write("left out\n")
    pipe.writer.bounded = False
    pipe.stream.write("failed\n")
    assert pipe.read_until(b"failed\n").decode().endswith(left_out_line(1) + "failed\n")


def test_waiting_for_the_reader_is_bounded(pipe: Pipe) -> None:
    pipe.fill()
    assert not pipe.writer.drain(time.monotonic() + 0.01)
    pipe.stream.write("left out\n")
    pipe.read_until(left_out_line(1).encode())
    assert pipe.writer.drain(time.monotonic() + 100)


@pytest.mark.parametrize("early", [True, False], ids=["waiting", "later"])
def test_a_reader_that_leaves(early: bool) -> None:
    pipe = Pipe()
    failed: list[OSError] = []
    if early:
        pipe.stream.on_failure(failed.append)
    os.close(pipe.read_end)
    pipe.stream.write("lost\n")
    assert pipe.writer.drain(time.monotonic() + 20)
    if not early:
        wait_for(lambda: pipe.writer._error is not None)
        pipe.stream.on_failure(failed.append)
    wait_for(lambda: bool(failed))
    assert [error.errno for error in failed] == [errno.EPIPE]
    for _ in range(10 * MAX_QUEUED // 1000):
        pipe.stream.write("x" * 1000 + "\n")
    assert pipe.stream.idle
    pipe.file.close()


def test_a_file_that_another_program_made_non_blocking(pipe: Pipe) -> None:
    os.set_blocking(pipe.file.fileno(), False)
    text = "".join(f"{number}\n" for number in range(10_000))
    pipe.stream.write(text)
    assert pipe.read_until(b"9999\n").decode() == text


def test_events_that_are_left_out_of_json(pipe: Pipe) -> None:
    events = EventStream()
    events.subscribe(JsonOutput(pipe.stream).show)  # type: ignore[arg-type]
    while not pipe.stream.full:
        events.publish("note", "x" * 1000)
    before = events.last_id
    for _ in range(7):
        events.publish("note", "left out")
    lines = pipe.read_until(b'too slow"}\n').decode().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [*range(1, before + 1), before + 7]
    note = json.loads(lines[-1])
    assert (note["event"], note["count"]) == ("events-dropped", 7)


def test_lines_that_are_left_out_of_a_log(pipe: Pipe) -> None:
    events = EventStream()
    events.subscribe(PlainOutput(pipe.stream).show)  # type: ignore[arg-type]
    while not pipe.stream.full:
        events.publish("note", "x" * 1000, level=Level.INFO)
    events.publish("note", "left out")
    assert pipe.read_until(b"not read\n").decode().endswith(left_out_line(1))


@pytest.mark.parametrize("same", [True, False])
def test_both_streams_in_one_file_keep_their_order(tmp_path: Path, same: bool) -> None:
    code = (
        "import sys; from farplug.cli import writer\n"
        "writer.install(); writer.install()\n"
        "for n in range(300): print(n, file=(sys.stdout, sys.stderr)[n % 2])\n"
        "writer.finish(); print('end')\n"
    )
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        subprocess.run([sys.executable, "-c", code], stdout=out, stderr=out if same else err, check=True)
    lines = (tmp_path / "out").read_text().split()
    assert lines == [str(n) for n in range(0, 300, 1 if same else 2)] + ["end"]
    assert len((tmp_path / "err").read_text().split()) == (0 if same else 150)


def test_streams_without_a_file_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    writer.install()
    assert sys.stdout is before
    writer.finish()
    assert not writer._writers


# Sessions -------------------------------------------------------------------------------------------------------------


class BusyGuest(FakeGuest):
    """A guest that sets the configuration again and again, and counts the answers.

    Args:
        leaves: close the connection after the last answer.
    """

    def __init__(self, *, leaves: bool = False) -> None:
        super().__init__(lambda: None)
        self.answers = 0
        self._leaves = leaves
        self.enough = threading.Event()

    def _answer(self, packet: packets.Packet) -> None:
        if isinstance(packet, packets.ConfigurationStatus):
            assert packet.status is Status.SUCCESS
            self.answers += 1
            if self.answers == 500:
                self.enough.set()
                if self._leaves:
                    raise OSError
            else:
                self._connection.send(packets.SetConfiguration(id=self.answers, configuration=1))
        else:
            super()._answer(packet)


HELP = b"help\n" * 300
"""Commands whose output does not fit into a pipe (64 KiB), and fits into the queue."""


@contextmanager
def busy_session(image: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], BusyGuest]]:
    """A session that a guest floods, and whose output has filled the pipes, which are not read."""
    guest = BusyGuest()
    with in_thread(guest.listening) as target:
        process = starter.Popen(
            [*COMMAND, target, "--usb-disk", str(image), "--commands", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )
        try:
            assert process.stdin is not None
            process.stdin.write(HELP)
            process.stdin.flush()
            assert guest.enough.wait(100), f"{guest.answers} answers"
            yield process, guest
        finally:
            process.kill()
            process.communicate()


def full(stream: IO[bytes] | None) -> bool:
    """Return whether a pipe of 16 pages that the test does not read has data in most of them."""
    assert stream is not None
    held = bytearray(4)
    fcntl.ioctl(stream.fileno(), termios.FIONREAD, held)
    return int.from_bytes(held, sys.byteorder) > 32 << 10


@pytest.mark.parametrize(
    ("options", "number"),
    [
        (("--json",), signal.SIGTERM),
        (("--json",), signal.SIGINT),
        (("--json",), signal.SIGHUP),
        ((), signal.SIGINT),
        (("--debug",), signal.SIGHUP),
        (("--debug", "--json"), signal.SIGTERM),
    ],
    ids=str,
)
def test_a_session_whose_output_is_not_read(image: Path, options: tuple[str, ...], number: signal.Signals) -> None:
    with busy_session(image, *options) as (process, guest):
        wait_for(lambda: full(process.stderr if "--debug" in options else process.stdout))
        process.send_signal(number)
        assert process.wait(100) == 0
        assert any(isinstance(packet, packets.DeviceDisconnect) for packet in guest.seen), "the device was detached"


def test_commands_are_carried_out_without_a_reader(image: Path) -> None:
    with busy_session(image, "--json") as (process, _):
        assert process.stdin is not None
        process.stdin.write(b"help\n" * 5000 + b"quit\n")
        process.stdin.flush()
        assert process.wait(60) == 0


def test_a_second_interrupt_leaves_at_once_without_a_reader(image: Path) -> None:
    with busy_session(image, "--json") as (process, guest):
        wait_for(lambda: full(process.stdout))
        guest.receive = lambda data: []  # type: ignore[method-assign]  # it does not let go of its device
        process.send_signal(signal.SIGINT)
        # Its first effect cannot be seen: the pipe is full. So the second one may end the wait for the readers.
        deadline = time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.returncode == 130


@pytest.mark.parametrize("reads", [True, False])
def test_the_reason_of_the_end_comes_last(image: Path, reads: bool) -> None:
    """The guest goes away while the output is not read; the exit code is right, and a late reader gets all."""
    guest = BusyGuest(leaves=True)
    with in_thread(guest.listening) as target:
        process = starter.Popen(
            [*COMMAND, target, "--usb-disk", str(image), "--json", "--commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(HELP)
        process.stdin.flush()
        assert guest.enough.wait(100)
        wait_for(lambda: full(process.stdout))
    if reads:
        out, err = process.communicate(timeout=60)
        lines = [json.loads(line) for line in out.splitlines()]
        assert (lines[-1]["event"], lines[-1]["exit_code"]) == ("failed", 9)
        assert [line["id"] for line in lines[:-1]] == list(range(1, len(lines)))
        assert err.startswith(b"farplug: ")
    else:
        process.wait(60)
        process.communicate()
    assert process.returncode == 9


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_that_is_stopped(image: Path, term: str) -> None:
    """Ctrl-S, or a terminal that shows nothing more: the session goes on, and ends at a signal."""
    guest = BusyGuest()
    with in_thread(guest.listening) as target:
        pid, terminal = pty.fork()
        if pid == 0:
            environment = {**os.environ, "TERM": term, "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
            os.execve(sys.executable, [*COMMAND, target, "--usb-disk", str(image)], environment)
        try:
            shown = b""
            while b"attached as" not in shown:
                shown += os.read(terminal, 4096)
            os.write(terminal, b"\x13")
            assert guest.enough.wait(100)
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda: any(isinstance(packet, packets.DeviceDisconnect) for packet in guest.seen), 60)
            _, status = os.waitpid(pid, 0)
        finally:
            os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
