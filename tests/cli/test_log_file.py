"""The log of a session in the background, and the datagrams for systemd."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest

from farplug.cli import log_file
from farplug.cli.log_file import LogFile, log_path
from farplug.cli.notify import VARIABLE, notify
from farplug.errors import Reason, SetupError


def test_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for state, folder in (("", ".local/state"), ("relative", ".local/state"), (str(tmp_path / "s"), "s")):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert log_path("web1") == tmp_path / folder / "farplug/web1.log"


def test_what_is_written_before_the_file_is_opened_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "HELD", 9)
    log = LogFile()
    with pytest.raises(io.UnsupportedOperation):
        log.fileno()
    log.write("dropped\n")
    log.write("é\ud800\n")
    path = tmp_path / "new/folder/a.log"
    log.open(path)
    log.write("after\n")
    assert path.read_text() == "é\\ud800\nafter\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_it_is_bounded_and_other_descriptors_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "LIMIT", 100)
    path, before = tmp_path / "a.log", tmp_path / "a.log.1"
    path.write_text("of an earlier session\n")
    log = LogFile()
    log.open(path)
    other = os.open(os.devnull, os.O_WRONLY)
    log.take_over(other)
    number = log.fileno()
    for count in range(40):
        log.write(f"line {count}\n")
        os.write(other, b"from C\n")
    assert log.fileno() == number
    assert path.stat().st_size <= 107
    assert before.stat().st_size <= 107
    lines = (before.read_text() + path.read_text()).splitlines()
    assert lines[-2:] == ["line 39", "from C"]
    assert lines == [text for count in range(40) for text in (f"line {count}", "from C")][-len(lines) :]
    os.close(other)


def test_a_line_longer_than_the_limit_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "LIMIT", 10)
    log = LogFile()
    log.open(tmp_path / "a.log")
    log.write("x" * 50)
    assert (tmp_path / "a.log").read_text() == "x" * 50
    assert not (tmp_path / "a.log.1").exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_cannot_be_written(tmp_path: Path, link: bool) -> None:
    if link:
        (tmp_path / "elsewhere").touch()
        (tmp_path / "a.log").symlink_to(tmp_path / "elsewhere")
        path = tmp_path / "a.log"
    else:
        (tmp_path / "file").touch()
        path = tmp_path / "file/a.log"
    with pytest.raises(SetupError, match="cannot be written") as caught:
        LogFile().open(path)
    assert caught.value.reason in (Reason.NOT_FOUND, Reason.EXISTS)
    assert not link or (tmp_path / "elsewhere").read_bytes() == b""


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_gets_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = f"farplug-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{path}" if abstract else path)
        monkeypatch.setenv(VARIABLE, f"@{path}" if abstract else path)
        notify(READY="1", STATUS="VM\nX=1")
        assert receiver.recv(1000) == "READY=1\nSTATUS=VM\N{REPLACEMENT CHARACTER}X=1".encode()


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "/" + "x" * 300, "@" + "x" * 300])
def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(VARIABLE, address)
    notify(READY="1")
