"""The unit of systemd and the container in contrib/."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.docs import ROOT
from tests.test_docs import find_command

from farplug.exit_codes import ExitCode

UNIT = ROOT / "contrib/systemd/farplug@.service"
QUADLET = ROOT / "contrib/container/farplug-web1.container"
CONTAINERFILE = ROOT / "contrib/container/Containerfile"
NEVER_RETRIED = (ExitCode.USAGE, ExitCode.IMAGE, ExitCode.TLS, ExitCode.DENIED, ExitCode.SETUP)


def parsed(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # names are case-sensitive
    parser.read(path)
    return parser


@pytest.mark.parametrize("path", [UNIT, QUADLET])
def test_exit_codes(path: Path) -> None:
    service = parsed(path)["Service"]
    assert [int(word) for word in service["RestartPreventExitStatus"].split()] == [*NEVER_RETRIED]
    assert int(service["SuccessExitStatus"]) == ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    "words",
    [
        shlex.split(parsed(UNIT)["Service"]["ExecStart"])[2:],
        shlex.split(parsed(QUADLET)["Container"]["Exec"]),
        *(
            shlex.split(line)[5:]
            for line in re.findall(r"^#   (podman run .*)$", CONTAINERFILE.read_text(), re.MULTILINE)
        ),
    ],
)
def test_commands_have_these_options(words: list[str]) -> None:
    words = words[words.index("connect") :]
    command = find_command(words)
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            pytest.fail("systemd-analyze is not installed")
        pytest.skip("systemd-analyze is not installed")
    instance = tmp_path / "farplug@web1.service"
    instance.write_text(UNIT.read_text())
    (tmp_path / "run").mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)}
    command = ["systemd-analyze", "--user", "--man=no", "verify", str(instance)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_container_copies_what_it_needs() -> None:
    """The build has only what .dockerignore lets through."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for line in ignore[1:]:
        assert (ROOT / line.removeprefix("!")).exists()
    project = (ROOT / "pyproject.toml").read_text()
    for needed in ("README.md", "LICENSE", "docs/farplug.1"):
        assert f'"{needed}"' in project
        assert f"!{needed}" in ignore


def test_the_container_has_the_programs_for_folders() -> None:
    from farplug.app.requirements import NEEDS

    packages = {need.package for need in NEEDS if need.images} - {"ntfs-3g"}
    assert {package for package in packages if package not in CONTAINERFILE.read_text()} == set()
