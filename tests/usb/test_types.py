from __future__ import annotations

import pytest

from farplug.usb import Direction, Endpoint, Recipient, RequestType, Setup, Speed, TransferType


@pytest.mark.parametrize(
    ("raw", "setup", "direction", "type", "recipient", "text"),
    [
        (
            "80 06 00 01 00 00 12 00",
            Setup(0x80, 6, 0x0100, 0, 18),
            Direction.IN,
            RequestType.STANDARD,
            Recipient.DEVICE,
            "80 06 value=0100 index=0000 length=18",
        ),
        (
            "21 ff 00 00 02 00 00 00",
            Setup(0x21, 0xFF, 0, 2, 0),
            Direction.OUT,
            RequestType.CLASS,
            Recipient.INTERFACE,
            "21 ff value=0000 index=0002 length=0",
        ),
        (
            "ff ff ff ff ff ff ff ff",
            Setup(0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF),
            Direction.IN,
            RequestType.RESERVED,
            Recipient.RESERVED,
            "ff ff value=ffff index=ffff length=65535",
        ),
    ],
)
def test_setup(
    raw: str, setup: Setup, direction: Direction, type: RequestType, recipient: Recipient, text: str
) -> None:
    assert Setup.parse(bytes.fromhex(raw)) == setup
    assert bytes(setup) == bytes.fromhex(raw)
    assert (setup.direction, setup.type, setup.recipient) == (direction, type, recipient)
    assert str(setup) == text


@pytest.mark.parametrize("length", [0, 7, 9])
def test_a_setup_packet_has_eight_bytes(length: int) -> None:
    with pytest.raises(ValueError, match=f"8 bytes, not {length}"):
        Setup.parse(bytes(length))


def test_every_request_type_has_fields() -> None:
    for request_type in range(256):
        setup = Setup(request_type, 0)
        assert setup.recipient in Recipient
        assert setup.type in RequestType
        assert str(setup)


def test_endpoint() -> None:
    endpoint = Endpoint(0x83, TransferType.BULK, 512)
    assert (endpoint.number, endpoint.direction) == (3, Direction.IN)
    assert Endpoint(0x0F, TransferType.BULK, 512).direction is Direction.OUT


def test_names() -> None:
    assert [str(speed) for speed in Speed] == ["low", "full", "high", "super", "super-plus"]
    assert str(TransferType.ISOCHRONOUS) == "isochronous"
