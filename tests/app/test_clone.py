"""A skeleton of a device: a program that runs, whose device has the descriptors of the original."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.docs import ROOT
from tests.machine.trees import Machine

from farplug.app.clone import Original, read_original, skeleton
from farplug.errors import DeviceError, UsageError
from farplug.machine import listing
from farplug.store import MemoryStore
from farplug.testing.memory import MemoryGuest
from farplug.usb import Setup, Speed
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import DescriptorType
from farplug.virtual import Disk, VirtualDevice
from farplug.virtual.hid import Keyboard, Tablet


def made(text: str) -> VirtualDevice:
    """Run a skeleton."""
    names: dict[str, Any] = {}
    exec(compile(text, "skeleton.py", "exec"), names)
    device = names["make_device"]()
    assert isinstance(device, VirtualDevice)
    return device


async def descriptors(device: VirtualDevice) -> bytes:
    """Return the device descriptor and the configuration, as a guest reads them."""
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        head = await guest.get_descriptor(DescriptorType.DEVICE, length=18)
        return head + await guest.get_descriptor(DescriptorType.CONFIGURATION, length=4096)


def essence(raw: bytes) -> list[tuple[object, ...]]:
    """Return what a driver binds to, and the endpoints by their kinds."""
    return [
        (
            *(
                one.number,
                one.alternate,
                one.interface_class,
                one.interface_subclass,
                one.interface_protocol,
                one.extra,
            ),
            [
                (end.address & 0x80, end.attributes & 3, end.max_packet_size, end.interval if end.attributes & 3 else 0)
                for end in one.endpoints
            ],
        )
        for one in ConfigurationDescriptor.parse(raw[18:]).interfaces
    ]


async def test_the_copy_has_the_same_descriptors(tmp_path: Path) -> None:
    original = VirtualDevice(
        *(Keyboard(), Disk(MemoryStore(1 << 20)), Tablet()), vendor_id=0x1209, product='It\'s "Everything"\n'
    )
    raw = await descriptors(original)
    text = skeleton(Original(raw, Speed.SUPER, "farplug", 'It\'s "Everything"\n', {0: Keyboard.report_descriptor}))
    copy = made(text)
    again = await descriptors(copy)
    assert again[:18][8:14] == raw[:18][8:14]
    assert essence(again) == essence(raw)
    assert copy.identity.product == 'It\'s "Everything"\n'
    async with MemoryGuest(copy) as guest:
        await guest.enumerate()
        assert await guest.control_in(Setup(0x81, 6, 0x2200, 0, 255)) == Keyboard.report_descriptor
    (tmp_path / "mine.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "mine.py")]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


@settings(max_examples=200)
@given(st.binary(max_size=200), st.text(max_size=20), st.sampled_from(list(Speed)), st.binary(max_size=50))
def test_any_descriptors_make_a_program(raw: bytes, product: str, speed: Speed, report: bytes) -> None:
    head = bytes((18, 1, 0, 2, 0, 0, 0, 64, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1))
    configuration = bytes((9, 2)) + (9 + len(raw)).to_bytes(2, "little") + bytes((1, 1, 0, 0x80, 0)) + raw
    try:
        text = skeleton(Original(head + configuration, speed, product, product, {0: report} if report else {}))
    except DeviceError:
        return  # there is no interface
    compile(text, "skeleton.py", "exec")


def test_a_device_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path)
    monkeypatch.setattr("farplug.machine.listing.list_devices", partial(listing.list_devices, machine.root))
    folder = machine.add("1-5", 7, 0x1050, 0x0407, ((3, 1, 1),), speed="12", product="Key", manufacturer="Maker")
    report = folder / "1-5:1.0" / "0003:1050:0407.0001"
    report.mkdir(parents=True)
    (report / "report_descriptor").write_bytes(Keyboard.report_descriptor)
    original = read_original("1050:0407")
    assert (original.speed, original.product, original.manufacturer) == (Speed.FULL, "Key", "Maker")
    assert original.reports == {0: Keyboard.report_descriptor}
    device = made(skeleton(original))
    assert (device.identity.vendor_id, device.identity.product_id) == (0x1050, 0x0407)
    with pytest.raises(DeviceError, match="no USB device matches 'dead:beef'"):
        read_original("dead:beef")
    with pytest.raises(UsageError):
        read_original("")
