from __future__ import annotations

import json
import lzma
from functools import partial
from pathlib import Path

import pytest
from tests.cli.support import Cli, blank
from tests.machine.trees import BOOT_KEYBOARD, SMART_CARD, Machine
from tests.machine.windows import windows_machine

from farplug.machine import listing


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine."""
    machine = Machine(tmp_path / "machine")
    monkeypatch.setattr(listing, "list_devices", partial(listing.list_devices, machine.root))
    return machine


def test_kinds(cli: Cli) -> None:
    result = cli("devices")
    assert (result.code, result.err) == (0, "")
    assert "--usb-disk PATH" in result.out
    assert "--usb-disk-ro PATH" in result.out


def test_images(cli: Cli, image: Path, tmp_path: Path) -> None:
    result = cli("devices", image)
    assert result.code == 0
    assert f"{image}  can be plugged: 1.0 MB, serial number " in result.out
    before = image.stat()
    result = cli("devices", image, tmp_path / "none", tmp_path)
    assert result.code == 3
    assert "none  " in result.out
    assert "cannot be plugged" in result.out
    assert "is a folder, not an image" in result.out
    assert image.stat() == before


def test_a_file_of_another_format(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "a\u2028b.img"
    path.write_bytes(lzma.compress(bytes(1 << 20)))
    lines = cli("devices", path).out.split("\n")[-5:]
    name = f"$'{tmp_path}/a\\xe2\\x80\\xa8b"
    assert lines[0].endswith(f"{tmp_path}/a\N{REPLACEMENT CHARACTER}b.img is xz data, not a RAW disk image")
    assert [line.strip() for line in lines[1:]] == [
        "unpack it:",
        f"xz -dc {name}.img' > {name}.raw'",
        "to plug its bytes as they are: --force",
        "",
    ]
    error = json.loads(cli("devices", path, "--json").out)["images"][0]["error"]
    assert (error["reason"], error["command"]) == ("not-raw", f"xz -dc {name}.img' > {name}.raw'")
    assert (error["alternative"]["setting"], error["alternative"]["value"]) == ("storage.force", True)


def test_json(cli: Cli, image: Path, tmp_path: Path) -> None:
    result = cli("devices", image, blank(tmp_path / "empty", 0), "--json")
    assert result.code == 3
    answer = json.loads(result.out)
    options = [kind["option"].split()[0] for kind in answer["kinds"]]
    assert options == [
        "--usb-disk",
        "--usb-disk-ro",
        "--usb-cdrom",
        "--usb-folder",
        "--usb-keyboard",
        "--usb-tablet",
        "--usb-mouse",
        "--usb-touchscreen",
        "--usb-gamepad",
        "--usb-serial",
        "--usb-network",
        "--usb-fido",
        "--usb-camera",
        "--usb-device",
    ]
    good, bad = answer["images"]
    assert (good["path"], good["size"], len(good["serial_number"])) == (str(image), 1 << 20, 16)
    assert (bad["error"]["reason"], sorted(bad["error"])) == (
        "empty",
        ["command", "message", "reason", "remedy"],
    )


def test_devices_of_this_machine(cli: Cli, machine: Machine) -> None:
    machine.add("usb1", 1, 0x1D6B, 2, ((9, 0, 0),), codes=(9, 0, 1))
    key = machine.add(
        "1-5", 7, 0x1050, 0x0407, (BOOT_KEYBOARD, SMART_CARD), speed="12", product="Yubi\x1bKey", serial="9"
    )
    machine.keyboard("1-6", 8)
    machine.add("1-7", 9, 0x1209, 1, authorized="0", speed="unknown")
    result = cli("devices")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[15:] == [
        "PORT  ADDRESS  VID:PID    SPEED    CLASS            NAME",
        "1-5   1-7      1050:0407  full     hid, smart-card  Yubi\N{REPLACEMENT CHARACTER}Key (serial:9)",
        "1-6   1-8      046d:c31c  high     hid",
        "    note: it is a keyboard of this machine: while it is plugged in, it works in the VM only",
        "1-7   1-9      1209:0001  unknown  storage",
        "    cannot be plugged in: this machine does not authorize it",
        "      allow it in USBGuard, or authorize it once:",
        f"        echo 1 | sudo tee {key.parent.parent.parent}/bus/usb/devices/1-7/authorized",
    ]


def test_devices_as_json(cli: Cli, machine: Machine) -> None:
    machine.add("usb1", 1, 0x1D6B, 2, ((9, 0, 0),), codes=(9, 0, 1))
    machine.keyboard("1-6", 8)
    answer = json.loads(cli("devices", "--json", "--filter", "deny class=hid; allow").out)["usb"]
    assert answer["error"] is None
    hub, keyboard = answer["devices"]
    assert (hub["can_be_plugged"], hub["obstacles"][0]["reason"]) == (False, "hub")
    assert keyboard["vendor_id"] == "046d"
    assert keyboard["speed"] == "high"
    assert keyboard["interfaces"] == [{"number": 0, "class": [3, 1, 1], "driver": "usbhid"}]
    assert keyboard["caution"]["reason"] == "input-device"
    (obstacle,) = keyboard["obstacles"]
    assert (obstacle["reason"], obstacle["forceable"]) == ("filtered", False)
    assert "rule 1 (deny class=hid) denies its class hid (03)" in obstacle["message"]


def test_a_filter_that_allows_them(cli: Cli, machine: Machine) -> None:
    machine.add("1-6", 8)
    answer = json.loads(cli("devices", "--json", "--filter", "allow class=storage").out)["usb"]
    assert answer["devices"][0]["obstacles"] == []
    assert cli("devices", "--filter", "nonsense").code == 2


def test_nothing_is_plugged_in(cli: Cli, machine: Machine) -> None:
    machine.add("usb1", 1, 0x1D6B, 2, ((9, 0, 0),), codes=(9, 0, 1))
    assert "no USB device is plugged into this machine" in cli("devices").out


def test_no_usb(cli: Cli, machine: Machine) -> None:
    machine.devices.rmdir()
    result = cli("devices")
    assert result.code == 0
    assert "no USB devices: this machine has no USB: there is no " in result.out
    assert json.loads(cli("devices", "--json").out)["usb"]["error"]["reason"] == "no-usb"


def test_windows(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    windows_machine(monkeypatch)
    lines = cli("devices").out.splitlines()
    at = next(number for number, line in enumerate(lines) if "1234:0003" in line)
    assert lines[at + 1] == "    cannot be plugged in: its driver is not WinUSB, which libusb needs on Windows"
    assert "Zadig" in lines[at + 2]
    found = {one["product_id"]: one for one in json.loads(cli("devices", "--json").out)["usb"]["devices"]}
    assert found["0002"]["can_be_plugged"]
    (obstacle,) = found["0003"]["obstacles"]
    assert (found["0003"]["can_be_plugged"], obstacle["reason"]) == (False, "no-winusb")
