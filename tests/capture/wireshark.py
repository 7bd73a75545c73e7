"""What Wireshark makes of a capture: runs tshark."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import farplug.capture

DISSECTOR = Path(farplug.capture.__file__).parent / "usbredir.lua"
ENVIRONMENT = {**os.environ, "HOME": "/nonexistent"}
"""Without the settings and the plugins of this user."""
VPD_PEEK = "usb.urb_len == 4"
"""Linux reads the first 4 bytes of VPD pages, and Wireshark's dissector of VPD pages reads beyond them."""


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
