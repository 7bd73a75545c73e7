"""Choose a device of this machine by what a user wrote: exactly one, or an error that lists the candidates."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from farplug.errors import DeviceError, FarplugError, Reason, Remedy, UsageError
from farplug.machine.device_info import DeviceInfo

FORMS: Final = "VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:NUMBER, or a part of its name"
MAX_TEXT: Final = 256
"""Characters of a choice. USB strings have at most 126."""
MAX_LISTED: Final = 16
"""Devices that an error lists."""


class _Form(Enum):
    """What a user named a device by."""

    ID = "id"
    LOCATION = "location"
    PORT = "port"
    ADDRESS = "address"
    SERIAL = "serial"
    NAME = "name"


_PREFIXES = {f"{form.value}:": form for form in (_Form.PORT, _Form.ADDRESS, _Form.SERIAL, _Form.NAME)}
_ID = re.compile(r"(?:0x)?([0-9a-f]{1,4}):(?:0x)?([0-9a-f]{1,4})", re.IGNORECASE | re.ASCII)
_LOCATION = re.compile(r"([0-9]{1,4})-([0-9]{1,3})((?:\.[0-9]{1,3}){0,6})", re.ASCII)
_LOOKS_LIKE_ID = re.compile(r"[0-9a-fx]*:[0-9a-fx]*", re.IGNORECASE | re.ASCII)
_LOOKS_LIKE_LOCATION = re.compile(r"[0-9]+-[0-9.]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a user wrote to name a device.

    ``1-5`` matches a device with this address (as in ``lsusb``) or in this port; ``address:1-5`` and ``port:1-5`` match
    only one of the two.

    Attributes:
        text: what the user wrote.
        form: what the text names a device by.
        value: what is compared with the devices.
    """

    text: str
    form: _Form
    value: str | tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Parse what the user wrote.

        Raises:
            UsageError: the text cannot name a device (``BAD_OPTION``).
        """
        if len(text) > MAX_TEXT:
            raise _bad(
                f"{text[:40]!r}... cannot name a USB device: it has {len(text)} characters, more than {MAX_TEXT}"
            )
        for prefix, form in _PREFIXES.items():
            if text.startswith(prefix):
                return cls(text, form, cls._prefixed(text, form, text.removeprefix(prefix).strip()))
        if match := _ID.fullmatch(text):
            return cls(text, _Form.ID, (int(match[1], 16), int(match[2], 16)))
        if match := _LOCATION.fullmatch(text):
            return cls(text, _Form.PORT if match[3] else _Form.LOCATION, _normal_port(match))
        if not text.strip():
            raise _bad("an empty text cannot name a USB device")
        if _LOOKS_LIKE_ID.fullmatch(text):
            raise _bad(f"{text!r} is not a valid VID:PID: write two numbers of 4 hexadecimal digits, as 1050:0407")
        if _LOOKS_LIKE_LOCATION.fullmatch(text):
            raise _bad(f"{text!r} is not a valid location: write BUS-ADDRESS (1-5) or BUS-PORT.PORT (2-1.3)")
        return cls(text, _Form.NAME, text.strip().casefold())

    @staticmethod
    def _prefixed(text: str, form: _Form, value: str) -> str | tuple[int, int]:
        if not value:
            raise _bad(f"{text!r} cannot name a USB device: nothing follows the colon")
        if form is _Form.SERIAL:
            return value
        if form is _Form.NAME:
            return value.casefold()
        match = _LOCATION.fullmatch(value)
        if match is None or (form is _Form.ADDRESS and match[3]):
            written = "BUS-ADDRESS (1-5)" if form is _Form.ADDRESS else "BUS-PORT.PORT (2-1.3)"
            raise _bad(f"{text!r} is not a valid {form.value}: write {form.value}:{written}")
        return _normal_port(match)

    @property
    def is_location(self) -> bool:
        """Return whether the choice names a location (address or port) instead of a device."""
        return self.form in (_Form.LOCATION, _Form.PORT, _Form.ADDRESS)

    def matches(self, device: DeviceInfo) -> bool:
        """Return whether the choice names this device."""
        return _MATCHERS[self.form](device, self.value)

    def candidates(self, devices: Sequence[DeviceInfo]) -> list[DeviceInfo]:
        """Return the devices that the choice names; hubs only if no other device matches."""
        named = [device for device in devices if self.matches(device)]
        return [device for device in named if not device.is_hub] or named

    def choose(self, devices: Sequence[DeviceInfo]) -> DeviceInfo:
        """Return the one device that the choice names.

        Raises:
            DeviceError: no device matches (``NOT_FOUND``); the remedy lists the nearest ones.
            UsageError: several devices match (``AMBIGUOUS``); the remedy lists them.
        """
        named = self.candidates(devices)
        if len(named) == 1:
            return named[0]
        if named:
            raise UsageError(
                f"{len(named)} USB devices match {self.text!r}",
                reason=Reason.AMBIGUOUS,
                remedy=f"name one by its port (port:{named[0].port}) or serial number:\n{table(named)}",
            )
        raise self.not_found(devices)

    def not_found(self, devices: Sequence[DeviceInfo]) -> FarplugError:
        """Return the error to raise when no device matches."""
        near = self._nearest([device for device in devices if not device.is_hub])
        listed = f"these are plugged in:\n{table(near)}" if near else "no USB device is plugged in"
        return DeviceError(
            f"no USB device matches {self.text!r}",
            reason=Reason.NOT_FOUND,
            remedy=Remedy(f"{listed}\nto wait until the device is plugged in", setting="rules.wait", value=True),
        )

    def _nearest(self, devices: Sequence[DeviceInfo]) -> Sequence[DeviceInfo]:
        """Return the devices that resemble the choice; all devices if none does."""
        near: Sequence[DeviceInfo] = ()
        if isinstance(self.value, tuple):
            near = [device for device in devices if self.value[0] == device.vendor_id]
        elif self.form in (_Form.NAME, _Form.SERIAL):
            attribute = (lambda device: device.serial_number) if self.form is _Form.SERIAL else _full_name
            names = {
                word: device for device in devices for word in (attribute(device), *attribute(device).split()) if word
            }
            close = difflib.get_close_matches(self.value, names, n=MAX_LISTED)
            near = list(dict.fromkeys(names[name] for name in close))
        return near or devices

    def __str__(self) -> str:
        return self.text


def _normal_port(match: re.Match[str]) -> str:
    """Return a port without leading zeros, as the kernel writes it."""
    return f"{int(match[1])}-{int(match[2])}" + "".join(f".{int(port)}" for port in match[3].split(".")[1:])


def _full_name(device: DeviceInfo) -> str:
    return f"{device.manufacturer} {device.product}".strip().casefold()


def _address(device: DeviceInfo) -> str:
    return f"{device.bus}-{device.address}"


_MATCHERS: dict[_Form, Callable[[DeviceInfo, str | tuple[int, int]], bool]] = {
    _Form.ID: lambda device, value: (device.vendor_id, device.product_id) == value,
    _Form.LOCATION: lambda device, value: value in (_address(device), device.port),
    _Form.PORT: lambda device, value: value == device.port,
    _Form.ADDRESS: lambda device, value: value == _address(device),
    _Form.SERIAL: lambda device, value: value == device.serial_number,
    _Form.NAME: lambda device, value: str(value) in _full_name(device),
}


def table(devices: Sequence[DeviceInfo]) -> str:
    """Return a table of devices, one a line, at most :data:`MAX_LISTED`."""
    rows = [
        (device.port, f"bus {device.bus} address {device.address}", device.id, _about(device))
        for device in devices[:MAX_LISTED]
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    more = len(devices) - MAX_LISTED
    return "\n".join(line.rstrip() for line in [*lines, *([f"and {more} more"] if more > 0 else [])])


def _about(device: DeviceInfo) -> str:
    serial = f"serial:{device.serial_number}" if device.serial_number else ""
    return f"{device.name or '(no name)'}  {serial}"


def _bad(message: str) -> UsageError:
    return UsageError(
        message,
        reason=Reason.BAD_OPTION,
        remedy=Remedy(f"name the device by {FORMS}; this command lists the devices", command="farplug devices"),
    )
