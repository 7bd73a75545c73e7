"""Messages that a new connection's parser skips.

QEMU reads nothing from a usbredir channel of its SPICE server while its VM is paused. When a client disconnects during
the pause, the server drops what that client sent, *except the first message that QEMU has not read*: the parser of the
next connection reads that message before the new client's hello. To such a parser, which expects 32-bit ids and has no
device, the remains of another connection are malformed; QEMU 7.2 then aborts its VM (``usbredir_chardev_read:
Assertion 'dev->read_buf == NULL'``).

So each message is put between a prefix and a suffix that two parsers read differently:

* The parser of this connection (64-bit ids) reads three status packets that change nothing, the packets of the message,
  and a fourth such status packet.
* The parser of another connection (32-bit ids, no hello yet) reads a status packet that changes nothing, an interrupt
  packet for an endpoint that does not exist, and then one filter_filter packet that reaches to the end of the message:
  its text is not a valid filter, and the parser ignores it.

The prefix, by its offset in bytes::

     0  bulk_streams_status    64-bit: the whole packet, 25 bytes
        bulk_streams_status    32-bit: bytes 0 to 20
    21  interrupt_packet       32-bit: its type is in no_streams of the packet above, its length is the type below
    25  bulk_receiving_status  64-bit: the whole packet, 22 bytes. 32-bit: part of the interrupt packet
    47  bulk_streams_status    64-bit: the whole packet, 25 bytes
    60  filter_filter          32-bit: its header is in id, endpoints and no_streams of the packet above
    72  the message

Source: libusbredirparser, ``usbredirparser.c`` (usbredirparser_do_read, usbredirparser_verify_type_header,
usbredirparser_call_type_func); QEMU, ``hw/usb/redirect.c``; libspice-server, ``char-device.cpp``
(red_char_device_reset, cur_write_buf). ``tests/usbredir/test_envelope.py`` compares with the C library.
"""

from __future__ import annotations

import struct

from farplug.usb.types import Buffer
from farplug.usbredir.caps import Cap
from farplug.usbredir.wire import PacketType

CAPS = Cap.IDS_64_BITS | Cap.BULK_STREAMS | Cap.BULK_RECEIVING | Cap.FILTER
"""The capabilities that both sides need: 64-bit ids, both kinds of status packet, filters."""

_BULK_STREAMS_STATUS = struct.Struct("<IIQIIB")  # type, length, id; endpoints, no_streams, status
_BULK_STREAMS_LENGTH = 9
_BULK_RECEIVING_STATUS = struct.Struct("<IIQIBB")  # type, length, id; stream_id, endpoint, status
_BULK_RECEIVING_LENGTH = 6
_NO_ENDPOINT = 0x80
"""Endpoint 0, IN: it has neither buffered receiving nor interrupt transfers."""

_INTERRUPT_LENGTH = PacketType.BULK_RECEIVING_STATUS
"""The length of the interrupt packet, in bytes: the parser reads the type of the next packet as this length."""
_FIRST = _BULK_STREAMS_STATUS.pack(
    PacketType.BULK_STREAMS_STATUS, _BULK_STREAMS_LENGTH, 0, 0, PacketType.INTERRUPT_PACKET << 8, 0
)
_SECOND = _BULK_RECEIVING_STATUS.pack(
    PacketType.BULK_RECEIVING_STATUS,
    _BULK_RECEIVING_LENGTH,
    int.from_bytes(struct.pack("<BBHI", _NO_ENDPOINT, 0, _INTERRUPT_LENGTH - 4, 0), "little"),
    0,
    _NO_ENDPOINT,
    0,
)
_THIRD_BEGIN = struct.pack("<II5xI", PacketType.BULK_STREAMS_STATUS, _BULK_STREAMS_LENGTH, PacketType.FILTER_FILTER)
_FILTER_LENGTH_AND_ID = struct.Struct("<II")
"""The last byte of the id, 0, is the status of the third packet."""
_BEGIN = _FIRST + _SECOND + _THIRD_BEGIN
_SUFFIX = _BULK_STREAMS_STATUS.pack(PacketType.BULK_STREAMS_STATUS, _BULK_STREAMS_LENGTH, 0, 0, 0, 0)
"""Its last byte, the status, is the NUL that ends the text of the filter packet."""

OVERHEAD = len(_BEGIN) + _FILTER_LENGTH_AND_ID.size + len(_SUFFIX)
"""The number of bytes that :func:`enclose` adds to a message."""


def enclose(buffers: list[Buffer], size: int) -> list[Buffer]:
    """Return a message that a new connection's parser skips.

    Args:
        buffers: whole packets from the usb-host side, encoded with :data:`CAPS`; not a hello.
        size: the sum of their sizes, in bytes.
    """
    return [_BEGIN + _FILTER_LENGTH_AND_ID.pack(size + len(_SUFFIX), 0), *buffers, _SUFFIX]
