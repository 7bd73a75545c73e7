from __future__ import annotations

from collections.abc import Sequence

import pytest

from farplug.errors import DeviceError, Reason, UsageError
from farplug.exit_codes import ExitCode, exit_code
from farplug.machine.choose import MAX_LISTED, Choice
from farplug.machine.device_info import DeviceInfo

DEVICES = (
    DeviceInfo(1, 1, "usb1", 0x1D6B, 2, codes=(9, 0, 1), product="xHCI Host Controller"),
    DeviceInfo(1, 5, "1-2", 0x1050, 0x0407, manufacturer="Yubico", product="YubiKey", serial_number="A1"),
    DeviceInfo(1, 6, "1-5", 0x1050, 0x0407, manufacturer="Yubico", product="YubiKey", serial_number="B2"),
    DeviceInfo(1, 7, "1-2.3", 0x046D, 0xC31C, manufacturer="Logitech", product="Keyboard K120"),
    DeviceInfo(2, 2, "2-1", 0x0781, 0x5581, manufacturer="SanDisk", product="Ultra", serial_number="1050:0407"),
    DeviceInfo(2, 3, "2-3", 0x0403, 0x6001, manufacturer="FTDI", product="FT232 Ünit"),
    DeviceInfo(2, 4, "2-4", 0x05E3, 0x0610, codes=(9, 0, 1), product="SanDisk Hub"),
)


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("046d:c31c", "1-2.3"),
        ("046D:C31C", "1-2.3"),
        ("0x046d:0xc31c", "1-2.3"),
        ("46d:c31c", "1-2.3"),
        ("1-2.3", "1-2.3"),
        ("01-02.03", "1-2.3"),
        ("1-7", "1-2.3"),
        ("001-007", "1-2.3"),
        ("2-1", "2-1"),
        ("2-2", "2-1"),
        ("port:1-5", "1-5"),
        ("address:1-5", "1-2"),
        ("port:1-2", "1-2"),
        ("serial:A1", "1-2"),
        ("serial:1050:0407", "2-1"),
        ("logitech", "1-2.3"),
        ("KEYBOARD", "1-2.3"),
        ("Logitech Key", "1-2.3"),
        ("ünit", "2-3"),
        ("name:ultra", "2-1"),
        ("sandisk", "2-1"),  # and not the hub
        ("xhci", "usb1"),
        ("SanDisk Hub", "2-4"),
        ("1d6b:2", "usb1"),
    ],
)
def test_one_device(text: str, port: str) -> None:
    assert Choice.parse(text).choose(DEVICES).port == port


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text cannot name a USB device"),
        ("   ", "an empty text"),
        ("1050:", "is not a valid VID:PID"),
        (":", "is not a valid VID:PID"),
        ("10500:0407", "is not a valid VID:PID"),
        ("0x:1", "is not a valid VID:PID"),
        ("1-", "is not a valid location"),
        ("1-2.", "is not a valid location"),
        ("1-2.3.4.5.6.7.8.9", "is not a valid location"),
        ("12345-1", "is not a valid location"),
        ("serial:", "nothing follows the colon"),
        ("serial:  ", "nothing follows the colon"),
        ("port:", "nothing follows the colon"),
        ("port:abc", "is not a valid port: write port:BUS-PORT.PORT"),
        ("address:1-2.3", "is not a valid address: write address:BUS-ADDRESS"),
        ("x" * 257, "it has 257 characters, more than 256"),
    ],
)
def test_invalid_texts(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Choice.parse(text)
    assert message in caught.value.message
    assert len(caught.value.message) < 160
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.BAD_OPTION, ExitCode.USAGE)
    assert "VID:PID" in caught.value.remedy
    assert caught.value.remedy.command == "farplug devices"


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("1050:0407", ("1-2 ", "1-5 ")),
        ("yubi", ("1-2 ", "1-5 ")),
        ("1-5", ("1-2 ", "1-5 ")),  # the address of one, the port of the other
        ("k", ("1-2 ", "1-5 ", "1-2.3 ", "2-1 ")),
    ],
)
def test_ambiguity_is_listed(text: str, listed: Sequence[str]) -> None:
    with pytest.raises(UsageError, match=f"{len(listed)} USB devices match '{text}'") as caught:
        Choice.parse(text).choose(DEVICES)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.AMBIGUOUS, ExitCode.USAGE)
    how, *lines = caught.value.remedy.splitlines()
    assert how == "name one by its port (port:1-2) or serial number:"
    assert [line.startswith(port) for line, port in zip(lines, listed, strict=True)] == [True] * len(listed)
    assert lines[0].split() == ["1-2", "bus", "1", "address", "5", "1050:0407", "Yubico", "YubiKey", "serial:A1"]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("1050:9999", ["1-2", "1-5"]),
        ("9999:0001", ["1-2", "1-5", "1-2.3", "2-1", "2-3"]),
        ("logitec keybord", ["1-2.3"]),
        ("serial:A12", ["1-2"]),
        ("1-9", ["1-2", "1-5", "1-2.3", "2-1", "2-3"]),
        ("zzzzzz", ["1-2", "1-5", "1-2.3", "2-1", "2-3"]),
    ],
)
def test_no_match_lists_the_nearest(text: str, near: Sequence[str]) -> None:
    with pytest.raises(DeviceError, match=f"no USB device matches '{text}'") as caught:
        Choice.parse(text).choose(DEVICES)
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.NOT_FOUND, ExitCode.DEVICE)
    head, *lines, last = caught.value.remedy.splitlines()
    assert (head, last) == ("these are plugged in:", "to wait until the device is plugged in")
    assert (caught.value.remedy.setting, caught.value.remedy.value) == ("rules.wait", True)
    assert [line.split()[0] for line in lines] == near


def test_nothing_is_plugged_in() -> None:
    with pytest.raises(DeviceError) as caught:
        Choice.parse("1050:0407").choose(DEVICES[:1])
    assert caught.value.remedy.startswith("no USB device is plugged in\n")


def test_long_lists_are_cut() -> None:
    many = [DeviceInfo(1, address, f"1-{address}", 1, 2) for address in range(2, 100)]
    with pytest.raises(UsageError) as caught:
        Choice.parse("1:2").choose(many)
    lines = caught.value.remedy.splitlines()
    assert len(lines) == MAX_LISTED + 2
    assert lines[-1] == "and 82 more"
