"""The command line on machines whose USB devices umockdev makes up: it stands between the program and /sys and /dev."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.machine.trees import BOOT_KEYBOARD, SMART_CARD, STORAGE, descriptors

from farplug.programs import find_program

ROOT_HUB = "/devices/pci0000:00/0000:00:14.0/usb1"

_CODE = "from farplug.cli.main import main; main()"


def device(
    port: str,
    address: int,
    raw: bytes,
    *interfaces: tuple[int, int, int],
    driver: str = "",
    node: bool = True,
    **attributes: str,
) -> str:
    """A device and its interfaces, in the format of umockdev-record."""
    path = ROOT_HUB if port == "usb1" else f"{ROOT_HUB}/{port}"
    values = {"busnum": "1", "devnum": str(address), "speed": "480", "bConfigurationValue": "1", **attributes}
    lines = [
        f"P: {path}",
        *([f"N: bus/usb/001/{address:03}", f"E: DEVNAME=/dev/bus/usb/001/{address:03}"] if node else []),
        "E: SUBSYSTEM=usb",
        "E: DEVTYPE=usb_device",
        "E: BUSNUM=001",
        f"E: DEVNUM={address:03}",
        *(f"A: {name}={value}" for name, value in values.items()),
        f"H: descriptors={raw.hex().upper()}",
        "",
    ]
    for number, (class_code, subclass, protocol) in enumerate(interfaces):
        lines += [
            f"P: {path}/{port}:1.{number}",
            "E: SUBSYSTEM=usb",
            "E: DEVTYPE=usb_interface",
            f"A: bInterfaceClass={class_code:02x}",
            f"A: bInterfaceSubClass={subclass:02x}",
            f"A: bInterfaceProtocol={protocol:02x}",
            *([f"L: driver=../../../../../../bus/usb/drivers/{driver}"] if driver else []),
            "",
        ]
    return "\n".join(lines)


HUB = device("usb1", 1, descriptors(0x1D6B, 2, (9, 0, 0), codes=(9, 0, 1)), product="xHCI Host Controller")
KEY = device(
    "1-5",
    7,
    descriptors(0x1050, 0x0407, BOOT_KEYBOARD, SMART_CARD),
    BOOT_KEYBOARD,
    SMART_CARD,
    manufacturer="Yubico",
    product="YubiKey",
    serial="0012345",
)
BUSY = device("1-6", 8, descriptors(0x1209, 1, STORAGE), STORAGE, driver="usbfs")
CUT = device("1-7", 9, descriptors(0x1209, 2, STORAGE)[:23], idVendor="1209", idProduct="0002")
LOOP = device("1-8", 10, descriptors(0x1209, 3)[:18] + b"\x09\x02\x00\x00\x01\x01\x00\x80\x32\x00\x04")


def farplug(tmp_path: Path, description: str, *arguments: str, code: str = _CODE) -> subprocess.CompletedProcess[str]:
    """Run the command line there."""
    (tmp_path / "machine.umockdev").write_text(description)
    return subprocess.run(
        [
            find_program("umockdev-run"),
            f"--device={tmp_path}/machine.umockdev",
            "--",
            sys.executable,
            "-c",
            code,
            *arguments,
        ],
        env={**os.environ, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_the_program_is_here() -> None:
    assert shutil.which("umockdev-run")


def test_devices(tmp_path: Path) -> None:
    result = farplug(tmp_path, "\n".join([HUB, KEY, BUSY, CUT, LOOP]), "devices", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    devices = {one["port"]: one for one in json.loads(result.stdout)["usb"]["devices"]}
    assert list(devices) == ["usb1", "1-5", "1-6", "1-7", "1-8"]
    key = devices["1-5"]
    assert (key["vendor_id"], key["product"], key["serial_number"]) == ("1050", "YubiKey", "0012345")
    assert [one["class"] for one in key["interfaces"]] == [list(BOOT_KEYBOARD), list(SMART_CARD)]
    assert (key["can_be_plugged"], key["node"]) == (True, "/dev/bus/usb/001/007")
    assert {port: [o["reason"] for o in one["obstacles"]] for port, one in devices.items()} == {
        "usb1": ["hub"],
        "1-5": [],
        "1-6": ["busy"],
        "1-7": ["device-fault"],
        "1-8": ["device-fault"],
    }
    assert [devices[port]["interfaces"] for port in ("1-7", "1-8")] == [[], []]
    assert [bool(devices[port]["warnings"]) for port in ("1-5", "1-7", "1-8")] == [False, True, True]


_EACH_CODE = """
import sys
from farplug.cli.main import run
for wanted in sys.argv[1:]:
    print(run(["connect", "tcp://127.0.0.1:1", "--usb-device", wanted]), file=sys.stderr)
"""


def test_refusals(tmp_path: Path) -> None:
    refusals = {
        "dead:beef": "no USB device matches 'dead:beef'",
        "port:1-6": "another program uses it",
        "usb1": "no USB device matches 'usb1'",
        "xhci": "it is a USB hub",
        "1209": "no USB device matches '1209'",
    }
    result = farplug(tmp_path, "\n".join([HUB, KEY, BUSY]), *refusals, code=_EACH_CODE)
    assert result.returncode == 0
    *outputs, rest = re.split(r"^12\n", result.stderr, flags=re.MULTILINE)
    assert rest == ""
    for output, message in zip(outputs, refusals.values(), strict=True):
        assert message in output
    assert "Traceback" not in result.stderr


def test_descriptors_that_libusb_cannot_read(tmp_path: Path) -> None:
    """One interface is there, and what follows it makes no sense."""
    raw = descriptors(0x1209, 5, STORAGE)[:-7] + b"\x00\x05\x81\x02\x00\x02\x00"
    result = farplug(
        tmp_path,
        device("1-9", 11, raw, STORAGE),
        *("connect", "tcp-listen://127.0.0.1:0"),
        *("--usb-device", "1209:0005"),
    )
    assert result.returncode == 12
    assert "libusb cannot read its descriptors" in result.stderr


def test_a_node_that_is_not_there(tmp_path: Path) -> None:
    missing = device("1-9", 11, descriptors(0x1209, 4, STORAGE), STORAGE, node=False)
    result = farplug(tmp_path, missing, "connect", "tcp://127.0.0.1:1", "--usb-device", "1209:0004")
    assert result.returncode == 12
    assert "there is no /dev/bus/usb" in result.stderr


def test_the_guest_is_reached_after_a_device_is_chosen(tmp_path: Path) -> None:
    result = farplug(tmp_path, KEY, "connect", "tcp://127.0.0.1:1", "--usb-device", "yubikey")
    assert result.returncode == 4
    assert "cannot connect to 127.0.0.1:1: Connection refused" in result.stderr


def test_doctor(tmp_path: Path) -> None:
    result = farplug(tmp_path, "\n".join([HUB, KEY, BUSY]), "doctor")
    assert result.returncode == 0
    assert "2, of which 1 can be plugged in" in result.stdout
