from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.capture import blocks, wireshark
from tests.transport.fake_spice import TICKET_KEY_DER

from farplug.capture.recording import Recording
from farplug.capture.wire import FIRST_CLIENT_PORT, MAX_SEGMENT, WireTap
from farplug.spice.link import LinkMess, LinkReply
from farplug.spice.types import ChannelType, LinkError
from farplug.usb.types import Buffer

FIN, SYN, RST, PUSH, ACK = 1, 2, 4, 8, 16
MESS = bytes(LinkMess(0, ChannelType.MAIN, 0, (0b1011,), ()))
REPLY = bytes(LinkReply(LinkError.OK, TICKET_KEY_DER, (0b1011,), ()))
METHOD, TICKET, RESULT = struct.pack("<I", 1), b"T" * 128, bytes(4)


@dataclass
class Segment:
    sent: bool
    flags: int
    sequence: int
    acknowledged: int
    data: bytes
    comment: str
    port: int


@dataclass
class Sink:
    """Takes the packets, and checks what must hold for each."""

    segments: list[Segment] = field(default_factory=list)
    full: bool = False

    def wire_packet(self, parts: Sequence[Buffer], *, sent: bool, comment: str = "", essential: bool = False) -> bool:
        if self.full and not essential:
            return False
        packet = b"".join(parts)
        ip, tcp = packet[:20], packet[20:]
        total = sum(struct.unpack("!10H", ip))
        assert (total & 0xFFFF) + (total >> 16) == 0xFFFF, "the checksum of the IP header"
        assert struct.unpack_from("!H", ip, 2)[0] == len(packet)
        source, target, sequence, acknowledged, offset, flags = struct.unpack_from("!HHIIBB", tcp)
        assert (source if not sent else target) == 5930
        header = (offset >> 4) * 4
        port = source if sent else target
        self.segments.append(Segment(sent, flags, sequence, acknowledged, tcp[header:], comment, port))
        return True

    def data(self, sent: bool) -> list[bytes]:
        return [segment.data for segment in self.segments if segment.sent is sent and segment.data]


def tap(number: int = 0, name: str = "x") -> tuple[Sink, WireTap]:
    sink = Sink()
    return sink, WireTap(sink, number, name)


def test_a_connection_begins_with_its_first_bytes_and_ends() -> None:
    sink, wire = tap(3, "usbredir at vm")
    assert sink.segments == []
    wire.sent([b"hello", memoryview(b"!")])
    wire.received(memoryview(b"answer"))
    wire.sent([b"bye"])
    wire.closed()
    assert [(one.sent, one.flags, one.sequence, one.acknowledged, one.data) for one in sink.segments] == [
        (True, SYN, 0, 0, b""),
        (False, SYN | ACK, 0, 1, b""),
        (True, ACK, 1, 1, b""),
        (True, PUSH | ACK, 1, 1, b"hello!"),
        (False, PUSH | ACK, 1, 7, b"answer"),
        (True, PUSH | ACK, 7, 7, b"bye"),
        (True, FIN | ACK, 10, 7, b""),
        (False, FIN | ACK, 7, 11, b""),
        (True, ACK, 11, 8, b""),
    ]
    assert sink.segments[0].comment == "usbredir at vm"
    assert {one.port for one in sink.segments} == {FIRST_CLIENT_PORT + 3}


def test_a_connection_that_never_carried_a_byte_leaves_nothing() -> None:
    sink, wire = tap()
    wire.closed()
    assert sink.segments == []


def test_a_large_message_is_cut_into_segments() -> None:
    sink, wire = tap()
    data = bytes(range(256)) * 1024
    wire.sent([data])
    assert [len(piece) for piece in sink.data(True)] == [MAX_SEGMENT] * 4 + [len(data) - 4 * MAX_SEGMENT]
    assert b"".join(sink.data(True)) == data


def link(wire: WireTap, *, method: bytes = METHOD) -> None:
    """Go through a SPICE link as farplug and a server do: the server glues its first messages to the result."""
    wire.sent([MESS])
    wire.received(memoryview(REPLY[:7]))
    wire.received(memoryview(REPLY[7:]))
    wire.sent([method, TICKET] if method else [TICKET])
    wire.received(memoryview(RESULT + b"first messages"))


def test_each_step_of_a_link_is_a_segment_and_the_ticket_is_blank() -> None:
    sink, wire = tap()
    link(wire)
    wire.sent([b"message"])
    wire.received(memoryview(b"answer"))
    assert sink.data(True) == [MESS, METHOD, bytes(128), b"message"]
    assert sink.data(False) == [REPLY, RESULT, b"first messages", b"answer"]


def test_the_ticket_is_blank_without_a_method_of_authentication_too() -> None:
    sink, wire = tap()
    link(wire, method=b"")
    assert sink.data(True) == [MESS, bytes(128)]


@pytest.mark.parametrize("ticket", [TICKET, TICKET[:50], METHOD + TICKET])
def test_no_byte_of_a_ticket_gets_through_whatever_the_server_has_sent(ticket: bytes) -> None:
    for answer in (b"", b"HTTP/1.1 400 Bad", REPLY[:9], b"REDQ" + struct.pack("<III", 2, 2, 1 << 31)):
        sink, wire = tap()
        if answer:
            wire.received(memoryview(answer))  # with the end of the TLS handshake
        wire.sent([MESS])
        if answer:
            wire.received(memoryview(answer))
        wire.sent([ticket])
        wire.closed()
        assert b"T" not in b"".join(sink.data(True)[1:])


def test_bytes_that_are_not_a_link_are_written_unchanged() -> None:
    for first in (b"RE", b"REDQ" + struct.pack("<III", 2, 2, 1 << 31), b"\0\0\0\0\x44\0\0\0"):
        sink, wire = tap()
        wire.sent([b"\0hello"])
        wire.received(memoryview(first))
        wire.received(memoryview(b"and more"))
        wire.closed()
        assert b"".join(sink.data(False)) == first + b"and more"


def test_a_link_that_breaks_is_complete_as_far_as_it_came() -> None:
    sink, wire = tap()
    wire.sent([MESS])
    wire.received(memoryview(REPLY[:50]))
    wire.closed()
    assert sink.data(False) == [REPLY[:50]]
    assert sink.segments[-1].flags == ACK


def test_a_drop_ends_the_connection() -> None:
    sink, wire = tap()
    wire.sent([b"hello"])
    sink.full = True
    wire.sent([b"lost"])
    sink.full = False
    wire.sent([b"more"])
    wire.received(memoryview(b"answer"))
    wire.closed()
    assert sink.data(True) == [b"hello"]
    assert sink.data(False) == []
    assert sink.segments[-1].flags == RST | ACK
    assert "too slow" in sink.segments[-1].comment


def test_sequence_numbers_wrap() -> None:
    sink, wire = tap()
    wire.sent([b"x"])
    tcp = getattr(wire, "_tcp")  # noqa: B009  (4 GiB would take too long)
    tcp._sequence[True] = 0xFFFFFFFE
    wire.sent([b"abcd"])
    wire.sent([b"e"])
    assert [one.sequence for one in sink.segments[-2:]] == [0xFFFFFFFE, 2]


async def test_wireshark_follows_the_link(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)) as recording:
        wire = recording.tap("SPICE channel main")
        link(wire)
        wire.closed()
    rows = wireshark.rows(path, "tcp.len > 0", "tcp.len", "spice.ticket_client")
    assert [int(size) for size, _ in rows] == [len(MESS), len(REPLY), 4, 128, 4, 14]
    assert rows[3][1] == "00" * 128
    assert not wireshark.count(path, "tcp.analysis.flags")
    assert [block.options[2][0] for block in blocks.read(path) if block.kind == blocks.PACKET][:2] == [2, 1]
