"""Which device of this machine a person means: exactly one, or an error that lists those that it could be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from farplug.errors import DeviceError, FarplugError, Reason, UsageError
from farplug.machine.device_info import Found

FORMS: Final = "VID:PID, BUS-ADDRESS, BUS-PORT.PORT, serial:NUMBER, or a part of its name"
MAX_TEXT: Final = 256
"""Characters of a choice; USB strings have at most 126."""
MAX_LISTED: Final = 16
"""Devices that an error lists."""


class _Form(Enum):
    """How a device was named."""

    ID = "id"
    PLACE = "place"
    PORT = "port"
    ADDRESS = "address"
    SERIAL = "serial"
    NAME = "name"


_PREFIXES = {f"{form.value}:": form for form in (_Form.PORT, _Form.ADDRESS, _Form.SERIAL, _Form.NAME)}
_ID = re.compile(r"(?:0x)?([0-9a-f]{1,4}):(?:0x)?([0-9a-f]{1,4})", re.IGNORECASE | re.ASCII)
_PLACE = re.compile(r"([0-9]{1,4})-([0-9]{1,3})((?:\.[0-9]{1,3}){0,6})", re.ASCII)
_LOOKS_LIKE_ID = re.compile(r"[0-9a-fx]*:[0-9a-fx]*", re.IGNORECASE | re.ASCII)
_LOOKS_LIKE_PLACE = re.compile(r"[0-9]+-[0-9.]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Choice:
    """How a person named a device.

    ``1-5`` may be an address (as in ``lsusb``) or a port: it names whatever is one of them. ``address:1-5`` and
    ``port:1-5`` tell them apart.

    Attributes:
        text: as it was written.
        form: how it is meant.
        value: what the devices are compared with.
    """

    text: str
    form: _Form
    value: str | tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Understand what was written.

        Raises:
            UsageError: it cannot name a device (``BAD_OPTION``).
        """
        if len(text) > MAX_TEXT:
            raise _bad(f"{text[:40]!r}... names no USB device: it has {len(text)} characters, more than {MAX_TEXT}")
        for prefix, form in _PREFIXES.items():
            if text.startswith(prefix):
                return cls(text, form, cls._prefixed(text, form, text.removeprefix(prefix).strip()))
        if match := _ID.fullmatch(text):
            return cls(text, _Form.ID, (int(match[1], 16), int(match[2], 16)))
        if match := _PLACE.fullmatch(text):
            return cls(text, _Form.PORT if match[3] else _Form.PLACE, _normal_port(match))
        if not text.strip():
            raise _bad("an empty text names no USB device")
        if _LOOKS_LIKE_ID.fullmatch(text):
            raise _bad(f"{text!r} is not a VID:PID: it is written as two numbers of 4 hexadecimal digits, as 1050:0407")
        if _LOOKS_LIKE_PLACE.fullmatch(text):
            raise _bad(f"{text!r} is not a place: it is written as BUS-ADDRESS (1-5) or BUS-PORT.PORT (2-1.3)")
        return cls(text, _Form.NAME, text.strip().casefold())

    @staticmethod
    def _prefixed(text: str, form: _Form, value: str) -> str | tuple[int, int]:
        if not value:
            raise _bad(f"{text!r} names no USB device: nothing follows the colon")
        if form is _Form.SERIAL:
            return value
        if form is _Form.NAME:
            return value.casefold()
        match = _PLACE.fullmatch(value)
        if match is None or (form is _Form.ADDRESS and match[3]):
            written = "BUS-ADDRESS (1-5)" if form is _Form.ADDRESS else "BUS-PORT.PORT (2-1.3)"
            raise _bad(f"{text!r} is not a valid {form.value}: it is written as {form.value}:{written}")
        return _normal_port(match)

    @property
    def is_place(self) -> bool:
        """Whether it says where a device is, and not what it is."""
        return self.form in (_Form.PLACE, _Form.PORT, _Form.ADDRESS)

    def matches(self, found: Found) -> bool:
        """Whether it names this device."""
        return _MATCHERS[self.form](found, self.value)

    def candidates(self, devices: Sequence[Found]) -> list[Found]:
        """Those that it names. A hub is only meant where nothing else is."""
        named = [found for found in devices if self.matches(found)]
        return [found for found in named if not found.is_hub] or named

    def choose(self, devices: Sequence[Found]) -> Found:
        """Find the one device that it names.

        Raises:
            DeviceError: there is none (``NOT_FOUND``); the remedy lists the nearest ones.
            UsageError: there are several (``AMBIGUOUS``); the remedy lists them.
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

    def not_found(self, devices: Sequence[Found]) -> FarplugError:
        """What to raise when no device matches."""
        near = self._nearest([found for found in devices if not found.is_hub])
        remedy = f"these are plugged in:\n{table(near)}" if near else "no USB device is plugged in"
        return DeviceError(
            f"no USB device matches {self.text!r}",
            reason=Reason.NOT_FOUND,
            remedy=f"{remedy}\nto wait until it is plugged in: --wait",
        )

    def _nearest(self, devices: Sequence[Found]) -> Sequence[Found]:
        """Those that it may have been meant to name; all if none is near."""
        near: Sequence[Found] = ()
        if isinstance(self.value, tuple):
            near = [found for found in devices if self.value[0] == found.vendor_id]
        elif self.form in (_Form.NAME, _Form.SERIAL):
            attribute = (lambda found: found.serial_number) if self.form is _Form.SERIAL else _full_name
            names = {word: found for found in devices for word in (attribute(found), *attribute(found).split()) if word}
            close = difflib.get_close_matches(self.value, names, n=MAX_LISTED)
            near = list(dict.fromkeys(names[name] for name in close))
        return near or devices

    def __str__(self) -> str:
        return self.text


def _normal_port(match: re.Match[str]) -> str:
    """Without leading zeros, as the kernel writes it."""
    return f"{int(match[1])}-{int(match[2])}" + "".join(f".{int(port)}" for port in match[3].split(".")[1:])


def _full_name(found: Found) -> str:
    return f"{found.manufacturer} {found.product}".strip().casefold()


def _address(found: Found) -> str:
    return f"{found.bus}-{found.address}"


_MATCHERS: dict[_Form, Callable[[Found, str | tuple[int, int]], bool]] = {
    _Form.ID: lambda found, value: (found.vendor_id, found.product_id) == value,
    _Form.PLACE: lambda found, value: value in (_address(found), found.port),
    _Form.PORT: lambda found, value: value == found.port,
    _Form.ADDRESS: lambda found, value: value == _address(found),
    _Form.SERIAL: lambda found, value: value == found.serial_number,
    _Form.NAME: lambda found, value: str(value) in _full_name(found),
}


def table(devices: Sequence[Found]) -> str:
    """Devices to choose from, one a line; a bounded number."""
    rows = [
        (found.port, f"bus {found.bus} address {found.address}", found.id, _about(found))
        for found in devices[:MAX_LISTED]
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    more = len(devices) - MAX_LISTED
    return "\n".join(line.rstrip() for line in [*lines, *([f"and {more} more"] if more > 0 else [])])


def _about(found: Found) -> str:
    serial = f"serial:{found.serial_number}" if found.serial_number else ""
    return f"{found.name or '(no name)'}  {serial}"


def _bad(message: str) -> UsageError:
    return UsageError(
        message, reason=Reason.BAD_OPTION, remedy=f"name it by {FORMS} ('farplug devices' lists what is there)"
    )
