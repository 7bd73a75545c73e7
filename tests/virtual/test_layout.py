from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from tests.virtual.bulk_only import Pattern

from farplug.usb import Identity, Speed, Transfer, TransferType
from farplug.usb.descriptors import (
    BosDescriptor,
    ConfigurationDescriptor,
    DeviceDescriptor,
    DeviceQualifier,
    EndpointDescriptor,
    InterfaceAssociation,
    InterfaceDescriptor,
    SuperSpeedCapability,
    Usb2Extension,
    parse_string,
)
from farplug.usb.types import DescriptorType
from farplug.virtual import Disk, Function, StorageTransport
from farplug.virtual.layout import Layout, place

BOTH = (Speed.SUPER, Speed.HIGH)


class Wide(Function):
    """Two interfaces, the second with two settings."""

    def interfaces(self, speed: Speed) -> Sequence[InterfaceDescriptor]:
        def endpoint(address: int) -> EndpointDescriptor:
            return EndpointDescriptor(address, TransferType.BULK, 512)

        return (
            InterfaceDescriptor(0, 0, 2, 2, 1, (EndpointDescriptor(0x83, TransferType.INTERRUPT, 8, 9),)),
            InterfaceDescriptor(1, 0, 10, 0, 0),
            InterfaceDescriptor(1, 1, 10, 0, 0, (endpoint(0x81), endpoint(0x02))),
        )

    def submit(self, transfer: Transfer) -> None:
        raise AssertionError

    def cancel(self, transfer: Transfer) -> None:
        raise AssertionError

    def reset(self, *, port_reset: bool) -> None:
        raise AssertionError


def layout(speed: Speed, *functions: Function, speeds: Sequence[Speed] = BOTH) -> Layout:
    identity = Identity(speed, 0x1D6B, 0x0104, 0x0100, manufacturer="farplug", serial_number="ABC")
    return Layout(identity, functions or (Disk(Pattern()),), speeds, remote_wakeup=False)


def test_superspeed() -> None:
    one = layout(Speed.SUPER)
    device = DeviceDescriptor.parse(one.descriptor(DescriptorType.DEVICE, 0) or b"")
    assert device == DeviceDescriptor(
        0x0320, 0x1D6B, 0x0104, 0x0100, max_packet_size_0=9, manufacturer_index=1, serial_number_index=3
    )
    assert not device.warnings
    configuration = ConfigurationDescriptor.parse(one.descriptor(DescriptorType.CONFIGURATION, 0) or b"")
    assert configuration == one.configuration
    assert not configuration.warnings
    assert one.descriptor(DescriptorType.CONFIGURATION, 0) == bytes.fromhex(
        "09 02 79 00 01 01 00 c0 00  09 04 00 00 02 08 06 50 00"
        "07 05 81 02 00 04 00  06 30 0f 00 00 00  07 05 02 02 00 04 00  06 30 0f 00 00 00"
        "09 04 00 01 04 08 06 62 00"
        "07 05 04 02 00 04 00  06 30 0f 00 00 00  04 24 01 00  07 05 83 02 00 04 00  06 30 0f 05 00 00  04 24 02 00"
        "07 05 81 02 00 04 00  06 30 0f 05 00 00  04 24 03 00  07 05 02 02 00 04 00  06 30 0f 05 00 00  04 24 04 00"
    )
    bos = BosDescriptor.parse(one.descriptor(DescriptorType.BOS, 0) or b"")
    assert bos == BosDescriptor((Usb2Extension(0x02), SuperSpeedCapability(0x0C, 2)))
    assert one.descriptor(DescriptorType.DEVICE_QUALIFIER, 0) is None
    assert one.descriptor(DescriptorType.OTHER_SPEED_CONFIGURATION, 0) is None


@pytest.mark.parametrize(("speed", "size", "other"), [(Speed.HIGH, 512, 64), (Speed.FULL, 64, 512)])
@pytest.mark.parametrize("super_too", [False, True])
def test_usb_2(speed: Speed, size: int, other: int, super_too: bool) -> None:
    speeds = (*((Speed.SUPER,) if super_too else ()), Speed.HIGH, Speed.FULL)
    one = layout(speed, speeds=speeds)
    version = 0x0210 if super_too else 0x0200
    device = DeviceDescriptor.parse(one.descriptor(DescriptorType.DEVICE, 0) or b"")
    assert (device.usb_version, device.max_packet_size_0) == (version, 64)
    assert (one.descriptor(DescriptorType.BOS, 0) is not None) is super_too
    assert one.descriptor(DescriptorType.DEVICE_QUALIFIER, 0) == bytes(DeviceQualifier(version))
    for kind, expected in ((DescriptorType.CONFIGURATION, size), (DescriptorType.OTHER_SPEED_CONFIGURATION, other)):
        raw = one.descriptor(kind, 0) or b""
        assert raw[1] == kind
        (interface,) = ConfigurationDescriptor.parse(raw).select()
        assert {endpoint.max_packet_size for endpoint in interface.endpoints} == {expected}


def test_strings() -> None:
    one = layout(Speed.SUPER)
    assert one.descriptor(DescriptorType.STRING, 0) == bytes.fromhex("04 03 09 04")
    assert parse_string(one.descriptor(DescriptorType.STRING, 1) or b"") == "farplug"
    assert parse_string(one.descriptor(DescriptorType.STRING, 3) or b"") == "ABC"
    assert [one.descriptor(DescriptorType.STRING, index) for index in (2, 4, 0xEE)] == [None] * 3


@pytest.mark.parametrize("kind", [0, 4, 5, 8, 11, 16, 0x21, 0x22, 48, 255])
def test_no_such_descriptor(kind: int) -> None:
    assert layout(Speed.HIGH).descriptor(kind, 0) is None


@pytest.mark.parametrize("kind", [1, 2, 6, 7, 15])
def test_no_such_index(kind: int) -> None:
    assert layout(Speed.HIGH).descriptor(kind, 0) is not None
    assert layout(Speed.HIGH).descriptor(kind, 1) is None


def test_functions_do_not_collide() -> None:
    bulk_only = partial(Disk, transport=StorageTransport.BOT)
    one = layout(Speed.HIGH, bulk_only(Pattern()), Wide(), bulk_only(Pattern()))
    assert (one.identity.device_class, one.identity.device_subclass, one.identity.device_protocol) == (0xEF, 2, 1)
    configuration = ConfigurationDescriptor.parse(bytes(one.configuration))
    assert not configuration.warnings
    assert configuration.associations == (
        InterfaceAssociation(0, 1, 8, 6, 0x50),
        InterfaceAssociation(1, 2, 2, 2, 1),
        InterfaceAssociation(3, 1, 8, 6, 0x50),
    )
    assert [(i.number, i.alternate, [e.address for e in i.endpoints]) for i in configuration.interfaces] == [
        (0, 0, [0x81, 0x02]),
        (1, 0, [0x83]),
        (2, 0, []),
        (2, 1, [0x82, 0x01]),
        (3, 0, [0x84, 0x03]),
    ]
    assert [placement.first_interface for placement in one.placements] == [0, 1, 3]
    assert one.placements[1].addresses == {0x81: 0x82, 0x02: 0x01, 0x83: 0x83}
    assert one.placements[2].own == {0x84: 0x81, 0x03: 0x02}


def test_too_many_endpoints() -> None:
    endpoints = tuple(EndpointDescriptor(0x80 | number, 2, 512) for number in range(1, 16))
    taken: set[int] = set()
    place((InterfaceDescriptor(0, 0, 255, 0, 0, endpoints),), 0, taken)
    with pytest.raises(ValueError, match="15 IN endpoints"):
        place((InterfaceDescriptor(0, 0, 255, 0, 0, endpoints[:1]),), 1, taken)
