"""What Wireshark makes of a capture: runs tshark."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

import farplug.capture

DISSECTOR = Path(farplug.capture.__file__).parent / "usbredir.lua"
ENVIRONMENT = {**os.environ, "HOME": "/nonexistent"}
"""Without the settings and the plugins of this user."""

Frame: TypeAlias = dict[str, str]
"""The value of each field of a frame: several values have commas between; empty: the frame does not have the field."""


def program(name: str) -> str:
    """Return the path of a program of Wireshark, or skip the test."""
    path = shutil.which(name)
    if path is None:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            raise AssertionError(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return path


def run(*arguments: str, incomplete: bool = False) -> str:
    """Run tshark with the dissector for usbredir; return what it prints.

    Args:
        arguments: of tshark.
        incomplete: the file may end within a block.
    """
    command = [program("tshark"), "-n", "-X", f"lua_script:{DISSECTOR}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=ENVIRONMENT)
    errors = [
        line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("Running as user", " **"))
    ]
    if incomplete:
        errors = [line for line in errors if "cut short" not in line]
        assert done.returncode in (0, 2), done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert not errors, done.stderr
    return done.stdout


def rows(path: Path, filter: str, *fields: str, incomplete: bool = False) -> list[Sequence[str]]:
    """Return the values of fields of each frame that a display filter selects; several values have commas between."""
    options = [option for field in fields for option in ("-e", field)]
    text = run("-r", str(path), "-Y", filter, "-T", "fields", *options, incomplete=incomplete)
    return [line.split("\t") for line in text.splitlines()]


def count(path: Path, filter: str = "frame", *, incomplete: bool = False) -> int:
    """Return the number of frames that a display filter selects."""
    return len(rows(path, filter, "frame.number", incomplete=incomplete))


def frames(path: Path, *fields: str, statistics: str) -> tuple[list[Frame], str]:
    """Return fields of all frames, and a table of statistics (option ``-z`` of tshark): one run of tshark for all."""
    options = [option for field in fields for option in ("-e", field)]
    rows, _, table = run("-r", str(path), "-T", "fields", *options, "-z", statistics).partition("\n\n=====")
    return [dict(zip(fields, line.split("\t"), strict=True)) for line in rows.splitlines()], table


def having(frames: list[Frame], field: str, value: int | None = None) -> list[Frame]:
    """Return the frames that have a field, or have it with a value."""
    found = [frame for frame in frames if frame[field]]
    if value is not None:
        found = [frame for frame in found if value in (int(one, 0) for one in frame[field].split(","))]
    return found
