"""Enclosed messages, read by libusbredirparser: of the connection that they belong to, and of the next one."""

from __future__ import annotations

import struct
from ctypes import CDLL

import pytest
from tests.usbredir import oracle
from tests.usbredir.oracle import Delivered, Oracle
from tests.usbredir.support import connect, hello, written
from tests.usbredir.test_packets import golden_packets

from farplug.errors import LocalProtocolError
from farplug.usb.transfer import Status
from farplug.usbredir import envelope
from farplug.usbredir.caps import ALL_CAPS
from farplug.usbredir.packets import (
    BulkPacket,
    BulkReceivingStatus,
    BulkStreamsStatus,
    DeviceDisconnect,
    InterruptPacket,
    Packet,
)
from farplug.usbredir.protocol import Role


def from_a_host(packet: Packet) -> bool:
    """Return whether the usb-host side can send a packet after the hellos."""
    try:
        connect(Role.HOST).send(packet)
    except LocalProtocolError:
        return False
    return True


PACKETS = {name: packet for name, packet in golden_packets(True).items() if from_a_host(packet)}
IGNORED_FILTER = ["usbredirparser: error parsing filter (-22), ignoring filter message"]
CHUNKS = (1, 7, 71, 72, 73, 4096)


@pytest.fixture(scope="module")
def library() -> CDLL:
    library = oracle.load()
    if library is None:
        pytest.skip(f"{oracle.LIBRARY} is not installed (Debian: libusbredirparser1)")
    return library


def encoded(*packets: Packet) -> bytes:
    """Return the bytes of packets from the usb-host side, after both hellos."""
    connection = connect(Role.HOST)
    for packet in packets:
        connection.send(packet)
    return written(connection)


def enclosed(message: bytes) -> bytes:
    """Return an enclosed message."""
    return b"".join(envelope.enclose([message], len(message)))


class Guest(Oracle):
    """The parser of a guest.

    Args:
        library: libusbredirparser.
        connected: whether the host's hello has arrived.
    """

    def __init__(self, library: CDLL, *, connected: bool) -> None:
        super().__init__(library, Role.GUEST, ALL_CAPS)
        if connected:
            self.read(hello())

    def read(self, data: bytes, chunk: int = 1 << 20) -> tuple[list[Delivered], list[str]]:
        """Return what the parser delivers, and its error messages."""
        self.delivered.clear()
        self.errors.clear()
        for at in range(0, len(data), chunk):
            self.receive(data[at : at + chunk])
        return list(self.delivered), list(self.errors)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)
def test_its_own_parser_reads_the_packet_and_harmless_status(library: CDLL, packet: Packet, chunk: int) -> None:
    message = encoded(packet)
    plain, _ = Guest(library, connected=True).read(message)
    assert plain
    delivered, errors = Guest(library, connected=True).read(enclosed(message), chunk)
    assert errors == []
    assert delivered[3:-1] == plain
    padding = [*delivered[:3], delivered[-1]]
    kinds: list[type[Packet]] = [BulkStreamsStatus, BulkReceivingStatus, BulkStreamsStatus, BulkStreamsStatus]
    assert [item.packet for item in padding] == kinds
    assert all(item.type_header[-1] == Status.SUCCESS for item in padding)
    assert padding[1].type_header[4] == 0x80, "endpoint 0 has no receptions"


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)
def test_the_parser_of_the_next_connection_skips_it(library: CDLL, packet: Packet, chunk: int) -> None:
    guest = Guest(library, connected=False)
    delivered, errors = guest.read(enclosed(encoded(packet)), chunk)
    assert [item.packet for item in delivered] == [BulkStreamsStatus, InterruptPacket]
    assert delivered[1].type_header == struct.pack("<BBH", 0x80, Status.SUCCESS, 23), "endpoint 0 takes none"
    assert errors == IGNORED_FILTER
    assert guest.read(hello(), chunk)[1] == []
    plain, _ = Guest(library, connected=True).read(encoded(packet))
    assert guest.read(encoded(packet), chunk) == (plain, []), "the next connection works"


def test_without_an_envelope_the_next_connection_breaks(library: CDLL) -> None:
    guest = Guest(library, connected=False)
    guest.read(encoded(DeviceDisconnect()))
    assert guest.read(hello())[1] != []


@pytest.mark.parametrize("size", [0, 1, 3, 4, 65535, 65536, 4 << 20])
def test_a_message_of_any_size(library: CDLL, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    reply = BulkPacket(id=7, endpoint=0x81, status=Status.SUCCESS, length=size, stream_id=1, data=data[:size])
    message = encoded(reply, DeviceDisconnect(), reply)
    assert len(enclosed(message)) == len(message) + envelope.OVERHEAD
    guest = Guest(library, connected=True)
    assert guest.read(enclosed(message))[0][3:-1] == Guest(library, connected=True).read(message)[0]
    fresh = Guest(library, connected=False)
    for _ in range(3):
        assert fresh.read(enclosed(message))[1] == IGNORED_FILTER
    assert fresh.read(hello() + message)[1] == []
