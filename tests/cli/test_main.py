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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 | true"])
def test_standard_streams_that_nobody_opened_or_reads(image: Path, closed: str) -> None:
    command = [sys.executable, "-c", "from farplug.cli.main import main; main()"]
    for arguments, code in ((["devices"], 0), (["nonsense"], 2), (["connect", "spice://h:0", "--usb-disk", image], 2)):
        script = f'set -o pipefail; "$@" {closed}'
        result = subprocess.run(
            ["bash", "-c", script, "bash", *command, *arguments],
            capture_output=True,
            timeout=30,
        )
        assert result.returncode == code
        assert b"defect" not in result.stderr


def test_closed_standard_streams_are_no_image(image: Path) -> None:
    """Whatever writes to descriptor 1 or 2 would write into it."""
    code = (
        "import os; from farplug.cli.main import _prepare_standard_streams as prepare; prepare();"
        f"assert os.open({str(image)!r}, os.O_RDWR) > 2"
    )
    result = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], timeout=30)
    assert result.returncode == 0


def test_characters_that_the_encoding_lacks(tmp_path: Path) -> None:
    (tmp_path / "日本.raw").write_bytes(bytes(512))
    result = subprocess.run(
        [sys.executable, "-c", "from farplug.cli.main import main; main()", "devices", "日本.raw"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=30,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u65e5\u672c.raw" in result.stdout


def test_help_loads_no_more_than_it_needs() -> None:
    code = (
        "import sys; from farplug.cli.main import run; run(['--help']);"
        "print([m for m in ('cryptography', 'farplug.hub', 'farplug.testing', 'farplug.vm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
