"""usbredir packets: one class for each packet type of protocol 0.7.

Field names are the specification's (usb-redirection-protocol.md), not abbreviated; ``endpoint`` is bEndpointAddress,
``status`` the result of a request. Each class has its fields in wire order (``values``, ``decode``), its payload, and
a check (``fault``) with the rules of the C parser: QEMU aborts on a packet that its parser refuses. Data packets carry
a payload in the direction of the data. In the other direction ``length`` alone is the size: what an IN request asks
for, or what an OUT request has transferred.

The file is long because the protocol has 33 packet types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from struct import unpack_from
from typing import Any, ClassVar, Final, Self

from farplug.errors import RemoteProtocolError
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, Setup
from farplug.usbredir.caps import Cap
from farplug.usbredir.filter import Filter
from farplug.usbredir.wire import MAX_LENGTH, MAX_TRANSFER, TABLE_SIZE, VERSION_SIZE, PacketType

_STATUSES: Final = tuple(Status(code) for code in range(256))
_ABSENT: Final = 255

_LABELS: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "id": ("id", "{:x}".format),
    "endpoint": ("ep", "{:02x}".format),
    "endpoints": ("endpoints", "{:08x}".format),
    "vendor_id": ("vendor", "{:04x}".format),
    "product_id": ("product", "{:04x}".format),
    "device_version": ("version", "{:04x}".format),
    "request": ("request", "{:02x}".format),
    "request_type": ("request_type", "{:02x}".format),
    "value": ("value", "{:04x}".format),
    "index": ("index", "{:04x}".format),
    "stream_id": ("stream", str),
    "filter": ("filter", repr),
    "version": ("version", repr),
    "data": ("data", lambda data: f"{len(data)}B"),
}
"""The names and formats of fields in a log line, where they differ from the defaults."""


def endpoint_index(address: int) -> int:
    """Return the index of an endpoint in tables and masks of 32 endpoints: OUT 0 to 15, then IN 0 to 15."""
    return (address & 0x0F) | ((address & 0x80) >> 3)


def endpoint_address(index: int) -> int:
    """Return the endpoint address for an index: the reverse of :func:`endpoint_index`."""
    return (index & 0x0F) | ((index & 0x10) << 3)


class Packet:
    """A usbredir packet. The guest chooses the ``id`` of a request, and its answer has the same; otherwise it is 0."""

    TYPE: ClassVar[PacketType]
    MAX_PAYLOAD: ClassVar[int] = 0
    """The most bytes of payload."""

    FIELDS: ClassVar[tuple[str, ...]] = ()
    """The names of the fields without ``id``, in wire order where :meth:`decode` is not overridden."""
    __slots__ = ("id",)

    def __init__(self, *, id: int = 0) -> None:
        self.id = id

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        """Make a packet from the fields of a type header, in wire order, and the payload.

        Raises:
            RemoteProtocolError: the C parser would drop the packet, and this class cannot represent it.
        """
        fields = dict(zip(cls.FIELDS, values, strict=True))
        if "status" in fields:
            fields["status"] = _STATUSES[fields["status"]]
        return cls(id=id, **fields)

    def values(self) -> tuple[Any, ...]:
        """Return the fields of the longest type header, in wire order."""
        return tuple(getattr(self, name) for name in self.FIELDS)

    def payload(self) -> Buffer:
        """Return the payload: what follows the type header."""
        return b""

    def fault(self, to_host: bool, size: int) -> str:
        """Return why the C parser drops this packet; empty if it does not.

        Args:
            to_host: the packet is sent to the usb-host.
            size: the length of its payload, in bytes.
        """
        return ""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in ("id", *self.FIELDS))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("id", *self.FIELDS))
        return f"{type(self).__name__}({fields})"

    def __str__(self) -> str:
        return " ".join((str(self.TYPE), *(f"{label}={text}" for label, text in self._details())))

    def _details(self) -> list[tuple[str, str]]:
        details = []
        for name in ("id", *self.FIELDS):
            value = getattr(self, name)
            if name in ("data", "stream_id") and not value:
                continue
            label, show = _LABELS.get(name, (name, str))
            details.append((label, show(value)))
        return details


class Hello(Packet):
    """The first packet of each side. :meth:`Connection.start` sends ours.

    Attributes:
        version: the program's name and version, as text; cut to 63 bytes.
        caps: words of capabilities, at most :data:`MAX_CAPS_WORDS` of them.
    """

    TYPE = PacketType.HELLO
    MAX_PAYLOAD = MAX_LENGTH - VERSION_SIZE
    MAX_CAPS_WORDS: ClassVar[int] = 32
    """The most words that are stored. Protocol 0.7 defines only the first one."""

    FIELDS = ("version", "caps")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, version: str, caps: tuple[int, ...] = ()) -> None:
        self.id = id
        self.version = version
        self.caps = caps

    @property
    def capabilities(self) -> Cap:
        """Return the capabilities of the first word, without a combination that the protocol forbids."""
        return Cap(self.caps[0] if self.caps else 0).usable()

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        version = values[0][: VERSION_SIZE - 1].partition(b"\0")[0].decode(errors="replace")
        return cls(id=id, version=version, caps=unpack_from(f"<{len(payload) // 4}I", payload))

    def values(self) -> tuple[Any, ...]:
        return (self.version.encode(errors="replace")[: VERSION_SIZE - 1],)

    def payload(self) -> Buffer:
        return b"".join(word.to_bytes(4, "little") for word in self.caps)

    def _details(self) -> list[tuple[str, str]]:
        words = ",".join(f"{word:x}" for word in self.caps)
        return [("id", f"{self.id:x}"), ("version", repr(self.version)), ("caps", words)]


class DeviceConnect(Packet):
    """A device is connected. ``speed``: 0 low, 1 full, 2 high, 3 super, 255 unknown. ``device_version``: bcdDevice."""

    TYPE = PacketType.DEVICE_CONNECT
    FIELDS = (
        "speed",
        "device_class",
        "device_subclass",
        "device_protocol",
        "vendor_id",
        "product_id",
        "device_version",
    )
    __slots__ = FIELDS

    def __init__(
        self,
        *,
        id: int = 0,
        speed: int,
        device_class: int,
        device_subclass: int,
        device_protocol: int,
        vendor_id: int,
        product_id: int,
        device_version: int = 0,
    ) -> None:
        self.id = id
        self.speed = speed
        self.device_class = device_class
        self.device_subclass = device_subclass
        self.device_protocol = device_protocol
        self.vendor_id = vendor_id
        self.product_id = product_id
        self.device_version = device_version

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        return cls(id=id, **dict(zip(cls.FIELDS, values, strict=False)))


class DeviceDisconnect(Packet):
    """The device is disconnected."""

    TYPE = PacketType.DEVICE_DISCONNECT
    __slots__ = ()


class Reset(Packet):
    """Reset the device. There is no answer."""

    TYPE = PacketType.RESET
    __slots__ = ()


@dataclass(frozen=True, slots=True)
class InterfaceEntry:
    """One interface, in its current alternate setting."""

    number: int
    interface_class: int
    interface_subclass: int
    interface_protocol: int

    def __str__(self) -> str:
        codes = f"{self.interface_class:02x}/{self.interface_subclass:02x}/{self.interface_protocol:02x}"
        return f"{self.number}:{codes}"


class InterfaceInfo(Packet):
    """The interfaces of the current configuration, 32 at most."""

    TYPE = PacketType.INTERFACE_INFO
    FIELDS = ("interfaces",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, interfaces: tuple[InterfaceEntry, ...]) -> None:
        self.id = id
        self.interfaces = interfaces

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        count, *table = values
        if count > TABLE_SIZE:
            raise RemoteProtocolError(_too_many_interfaces(count))
        columns = (table[start : start + count] for start in range(0, len(table), TABLE_SIZE))
        return cls(id=id, interfaces=tuple(map(InterfaceEntry, *columns)))

    def values(self) -> tuple[Any, ...]:
        rows = [(i.number, i.interface_class, i.interface_subclass, i.interface_protocol) for i in self.interfaces]
        rows += [(0, 0, 0, 0)] * (TABLE_SIZE - len(rows))
        return (len(self.interfaces), *(number for column in zip(*rows, strict=True) for number in column))

    def fault(self, to_host: bool, size: int) -> str:
        return _too_many_interfaces(len(self.interfaces)) if len(self.interfaces) > TABLE_SIZE else ""

    def _details(self) -> list[tuple[str, str]]:
        return [("id", f"{self.id:x}"), ("interfaces", ",".join(map(str, self.interfaces)))]


def _too_many_interfaces(count: int) -> str:
    return f"interface_info has {count} interfaces, at most {TABLE_SIZE} fit"


@dataclass(frozen=True, slots=True)
class EndpointEntry:
    """One endpoint of a current alternate setting; the defaults are those of an endpoint that does not exist.

    Attributes:
        type: 0 control, 1 isochronous, 2 bulk, 3 interrupt, 255 absent.
        interval: bInterval, raw.
        interface: bInterfaceNumber.
        max_packet_size: in bytes; 0 if the peers do not both have ``EP_INFO_MAX_PACKET_SIZE``.
        max_streams: 0 if none, or if the peers do not both have ``BULK_STREAMS``.
    """

    type: int = _ABSENT
    interval: int = 0
    interface: int = 0
    max_packet_size: int = 0
    max_streams: int = 0


class EndpointInfo(Packet):
    """The endpoints, as a table of 32 by :func:`endpoint_index`."""

    TYPE = PacketType.EP_INFO
    FIELDS = ("endpoints",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoints: tuple[EndpointEntry, ...]) -> None:
        self.id = id
        self.endpoints = endpoints

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        columns = (values[start : start + TABLE_SIZE] for start in range(0, len(values), TABLE_SIZE))
        return cls(id=id, endpoints=tuple(map(EndpointEntry, *columns)))

    def values(self) -> tuple[Any, ...]:
        rows = [(e.type, e.interval, e.interface, e.max_packet_size, e.max_streams) for e in self.endpoints]
        return tuple(number for column in zip(*rows, strict=True) for number in column)

    def fault(self, to_host: bool, size: int) -> str:
        if len(self.endpoints) != TABLE_SIZE:
            return f"ep_info has {len(self.endpoints)} endpoints, the table has {TABLE_SIZE}"
        return ""

    def _details(self) -> list[tuple[str, str]]:
        present = (
            f"{endpoint_address(index):02x}:{entry.type}/{entry.max_packet_size}"
            for index, entry in enumerate(self.endpoints)
            if entry.type != _ABSENT
        )
        return [("id", f"{self.id:x}"), ("endpoints", ",".join(present))]


class SetConfiguration(Packet):
    """Set the configuration, by bConfigurationValue."""

    TYPE = PacketType.SET_CONFIGURATION
    FIELDS = ("configuration",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, configuration: int) -> None:
        self.id = id
        self.configuration = configuration


class GetConfiguration(Packet):
    """Get the configuration."""

    TYPE = PacketType.GET_CONFIGURATION
    __slots__ = ()


class ConfigurationStatus(Packet):
    """Answers set_configuration and get_configuration."""

    TYPE = PacketType.CONFIGURATION_STATUS
    FIELDS = ("status", "configuration")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, status: Status, configuration: int) -> None:
        self.id = id
        self.status = status
        self.configuration = configuration


class SetAltSetting(Packet):
    """Set the alternate setting of an interface."""

    TYPE = PacketType.SET_ALT_SETTING
    FIELDS = ("interface", "alt")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, interface: int, alt: int) -> None:
        self.id = id
        self.interface = interface
        self.alt = alt


class GetAltSetting(Packet):
    """Get the alternate setting of an interface."""

    TYPE = PacketType.GET_ALT_SETTING
    FIELDS = ("interface",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, interface: int) -> None:
        self.id = id
        self.interface = interface


class AltSettingStatus(Packet):
    """Answers set_alt_setting and get_alt_setting."""

    TYPE = PacketType.ALT_SETTING_STATUS
    FIELDS = ("status", "interface", "alt")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, status: Status, interface: int, alt: int) -> None:
        self.id = id
        self.status = status
        self.interface = interface
        self.alt = alt


class StartIsoStream(Packet):
    """Start an isochronous stream."""

    TYPE = PacketType.START_ISO_STREAM
    FIELDS = ("endpoint", "packets_per_urb", "urbs")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoint: int, packets_per_urb: int, urbs: int) -> None:
        self.id = id
        self.endpoint = endpoint
        self.packets_per_urb = packets_per_urb
        self.urbs = urbs


class StopIsoStream(Packet):
    """Stop an isochronous stream."""

    TYPE = PacketType.STOP_ISO_STREAM
    FIELDS = ("endpoint",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoint: int) -> None:
        self.id = id
        self.endpoint = endpoint


class IsoStreamStatus(Packet):
    """Answers start and stop of a stream.

    Sent without a request: ``STALL`` if the stream ended, others if it continues.
    """

    TYPE = PacketType.ISO_STREAM_STATUS
    FIELDS = ("status", "endpoint")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, status: Status, endpoint: int) -> None:
        self.id = id
        self.status = status
        self.endpoint = endpoint


class _InEndpointPacket(Packet):
    """A packet that is valid for IN endpoints only."""

    __slots__ = ()
    endpoint: int

    def fault(self, to_host: bool, size: int) -> str:
        return "" if self.endpoint & 0x80 else f"{self.TYPE} for endpoint {self.endpoint:02x}, which is not IN"


class StartInterruptReceiving(_InEndpointPacket):
    """Start receiving from an interrupt IN endpoint."""

    TYPE = PacketType.START_INTERRUPT_RECEIVING
    FIELDS = ("endpoint",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoint: int) -> None:
        self.id = id
        self.endpoint = endpoint


class StopInterruptReceiving(_InEndpointPacket):
    """Stop receiving from an interrupt IN endpoint."""

    TYPE = PacketType.STOP_INTERRUPT_RECEIVING
    FIELDS = ("endpoint",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoint: int) -> None:
        self.id = id
        self.endpoint = endpoint


class InterruptReceivingStatus(_InEndpointPacket):
    """Answers start and stop of receiving. Sent without a request: ``STALL`` if it ended, others if it continues."""

    TYPE = PacketType.INTERRUPT_RECEIVING_STATUS
    FIELDS = ("status", "endpoint")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, status: Status, endpoint: int) -> None:
        self.id = id
        self.status = status
        self.endpoint = endpoint


class AllocBulkStreams(Packet):
    """Allocate streams on the endpoints of a mask (bit n: :func:`endpoint_index` n)."""

    TYPE = PacketType.ALLOC_BULK_STREAMS
    FIELDS = ("endpoints", "streams")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoints: int, streams: int) -> None:
        self.id = id
        self.endpoints = endpoints
        self.streams = streams


class FreeBulkStreams(Packet):
    """Free the streams on the endpoints of a mask."""

    TYPE = PacketType.FREE_BULK_STREAMS
    FIELDS = ("endpoints",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoints: int) -> None:
        self.id = id
        self.endpoints = endpoints


class BulkStreamsStatus(Packet):
    """Answers alloc_bulk_streams and free_bulk_streams (``streams`` 0)."""

    TYPE = PacketType.BULK_STREAMS_STATUS
    FIELDS = ("endpoints", "streams", "status")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoints: int, streams: int, status: Status) -> None:
        self.id = id
        self.endpoints = endpoints
        self.streams = streams
        self.status = status


class CancelDataPacket(Packet):
    """Cancel the data packet that has this packet's id."""

    TYPE = PacketType.CANCEL_DATA_PACKET
    __slots__ = ()


class FilterReject(Packet):
    """The guest refuses the device."""

    TYPE = PacketType.FILTER_REJECT
    __slots__ = ()


_parse_filter = lru_cache(maxsize=8)(Filter.parse)
"""Parse a filter, or return that of the same text: guests send their filter again with each device."""


class FilterFilter(Packet):
    """Which devices the sender accepts: see :class:`~farplug.usbredir.filter.Filter`."""

    TYPE = PacketType.FILTER_FILTER
    MAX_PAYLOAD = 4 * 1024
    FIELDS = ("filter",)
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, filter: str) -> None:
        self.id = id
        self.filter = filter

    @property
    def rules(self) -> Filter:
        """Return the filter.

        Raises:
            ValueError: as :meth:`Filter.parse`; not for a received packet.
        """
        return _parse_filter(self.filter)

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        text = bytes(payload)
        if not text.endswith(b"\0"):
            raise RemoteProtocolError("filter_filter is not terminated by a NUL" if text else "filter_filter is empty")
        return cls(id=id, filter=text.partition(b"\0")[0].decode("ascii", errors="backslashreplace"))

    def payload(self) -> Buffer:
        return self.filter.encode("ascii", errors="replace") + b"\0"

    def fault(self, to_host: bool, size: int) -> str:
        if "\0" in self.filter:
            return "filter_filter has a NUL in its text"
        if size > self.MAX_PAYLOAD:
            return f"filter_filter has {size} bytes, more than {self.MAX_PAYLOAD}"
        try:
            _ = self.rules
        except ValueError as error:
            return str(error)
        return ""


class DeviceDisconnectAck(Packet):
    """The guest acknowledges device_disconnect."""

    TYPE = PacketType.DEVICE_DISCONNECT_ACK
    __slots__ = ()


class StartBulkReceiving(_InEndpointPacket):
    """Start buffered receiving from a bulk IN endpoint: ``transfers`` transfers of ``bytes_per_transfer`` in flight."""

    TYPE = PacketType.START_BULK_RECEIVING
    FIELDS = ("stream_id", "bytes_per_transfer", "endpoint", "transfers")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, stream_id: int, bytes_per_transfer: int, endpoint: int, transfers: int) -> None:
        self.id = id
        self.stream_id = stream_id
        self.bytes_per_transfer = bytes_per_transfer
        self.endpoint = endpoint
        self.transfers = transfers

    def fault(self, to_host: bool, size: int) -> str:
        if self.bytes_per_transfer > MAX_TRANSFER:
            return f"{self.TYPE} has {self.bytes_per_transfer} bytes per transfer, more than {MAX_TRANSFER}"
        return _InEndpointPacket.fault(self, to_host, size)


class StopBulkReceiving(_InEndpointPacket):
    """Stop buffered receiving from a bulk IN endpoint."""

    TYPE = PacketType.STOP_BULK_RECEIVING
    FIELDS = ("stream_id", "endpoint")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, stream_id: int, endpoint: int) -> None:
        self.id = id
        self.stream_id = stream_id
        self.endpoint = endpoint


class BulkReceivingStatus(_InEndpointPacket):
    """Answers start and stop of buffered receiving.

    Sent without a request: ``STALL`` if it ended, others if it continues.
    """

    TYPE = PacketType.BULK_RECEIVING_STATUS
    FIELDS = ("stream_id", "endpoint", "status")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, stream_id: int, endpoint: int, status: Status) -> None:
        self.id = id
        self.stream_id = stream_id
        self.endpoint = endpoint
        self.status = status


class DataPacket(Packet):
    """The common part of data packets.

    OUT requests and IN answers carry a payload of ``length`` bytes; other data packets carry none.
    """

    MAX_PAYLOAD = MAX_LENGTH
    FIELDS: ClassVar[tuple[str, ...]] = ("endpoint", "status", "length", "data")
    __slots__ = FIELDS

    def __init__(self, *, id: int = 0, endpoint: int, status: Status, length: int, data: Buffer = b"") -> None:
        self.id = id
        self.endpoint = endpoint
        self.status = status
        self.length = length
        self.data = data

    def payload(self) -> Buffer:
        return self.data

    def fault(self, to_host: bool, size: int) -> str:
        if (self.endpoint < 0x80) is to_host:
            if size != self.length:
                return f"{self.TYPE} for endpoint {self.endpoint:02x} has {size} bytes, its header says {self.length}"
        elif size:
            return f"{self.TYPE} for endpoint {self.endpoint:02x} has {size} bytes of payload where there is none"
        return ""


class ControlPacket(DataPacket):
    """A control transfer: the setup packet's fields. Bit 7 of ``endpoint`` is the direction of the data stage."""

    TYPE = PacketType.CONTROL_PACKET
    FIELDS = (*DataPacket.FIELDS, "request", "request_type", "value", "index")
    __slots__ = ("index", "request", "request_type", "value")

    def __init__(
        self,
        *,
        id: int = 0,
        endpoint: int,
        status: Status,
        length: int,
        data: Buffer = b"",
        request: int,
        request_type: int,
        value: int,
        index: int,
    ) -> None:
        self.id = id
        self.endpoint = endpoint
        self.status = status
        self.length = length
        self.data = data
        self.request = request
        self.request_type = request_type
        self.value = value
        self.index = index

    @classmethod
    def of(cls, id: int, setup: Setup, data: Buffer) -> Self:
        """Return the packet with which a guest begins a control transfer.

        Args:
            id: of the transfer.
            setup: its setup packet.
            data: what the guest sends; empty if the device does.
        """
        return cls(
            id=id,
            endpoint=setup.direction,
            request=setup.request,
            request_type=setup.request_type,
            status=Status.SUCCESS,
            value=setup.value,
            index=setup.index,
            length=setup.length,
            data=data,
        )

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        endpoint, request, request_type, status, value, index, length = values
        return cls(
            id=id,
            endpoint=endpoint,
            request=request,
            request_type=request_type,
            status=_STATUSES[status],
            value=value,
            index=index,
            length=length,
            data=payload,
        )

    def values(self) -> tuple[Any, ...]:
        return self.endpoint, self.request, self.request_type, self.status, self.value, self.index, self.length


class BulkPacket(DataPacket):
    """A bulk transfer. ``stream_id`` 0: no stream."""

    TYPE = PacketType.BULK_PACKET
    FIELDS = (*DataPacket.FIELDS, "stream_id")
    __slots__ = ("stream_id",)

    def __init__(
        self, *, id: int = 0, endpoint: int, status: Status, length: int, data: Buffer = b"", stream_id: int = 0
    ) -> None:
        self.id = id
        self.endpoint = endpoint
        self.status = status
        self.length = length
        self.data = data
        self.stream_id = stream_id

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        if len(values) == 5:
            endpoint, status, length, stream_id, high = values
            length |= high << 16
        else:
            endpoint, status, length, stream_id = values
        return cls(
            id=id,
            endpoint=endpoint,
            status=_STATUSES[status],
            length=length,
            data=payload,
            stream_id=stream_id,
        )

    def values(self) -> tuple[Any, ...]:
        return self.endpoint, self.status, self.length & 0xFFFF, self.stream_id, self.length >> 16

    def fault(self, to_host: bool, size: int) -> str:
        length = self.length
        if length > MAX_TRANSFER:
            return _too_long(self)
        # The rule of all data packets, without another call: this is checked for each packet of a disk.
        if size == (length if (self.endpoint < 0x80) is to_host else 0):
            return ""
        return DataPacket.fault(self, to_host, size)


class _FramePacket(DataPacket):
    """A data packet without further fields."""

    __slots__ = ()

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        endpoint, status, length = values
        return cls(id=id, endpoint=endpoint, status=_STATUSES[status], length=length, data=payload)

    def values(self) -> tuple[Any, ...]:
        return self.endpoint, self.status, self.length


class IsoPacket(_FramePacket):
    """One packet of an isochronous stream: OUT to the host, IN to the guest."""

    TYPE = PacketType.ISO_PACKET
    __slots__ = ()

    def fault(self, to_host: bool, size: int) -> str:
        if (self.endpoint < 0x80) is not to_host:
            return _wrong_way(self, to_host)
        return DataPacket.fault(self, to_host, size)


class InterruptPacket(_FramePacket):
    """Interrupt IN: received data. Interrupt OUT: a request, and its answer."""

    TYPE = PacketType.INTERRUPT_PACKET
    __slots__ = ()

    def fault(self, to_host: bool, size: int) -> str:
        if self.endpoint & 0x80 and to_host:
            return _wrong_way(self, to_host)
        return DataPacket.fault(self, to_host, size)


class BufferedBulkPacket(DataPacket):
    """Data of buffered bulk receiving."""

    TYPE = PacketType.BUFFERED_BULK_PACKET
    FIELDS = (*DataPacket.FIELDS, "stream_id")
    __slots__ = ("stream_id",)

    def __init__(
        self, *, id: int = 0, endpoint: int, status: Status, length: int, data: Buffer = b"", stream_id: int
    ) -> None:
        self.id = id
        self.endpoint = endpoint
        self.status = status
        self.length = length
        self.data = data
        self.stream_id = stream_id

    @classmethod
    def decode(cls, id: int, values: tuple[Any, ...], payload: Buffer) -> Self:
        stream_id, length, endpoint, status = values
        return cls(id=id, stream_id=stream_id, length=length, endpoint=endpoint, status=_STATUSES[status], data=payload)

    def values(self) -> tuple[Any, ...]:
        return self.stream_id, self.length, self.endpoint, self.status

    def fault(self, to_host: bool, size: int) -> str:
        if not self.endpoint & 0x80:
            return _wrong_way(self, to_host)
        if self.length > MAX_TRANSFER:
            return _too_long(self)
        return DataPacket.fault(self, to_host, size)


def _too_long(packet: DataPacket) -> str:
    return f"{packet.TYPE} has a length of {packet.length} bytes, more than {MAX_TRANSFER}"


def _wrong_way(packet: DataPacket, to_host: bool) -> str:
    return f"{packet.TYPE} for endpoint {packet.endpoint:02x} is sent to the usb-{'host' if to_host else 'guest'}"


PACKETS: Final[tuple[type[Packet], ...]] = (
    Hello,
    DeviceConnect,
    DeviceDisconnect,
    Reset,
    InterfaceInfo,
    EndpointInfo,
    SetConfiguration,
    GetConfiguration,
    ConfigurationStatus,
    SetAltSetting,
    GetAltSetting,
    AltSettingStatus,
    StartIsoStream,
    StopIsoStream,
    IsoStreamStatus,
    StartInterruptReceiving,
    StopInterruptReceiving,
    InterruptReceivingStatus,
    AllocBulkStreams,
    FreeBulkStreams,
    BulkStreamsStatus,
    CancelDataPacket,
    FilterReject,
    FilterFilter,
    DeviceDisconnectAck,
    StartBulkReceiving,
    StopBulkReceiving,
    BulkReceivingStatus,
    ControlPacket,
    BulkPacket,
    IsoPacket,
    InterruptPacket,
    BufferedBulkPacket,
)
"""The class of every packet type."""
