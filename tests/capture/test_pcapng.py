"""The blocks, byte by byte. The bytes are written out from the specification of the format."""

from __future__ import annotations

import pytest
from tests.capture import blocks

from farplug.capture import pcapng


def test_a_section_header() -> None:
    assert pcapng.section_header("farplug 1", "secret") == bytes.fromhex(
        "0a0d0d0a 3c000000 4d3c2b1a 0100 0000 ffffffffffffffff"
        "0100 0600 736563726574 0000"  # opt_comment
        "0400 0900 66617270 6c756720 31 000000"  # shb_userappl
        "00000000 3c000000"
    )


def test_an_interface() -> None:
    assert pcapng.interface(220, "usb", "USB!") == bytes.fromhex(
        "01000000 30000000 dc00 0000 00000000"
        "0200 0300 757362 00"  # if_name
        "0300 0400 55534221"  # if_description
        "0900 0100 09 000000"  # if_tsresol: nanoseconds
        "00000000 30000000"
    )


def test_a_packet() -> None:
    block = b"".join(pcapng.packet(1, 0x0123456789ABCDEF, [b"ab", memoryview(b"c")], 500, comment="hm", flags=2))
    assert block == bytes.fromhex(
        "06000000 38000000 01000000 67452301 efcdab89 03000000 f4010000"
        "616263 00"
        "0100 0200 686d 0000"  # opt_comment
        "0200 0400 02000000"  # epb_flags: outbound
        "00000000 38000000"
    )


def test_a_packet_without_options_has_no_end_of_options() -> None:
    assert b"".join(pcapng.packet(0, 1, [b"abcd"], 4)) == bytes.fromhex(
        "06000000 24000000 00000000 00000000 01000000 04000000 04000000 61626364 24000000"
    )


def test_an_entry_of_the_journal() -> None:
    block = pcapng.journal(1_700_000_000_123_456_789, {"MESSAGE": "two\nlines", "PRIORITY": "6"})
    body = b"__REALTIME_TIMESTAMP=1700000000123456\nMESSAGE=two lines\nPRIORITY=6\n"
    size = 12 + len(body) + -len(body) % 4
    expected = size.to_bytes(4, "little")
    assert block == b"\x09\0\0\0" + expected + body + bytes(-len(body) % 4) + expected


def test_a_half_surrogate_in_an_event_does_not_end_a_capture() -> None:
    assert b"MESSAGE=?\n" in pcapng.journal(0, {"MESSAGE": "\udc80"})
    assert b"/tmp/?" in b"".join(pcapng.packet(0, 0, [], 0, comment="/tmp/\udc80"))  # the path of a socket


def test_statistics() -> None:
    assert pcapng.statistics(1, 0x0123456789ABCDEF, 7) == bytes.fromhex(
        "05000000 28000000 01000000 67452301 efcdab89 0500 0800 0700000000000000 00000000 28000000"
    )


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 4095, 4096, 5000, 70_001])
def test_packets_of_any_size(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (parsed,) = blocks.parse(b"".join(pcapng.packet(0, 5, [data[:size]], size + 1, comment="x")))
    assert (parsed.data, parsed.length, parsed.comment, parsed.time) == (data[:size], size + 1, "x", 5)


def test_large_payloads_are_not_copied() -> None:
    data = bytes(1 << 20)
    assert any(part is data for part in pcapng.packet(0, 0, [b"head", data], len(data) + 4))


@pytest.mark.parametrize(
    ("head", "answer"),
    [
        (pcapng.section_header("a", "b")[:12], True),
        (bytes.fromhex("0a0d0d0a 0000001c 1a2b3c4d"), True),  # big-endian
        (bytes.fromhex("d4c3b2a1 02000400 00000000"), False),  # the old format, pcap
        (b"\n\r\r\n" + bytes(8), False),
        (b"\n\r\r\n", False),
        (b"", False),
        (b"My diary", False),
    ],
)
def test_what_is_a_capture(head: bytes, answer: bool) -> None:
    assert pcapng.is_capture(head) is answer
