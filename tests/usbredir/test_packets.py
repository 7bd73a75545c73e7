"""Every format of every packet against the bytes that libusbredirparser writes, and the log line of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.usbredir.support import OTHER, connect, drain, each_way, hello, written

from farplug.errors import LocalProtocolError
from farplug.usb.transfer import Status
from farplug.usb.types import Setup
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.packets import (
    PACKETS,
    AllocBulkStreams,
    AltSettingStatus,
    BufferedBulkPacket,
    BulkPacket,
    BulkReceivingStatus,
    BulkStreamsStatus,
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
    GetAltSetting,
    GetConfiguration,
    Hello,
    InterfaceEntry,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    Reset,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StartIsoStream,
    StopBulkReceiving,
    StopInterruptReceiving,
    StopIsoStream,
    endpoint_address,
    endpoint_index,
)
from farplug.usbredir.protocol import Connection, Role
from farplug.usbredir.wire import PACKET_FORMATS, PacketType

VECTORS = Path(__file__).parents[1] / "data" / "usbredir-vectors.txt"
DATA = bytes([1, 2, 3, 4, 5])
CANCELLED, INVALID, IO_ERROR, SUCCESS = Status.CANCELLED, Status.INVALID, Status.IO_ERROR, Status.SUCCESS


def golden_packets(full: bool) -> dict[str, Packet]:
    """The packets that the golden file spells, with all capabilities or with none."""
    id_ = 0x1122334455667788 if full else 0x55667788
    length = 0x12345 if full else 0x2345
    setup_in: dict[str, Any] = {"endpoint": 0x80, "request": 6, "request_type": 0x80, "value": 0x0100, "index": 2}
    setup_out: dict[str, Any] = {"endpoint": 0, "request": 9, "request_type": 0x21, "value": 0x0100, "index": 2}
    endpoints = tuple(
        EndpointEntry(n % 4, 0x20 + n, 0x40 + n, 0x100 + n if full else 0, 0x10000 + n if full else 0)
        for n in range(32)
    )
    return {
        "device_connect": DeviceConnect(
            speed=2,
            device_class=0xAA,
            device_subclass=0xBB,
            device_protocol=0xCC,
            vendor_id=0x1234,
            product_id=0x5678,
            device_version=0x0910 if full else 0,
        ),
        "device_disconnect": DeviceDisconnect(),
        "interface_info": InterfaceInfo(
            interfaces=(InterfaceEntry(0, 0x20, 0x40, 0x60), InterfaceEntry(1, 0x21, 0x41, 0x61))
        ),
        "ep_info": EndpointInfo(endpoints=endpoints),
        "configuration_status": ConfigurationStatus(id=id_, status=CANCELLED, configuration=2),
        "alt_setting_status": AltSettingStatus(id=id_, status=CANCELLED, interface=2, alt=3),
        "iso_stream_status": IsoStreamStatus(id=id_, status=Status.STALL, endpoint=0x81),
        "interrupt_receiving_status": InterruptReceivingStatus(id=id_, status=Status.STALL, endpoint=0x81),
        "bulk_streams_status": BulkStreamsStatus(id=id_, endpoints=0x60004, streams=16, status=IO_ERROR),
        "bulk_receiving_status": BulkReceivingStatus(id=id_, stream_id=7, endpoint=0x81, status=Status.STALL),
        "control_in_reply": ControlPacket(id=id_, status=SUCCESS, length=5, data=DATA, **setup_in),
        "control_out_reply": ControlPacket(id=id_, status=SUCCESS, length=5, **setup_out),
        "bulk_in_reply": BulkPacket(id=id_, endpoint=0x81, status=SUCCESS, length=5, stream_id=9, data=DATA),
        "bulk_out_reply": BulkPacket(id=id_, endpoint=2, status=SUCCESS, length=length, stream_id=9),
        "iso_in": IsoPacket(id=id_, endpoint=0x83, status=SUCCESS, length=5, data=DATA),
        "interrupt_in": InterruptPacket(id=id_, endpoint=0x84, status=SUCCESS, length=5, data=DATA),
        "interrupt_out_reply": InterruptPacket(id=id_, endpoint=4, status=SUCCESS, length=5),
        "buffered_bulk": BufferedBulkPacket(id=id_, stream_id=9, length=5, endpoint=0x81, status=SUCCESS, data=DATA),
        "reset": Reset(),
        "set_configuration": SetConfiguration(id=id_, configuration=3),
        "get_configuration": GetConfiguration(id=id_),
        "set_alt_setting": SetAltSetting(id=id_, interface=4, alt=5),
        "get_alt_setting": GetAltSetting(id=id_, interface=4),
        "start_iso_stream": StartIsoStream(id=id_, endpoint=0x83, packets_per_urb=32, urbs=8),
        "stop_iso_stream": StopIsoStream(id=id_, endpoint=0x83),
        "start_interrupt_receiving": StartInterruptReceiving(id=id_, endpoint=0x84),
        "stop_interrupt_receiving": StopInterruptReceiving(id=id_, endpoint=0x84),
        "alloc_bulk_streams": AllocBulkStreams(id=id_, endpoints=0x60004, streams=16),
        "free_bulk_streams": FreeBulkStreams(id=id_, endpoints=0x60004),
        "cancel_data_packet": CancelDataPacket(id=id_),
        "filter_reject": FilterReject(),
        "start_bulk_receiving": StartBulkReceiving(
            id=id_, stream_id=0, bytes_per_transfer=0x200, endpoint=0x81, transfers=5
        ),
        "stop_bulk_receiving": StopBulkReceiving(id=id_, stream_id=0, endpoint=0x81),
        "control_in_request": ControlPacket(id=id_, status=SUCCESS, length=18, **setup_in),
        "control_out_request": ControlPacket(id=id_, status=SUCCESS, length=5, data=DATA, **setup_out),
        "bulk_in_request": BulkPacket(id=id_, endpoint=0x81, status=SUCCESS, length=length, stream_id=9),
        "bulk_out_request": BulkPacket(id=id_, endpoint=2, status=SUCCESS, length=5, stream_id=9, data=DATA),
        "iso_out": IsoPacket(id=id_, endpoint=3, status=SUCCESS, length=5, data=DATA),
        "interrupt_out_request": InterruptPacket(id=id_, endpoint=4, status=SUCCESS, length=5, data=DATA),
        "filter_filter": FilterFilter(filter="0x03,-1,-1,-1,0|-1,-1,-1,-1,1"),
    }


def golden() -> list[tuple[str, Role, bool, bytes]]:
    rows = []
    for line in VECTORS.read_text().splitlines():
        if line.startswith("#"):
            role = Role.HOST if "role=usb-host" in line else Role.GUEST
            full = "own_caps=0xff" in line
        elif not line.startswith("LOG"):
            name, hexadecimal = line.split()
            rows.append((name, role, full, bytes.fromhex(hexadecimal)))
    return rows


ROWS = golden()
IDS = [f"{name}-{role}-{'all' if full else 'none'}" for name, role, full, _ in ROWS]


def test_the_golden_file_has_every_type_but_one() -> None:
    # libusbredirparser has no function that sends device_disconnect_ack: it does so by itself.
    seen = {int.from_bytes(data[:4], "little") for *_, data in ROWS}
    assert seen == set(PacketType) - {PacketType.DEVICE_DISCONNECT_ACK}
    assert [packet.TYPE for packet in PACKETS] == list(PACKET_FORMATS) == list(PacketType)


@pytest.mark.parametrize(
    ("request_type", "endpoint", "length", "data"), [(0x80, 0x80, 18, b""), (0x21, 0x00, 5, b"hello")]
)
def test_a_control_transfer_begins_with_its_setup_packet(
    request_type: int, endpoint: int, length: int, data: bytes
) -> None:
    setup = Setup(request_type, 6, 0x0100, 0x0409, length)
    assert ControlPacket.of(7, setup, data) == ControlPacket(
        id=7,
        endpoint=endpoint,
        request=6,
        request_type=request_type,
        status=Status.SUCCESS,
        value=0x0100,
        index=0x0409,
        length=length,
        data=data,
    )


@pytest.mark.parametrize(("name", "role", "full", "data"), ROWS, ids=IDS)
def test_golden(name: str, role: Role, full: bool, data: bytes) -> None:
    caps = ALL_CAPS if full else Cap.NONE
    if name == "hello":
        # Without capabilities the C parser still has this one in the role of the usb-guest.
        own = Cap.DEVICE_DISCONNECT_ACK if role is Role.GUEST and not full else caps
        sender = Connection(role, caps=own, version="vec")
        sender.start()
        assert written(sender) == data
        receiver = Connection(OTHER[role])
        assert each_way(lambda: Connection(OTHER[role]), data) == [Hello(version="vec", caps=(own,))]
        receiver.receive_data(data)
        drain(receiver)
        assert (receiver.peer_caps, receiver.peer_version) == (own, "vec")
        return
    packet = golden_packets(full)[name]
    if needed := PACKET_FORMATS[packet.TYPE].answer_cap:  # the C parser sends the request without it
        caps |= needed | Cap.EP_INFO_MAX_PACKET_SIZE
    assert each_way(lambda: connect(OTHER[role], caps, caps), data) == [packet]
    if name == "interface_info":  # its unused slots are not zero
        at = len(data) - 128
        data = data[:at] + b"".join(data[n : n + 2] + bytes(30) for n in range(at, len(data), 32))
    sender = connect(role, caps, caps)
    sender.send(packet)
    assert written(sender) == data


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("role", list(Role))
def test_what_the_golden_file_lacks_cannot_be_sent(role: Role, full: bool) -> None:
    caps = ALL_CAPS if full else Cap.NONE
    present = {name for name, its_role, its_full, _ in ROWS if (its_role, its_full) == (role, full)}
    refused = {name: packet for name, packet in golden_packets(full).items() if name not in present}
    assert len(refused) > 10
    sender = connect(role, caps, caps)
    for name, packet in refused.items():
        # Data packets are sent both ways, but here the payload is missing, or there is one where there must be none.
        if full and name == "filter_filter":
            continue
        with pytest.raises(LocalProtocolError):
            sender.send(packet)
    assert sender.data_to_send() == []


def test_disconnect_ack() -> None:
    data = bytes.fromhex("18000000 00000000 0000000000000000")
    assert each_way(lambda: connect(Role.HOST), data) == [DeviceDisconnectAck()]
    sender = connect(Role.GUEST)
    sender.send(DeviceDisconnectAck())
    assert written(sender) == data


@pytest.mark.parametrize(
    ("data", "version", "caps", "capabilities"),
    [
        (hello(extra=b""), "peer", (), Cap.NONE),
        (hello(extra=b"\xff\0\0"), "peer", (), Cap.NONE),
        (hello(extra=b"\x10\0\0\x80\x02\0\0\0\x03\0"), "peer", (0x80000010, 2), Cap(0x80000010)),
        (hello(caps=0xEF), "peer", (0xEF,), Cap(0xEE)),
        (hello(version=b"x" * 64), "x" * 63, (0xFF,), ALL_CAPS),
        (hello(version=b"a\0b"), "a", (0xFF,), ALL_CAPS),
        (hello(version=b"\xff\x1b"), "\ufffd\x1b", (0xFF,), ALL_CAPS),
        (hello(extra=bytes(range(256)) * 4), "peer", tuple(0x03020100 + 0x04040404 * n for n in range(32)), None),
    ],
)
def test_hello_forms(data: bytes, version: str, caps: tuple[int, ...], capabilities: Cap | None) -> None:
    (event,) = each_way(lambda: Connection(Role.GUEST), data)
    assert event == Hello(version=version, caps=caps)
    assert isinstance(event, Hello)
    assert capabilities is None or event.capabilities == capabilities


def test_long_and_odd_versions_are_cut() -> None:
    connection = Connection(Role.HOST, version="é" * 40 + "\ud800")
    connection.start()
    data = written(connection)
    assert len(data) == 80
    assert data[12:76] == ("é" * 31).encode() + "é".encode()[:1] + b"\0"


def test_unknown_statuses_are_errors() -> None:
    data = bytes.fromhex("08000000 02000000 0500000000000000 c803")
    assert each_way(lambda: connect(Role.GUEST), data) == [ConfigurationStatus(id=5, status=IO_ERROR, configuration=3)]


def test_endpoint_tables() -> None:
    addresses = [*range(16), *range(0x80, 0x90)]
    assert [endpoint_index(address) for address in addresses] == list(range(32))
    assert [endpoint_address(index) for index in range(32)] == addresses


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (Hello(version="vec\x1b", caps=(0xFF, 1)), "hello id=0 version='vec\\x1b' caps=ff,1"),
        (Reset(), "reset id=0"),
        (
            BulkPacket(id=0x1F, endpoint=0x81, status=SUCCESS, length=512, data=bytes(512)),
            "bulk_packet id=1f ep=81 status=success length=512 data=512B",
        ),
        (
            BulkPacket(id=0x1F, endpoint=2, status=Status.STALL, length=13, stream_id=3),
            "bulk_packet id=1f ep=02 status=stall length=13 stream=3",
        ),
        (
            golden_packets(True)["control_in_request"],
            "control_packet id=1122334455667788 ep=80 status=success length=18 request=06 request_type=80 value=0100"
            " index=0002",
        ),
        (
            golden_packets(True)["device_connect"],
            "device_connect id=0 speed=2 device_class=170 device_subclass=187 device_protocol=204 vendor=1234"
            " product=5678 version=0910",
        ),
        (golden_packets(True)["interface_info"], "interface_info id=0 interfaces=0:20/40/60,1:21/41/61"),
        (
            EndpointInfo(
                endpoints=(EndpointEntry(0, 0, 0, 64), *[EndpointEntry()] * 16, EndpointEntry(2, 0, 0, 512))
                + (EndpointEntry(),) * 14
            ),
            "ep_info id=0 endpoints=00:0/64,81:2/512",
        ),
        (FilterFilter(filter="|\n"), "filter_filter id=0 filter='|\\n'"),
        (AllocBulkStreams(endpoints=0x60004, streams=16), "alloc_bulk_streams id=0 endpoints=00060004 streams=16"),
    ],
)
def test_packets_print_as_one_line(packet: Packet, text: str) -> None:
    assert str(packet) == text


def test_a_packet_is_equal_to_one_of_its_type_with_the_same_fields() -> None:
    packet = SetAltSetting(id=3, interface=1, alt=2)
    assert repr(packet) == "SetAltSetting(id=3, interface=1, alt=2)"
    assert packet == SetAltSetting(id=3, interface=1, alt=2)
    assert packet != SetAltSetting(id=4, interface=1, alt=2)
    assert packet != SetAltSetting(id=3, interface=1, alt=0)
    assert StopIsoStream(endpoint=1) != StopInterruptReceiving(endpoint=1)
