"""``farplug touch``, and answers on the terminal of ``farplug connect``."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
import threading
from pathlib import Path

import pytest
from tests.cli.key_guest import KeyGuest
from tests.cli.sessions import background
from tests.cli.support import Cli, in_thread, wait_for
from tests.cli.test_leaving import COMMAND

from farplug.app.commands import Presence, PresenceAnswer
from farplug.app.events import Event, Level
from farplug.cli.commands import parse
from farplug.cli.output import PlainOutput

pytestmark = pytest.mark.usefixtures("quick_start")


def test_touch(cli: Cli, tmp_path: Path) -> None:
    guest = KeyGuest()
    with in_thread(guest.listening) as target, background(cli, target) as session:
        result = cli("touch")
        assert (result.code, result.err) == (
            2,
            "farplug: no security key is plugged in\n  plug one in: --usb-fido FILE\n",
        )
        for number, (options, shown) in enumerate(
            (((), "allowed: select the key\n"), (("--refuse", "fido0"), "refused: select the key\n"))
        ):
            attached = cli("attach", "--usb-fido", tmp_path / "keys.json", "--fido-presence", "ask")
            assert attached.code == 0
            wait_for(lambda: bool(session.status["devices"][0]["questions"]))
            result = cli("status")
            assert "fido0 asks: select the key\n" in result.out
            assert "fido0 (keys.json, presence: ask)" in result.out
            result = cli("touch", *options)
            assert (result.code, result.out, result.err) == (0, shown, "")
            wait_for(lambda: len(guest.replies) == number + 1)  # noqa: B023
            assert session.status["devices"][0]["questions"] == []
            assert cli("detach", "all").code == 0
        assert guest.replies == [0, 0x27]
        assert '"event": "presence-answered"' in session.log
        cli("attach", "--usb-fido", tmp_path / "keys.json", "--fido-presence", "ask")
        wait_for(lambda: bool(session.status["devices"][0]["questions"]))
        assert json.loads(cli("touch", "--json").out)["use"] == "select"
        result = cli("touch")
        assert (result.code, "no program in the VM waits for the security key" in result.err) == (2, True)


def test_where_no_user_types() -> None:
    stream = io.StringIO()
    fields = {"request": 1, "use": "select", "site": "", "user": ""}
    PlainOutput(stream).show(Event(1, 0.0, "presence-asked", "the VM waits", Level.PROGRESS, fields=fields))
    line, hint = stream.getvalue().splitlines()
    assert line.endswith("the VM waits")
    assert hint.endswith("'farplug touch' allows it, 'farplug touch --refuse' refuses it")


def test_presence_without_a_key(cli: Cli) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", "--usb-keyboard", "--fido-presence", "ask")
    assert (result.code, "--fido-presence has no effect without --usb-fido" in result.err) == (2, True)


def test_words() -> None:
    assert parse("touch") == Presence()
    assert parse("touch fido0") == Presence(attachment="fido0")
    assert parse("refuse") == Presence(PresenceAnswer.REFUSE)
    assert parse("refuse fido0") == Presence(PresenceAnswer.REFUSE, "fido0")


@pytest.mark.parametrize(
    ("options", "typed", "hint", "status"),
    [
        ((), b"\nwhat?\nY\n", b"type y and Enter to allow it", 0),
        ((), b"no\n", b"type y and Enter to allow it", 0x27),
        (("--commands",), b"touch\n", b"type touch to allow it", 0),
        (("--commands",), b"refuse fido0\n", b"type touch to allow it", 0x27),
    ],
)
def test_on_the_terminal(tmp_path: Path, options: tuple[str, ...], typed: bytes, hint: bytes, status: int) -> None:
    guest = KeyGuest(lambda: os.kill(pid, signal.SIGINT))
    with in_thread(guest.listening) as target:
        pid, terminal = pty.fork()
        if pid == 0:
            environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
            key = ("--usb-fido", str(tmp_path / "keys.json"), "--fido-presence", "ask")
            os.execve(sys.executable, [*COMMAND, target, *key, *options], environment)
        watchdog = threading.Timer(100, os.kill, [pid, signal.SIGKILL])
        watchdog.start()
        shown = b""
        answered = False
        try:
            while True:
                shown += os.read(terminal, 4096)
                if not answered and hint in shown:
                    answered = True
                    os.write(terminal, typed)
        except OSError:  # it ended
            pass
        watchdog.cancel()
        os.close(terminal)
        _, code = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    assert guest.replies == [status]
    assert b"the VM waits for your answer: select the key (30 s)" in shown
