"""The messages of USB/IP, byte by byte, against those of the protocol's documentation."""

from __future__ import annotations

import pytest

from farplug.errors import RemoteProtocolError
from farplug.usb import Speed
from farplug.usbip import messages as m

DEVICE = m.ExportedDevice("1-2", 1, 3, Speed.SUPER, 0x1D6B, 0x0104, 0x0100, 0, 0, 0, 1, 1, ((8, 6, 80),), "/sys/1-2")

SUBMIT = bytes.fromhex(
    "00000001 00000d05 0001000f 00000001 00000001  00000200 00000040 ffffffff 00000000 00000004 0000000000000000"
)
"""An interrupt IN URB of usbip_protocol.rst, "Example"."""
SUBMITTED = bytes.fromhex(
    "00000003 00000d05 00000000 00000000 00000000  00000000 00000004 00000000 00000000 00000000 0000000000000000"
    "ffffffff"
)


def test_the_examples_of_the_documentation() -> None:
    parser = m.CommandParser()
    for packets in ("00000000", "ffffffff"):  # what Linux sends, and what the text of the documentation prescribes
        parser.receive_data(SUBMIT[:32] + bytes.fromhex(packets) + SUBMIT[36:])
        urb = parser.next_message()
        assert urb == m.Submit(0xD05, 0x1000F, 0x81, 64, flags=0x200, interval=4)
    assert isinstance(urb, m.Submit)
    replies = m.ReplyParser({0xD05: urb}.get)
    replies.receive_data(SUBMITTED)
    reply = m.Submitted(0xD05, 0, 4, b"\xff\xff\xff\xff")
    assert replies.next_message() == reply
    assert b"".join(map(bytes, reply.encode())) == SUBMITTED
    unlink = bytes.fromhex("00000002 00000d06 0001000f 00000000 00000000 00000d05").ljust(48, b"\0")
    parser.receive_data(unlink)
    command = parser.next_message()
    assert command == m.Unlink(0xD06, 0x1000F, 0xD05)
    assert command.encode() == [unlink]
    unlinked = bytes.fromhex("00000004 00000d06 00000000 00000000 00000000 ffffff98").ljust(48, b"\0")
    replies.receive_data(unlinked)
    assert replies.next_message() == m.Unlinked(0xD06, -104)
    assert m.Unlinked(0xD06, -104).encode() == [unlinked]


def test_a_list_has_the_layout_of_the_documentation() -> None:
    data = m.encode_list([DEVICE])
    assert data[:12] == bytes.fromhex("0111 0005 00000000 00000001")
    assert data[12:0x10C].rstrip(b"\0") == b"/sys/1-2"
    assert data[0x10C:0x12C].rstrip(b"\0") == b"1-2"
    assert data[0x12C:] == bytes.fromhex("00000001 00000003 00000005 1d6b 0104 0100 00 00 00 01 01 01  08 06 50 00")


@pytest.mark.parametrize(
    ("parser", "data", "message"),
    [
        (m.ImportParser(), "48545450 2f312e31", "does not use the USB/IP protocol"),
        (m.RequestParser(), "0111 8004 00000000", "0x8004 is not a USB/IP request"),
    ],
)
def test_operations_that_are_refused(parser: m.Parser[object], data: str, message: str) -> None:
    parser.receive_data(bytes.fromhex(data))
    with pytest.raises(RemoteProtocolError, match=message):
        parser.next_message()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0x130, b"\0\0\0\x09", "9 is not a USB/IP speed"),
        (0x13F, b"\x21", "a device with 33 interfaces"),
    ],
)
def test_devices_that_are_refused(field: int, value: bytes, message: str) -> None:
    data = bytearray(m.encode_import(DEVICE))
    data[field : field + len(value)] = value
    parser = m.ImportParser()
    parser.receive_data(data)
    with pytest.raises(RemoteProtocolError, match=message):
        parser.next_message()


URB = m.Submit(1, 1, 0x81, 64)
ISO = m.Submit(1, 1, 0x81, 64, packets=(m.IsoPacket(0, 32), m.IsoPacket(32, 32)))


@pytest.mark.parametrize(
    ("urb", "reply", "message"),
    [
        (None, m.Submitted(1, 0, 0), "URB 1, which is not pending"),
        (URB, m.Submitted(1, 0, 65, bytes(65)), "has 65 bytes and 0 packets, the URB 64 and 0"),
        (URB, m.Submitted(1, 0, -1), "has -1 bytes"),
        (URB, m.Submitted(1, 0, 0, b"", ISO.packets), "2 packets, the URB 64 and 0"),
        (ISO, m.Submitted(1, 0, 4, bytes(4), ISO.packets), "do not have the 4 bytes"),
        (ISO, m.Submitted(1, 0, 64, bytes(64), (m.IsoPacket(0, 32, 64), ISO.packets[1])), "more bytes than were"),
        (ISO, m.Submitted(1, 0, 0, b"", (m.IsoPacket(0, 64, 33), ISO.packets[1])), "more bytes than were"),
    ],
)
def test_replies_that_are_refused(urb: m.Submit | None, reply: m.Submitted, message: str) -> None:
    parser = m.ReplyParser(lambda number: urb)
    for part in reply.encode():
        parser.receive_data(part)
    with pytest.raises(RemoteProtocolError, match=message):
        parser.next_message()


@pytest.mark.parametrize(
    ("packets", "message"),
    [
        ([m.IsoPacket(0, 32), m.IsoPacket(33, 32)], "exceeds its 64 bytes"),
        ([m.IsoPacket(0, 64)] * 1024, "have more than its 64 bytes"),
        ([m.IsoPacket(0, 33), m.IsoPacket(32, 32)], "have more than its 64 bytes"),
    ],
)
@pytest.mark.parametrize("endpoint", [0x01, 0x81])
def test_isochronous_packets_that_are_refused(endpoint: int, packets: list[m.IsoPacket], message: str) -> None:
    """Packets that overlap would multiply the memory of the URB."""
    parser = m.CommandParser()
    for part in m.Submit(1, 1, endpoint, 64, bytes(64), packets=packets).encode():
        parser.receive_data(part)
    with pytest.raises(RemoteProtocolError, match=message):
        parser.next_message()


def test_a_message_that_is_not_a_reply() -> None:
    parser = m.ReplyParser(lambda number: URB)
    parser.receive_data(bytes(48))
    with pytest.raises(RemoteProtocolError, match="0 is not a USB/IP reply"):
        parser.next_message()


def test_a_large_payload_is_skipped_in_pieces() -> None:
    parser = m.CommandParser()
    size = m.MAX_TRANSFER + 1
    (head,) = m.Submit(1, 1, 0x01, size).encode()
    parser.receive_data(head)
    urb = parser.next_message()
    assert isinstance(urb, m.Submit)
    assert (urb.length, urb.stored, urb.data) == (size, False, b"")
    piece = bytes(1 << 20)
    for _ in range(16):
        parser.receive_data(piece)
        assert parser.next_message() is None
        assert len(parser._buffer) == 0
    parser.receive_data(b"x" + m.Unlink(2, 1, 1).encode()[0])
    assert parser.next_message() == m.Unlink(2, 1, 1)
