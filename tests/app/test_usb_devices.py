"""The USB devices that a client chooses among."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from farplug.app import usb_devices
from farplug.app.app import App
from farplug.app.commands import Devices
from farplug.app.guest import Guest
from farplug.errors import Reason, Remedy, SetupError
from farplug.machine.device_info import DeviceInfo, Obstacle
from farplug.physical.device import PhysicalDevice
from farplug.physical.open_device import BusAddress
from farplug.usb.types import Speed

HUB = DeviceInfo(1, 1, "usb1", 0x1D6B, 2)
STICK = DeviceInfo(
    1, 5, "1-2.3", 0x0781, 0x5581, Speed.HIGH, manufacturer="SanDisk", product="Ultra", serial_number="x"
)
TOKEN = DeviceInfo(1, 6, "1-4", 0x1050, 0x0407)
DISK = DeviceInfo(
    *(2, 2, "2-1", 0x0BDA, 0x9210),
    obstacles=(Obstacle(Reason.BUSY, "mounted on /", Remedy("unmount it", command="umount /"), forceable=True),),
)


async def test_devices_and_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usb_devices, "list_devices", lambda: [HUB, STICK, TOKEN, DISK])
    monkeypatch.setattr("socket.gethostname", lambda: "host\x1b")
    plugged = PhysicalDevice(cast(Any, None), BusAddress(1, 6), cast(Any, None), [])
    gone = PhysicalDevice(cast(Any, None), BusAddress(1, 5), cast(Any, None), [])
    attachments = [
        SimpleNamespace(id="g1.a1", over=False, device=plugged),
        SimpleNamespace(id="g1.a2", over=True, device=gone),
        SimpleNamespace(id="g1.a3", over=False, device=object()),
    ]
    async with App() as app:
        app.guests["g1"] = cast(Guest, SimpleNamespace(id="g1", attachments=attachments))
        result = await app.do(Devices())
        del app.guests["g1"]
    assert result["machine"] == "host\N{REPLACEMENT CHARACTER}"
    stick, token, disk = result["devices"]
    assert (stick["id"], stick["name"], stick["state"]) == ("1-2.3", "SanDisk Ultra", "free")
    assert (stick["vendor_id"], stick["serial_number"], stick["speed"]) == ("0781", "x", "high")
    assert (token["name"], token["state"], token["attachment"]) == ("1050:0407", "attached", "g1.a1")
    assert (disk["state"], disk["reason"], disk["command"], disk["forceable"]) == ("refused", "busy", "umount /", True)


async def test_a_machine_without_usb(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[DeviceInfo]:
        raise SetupError("no USB", reason=Reason.NO_USB)

    monkeypatch.setattr(usb_devices, "list_devices", fail)
    async with App() as app:
        with pytest.raises(SetupError):
            await app.do(Devices())
