"""Endpoint descriptors of virtual devices: the packet sizes and intervals that the specifications allow at each speed.

Sources: USB 2.0 specification, chapters 5.6 to 5.8 and table 9-13; USB 3.2 specification, chapters 9.6.6 and 9.6.7.
"""

from __future__ import annotations

from farplug.usb.descriptors import EndpointDescriptor, SuperSpeedCompanion
from farplug.usb.types import Speed, TransferType

_BULK_PACKET_SIZES = {Speed.FULL: 64, Speed.HIGH: 512, Speed.SUPER: 1024}
_MAX_PERIODIC_SIZES = {
    (Speed.FULL, TransferType.INTERRUPT): 64,
    (Speed.FULL, TransferType.ISOCHRONOUS): 1023,
}
_MAX_PERIODIC_SIZE = 1024
_MICROFRAME = 125
_FRAME = 1000
"""Microseconds."""
_MAX_FRAMES = 255
_MAX_EXPONENT = 16


def bulk_packet_size(speed: Speed) -> int:
    """Return wMaxPacketSize of a bulk endpoint in bytes; at Full Speed the largest of the valid values."""
    return _BULK_PACKET_SIZES[speed]


def max_packet_size(type: TransferType, speed: Speed) -> int:
    """Return the largest wMaxPacketSize of an endpoint in bytes, for one packet in an interval."""
    if type is TransferType.BULK:
        return bulk_packet_size(speed)
    return _MAX_PERIODIC_SIZES.get((speed, type), _MAX_PERIODIC_SIZE)


def interval(microseconds: int, type: TransferType, speed: Speed) -> int:
    """Return bInterval of an interrupt or isochronous endpoint: the longest interval that is not above the given one.

    At Full Speed an interrupt endpoint counts frames of 1 ms. Others count with an exponent: 2^(bInterval - 1) frames
    at Full Speed, or microframes of 125 µs at higher speeds (USB 2.0, table 9-13).
    """
    if speed <= Speed.FULL and type is TransferType.INTERRUPT:
        return min(max(1, microseconds // _FRAME), _MAX_FRAMES)
    unit = _FRAME if speed <= Speed.FULL else _MICROFRAME
    return min(max(1, (microseconds // unit).bit_length()), _MAX_EXPONENT)


def interval_microseconds(value: int, type: TransferType, speed: Speed) -> int:
    """Return the microseconds of a valid bInterval of an interrupt or isochronous endpoint."""
    if speed <= Speed.FULL and type is TransferType.INTERRUPT:
        return value * _FRAME
    return (_FRAME if speed <= Speed.FULL else _MICROFRAME) << value - 1


def bulk_endpoint(
    address: int, speed: Speed, *, max_burst: int = 0, streams_exponent: int = 0, extra: bytes = b""
) -> EndpointDescriptor:
    """Make the descriptor of a bulk endpoint.

    Args:
        address: bEndpointAddress.
        speed: the speed that the device runs at.
        max_burst: bMaxBurst, from SuperSpeed on.
        streams_exponent: log2 of the number of streams, from SuperSpeed on; 0 for none.
        extra: class-specific descriptors that follow.
    """
    companion = SuperSpeedCompanion(max_burst, streams_exponent) if speed >= Speed.SUPER else None
    return EndpointDescriptor(address, TransferType.BULK, bulk_packet_size(speed), companion=companion, extra=extra)


def periodic_endpoint(
    address: int, type: TransferType, speed: Speed, *, packet_size: int, microseconds: int, attributes: int = 0
) -> EndpointDescriptor:
    """Make the descriptor of an interrupt or isochronous endpoint with one packet in an interval.

    Args:
        address: bEndpointAddress.
        type: interrupt or isochronous.
        speed: the speed that the device runs at.
        packet_size: wMaxPacketSize in bytes.
        microseconds: the interval; see :func:`interval`.
        attributes: the other bits of bmAttributes: synchronization and usage of an isochronous endpoint.

    Raises:
        ValueError: the packet is larger than the speed allows.
    """
    most = max_packet_size(type, speed)
    if not 1 <= packet_size <= most:
        raise ValueError(f"{packet_size} bytes is not a valid {type} packet size at {speed} speed: 1 to {most}")
    companion = SuperSpeedCompanion(bytes_per_interval=packet_size) if speed >= Speed.SUPER else None
    value = interval(microseconds, type, speed)
    return EndpointDescriptor(address, type | attributes, packet_size, value, companion=companion)
