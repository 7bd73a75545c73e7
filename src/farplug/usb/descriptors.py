"""USB descriptors, built and parsed.

Building: ``bytes(descriptor)`` is the wire form, sub-descriptors included; a value that does not fit its field, or more
sub-descriptors than a field can count, raises ``ValueError``. Parsed bytes may have such a number of sub-descriptors.

Parsing never raises, because a device, a guest or a file may contain any bytes. ``warnings`` lists what was skipped or
is contradictory; it does not take part in comparisons.

The file is long because each class is one table of the specification.

Sources: USB 2.0 specification, chapter 9.6; USB 3.2 specification, chapter 9.6; Interface Association Descriptors ECN.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

from farplug.usb.types import Buffer, DescriptorType, Endpoint, Interface, TransferType

MAX_STRING_UNITS = 126
"""UTF-16 code units that fit into a string descriptor (bLength is one byte)."""

MAX_INTERVAL = 48 * 1024
"""The most bytes of a SuperSpeed isochronous endpoint in an interval: 3 bursts of 16 packets (USB 3.2, 9.6.7)."""

MAX_WARNINGS = 32
"""The most warnings that are kept from one descriptor."""

ENGLISH = 0x0409
"""The language id that every host requests."""


class CapabilityType(IntEnum):
    """bDevCapabilityType (USB 3.2, table 9-14)."""

    USB2_EXTENSION = 2
    SUPERSPEED = 3
    CONTAINER_ID = 4


_DEVICE = struct.Struct("<BBHBBBBHHHBBBB")
_CONFIGURATION = struct.Struct("<BBHBBBBB")
_INTERFACE = struct.Struct("<BBBBBBBBB")
_ASSOCIATION = struct.Struct("<BBBBBBBB")
_ENDPOINT = struct.Struct("<BBBBHB")
_COMPANION = struct.Struct("<BBBBH")
_QUALIFIER = struct.Struct("<BBHBBBBBB")
_BOS = struct.Struct("<BBHB")
_SUPERSPEED = struct.Struct("<BBBBHBBH")
_USB2_EXTENSION = struct.Struct("<BBBI")


def _pack(layout: struct.Struct, length: int, kind: int, *fields: int) -> bytes:
    """Pack the fixed part of a descriptor.

    Raises:
        ValueError: a value does not fit its field.
    """
    try:
        return layout.pack(length, kind, *fields)
    except struct.error as error:
        name = DescriptorType(kind).name.lower().replace("_", " ")
        raise ValueError(f"{fields} do not fit the fields of the {name} descriptor: {error}") from error


def _head(data: Buffer, layout: struct.Struct, kinds: tuple[int, ...], warnings: list[str]) -> tuple[int, ...]:
    """Unpack the fixed part at the start of ``data``; missing bytes are zero."""
    raw = bytes(data[: layout.size])
    name = DescriptorType(kinds[0]).name.lower().replace("_", " ")
    if len(raw) < layout.size:
        warnings.append(f"the {name} descriptor has {len(raw)} bytes, not {layout.size}")
        raw = raw.ljust(layout.size, b"\0")
    if raw[0] != layout.size:
        warnings.append(f"the {name} descriptor has bLength {raw[0]}, not {layout.size}")
    if raw[1] not in kinds:
        warnings.append(f"the {name} descriptor has type {raw[1]}, not {kinds[0]}")
    return layout.unpack(raw)


def _walk(data: bytes, position: int, warnings: list[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (bDescriptorType, whole descriptor) for each descriptor until the data ends or bLength is invalid."""
    while position < len(data):
        length = data[position]
        rest = len(data) - position
        if length < 2:
            warnings.append(f"a descriptor at byte {position} has length {length}: {rest} bytes skipped")
            return
        if length > rest:
            warnings.append(f"a descriptor at byte {position} has length {length}, but {rest} bytes are left: skipped")
            return
        yield data[position + 1], data[position : position + length]
        position += length


@dataclass(frozen=True, slots=True)
class DeviceDescriptor:
    """Device descriptor (USB 2.0, table 9-8). ``usb_version`` and ``device_version`` are BCD: 0x0320 is 3.2.

    ``max_packet_size_0`` is raw: bytes, but from SuperSpeed on an exponent of two (always 9).
    """

    usb_version: int
    vendor_id: int
    product_id: int
    device_version: int = 0
    device_class: int = 0
    device_subclass: int = 0
    device_protocol: int = 0
    max_packet_size_0: int = 64
    manufacturer_index: int = 0
    product_index: int = 0
    serial_number_index: int = 0
    configuration_count: int = 1
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse a device descriptor of 18 bytes; never raises."""
        warnings: list[str] = []
        _, _, usb, class_, subclass, protocol, size, vendor, product, version, index_m, index_p, index_s, count = _head(
            data, _DEVICE, (DescriptorType.DEVICE,), warnings
        )
        return cls(
            usb_version=usb,
            vendor_id=vendor,
            product_id=product,
            device_version=version,
            device_class=class_,
            device_subclass=subclass,
            device_protocol=protocol,
            max_packet_size_0=size,
            manufacturer_index=index_m,
            product_index=index_p,
            serial_number_index=index_s,
            configuration_count=count,
            warnings=tuple(warnings),
        )

    def __bytes__(self) -> bytes:
        return _pack(
            _DEVICE,
            _DEVICE.size,
            DescriptorType.DEVICE,
            self.usb_version,
            self.device_class,
            self.device_subclass,
            self.device_protocol,
            self.max_packet_size_0,
            self.vendor_id,
            self.product_id,
            self.device_version,
            self.manufacturer_index,
            self.product_index,
            self.serial_number_index,
            self.configuration_count,
        )


@dataclass(frozen=True, slots=True)
class DeviceQualifier:
    """Device qualifier: the device descriptor at the other speed, full or high (USB 2.0, table 9-9)."""

    usb_version: int = 0x0200
    device_class: int = 0
    device_subclass: int = 0
    device_protocol: int = 0
    max_packet_size_0: int = 64
    configuration_count: int = 1
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse a device qualifier of 10 bytes; never raises."""
        warnings: list[str] = []
        _, _, usb, class_, subclass, protocol, size, count, _ = _head(
            data, _QUALIFIER, (DescriptorType.DEVICE_QUALIFIER,), warnings
        )
        return cls(usb, class_, subclass, protocol, size, count, tuple(warnings))

    def __bytes__(self) -> bytes:
        return _pack(
            _QUALIFIER,
            _QUALIFIER.size,
            DescriptorType.DEVICE_QUALIFIER,
            self.usb_version,
            self.device_class,
            self.device_subclass,
            self.device_protocol,
            self.max_packet_size_0,
            self.configuration_count,
            0,
        )


@dataclass(frozen=True, slots=True)
class SuperSpeedCompanion:
    """SuperSpeed endpoint companion, which follows each endpoint descriptor (USB 3.2, table 9-29).

    Attributes:
        max_burst: bMaxBurst: packets in one burst, less one (0..15).
        attributes: bulk: log2 of the streams, 0 for none; isochronous: mult.
        bytes_per_interval: periodic endpoints only.
    """

    max_burst: int = 0
    attributes: int = 0
    bytes_per_interval: int = 0

    @property
    def max_streams(self) -> int:
        """Return the number of streams of a bulk endpoint: 0, or 2 to 65536."""
        exponent = self.attributes & 0x1F
        return 1 << exponent if 1 <= exponent <= 16 else 0

    def __bytes__(self) -> bytes:
        kind = DescriptorType.SUPERSPEED_ENDPOINT_COMPANION
        return _pack(_COMPANION, _COMPANION.size, kind, self.max_burst, self.attributes, self.bytes_per_interval)


@dataclass(frozen=True, slots=True)
class EndpointDescriptor:
    """Endpoint descriptor (USB 2.0, table 9-13), with the descriptors that follow it.

    Attributes:
        address: bEndpointAddress; bit 7 is the direction.
        attributes: bmAttributes; bits 1..0 are the :class:`TransferType`.
        max_packet_size: wMaxPacketSize, raw.
        interval: bInterval, raw.
        companion: the SuperSpeed companion that follows it.
        extra: class-specific descriptors that follow (for example a UAS pipe usage), raw.
        tail: bytes of the endpoint descriptor itself after the usual seven: audio endpoints have two.
    """

    address: int
    attributes: int
    max_packet_size: int
    interval: int = 0
    companion: SuperSpeedCompanion | None = None
    extra: bytes = b""
    tail: bytes = b""

    def __bytes__(self) -> bytes:
        head = _pack(
            _ENDPOINT,
            _ENDPOINT.size + len(self.tail),
            DescriptorType.ENDPOINT,
            self.address,
            self.attributes,
            self.max_packet_size,
            self.interval,
        )
        return head + self.tail + (b"" if self.companion is None else bytes(self.companion)) + self.extra

    @property
    def endpoint(self) -> Endpoint:
        """Return the endpoint as the rest of the program uses it."""
        kind = TransferType(self.attributes & 3)
        size = self.max_packet_size & 0x7FF
        if kind is TransferType.ISOCHRONOUS and self.companion is not None:
            size *= (1 + self.companion.max_burst) * (1 + (self.companion.attributes & 3))
        elif kind is TransferType.ISOCHRONOUS:
            size *= 1 + (self.max_packet_size >> 11 & 3)
        size = min(size, MAX_INTERVAL)
        periodic = kind in (TransferType.ISOCHRONOUS, TransferType.INTERRUPT)
        streams = self.companion.max_streams if self.companion is not None and kind is TransferType.BULK else 0
        return Endpoint(self.address, kind, size, max(1, self.interval) if periodic else self.interval, streams)


@dataclass(frozen=True, slots=True)
class InterfaceDescriptor:
    """Interface descriptor: one alternate setting (USB 2.0, table 9-12), with the descriptors that follow it.

    Attributes:
        number: bInterfaceNumber.
        alternate: bAlternateSetting.
        endpoints: in the order of the descriptors.
        string_index: iInterface.
        extra: class-specific descriptors between this one and the first endpoint, raw.
    """

    number: int
    alternate: int
    interface_class: int
    interface_subclass: int
    interface_protocol: int
    endpoints: tuple[EndpointDescriptor, ...] = ()
    string_index: int = 0
    extra: bytes = b""

    def __bytes__(self) -> bytes:
        head = _pack(
            _INTERFACE,
            _INTERFACE.size,
            DescriptorType.INTERFACE,
            self.number,
            self.alternate,
            len(self.endpoints),
            self.interface_class,
            self.interface_subclass,
            self.interface_protocol,
            self.string_index,
        )
        return head + self.extra + b"".join(map(bytes, self.endpoints))


@dataclass(frozen=True, slots=True)
class InterfaceAssociation:
    """Interface association: the interfaces of one function (Interface Association Descriptors ECN, table 9-Z)."""

    first_interface: int
    interface_count: int
    function_class: int
    function_subclass: int
    function_protocol: int
    string_index: int = 0

    def __bytes__(self) -> bytes:
        return _pack(
            _ASSOCIATION,
            _ASSOCIATION.size,
            DescriptorType.INTERFACE_ASSOCIATION,
            self.first_interface,
            self.interface_count,
            self.function_class,
            self.function_subclass,
            self.function_protocol,
            self.string_index,
        )


@dataclass(frozen=True, slots=True)
class ConfigurationDescriptor:
    """Configuration descriptor (USB 2.0, table 9-10), with all descriptors that follow it.

    Attributes:
        value: bConfigurationValue.
        interfaces: every alternate setting of every interface, in the order of the descriptors.
        associations: each is placed before the first interface that it names.
        attributes: bmAttributes: 0x80 always, 0x40 self-powered, 0x20 remote wakeup.
        max_power: bMaxPower, raw: units of 2 mA, from SuperSpeed on 8 mA.
        string_index: iConfiguration.
        extra: descriptors between this one and the first interface, raw.
    """

    value: int
    interfaces: tuple[InterfaceDescriptor, ...] = ()
    associations: tuple[InterfaceAssociation, ...] = ()
    attributes: int = 0xC0
    max_power: int = 0
    string_index: int = 0
    extra: bytes = b""
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse a configuration and all descriptors that follow it; never raises."""
        warnings: list[str] = []
        data = bytes(data)
        kinds = (DescriptorType.CONFIGURATION, DescriptorType.OTHER_SPEED_CONFIGURATION)
        length, _, total, count, value, index, attributes, max_power = _head(data, _CONFIGURATION, kinds, warnings)
        if total != len(data):
            warnings.append(f"the configuration has wTotalLength {total}, not {len(data)}")
        if _CONFIGURATION.size <= total:
            data = data[:total]
        chain = _Chain(warnings)
        for kind, raw in _walk(data, max(length, _CONFIGURATION.size), warnings):
            chain.add(kind, raw)
        interfaces = chain.interfaces()
        numbers = len({interface.number for interface in interfaces})
        if numbers != count:
            warnings.append(f"the configuration has bNumInterfaces {count}, not {numbers}")
        return cls(
            value,
            interfaces,
            tuple(chain.associations),
            attributes,
            max_power,
            index,
            bytes(chain.extra),
            tuple(warnings[:MAX_WARNINGS]),
        )

    def to_bytes(self, kind: DescriptorType = DescriptorType.CONFIGURATION) -> bytes:
        """Build the wire form, as a configuration or as an other-speed configuration (USB 2.0, table 9-11)."""
        body = bytearray(self.extra)
        waiting = list(self.associations)
        for interface in self.interfaces:
            for association in [each for each in waiting if each.first_interface == interface.number]:
                body += bytes(association)
                waiting.remove(association)
            body += bytes(interface)
        numbers = len({interface.number for interface in self.interfaces})
        return (
            _pack(
                _CONFIGURATION,
                _CONFIGURATION.size,
                kind,
                _CONFIGURATION.size + len(body),
                numbers,
                self.value,
                self.string_index,
                self.attributes,
                self.max_power,
            )
            + body
        )

    def __bytes__(self) -> bytes:
        return self.to_bytes()

    @property
    def has_streams(self) -> bool:
        """Return whether an endpoint of any setting has bulk streams."""
        return any(each.endpoint.max_streams for setting in self.interfaces for each in setting.endpoints)

    def settings(self, number: int) -> Mapping[int, InterfaceDescriptor]:
        """Return the alternate settings of an interface by bAlternateSetting; empty if there is no such interface."""
        return {setting.alternate: setting for setting in self.interfaces if setting.number == number}

    def select(self, alternates: Mapping[int, int] | None = None) -> tuple[Interface, ...]:
        """Return the interfaces in the selected alternate settings, by number, each endpoint address once.

        Args:
            alternates: bInterfaceNumber to bAlternateSetting; other interfaces have setting 0, or their lowest.
        """
        alternates = alternates or {}
        used: set[int] = set()
        chosen: list[Interface] = []
        for number in sorted({interface.number for interface in self.interfaces}):
            settings = self.settings(number)
            setting = settings.get(alternates.get(number, 0)) or settings[min(settings)]
            endpoints = tuple(each.endpoint for each in setting.endpoints if each.address not in used)
            used.update(endpoint.address for endpoint in endpoints)
            chosen.append(
                Interface(
                    number,
                    setting.alternate,
                    setting.interface_class,
                    setting.interface_subclass,
                    setting.interface_protocol,
                    endpoints,
                )
            )
        return tuple(chosen)


class _Chain:
    """Collects the descriptors that follow a configuration, and adds each to its interface or endpoint."""

    def __init__(self, warnings: list[str]) -> None:
        self.warnings = warnings
        self.associations: list[InterfaceAssociation] = []
        self.extra = bytearray()
        self._settings: list[_Setting] = []
        self._seen: set[tuple[int, int]] = set()
        self._skipping = False

    def add(self, kind: int, raw: bytes) -> None:
        if kind == DescriptorType.INTERFACE:
            self._interface(raw)
        elif kind == DescriptorType.INTERFACE_ASSOCIATION and len(raw) >= _ASSOCIATION.size:
            self.associations.append(InterfaceAssociation(*raw[2 : _ASSOCIATION.size]))
        elif self._skipping:
            self.warnings.append(f"a descriptor of type {kind} of a skipped interface was skipped")
        elif kind == DescriptorType.ENDPOINT:
            self._endpoint(raw)
        elif kind == DescriptorType.SUPERSPEED_ENDPOINT_COMPANION:
            self._companion(raw)
        elif not self._settings:
            self.extra += raw
        elif not self._settings[-1].endpoints:
            self._settings[-1].extra += raw
        else:
            self._settings[-1].endpoints[-1].extra += raw

    def _interface(self, raw: bytes) -> None:
        self._skipping = True
        if len(raw) < _INTERFACE.size:
            self.warnings.append(f"an interface descriptor of {len(raw)} bytes was skipped")
            return
        key = (raw[2], raw[3])
        if key in self._seen:
            self.warnings.append(f"interface {key[0]} setting {key[1]} occurs twice: the second was skipped")
            return
        self._skipping = False
        self._seen.add(key)
        self._settings.append(_Setting(raw))

    def _endpoint(self, raw: bytes) -> None:
        if not self._settings:
            self.warnings.append("an endpoint descriptor before the first interface was skipped")
            return
        setting = self._settings[-1]
        if len(raw) < _ENDPOINT.size:
            self.warnings.append(f"an endpoint descriptor of {len(raw)} bytes was skipped")
        elif not raw[2] & 0x0F or raw[2] & 0x70:
            self.warnings.append(f"an endpoint with the address {raw[2]:02x} was skipped")
        elif any(parts.raw[2] == raw[2] for parts in setting.endpoints):
            self.warnings.append(f"endpoint {raw[2]:02x} occurs twice in a setting: the second was skipped")
        else:
            setting.endpoints.append(_EndpointParts(raw))

    def _companion(self, raw: bytes) -> None:
        last = self._settings[-1].endpoints[-1] if self._settings and self._settings[-1].endpoints else None
        if last is None or last.companion is not None or len(raw) < _COMPANION.size:
            self.warnings.append("a SuperSpeed companion without an endpoint, or too short, was skipped")
        else:
            last.companion = SuperSpeedCompanion(*_COMPANION.unpack_from(raw)[2:])

    def interfaces(self) -> tuple[InterfaceDescriptor, ...]:
        return tuple(setting.descriptor(self.warnings) for setting in self._settings)


class _Setting:
    """An interface descriptor while it is parsed."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.extra = bytearray()
        self.endpoints: list[_EndpointParts] = []

    def descriptor(self, warnings: list[str]) -> InterfaceDescriptor:
        _, _, number, alternate, count, class_, subclass, protocol, index = _INTERFACE.unpack_from(self.raw)
        if count != len(self.endpoints):
            warnings.append(f"interface {number} setting {alternate} has {len(self.endpoints)} endpoints, not {count}")
        endpoints = tuple(parts.descriptor() for parts in self.endpoints)
        return InterfaceDescriptor(number, alternate, class_, subclass, protocol, endpoints, index, bytes(self.extra))


class _EndpointParts:
    """An endpoint descriptor while it is parsed."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.companion: SuperSpeedCompanion | None = None
        self.extra = bytearray()

    def descriptor(self) -> EndpointDescriptor:
        _, _, address, attributes, size, interval = _ENDPOINT.unpack_from(self.raw)
        extra, tail = bytes(self.extra), self.raw[_ENDPOINT.size :]
        return EndpointDescriptor(address, attributes, size, interval, self.companion, extra, tail)


@dataclass(frozen=True, slots=True)
class Usb2Extension:
    """USB 2.0 extension capability (USB 3.2, table 9-15). Bit 1 of ``attributes``: link power management."""

    attributes: int = 0x02

    def __bytes__(self) -> bytes:
        kind = CapabilityType.USB2_EXTENSION
        return _pack(_USB2_EXTENSION, _USB2_EXTENSION.size, DescriptorType.DEVICE_CAPABILITY, kind, self.attributes)


@dataclass(frozen=True, slots=True)
class SuperSpeedCapability:
    """SuperSpeed USB device capability (USB 3.2, table 9-16).

    Attributes:
        speeds: wSpeedsSupported, one bit for each :class:`~farplug.usb.types.Speed`: bit 1 full, 2 high, 3 super.
        functionality_support: the lowest speed at which everything works, as the number of its bit.
        u1_exit_latency: microseconds.
        u2_exit_latency: microseconds.
    """

    speeds: int = 0x0E
    functionality_support: int = 1
    u1_exit_latency: int = 0x0A
    u2_exit_latency: int = 0x20
    attributes: int = 0

    def __bytes__(self) -> bytes:
        return _pack(
            _SUPERSPEED,
            _SUPERSPEED.size,
            DescriptorType.DEVICE_CAPABILITY,
            CapabilityType.SUPERSPEED,
            self.attributes,
            self.speeds,
            self.functionality_support,
            self.u1_exit_latency,
            self.u2_exit_latency,
        )


@dataclass(frozen=True, slots=True)
class ContainerId:
    """Container id capability (USB 3.2, table 9-17): a UUID of 16 bytes, the same on every port of the device."""

    uuid: bytes

    def __bytes__(self) -> bytes:
        return struct.pack("<BBBB", 20, DescriptorType.DEVICE_CAPABILITY, CapabilityType.CONTAINER_ID, 0) + self.uuid


@dataclass(frozen=True, slots=True)
class OtherCapability:
    """Another device capability: the whole descriptor, raw."""

    raw: bytes

    def __bytes__(self) -> bytes:
        return self.raw


Capability = Usb2Extension | SuperSpeedCapability | ContainerId | OtherCapability


def _capability(raw: bytes) -> Capability:
    match raw[2], len(raw):
        case CapabilityType.USB2_EXTENSION, 7:
            return Usb2Extension(int.from_bytes(raw[3:7], "little"))
        case CapabilityType.SUPERSPEED, _SUPERSPEED.size:
            _, _, _, attributes, speeds, lowest, u1_exit_latency, u2_exit_latency = _SUPERSPEED.unpack(raw)
            return SuperSpeedCapability(speeds, lowest, u1_exit_latency, u2_exit_latency, attributes)
        case CapabilityType.CONTAINER_ID, 20:
            return ContainerId(raw[4:])
    return OtherCapability(raw)


@dataclass(frozen=True, slots=True)
class BosDescriptor:
    """Binary device object store: the capabilities of a device (USB 3.2, table 9-12)."""

    capabilities: tuple[Capability, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse a BOS and its capabilities; never raises."""
        warnings: list[str] = []
        data = bytes(data)
        length, _, total, count = _head(data, _BOS, (DescriptorType.BOS,), warnings)
        if total != len(data):
            warnings.append(f"the BOS has wTotalLength {total}, not {len(data)}")
        if _BOS.size <= total:
            data = data[:total]
        capabilities: list[Capability] = []
        for kind, raw in _walk(data, max(length, _BOS.size), warnings):
            if kind == DescriptorType.DEVICE_CAPABILITY and len(raw) > 2:
                capabilities.append(_capability(raw))
            else:
                warnings.append(f"a descriptor of type {kind} in the BOS was skipped")
        if len(capabilities) != count:
            warnings.append(f"the BOS has bNumDeviceCaps {count}, not {len(capabilities)}")
        return cls(tuple(capabilities), tuple(warnings[:MAX_WARNINGS]))

    def __bytes__(self) -> bytes:
        body = b"".join(map(bytes, self.capabilities))
        return _pack(_BOS, _BOS.size, DescriptorType.BOS, _BOS.size + len(body), len(self.capabilities)) + body


def string_descriptor(text: str) -> bytes:
    """Build a string descriptor (USB 2.0, table 9-16), cut after :data:`MAX_STRING_UNITS` UTF-16 units."""
    raw = text.encode("utf-16-le", "replace")[: 2 * MAX_STRING_UNITS]
    raw = raw.decode("utf-16-le", "ignore").encode("utf-16-le")  # no half of a surrogate pair at the cut
    return bytes((2 + len(raw), DescriptorType.STRING)) + raw


def language_ids(*languages: int) -> bytes:
    """Build string descriptor zero: the supported languages (USB 2.0, table 9-15)."""
    layout = struct.Struct(f"<BB{len(languages)}H")
    return _pack(layout, layout.size, DescriptorType.STRING, *languages)


def parse_string(data: Buffer) -> str:
    """Parse the text of a string descriptor; never raises: invalid UTF-16 becomes replacement characters."""
    data = bytes(data)
    if len(data) < 2 or data[1] != DescriptorType.STRING:
        return ""
    raw = data[2 : max(2, data[0])]
    return raw[: len(raw) & ~1].decode("utf-16-le", "replace").rstrip("\0")
