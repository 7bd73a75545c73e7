from __future__ import annotations

import pytest

from farplug.usb import Speed, TransferType
from farplug.usb.conformance import endpoint_faults
from farplug.usb.endpoints import (
    bulk_endpoint,
    interval,
    interval_microseconds,
    max_packet_size,
    periodic_endpoint,
)

SPEEDS = (Speed.FULL, Speed.HIGH, Speed.SUPER)
ISOCHRONOUS, BULK, INTERRUPT = TransferType.ISOCHRONOUS, TransferType.BULK, TransferType.INTERRUPT


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_every_descriptor_conforms(speed: Speed) -> None:
    assert endpoint_faults(bulk_endpoint(0x81, speed), speed) == []
    for type in (ISOCHRONOUS, INTERRUPT):
        most = max_packet_size(type, speed)
        for size in (1, most):
            for microseconds in (0, 1, 125, 1000, 4000, 10_000_000):
                one = periodic_endpoint(0x82, type, speed, packet_size=size, microseconds=microseconds)
                assert endpoint_faults(one, speed) == []
        for size in (0, most + 1):
            with pytest.raises(ValueError, match=f"1 to {most}"):
                periodic_endpoint(0x82, type, speed, packet_size=size, microseconds=1000)


@pytest.mark.parametrize(
    ("type", "speed", "microseconds", "value"),
    [
        (INTERRUPT, Speed.FULL, 10_000, 10),
        (INTERRUPT, Speed.FULL, 500, 1),
        (INTERRUPT, Speed.FULL, 1_000_000, 255),
        (INTERRUPT, Speed.HIGH, 1000, 4),
        (INTERRUPT, Speed.HIGH, 1999, 4),
        (INTERRUPT, Speed.HIGH, 2000, 5),
        (INTERRUPT, Speed.SUPER, 125, 1),
        (INTERRUPT, Speed.SUPER, 100, 1),
        (INTERRUPT, Speed.HIGH, 10_000_000, 16),
        (ISOCHRONOUS, Speed.FULL, 1000, 1),
        (ISOCHRONOUS, Speed.FULL, 4000, 3),
        (ISOCHRONOUS, Speed.HIGH, 1000, 4),
    ],
)
def test_intervals(type: TransferType, speed: Speed, microseconds: int, value: int) -> None:
    assert interval(microseconds, type, speed) == value
    assert interval(interval_microseconds(value, type, speed), type, speed) == value


def test_superspeed_parts() -> None:
    assert bulk_endpoint(0x81, Speed.HIGH, max_burst=15, streams_exponent=5).companion is None
    companion = bulk_endpoint(0x81, Speed.SUPER, max_burst=15, streams_exponent=5).companion
    assert companion is not None
    assert (companion.max_burst, companion.max_streams) == (15, 32)
    periodic = periodic_endpoint(0x81, ISOCHRONOUS, Speed.SUPER, packet_size=32, microseconds=1000, attributes=4)
    assert (periodic.attributes, periodic.companion and periodic.companion.bytes_per_interval) == (5, 32)
