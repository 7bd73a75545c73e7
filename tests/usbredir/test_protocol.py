"""The connection: what it drops and why, what it refuses to send, capabilities, split streams, bounds."""

from __future__ import annotations

import gc
import struct
import tracemalloc

import pytest
from tests.usbredir.support import OTHER, connect, cuts, drain, each_way, feed, hello, written

from farplug.errors import LocalProtocolError, RemoteProtocolError
from farplug.usb.transfer import Status
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.packets import (
    AllocBulkStreams,
    BufferedBulkPacket,
    BulkPacket,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    DeviceDisconnectAck,
    EndpointEntry,
    EndpointInfo,
    FilterFilter,
    FilterReject,
    FreeBulkStreams,
    Hello,
    InterfaceEntry,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    Packet,
    Reset,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StopBulkReceiving,
)
from farplug.usbredir.protocol import Connection, Event, Oversized, Role, Violation
from farplug.usbredir.wire import MAX_LENGTH, MAX_TRANSFER, PACKET_FORMATS, Flow, PacketType

HOST, GUEST = Role.HOST, Role.GUEST
OK = Status.SUCCESS
ID = 0x1122334455667788
RESET = struct.pack("<IIQ", 3, 0, 0)
DISCONNECT = struct.pack("<IIQ", 2, 0, 0)
NEXT = {HOST: (RESET, Reset()), GUEST: (DISCONNECT, DeviceDisconnect())}


def raw(code: int, body: bytes = b"", length: int | None = None, id_: int = ID) -> bytes:
    return struct.pack("<IIQ", code, len(body) if length is None else length, id_) + body


def bulk(endpoint: int, length: int, data: bytes = b"") -> bytes:
    return raw(101, struct.pack("<BBHIH", endpoint, 0, length & 0xFFFF, 0, length >> 16) + data)


TABLE = bytes(128)
FILTER = b"-1,-1,-1,-1,1\0"
VIOLATIONS = [
    # (role of the receiver, its capabilities, the packet, the message)
    (HOST, ALL_CAPS, raw(28, b"abc"), "unknown packet type 28"),
    (HOST, ALL_CAPS, raw(99), "unknown packet type 99"),
    (HOST, ALL_CAPS, raw(0xFFFFFFFF, b"abc"), "unknown packet type 4294967295"),
    (HOST, ALL_CAPS, raw(1, bytes(10)), "device_connect arrived at the usb-host, but it is sent to the usb-guest"),
    (GUEST, ALL_CAPS, raw(3), "reset arrived at the usb-guest, but it is sent to the usb-host"),
    (HOST, ALL_CAPS, raw(104, bytes(10)), "buffered_bulk_packet arrived at the usb-host"),
    (HOST, ALL_CAPS, raw(0, bytes(68)), "a second hello"),
    (HOST, ALL_CAPS, raw(3, b"x"), "reset of 1 bytes, not 0"),
    (HOST, ALL_CAPS, raw(6), "set_configuration of 0 bytes, not 1"),
    (HOST, ALL_CAPS, raw(6, b"12"), "set_configuration of 2 bytes, not 1"),
    (HOST, ALL_CAPS, raw(101, bytes(9)), f"bulk_packet of 9 bytes, not 10 to {MAX_LENGTH}"),
    (GUEST, ALL_CAPS, raw(1, bytes(8)), "device_connect of 8 bytes, not 10"),
    (GUEST, ALL_CAPS, raw(5, bytes(160)), "ep_info of 160 bytes, not 288"),
    (GUEST, ALL_CAPS, raw(4, b"\x21\0\0\0" + TABLE), "interface_info has 33 interfaces, at most 32 fit"),
    (GUEST, ALL_CAPS, raw(4, b"\xff\xff\xff\xff" + TABLE), "interface_info has 4294967295 interfaces"),
    (HOST, ALL_CAPS, raw(15, b"\x01"), "start_interrupt_receiving for endpoint 01, which is not IN"),
    (HOST, ALL_CAPS, raw(16, b"\x01"), "stop_interrupt_receiving for endpoint 01, which is not IN"),
    (GUEST, ALL_CAPS, raw(17, b"\0\x01"), "interrupt_receiving_status for endpoint 01, which is not IN"),
    (HOST, ALL_CAPS, raw(25, struct.pack("<IIBB", 0, 512, 1, 5)), "start_bulk_receiving for endpoint 01"),
    (HOST, ALL_CAPS, raw(26, struct.pack("<IB", 0, 1)), "stop_bulk_receiving for endpoint 01"),
    (GUEST, ALL_CAPS, raw(27, struct.pack("<IBB", 0, 1, 0)), "bulk_receiving_status for endpoint 01"),
    (HOST, ALL_CAPS, raw(25, struct.pack("<IIBB", 0, MAX_TRANSFER + 1, 0x81, 5)), "has 134217729 bytes per transfer"),
    (HOST, ALL_CAPS, raw(23), "filter_filter is empty"),
    (HOST, ALL_CAPS, raw(23, FILTER[:-1]), "filter_filter is not terminated by a NUL"),
    (HOST, ALL_CAPS, raw(23, b"1,2,3\0"), "filter rule '1,2,3' has 3 fields, not 5"),
    (HOST, ALL_CAPS, raw(23, b"\xff\0"), "filter rule '\\\\xff' has 1 field"),
    (HOST, ALL_CAPS, raw(23, bytes(4097)), "filter_filter of 4097 bytes, not 0 to 4096"),
    (HOST, ALL_CAPS & ~Cap.FILTER, raw(22), "filter_reject arrived, but we do not have the capability filter"),
    (HOST, ALL_CAPS & ~Cap.FILTER, raw(23, FILTER), "filter_filter arrived, but we do not have the capability filter"),
    (HOST, ALL_CAPS & ~Cap.DEVICE_DISCONNECT_ACK, raw(24), "the capability device_disconnect_ack"),
    (HOST, ALL_CAPS & ~Cap.BULK_RECEIVING, raw(25, bytes(10)), "the capability bulk_receiving"),
    (HOST, ALL_CAPS & ~Cap.BULK_RECEIVING, raw(26, bytes(5)), "the capability bulk_receiving"),
    (GUEST, ALL_CAPS & ~Cap.BULK_RECEIVING, raw(27, bytes(6)), "the capability bulk_receiving"),
    (GUEST, ALL_CAPS & ~Cap.BULK_RECEIVING, raw(104, bytes(10)), "the capability bulk_receiving"),
    (HOST, ALL_CAPS, bulk(0x81, MAX_TRANSFER + 1), "bulk_packet has a length of 134217729 bytes"),
    (GUEST, ALL_CAPS, raw(104, struct.pack("<IIBB", 0, MAX_TRANSFER + 1, 0x81, 0)), "has a length of 134217729 bytes"),
    (HOST, ALL_CAPS, bulk(0x01, 3, b"ab"), "bulk_packet for endpoint 01 has 2 bytes, its header says 3"),
    (HOST, ALL_CAPS, bulk(0x01, 3), "bulk_packet for endpoint 01 has 0 bytes, its header says 3"),
    (GUEST, ALL_CAPS, bulk(0x81, 3, b"abcd"), "bulk_packet for endpoint 81 has 4 bytes, its header says 3"),
    (HOST, ALL_CAPS, bulk(0x81, 3, b"abc"), "bulk_packet for endpoint 81 has 3 bytes of payload where there is none"),
    (GUEST, ALL_CAPS, bulk(0x01, 3, b"abc"), "bulk_packet for endpoint 01 has 3 bytes of payload where there is none"),
    (HOST, ALL_CAPS, raw(100, struct.pack("<BBBBHHH", 0, 9, 0x21, 0, 0, 0, 4)), "has 0 bytes, its header says 4"),
    (HOST, ALL_CAPS, raw(102, struct.pack("<BBH", 0x81, 0, 4)), "iso_packet for endpoint 81 is sent to the usb-host"),
    (GUEST, ALL_CAPS, raw(102, struct.pack("<BBH", 1, 0, 4)), "iso_packet for endpoint 01 is sent to the usb-guest"),
    (HOST, ALL_CAPS, raw(102, struct.pack("<BBH", 1, 0, 4)), "iso_packet for endpoint 01 has 0 bytes"),
    (HOST, ALL_CAPS, raw(103, struct.pack("<BBH", 0x81, 0, 4)), "interrupt_packet for endpoint 81 is sent to the"),
    (GUEST, ALL_CAPS, raw(103, struct.pack("<BBH", 0x81, 0, 4)), "interrupt_packet for endpoint 81 has 0 bytes"),
    (GUEST, ALL_CAPS, raw(104, struct.pack("<IIBB", 0, 4, 1, 0)), "buffered_bulk_packet for endpoint 01 is sent to"),
    (GUEST, ALL_CAPS, raw(104, struct.pack("<IIBB", 0, 4, 0x81, 0)), "has 0 bytes, its header says 4"),
]


def described(events: list[Event]) -> list[object]:
    return [(e.type, e.id, str(e.error)) if isinstance(e, Violation) else e for e in events]


@pytest.mark.parametrize(("role", "own", "data", "message"), VIOLATIONS, ids=[row[3] for row in VIOLATIONS])
def test_what_is_dropped(role: Role, own: Cap, data: bytes, message: str) -> None:
    following, packet = NEXT[role]
    first, second = feed(connect(role, own), [data + following])
    assert isinstance(first, Violation)
    assert isinstance(first.error, RemoteProtocolError)
    assert (first.type, first.id) == (int.from_bytes(data[:4], "little"), ID)
    assert message in str(first.error)
    assert second == packet
    assert str(first).startswith(f"violation type={first.type} id=1122334455667788: ")
    for chunks in ([data, following], [data[:17], data[17:] + following], [bytes([b]) for b in data + following]):
        if len(data) < 1000:
            assert described(feed(connect(role, own), chunks)) == described([first, second])


@pytest.mark.parametrize("length", [MAX_LENGTH + 1, (1 << 31) - 1])
def test_a_body_that_is_too_long_is_skipped(length: int) -> None:
    connection = connect(HOST)
    (event,) = feed(connection, [raw(101, b"abc", length=length)])
    assert isinstance(event, Violation)
    assert f"bulk_packet of {length} bytes, not 10 to {MAX_LENGTH}" in str(event.error)
    skipped = 3
    tracemalloc.start()
    while skipped < min(length - 10, 3 << 20):
        connection.receive_data(memoryview(bytes(1 << 20)))
        skipped += 1 << 20
        assert connection.next_event() is None
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("length", [1 << 31, 0xFFFFFFFF])
def test_the_c_parser_skips_nothing_of_two_gibibytes(length: int) -> None:
    first, second = feed(connect(HOST), [raw(101, length=length) + RESET])
    assert isinstance(first, Violation)
    assert second == Reset()


def test_a_body_of_128_mib_is_a_transfer() -> None:
    connection = connect(HOST, max_payload=1 << 20)
    connection.receive_data(raw(101, struct.pack("<BBHIH", 1, 0, 0, 0, MAX_TRANSFER >> 16), length=MAX_TRANSFER + 10))
    block = bytes(1 << 20)
    for _ in range(128):
        assert connection.next_event() is None
        connection.receive_data(block)
    assert drain(connection) == [Oversized(BulkPacket(id=ID, endpoint=1, status=OK, length=MAX_TRANSFER))]


def test_before_the_hello() -> None:
    connection = Connection(HOST)
    narrow = struct.pack("<III", 3, 0, 7)
    (event,) = feed(connection, [narrow])
    assert isinstance(event, Violation)
    assert str(event.error) == "reset arrived before the hello"
    for packet in (Reset(), DeviceDisconnect()):
        with pytest.raises(LocalProtocolError, match="cannot be sent before the peer's hello has arrived"):
            connection.send(packet)
    connection.start()
    with pytest.raises(LocalProtocolError, match=r"start\(\) sends the hello, once"):
        connection.send(Hello(version="x"))
    connection.receive_data(hello() + RESET)
    assert connection.peer_caps is None
    assert isinstance(connection.next_event(), Hello)
    assert connection.peer_caps == ALL_CAPS
    assert drain(connection) == [Reset()]
    assert len(written(connection)) == 80
    with pytest.raises(LocalProtocolError, match=r"start\(\) sends the hello, once"):
        connection.send(Hello(version="x"))


@pytest.mark.parametrize("code", [0, 3])
def test_a_bad_hello_is_dropped_and_a_good_one_is_used(code: int) -> None:
    first, second = feed(Connection(HOST), [struct.pack("<III", code, 63, 0) + bytes(63) + hello()])
    assert isinstance(first, Violation)
    assert isinstance(second, Hello)


@pytest.mark.parametrize("own", [Cap.NONE, ALL_CAPS])
@pytest.mark.parametrize("peer", [Cap.NONE, ALL_CAPS])
def test_layouts_need_both_sides(own: Cap, peer: Cap) -> None:
    both = own & peer == ALL_CAPS
    connection = connect(HOST, own, peer)
    sizes = []
    for packet in (
        DeviceConnect(
            speed=3, device_class=0, device_subclass=0, device_protocol=0, vendor_id=1, product_id=2, device_version=3
        ),
        EndpointInfo(endpoints=(EndpointEntry(),) * 32),
        BulkPacket(id=1 << 40, endpoint=1, status=OK, length=65535),
    ):
        connection.send(packet)
        sizes.append(len(written(connection)))
    assert sizes == ([16 + 10, 16 + 288, 16 + 10] if both else [12 + 8, 12 + 96, 12 + 8])


def test_max_packet_size_without_streams() -> None:
    own = ALL_CAPS & ~Cap.BULK_STREAMS
    entries = (EndpointEntry(2, 1, 0, 512, 0),) * 32
    sender = connect(HOST, own)
    sender.send(EndpointInfo(endpoints=entries))
    data = written(sender)
    assert len(data) == 16 + 160
    assert each_way(lambda: connect(GUEST, own), data) == [EndpointInfo(endpoints=entries)]


def test_ids_have_the_width_of_the_capabilities() -> None:
    for own, expected in ((ALL_CAPS, ID), (ALL_CAPS & ~Cap.IDS_64_BITS, ID & 0xFFFFFFFF)):
        sender, receiver = connect(GUEST, own), connect(HOST, own)
        sender.send(CancelDataPacket(id=ID))
        assert feed(receiver, [written(sender)]) == [CancelDataPacket(id=expected)]


WORDS = memoryview(bytearray(16)).cast("I")
EVERY_OTHER = memoryview(bytearray(16))[::2]


REFUSED: list[tuple[Role, int, Packet, str]] = [
    # (role of the sender, the peer's capabilities, the packet, the message)
    (HOST, 0xFF, Reset(), "reset is not sent by the usb-host, but to the usb-host"),
    (GUEST, 0xFF, DeviceDisconnect(), "device_disconnect is not sent by the usb-guest"),
    (GUEST, 0xFB, FilterReject(), "filter_reject cannot be sent: the peer does not have the capability filter"),
    (HOST, 0xFB, FilterFilter(filter=""), "filter_filter cannot be sent: the peer does not have"),
    (GUEST, 0xF7, DeviceDisconnectAck(), "the capability device_disconnect_ack"),
    (GUEST, 0x7F, StopBulkReceiving(stream_id=0, endpoint=0x81), "the capability bulk_receiving"),
    (GUEST, 0xFF, StopBulkReceiving(stream_id=0, endpoint=0x01), "which is not IN"),
    (GUEST, 0xFF, StartInterruptReceiving(endpoint=0x01), "which is not IN"),
    (HOST, 0xFF, InterruptReceivingStatus(status=OK, endpoint=0x01), "which is not IN"),
    (
        GUEST,
        0xFF,
        StartBulkReceiving(stream_id=0, bytes_per_transfer=MAX_TRANSFER + 1, endpoint=0x81, transfers=1),
        "has 134217729 bytes per transfer, more than 134217728",
    ),
    (HOST, 0xFF, InterfaceInfo(interfaces=(InterfaceEntry(0, 0, 0, 0),) * 33), "33 interfaces, at most 32 fit"),
    (HOST, 0xFF, InterfaceInfo(interfaces=(InterfaceEntry(256, 0, 0, 0),)), "a number that does not fit into"),
    (HOST, 0xFF, EndpointInfo(endpoints=(EndpointEntry(),) * 31), "ep_info has 31 endpoints, the table has 32"),
    (HOST, 0xFF, FilterFilter(filter="1,2,3,4"), "filter rule '1,2,3,4' has 4 fields"),
    (HOST, 0xFF, FilterFilter(filter="1,2,3,4,5\0"), "filter_filter has a NUL in its text"),
    (HOST, 0xFF, FilterFilter(filter="é"), "has 1 field"),
    (HOST, 0xFF, FilterFilter(filter="|" * 4096), "filter_filter has 4097 bytes, more than 4096"),
    (GUEST, 0xFF, SetConfiguration(configuration=256), "a number that does not fit into its field"),
    (GUEST, 0xFF, SetConfiguration(configuration=-1), "a number that does not fit into its field"),
    (HOST, 0xFF, BulkPacket(endpoint=0x81, status=OK, length=3, data=b"ab"), "has 2 bytes, its header says 3"),
    (
        HOST,
        0xFF,
        BulkPacket(endpoint=0x01, status=OK, length=2, data=b"ab"),
        "has 2 bytes of payload where there is none",
    ),
    (HOST, 0xFF, BulkPacket(endpoint=0x01, status=OK, length=MAX_TRANSFER + 1), "more than 134217728"),
    (HOST, 0xBF, BulkPacket(endpoint=0x01, status=OK, length=65536), "needs bulk_length_32_bits on both sides"),
    (HOST, 0xBF, BulkPacket(endpoint=0x01, status=OK, length=-1), "needs bulk_length_32_bits on both sides"),
    (HOST, 0xFF, BulkPacket(endpoint=0x101, status=OK, length=0), "a number that does not fit into its field"),
    (HOST, 0xFF, BulkPacket(endpoint=0x81, status=OK, length=8, data=EVERY_OTHER), "contiguous bytes"),
    (HOST, 0xFF, BulkPacket(endpoint=0x81, status=OK, length=4, data=WORDS), "contiguous bytes"),
    (HOST, 0xFF, IsoPacket(endpoint=0x01, status=OK, length=0), "iso_packet for endpoint 01 is sent to the usb-guest"),
    (GUEST, 0xFF, IsoPacket(endpoint=0x81, status=OK, length=0), "iso_packet for endpoint 81 is sent to the usb-host"),
    (GUEST, 0xFF, InterruptPacket(endpoint=0x81, status=OK, length=0), "is sent to the usb-host"),
    (HOST, 0xFF, BufferedBulkPacket(stream_id=0, length=0, endpoint=1, status=OK), "is sent to the usb-guest"),
    (
        HOST,
        0xFF,
        ControlPacket(endpoint=0x80, request=6, request_type=0x80, status=OK, value=0, index=0, length=65536),
        "has 0 bytes, its header says 65536",
    ),
]


@pytest.mark.parametrize(("role", "peer", "packet", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_cannot_be_sent(role: Role, peer: int, packet: Packet, message: str) -> None:
    connection = connect(role, ALL_CAPS, peer)
    with pytest.raises(LocalProtocolError) as caught:
        connection.send(packet)
    assert message in str(caught.value)
    assert connection.data_to_send() == []


UNANSWERABLE: list[tuple[Cap, Packet]] = [
    # (what the sender lacks to receive the answer, the request)
    (
        Cap.BULK_RECEIVING,
        StartBulkReceiving(id=1, stream_id=0, bytes_per_transfer=512, endpoint=0x81, transfers=4),
    ),
    (Cap.BULK_RECEIVING, StopBulkReceiving(id=2, stream_id=0, endpoint=0x81)),
    (Cap.BULK_STREAMS, AllocBulkStreams(id=3, endpoints=1 << 17, streams=4)),
    (Cap.BULK_STREAMS, FreeBulkStreams(id=4, endpoints=1 << 17)),
    (Cap.EP_INFO_MAX_PACKET_SIZE, FreeBulkStreams(id=5, endpoints=1 << 17)),  # without it there are no bulk streams
]


@pytest.mark.parametrize(("lacking", "packet"), UNANSWERABLE, ids=lambda value: str(value))
def test_a_request_whose_answer_its_sender_cannot_receive(lacking: Cap, packet: Packet) -> None:
    needed = PACKET_FORMATS[packet.TYPE].answer_cap.names[0]
    poor = ALL_CAPS & ~lacking
    with pytest.raises(LocalProtocolError, match=f"{packet.TYPE} cannot be sent: we, without .* {needed}, cannot rec"):
        connect(GUEST, poor, ALL_CAPS).send(packet)
    able = connect(GUEST)
    able.send(packet)
    event, following = feed(connect(HOST, ALL_CAPS, poor), [written(able) + RESET])
    assert isinstance(event, Violation)
    assert f"{packet.TYPE} arrived, but the peer, without the capability {needed}, cannot receive" in str(event.error)
    assert following == Reset()


def test_every_request_with_an_answer_of_a_capability_is_in_the_table() -> None:
    """An answer that needs a capability of its receiver belongs to requests that need it of their sender."""
    answers = {cap for one in PACKET_FORMATS.values() if one.flow is Flow.TO_GUEST and (cap := one.required_cap)}
    assert answers == {Cap.BULK_RECEIVING}
    requests = {one.answer_cap for one in PACKET_FORMATS.values() if one.answer_cap}
    assert requests == answers | {Cap.BULK_STREAMS}  # the C parser delivers bulk_streams_status to every receiver
    for code, one in PACKET_FORMATS.items():
        if one.flow is Flow.TO_HOST and one.required_cap in answers:
            assert one.answer_cap == one.required_cap, PacketType(code)


def test_statuses_may_be_numbers() -> None:
    connection = connect(HOST)
    connection.send(ConfigurationStatus(status=4, configuration=1))  # type: ignore[arg-type]
    assert written(connection)[16:] == b"\x04\x01"


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 1 << 20])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_large_payloads_are_not_copied(size: int, kind: type) -> None:
    data = kind(bytes(size))
    connection = connect(HOST)
    connection.send(BulkPacket(id=ID, endpoint=0x81, status=OK, length=size, data=data))
    buffers = connection.data_to_send()
    assert connection.data_to_send() == []
    if size < 4096:
        assert len(buffers) == 1
    else:
        assert len(buffers) == 2
        assert buffers[1] is data
    assert feed(connect(GUEST), [b"".join(buffers)]) == [
        BulkPacket(id=ID, endpoint=0x81, status=OK, length=size, data=bytes(size))
    ]


@pytest.mark.parametrize("chunk", [1000, 16384, 65536, 1 << 21])
def test_payloads_that_arrive_in_chunks(chunk: int) -> None:
    payloads = [bytes([n]) * (300_000 * n) for n in range(4)]
    stream = b"".join(bulk(1, len(payload), payload) for payload in payloads) + RESET
    events = feed(connect(HOST), [stream[at : at + chunk] for at in range(0, len(stream), chunk)])
    assert [event.data for event in events if isinstance(event, BulkPacket)] == payloads
    assert events[-1] == Reset()


@pytest.mark.parametrize("role", [HOST, GUEST])
def test_oversized_payloads_are_skipped(role: Role) -> None:
    endpoint = 0x01 if role is HOST else 0x81
    following, packet = NEXT[role]
    good, over = b"x" * 20, b"y" * 21
    stream = bulk(endpoint, 20, good) + bulk(endpoint, 21, over) + bulk(endpoint, 22, over) + following
    events = feed(connect(role, max_payload=20), [stream])
    for chunks in cuts(stream):
        assert described(feed(connect(role, max_payload=20), chunks)) == described(events)
    assert events[0] == BulkPacket(id=ID, endpoint=endpoint, status=OK, length=20, data=good)
    assert events[1] == Oversized(BulkPacket(id=ID, endpoint=endpoint, status=OK, length=21))
    assert str(events[1]) == f"oversized bulk_packet id={ID:x} ep={endpoint:02x} status=success length=21"
    assert isinstance(events[2], Violation)
    assert "has 21 bytes, its header says 22" in str(events[2].error)
    assert events[3] == packet


def test_a_filter_is_stored_whatever_the_bound_for_payloads() -> None:
    assert feed(connect(HOST, max_payload=0), [raw(23, FILTER)]) == [FilterFilter(id=ID, filter=FILTER[:-1].decode())]


def test_an_in_request_of_any_size_is_a_packet() -> None:
    request = BulkPacket(id=ID, endpoint=0x81, status=OK, length=MAX_TRANSFER)
    assert feed(connect(HOST, max_payload=16), [bulk(0x81, MAX_TRANSFER)]) == [request]


def test_no_memory_is_allocated_before_the_payload_arrives() -> None:
    connection = connect(HOST)
    tracemalloc.start()
    connection.receive_data(raw(101, struct.pack("<BBHIH", 1, 0, 0, 0, 0x100), length=(16 << 20) + 10) + bytes(10))
    assert connection.next_event() is None
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_the_connection_keeps_no_reference_to_a_payload() -> None:
    connection = connect(HOST)
    data = bytes(1 << 20)
    stream = bulk(1, len(data), data)
    tracemalloc.start()
    connection.receive_data(stream[:1000])
    assert connection.next_event() is None
    connection.receive_data(stream[1000:])
    event = connection.next_event()
    assert isinstance(event, BulkPacket)
    assert tracemalloc.get_traced_memory()[0] > len(data)
    del event
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()


def test_input_is_released_when_its_events_are_taken() -> None:
    connection = connect(HOST)
    tracemalloc.start()
    for _ in range(200):
        connection.receive_data(RESET * 100)
        assert len(drain(connection)) == 100
    gc.collect()  # free lists too
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()


def test_input_is_released_while_more_is_waiting() -> None:
    connection = connect(HOST)
    connection.receive_data(RESET)
    tracemalloc.start()
    for _ in range(200):
        connection.receive_data(RESET * 100)
        assert all(connection.next_event() == Reset() for _ in range(100))
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()
    assert drain(connection) == [Reset()]


def test_both_roles_understand_each_other() -> None:
    connections = {role: Connection(role) for role in Role}
    for connection in connections.values():
        connection.start()
    for role, connection in connections.items():
        (event,) = feed(connections[OTHER[role]], [written(connection)])
        assert isinstance(event, Hello)
        assert event.capabilities == ALL_CAPS
        assert connections[OTHER[role]].peer_version.startswith("farplug ")
    request = BulkPacket(id=ID, endpoint=0x02, status=OK, length=31, data=bytes(31))
    connections[GUEST].send(request)
    assert feed(connections[HOST], [written(connections[GUEST])]) == [request]
    answer = BulkPacket(id=ID, endpoint=0x02, status=OK, length=31)
    connections[HOST].send(answer)
    assert feed(connections[GUEST], [written(connections[HOST])]) == [answer]
    assert str(HOST) == "usb-host"
