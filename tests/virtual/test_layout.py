from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from farplug.usb.endpoints import bulk_endpoint
from farplug.usb.types import DescriptorType
from farplug.virtual import Disk, Function, Numbers, StorageTransport
from farplug.virtual.function import Strings
from farplug.virtual.layout import Layout

BOTH = (Speed.SUPER, Speed.HIGH)


class Wide(Function):
    """Two interfaces, the second with two settings."""

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
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
        0x0320, 0x1D6B, 0x0104, 0x0100, max_packet_size_0=9, manufacturer_index=1, serial_number_index=2
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
    assert parse_string(one.descriptor(DescriptorType.STRING, 2) or b"") == "ABC"
    assert [one.descriptor(DescriptorType.STRING, index) for index in (3, 4, 0xEE)] == [None] * 3


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
    assert configuration.associations == (InterfaceAssociation(1, 2, 2, 2, 1),)
    assert [(i.number, i.alternate, [e.address for e in i.endpoints]) for i in configuration.interfaces] == [
        (0, 0, [0x81, 0x02]),
        (1, 0, [0x83]),
        (2, 0, []),
        (2, 1, [0x82, 0x01]),
        (3, 0, [0x84, 0x03]),
    ]
    assert [placement.numbers.first_interface for placement in one.placements] == [0, 1, 3]
    assert one.placements[1].numbers.addresses == {0x81: 0x82, 0x02: 0x01, 0x83: 0x83}
    assert one.placements[2].own == {0x84: 0x81, 0x03: 0x02}


def test_a_lone_function_of_several_interfaces_has_an_association() -> None:
    one = layout(Speed.HIGH, Wide())
    assert one.configuration.associations == (InterfaceAssociation(0, 2, 2, 2, 1),)
    assert one.identity.device_class == 0xEF


def test_functions_of_one_interface_have_no_association() -> None:
    one = layout(Speed.HIGH, Disk(Pattern()), Disk(Pattern()))
    assert one.configuration.associations == ()
    assert one.identity.device_class == 0


class Camera(Wide):
    """Writes its numbers into class-specific descriptors."""

    association = (0x0E, 3, 0)

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        first, second, third = super().interfaces(speed, numbers)
        extra = bytes((4, 0x24, numbers.interface(1), numbers.endpoint(0x81)))
        return replace(first, extra=extra, string_index=numbers.string("a camera")), second, third


def test_a_function_writes_the_numbers_of_the_device() -> None:
    one = layout(Speed.HIGH, Wide(), Camera(), Camera())
    settings = {(each.number, each.alternate): each for each in one.configuration.interfaces}
    assert settings[2, 0].extra == bytes((4, 0x24, 3, settings[3, 1].endpoints[0].address))
    assert settings[4, 0].extra == bytes((4, 0x24, 5, settings[5, 1].endpoints[0].address))
    assert [association.function_class for association in one.configuration.associations] == [2, 0x0E, 0x0E]
    index = settings[2, 0].string_index
    assert settings[4, 0].string_index == index
    assert parse_string(one.descriptor(DescriptorType.STRING, index) or b"") == "a camera"
    other = ConfigurationDescriptor.parse(one.descriptor(DescriptorType.OTHER_SPEED_CONFIGURATION, 0) or b"")
    assert other.interfaces[3].string_index == index


def test_a_function_that_changes_its_mind() -> None:
    class Fickle(Wide):
        def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
            return super().interfaces(speed, numbers)[: 1 if numbers.addresses is None else 3]

    with pytest.raises(ValueError, match="Fickle describes other interfaces"):
        layout(Speed.HIGH, Fickle())


def test_strings_are_bounded() -> None:
    strings = Strings()
    assert strings.index("") == 0
    assert strings.text(0) == strings.text(1) == ""
    assert [strings.index(str(number)) for number in (*range(255), 7)] == [*range(1, 256), 8]
    with pytest.raises(ValueError, match="255 strings"):
        strings.index("one more")


def test_too_many_endpoints() -> None:
    class Many(Wide):
        def __init__(self, count: int) -> None:
            self.count = count

        def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
            endpoints = tuple(bulk_endpoint(0x81 + number, speed) for number in range(self.count))
            return (InterfaceDescriptor(0, 0, 255, 0, 0, endpoints),)

    layout(Speed.HIGH, Many(15))
    with pytest.raises(ValueError, match="15 IN endpoints"):
        layout(Speed.HIGH, Many(15), Many(1))
