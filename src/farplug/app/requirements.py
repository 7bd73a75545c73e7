"""What images, the throw-away VM and the guest tests need on this machine, and the packages that bring it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from farplug.errors import Reason, SetupError
from farplug.programs import PACKAGE_OF_PROGRAM, QEMU, child_environment, search_path


@dataclass(frozen=True, slots=True)
class Need:
    """Something to be installed.

    Attributes:
        name: a program, or a library without "lib" and ".so".
        purpose: for what.
        package: the Debian package that has it.
        vm: whether the throw-away VM needs it: exFAT and NTFS images, ``farplug demo``, the tests.
        images: whether ``farplug image create`` or ``--usb-folder`` needs it without a VM.
    """

    name: str
    purpose: str
    package: str
    vm: bool = True
    images: bool = False

    def found(self) -> str:
        """Return its path; empty if it is missing."""
        if self.name == SPICE.name:
            return _qemu_with_spice()
        if self.name == PARSER.name:
            return _loadable(PARSER_LIBRARY)
        return shutil.which(self.name, path=search_path()) or ""


def _program(name: str, purpose: str, *, vm: bool = True, images: bool = False) -> Need:
    return Need(name, purpose, PACKAGE_OF_PROGRAM[name], vm, images)


EMULATOR = _program(QEMU, "runs the VM")
SPICE = Need("SPICE in QEMU", "the VM's SPICE server", "qemu-system-modules-spice")
PARSER_LIBRARY = "libusbredirparser.so.1"
PARSER = Need("usbredirparser", "the reference that tests compare with", "libusbredirparser1", vm=False)
NEEDS = (
    EMULATOR,
    SPICE,
    _program("busybox", "the VM's programs"),
    _program("dash", "the VM's programs"),
    _program("lsusb", "the VM's programs"),
    _program("mke2fs", "ext4 on images, filesystems in the VM", images=True),
    _program("mkfs.vfat", "FAT32 on images, filesystems in the VM", images=True),
    _program("mcopy", "files in and out of images", images=True),
    _program("zstd", "unpacks the VM's kernel"),
    _program("setpriv", "ends the VM with us"),
    _program("fdisk", "partition tables on images", vm=False, images=True),
    _program("mkfs.exfat", "exFAT on images", vm=False, images=True),
    _program("mkntfs", "NTFS on images", vm=False, images=True),
    _program("xorrisofs", "ISO images", vm=False, images=True),
    _program("passt", "the network of this user for VMs", vm=False),
    PARSER,
)


def _loadable(library: str) -> str:
    """Return the file name of a shared library; empty if the library cannot be loaded."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return ""
    return library


def _qemu_with_spice() -> str:
    """The QEMU that has SPICE: since Debian 13 and Ubuntu 24.04 that is a package of its own."""
    qemu = shutil.which(QEMU)
    if qemu is None:
        return ""
    answer = subprocess.run(
        [qemu, "-spice", "help"], stdin=subprocess.DEVNULL, capture_output=True, env=child_environment()
    )
    return qemu if b"disable-ticketing" in answer.stdout else ""  # its exit code is 1 either way


def install_command(needs: Iterable[Need]) -> str:
    """The command that installs what is needed."""
    packages = {need.package for need in needs}
    if EMULATOR.package in packages:
        # QEMU brings its SPICE: as a package that it recommends, or inside where there is no such package (Debian 12).
        packages.discard(SPICE.package)
    return f"sudo apt-get install {' '.join(sorted(packages))}"


def check_demo() -> None:
    """Check that the demo can run here.

    Raises:
        SetupError: something is missing; the remedy installs all of it.
    """
    missing = [need for need in NEEDS if need.vm and not need.found()]
    if missing:
        raise SetupError(
            f"the demo needs what is not installed: {', '.join(need.name for need in missing)}",
            reason=Reason.MISSING_PROGRAM,
            remedy=install_command(missing),
        )
