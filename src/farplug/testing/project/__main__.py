"""Write the files of the project into the current folder. Files that are there stay as they are."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

NAMES = ("conftest.py", "test_driver.py", "test_firmware.py", "test_installer.py")


def main() -> int:
    """Write the files; return the exit code: 1 if one of them exists."""
    if there := [name for name in NAMES if Path(name).exists()]:
        sys.stderr.write(f"{there[0]} exists: begin in an empty folder\n")
        return 1
    for name in NAMES:
        Path(name).write_bytes(files(__package__).joinpath(name).read_bytes())
        sys.stdout.write(f"{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
