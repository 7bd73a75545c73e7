from __future__ import annotations

import random

import pytest

from farplug.usb import Endpoint, Interface, TransferType
from farplug.usb.descriptors import (
    MAX_WARNINGS,
    BosDescriptor,
    ConfigurationDescriptor,
    ContainerId,
    DeviceDescriptor,
    DeviceQualifier,
    EndpointDescriptor,
    InterfaceAssociation,
    InterfaceDescriptor,
    OtherCapability,
    SuperSpeedCapability,
    SuperSpeedCompanion,
    Usb2Extension,
    language_ids,
    parse_string,
    string_descriptor,
)
from farplug.usb.types import DescriptorType


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def device_descriptor() -> tuple[bytes, DeviceDescriptor]:
    return raw("12 01 20 03 ef 02 01 09 6b 1d 04 01 00 01 01 02 03 01"), DeviceDescriptor(
        0x0320, 0x1D6B, 0x0104, 0x0100, 0xEF, 2, 1, 9, 1, 2, 3, 1
    )


# A webcam: two interfaces with an association, class-specific descriptors, isochronous settings, an interrupt endpoint
WEBCAM = raw(
    "09 02 76 00 02 01 00 80 fa"
    "08 0b 00 02 0e 03 00 05"
    "09 04 00 00 01 0e 01 00 05"
    "0d 24 01 00 01 28 00 80 c3 c9 01 01 01"
    "09 24 03 02 01 01 00 01 00"
    "07 05 83 03 10 00 06"
    "05 25 03 10 00"
    "09 04 01 00 00 0e 02 00 00"
    "0e 24 01 01 0e 00 81 00 02 00 00 00 01 00"
    "09 04 01 01 01 0e 02 00 00"
    "07 05 81 05 00 13 01"
    "09 04 01 02 01 0e 02 00 00"
    "07 05 81 05 fc 03 01"
)
WEBCAM = WEBCAM[:2] + len(WEBCAM).to_bytes(2, "little") + WEBCAM[4:]

# A UAS disk at SuperSpeed: Bulk-Only as setting 0, UAS with streams and pipe usages as setting 1
UAS = raw(
    "09 02 79 00 01 01 00 80 70"
    "09 04 00 00 02 08 06 50 00"
    "07 05 81 02 00 04 00 06 30 0f 00 00 00"
    "07 05 02 02 00 04 00 06 30 0f 00 00 00"
    "09 04 00 01 04 08 06 62 00"
    "07 05 81 02 00 04 00 06 30 0f 05 00 00 04 24 03 00"
    "07 05 02 02 00 04 00 06 30 0f 05 00 00 04 24 04 00"
    "07 05 83 02 00 04 00 06 30 0f 05 00 00 04 24 02 00"
    "07 05 04 02 00 04 00 06 30 0f 00 00 00 04 24 01 00"
)

# A keyboard at full speed with an audio endpoint of nine bytes and an OTG descriptor, put together for the test
ODD = raw(
    "09 02 38 00 02 01 00 a0 32"
    "03 09 03"
    "09 04 00 00 01 03 01 01 00"
    "09 21 11 01 00 01 22 41 00"
    "07 05 81 03 08 00 0a"
    "09 04 01 00 01 01 02 00 00"
    "09 05 02 09 c0 00 01 00 00"
)
ODD = ODD[:2] + len(ODD).to_bytes(2, "little") + ODD[4:]


@pytest.mark.parametrize("data", [WEBCAM, UAS, ODD], ids=["webcam", "uas", "odd"])
def test_real_configurations(data: bytes) -> None:
    configuration = ConfigurationDescriptor.parse(data)
    assert configuration.warnings == ()
    assert bytes(configuration) == data
    assert ConfigurationDescriptor.parse(memoryview(data)) == configuration


def test_webcam() -> None:
    configuration = ConfigurationDescriptor.parse(WEBCAM)
    assert configuration.associations == (InterfaceAssociation(0, 2, 14, 3, 0, 5),)
    assert configuration.select() == (
        Interface(0, 0, 14, 1, 0, (Endpoint(0x83, TransferType.INTERRUPT, 16, 6),)),
        Interface(1, 0, 14, 2, 0),
    )
    (_, video) = configuration.select({1: 1})
    assert video.endpoints == (Endpoint(0x81, TransferType.ISOCHRONOUS, 3 * 0x300, 1),)
    (_, video) = configuration.select({1: 2})
    assert video.endpoints == (Endpoint(0x81, TransferType.ISOCHRONOUS, 1020, 1),)
    assert configuration.select({1: 9}) == configuration.select()
    assert len(configuration.interfaces[0].extra) == 13 + 9
    assert configuration.interfaces[0].endpoints[0].extra == raw("05 25 03 10 00")


def test_uas() -> None:
    (uas,) = ConfigurationDescriptor.parse(UAS).select({0: 1})
    assert [(one.address, one.max_streams) for one in uas.endpoints] == [(0x81, 32), (2, 32), (0x83, 32), (4, 0)]
    settings = ConfigurationDescriptor.parse(UAS).settings(0)
    assert [one.extra for one in settings[1].endpoints] == [raw(f"04 24 0{pipe} 00") for pipe in (3, 4, 2, 1)]
    assert ConfigurationDescriptor.parse(UAS).settings(1) == {}


def test_odd() -> None:
    configuration = ConfigurationDescriptor.parse(ODD)
    assert configuration.extra == raw("03 09 03")
    assert configuration.interfaces[1].endpoints[0].tail == raw("00 00")


def test_other_speed() -> None:
    data = ConfigurationDescriptor.parse(UAS).to_bytes(DescriptorType.OTHER_SPEED_CONFIGURATION)
    assert data == UAS[:1] + b"\x07" + UAS[2:]
    assert ConfigurationDescriptor.parse(data).warnings == ()


INTERFACE = "09 04 00 00 01 ff 00 00 00"
BULK_IN = "07 05 81 02 00 02 00"
PLAIN = ConfigurationDescriptor(
    1, (InterfaceDescriptor(0, 0, 255, 0, 0, (EndpointDescriptor(0x81, TransferType.BULK, 512),)),), attributes=0x80
)


def chain(*parts: str, total: int | None = None, count: int = 1) -> bytes:
    body = b"".join(map(raw, parts))
    length = 9 + len(body) if total is None else total
    return raw("09 02") + length.to_bytes(2, "little") + bytes((count, 1, 0, 0x80, 0)) + body


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (chain(INTERFACE, BULK_IN, "00 00 00"), "has length 0: 3 bytes skipped"),
        (chain(INTERFACE, BULK_IN, "01"), "has length 1: 1 bytes skipped"),
        (chain(INTERFACE, BULK_IN, "07 05 82 02"), "has length 7, but 4 bytes are left"),
        (chain(INTERFACE, BULK_IN, "ff 24"), "has length 255, but 2 bytes are left"),
        (chain(INTERFACE, BULK_IN, total=9999), "wTotalLength 9999, not 25"),
        (chain(INTERFACE, BULK_IN, total=0), "wTotalLength 0, not 25"),
        (chain(INTERFACE, BULK_IN, "09 04 01 00 00 ff 00 00 00", total=25), "wTotalLength 25, not 34"),
        (chain(INTERFACE, BULK_IN, count=3), "bNumInterfaces 3, not 1"),
        (chain("07 05 82 02 00 02 00", INTERFACE, BULK_IN), "before the first interface"),
        (chain("06 30 0f 00 00 00", INTERFACE, BULK_IN), "without an endpoint"),
        (chain(INTERFACE, "06 30 0f 00 00 00", BULK_IN), "without an endpoint"),
        (chain(INTERFACE, BULK_IN, "04 30 00 00"), "too short"),
        (chain(INTERFACE, BULK_IN, "06 05 82 02 00 02"), "endpoint descriptor of 6 bytes"),
        (chain(INTERFACE, BULK_IN, "07 05 80 02 00 02 00"), "the address 80"),
        (chain(INTERFACE, BULK_IN, "07 05 f1 02 00 02 00"), "the address f1"),
        (chain(INTERFACE, BULK_IN, "07 05 81 03 00 02 00"), "81 occurs twice"),
        (chain(INTERFACE, BULK_IN, INTERFACE, "07 05 82 02 00 02 00"), "setting 0 occurs twice"),
        (chain(INTERFACE, BULK_IN, "08 04 01 00 00 ff 00 00", "07 05 82 02 00 02 00"), "of 8 bytes was skipped"),
        (chain(INTERFACE.replace("00 00 01", "00 00 05"), BULK_IN), "has 1 endpoints, not 5"),
        (chain(INTERFACE, BULK_IN).replace(b"\x09\x02", b"\x00\x02", 1), "bLength 0, not 9"),
        (chain(INTERFACE, BULK_IN).replace(b"\x09\x02", b"\x09\x01", 1), "has type 1, not 2"),
    ],
)
def test_malformed_chains(data: bytes, warning: str) -> None:
    configuration = ConfigurationDescriptor.parse(data)
    assert configuration == PLAIN
    assert warning in "; ".join(configuration.warnings)


def test_a_short_association_is_kept_as_it_is() -> None:
    configuration = ConfigurationDescriptor.parse(chain("03 0b 00", INTERFACE, BULK_IN))
    assert (configuration.associations, configuration.extra) == ((), raw("03 0b 00"))


def test_only_one_companion() -> None:
    data = chain(INTERFACE, BULK_IN, "06 30 0f 05 00 00", "06 30 01 00 00 00")
    configuration = ConfigurationDescriptor.parse(data)
    assert configuration.interfaces[0].endpoints[0].companion == SuperSpeedCompanion(15, 5)
    assert len(configuration.warnings) == 1


def test_two_interfaces_that_claim_the_same_endpoint() -> None:
    data = chain(INTERFACE, BULK_IN, "09 04 01 00 01 ff 00 00 00", BULK_IN, count=2)
    first, second = ConfigurationDescriptor.parse(data).select()
    assert (len(first.endpoints), len(second.endpoints)) == (1, 0)


def test_an_interface_without_setting_zero() -> None:
    data = chain("09 04 03 02 00 ff 00 00 00", "09 04 03 05 00 fe 00 00 00")
    assert ConfigurationDescriptor.parse(data).select({3: 1}) == (Interface(3, 2, 255, 0, 0),)


def test_warnings_are_bounded() -> None:
    configuration = ConfigurationDescriptor.parse(chain(*["02 05"] * 20_000))
    assert len(configuration.warnings) == MAX_WARNINGS


@pytest.mark.parametrize("data", [b"", b"\x09", b"\x09\x02\x20", WEBCAM[:9], WEBCAM[:40]])
def test_cut_configurations(data: bytes) -> None:
    assert ConfigurationDescriptor.parse(data).warnings


@pytest.mark.parametrize(
    ("attributes", "streams"), [(0, 0), (1, 2), (5, 32), (16, 65536), (17, 0), (31, 0), (0xE5, 32)]
)
def test_streams(attributes: int, streams: int) -> None:
    companion = SuperSpeedCompanion(15, attributes)
    assert companion.max_streams == streams
    assert EndpointDescriptor(0x81, TransferType.BULK, 1024, companion=companion).endpoint.max_streams == streams
    assert EndpointDescriptor(0x81, TransferType.ISOCHRONOUS, 1024, companion=companion).endpoint.max_streams == 0


@pytest.mark.parametrize(
    ("descriptor", "endpoint"),
    [
        (EndpointDescriptor(0x81, 0x03, 8, 0), Endpoint(0x81, TransferType.INTERRUPT, 8, 1)),
        (EndpointDescriptor(0x81, 0x02, 512, 0), Endpoint(0x81, TransferType.BULK, 512, 0)),
        (EndpointDescriptor(0x81, 0x0D, 0x1400, 0), Endpoint(0x81, TransferType.ISOCHRONOUS, 3072, 1)),
        (
            EndpointDescriptor(0x81, 0x01, 1024, 1, SuperSpeedCompanion(15, 2)),
            Endpoint(0x81, TransferType.ISOCHRONOUS, 48 * 1024, 1),
        ),
        (
            EndpointDescriptor(0x81, 0x01, 64, 1, SuperSpeedCompanion(2, 1)),
            Endpoint(0x81, TransferType.ISOCHRONOUS, 384, 1),
        ),
        (
            EndpointDescriptor(0x81, 0x01, 0xFFFF, 1, SuperSpeedCompanion(255, 255)),
            Endpoint(0x81, TransferType.ISOCHRONOUS, 48 * 1024, 1),
        ),
        (EndpointDescriptor(0x81, 0xFC, 0xFFFF, 255), Endpoint(0x81, TransferType.CONTROL, 0x7FF, 255)),
    ],
)
def test_endpoints(descriptor: EndpointDescriptor, endpoint: Endpoint) -> None:
    assert descriptor.endpoint == endpoint


def test_device() -> None:
    data, descriptor = device_descriptor()
    assert bytes(descriptor) == data
    assert DeviceDescriptor.parse(data) == descriptor
    assert DeviceDescriptor.parse(data).warnings == ()
    assert DeviceDescriptor.parse(data + b"tail") == descriptor


@pytest.mark.parametrize("length", [0, 1, 8, 17])
def test_short_device(length: int) -> None:
    data, _ = device_descriptor()
    short = DeviceDescriptor.parse(data[:length])
    assert bytes(short)[2:] == data[:length].ljust(18, b"\0")[2:]
    assert f"has {length} bytes, not 18" in short.warnings[0]


def test_qualifier() -> None:
    data = raw("0a 06 10 02 ef 02 01 40 01 00")
    qualifier = DeviceQualifier(0x0210, 0xEF, 2, 1, 64, 1)
    assert bytes(qualifier) == data
    assert DeviceQualifier.parse(data) == qualifier
    assert DeviceQualifier.parse(data[:3]).warnings


BOS = raw(
    "05 0f 31 00 04"
    "07 10 02 02 00 00 00"
    "0a 10 03 00 0e 00 01 0a 20 00"
    "14 10 04 00 000102030405060708090a0b0c0d0e0f"
    "07 10 0a 00 00 00 00"
)


def test_bos() -> None:
    bos = BosDescriptor(
        (
            Usb2Extension(2),
            SuperSpeedCapability(0x0E, 1, 0x0A, 0x20),
            ContainerId(bytes(range(16))),
            OtherCapability(raw("07 10 0a 00 00 00 00")),
        )
    )
    assert bytes(bos) == BOS
    assert BosDescriptor.parse(BOS) == bos
    assert BosDescriptor.parse(BOS).warnings == ()


@pytest.mark.parametrize(
    ("data", "kept", "warning"),
    [
        (b"", 0, "has 0 bytes"),
        (BOS[:12], 1, "bNumDeviceCaps 4, not 1"),
        (raw("05 0f 07 00 01 02 10"), 0, "type 16 in the BOS was skipped"),
        (raw("05 0f 0c 00 01 07 24 02 02 00 00 00"), 0, "type 36 in the BOS was skipped"),
        (raw("05 0f 08 00 01 03 10 03"), 1, ""),
        (raw("05 0f 02 00 01 03 10 03"), 1, "wTotalLength 2, not 8"),
        (raw("05 0f 08 00 01 00 10 03"), 0, "has length 0"),
        (raw("05 0f 08 00 01 01 10 03"), 0, "has length 1"),
        (raw("00 0f 08 00 01 03 10 03"), 1, "bLength 0, not 5"),
        (raw("ff 0f 08 00 01 03 10 03"), 0, "bLength 255, not 5"),
    ],
)
def test_malformed_bos(data: bytes, kept: int, warning: str) -> None:
    bos = BosDescriptor.parse(data)
    assert len(bos.capabilities) == kept
    assert warning in "; ".join(bos.warnings)


@pytest.mark.parametrize("text", ["", "farplug", "Größe 日本", "\N{PILE OF POO}", "x" * 126])
def test_strings(text: str) -> None:
    data = string_descriptor(text)
    assert (data[0], data[1]) == (len(data), 3)
    assert parse_string(data) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [("x" * 200, "x" * 126), ("x" * 125 + "\N{PILE OF POO}", "x" * 125), ("\ud800abc", "?abc")],
)
def test_strings_that_do_not_fit(text: str, kept: str) -> None:
    assert parse_string(string_descriptor(text)) == kept


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"\x04", ""),
        (b"\x04\x02a\0", ""),
        (b"\x00\x03a\0", ""),
        (b"\x01\x03a\0", ""),
        (b"\x02\x03a\0", ""),
        (b"\x03\x03a\0", ""),
        (b"\xff\x03a\0b\0", "ab"),
        (b"\x05\x03a\0b", "a"),
        (b"\x06\x03a\0\0\0", "a"),
        (b"\x04\x03\0\xd8", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_malformed_strings(data: bytes, text: str) -> None:
    assert parse_string(data) == text


def test_languages() -> None:
    assert language_ids(0x0409) == raw("04 03 09 04")
    assert language_ids(0x0409, 0x0407) == raw("06 03 09 04 07 04")


@pytest.mark.parametrize("seed", range(10))
def test_damaged_configurations_never_raise_and_settle(seed: int) -> None:
    """Check that parsed garbage, built and parsed again, is the same."""
    source = random.Random(seed)
    for _ in range(300):
        data = bytearray(source.choice([WEBCAM, UAS, ODD]))
        for _ in range(source.randrange(6)):
            data[source.randrange(len(data))] = source.choice([0, 1, 4, 5, 255, source.randrange(256)])
        kept = ConfigurationDescriptor.parse(data[: source.choice([len(data), source.randrange(len(data))])])
        again = ConfigurationDescriptor.parse(bytes(kept))
        assert again.select() == kept.select()
        addresses = [endpoint.address for interface in kept.select() for endpoint in interface.endpoints]
        assert len(addresses) == len(set(addresses))


def many_interfaces(count: int) -> bytes:
    """Return a configuration with that many interface numbers."""
    body = b"".join(bytes((9, 4, number, 0, 0, 255, 0, 0, 0)) for number in range(count))
    return bytes((9, 2)) + (9 + len(body)).to_bytes(2, "little") + bytes((count & 0xFF, 1, 0, 0x80, 50)) + body


def test_more_interfaces_than_the_configuration_can_count() -> None:
    assert bytes(ConfigurationDescriptor.parse(many_interfaces(255))) == many_interfaces(255)
    parsed = ConfigurationDescriptor.parse(many_interfaces(256))
    assert len(parsed.select()) == 256
    with pytest.raises(ValueError, match=r"256.* do not fit the fields of the configuration descriptor"):
        bytes(parsed)


@pytest.mark.parametrize(
    ("descriptor", "name"),
    [
        (DeviceDescriptor(usb_version=0x10000, vendor_id=0, product_id=0), "device"),
        (EndpointDescriptor(0x81, 2, 0x10000), "endpoint"),
        (EndpointDescriptor(0x81, 2, 512, tail=bytes(300)), "endpoint"),
        (SuperSpeedCompanion(max_burst=256), "superspeed endpoint companion"),
        (InterfaceAssociation(0, 256, 0, 0, 0), "interface association"),
        (BosDescriptor((OtherCapability(bytes(3)),) * 256), "bos"),
        (Usb2Extension(1 << 32), "device capability"),
        (SuperSpeedCapability(speeds=1 << 16), "device capability"),
    ],
)
def test_values_that_do_not_fit(descriptor: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"do not fit the fields of the {name} descriptor"):
        bytes(descriptor)  # type: ignore[call-overload]


def test_too_many_languages() -> None:
    with pytest.raises(ValueError, match="do not fit the fields of the string descriptor"):
        language_ids(*range(127))
