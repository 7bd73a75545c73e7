"""Platform capabilities of a device: drivers for Windows without an INF file, and pages for browsers.

Sources: Microsoft OS 2.0 Descriptors Specification; WebUSB API, chapters 4 and 5; USB 3.2 specification, table 9-19.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from farplug.usb.descriptors import OtherCapability
from farplug.usb.types import DescriptorType

MS_OS_20_INDEX = 7
"""wIndex of the request for the descriptor set (MS_OS_20_DESCRIPTOR_INDEX)."""
WEBUSB_URL_INDEX = 2
"""wIndex of the request for a URL (GET_URL)."""

_PLATFORM = 5
"""bDevCapabilityType."""
_MS_OS_20 = UUID("d8dd60df-4589-4cc7-9cd2-659d9e648a9f")
_WEBUSB = UUID("3408b638-09a9-47a0-8bfd-a0768815b665")
_WINDOWS_8_1 = 0x06030000
_COMPATIBLE_ID_SIZE = 8
_MULTI_STRING = 7
"""REG_MULTI_SZ."""
_URL = 3
"""bDescriptorType of a URL descriptor."""
_SCHEMES = ("http://", "https://")
_MAX_URL = 255 - 3


def _platform(uuid: UUID, data: bytes) -> OtherCapability:
    kind = DescriptorType.DEVICE_CAPABILITY
    return OtherCapability(bytes((20 + len(data), kind, _PLATFORM, 0)) + uuid.bytes_le + data)


@dataclass(frozen=True, slots=True)
class WindowsDriver:
    """The driver that Windows uses for a function.

    Attributes:
        compatible_id: ``WINUSB``, or the id of another driver of Windows, such as ``WINNCM``.
        interface_guids: the device interface GUIDs with which programs find the function, such as
            ``{01234567-89ab-cdef-0123-456789abcdef}``.

    Raises:
        ValueError: the id has more than 8 ASCII characters, or a GUID is not valid.
    """

    compatible_id: str = "WINUSB"
    interface_guids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.compatible_id.isascii() or not 1 <= len(self.compatible_id) <= _COMPATIBLE_ID_SIZE:
            raise ValueError(f"{self.compatible_id!r} is not a valid compatible id: 1 to 8 ASCII characters")
        for guid in self.interface_guids:
            try:
                valid = f"{{{UUID(guid)}}}" == guid.lower()
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"{guid!r} is not a valid GUID: {{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}}")

    def __bytes__(self) -> bytes:
        """Build the feature descriptors (tables 13 and 15)."""
        id = self.compatible_id.encode().ljust(_COMPATIBLE_ID_SIZE, b"\0")
        built = struct.pack("<HH", 20, 3) + id + bytes(8)
        if self.interface_guids:
            name = "DeviceInterfaceGUIDs\0".encode("utf-16-le")
            value = "".join(f"{guid}\0" for guid in (*self.interface_guids, "")).encode("utf-16-le")
            total = 10 + len(name) + len(value)
            built += struct.pack("<HHHH", total, 4, _MULTI_STRING, len(name)) + name
            built += struct.pack("<H", len(value)) + value
        return built


def ms_os_20_set(drivers: Sequence[tuple[int, WindowsDriver]], *, composite: bool) -> bytes:
    """Build the descriptor set of a device (table 10).

    Args:
        drivers: the number of the first interface of each function, and its driver.
        composite: whether the device has several interfaces: Windows then has a device for each function.
    """
    if composite:
        functions = b"".join(
            struct.pack("<HHBBH", 8, 2, first, 0, 8 + len(bytes(driver))) + bytes(driver) for first, driver in drivers
        )
        # bConfigurationValue is an index here: 0 is the first configuration.
        body = struct.pack("<HHBBH", 8, 1, 0, 0, 8 + len(functions)) + functions
    else:
        body = b"".join(bytes(driver) for _, driver in drivers)
    return struct.pack("<HHIH", 10, 0, _WINDOWS_8_1, 10 + len(body)) + body


def ms_os_20_capability(size: int, vendor_code: int) -> OtherCapability:
    """Make the capability that announces a descriptor set of ``size`` bytes, read with request ``vendor_code``."""
    return _platform(_MS_OS_20, struct.pack("<IHBB", _WINDOWS_8_1, size, vendor_code, 0))


def webusb_capability(vendor_code: int) -> OtherCapability:
    """Make the capability that announces a landing page, which is URL 1 of request ``vendor_code``."""
    return _platform(_WEBUSB, struct.pack("<HBB", 0x0100, vendor_code, 1))


def url_descriptor(url: str) -> bytes:
    """Build the descriptor of a URL (WebUSB, chapter 4.3.1).

    Raises:
        ValueError: the URL does not begin with http:// or https://, or is longer than 252 bytes.
    """
    for number, scheme in enumerate(_SCHEMES):
        if url.startswith(scheme):
            rest = url.removeprefix(scheme).encode()
            if len(rest) > _MAX_URL:
                raise ValueError(f"a URL has at most {_MAX_URL} bytes after its scheme, not {len(rest)}")
            return bytes((3 + len(rest), _URL, number)) + rest
    raise ValueError(f"{url!r} is not a valid landing page: it begins with {' or '.join(_SCHEMES)}")
