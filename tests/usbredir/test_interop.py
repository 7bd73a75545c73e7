"""Ours beside libusbredirparser: the same bytes out, the same packets in, on valid and on damaged streams."""

from __future__ import annotations

import struct
from ctypes import CDLL
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.usbredir import oracle
from tests.usbredir.oracle import Delivered, Oracle
from tests.usbredir.support import OTHER, connect, drain, feed, hello, written
from tests.usbredir.test_packets import golden_packets

from farplug.errors import LocalProtocolError
from farplug.usb.transfer import Status
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.filter import ANY, Filter, Rule
from farplug.usbredir.packets import PACKETS as CLASSES
from farplug.usbredir.packets import (
    BulkPacket,
    DataPacket,
    DeviceDisconnect,
    DeviceDisconnectAck,
    FilterFilter,
    Hello,
    Packet,
)
from farplug.usbredir.protocol import Connection, Event, Role, Violation
from farplug.usbredir.wire import PACKET_FORMATS, PacketType, header

MANY = settings(max_examples=200)

CAPS = st.sampled_from([ALL_CAPS, Cap.NONE]) | st.builds(Cap, st.integers(0, 0xFF))
ROLES = st.sampled_from(list(Role))
PACKETS = st.sampled_from(sorted(golden_packets(True).items())).map(lambda item: item[1])
NUMBERS = st.sampled_from([0, 1, 2, 5, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0xFFFF, 0x10000, 1 << 27, (1 << 27) + 1, 1 << 31])
TOKENS = st.sampled_from(
    ["-1", "0", "1", "010", "0x3", "255", "256", "65535", "65536", "-2", " 7", "+8", "08", "", "x"]
)
FILTERS = st.lists(st.lists(TOKENS, min_size=4, max_size=6).map(",".join), max_size=3).map("|".join)


@pytest.fixture(scope="module")
def library() -> CDLL:
    library = oracle.load()
    if library is None:
        pytest.skip(f"{oracle.LIBRARY} is not installed (Debian: libusbredirparser1)")
    return library


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    """Draw a packet whose numbers fit into their fields, sensible or not."""
    packet = draw(PACKETS)
    changes: dict[str, object] = {"id": draw(st.integers(0, (1 << 64) - 1))}
    layout = PACKET_FORMATS[packet.TYPE].layout
    for name in ("endpoint", "status", "interface", "alt", "configuration", "endpoints", "streams", "stream_id"):
        if hasattr(packet, name) and packet.TYPE is not PacketType.EP_INFO and draw(st.booleans()):
            widest = 0xFF if name not in ("endpoints", "streams", "stream_id") else 0xFFFFFFFF
            value = draw(NUMBERS) & widest
            changes[name] = Status(value) if name == "status" else value
    if isinstance(packet, FilterFilter):
        changes["filter"] = draw(FILTERS)
    if isinstance(packet, DataPacket):
        data = draw(st.binary(max_size=64))
        changes["data"] = data
        if draw(st.booleans()):
            changes["length"] = len(data)
        elif "I" in layout:
            changes["length"] = draw(NUMBERS)
    return changed(packet, **changes)


def changed(packet: Packet, **changes: Any) -> Packet:
    """Return a packet with other fields."""
    return type(packet)(**{name: getattr(packet, name) for name in ("id", *packet.FIELDS)} | changes)


def decoded(delivered: Delivered, shared: Cap) -> Packet:
    """Return a packet that the C parser delivered, as ours."""
    values = PACKET_FORMATS[delivered.packet.TYPE].type_header(shared).unpack(delivered.type_header)
    payload = delivered.payload + (b"\0" if delivered.packet is FilterFilter else b"")
    return delivered.packet.decode(delivered.id, values, payload)


def comparable(packet: Packet) -> Packet:
    """Return a packet without what the C interface does not report."""
    if isinstance(packet, oracle.WITHOUT_ID):
        packet = changed(packet, id=0)
    if isinstance(packet, Hello):
        return changed(packet, caps=())
    if isinstance(packet, FilterFilter):
        return changed(packet, filter=str(Filter.parse(packet.filter)))
    return packet


class Pair:
    """Our connection and the C parser, in the same role, facing the same peer."""

    def __init__(self, library: CDLL, role: Role, own: Cap, peer: int) -> None:
        if role is Role.GUEST:
            own |= Cap.DEVICE_DISCONNECT_ACK
        self.ours = connect(role, own, peer)
        self.theirs = Oracle(library, role, own)
        assert len(self.theirs.sent) == 80
        self.theirs.receive(hello(peer))
        assert self.ours.peer_caps is not None
        self.shared = self.ours.own_caps & self.ours.peer_caps
        self.theirs.delivered.clear()
        self.theirs.errors.clear()
        self.theirs.sent.clear()

    def answerable(self, packet: Packet) -> bool:
        """Return whether the peer can receive the answer to a packet; C does not check that."""
        assert self.ours.peer_caps is not None
        return PACKET_FORMATS[packet.TYPE].answer_cap in self.ours.peer_caps

    def feed(self, chunks: list[bytes]) -> list[Event]:
        """Check that both deliver the same packets from a stream, and report the same number of errors."""
        for chunk in chunks:
            self.theirs.receive(chunk)
        events = feed(self.ours, chunks)
        packets = [comparable(event) for event in events if isinstance(event, Packet)]
        theirs = [decoded(delivered, self.shared) for delivered in self.theirs.delivered]
        assert packets == [packet for packet in theirs if self.answerable(packet)]
        # C reports some errors when the packet's body has arrived; the last body may be incomplete.
        assert len(events) - len(theirs) - len(self.theirs.errors) in (0, 1), (events, self.theirs.errors)
        self.theirs.delivered.clear()
        self.theirs.errors.clear()
        return events


@MANY
@given(role=ROLES, own=CAPS, peer=CAPS, packets=st.lists(packets(), min_size=1, max_size=5))
def test_what_we_send(library: CDLL, role: Role, own: Cap, peer: Cap, packets: list[Packet]) -> None:
    """We send the same bytes as C, nothing that C would refuse, and the C parser at the other end delivers them."""
    if role is Role.HOST:
        peer |= Cap.DEVICE_DISCONNECT_ACK
    sender = Pair(library, role, own, peer)
    receiver = Pair(library, OTHER[role], peer, own | (Cap.DEVICE_DISCONNECT_ACK if role is Role.GUEST else 0))
    for packet in packets:
        try:
            sender.ours.send(packet)
        except LocalProtocolError:
            assert sender.ours.data_to_send() == []
            # C cannot send these: it drops bad rules, and cuts a long length to 16 bits.
            narrow = Cap.BULK_LENGTH_32_BITS not in sender.shared
            if isinstance(packet, FilterFilter) or (
                isinstance(packet, BulkPacket) and narrow and packet.length > 0xFFFF
            ):
                continue
            if PACKET_FORMATS[packet.TYPE].answer_cap not in sender.ours.own_caps:
                continue  # C sends a request whose answer it cannot receive
            assert sender.theirs.send(packet) == b""
            continue
        data = written(sender.ours)
        sender.ours.send(comparable(packet))
        assert sender.theirs.send(packet) == written(sender.ours)
        (event,) = receiver.feed([data])
        assert not isinstance(event, Violation)
    sender.theirs.close()
    receiver.theirs.close()


@st.composite
def bodies(draw: st.DrawFn, shared: Cap) -> bytes:
    """Draw a packet of any type with a body of about the right size, often with the right length of payload."""
    code = draw(st.sampled_from([*range(1, 30), *range(99, 106), *range(100, 104), 23, 0]))
    size = PACKET_FORMATS[code].type_header(shared).size if code in PACKET_FORMATS else 3
    if code == PacketType.FILTER_FILTER:
        body = draw(FILTERS).encode() + draw(st.sampled_from([b"\0", b"", b"\0\0", b"x\0", b"\0x"]))
    elif code in PACKET_FORMATS and issubclass(type_of(code), DataPacket):
        payload = draw(st.binary(max_size=40))
        length = draw(st.sampled_from([len(payload), len(payload), 0, 1, 1 << 16, (1 << 27) + 1]))
        endpoint = draw(st.sampled_from([0, 1, 0x80, 0x81, 0xFF]))
        packet = type_of(code).decode(0, PACKET_FORMATS[code].type_header(shared).unpack(bytes(size)), b"")
        values = changed(packet, endpoint=endpoint, length=length).values()
        layout = PACKET_FORMATS[code].type_header(shared)
        limits = [0xFF if kind == "B" else 0xFFFF if kind == "H" else 0xFFFFFFFF for kind in layout.format[1:]]
        body = layout.pack(*(value & limit for value, limit in zip(values, limits, strict=False))) + payload
    else:
        body = draw(st.binary(min_size=size, max_size=size))
        if code == PacketType.INTERFACE_INFO:
            body = draw(st.sampled_from([b"\0", b"\x20", b"\x21"])) + bytes(3) + body[4:]
    grow = draw(st.sampled_from([0] * 12 + [1, -1]))
    body = body[:grow] if grow < 0 else body + bytes(grow)
    length = draw(
        st.sampled_from([len(body)] * 20 + [len(body) + 1, max(0, len(body) - 1), 0, (1 << 27) + 1025, 1 << 31])
    )
    ids = draw(st.integers(0, 0xFFFFFFFF))
    return header(shared).pack(code, length, ids) + body


def type_of(code: int) -> type[Packet]:
    return next(packet for packet in CLASSES if code == packet.TYPE)


@st.composite
def chunked(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    """Split bytes: not at all, into single bytes, or anywhere."""
    how = draw(st.sampled_from(["whole", "bytes", "cut"]))
    if how == "whole":
        return [stream]
    if how == "bytes":
        return [stream[at : at + 1] for at in range(len(stream))]
    at = [0, *sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6))), len(stream)]
    return [stream[a:b] for a, b in pairwise(at)]


@settings(max_examples=400)
@given(role=ROLES, own=CAPS, peer=CAPS, data=st.data())
def test_what_we_receive(library: CDLL, role: Role, own: Cap, peer: Cap, data: st.DataObject) -> None:
    """Packets of every type and size, valid and invalid."""
    pair = Pair(library, role, own, peer)
    stream = b"".join(data.draw(st.lists(bodies(pair.shared), min_size=1, max_size=6)))
    pair.feed(data.draw(chunked(stream)))
    pair.theirs.close()


@settings(max_examples=250)
@given(
    role=ROLES,
    caps=CAPS,
    packets=st.lists(packets(), min_size=1, max_size=8),
    damage=st.lists(st.tuples(st.sampled_from("fdi"), st.integers(0, 4000), st.binary(min_size=1, max_size=4))),
    data=st.data(),
)
def test_damaged_streams(
    library: CDLL,
    role: Role,
    caps: Cap,
    packets: list[Packet],
    damage: list[tuple[str, int, bytes]],
    data: st.DataObject,
) -> None:
    """Streams of ours with bytes changed, deleted and inserted."""
    caps |= Cap.DEVICE_DISCONNECT_ACK
    sender = connect(OTHER[role], caps, caps)
    for packet in packets:
        try:
            sender.send(packet)
        except LocalProtocolError:
            continue
    stream = bytearray(written(sender))
    for kind, place, value in damage:
        at = place % (len(stream) + 1)
        stream[at : at + (0 if kind == "i" else len(value))] = b"" if kind == "d" else value
    pair = Pair(library, role, caps, caps)
    pair.feed(data.draw(chunked(bytes(stream))))
    pair.theirs.close()


@MANY
@given(caps=st.integers(0, 0xFFFFFFFF), extra=st.binary(max_size=12), version=st.binary(max_size=64), data=st.data())
def test_hellos(library: CDLL, caps: int, extra: bytes, version: bytes, data: st.DataObject) -> None:
    """Any version, any number of words of capabilities."""
    stream = hello(extra=(struct.pack("<I", caps) + extra)[: data.draw(st.integers(0, 16))], version=version)
    theirs, ours = Oracle(library, Role.HOST, ALL_CAPS), Connection(Role.HOST)
    chunks = data.draw(chunked(stream))
    for chunk in chunks:
        theirs.receive(chunk)
    (event,) = feed(ours, chunks)
    assert comparable(event) == decoded(theirs.delivered[0], Cap.NONE)  # type: ignore[arg-type]
    peer = library.usbredirparser_peer_has_cap
    assert ours.peer_caps is not None
    assert [cap in ours.peer_caps for cap in Cap] == [bool(peer(theirs.parser, n)) for n in range(8)]
    theirs.close()


@pytest.mark.parametrize("caps", [ALL_CAPS, Cap.NONE])
def test_disconnect_is_acknowledged_by_c_itself(library: CDLL, caps: Cap) -> None:
    host, guest = Connection(Role.HOST, caps=caps), Oracle(library, Role.GUEST, caps)
    host.start()
    host.receive_data(guest.sent)
    assert isinstance(host.next_event(), Hello)
    host.send(DeviceDisconnect())
    guest.receive(written(host))
    guest.sent.clear()
    guest.flush()
    host.receive_data(guest.sent)
    assert drain(host) == ([DeviceDisconnectAck()] if caps else [])
    guest.close()


@pytest.mark.parametrize("size", [65536, 1 << 20, (1 << 24) - 1])
def test_large_payloads(library: CDLL, size: int) -> None:
    pair = Pair(library, Role.GUEST, ALL_CAPS, ALL_CAPS)
    sender = connect(Role.HOST)
    packet = BulkPacket(id=1, endpoint=0x81, status=Status.SUCCESS, length=size, data=bytes(size))
    sender.send(packet)
    stream = written(sender)
    assert pair.feed([stream[at : at + 65536] for at in range(0, len(stream), 65536)]) == [packet]
    pair.theirs.close()


@MANY
@given(text=FILTERS | st.text("0123456789xabc-+,:| \t", max_size=30), separators=st.sampled_from([",", ":", ",:"]))
def test_filters_are_parsed_alike(library: CDLL, text: str, separators: str) -> None:
    try:
        ours = str(Filter.parse(text, separators))
    except ValueError as error:
        if "32 bits" in str(error):
            return  # C's answer depends on the width of its long
        ours = None
    assert ours == oracle.parse_filter(library, text.encode(), separators.encode())


NUMBER = st.sampled_from([ANY, 0, 3, 8, 0xEF])
RULES = st.builds(Rule, NUMBER, NUMBER, NUMBER, NUMBER, st.booleans())
CODES = st.tuples(st.sampled_from([0, 3, 8]), st.sampled_from([0, 1]), st.sampled_from([0, 1]))


@MANY
@given(
    rules=st.lists(RULES, max_size=5).map(tuple),
    device=st.tuples(*[st.sampled_from([0, 3, 8, 0xEF])] * 4),
    interfaces=st.lists(CODES, max_size=4),
)
def test_filters_decide_alike(
    library: CDLL,
    rules: tuple[Rule, ...],
    device: tuple[int, int, int, int],
    interfaces: list[tuple[int, int, int]],
) -> None:
    device_class, vendor_id, product_id, device_version = device
    result = Filter(rules).check(
        device_class=device_class,
        vendor_id=vendor_id,
        product_id=product_id,
        device_version=device_version,
        interfaces=interfaces,
    )
    assert result.verdict is oracle.check_filter(library, rules, device, interfaces)
