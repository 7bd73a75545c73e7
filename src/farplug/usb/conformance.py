"""Checks of endpoint descriptors against the USB specifications, for each speed.

Hosts differ in what they accept: Linux corrects many errors that Windows and firmware refuse. So a device is checked
against the specification, not against one host.

Sources: USB 2.0 specification, chapters 5.6.3, 5.7.3, 5.8.3 and table 9-13; USB 3.2 specification, chapters 9.6.6 and
9.6.7.
"""

from __future__ import annotations

from collections.abc import Iterator

from farplug.usb.descriptors import ConfigurationDescriptor, EndpointDescriptor
from farplug.usb.types import Speed, TransferType

_SIZE, _TRANSACTIONS = 0x07FF, 0x1800
"""wMaxPacketSize: bytes in a packet, and the bits with the additional transactions in a microframe."""
_FULL_SPEED_BULK = (8, 16, 32, 64)
_MAX_PERIODIC = {
    (Speed.LOW, TransferType.INTERRUPT): 8,
    (Speed.FULL, TransferType.INTERRUPT): 64,
    (Speed.FULL, TransferType.ISOCHRONOUS): 1023,
}
_MAX_PACKET_SIZE = 1024
_MAX_BURST = 15
_EXPONENT_INTERVAL = 16
"""The highest bInterval where it is an exponent, not a number of frames."""


def configuration_faults(configuration: ConfigurationDescriptor, speed: Speed) -> list[str]:
    """Return what is wrong with a configuration of a device that runs at ``speed``, one sentence for each fault.

    Includes the warnings of the parser (:attr:`ConfigurationDescriptor.warnings`).
    """
    faults = list(configuration.warnings)
    for setting in configuration.interfaces:
        where = f"interface {setting.number}, alternate setting {setting.alternate}"
        addresses = [endpoint.address for endpoint in setting.endpoints]
        twice = sorted({address for address in addresses if addresses.count(address) > 1})
        faults += [f"{where}: endpoint {address:02x} is described twice" for address in twice]
        for endpoint in setting.endpoints:
            faults += [f"{where}: {fault}" for fault in endpoint_faults(endpoint, speed)]
    return faults


def endpoint_faults(endpoint: EndpointDescriptor, speed: Speed) -> list[str]:
    """Return what is wrong with an endpoint of a device that runs at ``speed``, one phrase for each fault."""
    kind = TransferType(endpoint.attributes & 3)
    name = f"the {kind} endpoint {endpoint.address:02x}"
    return [f"{name} {fault} ({speed} speed)" for fault in _faults(endpoint, kind, speed)]


def _faults(endpoint: EndpointDescriptor, kind: TransferType, speed: Speed) -> Iterator[str]:
    if not endpoint.address & 0x0F or endpoint.address & 0x70:
        yield "has an address that is not valid: 01 to 0f, or 81 to 8f"
    if speed is Speed.LOW and kind in (TransferType.BULK, TransferType.ISOCHRONOUS):
        yield "needs a faster device"
    elif problem := _packet_size_fault(endpoint, kind, speed):
        yield f"has wMaxPacketSize {endpoint.max_packet_size}, not {problem}"
    companion = endpoint.companion
    if speed >= Speed.SUPER and companion is None:
        yield "has no SuperSpeed companion"
    elif speed < Speed.SUPER and companion is not None:
        yield "has a SuperSpeed companion"
    elif companion is not None and companion.max_burst > _MAX_BURST:
        yield f"has bMaxBurst {companion.max_burst}, not 0 to {_MAX_BURST}"
    if kind in (TransferType.INTERRUPT, TransferType.ISOCHRONOUS):
        frames = speed <= Speed.FULL and kind is TransferType.INTERRUPT
        most = 255 if frames else _EXPONENT_INTERVAL
        if not 1 <= endpoint.interval <= most:
            yield f"has bInterval {endpoint.interval}, not 1 to {most}"


def _packet_size_fault(endpoint: EndpointDescriptor, kind: TransferType, speed: Speed) -> str:
    """Return the valid values of wMaxPacketSize if its value is not valid; otherwise an empty string."""
    if kind is TransferType.CONTROL:
        return ""  # in practice only endpoint 0, which has no descriptor
    several = speed is Speed.HIGH and kind is not TransferType.BULK  # transactions in a microframe
    size = endpoint.max_packet_size & _SIZE if several else endpoint.max_packet_size
    if kind is TransferType.BULK:
        if speed is Speed.FULL:
            return "" if size in _FULL_SPEED_BULK else "8, 16, 32 or 64"
        right = 512 if speed is Speed.HIGH else _MAX_PACKET_SIZE
        return "" if size == right else str(right)
    most = _MAX_PERIODIC.get((speed, kind), _MAX_PACKET_SIZE)
    if several and endpoint.max_packet_size & _TRANSACTIONS == _TRANSACTIONS:
        return "one with at most 2 additional transactions"
    if endpoint.companion is not None and endpoint.companion.max_burst and size != _MAX_PACKET_SIZE:
        return f"{_MAX_PACKET_SIZE}, which a burst requires"
    least = 0 if kind is TransferType.ISOCHRONOUS else 1  # an isochronous setting may reserve no bandwidth
    return "" if least <= size <= most else f"{least} to {most}"
