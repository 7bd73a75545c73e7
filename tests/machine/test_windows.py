from __future__ import annotations

import subprocess
import sys

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeLibrary
from tests.machine.windows import windows_machine
from tests.physical.support import EVERYTHING

from farplug.errors import DeviceError, Reason, SetupError
from farplug.exit_codes import ExitCode, exit_code
from farplug.libusb.identity import read_configurations, read_identity
from farplug.machine import windows
from farplug.machine.hotplug import Watch
from farplug.machine.listing import list_devices
from farplug.physical.open_device import BusAddress, OpenDevice


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = windows_machine(monkeypatch)
    found = {one.port: one for one in list_devices()}
    reasons = {port: one.obstacle and one.obstacle.reason for port, one in found.items()}
    assert reasons == {
        "usb1": Reason.HUB,
        "1-1": None,
        "1-2": Reason.NO_WINUSB,
        "1-3": Reason.BUSY,
        "1-4": Reason.DEVICE_FAULT,
        "1-8": None,
    }
    assert (found["1-1"].id, found["1-1"].classes) == ("1234:0002", ("storage", "audio"))
    assert found["1-8"].interfaces == ()
    assert all(handle.closed for device in devices for handle in device.handles)
    assert devices[0].calls == [], "hubs are not opened"
    opened = [len(device.calls) for device in devices]
    assert [one.port for one in list_devices(ports=["1-2"])] == ["1-2"]
    assert [len(device.calls) - before for device, before in zip(devices, opened, strict=True)] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("failure", "reason", "message", "remedy"),
    [
        (usb1.USBErrorNotSupported(), Reason.NO_WINUSB, "its driver is not WinUSB", "Zadig"),
        (usb1.USBErrorAccess(), Reason.BUSY, "another program uses it", "end that program first"),
        (usb1.USBErrorIO(), Reason.DEVICE_FAULT, "cannot be used: LIBUSB_ERROR_IO", "unplug it"),
    ],
)
def test_opening_a_device(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: Reason, message: str, remedy: str
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    device = FakeDevice(EVERYTHING)
    device.failures = {"open": failure}
    library = FakeLibrary(device)
    with pytest.raises(DeviceError, match=message) as caught:
        OpenDevice(library, BusAddress.of(device), read_identity(device), {1: read_configurations(device)[0]})
    assert (caught.value.reason, exit_code(caught.value)) == (reason, ExitCode.DEVICE)
    assert remedy in caught.value.remedy


async def test_watching_opens_only_new_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = windows_machine(monkeypatch)
    async with Watch() as watch:
        assert len(watch.present) == len(devices)
        opened = [len(device.calls) for device in devices]
        assert await watch._poll() == []
        assert [len(device.calls) for device in devices] == opened


def test_no_libusb(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise SetupError("libusb-1.0 cannot be loaded", reason=Reason.NO_LIBUSB)

    windows_machine(monkeypatch)
    monkeypatch.setattr(windows, "Library", missing)
    with pytest.raises(SetupError, match="cannot be loaded"):
        list_devices()


IMPORT = """
import asyncio, contextlib, rich, subprocess, sys, typer, usb1
for name in ("fcntl", "grp", "pwd", "termios", "resource"):
    sys.modules[name] = None
import farplug.cli.devices
import farplug.machine.hotplug, farplug.machine.lock, farplug.machine.udev, farplug.machine.windows
from farplug.machine.listing import list_devices
from farplug.errors import SetupError
sys.platform = "win32"
with contextlib.suppress(SetupError):  # libusb finds no USB here
    list_devices()
"""


def test_devices_are_listed_without_what_windows_lacks() -> None:
    """The modules of Python that are for POSIX only, on the way of ``farplug devices``."""
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
