"""What a virtual device says about itself at one speed: its functions' interfaces put together into descriptors."""

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
"""bConfigurationValue of the one configuration that there is."""

SPEEDS = (Speed.FULL, Speed.HIGH, Speed.SUPER)
"""What a virtual device can run at."""

_SELF_POWERED = 0xC0
_REMOTE_WAKEUP = 0x20
_ASSOCIATED = (0xEF, 0x02, 0x01)
"""The device class of a device with interface associations (IAD ECN, table 1-1)."""

_USB_2_0, _USB_2_1, _USB_3_2 = 0x0200, 0x0210, 0x0320
_SUPERSPEED_MAX_PACKET_SIZE_0 = 9


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a function is in the device.

    Attributes:
        first_interface: the device's number of the function's interface 0.
        interface_count: how many interfaces it has.
        addresses: the device's endpoint address for each of the function's own.
        own: the other way round.
    """

    first_interface: int
    interface_count: int
    addresses: Mapping[int, int]
    own: Mapping[int, int]


def place(
    interfaces: Sequence[InterfaceDescriptor], first: int, taken: set[int]
) -> tuple[tuple[InterfaceDescriptor, ...], Placement]:
    """Number a function's interfaces from ``first`` on, and give its endpoints addresses that are not ``taken``.

    An address stays what it is if it can. Class-specific descriptors are not touched. ``taken`` grows.

    Raises:
        ValueError: more than fifteen endpoints in one direction.
    """
    addresses: dict[int, int] = {}
    for own in sorted({endpoint.address for one in interfaces for endpoint in one.endpoints}):
        direction = own & Direction.IN
        candidates = (own, *(direction | number for number in range(1, 16)))
        address = next((one for one in candidates if one not in taken), None)
        if address is None:
            raise ValueError(f"a device has 15 {Direction(direction).name} endpoints at most")
        addresses[own] = address
        taken.add(address)
    moved = tuple(
        replace(
            one,
            number=first + one.number,
            endpoints=tuple(replace(each, address=addresses[each.address]) for each in one.endpoints),
        )
        for one in sorted(interfaces, key=lambda one: (one.number, one.alternate))
    )
    count = len({one.number for one in interfaces})
    return moved, Placement(first, count, addresses, {address: own for own, address in addresses.items()})


class Layout:
    """Everything that a device of these functions says at one speed.

    Args:
        identity: speed, ids and strings; the class triple is found here.
        functions: in this order.
        speeds: all that the device may run at.
        remote_wakeup: it may wake a sleeping guest.

    Attributes:
        identity: complete.
        configuration: the one configuration.
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
            capability = SuperSpeedCapability(sum(1 << one for one in speeds), min(speeds))
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
        """Answer GET_DESCRIPTOR; None if there is no such descriptor (at this speed)."""
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
