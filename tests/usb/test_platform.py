"""The expected bytes are written from the tables of the specifications."""

from __future__ import annotations

import pytest

from farplug.usb.platform import (
    WindowsDriver,
    ms_os_20_capability,
    ms_os_20_set,
    url_descriptor,
    webusb_capability,
)

GUID = "{01234567-89ab-cdef-0123-456789ABCDEF}"


def test_ms_os_20_capability() -> None:
    assert bytes(ms_os_20_capability(0x9E, 0x20)) == bytes.fromhex(
        "1c 10 05 00  df60ddd8 8945 c74c 9cd2659d9e648a9f  00000306 9e00 20 00"
    )


def test_webusb_capability() -> None:
    assert bytes(webusb_capability(0x21)) == bytes.fromhex(
        "18 10 05 00  38b60834 a909 a047 8bfda0768815b665  0001 21 01"
    )


def test_the_set_of_a_device_with_one_interface() -> None:
    assert ms_os_20_set([(0, WindowsDriver())], composite=False) == bytes.fromhex(
        "0a00 0000 00000306 1e00  1400 0300 57494e5553420000 0000000000000000"
    )


def test_the_set_of_a_composite_device() -> None:
    drivers = [(0, WindowsDriver("WINNCM")), (3, WindowsDriver(interface_guids=(GUID,)))]
    built = ms_os_20_set(drivers, composite=True)
    first = bytes.fromhex("0800 0200 00 00 1c00  1400 0300 57494e4e434d0000 0000000000000000")
    guids = f"{GUID}\0\0".encode("utf-16-le")
    second = (
        bytes.fromhex("0800 0200 03 00 a000  1400 0300 57494e5553420000 0000000000000000  8400 0400 0700 2a00")
        + "DeviceInterfaceGUIDs\0".encode("utf-16-le")
        + bytes.fromhex("5000")
        + guids
    )
    total = 10 + 8 + len(first) + len(second)
    assert built == (
        bytes.fromhex("0a00 0000 00000306")
        + total.to_bytes(2, "little")
        + bytes.fromhex("0800 0100 00 00")
        + (total - 10).to_bytes(2, "little")
        + first
        + second
    )


@pytest.mark.parametrize("id", ["", "NINE CHARS", "WINÜSB"])
def test_invalid_ids(id: str) -> None:
    with pytest.raises(ValueError, match="not a valid compatible id"):
        WindowsDriver(id)


@pytest.mark.parametrize("guid", ["", GUID[1:-1], "{0123}", GUID.replace("-", "")])
def test_invalid_guids(guid: str) -> None:
    with pytest.raises(ValueError, match="not a valid GUID"):
        WindowsDriver(interface_guids=(guid,))


def test_urls() -> None:
    assert url_descriptor("https://example.org/x") == b"\x10\x03\x01example.org/x"
    assert url_descriptor("http://a") == b"\x04\x03\x00a"
    assert len(url_descriptor("http://" + "a" * 252)) == 255
    with pytest.raises(ValueError, match="252 bytes"):
        url_descriptor("https://" + "a" * 253)
    with pytest.raises(ValueError, match="landing page"):
        url_descriptor("file:///etc/passwd")
