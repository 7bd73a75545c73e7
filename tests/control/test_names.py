from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.control.support import BlockingApp, session, silent_socket

from farplug.control import names
from farplug.control.names import (
    MAX_NAME,
    MAX_PATH,
    SessionState,
    check_name,
    default_name,
    list_sessions,
    open_session,
    reserve,
    socket_path,
)
from farplug.errors import FarplugError, Reason, SetupError, UsageError
from farplug.exit_codes import ExitCode, exit_code

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of another user")


@pytest.mark.parametrize("name", ["a", "web1", "_x", "A.b-c_d", "0", "x" * MAX_NAME])
def test_valid_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "/tmp/x", "..", ".hidden", "-s", "a b", "ä", "a\n", "a\0", "\x1b[2J", "\ud800", "x" * 65]
)
def test_names_that_are_not_valid(name: str, environment: dict[str, str]) -> None:
    for refused in (
        check_name,
        lambda name: socket_path(name, environment),
        lambda name: reserve(name, "x", environment),
    ):
        with pytest.raises(UsageError, match="is not a valid name of a session") as caught:
            refused(name)
        assert (caught.value.reason, exit_code(caught.value)) == (Reason.BAD_NAME, ExitCode.USAGE)
        assert caught.value.message.isprintable()
        assert "A-Z a-z 0-9" in caught.value.remedy


@pytest.mark.parametrize(
    ("vm", "target", "name"),
    [
        ("web1", "spice://h:1", "web1"),
        ("My VM (2)!", "spice://h:1", "My-VM-2"),
        ("..", "spice://h:5900", "h-5900"),
        ("", "spice://vmhost:5900", "vmhost-5900"),
        ("", "spice+tls://[::1]:5900?password=secret", "1-5900"),
        ("", "spice://user:secret@vmhost:5900", "vmhost-5900"),
        ("", "tcp-listen://:4000", "4000"),
        ("", "/home/me/my vm.vv", "my-vm"),
        ("", "unix:/run/vm/usb0.sock", "usb0"),
        ("", "spice+unix:///run/vm/web.sock", "web"),
        ("", "", "session"),
        ("--", "unix:", "session"),
        ("x" * 1000, "", "x" * MAX_NAME),
        ("\x1b[2J\n", "", "2J"),
    ],
)
def test_default_names(vm: str, target: str, name: str) -> None:
    assert check_name(default_name(vm, target)) == name


# The folder -------------------------------------------------------------------------------------------------------


def test_the_folder(environment: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.folder(environment) == folder
    assert not folder.exists()
    os.umask(os.umask(0))
    assert names.folder(environment, create=True) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", environment["XDG_RUNTIME_DIR"])
    assert names.folder() == folder


@pytest.mark.parametrize(("user", "path"), [(0, "/run/farplug"), (54321, "/tmp/farplug-54321")])
@pytest.mark.parametrize("variables", [{}, {"XDG_RUNTIME_DIR": ""}])
def test_the_folder_without_a_runtime_directory(
    user: int, path: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(names, "_check_folder", lambda *arguments: None)
    assert names.folder(variables) == Path(path)


def refused(environment: dict[str, str], problem: str, reason: Reason = Reason.NO_PERMISSION) -> FarplugError:
    for create in (True, False):
        with pytest.raises(SetupError) as caught:
            names.folder(environment, create=create)
        assert problem in caught.value.message
        assert (caught.value.reason, exit_code(caught.value)) == (reason, ExitCode.SETUP)
        assert caught.value.remedy
    return caught.value


def test_a_runtime_directory_that_cannot_be_used(tmp_path: Path, environment: dict[str, str]) -> None:
    runtime = Path(environment["XDG_RUNTIME_DIR"])
    refused({"XDG_RUNTIME_DIR": "run"}, "XDG_RUNTIME_DIR is 'run', which is not an absolute path")
    refused({"XDG_RUNTIME_DIR": str(tmp_path / "none")}, "cannot be used: no such file", Reason.NOT_FOUND)
    refused({"XDG_RUNTIME_DIR": str(tmp_path) + "\0"}, "is not a valid path", Reason.NOT_FOUND)
    (tmp_path / "file").touch()
    refused({"XDG_RUNTIME_DIR": str(tmp_path / "file")}, "is not a folder")
    runtime.chmod(0o770)
    error = refused(environment, "may be written to by other users (mode 0770)")
    assert "unset it" in error.remedy


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to(environment: dict[str, str], folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    error = refused(environment, f"{folder} may be written to by other users (mode 0{mode:o})")
    assert error.remedy.command == f"chmod go-w {folder}"


def test_a_folder_that_is_none(environment: dict[str, str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    refused(environment, f"{folder} is not a folder")
    folder.unlink()
    folder.touch()
    refused(environment, f"{folder} is not a folder")


@root
def test_a_folder_of_another_user(environment: dict[str, str], folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, -1)
    refused(environment, f"{folder} belongs to the user 65534, not to the user 0")
    os.chown(folder.parent, 65534, -1)
    refused(environment, f"XDG_RUNTIME_DIR, {folder.parent}, belongs to the user 65534")


def test_a_path_that_is_too_long_for_a_socket(environment: dict[str, str]) -> None:
    short = environment["XDG_RUNTIME_DIR"]
    runtime = Path(short) / ("x" * (MAX_PATH - len(os.fsencode(short)) - len("//farplug/name.sock")))
    runtime.mkdir(mode=0o700)
    environment = {"XDG_RUNTIME_DIR": str(runtime)}
    with reserve("name", environment=environment) as reservation:
        assert len(os.fsencode(reservation.path)) == MAX_PATH
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(reservation.path))
    with reserve(None, "names", environment) as one, reserve(None, "names", environment) as two:
        assert (one.name, two.name) == ("name", "na-2")  # cut, as a default name may be
    for function in (lambda: reserve("names", environment=environment), lambda: socket_path("names", environment)):
        with pytest.raises(SetupError, match="has 108 bytes, and a UNIX socket has at most 107") as caught:
            function()
        assert caught.value.reason is Reason.BAD_NAME
        assert caught.value.remedy


# Reservations -----------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken(environment: dict[str, str], folder: Path) -> None:
    with reserve("web", environment=environment) as first:
        assert (first.name, first.path) == ("web", folder / "web.sock")
        with pytest.raises(UsageError, match="the name web is taken") as caught:
            reserve("web", environment=environment)
        assert (caught.value.reason, exit_code(caught.value)) == (Reason.NAME_TAKEN, ExitCode.USAGE)
        with reserve(None, "web", environment) as second, reserve(None, "web", environment) as third:
            assert (second.name, third.name) == ("web-2", "web-3")
        with reserve(None, "web", environment) as second:
            assert second.name == "web-2"
    first.release()
    assert os.listdir(folder) == []
    with reserve("web", environment=environment):
        pass


def test_a_name_whose_lock_is_held_for_a_moment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a program that lists the sessions, and removes what a session left."""
    first = reserve("web", environment=environment)
    monkeypatch.setattr(time, "sleep", lambda seconds: first.release())
    with reserve("web", environment=environment) as second:
        assert second.path == first.path


def test_a_lock_that_was_removed_by_another_program(environment: dict[str, str], folder: Path) -> None:
    """Programs that clean /tmp do this. The session of that time must not remove the files of a later one."""
    first = reserve("web", environment=environment)
    (folder / "web.lock").unlink()
    with silent_socket(first.path):
        with pytest.raises(UsageError, match="is taken"):
            reserve("web", environment=environment)
        (folder / "web.lock").unlink()
    with reserve("web", environment=environment) as second, silent_socket(second.path):
        first.release()
        assert sorted(os.listdir(folder)) == ["web.lock", "web.sock"]
    assert os.listdir(folder) == []


def test_a_long_default_name_that_is_taken(environment: dict[str, str]) -> None:
    with reserve(None, "x" * 64, environment), reserve(None, "x" * 64, environment) as second:
        assert second.name == "x" * (len(second.name) - 2) + "-2"
        assert len(second.name) <= MAX_NAME


def test_all_names_are_taken(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NUMBER", 2)
    with (
        reserve(None, "web", environment),
        reserve(None, "web", environment),
        pytest.raises(UsageError, match="the names web to web-2 are taken"),
    ):
        reserve(None, "web", environment)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(environment: dict[str, str], folder: Path) -> None:
    names.folder(environment, create=True)
    path = folder / "web.sock"
    with silent_socket(path):
        for _ in range(20):  # more than its backlog
            with pytest.raises(UsageError, match="the name web is taken"):
                reserve("web", environment=environment)
        assert path.is_socket()
    assert path.is_socket()  # stale
    with reserve("web", environment=environment):
        assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_path_that_is_not_a_socket_is_left_alone(environment: dict[str, str], folder: Path, kind: str) -> None:
    path = names.folder(environment, create=True) / "web.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("/etc/passwd")
    with pytest.raises(SetupError, match="it exists and is not a socket") as caught:
        reserve("web", environment=environment)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.EXISTS, ExitCode.SETUP)
    assert os.path.lexists(path)
    assert kind != "file" or path.read_text() == "precious"


def test_a_lock_that_is_a_link(environment: dict[str, str], folder: Path, tmp_path: Path) -> None:
    (names.folder(environment, create=True) / "web.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError):
        reserve("web", environment=environment)
    assert not (tmp_path / "elsewhere").exists()


RACE = """
import sys
from farplug.control.names import reserve
from farplug.errors import UsageError
environment = {"XDG_RUNTIME_DIR": sys.argv[1]}
won = 0
for line in sys.stdin:
    try:
        reservation = reserve("web", environment=environment)
    except UsageError:
        print("taken", flush=True)
        continue
    marker = sys.argv[1] + "/marker"
    open(marker, "x").close()  # fails if another process has the name too
    import os, time
    time.sleep(0.002)
    os.unlink(marker)
    reservation.release()
    print("won", flush=True)
"""


def test_processes_that_race_for_a_name(environment: dict[str, str]) -> None:
    """Each owner removes the lock: a process that has opened it, and locks it afterwards, has no name."""
    command = [sys.executable, "-c", RACE, environment["XDG_RUNTIME_DIR"]]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    outputs = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n" * 300)
        racer.stdin.flush()
        racer.stdin.close()
    for racer in racers:
        assert racer.stdout is not None
        outputs.append(racer.stdout.read().split())
        racer.stdout.close()
        assert racer.wait() == 0
    assert [len(output) for output in outputs] == [300, 300, 300]
    assert {"won"} <= {word for output in outputs for word in output} <= {"won", "taken"}


# Sessions of other processes --------------------------------------------------------------------------------------

SESSION = """
import asyncio, sys
from farplug.app.app import App
from farplug.control.names import reserve
from farplug.control.server import Server
async def main():
    reservation = reserve(None, "web", {"XDG_RUNTIME_DIR": sys.argv[1]})
    server = Server(App(), reservation, target="spice://vmhost:5900", log="/tmp/log")
    await server.start()
    print(reservation.name, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def processes(environment: dict[str, str]) -> Iterator[Any]:
    running: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", SESSION, environment["XDG_RUNTIME_DIR"]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_kill_9_and_reuse_of_the_name(environment: dict[str, str], folder: Path, processes: Any) -> None:
    first, name = processes()
    _, other_name = processes()
    assert (name, other_name) == ("web", "web-2")
    listed = await list_sessions(environment)
    assert [(entry.name, entry.state) for entry in listed] == [
        ("web", SessionState.RUNNING),
        ("web-2", SessionState.RUNNING),
    ]
    hello, snapshot = listed[0].hello, listed[0].snapshot
    assert hello is not None
    assert (hello.session, hello.pid, hello.target, hello.log) == ("web", first.pid, "spice://vmhost:5900", "/tmp/log")
    assert snapshot == {"last_event": 0, "guests": {}}
    first.kill()
    first.wait()
    assert sorted(os.listdir(folder)) == ["web-2.lock", "web-2.sock", "web.lock", "web.sock"]
    with pytest.raises(UsageError, match="the session web is not running") as caught:
        async with open_session("web", environment):
            pass
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.NO_SESSION, ExitCode.USAGE)
    gone, running = await list_sessions(environment)
    assert (gone.name, gone.state, gone.hello) == ("web", SessionState.GONE, None)
    assert (running.name, running.state) == ("web-2", SessionState.RUNNING)
    assert sorted(os.listdir(folder)) == ["web-2.lock", "web-2.sock"]
    async with open_session(None, environment) as client:
        assert client.hello.session == "web-2"
    third, name = processes()
    assert name == "web"
    third.kill()
    third.wait()
    _, name = processes()  # over what the third one left
    assert name == "web"
    assert {entry.state for entry in await list_sessions(environment)} == {SessionState.RUNNING}


async def test_no_session_and_several(environment: dict[str, str], folder: Path) -> None:
    assert await list_sessions(environment) == []
    with pytest.raises(UsageError, match="no session is running") as caught:
        async with open_session(None, environment):
            pass
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.NO_SESSION, ExitCode.USAGE)
    assert not folder.exists()
    async with session(BlockingApp(), environment, "b"), session(BlockingApp(), environment, "a"):
        with pytest.raises(UsageError, match="2 sessions are running") as caught:
            async with open_session(None, environment):
                pass
        assert (caught.value.reason, caught.value.remedy) == (Reason.AMBIGUOUS, "name one of them: a, b")
        async with open_session("a", environment) as client:
            assert client.hello.session == "a"


async def test_sessions_that_do_not_respond(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LIST_TIMEOUT", 0.2)
    where = names.folder(environment, create=True)
    (where / "not a name.sock").touch()
    (where / "file.sock").touch()
    with reserve("starting", environment=environment) as starting, silent_socket(where / "silent.sock"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(starting.path))  # and does not listen yet
            listed = {entry.name: entry for entry in await list_sessions(environment)}
        assert {name: entry.state for name, entry in listed.items()} == dict.fromkeys(
            ["file", "starting", "silent"], SessionState.NOT_RESPONDING
        )
        assert {name: str(entry.error.reason) for name, entry in listed.items() if entry.error} == {
            "file": "no-session",
            "starting": "no-session",
            "silent": "timed-out",
        }
        assert starting.path.exists()


async def test_many_sessions_are_asked_in_parallel(environment: dict[str, str], folder: Path) -> None:
    app = BlockingApp()
    servers = [session(app, environment, f"s{number:02}") for number in range(40)]
    for server in servers:
        await server.__aenter__()
    listed = await asyncio.wait_for(list_sessions(environment), 100)
    assert [entry.name for entry in listed] == [f"s{number:02}" for number in range(40)]
    for server in servers:
        await server.__aexit__(None, None, None)
    assert os.listdir(folder) == []


def test_a_process_that_is_stopped_keeps_its_name(environment: dict[str, str], processes: Any) -> None:
    process, name = processes()
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UsageError, match="is taken"):
            reserve(name, environment=environment)
        (entry,) = asyncio.run(list_sessions(environment))
        assert entry.state is SessionState.NOT_RESPONDING
    finally:
        process.send_signal(signal.SIGCONT)
