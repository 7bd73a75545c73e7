from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.machine.trees import BOOT_KEYBOARD, HID, SMART_CARD, STORAGE, Machine, descriptors

from farplug.errors import Reason, SetupError
from farplug.exit_codes import ExitCode, exit_code
from farplug.machine.device_info import InterfaceInfo
from farplug.machine.listing import list_devices
from farplug.usb.descriptors import MAX_WARNINGS
from farplug.usb.types import Speed


def test_all_fields(machine: Machine) -> None:
    machine.add("usb1", 1, 0x1D6B, 2, ((9, 0, 0),), codes=(9, 0, 1), product="xHCI Host Controller")
    machine.add(
        "1-5",
        7,
        0x1050,
        0x0407,
        (BOOT_KEYBOARD, HID, SMART_CARD),
        drivers=("usbhid", "usbhid"),
        manufacturer="Yubico",
        product="YubiKey OTP+FIDO+CCID",
        serial="0012345",
        speed="12",
    )
    hub, key = list_devices(machine.root)
    assert (hub.port, hub.classes, hub.interfaces) == ("usb1", ("hub",), (InterfaceInfo(0, (9, 0, 0)),))
    assert str(key) == "1050:0407 Yubico YubiKey OTP+FIDO+CCID (port 1-5)"
    assert (key.bus, key.address, key.port, key.key) == (1, 7, "1-5", (1, 7))
    assert (key.speed, key.device_version, key.serial_number) == (Speed.FULL, 0x0100, "0012345")
    assert key.interfaces == (
        InterfaceInfo(0, BOOT_KEYBOARD, "usbhid"),
        InterfaceInfo(1, HID, "usbhid"),
        InterfaceInfo(2, SMART_CARD),
    )
    assert key.classes == ("hid", "smart-card")
    assert key.node == machine.root / "dev/bus/usb/001/007"
    assert (key.configuration, key.obstacle, key.in_use_as, key.warnings) == (1, None, None, ())


def test_the_order_is_that_of_the_ports(machine: Machine) -> None:
    for address, port in enumerate(("2-1", "1-10", "1-2.10", "usb2", "1-2.9", "1-2", "usb1"), 1):
        machine.add(port, address)
    assert [device.port for device in list_devices(machine.root)] == [
        "usb1",
        "1-2",
        "1-2.9",
        "1-2.10",
        "1-10",
        "usb2",
        "2-1",
    ]


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("1.5", Speed.LOW),
        ("12", Speed.FULL),
        ("480", Speed.HIGH),
        ("5000", Speed.SUPER),
        ("10000", Speed.SUPER_PLUS),
        ("20000", Speed.SUPER_PLUS),
        ("unknown", None),
        ("", None),
    ],
)
def test_speeds(machine: Machine, text: str, speed: Speed | None) -> None:
    machine.add("1-1", 2, speed=text)
    assert list_devices(machine.root)[0].speed is speed


def test_names_come_from_usb_ids_where_the_device_has_none(machine: Machine) -> None:
    (machine.root / "usr/share/hwdata").mkdir(parents=True)
    (machine.root / "usr/share/hwdata/usb.ids").write_text("046d  Logitech, Inc.\n\tc31c  Keyboard K120\n")
    machine.add("1-1", 2, 0x046D, 0xC31C, product="Own name")
    machine.add("1-2", 3, 0x046D, 0xC31C)
    machine.add("1-3", 4, 0x1234, 1)
    machine.add("1-4", 5, 0x046D, 2, product="Logitech, Inc. Mouse")
    assert [device.name for device in list_devices(machine.root)] == [
        "Logitech, Inc. Own name",
        "Logitech, Inc. Keyboard K120",
        "",
        "Logitech, Inc. Mouse",
    ]


def test_names_with_control_characters(machine: Machine) -> None:
    machine.add("1-1", 2, product="a\x1b[2Jb\nc", manufacturer="\udcff\udcfe")
    (device,) = list_devices(machine.root)
    assert device.name.isprintable()
    assert device.product == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c"


def test_the_current_configuration_counts(machine: Machine) -> None:
    second = descriptors(1, 2, SMART_CARD, value=2)[18:]
    raw = descriptors(1, 2, STORAGE) + second
    for address, (value, codes) in enumerate((("1", STORAGE), ("2", SMART_CARD), ("", STORAGE), ("9", STORAGE)), 2):
        machine.add(f"1-{address}", address, 0, 0, (), raw=raw, bConfigurationValue=value)
        assert [i.codes for i in list_devices(machine.root)[-1].interfaces] == [codes], value


def test_the_kernel_knows_the_setting_of_an_interface(machine: Machine) -> None:
    folder = machine.add("1-1", 2)
    (folder / "1-1:1.0/bInterfaceProtocol").write_text("62\n")
    assert list_devices(machine.root)[0].interfaces[0].codes == (8, 6, 0x62)


@pytest.mark.parametrize(
    ("raw", "interfaces"),
    [
        (b"", 0),
        (descriptors(0x1209, 1, STORAGE)[:7], 0),
        (descriptors(0x1209, 1, STORAGE)[:18], 0),
        (descriptors(0x1209, 1, STORAGE)[:-3], 1),
        (descriptors(0x1209, 1, STORAGE)[:18] + b"\x09\x02\x00\x00\x01\x01\x00\x80\x32" * 2, 0),  # of length 0
        (descriptors(0x1209, 1, STORAGE)[:18] + b"\x09\x02\xff\xff\x20\x01\x00\x80\x32\x00\x00", 0),
        (descriptors(0x1209, 1, STORAGE) + b"\x00" * 64, 1),
        (descriptors(0x1209, 1)[:18] + b"\x09\x02\x09\x00\x00\x01\x00\x80\x32" * 60_000, 0),  # 60,000 configurations
        (b"\xff" * 4096, 0),
        (bytes(70_000), 0),
    ],
    ids=lambda value: f"{len(value)}-bytes" if isinstance(value, bytes) else "",
)
def test_invalid_descriptors(machine: Machine, raw: bytes, interfaces: int) -> None:
    machine.add("1-1", 2, 0, 0, (), raw=raw, idVendor="1209", idProduct="0001")
    (device,) = list_devices(machine.root)
    assert len(device.interfaces) == interfaces
    assert len(device.warnings) <= MAX_WARNINGS
    if len(raw) < 4096:
        assert device.id == "1209:0001"


def test_no_bytes_raise_an_exception(machine: Machine) -> None:
    folder = machine.add("1-1", 2, 0x1209, 1, (STORAGE, HID))
    good = bytearray(descriptors(0x1209, 1, STORAGE, HID))
    source = random.Random(4)
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(source.randrange(1, 6)):
            raw[source.randrange(len(raw))] = source.randrange(256)
        (folder / "descriptors").write_bytes(raw[: source.randrange(len(raw) + 1)])
        (device,) = list_devices(machine.root)
        assert device.port == "1-1"


@pytest.mark.parametrize(
    "attribute",
    ["idVendor", "bcdDevice", "bDeviceClass", "bConfigurationValue", "speed", "serial", "authorized", "product"],
)
@pytest.mark.parametrize("text", ["", "zzzz", "-1", "99999999999999999999", "\u0664", "1_0", "\udcff" * 5000])
def test_invalid_attributes(machine: Machine, attribute: str, text: str) -> None:
    folder = machine.add("1-1", 2, raw=b"")
    (folder / attribute).write_bytes(text.encode(errors="surrogateescape"))
    (device,) = list_devices(machine.root)
    assert device.vendor_id <= 0xFFFF
    assert device.interfaces[0].codes == STORAGE


def test_other_folders_are_skipped(machine: Machine) -> None:
    machine.add("1-1", 2)
    for name in ("1-1:1.0", "ep_00", "1-1.x", "1-1.1.1.1.1.1.1.1.1", "usb", "x" * 200):
        (machine.devices / name).mkdir()
    (machine.devices / "1-9").symlink_to("gone")
    (machine.devices / "1-8").symlink_to("1-8")
    assert [device.port for device in list_devices(machine.root)] == ["1-1"]


def test_numbers_of_the_device_from_its_uevent(machine: Machine) -> None:
    folder = machine.add("1-1", 2)
    for name in ("busnum", "devnum"):
        (folder / name).unlink()
    assert list_devices(machine.root) == []
    (folder / "uevent").write_text("nonsense\nBUSNUM=001\nDEVNUM=002\n")
    assert list_devices(machine.root)[0].key == (1, 2)


@pytest.mark.parametrize(("node", "key"), [("189:1", (1, 2)), ("189:126", (1, 127)), ("189:129", (1, 2))])
def test_a_device_that_is_being_reset(machine: Machine, node: str, key: tuple[int, int]) -> None:
    machine.add("1-1", 0, dev=node)
    assert [device.key for device in list_devices(machine.root)] == [key]


@pytest.mark.parametrize("node", ["", "189", "189:", "189:-1", "nonsense"])
def test_a_device_without_an_address(machine: Machine, node: str) -> None:
    machine.add("1-1", 0, dev=node)
    assert list_devices(machine.root) == []


@pytest.mark.parametrize(
    ("peer", "port"),
    [
        ("usb2/2-0:1.0/usb2-port4", "2-4"),
        ("2-1/2-1:1.0/2-1-port3", "2-1.3"),
        ("2-1.4/2-1.4:1.0/2-1.4-port2", "2-1.4.2"),
        ("something/else", ""),
    ],
)
def test_the_same_socket_at_other_speeds(machine: Machine, peer: str, port: str) -> None:
    folder = machine.add("1-1", 2)
    (machine.root / "ports" / peer).mkdir(parents=True)
    (folder / "port").mkdir()
    (folder / "port/peer").symlink_to(machine.root / "ports" / peer)
    assert list_devices(machine.root)[0].peer_port == port


def test_no_usb_at_all(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="this machine has no USB") as caught:
        list_devices(tmp_path)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.NO_USB, ExitCode.SETUP)
    assert "container" in caught.value.remedy
