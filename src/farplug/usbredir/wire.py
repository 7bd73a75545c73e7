"""usbredir on the wire: packet types, headers, and how capabilities change layouts.

Source: usb-redirection-protocol.md (version 0.7) and usbredirproto.h. Everything is little-endian and packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache
from struct import Struct
from typing import Final

from farplug.usbredir.caps import Cap

MAX_TRANSFER: Final = 128 * 1024 * 1024
"""The longest bulk transfer, in bytes (C: MAX_BULK_TRANSFER_SIZE)."""
MAX_LENGTH: Final = MAX_TRANSFER + 1024
"""The longest body (type header and payload), in bytes, that a header may announce (C: MAX_PACKET_SIZE)."""
VERSION_SIZE: Final = 64
"""Bytes of the version string in a hello, its NUL included."""
TABLE_SIZE: Final = 32
"""Entries of the interface and endpoint tables."""


class PacketType(IntEnum):
    """The first word of a packet. ``str()`` is the specification's name."""

    HELLO = 0
    DEVICE_CONNECT = 1
    DEVICE_DISCONNECT = 2
    RESET = 3
    INTERFACE_INFO = 4
    EP_INFO = 5
    SET_CONFIGURATION = 6
    GET_CONFIGURATION = 7
    CONFIGURATION_STATUS = 8
    SET_ALT_SETTING = 9
    GET_ALT_SETTING = 10
    ALT_SETTING_STATUS = 11
    START_ISO_STREAM = 12
    STOP_ISO_STREAM = 13
    ISO_STREAM_STATUS = 14
    START_INTERRUPT_RECEIVING = 15
    STOP_INTERRUPT_RECEIVING = 16
    INTERRUPT_RECEIVING_STATUS = 17
    ALLOC_BULK_STREAMS = 18
    FREE_BULK_STREAMS = 19
    BULK_STREAMS_STATUS = 20
    CANCEL_DATA_PACKET = 21
    FILTER_REJECT = 22
    FILTER_FILTER = 23
    DEVICE_DISCONNECT_ACK = 24
    START_BULK_RECEIVING = 25
    STOP_BULK_RECEIVING = 26
    BULK_RECEIVING_STATUS = 27
    CONTROL_PACKET = 100
    BULK_PACKET = 101
    ISO_PACKET = 102
    INTERRUPT_PACKET = 103
    BUFFERED_BULK_PACKET = 104

    def __str__(self) -> str:
        return self.name.lower()


class Flow(Enum):
    """The direction in which a packet type is sent."""

    TO_HOST = "to the usb-host"
    TO_GUEST = "to the usb-guest"
    BOTH = "both ways"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class PacketFormat:
    """The format of a packet type: what is known before any field of a packet is read.

    Attributes:
        flow: the direction in which it is sent.
        layout: its type header without capabilities, as a format of :mod:`struct`.
        extended: longer type headers, the longest first, and the capability that both sides need for each.
        required_cap: the capability that the receiver of this type must have.
        answer_cap: the capability that the sender of this type must have: without it the sender could not receive the
            answer. The C parser does not check this one.
    """

    flow: Flow
    layout: str = ""
    extended: tuple[tuple[Cap, str], ...] = ()
    required_cap: Cap = Cap.NONE
    answer_cap: Cap = Cap.NONE

    def type_header(self, shared: Cap) -> Struct:
        """Return the layout of the type header. ``shared``: the capabilities that both sides have."""
        return _struct("<" + self._layout(shared))

    def packet(self, shared: Cap) -> Struct:
        """Return the layout of header and type header together. ``shared``: the capabilities that both sides have."""
        return _struct(header(shared).format + self._layout(shared))

    def _layout(self, shared: Cap) -> str:
        return next((layout for cap, layout in self.extended if cap in shared), self.layout)


def header(shared: Cap) -> Struct:
    """Return the layout of the header: type, length of what follows, id. ``shared``: what both sides have."""
    return _struct("<IIQ" if Cap.IDS_64_BITS in shared else "<III")


@cache
def _struct(layout: str) -> Struct:
    """Return one object for all connections: the few layouts of all packets take 20 KiB."""
    return Struct(layout)


PACKET_FORMATS: Final[Mapping[int, PacketFormat]] = {
    PacketType.HELLO: PacketFormat(Flow.BOTH, f"{VERSION_SIZE}s"),
    PacketType.DEVICE_CONNECT: PacketFormat(Flow.TO_GUEST, "BBBBHH", ((Cap.CONNECT_DEVICE_VERSION, "BBBBHHH"),)),
    PacketType.DEVICE_DISCONNECT: PacketFormat(Flow.TO_GUEST),
    PacketType.RESET: PacketFormat(Flow.TO_HOST),
    PacketType.INTERFACE_INFO: PacketFormat(Flow.TO_GUEST, "I32B32B32B32B"),
    PacketType.EP_INFO: PacketFormat(
        Flow.TO_GUEST,
        "32B32B32B",
        ((Cap.BULK_STREAMS, "32B32B32B32H32I"), (Cap.EP_INFO_MAX_PACKET_SIZE, "32B32B32B32H")),
    ),
    PacketType.SET_CONFIGURATION: PacketFormat(Flow.TO_HOST, "B"),
    PacketType.GET_CONFIGURATION: PacketFormat(Flow.TO_HOST),
    PacketType.CONFIGURATION_STATUS: PacketFormat(Flow.TO_GUEST, "BB"),
    PacketType.SET_ALT_SETTING: PacketFormat(Flow.TO_HOST, "BB"),
    PacketType.GET_ALT_SETTING: PacketFormat(Flow.TO_HOST, "B"),
    PacketType.ALT_SETTING_STATUS: PacketFormat(Flow.TO_GUEST, "BBB"),
    PacketType.START_ISO_STREAM: PacketFormat(Flow.TO_HOST, "BBB"),
    PacketType.STOP_ISO_STREAM: PacketFormat(Flow.TO_HOST, "B"),
    PacketType.ISO_STREAM_STATUS: PacketFormat(Flow.TO_GUEST, "BB"),
    PacketType.START_INTERRUPT_RECEIVING: PacketFormat(Flow.TO_HOST, "B"),
    PacketType.STOP_INTERRUPT_RECEIVING: PacketFormat(Flow.TO_HOST, "B"),
    PacketType.INTERRUPT_RECEIVING_STATUS: PacketFormat(Flow.TO_GUEST, "BB"),
    PacketType.ALLOC_BULK_STREAMS: PacketFormat(Flow.TO_HOST, "II", answer_cap=Cap.BULK_STREAMS),
    PacketType.FREE_BULK_STREAMS: PacketFormat(Flow.TO_HOST, "I", answer_cap=Cap.BULK_STREAMS),
    PacketType.BULK_STREAMS_STATUS: PacketFormat(Flow.TO_GUEST, "IIB"),
    PacketType.CANCEL_DATA_PACKET: PacketFormat(Flow.TO_HOST),
    PacketType.FILTER_REJECT: PacketFormat(Flow.TO_HOST, required_cap=Cap.FILTER),
    PacketType.FILTER_FILTER: PacketFormat(Flow.BOTH, required_cap=Cap.FILTER),
    PacketType.DEVICE_DISCONNECT_ACK: PacketFormat(Flow.TO_HOST, required_cap=Cap.DEVICE_DISCONNECT_ACK),
    PacketType.START_BULK_RECEIVING: PacketFormat(
        Flow.TO_HOST, "IIBB", required_cap=Cap.BULK_RECEIVING, answer_cap=Cap.BULK_RECEIVING
    ),
    PacketType.STOP_BULK_RECEIVING: PacketFormat(
        Flow.TO_HOST, "IB", required_cap=Cap.BULK_RECEIVING, answer_cap=Cap.BULK_RECEIVING
    ),
    PacketType.BULK_RECEIVING_STATUS: PacketFormat(Flow.TO_GUEST, "IBB", required_cap=Cap.BULK_RECEIVING),
    PacketType.CONTROL_PACKET: PacketFormat(Flow.BOTH, "BBBBHHH"),
    PacketType.BULK_PACKET: PacketFormat(Flow.BOTH, "BBHI", ((Cap.BULK_LENGTH_32_BITS, "BBHIH"),)),
    PacketType.ISO_PACKET: PacketFormat(Flow.BOTH, "BBH"),
    PacketType.INTERRUPT_PACKET: PacketFormat(Flow.BOTH, "BBH"),
    PacketType.BUFFERED_BULK_PACKET: PacketFormat(Flow.TO_GUEST, "IIBB", required_cap=Cap.BULK_RECEIVING),
}
"""The format of every packet type of protocol 0.7, by its code. :mod:`farplug.usbredir.packets` names the fields."""
