from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.support import Cli

from farplug import __version__
from farplug.cli import devices
from farplug.cli.main import EXIT_CODES, run
from farplug.errors import ExitCode, Reason

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_help(cli: Cli) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = cli(*arguments)
        assert (result.code, result.err) == (0, "")
        for word in ("connect", "devices", "doctor", "demo", "image", "Exit codes"):
            assert word in result.out
    for code, what in EXIT_CODES.items():
        assert f"{code:>3}  {what}" in cli().out
    for command in ("connect", "devices", "doctor", "demo", "image"):
        assert cli(command, "--help").code == 0
    assert "--password-file, --ask-password, FARPLUG_PASSWORD" in cli("connect", "--help").out


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


def test_a_defect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("it\nbroke")

    monkeypatch.setattr(devices, "_kind_lines", broken)
    assert run(["devices"]) == 1
    assert capsys.readouterr().err == (
        "farplug: a defect in farplug: ZeroDivisionError: it\n  please report it (with --debug it tells more)\n"
    )
    assert run(["--debug", "devices"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_before_anything_was_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "_kind_lines", interrupted)
    assert run(["devices"]) == 130
    assert capsys.readouterr().err == "farplug: interrupted\n"


def test_nobody_reads_it() -> None:
    for arguments in ("devices", "--help"):
        read, write = os.pipe()
        os.close(read)
        result = subprocess.run(
            [sys.executable, "-c", "from farplug.cli.main import main; main()", arguments],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=30,
        )
        os.close(write)
        assert (result.returncode, result.stderr) == (0, b"")


def test_help_loads_no_more_than_it_needs() -> None:
    code = (
        "import sys; from farplug.cli.main import run; run(['--help']);"
        "print([m for m in ('cryptography', 'farplug.hub', 'farplug.testing') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
