"""``farplug screenshot``, ``type``, ``press`` and ``click``, through a session and alone."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import starter
from tests.app.test_screen import PIXELS, Machine, decode_png, rgb
from tests.cli.sessions import background
from tests.cli.support import Cli, in_thread

from farplug.app.commands import TypeText
from farplug.cli import screen_verbs
from farplug.control.names import folder

pytestmark = pytest.mark.usefixtures("quick_start")


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
        result = cli("type", "aB")
        assert (result.code, "through SPICE, which confirms nothing" in result.err) == (12, True)
        for arguments in (
            ("type", "c", "--via", "spice"),
            ("press", "ctrl+alt+Delete"),
            ("click", 5, 6, "--button", "right"),
        ):
            result = cli(*arguments)
            assert (result.code, result.out, result.err) == (0, "", "")
        assert keys(machine) == ["1e9e", "2a30b0aa", "2eae", "1d38e053e0d3b89d"]
        while machine.inputs.received[-1][0] != 114:  # the server receives it in its own time
            time.sleep(0.01)
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
    assert cli("type", "a", target, "--via", "spice").code == 0
    assert keys(machine) == ["1e9e"]


def test_text_from_standard_input(cli: Cli, machine: Machine, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 251 + "\n"))
    assert cli("type", "-", target, "--via", "spice").code == 0
    assert keys(machine) == ["2dad"] * 251 + ["1c9c"]


def test_what_is_hidden(cli: Cli, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[bool] = []

    def carry_out(session: object, settings: object, steps: list[TypeText]) -> None:
        hidden.extend(step.hidden for step in steps)

    monkeypatch.setattr(screen_verbs, "carry_out", carry_out)
    (tmp_path / "text").write_text("z", "utf-8")
    for arguments in (("-",), ("--secret-file", tmp_path / "text"), ("a",), ("--file", tmp_path / "text")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
        assert cli("type", *arguments, target).code == 0
    assert hidden == [True, True, False, False]
    monkeypatch.setattr(sys, "stdin", io.StringIO("xß"))
    result = cli("type", "-", target)
    assert (result.code, "ß" in result.err, "character 2 of the secret" in result.err) == (2, False, True)


def test_a_target_in_place_of_a_session(
    cli: Cli, machine: Machine, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("screenshot", tmp_path / "out.png", "-s", target).code == 0
    monkeypatch.setenv("FARPLUG_SESSION", target)
    assert cli("press", "a", "--via", "spice").code == 0
    assert cli("click", "1", "1", target, "--via", "spice").code != 2, "the argument comes before the environment"
    assert keys(machine) == ["1e9e"]


def test_arguments_in_another_order(cli: Cli, target: str) -> None:
    for command, order in (("screenshot", "FILE"), ("type", "TEXT"), ("press", "KEYS")):
        result = cli(command, target, "secret")
        assert (result.code, result.out) == (2, "")
        assert result.err == f"farplug: TARGET is the last argument\n  write it as: farplug {command} {order} TARGET\n"
    assert "'vm' is not a valid target" in cli("press", "a", "vm").err


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (("press", "a"), "name it with an option: -s web1"),
        *(
            (one, "use a command for sessions, such as: farplug attach -s web1 or farplug status -s web1")
            for one in (("connect",), ("doctor",))
        ),
    ],
    ids=str,
)
def test_a_session_in_place_of_a_target(cli: Cli, command: tuple[str, ...], remedy: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        folder(create=True)
        path = folder() / "web1.sock"
        listener.bind(str(path))
        try:
            result = cli(*command, "web1")
        finally:
            path.unlink()
    assert (result.code, result.out) == (2, "")
    assert result.err == f"farplug: web1 is a running session, not a TARGET\n  {remedy}\n"


@pytest.mark.parametrize("command", [("status",), ("stop",), ("detach", "all"), ("insert", "x.iso"), ("capture", "x")])
@pytest.mark.parametrize("where", ["vm.vv", "spice://vmhost:5900?password=secret", "unix:/run/vm.sock"])
def test_other_commands_take_no_target_in_place_of_a_session(cli: Cli, command: tuple[str, ...], where: str) -> None:
    result = cli(*command, "-s", where)
    assert result.code == 2
    assert "takes no target in its place" in result.err
    assert "farplug connect TARGET --detach" in result.err
    assert "secret" not in result.err


def test_texts_from_files(cli: Cli, machine: Machine, target: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("z\r\n", "utf-8-sig")  # as editors on Windows write it
    (tmp_path / "secret").write_text("y\n", "utf-8-sig")
    (tmp_path / "ducky").write_text("STRING a\nDELAY 1\nCTRL-ALT DELETE\n", "utf-8-sig")
    assert cli("type", target, "--layout", "de", "--file", tmp_path / "text", "--via", "spice").code == 0
    assert cli("type", "--secret-file", tmp_path / "secret", "--layout", "de", target, "--via", "spice").code == 0
    assert cli("type", target, "--ducky", tmp_path / "ducky", "--via", "spice").code == 0
    assert keys(machine) == ["1595", "1c9c", "2cac", "1e9e", "1d38e053e0d3b89d"]
    (tmp_path / "secret").write_text("xß", "utf-8")
    result = cli("type", "--secret-file", tmp_path / "secret", target)
    assert (result.code, "ß" in result.err, "character 2 of the secret" in result.err) == (2, False, True)
    (tmp_path / "text").write_bytes(b"\xff")
    result = cli("type", "--file", tmp_path / "text", target)
    assert (result.code, "is not text in UTF-8" in result.err) == (2, True)
    (tmp_path / "text").write_bytes(b"x" * (10 << 20))
    result = cli("type", "--file", tmp_path / "text", target)
    assert (result.code, "has more than 1048576 characters" in result.err) == (2, True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_signals_do_not_interrupt_the_link_of_a_display(machine: Machine, target: str, tmp_path: Path) -> None:
    machine.screen.go.clear()
    command = [*starter.COMMAND, "screenshot", "out.png", target]
    with starter.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
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
        (("type", "ß"), 2, "keyboard layout us has no key for 'ß'"),
        (("type", "a\nb\x07"), 2, "no key for '\\x07' (U+0007, line 2, character 2)"),
        (("type", "a", "--layout", "klingon"), 2, "'klingon' is not a keyboard layout"),
        (("type",), 2, "nothing to type"),
        (("type", "--file", "/nowhere"), 2, "/nowhere cannot be read: no such file or directory"),
        (("type", "--file", "x", "--ducky", "y"), 2, "exclude each other"),
        (("type", "a", "vm.vv", "--file", "x"), 2, "exclude each other"),
        (("press", "a", "--via", "pigeon"), 2, "'pigeon' is not one of"),
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
    result = cli("press", "a", "unix:/nowhere", "--via", "spice")
    assert (result.code, "note:" in result.err) == (4, False)
    assert "SPICE" in result.err
    result = cli("press", "a", "unix:/nowhere")
    assert (result.code, "cannot connect to /nowhere" in result.err) == (4, True)
