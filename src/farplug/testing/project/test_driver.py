"""Drivers in the kernel of a VM, with devices made of software."""

from __future__ import annotations

from pathlib import Path

from farplug.testing import GuestFixture, PlugFixture, SerialFixture


def test_a_disk(farplug_guest: GuestFixture, farplug_plug: PlugFixture, tmp_path: Path) -> None:
    """The kernel reads an image of this machine as a USB disk, until the disk is unplugged."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"hello".ljust(1 << 20, b"\0"))
    with farplug_plug(image):
        assert farplug_guest.wait_until_succeeds("head -c 5 /dev/sda") == "hello"
    farplug_guest.wait_until_fails("test -e /dev/sda")
    farplug_guest.wait_for_text("Attached SCSI disk")


def test_a_serial_line(farplug_guest: GuestFixture, farplug_serial: SerialFixture) -> None:
    """A program in the VM answers over a USB serial line."""
    tty = farplug_serial.path()
    farplug_guest.succeed(
        f"stty -F {tty} raw -echo",
        f'(read line <{tty}; echo "got $line" >{tty}) >/dev/null 2>&1 &',
    )
    farplug_serial.write("hello\n")
    assert farplug_serial.expect("\n") == b"got hello\n"
