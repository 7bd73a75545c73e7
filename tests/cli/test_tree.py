"""The commands of farplug are imported when they are used. What is known of them before is true."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main

from farplug.cli.tree import ENTRIES, Root, app
from farplug.exit_codes import ExitCode

ROOT: Root = typer.main.get_command(app)  # type: ignore[assignment]


def first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


@pytest.mark.parametrize("name", ENTRIES)
def test_the_summary_of_a_command_is_the_beginning_of_its_help(name: str) -> None:
    command = ROOT.commands[name]
    assert command.name == name
    assert ENTRIES[name].summary == first_paragraph(command.help)


def test_the_help_knows_no_other_commands() -> None:
    assert list(ROOT.commands) == ROOT.list_commands(None) == list(ENTRIES)
    assert len(ROOT.commands) == len(ENTRIES)
    assert ROOT.get_command(None, "nothing") is None


def test_the_help_lists_commands_by_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ROOT(["--help"])
    titles = re.findall("╭─ (.+?) ─", capsys.readouterr().out)
    assert titles == ["Options", *dict.fromkeys(entry.panel for entry in ENTRIES.values())]


MAIN = (
    "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
    "from farplug.cli.script import main; main()"
)


def imported(*arguments: str, environment: Mapping[str, str] | None = None) -> set[str]:
    """Run a command, and return the names of the modules that it has imported at its end."""
    result = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(result.stderr.split("\n")[-2].split())


def packages(modules: set[str]) -> set[str]:
    """Return the packages of farplug that modules belong to."""
    return {".".join(name.split(".")[:2]) for name in modules if name.startswith("farplug.")}


def test_the_version_imports_nothing() -> None:
    modules = imported("--version")
    assert packages(modules) == {"farplug.cli", "farplug.lazy", "farplug.version"}
    assert modules & {"asyncio", "dataclasses", "inspect", "logging", "typer"} == set()


def test_the_help_imports_no_command() -> None:
    modules = imported("--help")
    assert {name for name in modules if name.startswith("farplug.cli.")} == {
        f"farplug.cli.{name}" for name in ("failure", "log", "main", "options", "script", "tree", "values", "writer")
    }
    assert modules & {"asyncio", "farplug.app", "farplug.control", "pydantic", "ssl"} == set()


def test_a_command_imports_itself_only() -> None:
    modules = imported("ls")
    assert modules & {"pydantic", "rich", "farplug.app.app", "farplug.cli.page", "farplug.cli.doctor"} == set()
    assert modules & {"farplug.redirection.engine", "farplug.usbredir.packets"} == set()
    assert "farplug.cli.sessions" in modules


def test_completion_of_a_name_imports_no_command() -> None:
    environment = {"_FARPLUG_COMPLETE": "complete_bash", "COMP_WORDS": "farplug st", "COMP_CWORD": "1"}
    modules = imported(environment=environment)
    assert modules & {"farplug.app", "farplug.cli.sessions", "farplug.cli.connect", "pydantic"} == set()


def test_connect_imports_what_its_target_and_its_devices_need(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vm"))
        listener.listen()
        listener.settimeout(60)
        command = [sys.executable, "-c", MAIN, "connect", f"unix:{tmp_path / 'vm'}", "--usb-disk", str(image)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            guest, _ = listener.accept()
            with guest:
                guest.settimeout(60)
                assert guest.recv(1)
                process.terminate()
                _, shown = process.communicate(timeout=60)
    modules = set(shown.split("\n")[-2].split())
    assert {"farplug.usbredir.packets", "farplug.virtual.uas", "farplug.control.server"} <= modules
    for unused in (
        *("cryptography", "lz4", "pydantic", "rich", "usb1", "websockets", "pygments"),
        *("farplug.agents", "farplug.image", "farplug.libusb", "farplug.machine", "farplug.physical", "farplug.vm"),
        *("farplug.remote", "farplug.usbip", "farplug.web", "farplug.virtual.hid", "farplug.virtual.fido.key"),
        *("farplug.app.client", "farplug.app.commands", "farplug.app.executor", "farplug.app.screen"),
        *("farplug.spice.channel", "farplug.spice.link", "farplug.transport.dialer", "farplug.transport.tls"),
    ):
        assert unused not in modules


def leaves(command: Any) -> Iterator[Any]:
    """Yield the commands that have no commands."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield command
    else:
        for one in inner.values():
            yield from leaves(one)


@pytest.mark.parametrize("command", list(leaves(ROOT)), ids=lambda command: command.name)
def test_help(command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for paragraph in re.split(r"\n\s*\n", command.help):
        assert "\n" not in paragraph, "Typer keeps the end of a line"
    with pytest.raises(SystemExit):
        command(["--help"], prog_name="x")
    shown = capsys.readouterr().out
    usage = shown.partition("Usage: ")[2].splitlines()[0].rstrip()
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    for argument in arguments:
        name = argument.metavar
        word = f"{name}..." if argument.nargs == -1 and " " not in name else name
        usage = usage.replace(f" {word}" if argument.required else f" [{word}]", "", 1)
    assert usage.removesuffix(" [-- COMMAND [ARGUMENT]...]") == "x [OPTIONS]"
    assert not re.search(r"<[^|>]*>", re.sub(r"│\n│ +", "", shown)), "the name of a type of Python"


def test_exit_codes_in_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        ROOT(["connect", "--help"], prog_name="x")
    codes = capsys.readouterr().out.partition("Exit codes")[2].rstrip().splitlines()[1:]
    assert len(codes) > len(ExitCode)
    assert all(re.match(r" (  \d| \d\d|\d{3})  \S|      \S", line) for line in codes), codes
