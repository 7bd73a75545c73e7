"""Make farplug take this machine for a Windows machine."""

from __future__ import annotations

import sys

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeLibrary
from tests.physical.support import EVERYTHING

from farplug.machine import windows
from farplug.usb.descriptors import ConfigurationDescriptor, InterfaceDescriptor

HUB = ConfigurationDescriptor(1, (InterfaceDescriptor(0, 0, 9, 0, 0),))


def windows_machine(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """A hub, a device that can be opened, and those that cannot: its driver is another, a program has it, it fails."""
    devices = [FakeDevice(HUB, ids=(0x1D6B, 2), place=(1, 1))]
    failures = (None, usb1.USBErrorNotSupported(), usb1.USBErrorAccess(), usb1.USBErrorIO())
    for address, failure in enumerate(failures, start=2):
        device = FakeDevice(EVERYTHING, ids=(0x1234, address), place=(1, address))
        device.failures = {} if failure is None else {"open": failure}
        devices.append(device)
    devices.append(FakeDevice(ids=(0x1234, 9), place=(1, 9)))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(windows, "Library", lambda: FakeLibrary(*devices))
    return devices
