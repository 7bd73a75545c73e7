"""Identity and configurations of a device, from the descriptors that libusb has read. No call blocks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

from farplug.libusb.binding import UsbConfiguration, UsbDevice
from farplug.libusb.library import speed_of
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.device import Identity
from farplug.usb.types import DescriptorType


class _HasExtra(Protocol):
    def getExtra(self) -> Sequence[bytes]: ...


def read_identity(device: UsbDevice, *, manufacturer: str = "", product: str = "", serial_number: str = "") -> Identity:
    """Return the identity of a device. Its strings are given: libusb cannot read them without opening the device."""
    return Identity(
        speed_of(device.getDeviceSpeed()),
        device.getVendorID(),
        device.getProductID(),
        device.getbcdDevice(),
        device.getDeviceClass(),
        device.getDeviceSubClass(),
        device.getDeviceProtocol(),
        manufacturer,
        product,
        serial_number,
    )


def read_configurations(device: UsbDevice) -> tuple[ConfigurationDescriptor, ...]:
    """Return the configurations of a device, each bConfigurationValue once; their ``warnings`` report invalid parts."""
    configurations: dict[int, ConfigurationDescriptor] = {}
    for configuration in device.iterConfigurations():
        parsed = ConfigurationDescriptor.parse(_raw(configuration))
        configurations.setdefault(parsed.value, parsed)
    return tuple(configurations.values())


def _raw(configuration: UsbConfiguration) -> bytes:
    """Return the descriptors of a configuration as bytes, so that farplug's own parser checks every device."""
    body = bytearray(_extra(configuration))
    numbers: set[int] = set()
    for settings in configuration:
        for setting in settings:
            numbers.add(setting.getNumber())
            endpoints = list(setting)
            body += struct.pack(
                "<9B",
                9,
                DescriptorType.INTERFACE,
                setting.getNumber(),
                setting.getAlternateSetting(),
                len(endpoints),
                setting.getClass(),
                setting.getSubClass(),
                setting.getProtocol(),
                0,
            )
            body += _extra(setting)
            for endpoint in endpoints:
                body += struct.pack(
                    "<4BHB",
                    7,
                    DescriptorType.ENDPOINT,
                    endpoint.getAddress(),
                    endpoint.getAttributes(),
                    endpoint.getMaxPacketSize(),
                    endpoint.getInterval(),
                )
                body += _extra(endpoint)
    head = struct.pack(
        "<BBHBBBBB",
        9,
        DescriptorType.CONFIGURATION,
        min(9 + len(body), 0xFFFF),
        len(numbers),
        configuration.getConfigurationValue(),
        0,
        configuration.getAttributes(),
        min(configuration.getMaxPower() // 2, 0xFF),
    )
    return head + body


def _extra(descriptor: _HasExtra) -> bytes:
    try:
        return b"".join(map(bytes, descriptor.getExtra()))
    except ValueError:  # a chain of descriptors that is cut short or loops
        return b""
