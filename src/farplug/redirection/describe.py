"""The packets that describe a device to the guest: device_connect, interface_info and ep_info.

Source: usb-redirection-protocol.md, at these packets.
"""

from __future__ import annotations

from collections.abc import Iterator

from farplug.usb.device import Device
from farplug.usb.types import Speed, TransferType
from farplug.usbredir import packets

MAX_INTERFACES = 32
"""The interfaces that an interface_info has room for."""

_PERIODIC = (TransferType.INTERRUPT, TransferType.ISOCHRONOUS)


def device_connect(device: Device) -> packets.DeviceConnect:
    """Return the device_connect packet of a device."""
    identity = device.identity
    return packets.DeviceConnect(
        speed=min(identity.speed, Speed.SUPER),  # the protocol has no code for a higher speed
        device_class=identity.device_class,
        device_subclass=identity.device_subclass,
        device_protocol=identity.device_protocol,
        vendor_id=identity.vendor_id,
        product_id=identity.product_id,
        device_version=identity.device_version,
    )


def device_infos(device: Device) -> Iterator[packets.Packet]:
    """Return the interface_info and the ep_info of a device's current settings."""
    interfaces = device.interfaces[:MAX_INTERFACES]
    table = [packets.EndpointEntry()] * 32
    table[0] = table[16] = packets.EndpointEntry(type=TransferType.CONTROL)
    for interface in interfaces:
        for endpoint in interface.endpoints:
            # QEMU rejects a device with an interval of 0.
            interval = max(1, endpoint.interval) if endpoint.type in _PERIODIC else endpoint.interval
            table[packets.endpoint_index(endpoint.address)] = packets.EndpointEntry(
                type=endpoint.type,
                interval=interval,
                interface=interface.number,
                max_packet_size=endpoint.max_packet_size,
                max_streams=endpoint.max_streams,
            )
    yield packets.InterfaceInfo(
        interfaces=tuple(
            packets.InterfaceEntry(i.number, i.interface_class, i.interface_subclass, i.interface_protocol)
            for i in interfaces
        )
    )
    yield packets.EndpointInfo(endpoints=tuple(table))
