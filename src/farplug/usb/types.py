"""USB types: speeds, transfer types, directions, requests, interfaces and endpoints.

Sources: USB 2.0 specification, chapter 9; USB 3.2 specification, chapter 9.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Self, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes that are passed on without a copy. The caller must not change them afterwards."""


class Speed(IntEnum):
    """The speed of a device, slowest first."""

    LOW = 0
    """1.5 Mb/s"""
    FULL = 1
    """12 Mb/s"""
    HIGH = 2
    """480 Mb/s"""
    SUPER = 3
    """5 Gb/s"""
    SUPER_PLUS = 4
    """10 Gb/s and more"""

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


class TransferType(IntEnum):
    """bmAttributes bits 1..0 of an endpoint descriptor (USB 2.0, table 9-13)."""

    CONTROL = 0
    ISOCHRONOUS = 1
    BULK = 2
    INTERRUPT = 3

    def __str__(self) -> str:
        return self.name.lower()


class Direction(IntEnum):
    """Bit 7 of bEndpointAddress and of bmRequestType, as the host sees it."""

    OUT = 0x00
    IN = 0x80


class RequestType(IntEnum):
    """bmRequestType bits 6..5 (USB 2.0, table 9-2)."""

    STANDARD = 0
    CLASS = 1
    VENDOR = 2
    RESERVED = 3


class Recipient(IntEnum):
    """bmRequestType bits 4..0 (USB 2.0, table 9-2)."""

    DEVICE = 0
    INTERFACE = 1
    ENDPOINT = 2
    OTHER = 3
    RESERVED = 31

    @classmethod
    def _missing_(cls, value: object) -> Recipient:
        return cls.RESERVED


class StandardRequest(IntEnum):
    """bRequest of the standard requests (USB 2.0, table 9-4; USB 3.2, table 9-5)."""

    GET_STATUS = 0
    CLEAR_FEATURE = 1
    SET_FEATURE = 3
    SET_ADDRESS = 5
    GET_DESCRIPTOR = 6
    SET_DESCRIPTOR = 7
    GET_CONFIGURATION = 8
    SET_CONFIGURATION = 9
    GET_INTERFACE = 10
    SET_INTERFACE = 11
    SYNCH_FRAME = 12
    SET_SEL = 48
    SET_ISOCH_DELAY = 49


class DescriptorType(IntEnum):
    """bDescriptorType (USB 2.0, table 9-5; USB 3.2, table 9-6; class-specific types)."""

    DEVICE = 1
    CONFIGURATION = 2
    STRING = 3
    INTERFACE = 4
    ENDPOINT = 5
    DEVICE_QUALIFIER = 6
    OTHER_SPEED_CONFIGURATION = 7
    INTERFACE_POWER = 8
    OTG = 9
    DEBUG = 10
    INTERFACE_ASSOCIATION = 11
    BOS = 15
    DEVICE_CAPABILITY = 16
    CS_INTERFACE = 36
    CS_ENDPOINT = 37
    SUPERSPEED_ENDPOINT_COMPANION = 48
    SUPERSPEED_PLUS_ISO_ENDPOINT_COMPANION = 49


class Feature(IntEnum):
    """Feature selectors (USB 2.0, table 9-6; USB 3.2, table 9-7)."""

    ENDPOINT_HALT = 0
    FUNCTION_SUSPEND = 0
    DEVICE_REMOTE_WAKEUP = 1
    TEST_MODE = 2
    U1_ENABLE = 48
    U2_ENABLE = 49
    LTM_ENABLE = 50


_SETUP = struct.Struct("<BBHHH")


@dataclass(frozen=True, slots=True)
class Setup:
    """The eight bytes that begin a control transfer (USB 2.0, table 9-2).

    Attributes:
        request_type: bmRequestType, raw.
        request: bRequest.
        value: wValue.
        index: wIndex.
        length: wLength, bytes in the data stage.
    """

    request_type: int
    request: int
    value: int = 0
    index: int = 0
    length: int = 0

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse a setup packet. Raises ``ValueError`` if it does not have eight bytes."""
        if len(data) != _SETUP.size:
            raise ValueError(f"a setup packet has {_SETUP.size} bytes, not {len(data)}")
        return cls(*_SETUP.unpack(data))

    def __bytes__(self) -> bytes:
        return _SETUP.pack(self.request_type, self.request, self.value, self.index, self.length)

    @property
    def direction(self) -> Direction:
        """Return the direction of the data stage."""
        return Direction.IN if self.request_type & 0x80 else Direction.OUT

    @property
    def type(self) -> RequestType:
        """Return the type of the request: standard, class or vendor."""
        return RequestType(self.request_type >> 5 & 3)

    @property
    def recipient(self) -> Recipient:
        """Return the recipient of the request."""
        return Recipient(self.request_type & 0x1F)

    def __str__(self) -> str:
        return (
            f"{self.request_type:02x} {self.request:02x} value={self.value:04x} index={self.index:04x} "
            f"length={self.length}"
        )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint of the current setting of an interface.

    Attributes:
        address: bEndpointAddress; bit 7 is the direction.
        type: its transfer type.
        max_packet_size: wMaxPacketSize in bytes, without the transactions-per-microframe bits. For isochronous
            endpoints the bytes in an interval: times the transactions, from SuperSpeed on times burst and mult.
        interval: bInterval, raw; at least 1 for interrupt and isochronous endpoints.
        max_streams: the number of bulk streams (SuperSpeed companion); 0 if none.
    """

    address: int
    type: TransferType
    max_packet_size: int
    interval: int = 0
    max_streams: int = 0

    @property
    def direction(self) -> Direction:
        """Return the direction, as the host sees it."""
        return Direction(self.address & 0x80)

    @property
    def number(self) -> int:
        """Return the endpoint number, without the direction."""
        return self.address & 0x0F


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface in its current alternate setting."""

    number: int
    alternate: int
    interface_class: int
    interface_subclass: int
    interface_protocol: int
    endpoints: tuple[Endpoint, ...] = ()
