"""What the functions of the communications class have in common: descriptors and notifications.

Sources: Class Definitions for Communications Devices 1.2 (CDC); its subclasses PSTN 1.2 and NCM 1.0.
"""

from __future__ import annotations

import struct
from typing import Final

CLASS_COMMUNICATIONS: Final = 0x02
CLASS_DATA: Final = 0x0A
SUBCLASS_ACM: Final = 0x02
SUBCLASS_NCM: Final = 0x0D

NETWORK_CONNECTION: Final = 0x00
SERIAL_STATE: Final = 0x20
CONNECTION_SPEED_CHANGE: Final = 0x2A

_CS_INTERFACE: Final = 0x24
_HEADER, _CALL_MANAGEMENT, _ACM, _UNION = 0x00, 0x01, 0x02, 0x06
_ETHERNET, _NCM = 0x0F, 0x1A
_NOTIFICATION: Final = 0xA1
"""bmRequestType of notifications."""


def _functional(subtype: int, payload: bytes) -> bytes:
    return bytes((3 + len(payload), _CS_INTERFACE, subtype)) + payload


def header() -> bytes:
    """Return the header descriptor (CDC, section 5.2.3.1), which is the first one."""
    return _functional(_HEADER, b"\x10\x01")


def union(control: int, data: int) -> bytes:
    """Return the union descriptor (CDC, section 5.2.3.2) of two interfaces, with the device's numbers."""
    return _functional(_UNION, bytes((control, data)))


def call_management(data: int) -> bytes:
    """Return the call management descriptor (PSTN, section 5.3.1) of a line without calls."""
    return _functional(_CALL_MANAGEMENT, bytes((0, data)))


def abstract_control(capabilities: int) -> bytes:
    """Return the abstract control management descriptor (PSTN, section 5.3.2)."""
    return _functional(_ACM, bytes((capabilities,)))


def ethernet(mac_string: int, max_segment_size: int) -> bytes:
    """Return the Ethernet networking descriptor (ECM 1.2, section 5.4).

    Args:
        mac_string: index of the string with the guest's address.
        max_segment_size: bytes of a frame, header included.
    """
    return _functional(_ETHERNET, struct.pack("<BIHHB", mac_string, 0, max_segment_size, 0, 0))


def ncm(capabilities: int) -> bytes:
    """Return the NCM descriptor (NCM, section 5.2.1)."""
    return _functional(_NCM, struct.pack("<HB", 0x0100, capabilities))


def notification(code: int, value: int, interface: int, data: bytes = b"") -> bytes:
    """Return a notification (CDC, section 6.3).

    Args:
        code: bNotificationCode.
        value: wValue.
        interface: the device's number of the control interface.
        data: what follows the header.
    """
    return struct.pack("<BBHHH", _NOTIFICATION, code, value, interface, len(data)) + data
