"""``farplug connect --detach``: until the session is ready, and the process after that."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.cli.sessions import Session, background, fake_vm, is_running, nothing, vm
from tests.cli.support import Cli, FakeGuest, blank, in_thread, wait_for
from tests.transport.fake_spice import running

from farplug.cli import notify

COMMAND = (sys.executable, "-c", "from farplug.cli.main import main; main()", "connect")


def test_standard_streams_are_closed_when_the_session_is_ready(image: Path, cli: Cli) -> None:
    with vm() as target:
        result = subprocess.run(
            [*COMMAND, target, "--detach", "--usb-disk", image], capture_output=True, text=True, input="", timeout=60
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "testvm\n", "")
        session = Session(cli, "testvm")
        status = session.status
        assert session.devices == {"disk.raw": "in use"}
        process = Path("/proc", str(status["pid"]))
        assert [os.readlink(process / "fd" / number) for number in "012"] == [os.devnull, status["log"], status["log"]]
        assert os.getsid(status["pid"]) == status["pid"]
        assert os.readlink(process / "cwd") == os.getcwd()
        assert "configured by the guest" in session.log
        os.kill(status["pid"], signal.SIGHUP)
        assert session.status["state"] == "connected"
        assert cli("stop").code == 0


def test_with_closed_standard_streams(cli: Cli, image: Path) -> None:
    """No image gets the descriptor of a standard stream."""
    with vm() as target:
        command = shlex.join([*COMMAND, target, "--detach", "--name", "closed", "--usb-disk", str(image)])
        assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], timeout=60).returncode == 0
        session = Session(cli, "closed")
        status = session.status
        links = [os.readlink(f"/proc/{status['pid']}/fd/{number}") for number in "012"]
        assert links == [os.devnull, status["log"], status["log"]]
        assert cli("stop").code == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--usb-disk", "/no/such.raw"), 3, "/no/such.raw cannot be opened: no such file"),
        ((), 4, "cannot connect to 127.0.0.1:1"),
        (("--host-subject", "CN=x"), 2, "the target has no TLS port"),
    ],
)
def test_it_fails_as_in_the_foreground(cli: Cli, options: tuple[str, ...], code: int, said: str) -> None:
    target = "spice://127.0.0.1:1"
    result = cli("connect", target, "--detach", "--json", "--name", "web1", *options)
    foreground = cli("connect", target, "--json", "--name", "web1", *options)
    assert (result.code, foreground.code) == (code, code)
    assert said in result.err
    assert result.err == foreground.err
    failed, as_in_foreground = (json.loads(one.out.splitlines()[-1]) for one in (result, foreground))
    assert {**failed, "time": 0} == {**as_in_foreground, "time": 0}
    assert cli("ls").out == "no session is running\n"


def test_a_device_that_the_vm_refuses_ends_the_start_as_in_the_foreground(cli: Cli, image: Path) -> None:
    with vm(make=lambda: FakeGuest(nothing, rejects=True)) as target:
        result = cli("connect", target, "--detach", "--usb-disk", image, "--usb-speed", "high")
    assert (result.code, result.out) == (8, "")
    assert "the guest refused" in result.err


def test_a_vm_that_does_not_answer_is_not_waited_for(cli: Cli, image: Path) -> None:
    with vm(make=lambda: FakeGuest(silent=True)) as target, background(cli, target, "--usb-disk", image) as session:
        assert session.devices == {"disk.raw": "waiting"}


def test_commands_on_standard_input_contradict_it(cli: Cli) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", "--detach", "--commands")
    assert (result.code, "--detach and --commands contradict each other" in result.err) == (2, True)


def test_the_log_has_json_if_asked_for(cli: Cli, image: Path) -> None:
    with vm() as target, background(cli, target, "--usb-disk", image, name="logged") as session:
        wait_for(lambda: '"configured"' in session.log)
        names = [json.loads(line)["event"] for line in session.log.splitlines()]
    assert names[:2] == ["guest", "stage"]


def test_why_it_ended_later_is_in_the_log(cli: Cli) -> None:
    with in_thread(lambda: running(fake_vm())) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--detach", "--name", "later", "--no-reconnect")
        assert (result.code, result.err) == (0, "")
        session = Session(cli, "later")
        pid = session.status["pid"]
    wait_for(lambda: not is_running(pid))
    assert "\nfarplug: " in session.log


def test_stop_while_the_vm_is_lost(cli: Cli, image: Path) -> None:
    with in_thread(lambda: running(fake_vm())) as port:
        result = cli("connect", f"spice://127.0.0.1:{port}", "--detach", "--name", "lost", "--usb-disk", image)
        assert (result.code, result.err) == (0, "")
        session = Session(cli, "lost")
    wait_for(lambda: session.status["state"] == "reconnecting")
    status = session.status
    assert [device["state"] for device in status["devices"]] == ["lost"]
    assert status["attempt"]["number"] >= 1
    assert "reconnecting" in cli("ls").out
    assert "disk.raw" in cli("status").out
    assert cli("stop").code == 0
    wait_for(lambda: not is_running(status["pid"]))


def test_a_target_command(cli: Cli, tmp_path: Path) -> None:
    with in_thread(lambda: running(fake_vm(password="once"))) as port:
        vv = tmp_path / "vm.vv"
        vv.write_text(f"[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport={port}\npassword=once\n")
        command = ("connect", "--target-command", f"cat {vv}", "--detach")
        assert cli(*command).out == "testvm\n"
        arguments = Path("/proc", str(Session(cli, "testvm").status["pid"]), "cmdline").read_text()
        assert str(vv) not in arguments
        assert cli("stop").code == 0
    vv.unlink()
    result = cli(*command)
    assert (result.code, "No such file" in result.err) == (4, True)


def test_a_log_that_cannot_be_written(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with vm() as target:
        result = cli("connect", target, "--detach", "--name", "web1")
    assert result.code == 11
    assert f"{tmp_path}/file/farplug/web1.log cannot be written" in result.err
    assert cli("ls").out == "no session is running\n"


def test_the_password_is_asked_for_on_the_terminal(cli: Cli) -> None:
    """The process in the background has none: the command asks for it."""
    with in_thread(lambda: running(fake_vm(password="sesame"))) as port:
        pid, terminal = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [*COMMAND, f"spice://127.0.0.1:{port}", "--detach", "--name", "secret"])
        shown = b""
        answers = [b"wrong\n", b"sesame\n"]
        try:
            while True:
                shown += os.read(terminal, 4096)
                if shown.count(b"SPICE password: ") == 3 - len(answers) and answers:
                    os.write(terminal, answers.pop(0))
        except OSError:  # it ended
            pass
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
        text = shown.decode()
        assert os.waitstatus_to_exitcode(status) == 0, text
        assert text.endswith("secret\r\n")
        assert "sesame" not in text
        session = Session(cli, "secret")
        arguments = Path("/proc", str(session.status["pid"]), "cmdline").read_text()
        assert "sesame" not in arguments + session.log
        assert cli("stop").code == 0


def test_without_a_terminal_the_password_is_an_error(cli: Cli) -> None:
    with in_thread(lambda: running(fake_vm(password="sesame"))) as port:
        target = f"spice://127.0.0.1:{port}"
        assert cli("connect", target, "--detach").code == 6
        result = cli("connect", f"spice://:sesame@127.0.0.1:{port}", "--detach")
        assert (result.code, result.out) == (0, "testvm\n")
        status = Session(cli, "testvm").status
        assert status["target"] == target
        assert "sesame" not in Path("/proc", str(status["pid"]), "cmdline").read_text()
        assert cli("stop").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_ends_before_the_session_is_ready(cli: Cli, number: signal.Signals) -> None:
    """Ctrl-C, kill: no session stays behind."""
    asked = threading.Event()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"spice://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen([*COMMAND, target, "--detach", "--name", "early"], stderr=subprocess.PIPE, text=True)
        with process:
            peer, _ = silent.accept()  # the session is being connected
            with peer:
                process.send_signal(number)
                assert process.stderr is not None
                error = process.stderr.read()
                while peer.recv(4096):
                    pass  # until the session has ended
    asked.set()
    assert process.returncode == (130 if number is signal.SIGINT else -number)
    assert error == ("farplug: interrupted\n" if number is signal.SIGINT else "")
    wait_for(lambda: json.loads(cli("ls", "--json").out) == [])


def test_systemd(tmp_path: Path, image: Path) -> None:
    """A service of ``Type=notify`` sends one datagram when it is ready, its status, and one when it ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, vm() as target:
        receiver.bind(str(tmp_path / "n"))
        receiver.settimeout(100)
        environment = {**os.environ, notify.VARIABLE: str(tmp_path / "n")}
        with subprocess.Popen(
            [*COMMAND, target, "--name", "unit", "--usb-disk", image], env=environment, stdout=subprocess.DEVNULL
        ) as process:
            received = []
            while "READY=1" not in received or "STATUS=plugged in: disk.raw" not in received:
                received.append(receiver.recv(1000).decode())
            process.terminate()
            while "STOPPING=1" not in received:
                received.append(receiver.recv(1000).decode())
        assert process.returncode == 0
    assert received.count("READY=1") == 1
    assert received[0].startswith("STATUS=")


def test_in_the_background_systemd_gets_nothing(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process of a service is the command, which ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, vm() as target:
        receiver.bind(str(tmp_path / "n"))
        receiver.setblocking(False)
        monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "n"))
        with background(cli, target), pytest.raises(BlockingIOError):
            receiver.recv(1000)


def test_two_sessions_share_nothing(cli: Cli, tmp_path: Path) -> None:
    image = blank(tmp_path / "a")
    with vm() as target, background(cli, target, "--usb-disk", image), background(cli, target, name="web2") as second:
        result = cli("attach", "-s", "web2", "--usb-disk", image)
        assert (result.code, "in use" in result.err) == (3, True)
        assert second.devices == {}
