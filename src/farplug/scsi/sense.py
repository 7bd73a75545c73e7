"""Sense data: why a command failed (SPC-4, chapter 4.5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from farplug.usb.types import Buffer

SENSE_SIZE = 18
"""Bytes of fixed format sense data without additional bytes."""

_FIXED = struct.Struct(">BBBIB4xBBB3x")
_DESCRIPTOR = struct.Struct(">BBBB4x")


class SenseKey(IntEnum):
    """Sense key (SPC-4, table 48). All sixteen values of the field have a name."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    VENDOR_SPECIFIC = 0x9
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    RESERVED = 0xC
    VOLUME_OVERFLOW = 0xD
    MISCOMPARE = 0xE
    COMPLETED = 0xF

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Sense:
    """A sense key with its additional sense code and qualifier. ``bytes(sense)`` is the fixed format, 18 bytes."""

    key: SenseKey
    asc: int
    ascq: int

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse fixed format sense data. Raises ``ValueError`` for less than 18 bytes, or another format."""
        if len(data) < SENSE_SIZE:
            raise ValueError(f"fixed format sense data has at least {SENSE_SIZE} bytes, not {len(data)}")
        code, _, key, _, _, asc, ascq, _ = _FIXED.unpack_from(data)
        if code & 0x7E != 0x70:
            raise ValueError(f"response code {code & 0x7F:02x} is not fixed format sense data")
        return cls(SenseKey(key & 0x0F), asc, ascq)

    def __bytes__(self) -> bytes:
        return _FIXED.pack(0x70, 0, self.key, 0, SENSE_SIZE - 8, self.asc, self.ascq, 0)

    def descriptor_format(self) -> bytes:
        """Return descriptor format sense data without descriptors, 8 bytes (SPC-4, chapter 4.5.2)."""
        return _DESCRIPTOR.pack(0x72, self.key, self.asc, self.ascq)

    def __str__(self) -> str:
        return f"{self.key} ({self.key:02X}/{self.asc:02X}/{self.ascq:02X})"


NO_SENSE = Sense(SenseKey.NO_SENSE, 0x00, 0x00)
WRITE_ERROR = Sense(SenseKey.MEDIUM_ERROR, 0x0C, 0x00)
UNRECOVERED_READ_ERROR = Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x00)
PARAMETER_LIST_LENGTH_ERROR = Sense(SenseKey.ILLEGAL_REQUEST, 0x1A, 0x00)
INVALID_COMMAND = Sense(SenseKey.ILLEGAL_REQUEST, 0x20, 0x00)
MEDIUM_NOT_PRESENT_TRAY_CLOSED = Sense(SenseKey.NOT_READY, 0x3A, 0x01)
MEDIUM_NOT_PRESENT_TRAY_OPEN = Sense(SenseKey.NOT_READY, 0x3A, 0x02)
LBA_OUT_OF_RANGE = Sense(SenseKey.ILLEGAL_REQUEST, 0x21, 0x00)
INVALID_FIELD_IN_CDB = Sense(SenseKey.ILLEGAL_REQUEST, 0x24, 0x00)
LOGICAL_UNIT_NOT_SUPPORTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x25, 0x00)
INVALID_FIELD_IN_PARAMETER_LIST = Sense(SenseKey.ILLEGAL_REQUEST, 0x26, 0x00)
INCOMPATIBLE_FORMAT = Sense(SenseKey.ILLEGAL_REQUEST, 0x30, 0x02)
SAVING_PARAMETERS_NOT_SUPPORTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x39, 0x00)
REMOVAL_PREVENTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x53, 0x02)
ILLEGAL_MODE_FOR_THIS_TRACK = Sense(SenseKey.ILLEGAL_REQUEST, 0x64, 0x00)
MEDIUM_MAY_HAVE_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x28, 0x00)
RESET_OCCURRED = Sense(SenseKey.UNIT_ATTENTION, 0x29, 0x00)
ABORTED_COMMAND = Sense(SenseKey.ABORTED_COMMAND, 0x00, 0x00)
CAPACITY_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)
WRITE_PROTECTED = Sense(SenseKey.DATA_PROTECT, 0x27, 0x00)
SPACE_ALLOCATION_FAILED = Sense(SenseKey.DATA_PROTECT, 0x27, 0x07)
MISCOMPARE = Sense(SenseKey.MISCOMPARE, 0x1D, 0x00)
