from __future__ import annotations

from dataclasses import replace

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice
from tests.physical.support import EVERYTHING, STREAMING

from farplug.libusb.identity import read_configurations, read_identity
from farplug.libusb.library import speed_of
from farplug.usb import Speed
from farplug.usb.descriptors import ConfigurationDescriptor, EndpointDescriptor, InterfaceDescriptor


@pytest.mark.parametrize("configuration", [EVERYTHING, STREAMING, ConfigurationDescriptor(5, extra=b"\x03\x0b\x00")])
def test_configurations_are_read_as_they_are(configuration: ConfigurationDescriptor) -> None:
    assert read_configurations(FakeDevice(configuration)) == (configuration,)


def test_invalid_descriptors_are_reported_and_skipped() -> None:
    endpoints = (EndpointDescriptor(0x81, 2, 512), EndpointDescriptor(0x81, 3, 8, 1), EndpointDescriptor(0x80, 2, 512))
    lying = ConfigurationDescriptor(1, (InterfaceDescriptor(0, 0, 255, 0, 0, endpoints, extra=b"broken"),))
    twin = replace(lying, interfaces=())
    (read,) = read_configurations(FakeDevice(lying, twin))
    assert [endpoint.address for endpoint in read.interfaces[0].endpoints] == [0x81]
    assert len(read.warnings) == 3


def test_more_than_a_configuration_can_hold() -> None:
    settings = tuple(InterfaceDescriptor(0, n, 255, 0, 0, extra=bytes((255, 36)) + bytes(253)) for n in range(256))
    (read,) = read_configurations(FakeDevice(ConfigurationDescriptor(1, settings)))
    assert 200 < len(read.interfaces) <= 256
    assert read.warnings


def test_identity() -> None:
    identity = read_identity(FakeDevice(ids=(1, 2)), manufacturer="A", product="B", serial_number="C")
    assert (identity.vendor_id, identity.product_id, identity.device_version) == (1, 2, 0x0102)
    assert (identity.device_class, identity.device_subclass, identity.device_protocol) == (0xEF, 2, 1)
    assert str(identity) == "0001:0002 A B"


@pytest.mark.parametrize(
    ("code", "speed"),
    [
        (usb1.SPEED_LOW, Speed.LOW),
        (usb1.SPEED_FULL, Speed.FULL),
        (usb1.SPEED_HIGH, Speed.HIGH),
        (usb1.SPEED_SUPER, Speed.SUPER),
        (usb1.SPEED_SUPER_PLUS_X2, Speed.SUPER_PLUS),
        (usb1.SPEED_UNKNOWN, Speed.FULL),
        (99, Speed.FULL),
    ],
)
def test_speeds(code: int, speed: Speed) -> None:
    assert speed_of(code) is speed
