"""What survived in an ext4 image, found out on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

from farplug.programs import find_program


def recovered(image: Path, folder: Path) -> dict[str, bytes]:
    """Let e2fsck replay the journal and check, then take out the files of the root folder, by name.

    The image is changed, so give it a copy; ``folder`` is where the files go first, and must not exist.
    """
    check = subprocess.run([str(find_program("e2fsck")), "-fy", str(image)], capture_output=True, text=True, timeout=60)
    assert check.returncode in (0, 1), check  # sound, or made sound
    folder.mkdir()
    command = [str(find_program("debugfs")), "-R", f'rdump "/" "{folder}"', str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
