"""Find the programs that images, the throw-away guest and the demo need, and the packages that contain them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from farplug.errors import Reason, Remedy, SetupError

QEMU = "qemu-system-x86_64"

PASSWORD_VARIABLE = "FARPLUG_PASSWORD"
"""Variable of the environment with a SPICE password, for this process only."""

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
    "passt": "passt",
    "setpriv": "util-linux",
    "tar": "tar",
    QEMU: "qemu-system-x86",
}


def search_path() -> str:
    """Return the folders of programs: PATH, and those of mkfs, which a user's PATH often lacks."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def find_program(name: str) -> Path:
    """Return the path of an installed program.

    Raises:
        SetupError: the program is not installed (``MISSING_PROGRAM``).
    """
    path = shutil.which(name, path=search_path())
    if path is None:
        raise SetupError(
            f"the program {name} is not installed", reason=Reason.MISSING_PROGRAM, remedy=install_remedy(name)
        )
    return Path(path)


def install_remedy(*programs: str) -> Remedy:
    """Return the remedy that installs programs: a command, if all their packages are known."""
    packages = {PACKAGE_OF_PROGRAM.get(program) for program in programs}
    known = sorted(package for package in packages if package is not None)
    if len(known) < len(packages):
        return Remedy(f"install {', '.join(programs)}")
    return Remedy("install it", command=f"sudo apt-get install {' '.join(known)}")


def child_environment(**variables: str) -> dict[str, str]:
    """Return the environment for a child process: that of this process without the password, and ``variables``.

    Every child process gets this environment.
    """
    return {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE} | variables


def output_of(*command: str) -> str | None:
    """Return the standard output of a command in the C locale; None: the command failed."""
    environment = child_environment(LC_ALL="C")
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    return result.stdout if result.returncode == 0 else None
