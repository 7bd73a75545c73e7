"""An installer on a CD-ROM: a person answers its question, and the disk boots afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from farplug.image import create_iso
from farplug.testing import GuestFactory

INSTALLER = """\
printf "Install to /dev/sda? "
read -r answer
[ "$answer" = yes ] || exit 1
dd if=/mnt/system.raw of=/dev/sda bs=64k conv=fsync && echo Done. >/tmp/installed
"""


def test_installation(farplug_guest_factory: GuestFactory, bootable: Callable[[str], Path], tmp_path: Path) -> None:
    """The installer runs on the screen of one VM, and another VM boots what was installed."""
    installer = farplug_guest_factory()
    medium = tmp_path / "medium"
    medium.mkdir()
    (medium / "install.sh").write_text(INSTALLER)
    bootable("Welcome to the new system").rename(medium / "system.raw")
    create_iso(tmp_path / "installer.iso", folder=medium)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))

    installer.plug(tmp_path / "installer.iso")
    with installer.plug(disk):
        installer.wait_until_succeeds("mount -o ro /dev/sr0 /mnt && test -b /dev/sda")
        installer.succeed("sh /mnt/install.sh </dev/tty1 >/dev/tty1 2>&1 &")
        installer.screen.still()
        installer.keyboard.type("yes\n")
        installer.wait_until_succeeds("grep Done /tmp/installed")
        installer.succeed("umount /mnt")

    machine = farplug_guest_factory(boot="bios", paused=True)
    machine.plug(disk)
    machine.start()
    machine.wait_for_text("Welcome to the new system")
