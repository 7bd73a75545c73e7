"""Names of USB classes.

Source: "USB Defined Class Codes", usb.org; the names are those of lsusb, in lower case and joined by hyphens.
"""

from __future__ import annotations

from typing import Final

HUB: Final = 0x09

CLASS_NAMES: Final = {
    0x00: "per-interface",
    0x01: "audio",
    0x02: "communications",
    0x03: "hid",
    0x05: "physical",
    0x06: "image",
    0x07: "printer",
    0x08: "storage",
    HUB: "hub",
    0x0A: "cdc-data",
    0x0B: "smart-card",
    0x0D: "content-security",
    0x0E: "video",
    0x0F: "healthcare",
    0x10: "audio-video",
    0x11: "billboard",
    0x12: "type-c-bridge",
    0x3C: "i3c",
    0xDC: "diagnostic",
    0xE0: "wireless",
    0xEF: "miscellaneous",
    0xFE: "application",
    0xFF: "vendor-specific",
}
CLASS_CODES: Final = {name: code for code, name in CLASS_NAMES.items()}


def class_name(code: int) -> str:
    """Return the name of a bDeviceClass or bInterfaceClass; its number in two hexadecimal digits if it has none."""
    return CLASS_NAMES.get(code, f"{code:02x}")
