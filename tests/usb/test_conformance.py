from __future__ import annotations

import pytest

from farplug.usb import Speed, TransferType
from farplug.usb.conformance import configuration_faults, endpoint_faults
from farplug.usb.descriptors import (
    ConfigurationDescriptor,
    EndpointDescriptor,
    InterfaceDescriptor,
    SuperSpeedCompanion,
)

BULK, INTERRUPT, ISOCHRONOUS = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISOCHRONOUS
LOW, FULL, HIGH, SUPER = Speed.LOW, Speed.FULL, Speed.HIGH, Speed.SUPER


def endpoint(speed: Speed, kind: TransferType, size: int, interval: int = 1, burst: int = 0) -> EndpointDescriptor:
    companion = SuperSpeedCompanion(burst) if speed >= SUPER else None
    return EndpointDescriptor(0x81, kind, size, interval, companion)


@pytest.mark.parametrize(
    ("speed", "kind", "size", "right"),
    [
        # USB 2.0, 5.8.3 and USB 3.2, table 9-26
        (FULL, BULK, 8, ""),
        (FULL, BULK, 64, ""),
        (FULL, BULK, 512, "8, 16, 32 or 64"),
        (HIGH, BULK, 512, ""),
        (HIGH, BULK, 64, "512"),
        (HIGH, BULK, 512 | 0x0800, "512"),
        (SUPER, BULK, 1024, ""),
        (SUPER, BULK, 512, "1024"),
        # USB 2.0, 5.7.3
        (LOW, INTERRUPT, 8, ""),
        (LOW, INTERRUPT, 9, "1 to 8"),
        (FULL, INTERRUPT, 64, ""),
        (FULL, INTERRUPT, 65, "1 to 64"),
        (HIGH, INTERRUPT, 1024 | 0x1000, ""),
        (HIGH, INTERRUPT, 1024 | 0x1800, "one with at most 2 additional transactions"),
        (HIGH, INTERRUPT, 1025, "1 to 1024"),
        (HIGH, INTERRUPT, 0, "1 to 1024"),
        (SUPER, INTERRUPT, 1024, ""),
        (SUPER, INTERRUPT, 64 | 0x0800, "1 to 1024"),
        # USB 2.0, 5.6.3
        (FULL, ISOCHRONOUS, 1023, ""),
        (FULL, ISOCHRONOUS, 1024, "0 to 1023"),
        (HIGH, ISOCHRONOUS, 1024 | 0x0800, ""),
        (SUPER, ISOCHRONOUS, 0, ""),
        (SUPER, TransferType.CONTROL, 7, ""),
    ],
)
def test_packet_sizes(speed: Speed, kind: TransferType, size: int, right: str) -> None:
    faults = endpoint_faults(endpoint(speed, kind, size), speed)
    assert faults == (
        [f"the {kind} endpoint 81 has wMaxPacketSize {size}, not {right} ({speed} speed)"] if right else []
    )


@pytest.mark.parametrize(
    ("speed", "descriptor", "fault"),
    [
        (SUPER, EndpointDescriptor(0x81, BULK, 1024), "has no SuperSpeed companion"),
        (HIGH, EndpointDescriptor(0x81, BULK, 512, companion=SuperSpeedCompanion()), "has a SuperSpeed companion"),
        (SUPER, endpoint(SUPER, BULK, 1024, burst=16), "has bMaxBurst 16, not 0 to 15"),
        (SUPER, endpoint(SUPER, INTERRUPT, 64, burst=1), "has wMaxPacketSize 64, not 1024, which a burst requires"),
        (HIGH, EndpointDescriptor(0x80, BULK, 512), "has an address that is not valid: 01 to 0f, or 81 to 8f"),
        (HIGH, EndpointDescriptor(0x91, BULK, 512), "has an address that is not valid: 01 to 0f, or 81 to 8f"),
        (LOW, endpoint(LOW, BULK, 8), "needs a faster device"),
        (LOW, endpoint(LOW, ISOCHRONOUS, 8), "needs a faster device"),
        (FULL, endpoint(FULL, INTERRUPT, 8, 0), "has bInterval 0, not 1 to 255"),
        (FULL, endpoint(FULL, ISOCHRONOUS, 8, 17), "has bInterval 17, not 1 to 16"),
        (HIGH, endpoint(HIGH, INTERRUPT, 8, 17), "has bInterval 17, not 1 to 16"),
    ],
)
def test_faults(speed: Speed, descriptor: EndpointDescriptor, fault: str) -> None:
    (found,) = endpoint_faults(descriptor, speed)
    assert fault in found


def test_a_configuration() -> None:
    good = endpoint(HIGH, BULK, 512)
    configuration = ConfigurationDescriptor(
        1, (InterfaceDescriptor(0, 0, 255, 0, 0, (good, good)), InterfaceDescriptor(0, 1, 255, 0, 0, (good,)))
    )
    assert configuration_faults(configuration, HIGH) == [
        "interface 0, alternate setting 0: endpoint 81 is described twice"
    ]
    assert configuration_faults(configuration, SUPER)[-1] == (
        "interface 0, alternate setting 1: the bulk endpoint 81 has no SuperSpeed companion (super speed)"
    )
    cut = ConfigurationDescriptor.parse(bytes(ConfigurationDescriptor(1))[:8])
    assert configuration_faults(cut, HIGH) == list(cut.warnings)
    assert cut.warnings
