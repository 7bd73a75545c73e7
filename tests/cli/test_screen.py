"""``farplug screenshot``, ``type``, ``press`` and ``click``, through a session and alone."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.app.test_screen import PIXELS, Machine, decode_png, rgb
from tests.cli.sessions import background
from tests.cli.support import Cli, in_thread


@pytest.fixture
def machine() -> Machine:
    return Machine(channels=((2, 0), (3, 0), (9, 0)))


@pytest.fixture
def target(machine: Machine) -> Iterator[str]:
    with in_thread(machine.serving) as port:
        yield f"spice://127.0.0.1:{port}"
    assert not machine.screen.broken


def keys(machine: Machine) -> list[str]:
    return [body for kind, body in machine.inputs.received if kind == 104]


def test_through_a_session(cli: Cli, machine: Machine, target: str, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    with background(cli, target):
        result = cli("screenshot", path)
        assert (result.code, result.out, result.err) == (0, f"{path}: 128x64\n", "")
        assert decode_png(path.read_bytes()) == (128, 64, rgb(PIXELS))
        result = cli("screenshot", path, "--json", "-s", "web1")
        assert json.loads(result.out) == {"path": str(path), "width": 128, "height": 64}
        assert len(machine.screen.links) == 1, "the display stays linked for a while"
        for arguments in (("type", "aB"), ("press", "ctrl+alt+Delete"), ("click", 5, 6, "--button", "right")):
            result = cli(*arguments)
            assert (result.code, result.out, result.err) == (0, "", "")
        assert keys(machine) == ["1e9e", "2a30b0aa", "1d38e053e0d3b89d"]
        assert [kind for kind, _ in machine.inputs.received[-3:]] == [112, 113, 114]
        result = cli("press", "nokey")
        assert (result.code, "'nokey' is not a key" in result.err) == (2, True)
        result = cli("screenshot", path, "--display", "4")
        assert (result.code, "no display 4" in result.err) == (4, True)


def test_alone(cli: Cli, machine: Machine, target: str, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    result = cli("screenshot", path, target)
    assert (result.code, result.out) == (0, f"{path}: 128x64\n")
    assert "has ended the session of any other client" in result.err
    assert decode_png(path.read_bytes()) == (128, 64, rgb(PIXELS))
    assert cli("type", "a", target).code == 0
    assert keys(machine) == ["1e9e"]


def test_text_from_standard_input(cli: Cli, machine: Machine, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 101 + "\n"))
    assert cli("type", "-", target).code == 0
    assert keys(machine) == ["2dad"] * 101 + ["1c9c"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_signals_do_not_interrupt_the_link_of_a_display(machine: Machine, target: str, tmp_path: Path) -> None:
    machine.screen.go.clear()
    command = [sys.executable, "-c", "from farplug.cli.main import main; main()", "screenshot", "out.png", target]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        asyncio.run_coroutine_threadsafe(machine.screen.opened.wait(), machine.loop).result(60)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
            time.sleep(0.1)
        assert process.poll() is None
        assert not machine.screen.broken
        machine.loop.call_soon_threadsafe(machine.screen.go.set)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("screenshot", "-"), 2, "standard output"),
        (("screenshot", "a.png", "spice://h:1", "-s", "web1"), 2, "contradict"),
        (("screenshot", "a.png", "--ca-file", "x"), 2, "--ca-file has no effect without TARGET"),
        (("press", "a", "--ask-password"), 2, "--ask-password has no effect"),
        (("type", "ß"), 2, "US keyboard layout has no key for 'ß'"),
        (("screenshot", "a.png"), 2, "no session"),
        (("click", "1"), 2, "Missing argument 'Y'"),
        (("click", "1", "1", "spice://127.0.0.1:1"), 4, "cannot connect"),
    ],
)
def test_refused(cli: Cli, arguments: tuple[str, ...], code: int, text: str, tmp_path: Path) -> None:
    result = cli(*arguments)
    assert text in result.err
    assert result.code == code


def test_a_usbredir_socket_has_no_screen(cli: Cli) -> None:
    result = cli("press", "a", "unix:/nowhere")
    assert (result.code, "note:" in result.err) == (4, False)
    assert "SPICE" in result.err
