from __future__ import annotations

import os
import pty
import sys
import threading
from pathlib import Path

import pytest
from tests.cli.support import Cli, FakeGuest, in_thread
from tests.transport.fake_spice import FakeSpice, running


def test_the_password_is_asked_for_on_a_terminal(cli: Cli, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = ["wrong", "sesame"]

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return answers.pop(0)

    monkeypatch.setattr("farplug.cli.options.has_terminal", lambda: True)
    monkeypatch.setattr("farplug.cli.session.has_terminal", lambda: True)
    monkeypatch.setattr("getpass.getpass", ask)
    fake = FakeSpice(password="sesame", usbredir=FakeGuest().behave, vmc_caps=0)
    with in_thread(lambda: running(fake)) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image)
        assert result.code == 0
        assert asked == ["SPICE password: "] * 2
        assert result.err.count("the VM requires a password, and none was given") == 1
        assert result.err.count("the password is wrong") == 1
        answers[:] = ["a", "b", "c", "d"]
        assert cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image).code == 6
        assert answers == ["d"]
        answers[:] = ["sesame"]
        assert cli("connect", f"spice://127.0.0.1:{port}", "--usb-disk", image, "--ask-password").code == 0


def test_a_ticket_of_a_vv_file_is_not_asked_for(
    cli: Cli, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farplug.cli.session.has_terminal", lambda: True)
    vv = tmp_path / "vm.vv"
    with in_thread(lambda: running(FakeSpice(password="sesame"))) as port:
        vv.write_text(f"[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport={port}\npassword=old\n")
        result = cli("connect", vv, "--usb-disk", image)
    assert result.code == 6
    assert "get a new one (a new .vv file)" in result.err


@pytest.mark.parametrize(("typed", "code"), [(b"secret\n", 4), (b"\x04", 2)])
def test_typing_shows_nothing(typed: bytes, code: int, image: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-c",
                "from farplug.cli.main import main; main()",
                *("connect", "spice://127.0.0.1:1", "--ask-password", "--usb-disk", str(image)),
            ],
        )
    watchdog = threading.Timer(30, os.kill, [pid, 9])
    watchdog.start()
    shown = b""
    try:
        while True:
            shown += os.read(terminal, 4096)
            if shown.endswith(b"SPICE password: "):
                os.write(terminal, typed)
    except OSError:  # it ended
        pass
    finally:
        watchdog.cancel()
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert b"secret" not in shown
