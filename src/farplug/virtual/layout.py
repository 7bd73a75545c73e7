"""Descriptors of a virtual device at one speed, built from the interfaces of its functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from farplug.usb.descriptors import (
    ENGLISH,
    BosDescriptor,
    Capability,
    ConfigurationDescriptor,
    DeviceDescriptor,
    DeviceQualifier,
    InterfaceAssociation,
    InterfaceDescriptor,
    SuperSpeedCapability,
    Usb2Extension,
    language_ids,
    string_descriptor,
)
from farplug.usb.device import Identity
from farplug.usb.platform import (
    MS_OS_20_INDEX,
    WEBUSB_URL_INDEX,
    ms_os_20_capability,
    ms_os_20_set,
    url_descriptor,
    webusb_capability,
)
from farplug.usb.types import DescriptorType, Direction, Setup, Speed
from farplug.virtual.function import Function, Numbers, Strings

CONFIGURATION = 1
"""bConfigurationValue of the only configuration."""

MS_OS_20_REQUEST, WEBUSB_REQUEST = 0x20, 0x21
"""bRequest of the vendor requests that the device itself answers if it has these capabilities: for the Microsoft OS 2.0
descriptors (wIndex 7), and for the URL of the landing page (wIndex 2)."""

SPEEDS = (Speed.FULL, Speed.HIGH, Speed.SUPER)
"""The speeds that a virtual device can run at."""

_SELF_POWERED = 0xC0
_REMOTE_WAKEUP = 0x20
_ASSOCIATED = (0xEF, 0x02, 0x01)
"""The device class of a device with interface associations (IAD ECN, table 1-1)."""

_USB_2_0, _USB_2_1, _USB_3_2 = 0x0200, 0x0210, 0x0320
_SUPERSPEED_MAX_PACKET_SIZE_0 = 9


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of a function in the device.

    Attributes:
        numbers: the device's numbers by the function's own.
        interface_count: the number of interfaces.
        own: the function's own endpoint address by the device's.
    """

    numbers: Numbers
    interface_count: int
    own: Mapping[int, int]


def place(
    function: Function, speed: Speed, first: int, taken: set[int], strings: Strings
) -> tuple[tuple[InterfaceDescriptor, ...], Placement]:
    """Number a function's interfaces from ``first`` on, and assign endpoint addresses that are not in ``taken``.

    An address that is free stays. Class-specific descriptors are not changed: the function receives the numbers for
    them. The assigned addresses are added to ``taken``.

    Raises:
        ValueError: more than fifteen endpoints in one direction, or the function describes other interfaces once it has
            its numbers.
    """
    draft = function.interfaces(speed, Numbers(first, strings=strings))
    addresses: dict[int, int] = {}
    for own in _shape(draft)[1]:
        direction = own & Direction.IN
        candidates = (own, *(direction | number for number in range(1, 16)))
        address = next((candidate for candidate in candidates if candidate not in taken), None)
        if address is None:
            raise ValueError(f"a device has at most 15 {Direction(direction).name} endpoints")
        addresses[own] = address
        taken.add(address)
    numbers = Numbers(first, addresses, strings)
    interfaces = function.interfaces(speed, numbers)
    if _shape(interfaces) != _shape(draft):
        raise ValueError(f"{type(function).__name__} describes other interfaces once it has its numbers")
    moved = tuple(
        replace(
            interface,
            number=first + interface.number,
            endpoints=tuple(replace(endpoint, address=addresses[endpoint.address]) for endpoint in interface.endpoints),
        )
        for interface in sorted(interfaces, key=lambda interface: (interface.number, interface.alternate))
    )
    count = len({interface.number for interface in interfaces})
    return moved, Placement(numbers, count, {address: own for own, address in addresses.items()})


def _shape(interfaces: Sequence[InterfaceDescriptor]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the settings of a function, and its endpoint addresses."""
    settings = sorted((interface.number, interface.alternate) for interface in interfaces)
    return settings, sorted({endpoint.address for interface in interfaces for endpoint in interface.endpoints})


class Layout:
    """The descriptors of a device at one speed.

    Args:
        identity: speed, ids and strings; the layout adds class, subclass and protocol.
        functions: the functions, in the order of their interfaces.
        speeds: all speeds that the device can run at.
        remote_wakeup: whether the device may wake a sleeping guest.
        capabilities: further device capabilities for the BOS.
        landing_page: the URL that a browser with WebUSB offers; empty for none.

    Attributes:
        identity: the complete identity.
        configuration: the only configuration.
        placements: one for each function.
    """

    def __init__(
        self,
        identity: Identity,
        functions: Sequence[Function],
        speeds: Sequence[Speed],
        *,
        remote_wakeup: bool = False,
        capabilities: Sequence[Capability] = (),
        landing_page: str = "",
    ) -> None:
        speed = identity.speed
        attributes = _SELF_POWERED | (_REMOTE_WAKEUP if remote_wakeup else 0)
        self._strings = strings = Strings()
        indexes = [strings.index(text) for text in (identity.manufacturer, identity.product, identity.serial_number)]
        self.configuration, self.placements = _configure(functions, speed, attributes, strings)
        class_, subclass, protocol = _ASSOCIATED if self.configuration.associations else (0, 0, 0)
        self.identity = replace(identity, device_class=class_, device_subclass=subclass, device_protocol=protocol)
        self._descriptors = {DescriptorType.CONFIGURATION: bytes(self.configuration)}
        self._vendor_replies: dict[tuple[int, int], bytes] = {}
        announced: list[Capability] = [*capabilities, *self._platforms(functions, landing_page)]
        if Speed.SUPER in speeds:
            announced.insert(0, SuperSpeedCapability(sum(1 << each for each in speeds), min(speeds)))
        version = _USB_2_0
        if announced:
            version = _USB_3_2 if speed is Speed.SUPER else _USB_2_1
            self._descriptors[DescriptorType.BOS] = bytes(BosDescriptor((Usb2Extension(), *announced)))
        if speed is not Speed.SUPER:
            other, _ = _configure(functions, Speed.FULL if speed is Speed.HIGH else Speed.HIGH, attributes, strings)
            kind = DescriptorType.OTHER_SPEED_CONFIGURATION
            self._descriptors[kind] = other.to_bytes(kind)
            qualifier = DeviceQualifier(version, class_, subclass, protocol)
            self._descriptors[DescriptorType.DEVICE_QUALIFIER] = bytes(qualifier)
        device = DeviceDescriptor(
            usb_version=version,
            vendor_id=identity.vendor_id,
            product_id=identity.product_id,
            device_version=identity.device_version,
            device_class=class_,
            device_subclass=subclass,
            device_protocol=protocol,
            max_packet_size_0=_SUPERSPEED_MAX_PACKET_SIZE_0 if speed is Speed.SUPER else 64,
            manufacturer_index=indexes[0],
            product_index=indexes[1],
            serial_number_index=indexes[2],
        )
        self._descriptors[DescriptorType.DEVICE] = bytes(device)

    def descriptor(self, kind: int, index: int) -> bytes | None:
        """Return the descriptor for GET_DESCRIPTOR; None if the device has no such descriptor at this speed."""
        if kind == DescriptorType.STRING:
            return self._string(index)
        return self._descriptors.get(DescriptorType(kind)) if not index and kind in _KINDS else None

    def vendor_reply(self, setup: Setup) -> bytes | None:
        """Return the reply to a vendor request to the device about a platform capability; None for other requests."""
        return self._vendor_replies.get((setup.request, setup.index))

    def _platforms(self, functions: Sequence[Function], landing_page: str) -> Iterator[Capability]:
        """Yield the capabilities for Windows and for browsers, and keep the replies to their requests."""
        drivers = [
            (placement.numbers.first_interface, function.windows_driver)
            for function, placement in zip(functions, self.placements, strict=True)
            if function.windows_driver is not None
        ]
        if drivers:
            composite = len(self.configuration.select()) > 1
            reply = self._vendor_replies[MS_OS_20_REQUEST, MS_OS_20_INDEX] = ms_os_20_set(drivers, composite=composite)
            yield ms_os_20_capability(len(reply), MS_OS_20_REQUEST)
        if landing_page:
            self._vendor_replies[WEBUSB_REQUEST, WEBUSB_URL_INDEX] = url_descriptor(landing_page)
            yield webusb_capability(WEBUSB_REQUEST)

    def _string(self, index: int) -> bytes | None:
        if not index:
            return language_ids(ENGLISH)
        text = self._strings.text(index)
        return string_descriptor(text) if text else None


_KINDS = frozenset(DescriptorType)


def _configure(
    functions: Sequence[Function], speed: Speed, attributes: int, strings: Strings
) -> tuple[ConfigurationDescriptor, tuple[Placement, ...]]:
    """Make the configuration. Functions of several interfaces have an association; others need none (IAD ECN, 9.X)."""
    interfaces: list[InterfaceDescriptor] = []
    associations: list[InterfaceAssociation] = []
    placements: list[Placement] = []
    taken: set[int] = set()
    first = 0
    for function in functions:
        placed, placement = place(function, speed, first, taken, strings)
        if placement.interface_count > 1:
            head = placed[0]
            triple = function.association or (head.interface_class, head.interface_subclass, head.interface_protocol)
            associations.append(InterfaceAssociation(first, placement.interface_count, *triple))
        interfaces += placed
        placements.append(placement)
        first += placement.interface_count
    configuration = ConfigurationDescriptor(CONFIGURATION, tuple(interfaces), tuple(associations), attributes)
    return configuration, tuple(placements)
