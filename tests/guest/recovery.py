"""Recover the files of an ext4 image on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.guest.plugging import GUEST_TIMEOUT

from farplug.programs import find_program


def recovered(image: Path, folder: Path) -> dict[str, bytes]:
    """Replay the journal and check the filesystem with e2fsck; return the files of the root folder, by name.

    The image is modified. ``folder`` must not exist; the files are extracted to it.
    """
    check = subprocess.run(
        [str(find_program("e2fsck")), "-fy", str(image)], capture_output=True, text=True, timeout=GUEST_TIMEOUT
    )
    assert check.returncode in (0, 1), check  # sound, or made sound
    folder.mkdir()
    command = [str(find_program("debugfs")), "-R", f'rdump "/" "{folder}"', str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=GUEST_TIMEOUT)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
