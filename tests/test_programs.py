from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import farplug
from farplug.errors import Reason, SetupError
from farplug.programs import PACKAGE_OF_PROGRAM, child_environment, find_program, install_remedy, output_of

PACKAGES = Path(__file__).parents[1] / "debian-packages.txt"

ESSENTIAL = {"dash", "tar", "util-linux"}
"""On every Debian."""


def test_programs_of_root_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert find_program("mke2fs").name == "mke2fs"


def test_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(SetupError, match=r"the program mkfs.vfat is not installed") as error:
        find_program("mkfs.vfat")
    assert error.value.reason is Reason.MISSING_PROGRAM
    assert error.value.remedy.command == "sudo apt-get install dosfstools"
    assert install_remedy("mmd", "mcopy", "fdisk").command == "sudo apt-get install fdisk mtools"
    assert install_remedy("mmd", "unknown") == "install mmd, unknown"


def test_packages_are_on_the_list() -> None:
    lines = (line.partition("#")[0].strip() for line in PACKAGES.read_text().splitlines())
    listed = {line.lstrip("?+") for line in lines if line}
    assert set(PACKAGE_OF_PROGRAM.values()) - ESSENTIAL <= listed


def test_output_of() -> None:
    assert output_of("printf", "x\\n") == "x\n"
    assert output_of("false") is None


STARTERS = re.compile(
    r"subprocess\.(run|Popen|check_output|call|check_call)$|subprocess_(exec|shell)$|os\.(system|popen|spawn|exec)"
    r"|find_library$"  # runs a compiler
)


def test_no_child_process_gets_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARPLUG_PASSWORD", "s3cret")
    monkeypatch.setenv("OTHER", "kept")
    output = output_of("env")
    assert output is not None
    assert "s3cret" not in output
    assert "OTHER=kept" in output
    assert child_environment(OTHER="new")["OTHER"] == "new"


def test_every_child_process_gets_that_environment() -> None:
    starts = [
        (f"{path.name}:{node.lineno}", next((ast.unparse(key.value) for key in node.keywords if key.arg == "env"), ""))
        for path in Path(farplug.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and STARTERS.search(ast.unparse(node.func))
    ]
    assert len(starts) > 6
    assert [start for start in starts if not start[1].startswith(("child_environment(", "environment"))] == []
