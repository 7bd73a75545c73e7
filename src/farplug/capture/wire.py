"""The bytes of a connection as a made-up TCP stream that Wireshark's dissectors take. No I/O.

Wireshark recognises SPICE by the first bytes of a TCP stream, on a port that no other protocol owns (5900 is VNC's),
and takes one message of the link in each segment. So the stream goes to port 5930, and the link is cut into its steps.
The client's ticket, the encrypted password, is replaced by zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, Protocol

from farplug.usb.types import Buffer

CLIENT: Final = bytes((192, 0, 2, 1))
"""The address of farplug in a capture: made up (RFC 5737)."""
SERVER: Final = bytes((192, 0, 2, 2))
"""The address of the VM's side."""
FIRST_CLIENT_PORT: Final = 40001
SERVER_PORT: Final = 5930
MAX_SEGMENT: Final = 65495
"""Bytes of data in one IPv4 packet with a TCP header."""
TICKET_SIZE: Final = 128
"""Bytes of an encrypted SPICE ticket (spice-protocol, SPICE_TICKET_KEY_PAIR_LENGTH / 8)."""
MAX_LINK_STEP: Final = 64 << 10
"""Bytes of a message of the link that are collected; the link of a longer one is written as it comes."""

_FIN, _SYN, _RST, _PUSH, _ACK = 1, 2, 4, 8, 16
_MAGIC = b"REDQ"
_LINK_HEADER_SIZE = 16
_RESULT_SIZE = 4
_IP = struct.Struct("!BBHHHBBH4s4s")
_TCP = struct.Struct("!HHIIBBHHH")
_SYN_OPTIONS = struct.pack("!BBHBBBB", 2, 4, MAX_SEGMENT, 3, 3, 14, 1)
"""Maximum segment size, and a window scale of 14."""


class WireSink(Protocol):
    """Takes the packets of the interface ``wire``."""

    def wire_packet(self, parts: Sequence[Buffer], *, sent: bool, comment: str = "", essential: bool = False) -> bool:
        """Take an IP packet, whose buffers do not change any more. Return False if it was dropped.

        Args:
            parts: its bytes.
            sent: farplug sent it; otherwise farplug received it.
            comment: for people; empty: none.
            essential: drop it only if even headers alone are dropped.
        """


class _Tcp:
    """The packets of one TCP connection."""

    def __init__(self, sink: WireSink, number: int, name: str) -> None:
        self._sink = sink
        self._port = FIRST_CLIENT_PORT + number % (0x10000 - FIRST_CLIENT_PORT)
        self._sequence = [0, 0]
        """The next sequence numbers of what was received and of what was sent."""
        self._identification = 0
        self.is_open = True
        for sent, flags in ((True, _SYN), (False, _SYN | _ACK)):
            self._packet(sent, flags, options=_SYN_OPTIONS, comment=name if sent else "")
            self._sequence[sent] = 1
        self._packet(True, _ACK)

    def data(self, sent: bool, data: Buffer) -> None:
        """Write bytes of one direction; end the connection if they are dropped."""
        view = memoryview(data)
        for at in range(0, len(view), MAX_SEGMENT):
            if not self.is_open:
                return
            piece = view[at : at + MAX_SEGMENT]
            if not self._packet(sent, _PUSH | _ACK, piece):
                self.is_open = False
                self._packet(
                    sent, _RST | _ACK, comment="the capture was too slow: the rest of this connection is missing"
                )

    def close(self) -> None:
        """Write the end of both directions."""
        if self.is_open:
            self.is_open = False
            for sent in (True, False):
                self._packet(sent, _FIN | _ACK)
                self._sequence[sent] = (self._sequence[sent] + 1) & 0xFFFFFFFF
            self._packet(True, _ACK)

    def _packet(self, sent: bool, flags: int, data: Buffer = b"", *, options: bytes = b"", comment: str = "") -> bool:
        sequence, size = self._sequence, len(data)
        ports = (self._port, SERVER_PORT) if sent else (SERVER_PORT, self._port)
        addresses = (CLIENT, SERVER) if sent else (SERVER, CLIENT)
        acknowledged = sequence[not sent] if flags & _ACK else 0
        offset = (_TCP.size + len(options)) << 2
        tcp = _TCP.pack(*ports, sequence[sent], acknowledged, offset, flags, 0xFFFF, 0, 0) + options
        self._identification = (self._identification + 1) & 0xFFFF
        length = _IP.size + len(tcp) + size
        fields = (0x45, 0, length, self._identification, 0x4000, 64, 6)
        ip = _IP.pack(*fields, _checksum(_IP.pack(*fields, 0, *addresses)), *addresses)
        sequence[sent] = (sequence[sent] + size) & 0xFFFFFFFF
        parts = (ip + tcp, data) if size else (ip + tcp,)
        return self._sink.wire_packet(parts, sent=sent, comment=comment, essential=not size)


def _checksum(header: bytes) -> int:
    total: int = sum(struct.unpack("!10H", header))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


class WireTap:
    """Writes what one connection sends and receives, below TLS: a :class:`~farplug.transport.connection.Tap`.

    Args:
        sink: takes the packets.
        number: of the connection, from 0: gives it a port of its own.
        name: of the connection, for people.
    """

    def __init__(self, sink: WireSink, number: int, name: str) -> None:
        self._sink = sink
        self._number = number
        self._name = name
        self._tcp: _Tcp | None = None
        self._is_spice = False
        self._mess_sent = self._ticket_sent = False
        """The client's steps of a SPICE link."""
        self._reply: bytearray | None = bytearray()
        """What the server sent of its first steps; None: its link is over, or it has none."""

    def sent(self, buffers: Sequence[Buffer]) -> None:
        """Write what is being sent. It is copied: a device may use its buffers again."""
        tcp = self._started()
        if not tcp.is_open or not buffers:
            return
        data = b"".join(buffers)
        if not self._mess_sent:
            self._mess_sent = True
            self._is_spice = data.startswith(_MAGIC)
        elif self._is_spice and not self._ticket_sent:
            self._send_ticket(tcp, data)
            return
        tcp.data(True, data)

    def received(self, data: memoryview) -> None:
        """Write what was received. It is copied."""
        tcp = self._started()
        if not tcp.is_open:
            return
        if self._reply is None:
            tcp.data(False, bytes(data))
            return
        self._reply += data
        while self._reply is not None and (size := _next_step(self._reply, self._ticket_sent)):
            tcp.data(False, bytes(self._reply[:size]))
            del self._reply[:size]
            if self._ticket_sent or not self._is_spice:
                rest, self._reply = self._reply, None
                tcp.data(False, bytes(rest))

    def closed(self) -> None:
        """Write the end of the connection."""
        if self._tcp is not None:
            if self._reply:
                self._tcp.data(False, bytes(self._reply))
            self._tcp.close()

    def _started(self) -> _Tcp:
        if self._tcp is None:
            self._tcp = _Tcp(self._sink, self._number, self._name)
        return self._tcp

    def _send_ticket(self, tcp: _Tcp, data: bytes) -> None:
        """Write the last step of the client's link: the method of authentication, and zeros for the ticket.

        The client sends both at once, and nothing else with them.
        """
        self._ticket_sent = True
        method = data[:-TICKET_SIZE]
        if method:
            tcp.data(True, method)
        tcp.data(True, bytes(min(len(data), TICKET_SIZE)))


def _next_step(received: bytearray, ticket_sent: bool) -> int:
    """Return the size of the server's next step of a link if all of it was received, or else 0.

    What is not a SPICE link is one step.
    """
    size = len(received)
    if ticket_sent:
        return _RESULT_SIZE if size >= _RESULT_SIZE else 0
    if not received.startswith(_MAGIC):
        return 0 if size < len(_MAGIC) and _MAGIC.startswith(received) else size
    if size < _LINK_HEADER_SIZE:
        return 0
    step = _LINK_HEADER_SIZE + int.from_bytes(received[12:16], "little")
    if step > MAX_LINK_STEP:
        return size
    return step if size >= step else 0
