from __future__ import annotations

from pathlib import Path

import pytest

from farplug.errors import Reason, SetupError
from farplug.programs import PACKAGE_OF_PROGRAM, find_program, install_remedy, output_of

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
    listed = {line.lstrip("?") for line in lines if line}
    assert set(PACKAGE_OF_PROGRAM.values()) - ESSENTIAL <= listed


def test_output_of() -> None:
    assert output_of("printf", "x\\n") == "x\n"
    assert output_of("false") is None
