"""Programs of this machine that images, the throw-away guest and the demo need, and the packages that bring them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from farplug.errors import Reason, SetupError

QEMU = "qemu-system-x86_64"

PACKAGE_OF_PROGRAM = {
    "aplay": "alsa-utils",
    "busybox": "busybox-static",
    "dash": "dash",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "fsck.vfat": "dosfstools",
    "badblocks": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "lsusb": "usbutils",
    "usbredirect": "usbredirect",
    "usbreset": "usbutils",
    "mkfs.exfat": "exfatprogs",
    "fsck.exfat": "exfatprogs",
    "fio": "fio",
    "f3probe": "f3",
    "mcopy": "mtools",
    "mmd": "mtools",
    "fdisk": "fdisk",
    "mkntfs": "ntfs-3g",
    "ntfs-3g": "ntfs-3g",
    "xorrisofs": "xorriso",
    "zstd": "zstd",
    "setpriv": "util-linux",
    "tar": "tar",
    QEMU: "qemu-system-x86",
}


def search_path() -> str:
    """Where programs are: a user's PATH often lacks the folders of mkfs."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def find_program(name: str) -> Path:
    """Path of an installed program.

    Raises:
        SetupError: it is not installed (``MISSING_PROGRAM``).
    """
    path = shutil.which(name, path=search_path())
    if path is None:
        package = PACKAGE_OF_PROGRAM.get(name)
        raise SetupError(
            f"the program {name} is not installed",
            reason=Reason.MISSING_PROGRAM,
            remedy=f"sudo apt-get install {package}" if package else f"install {name}",
        )
    return Path(path)


def output_of(*command: str) -> str | None:
    """What a command writes to its standard output, in the C locale; None if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    return result.stdout if result.returncode == 0 else None
