"""Firmware that boots from a USB disk. The VM is paused until the disk is plugged in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from farplug.testing import GuestFixture, PlugFixture, ScreenFixture


@pytest.mark.farplug(boot="bios", paused=True)
def test_the_bios_boots_from_usb(
    farplug_guest: GuestFixture,
    farplug_plug: PlugFixture,
    farplug_screen: ScreenFixture,
    bootable: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """SeaBIOS reads the boot sector, which prints its text; the screen shows the text too."""
    farplug_plug(bootable("Hello from USB"), "read-only-disk")
    farplug_guest.start()
    farplug_guest.wait_for_text("Hello from USB")
    farplug_screen.still()
    farplug_screen.save(tmp_path / "hello.png")  # keep it in your project: farplug_screen.shows("hello.png")
