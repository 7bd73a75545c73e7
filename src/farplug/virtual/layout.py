"""Descriptors of a virtual device at one speed, built from the interfaces of its functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from farplug.usb.descriptors import (
    ENGLISH,
    BosDescriptor,
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
from farplug.usb.types import DescriptorType, Direction, Speed
from farplug.virtual.function import Function

CONFIGURATION = 1
"""bConfigurationValue of the only configuration."""

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
        first_interface: the device's number of the function's interface 0.
        interface_count: the number of interfaces.
        addresses: the device's endpoint address by the function's own.
        own: the function's own endpoint address by the device's.
    """

    first_interface: int
    interface_count: int
    addresses: Mapping[int, int]
    own: Mapping[int, int]


def place(
    interfaces: Sequence[InterfaceDescriptor], first: int, taken: set[int]
) -> tuple[tuple[InterfaceDescriptor, ...], Placement]:
    """Number a function's interfaces from ``first`` on, and assign endpoint addresses that are not in ``taken``.

    An address that is free stays. Class-specific descriptors are not changed. The assigned addresses are added to
    ``taken``.

    Raises:
        ValueError: more than fifteen endpoints in one direction.
    """
    addresses: dict[int, int] = {}
    for own in sorted({endpoint.address for interface in interfaces for endpoint in interface.endpoints}):
        direction = own & Direction.IN
        candidates = (own, *(direction | number for number in range(1, 16)))
        address = next((candidate for candidate in candidates if candidate not in taken), None)
        if address is None:
            raise ValueError(f"a device has at most 15 {Direction(direction).name} endpoints")
        addresses[own] = address
        taken.add(address)
    moved = tuple(
        replace(
            interface,
            number=first + interface.number,
            endpoints=tuple(replace(endpoint, address=addresses[endpoint.address]) for endpoint in interface.endpoints),
        )
        for interface in sorted(interfaces, key=lambda interface: (interface.number, interface.alternate))
    )
    count = len({interface.number for interface in interfaces})
    return moved, Placement(first, count, addresses, {address: own for own, address in addresses.items()})


class Layout:
    """The descriptors of a device at one speed.

    Args:
        identity: speed, ids and strings; the layout adds class, subclass and protocol.
        functions: the functions, in the order of their interfaces.
        speeds: all speeds that the device can run at.
        remote_wakeup: whether the device may wake a sleeping guest.

    Attributes:
        identity: the complete identity.
        configuration: the only configuration.
        placements: one for each function.
    """

    def __init__(
        self, identity: Identity, functions: Sequence[Function], speeds: Sequence[Speed], *, remote_wakeup: bool
    ) -> None:
        speed = identity.speed
        attributes = _SELF_POWERED | (_REMOTE_WAKEUP if remote_wakeup else 0)
        class_, subclass, protocol = _ASSOCIATED if len(functions) > 1 else (0, 0, 0)
        self.identity = replace(identity, device_class=class_, device_subclass=subclass, device_protocol=protocol)
        self.configuration, self.placements = _configure(functions, speed, attributes)
        self._strings = (identity.manufacturer, identity.product, identity.serial_number)
        self._descriptors = {DescriptorType.CONFIGURATION: bytes(self.configuration)}
        version = _USB_2_0
        if Speed.SUPER in speeds:
            version = _USB_3_2 if speed is Speed.SUPER else _USB_2_1
            capability = SuperSpeedCapability(sum(1 << each for each in speeds), min(speeds))
            self._descriptors[DescriptorType.BOS] = bytes(BosDescriptor((Usb2Extension(), capability)))
        if speed is not Speed.SUPER:
            other, _ = _configure(functions, Speed.FULL if speed is Speed.HIGH else Speed.HIGH, attributes)
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
            manufacturer_index=1 if identity.manufacturer else 0,
            product_index=2 if identity.product else 0,
            serial_number_index=3 if identity.serial_number else 0,
        )
        self._descriptors[DescriptorType.DEVICE] = bytes(device)

    def descriptor(self, kind: int, index: int) -> bytes | None:
        """Return the descriptor for GET_DESCRIPTOR; None if the device has no such descriptor at this speed."""
        if kind == DescriptorType.STRING:
            return self._string(index)
        return self._descriptors.get(DescriptorType(kind)) if not index and kind in _KINDS else None

    def _string(self, index: int) -> bytes | None:
        if not index:
            return language_ids(ENGLISH)
        text = self._strings[index - 1] if index <= len(self._strings) else ""
        return string_descriptor(text) if text else None


_KINDS = frozenset(DescriptorType)


def _configure(
    functions: Sequence[Function], speed: Speed, attributes: int
) -> tuple[ConfigurationDescriptor, tuple[Placement, ...]]:
    interfaces: list[InterfaceDescriptor] = []
    associations: list[InterfaceAssociation] = []
    placements: list[Placement] = []
    taken: set[int] = set()
    first = 0
    for function in functions:
        placed, placement = place(function.interfaces(speed), first, taken)
        head = placed[0]
        triple = head.interface_class, head.interface_subclass, head.interface_protocol
        associations.append(InterfaceAssociation(first, placement.interface_count, *triple))
        interfaces += placed
        placements.append(placement)
        first += placement.interface_count
    if len(functions) == 1:
        associations.clear()
    configuration = ConfigurationDescriptor(CONFIGURATION, tuple(interfaces), tuple(associations), attributes)
    return configuration, tuple(placements)
