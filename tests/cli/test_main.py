from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tests.cli.support import Cli

from farplug import __version__
from farplug.cli import devices, main
from farplug.cli.main import run
from farplug.cli.tree import EXIT_CODES
from farplug.errors import Reason
from farplug.exit_codes import ExitCode
from farplug.rate_limit import BURST, limited_logger

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_help(cli: Cli) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = cli(*arguments)
        assert (result.code, result.err) == (0, "")
        for word in ("connect", "devices", "doctor", "demo", "image"):
            assert word in result.out
        assert "'farplug connect --help' explains TARGET, and ends with the exit codes" in result.out
    shown = cli("connect", "--help").out
    codes = " ".join(shown.partition("Exit codes")[2].split())
    for code, what in EXIT_CODES.items():
        assert f"{code} {what}" in codes
    assert "--password-file, --ask-password, FARPLUG_PASSWORD" in shown
    for panel in (
        "Images",
        "USB devices of this machine",
        "How the VM sees images",
        "Connection (SPICE)",
        "Output and",
    ):
        assert f"─ {panel}" in shown


@pytest.mark.parametrize(
    "command",
    [
        "",
        "connect",
        "devices",
        "doctor",
        "demo",
        "image",
        "image create",
        "image info",
        "image commit",
        "image discard",
    ],
)
def test_help_shows_no_type_of_flags(cli: Cli, command: str) -> None:
    result = cli(*command.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert "bool" not in result.out.lower()
    assert "--help" in result.out


def test_exit_codes_are_documented() -> None:
    assert set(EXIT_CODES) == set(ExitCode)
    text = DOCUMENT.read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE))
    assert rows == {str(int(code)): what for code, what in EXIT_CODES.items()}
    for reason in Reason:
        assert f"`{reason}`" in text


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"farplug {__version__}\n"


@pytest.mark.parametrize("arguments", [("--nonsense",), ("nonsense",), ("connect", "--nonsense")])
def test_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert "o such" in first
    assert second.startswith("  see: farplug")


def test_an_internal_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("it\nbroke")

    monkeypatch.setattr(devices, "_kind_lines", broken)
    assert run(["devices"]) == 1
    assert capsys.readouterr().err == (
        "farplug: internal error: ZeroDivisionError: it\n  please report this bug, with the debug log: --debug\n"
    )
    assert run(["devices", "--json"]) == 0
    monkeypatch.setattr(devices, "_find", broken)
    assert run(["devices", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reason"] == "internal-error"
    monkeypatch.setattr(devices, "_find", lambda rules: ())
    assert run(["--debug", "devices"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("connect", "--nonsense", "--json"), "No such option: --nonsense"),
        (("connect", "--json"), "Missing argument 'TARGET'"),
        (("connect", "tcp://h:1", "--json"), "nothing to plug in"),
        (("connect", "tcp://h:1", "--usb-disk", "x", "--cache", "none", "--json"), "'none' is not one of"),
        (("doctor", "--json", "--nonsense"), "No such option: --nonsense"),
        (("devices", "--json", "--filter", "nonsense"), "nonsense"),
        (("image", "info", "--json"), "Missing argument 'FILE'"),
    ],
)
def test_json_of_a_bad_option(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    (line,) = map(json.loads, result.out.splitlines())
    assert (line["event"], line["reason"], line["exit_code"]) == ("failed", "bad-option", 2)
    assert said in line["message"]
    assert f"farplug: {line['message']}\n" in result.err
    assert not cli(*(word for word in arguments if word != "--json")).out


def test_what_shows_the_usage_is_the_commands_own_help(cli: Cli) -> None:
    for arguments, command in (
        (("connect", "tcp://h:1", "--usb-disk"), "farplug connect"),
        (("connect", "--nonsense"), "farplug connect"),
        (("image", "create", "--label"), "farplug image create"),
        (("--nonsense",), "farplug"),
    ):
        assert cli(*arguments).err.endswith(f"\n  see: {command} --help\n")


def test_a_value_that_is_not_a_choice(cli: Cli) -> None:
    said = cli("connect", "tcp://h:1", "--usb-disk", "x", "--cache", "none").err
    assert "Value error" not in said
    assert "'--cache': 'none' is not one of 'writeback', 'writethrough', 'unsafe'" in said


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    """The command line takes its time to be imported."""
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", "from farplug.cli.script import main; main()", "devices"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=100) == (b"", b"")
    assert process.returncode == -signal.SIGINT, "130 in a shell"


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_once_it_has_started(ignored: bool) -> None:
    code = (
        "import os, signal, sys; from farplug.cli import script; from farplug.cli import devices;"
        "devices.devices = lambda: (os.kill(os.getpid(), signal.SIGINT), print('alive'));"
        "sys.argv = ['farplug', 'devices']; script.main()"
    )
    command = [sys.executable, "-c", code]
    if ignored:  # as a shell does it for what runs in the background
        command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    result = subprocess.run(command, capture_output=True, timeout=100)
    if ignored:
        assert (result.returncode, result.stdout, result.stderr) == (0, b"alive\n", b"")
    else:
        assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"farplug: interrupted\n")


def test_the_installed_command_begins_with_the_script() -> None:
    (entry,) = entry_points(group="console_scripts", name="farplug")
    assert entry.value == "farplug.cli.script:main"


@cache
def completion_script() -> str:
    """Return the script that --show-completion prints. It detects the shell that runs the command."""
    command = [sys.executable, "-c", "from farplug.cli.script import main; main()", "--show-completion"]
    shell = ["bash", "-c", '"$@"; exit', "bash"]  # stays the parent of the command
    return subprocess.run([*shell, *command], capture_output=True, text=True, timeout=60, check=True).stdout


def complete(tmp_path: Path, *words: str) -> list[str]:
    """Return what bash offers after these words."""
    (tmp_path / "completion").write_text(completion_script())
    command = tmp_path / "farplug"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from farplug.cli.script import main; main()' \"$@\"\n")
    command.chmod(0o755)
    script = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        'complete -p farplug >&2; _farplug_completion farplug; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "-c", script, "bash", tmp_path / "completion", "farplug", *words],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "complete -o default -F _farplug_completion farplug\n")
    return result.stdout.split()


def test_completion(tmp_path: Path) -> None:
    assert complete(tmp_path, "d") == ["demo", "doctor", "devices", "detach", "device"]
    assert complete(tmp_path, "connect", "vm.vv", "--usb-d") == ["--usb-disk", "--usb-disk-ro", "--usb-device"]
    assert complete(tmp_path, "connect", "vm.vv", "--cache", "write") == ["writeback", "writethrough"]
    assert complete(tmp_path, "connect", "vm.vv", "--usb-disk", "x") == [], "files: bash does that by itself"


def test_ctrl_c_before_anything_was_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "_kind_lines", interrupted)
    assert run(["devices"]) == 130
    assert capsys.readouterr().err == "farplug: interrupted\n"


def test_without_a_reader() -> None:
    for arguments in ("devices", "--help", "--version"):
        read, write = os.pipe()
        os.close(read)
        result = subprocess.run(
            [sys.executable, "-c", "from farplug.cli.script import main; main()", arguments],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=100,
        )
        os.close(write)
        assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 | true"])
def test_standard_streams_that_are_closed_or_not_read(image: Path, tmp_path: Path, closed: str) -> None:
    commands = [["devices"], ["nonsense"], ["connect", "spice://h:0", "--usb-disk", str(image)]]
    run_each = (  # one process imports farplug, and each command is a copy of it, with the same standard streams
        "import os, sys, pathlib; from farplug.cli.main import main\n"
        f"for words in {commands!r}:\n"
        "    if not (child := os.fork()):\n"
        "        sys.argv[1:] = words\n"
        "        main()\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        f"    with open({str(tmp_path / 'codes')!r}, 'a') as codes: codes.write(f'{{code}} ')\n"
    )
    script = f'"$@" {closed}'
    result = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", run_each], capture_output=True, timeout=60
    )
    assert (tmp_path / "codes").read_text() == "0 2 2 "
    assert b"internal error" not in result.stderr


def test_closed_standard_streams_are_not_used_as_an_image(image: Path) -> None:
    """Whatever writes to descriptor 1 or 2 would write into it."""
    code = (
        "import os; from farplug.cli.main import _prepare_standard_streams as prepare; prepare();"
        f"assert os.open({str(image)!r}, os.O_RDWR) > 2"
    )
    result = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], timeout=100)
    assert result.returncode == 0


def test_characters_that_the_encoding_lacks(tmp_path: Path) -> None:
    (tmp_path / "日本.raw").write_bytes(bytes(512))
    result = subprocess.run(
        [sys.executable, "-c", "from farplug.cli.main import main; main()", "devices", "日本.raw"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=100,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u65e5\u672c.raw" in result.stdout


def test_help_loads_no_more_than_it_needs() -> None:
    code = (
        "import sys; from farplug.cli.main import run; run(['--help']);"
        "print([m for m in ('cryptography', 'farplug.app.guest', 'farplug.testing', 'farplug.vm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=100, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_log_lines_that_are_held_are_written_at_the_end(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def logs(arguments: object) -> None:
        logger = limited_logger("farplug.test-held")
        for number in range(BURST + 3):
            logger.warning("%s: block %d cannot be read", "a.raw", number)

    monkeypatch.setattr(main, "_run", logs)
    lines = cli("devices").err.splitlines()
    assert len(lines) == BURST + 1
    assert lines[-1] == f"farplug: warning: a.raw: block {BURST + 2} cannot be read (2 more like this)"
