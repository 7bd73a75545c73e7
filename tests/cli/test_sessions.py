"""The commands of running sessions, against a session in the background whose VM is a fake."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests import starter
from tests.cli.sessions import Session, background, is_running, nothing, vm
from tests.cli.support import Cli, FakeGuest, Result, blank, in_thread, interrupt, wait_for
from tests.cli.test_leaving import WRITE, WritingGuest
from tests.cli.test_main import complete

from farplug.app.app import App
from farplug.app.events import Level
from farplug.app.settings import GuestSettings, ReconnectSettings, TargetSettings
from farplug.cli.options import reconnect_settings
from farplug.control import names
from farplug.control.names import folder
from farplug.control.server import Server

pytestmark = pytest.mark.usefixtures("quick_start")

ISO = bytes(32768) + b"\x01CD001\x01" + bytes(1 << 16)


@pytest.fixture
def session(cli: Cli) -> Iterator[Session]:
    """A session of a VM with two ports, and no device."""
    with vm() as target, background(cli, target) as session:
        yield session


def lines(result: Result) -> list[str]:
    """Return the lines of an output without their times."""
    assert result.err == ""
    return [line.partition(" ")[2] for line in result.out.splitlines()]


def events(result: Result) -> list[str]:
    """Return the names of the events that a command printed as JSON."""
    return [json.loads(line)["event"] for line in result.out.splitlines()]


def test_a_session_from_its_start_to_its_end(cli: Cli, session: Session, tmp_path: Path) -> None:
    (entry,) = json.loads(cli("ls", "--json").out)
    assert (entry["name"], entry["vm"], entry["state"], entry["devices"]) == ("web1", "testvm", "connected", [])
    headings, row = cli("ls").out.splitlines()
    assert headings.split() == ["NAME", "TARGET", "VM", "STATE", "PORTS", "DEVICES"]
    assert row.split() == ["web1", entry["target"], "testvm", "connected", "0", "of", "2"]

    a, b = (blank(tmp_path / name) for name in ("a.raw", "b.raw"))
    result = cli("attach", "-s", "web1", "--usb-disk", a)
    assert result.code == 0
    assert lines(result)[0] == "port 0: a.raw"
    assert lines(result)[-1] == "a.raw: configured by the guest (configuration 1)"
    result = cli("attach", "--usb-disk-ro", b, "--json")
    assert (result.code, events(result)[-1]) == (0, "configured")

    status = session.status
    assert [port["device"] for port in status["ports"]] == ["a.raw", "b.raw"]
    assert {device["label"]: (device["state"], device["reason"]) for device in status["devices"]} == {
        "a.raw": ("in use", None),
        "b.raw": ("in use", None),
    }
    assert status["log"].endswith("/farplug/web1.log")
    text = cli("status").out.splitlines()
    assert text[0] == f"web1: testvm at {entry['target']}, connected"
    assert text[1] == f"process {status['pid']}, log {status['log']}"
    assert [line.split()[2] for line in text[4:]] == ["a.raw", "b.raw"]

    result = cli("detach", "a.raw")
    assert (result.code, lines(result)) == (0, ["a.raw: detached (0 B read, 0 B written, 0 commands)"])
    assert session.devices == {"b.raw": "in use"}
    assert "usbredir 0  free" in cli("status").out
    result = cli("stop")
    assert (result.code, lines(result)[-1]) == (0, "the session web1 has ended")
    assert not session.socket.exists()
    wait_for(lambda: not is_running(status["pid"]))
    assert cli("ls").out == "no session is running\n"
    assert json.loads(cli("ls", "--json").out) == []
    assert "detaching: another command ends the session" in session.log


def test_a_command_twice_is_not_an_error(cli: Cli, session: Session, image: Path) -> None:
    assert cli("attach", "--usb-disk", image).code == 0
    result = cli("attach", "--usb-disk", image)
    assert result.code == 0
    (note,) = lines(result)
    assert note.endswith("is plugged in already, as disk.raw")
    assert cli("detach", "disk.raw").code == 0
    result = cli("detach", "disk.raw")
    assert (result.code, lines(result)) == (0, ["'disk.raw' is not plugged in; plugged in: nothing"])
    result = cli("detach", "all")
    assert (result.code, lines(result)) == (0, ["nothing is plugged in"])


def test_a_capture(cli: Cli, session: Session, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace.pcapng"
    result = cli("capture", "trace.pcapng")
    assert result.code == 0
    assert f"farplug: warning: capturing to {path}" in result.err
    assert cli("capture", "other.pcapng").code == 2, "there is one already"
    assert cli("attach", "--usb-disk", image).code == 0
    result = cli("capture", "--stop")
    assert (result.code, lines(result)) == (0, [f"the capture to {path} has ended"])
    result = cli("capture", "--stop")
    assert (result.code, lines(result), result.err) == (0, ["no capture runs"], "")
    assert path.read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"
    result = cli("capture", "/no/folder/trace.pcapng", "--capture-bytes", 64, "--json")
    assert (result.code, json.loads(result.out.splitlines()[-1])["reason"]) == (2, "not-found")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one of FILE, --stop and --install-dissector"),
        (("a.pcapng", "--stop"), "give one of FILE, --stop and --install-dissector"),
        (("--stop", "--capture-bytes", 5), "--capture-bytes has no effect without FILE"),
        (("-",), "not to the standard output of this command"),
    ],
)
def test_a_capture_that_is_not_possible(cli: Cli, arguments: tuple[object, ...], said: str) -> None:
    result = cli("capture", *arguments)
    assert (result.code, said in result.err) == (2, True)


def test_all_devices_leave(cli: Cli, session: Session, tmp_path: Path) -> None:
    assert cli("attach", "--usb-disk", blank(tmp_path / "a"), "--usb-disk", blank(tmp_path / "b")).code == 0
    result = cli("detach", "all")
    assert (result.code, len(lines(result))) == (0, 2)
    assert session.devices == {}


def test_paths_are_those_of_the_command(
    cli: Cli, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blank(tmp_path / "a.raw")
    (tmp_path / "one.iso").write_bytes(ISO)
    result = cli("attach", "--usb-disk", "a.raw,snapshot=changes", "--usb-cdrom", "one.iso")
    assert result.code == 0
    assert (tmp_path / "changes").exists()
    assert set(session.devices) == {"a.raw", "cdrom0"}
    for name in ("a.raw", str(tmp_path / "one.iso")):
        assert cli("detach", name).code == 0
    assert session.devices == {}


def test_reconnecting_to_a_vm_that_is_there(cli: Cli, session: Session) -> None:
    result = cli("reconnect")
    assert (result.code, result.out, result.err) == (0, "", "the VM is not lost: it is connected\n")
    result = cli("reconnect", "--give-up")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("farplug: the VM is not lost: there is no attempt to give up")
    assert session.status["state"] == "connected"


def test_media(cli: Cli, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.iso", "two.iso"):
        (tmp_path / name).write_bytes(ISO)
    result = cli("eject")
    assert (result.code, result.err) == (2, "farplug: no CD-ROM drive is plugged in\n  plug one in: --usb-cdrom PATH\n")
    assert cli("attach", "--usb-cdrom", "one.iso").code == 0
    result = cli("insert", "two.iso")
    assert result.code == 0
    assert lines(result)[-1].startswith("cdrom0: ")
    assert "two.iso" in lines(result)[-1]
    result = cli("insert", "cdrom0", "one.iso", "--json")
    assert (result.code, events(result)) == (0, ["medium-ejected", "medium-inserted"])
    result = cli("eject", "one.iso")
    assert result.code == 0
    assert "one.iso" in lines(result)[-1]
    result = cli("eject")
    assert (result.code, lines(result)) == (0, ["cdrom0 is empty"])
    result = cli("insert", "missing.iso")
    assert result.code == 3
    assert f"{tmp_path}/missing.iso cannot be opened: no such file" in result.err
    result = cli("insert", "dvd", "one.iso")
    assert result.code == 2
    assert "name one of: cdrom0 (empty)" in result.err
    assert cli("insert", "a", "b", "c").code == 2


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "nothing to plug in"),
        (("--usb-disk", "/no/such.raw"), 3, "/no/such.raw cannot be opened: no such file"),
        (("--usb-disk", "DIR"), 3, "is a folder, not an image"),
        (("--usb-device", "port:x"), 2, "'port:x' is not a valid port"),
        (("--snapshot", "--usb-cdrom", "x"), 2, "--snapshot has no effect without --usb-disk"),
    ],
)
def test_attach_fails_as_connect_does(
    cli: Cli, session: Session, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    known = {"DIR": str(tmp_path), **{name: str(blank(tmp_path / name)) for name in "ABC"}}
    arguments = [known.get(option, option) for option in options]
    result = cli("attach", *arguments, "--json")
    in_foreground = cli("connect", "tcp://127.0.0.1:1", *arguments)
    assert (result.code, in_foreground.code) == (code, code)
    assert said in result.err
    assert result.err == in_foreground.err
    failed = json.loads(result.out.splitlines()[-1])
    assert (failed["event"], failed["exit_code"]) == ("failed", code)
    assert session.devices == {}


def test_a_disk_that_needs_force_names_the_option(cli: Cli, session: Session, tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(b"QFI\xfb\0\0\0\3".ljust(100_000, b"\0"))
    result = cli("attach", "--usb-disk", tmp_path / "a.qcow2")
    assert result.code == 3
    assert "--force" in result.err
    assert cli("attach", "--usb-disk", tmp_path / "a.qcow2", "--force").code == 0
    assert session.devices == {"a.qcow2": "in use"}


def test_more_devices_than_ports(cli: Cli, session: Session, tmp_path: Path) -> None:
    assert cli("attach", "--usb-disk", blank(tmp_path / "a"), "--usb-disk", blank(tmp_path / "b")).code == 0
    result = cli("attach", "--usb-disk", blank(tmp_path / "c"))
    assert (result.code, "no free port" in result.err) == (7, True)
    assert "\n  take a device out, or " in result.err
    assert session.devices == {"a": "in use", "b": "in use"}


def test_the_vm_refuses_a_device(cli: Cli, image: Path) -> None:
    with vm(make=lambda: FakeGuest(nothing, rejects=True)) as target, background(cli, target) as session:
        result = cli("attach", "--usb-disk", image, "--usb-speed", "high")
        assert (result.code, "the guest refused" in result.err) == (8, True)
        assert session.devices == {}
        assert cli("ls").code == 0


def test_interrupted_while_the_vm_does_not_answer(cli: Cli, image: Path) -> None:
    with vm(make=lambda: FakeGuest(silent=True)) as target, background(cli, target) as session:

        def interrupt_then() -> None:
            wait_for(lambda: "disk.raw" in _labels(session))
            interrupt()

        thread = threading.Thread(target=interrupt_then)
        thread.start()
        result = cli("attach", "--usb-disk", image)
        thread.join()
        assert result.code == 130
        assert result.err.splitlines() == [
            "farplug: interrupted: the session continues to plug the devices in",
            "  to see them, or to take them out:",
            "    farplug status",
            "    farplug detach disk.raw",
        ]
        assert session.devices == {"disk.raw": "waiting"}
        assert cli("attach", "-s", "web1", "--usb-disk", blank(image.with_name("b.raw")), "--no-wait").code == 0
        assert cli("detach", "disk.raw", "b.raw").code == 0
        assert session.devices == {}


def test_detached_while_it_is_attached(cli: Cli, image: Path) -> None:
    with vm(make=lambda: FakeGuest(silent=True)) as target, background(cli, target) as session:
        command = [*starter.COMMAND, "attach", "--usb-disk", str(image)]
        with starter.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            wait_for(lambda: session.devices == {"disk.raw": "waiting"})
            assert cli("detach", "disk.raw").code == 0
            assert process.stderr is not None
            assert "before" in process.stderr.read()
        assert process.returncode == 9
        assert session.devices == {}


def test_stop_warns_of_unfinished_writes(cli: Cli, image: Path) -> None:
    written = threading.Event()
    with (
        in_thread(WritingGuest(WRITE, when_done=written.set).listening) as target,
        background(cli, target, "--usb-disk", image) as session,
    ):
        assert written.wait(100)
        result = cli("stop")
        assert result.code == 0
        warning, *_, last = lines(result)
        assert warning == "the VM may not have finished writing to disk.raw: unmount it there before farplug leaves"
        assert last == "the session web1 has ended"
        assert not session.socket.exists()


def test_stop_fails_if_data_is_not_on_stable_storage(cli: Cli) -> None:
    error = {"reason": "io-error", "message": "a.raw cannot be flushed: input/output error", "remedy": ""}

    @asynccontextmanager
    async def session_of_a_device_that_fails() -> AsyncIterator[None]:
        ended = asyncio.Event()
        app = App(quit=ended.set)
        app.add(GuestSettings(TargetSettings("tcp://h:1")))
        server = Server(app, names.reserve("bad"), target="tcp://h:1")
        await server.start()

        async def end() -> None:
            await ended.wait()
            app.events.publish("detached", "detached", level=Level.BAD, guest="g1", device="a.raw", error=error)
            await server.close()

        ending = asyncio.ensure_future(end())
        yield
        await ending

    with in_thread(session_of_a_device_that_fails):
        result = cli("stop", "-s", "bad", "--json")
    assert (result.code, result.err) == (12, "farplug: a.raw: a.raw cannot be flushed: input/output error\n")
    assert events(result) == ["detached", "failed"]


def _labels(session: Session) -> str:
    """Return what a client in another process is shown: the test's own process runs a command."""
    return subprocess.run([*starter.COMMAND, "status", "-s", session.name], capture_output=True, text=True).stdout


def test_which_session(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("status")
    assert result.code == 2
    assert result.err.splitlines() == [
        "farplug: no session is running",
        "  list the sessions, or start one:",
        "    farplug ls",
        "    farplug connect TARGET --detach",
    ]
    with vm() as target, background(cli, target), background(cli, target, name="web2") as second:
        result = cli("stop")
        assert result.code == 2
        assert result.err.splitlines() == [
            "farplug: 2 sessions are running",
            "  name one of them: web1, web2 (-s NAME, or FARPLUG_SESSION)",
        ]
        result = cli("status", "-s", "web3")
        assert (result.code, "farplug ls" in result.err) == (2, True)
        monkeypatch.setenv("FARPLUG_SESSION", "web2")
        assert cli("status").out.startswith("web2: ")
        assert cli("status", "-s", "web1").out.startswith("web1: ")
        assert cli("stop").code == 0
        monkeypatch.delenv("FARPLUG_SESSION")
        assert not second.socket.exists()
        assert cli("status").out.startswith("web1: ")


@pytest.mark.parametrize("name", ["a/b", "", ".", "-x", "a b", "x" * 65, "é"])
@pytest.mark.parametrize("options", [("--name",), ("--detach", "--name")])
def test_a_name_that_is_not_valid(cli: Cli, name: str, options: tuple[str, ...]) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", *options[:-1], f"{options[-1]}={name}")
    assert (result.code, "is not a valid name of a session" in result.err) == (2, True)
    assert cli("status", f"--session={name}").code == 2


def test_a_name_that_is_taken(cli: Cli, session: Session) -> None:
    for options in (("--detach",), ()):
        result = cli("connect", "tcp://127.0.0.1:1", "--name", "web1", *options)
        assert (result.code, "the name web1 is taken" in result.err) == (2, True)
    assert session.status["name"] == "web1"


def test_the_name_is_that_of_the_vm_and_gets_a_number(cli: Cli) -> None:
    with vm() as target:
        try:
            assert cli("connect", target, "--detach").out == "testvm\n"
            assert cli("connect", target, "--detach").out == "testvm-2\n"
        finally:
            for name in ("testvm", "testvm-2"):
                assert cli("stop", "-s", name).code == 0


def test_a_session_in_the_foreground_is_found(cli: Cli, image: Path) -> None:
    command = [*starter.COMMAND, "connect"]
    with (
        vm() as target,
        starter.Popen([*command, target, "--usb-disk", image], stdout=subprocess.DEVNULL) as process,
    ):
        wait_for(lambda: (folder() / "testvm.sock").exists())
        wait_for(lambda: Session(cli, "testvm").devices == {"disk.raw": "in use"})
        assert Session(cli, "testvm").status["log"] is None
        assert cli("attach", "--usb-disk", blank(image.with_name("b.raw"))).code == 0
        assert cli("stop").code == 0
        assert process.wait(100) == 0


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("problem", ["missing", "relative", "of another mode", "too long", "a file"])
def test_a_runtime_folder_that_cannot_be_used(
    cli: Cli, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, problem: str, required: bool
) -> None:
    """Without ``--name`` the session runs nevertheless."""
    runtime = {"missing": tmp_path / "none", "relative": Path("here"), "too long": tmp_path / ("x" * 100)}.get(
        problem, tmp_path / "run"
    )
    if problem == "too long":
        runtime.mkdir(mode=0o700)
    elif problem == "of another mode":
        runtime.mkdir()
        runtime.chmod(0o777)
    elif problem == "a file":
        runtime.touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with vm(make=FakeGuest) as target:
        result = cli("connect", target, "--usb-disk", image, *(["--name", "web1"] if required else []))
    assert result.code == (11 if required else 0)
    assert result.err.startswith(
        "farplug: " if required else "farplug: warning: other commands cannot use this session"
    )
    assert "XDG_RUNTIME_DIR" in result.err
    assert (cli("ls").code, cli("status", "-s", "web1").code) in ((11, 11), (0, 11))


def test_a_killed_session_is_gone_and_its_name_is_free(cli: Cli) -> None:
    with vm() as target:
        with background(cli, target) as session:
            pid = session.status["pid"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not is_running(pid))
            (gone,) = json.loads(cli("ls", "--json").out)
            assert (gone["name"], gone["state"], gone["reason"]) == ("web1", "gone", "no-session")
            assert cli("ls").out == "no session is running\n"
        with background(cli, target) as session:
            pid = session.status["pid"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not is_running(pid))
            result = cli("status", "-s", "web1")
            assert (result.code, "the session web1 is not running" in result.err) == (2, True)
            with background(cli, target) as again:
                assert again.status["state"] == "connected"


def test_a_session_that_does_not_respond(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LIST_TIMEOUT", 0.2)
    folder(create=True)
    with socket.socket(socket.AF_UNIX) as listener:
        path = folder() / "stuck.sock"
        listener.bind(str(path))
        listener.listen()
        try:
            (entry,) = json.loads(cli("ls", "--json").out)
            assert (entry["name"], entry["state"]) == ("stuck", "not responding")
            assert "stuck does not respond" in cli("ls").out
        finally:
            path.unlink()


def watching(*options: str) -> starter.Popen:
    return starter.Popen(
        [*starter.COMMAND, "watch", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_watch_as_json(cli: Cli, session: Session, image: Path) -> None:
    with watching("--json") as process:
        assert process.stdout is not None
        snapshot = json.loads(process.stdout.readline())
        assert snapshot["event"] == "snapshot"
        assert [guest["attachments"] for guest in snapshot["guests"].values()] == [{}]
        assert cli("attach", "--usb-disk", image).code == 0
        assert cli("stop").code == 0
        seen = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert [event["id"] for event in seen] == list(range(snapshot["last_event"] + 1, seen[-1]["id"] + 1))
    names = [event["event"] for event in seen]
    assert names[0] == "attaching"
    assert names[-1] == "guest-removed"


def test_watch_for_a_person(cli: Cli, session: Session, image: Path) -> None:
    assert cli("attach", "--usb-disk", image).code == 0
    with watching("-s", "web1") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("web1: testvm at ")
        wait_for(lambda: process.stdout is not None and "disk.raw" in process.stdout.readline())
        assert cli("detach", "disk.raw").code == 0
        assert cli("stop").code == 0
        rest = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert "disk.raw: detached (0 B read, 0 B written, 0 commands)" in [line.partition(" ")[2] for line in rest]
    assert rest[-1].endswith("the session web1 has ended")


def test_watch_ends_at_an_interrupt(cli: Cli, session: Session) -> None:
    with watching() as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert session.status["state"] == "connected"


# Completion -------------------------------------------------------------------------------------------------------


def test_completion(cli: Cli, session: Session, tmp_path: Path) -> None:
    (tmp_path / "one.iso").write_bytes(ISO)
    assert cli("attach", "--usb-disk", blank(tmp_path / "a.raw"), "--usb-cdrom", tmp_path / "one.iso").code == 0
    assert complete(tmp_path, "status", "-s", "w") == ["web1"]
    # A session that does not answer at once offers nothing.
    wait_for(lambda: complete(tmp_path, "detach", "-s", "web1", "") == ["a.raw", "cdrom0", "all"])
    wait_for(lambda: complete(tmp_path, "insert", "") == ["cdrom0"])
    assert complete(tmp_path, "detach", "-s", "none", "") == ["all"]
    assert complete(tmp_path, "type", "x", "--layout", "de") == ["de", "de-nodeadkeys"]


def test_completion_does_not_wait_for_a_session(tmp_path: Path) -> None:
    folder(create=True)
    with socket.socket(socket.AF_UNIX) as listener:
        path = folder() / "stuck.sock"
        listener.bind(str(path))
        listener.listen()
        try:
            assert complete(tmp_path, "status", "-s", "") == ["stuck"]
            assert complete(tmp_path, "eject", "-s", "stuck", "") == []
        finally:
            path.unlink()


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "detach", "expected"),
    [
        ((None, False), False, None),
        ((None, False), True, ReconnectSettings()),
        ((None, True), True, None),
        (("forever", False), False, ReconnectSettings()),
        (("90", False), False, ReconnectSettings(90)),
        (("1.5m", False), True, ReconnectSettings(90)),
        (("2h", False), True, ReconnectSettings(7200)),
    ],
)
def test_reconnecting(options: tuple[str | None, bool], detach: bool, expected: ReconnectSettings | None) -> None:
    assert reconnect_settings(*options, detach=detach) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "1d", "1m30s", "nan", "1e9", "1" * 10, "٣"])
def test_a_duration_that_is_not_valid(cli: Cli, text: str) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", "--name", "a", f"--reconnect={text}")
    assert (result.code, "is not a valid duration" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reconnect", "--no-reconnect", "tcp://h:1"), "--reconnect and --no-reconnect contradict each other"),
        (("tcp://h:1", "--target-command", "true"), "TARGET and --target-command contradict each other"),
        ((), "Missing argument 'TARGET'"),
    ],
)
def test_options_that_contradict_each_other(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    result = cli("connect", "--name", "a", *arguments)
    assert (result.code, said in result.err) == (2, True)


def test_an_option_without_its_value_does_not_take_the_next_word(cli: Cli) -> None:
    assert "Connection refused" in cli("connect", "--reconnect", "tcp://127.0.0.1:1", "--name", "a").err
    assert "'--reconnect' is not a valid target" in cli("connect", "--name", "a", "--", "--reconnect").err
