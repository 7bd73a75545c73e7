"""``--capture`` on the command line: files, pipes, standard output, kills, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests import starter
from tests.capture import blocks, wireshark
from tests.cli.support import Cli, FakeGuest, blank, in_thread, wait_for
from tests.transport.fake_spice import FakeSpice, running

from farplug.capture.dissector import FILE_NAME

FARPLUG = (sys.executable, "-c", "from farplug.cli.script import main; main()")
WARNING = "it will hold everything that the VM reads from and writes to the devices, keys and PINs too"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return blank(tmp_path / "a.raw")


def test_a_capture_and_the_warning(cli: Cli, tmp_path: Path, image: Path) -> None:
    path = tmp_path / "trace.pcapng"
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-disk", image, "--capture", path)
    assert result.code == 0
    assert f"farplug: warning: capturing to {path}: {WARNING}" in result.err
    assert WARNING not in result.out
    assert f"the capture to {path} has ended" in result.out
    assert wireshark.count(path, "usb.setup.bRequest == 9") == 1
    assert wireshark.count(path, "usbredir.type == 6") == 1


def test_events(cli: Cli, tmp_path: Path, image: Path) -> None:
    path = tmp_path / "trace.pcapng"
    with in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-disk", image, "--capture", path, "--capture-bytes", 31, "--json")
    events = {event["event"]: event for event in map(json.loads, result.out.splitlines())}
    started, ended = events["capture-started"], events["capture-ended"]
    assert (started["path"], started["bytes"]) == (str(path), 31)
    assert (ended["path"], ended["dropped"], ended["cut"], ended["error"]) == (str(path), 0, 0, None)
    assert [block.options[2] for block in blocks.read(path) if block.kind == blocks.INTERFACE] == [b"usb"]


def test_a_second_capture_to_the_same_file_replaces_the_first(cli: Cli, tmp_path: Path, image: Path) -> None:
    path = tmp_path / "trace.pcapng"
    sizes = []
    for _ in range(2):
        with in_thread(FakeGuest().listening) as target:
            assert cli("connect", target, "--usb-disk", image, "--capture", path).code == 0
        sizes.append(wireshark.count(path, "usb.setup.bRequest == 9"))
    assert sizes == [1, 1]


def test_files_that_are_not_captures(cli: Cli, tmp_path: Path, image: Path) -> None:
    diary = tmp_path / "diary.txt"
    diary.write_text("Dear diary")
    for path, text in (
        (diary, "exists, and is not a capture in the format pcapng"),
        (tmp_path, "is a folder"),
        (image, "is not a capture"),
        (tmp_path / "none" / "a", "cannot be written: no such file"),
    ):
        before = image.read_bytes()
        result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image, "--capture", path)
        assert result.code == 2
        assert text in result.err
        assert "\n  name a" in result.err
        assert image.read_bytes() == before
    assert diary.read_text() == "Dear diary"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--capture-bytes", "64"], "--capture-bytes has no effect without --capture"),
        (["--capture", "x", "--capture-bytes", "-1"], "--capture-bytes"),
        (["--capture", "x", "--capture-bytes", "all"], "--capture-bytes"),
    ],
)
def test_options_that_are_not_valid(cli: Cli, image: Path, options: list[str], text: str) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", "--usb-disk", image, *options)
    assert result.code == 2
    assert text in result.err


def test_the_dissector_is_installed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = cli("capture", "--install-dissector")
    path = tmp_path / ".local/lib/wireshark/plugins" / FILE_NAME
    assert (result.code, result.out.splitlines()[0]) == (0, str(path))
    assert path.exists()
    path.write_text("-- mine")
    result = cli("capture", "--install-dissector")
    assert result.code == 11
    assert path.read_text() == "-- mine"
    result = cli("capture")
    assert result.code == 2
    assert "--capture FILE" in result.err


def test_commands_begin_and_end_a_capture(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "a trace.pcapng"
    configured = threading.Event()
    with in_thread(FakeGuest(configured.set).listening) as target:
        farplug = starter.Popen(
            [*FARPLUG, "connect", target, "--usb-disk", str(image), "--commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert farplug.stdin is not None
        assert farplug.stdout is not None
        assert configured.wait(100)
        farplug.stdin.write(f"capture '{path}'\ncapture other\nstop-capture\nstop-capture\nquit\n")
        farplug.stdin.close()
        output = farplug.stdout.read()
        farplug.stdout.close()
        assert farplug.wait(100) == 0, output
    assert "a trace.pcapng runs already" in output
    assert "no capture runs" in output
    assert WARNING in output
    assert not (tmp_path / "other").exists()
    assert wireshark.count(path, 'usb.setup.bRequest == 9 && frame.comment contains "before the capture began"') == 1
    assert wireshark.count(path, "usb.idProduct == 0x0104")


def test_standard_output_holds_the_capture_and_nothing_else(image: Path) -> None:
    configured = threading.Event()
    with in_thread(FakeGuest(configured.set).listening) as target:
        farplug = starter.Popen(
            [*FARPLUG, "connect", target, "--usb-disk", str(image), "--capture", "-"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert configured.wait(100)
        farplug.send_signal(signal.SIGINT)
        out, err = farplug.communicate(timeout=100)
        assert farplug.returncode == 0, err
    kinds = [block.kind for block in blocks.parse(out)]
    assert kinds[:3] == [blocks.SECTION, blocks.INTERFACE, blocks.INTERFACE]
    assert blocks.PACKET in kinds
    assert b"attached" in err, "what farplug otherwise prints on standard output"


def test_wireshark_reads_a_live_pipe(tmp_path: Path, image: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    tshark = subprocess.Popen(
        [
            wireshark.program("tshark"),
            "-l",
            "-n",
            "-i",
            str(pipe),
            "-Y",
            "usb",
            "-T",
            "fields",
            "-e",
            "usb.setup.bRequest",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=wireshark.ENVIRONMENT | {"HOME": str(tmp_path)},
    )
    assert tshark.stdout is not None
    try:
        with in_thread(FakeGuest(lambda: None).listening) as target:
            farplug = starter.Popen(
                [*FARPLUG, "connect", target, "--usb-disk", str(image), "--capture", str(pipe)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            try:
                assert tshark.stdout.readline() == b"9\n", "SET_CONFIGURATION, while the session goes on"
                assert farplug.poll() is None
                farplug.send_signal(signal.SIGINT)
                _, err = farplug.communicate(timeout=100)
                assert farplug.returncode == 0, err
            finally:
                farplug.kill()
                farplug.wait()
        assert tshark.wait(100) == 0
    finally:
        tshark.kill()
        tshark.communicate()


def test_a_reader_that_leaves_does_not_end_the_session(tmp_path: Path, image: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    configured = threading.Event()
    fake = FakeGuest(configured.set)
    with in_thread(fake.listening) as target:
        farplug = starter.Popen(
            [*FARPLUG, "connect", target, "--usb-disk", str(image), "--capture", str(pipe), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        reader = os.open(pipe, os.O_RDONLY)
        assert configured.wait(100)
        os.close(reader)
        farplug.send_signal(signal.SIGINT)  # its events have no reader any more
        out, _ = farplug.communicate(timeout=100)
        assert farplug.returncode == 0
    ended = [event for event in map(json.loads, out.splitlines()) if event["event"] == "capture-ended"]
    assert [event["error"]["message"] for event in ended] == [f"the reader of {pipe} has left"]


def test_a_killed_farplug_leaves_a_capture_that_can_be_read(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "trace.pcapng"
    configured = threading.Event()
    fake = FakeSpice(password="only Alice knows it")
    fake.usbredir = FakeGuest(configured.set).behave
    with in_thread(lambda: running(fake)) as port:
        farplug = starter.Popen(
            [*FARPLUG, "connect", f"spice://127.0.0.1:{port}", "--usb-disk", str(image), "--capture", str(path)],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"FARPLUG_PASSWORD": "only Alice knows it"},
        )
        assert configured.wait(100)
        wait_for(lambda: b"CONFIGURED" in path.read_bytes() or b"configured" in path.read_bytes())
        farplug.kill()
        farplug.wait(100)
    assert wireshark.count(path, "usbredir.type == 8", incomplete=True) == 1
    assert wireshark.count(path, "usb.setup.bRequest == 9", incomplete=True) == 1
    assert list(blocks.parse(path.read_bytes(), incomplete=True))
    assert b"only Alice knows it" not in path.read_bytes()
