"""One end of a usbredir connection: bytes in, packets out, and the reverse. No I/O.

::

    connection = Connection(Role.HOST)
    connection.start()
    write(connection.data_to_send())
    ...
    connection.receive_data(data)
    while (event := connection.next_event()) is not None:
        ...                                  # connection.send(answer)
    write(connection.data_to_send())

Received and sent packets obey the rules of the C parser (usbredirparser.c), with four exceptions, which are stricter:
no packet is accepted before the peer's hello, words of capabilities beyond :attr:`Hello.MAX_CAPS_WORDS` are skipped,
a filter is limited to :attr:`FilterFilter.MAX_PAYLOAD` bytes, and a side sends no request whose answer it could not
receive (:attr:`~farplug.usbredir.wire.PacketFormat.answer_cap`).
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Never, TypeAlias

from farplug.errors import LocalProtocolError, RemoteProtocolError
from farplug.usb.types import Buffer
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.packets import PACKETS, DataPacket, Hello, Packet
from farplug.usbredir.wire import MAX_LENGTH, PACKET_FORMATS, Flow, PacketType, header
from farplug.version import __version__

DEFAULT_MAX_PAYLOAD: Final = 16 * 1024 * 1024
"""The default of ``max_payload``: the bytes of payload that are stored for one packet."""

_JOIN_BELOW: Final = 4096
_COMPACT_ABOVE: Final = 65536
_ID_MASK_32: Final = 0xFFFF_FFFF
_ID_MASK_64: Final = 0xFFFF_FFFF_FFFF_FFFF


class Role(Enum):
    """An end of the connection."""

    HOST = "usb-host"
    """The side that has the device."""
    GUEST = "usb-guest"
    """The side that uses the device: QEMU."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Violation:
    """A packet was dropped because the peer violated the protocol. The stream continues with the next packet.

    Attributes:
        error: what was wrong.
        type: the packet's type, as received.
        id: the packet's id.
    """

    error: RemoteProtocolError
    type: int
    id: int

    def __str__(self) -> str:
        return f"violation type={self.type} id={self.id:x}: {self.error}"


@dataclass(frozen=True, slots=True)
class Oversized:
    """A valid packet whose payload, longer than ``max_payload``, was skipped.

    Attributes:
        packet: the packet with empty ``data``; ``length`` is the length of the payload.
    """

    packet: DataPacket

    def __str__(self) -> str:
        return f"oversized {self.packet}"


Event: TypeAlias = Packet | Violation | Oversized


class _Incoming(NamedTuple):
    """How to decode a packet type with the capabilities of both sides."""

    packet: type[Packet]
    layout: struct.Struct
    max_length: int
    """The most bytes of type header and payload."""
    max_stored: int
    """The most bytes of payload that are stored."""


class _Outgoing(NamedTuple):
    """How to encode a packet type with the capabilities of both sides."""

    layout: struct.Struct
    """Header and type header."""
    type_header_size: int
    values: int
    """The number of the packet's values in this layout."""


class Connection:
    """One end of a usbredir connection, protocol 0.7.

    Received bytes are stored until :meth:`next_event` returns their packets: a caller that stops calling it must stop
    passing bytes in, too. Of an incomplete packet at most ``max_payload`` bytes are stored. Sent packets are queued
    until :meth:`data_to_send` is called.

    Args:
        role: our end.
        caps: our capabilities.
        version: our name and version, as text; cut to 63 bytes.
        max_payload: the most bytes of payload that are stored for one packet; a longer one becomes an
            :class:`Oversized`.

    Attributes:
        role: our end.
        own_caps: the capabilities that we announce.
        peer_caps: the capabilities that the peer announced; None before its hello.
        peer_version: the peer's name and version; empty before its hello.
        unsent: the number of queued bytes.
    """

    def __init__(
        self,
        role: Role,
        *,
        caps: Cap = ALL_CAPS,
        version: str = f"farplug {__version__}",
        max_payload: int = DEFAULT_MAX_PAYLOAD,
    ) -> None:
        self.role = role
        self.own_caps = caps.usable()
        self.peer_caps: Cap | None = None
        self.peer_version = ""
        self._version = version
        self._max_payload = max_payload
        self._to_host = role is Role.HOST
        self._received_flow = Flow.TO_HOST if self._to_host else Flow.TO_GUEST
        self._sent_flow = Flow.TO_GUEST if self._to_host else Flow.TO_HOST
        hello = PACKET_FORMATS[PacketType.HELLO]
        self._header = header(Cap.NONE)
        self._id_mask = _ID_MASK_32
        self._incoming = {
            int(PacketType.HELLO): _Incoming(Hello, hello.type_header(Cap.NONE), MAX_LENGTH, 4 * Hello.MAX_CAPS_WORDS)
        }
        self._outgoing: dict[type[Packet], _Outgoing] = {}
        self.unsent = 0
        self._unsent: list[Buffer] = []
        self._buffer = bytearray()
        self._missing = 0
        self._payload: bytearray | None = None
        self._events = self._parse()

    def start(self) -> None:
        """Queue our hello. Nothing else can be sent before :meth:`next_event` has returned the peer's hello."""
        packet_format = PACKET_FORMATS[PacketType.HELLO]
        packet = Hello(version=self._version, caps=(self.own_caps,))
        payload = packet.payload()
        size = packet_format.type_header(Cap.NONE).size + len(payload)
        self._queue(packet_format.packet(Cap.NONE).pack(packet.TYPE, size, 0, *packet.values()), payload)

    def receive_data(self, data: Buffer) -> None:
        """Pass in bytes from the peer, split anywhere. They are copied: ``data`` may be reused afterwards."""
        view = memoryview(data)
        if self._missing:
            part = view[: self._missing]
            if self._payload is not None:
                self._payload += part
            self._missing -= len(part)
            view = view[len(part) :]
        self._buffer += view

    def next_event(self) -> Event | None:
        """Return the next event; None if more bytes are needed.

        The payload belongs to the packet: the connection does not change it afterwards.
        """
        return next(self._events)

    def send(self, packet: Packet) -> None:
        """Queue a packet. Payloads of 4 KiB and more are not copied: do not change them before they are written.

        Raises:
            LocalProtocolError: the peer would drop the packet, or it may not be sent now. Nothing was queued.
        """
        outgoing = self._outgoing.get(type(packet))
        if outgoing is None:
            raise LocalProtocolError(self._why_not_sent(packet.TYPE))
        payload = packet.payload()
        if type(payload) is memoryview and not (payload.c_contiguous and payload.itemsize == 1):
            raise LocalProtocolError(f"{packet.TYPE}: the memoryview of its payload is not one of contiguous bytes")
        size = len(payload)
        if fault := packet.fault(not self._to_host, size):
            raise LocalProtocolError(fault)
        layout, type_header_size, count = outgoing
        values = packet.values()
        if len(values) > count:
            if packet.TYPE is PacketType.BULK_PACKET and values[count]:
                raise LocalProtocolError("bulk_packet of more than 65535 bytes needs bulk_length_32_bits on both sides")
            values = values[:count]
        try:
            head = layout.pack(packet.TYPE, type_header_size + size, packet.id & self._id_mask, *values)
        except struct.error as error:
            raise LocalProtocolError(f"{packet.TYPE} has a number that does not fit into its field: {error}") from None
        self._queue(head, payload)

    def data_to_send(self) -> list[Buffer]:
        """Return the queued buffers, in order, and empty the queue."""
        self.unsent = 0
        unsent, self._unsent = self._unsent, []
        return unsent

    def _queue(self, head: bytes, payload: Buffer) -> None:
        size = len(payload)
        self.unsent += len(head) + size
        if size < _JOIN_BELOW:
            self._unsent.append(head + payload if size else head)
        else:
            self._unsent += (head, payload)

    def _parse(self) -> Generator[Event | None, None, Never]:
        """Yield events, without end; None each time that more bytes are needed."""
        buffer = self._buffer
        stash: list[memoryview] = []
        at = 0
        while True:
            header, table = self._header, self._incoming
            unpack, header_size = header.unpack_from, header.size
            while table is self._incoming:
                if at >= _COMPACT_ABOVE:
                    del buffer[:at]
                    at = 0
                while len(buffer) - at < header_size:
                    del buffer[:at]
                    at = 0
                    yield None
                code, length, id_ = unpack(buffer, at)
                at += header_size
                incoming = table.get(code)
                if incoming is None:
                    yield Violation(RemoteProtocolError(self._why_not_received(code)), code, id_)
                    at = yield from self._skip(at, length)
                    continue
                packet, layout, max_length, max_stored = incoming
                size = length - layout.size
                if size < 0 or length > max_length:
                    yield Violation(RemoteProtocolError(_bad_length(incoming, length)), code, id_)
                    at = yield from self._skip(at, length)
                    continue

                while len(buffer) - at < layout.size:
                    del buffer[:at]
                    at = 0
                    yield None
                values = layout.unpack_from(buffer, at)
                at += layout.size
                if not size:
                    yield self._decode(packet, id_, values, b"", 0)
                elif size <= max_stored and size <= len(buffer) - at:
                    at += size
                    yield self._decode(packet, id_, values, bytes(memoryview(buffer)[at - size : at]), size)
                else:
                    # A payload is stored completely or not at all; of a hello, the beginning is stored.
                    stored = min(size, max_stored) if size <= max_stored or packet is Hello else 0
                    self._payload = bytearray()
                    at = yield from self._take(at, stored)
                    stash.append(memoryview(self._payload))
                    self._payload = None
                    at = yield from self._take(at, size - stored)
                    # Popped here, so that only the event references the payload.
                    yield self._decode(packet, id_, values, stash.pop(), size)

    def _take(self, at: int, size: int) -> Generator[None, None, int]:
        """Move ``size`` bytes of the stream to ``_payload``, or drop them. Returns the new position in the buffer."""
        part = min(size, len(self._buffer) - at)
        if self._payload is not None:
            self._payload += memoryview(self._buffer)[at : at + part]
        if part == size:
            return at + size
        self._buffer.clear()
        self._missing = size - part
        while self._missing:
            yield None
        return 0

    def _skip(self, at: int, length: int) -> Generator[None, None, int]:
        """Skip the body of a packet that is dropped."""
        # C counts the bytes to skip in a signed int: it skips nothing of a body whose length is 2 GiB or more.
        return (yield from self._take(at, length if length < 1 << 31 else 0))

    def _decode(
        self, packet: type[Packet], id_: int, values: tuple[int, ...], payload: Buffer, size: int
    ) -> Packet | Violation | Oversized:
        """Return the event for a complete packet with ``size`` bytes of payload, of which some may not be stored."""
        try:
            event = packet.decode(id_, values, payload)
        except RemoteProtocolError as error:
            return Violation(error, packet.TYPE, id_)
        if fault := event.fault(self._to_host, size):
            return Violation(RemoteProtocolError(fault), packet.TYPE, id_)
        if isinstance(event, DataPacket):
            return event if len(payload) == size else Oversized(event)
        if isinstance(event, Hello):
            self._use_peer_caps(event)
        return event

    def _use_peer_caps(self, hello: Hello) -> None:
        """Make the tables for the capabilities of both sides."""
        self.peer_caps = peer_caps = hello.capabilities
        self.peer_version = hello.version
        shared = self.own_caps & peer_caps
        self._header = header(shared)
        self._id_mask = _ID_MASK_64 if Cap.IDS_64_BITS in shared else _ID_MASK_32
        self._incoming = {}
        for packet in PACKETS:
            if packet is Hello:
                continue
            packet_format = PACKET_FORMATS[packet.TYPE]
            layout = packet_format.type_header(shared)
            required, answer = packet_format.required_cap, packet_format.answer_cap
            if packet_format.flow is not self._sent_flow and required in self.own_caps and answer in peer_caps:
                max_length = min(layout.size + packet.MAX_PAYLOAD, MAX_LENGTH)
                max_stored = self._max_payload if issubclass(packet, DataPacket) else packet.MAX_PAYLOAD
                self._incoming[packet.TYPE] = _Incoming(packet, layout, max_length, max_stored)
            if packet_format.flow is not self._received_flow and required in peer_caps and answer in self.own_caps:
                count = len(layout.unpack(bytes(layout.size)))
                self._outgoing[packet] = _Outgoing(packet_format.packet(shared), layout.size, count)

    def _why_not_received(self, code: int) -> str:
        packet_format = PACKET_FORMATS.get(code)
        if packet_format is None:
            return f"unknown packet type {code}"
        name = PacketType(code)
        if packet_format.flow is self._sent_flow:
            return f"{name} arrived at the {self.role}, but it is sent {packet_format.flow}"
        if name is PacketType.HELLO:
            return "a second hello"
        if self.peer_caps is None:
            return f"{name} arrived before the hello"
        if packet_format.required_cap in self.own_caps:
            lacking = _name(packet_format.answer_cap)
            return f"{name} arrived, but the peer, without the capability {lacking}, cannot receive its answer"
        return f"{name} arrived, but we do not have the capability {_name(packet_format.required_cap)}"

    def _why_not_sent(self, name: PacketType) -> str:
        packet_format = PACKET_FORMATS[name]
        if name is PacketType.HELLO:
            return "start() sends the hello, once"
        if self.peer_caps is None:
            return f"{name} cannot be sent before the peer's hello has arrived"
        if packet_format.flow is self._received_flow:
            return f"{name} is not sent by the {self.role}, but {packet_format.flow}"
        if packet_format.required_cap in self.peer_caps:
            lacking = _name(packet_format.answer_cap)
            return f"{name} cannot be sent: we, without the capability {lacking}, cannot receive its answer"
        return f"{name} cannot be sent: the peer does not have the capability {_name(packet_format.required_cap)}"


def _bad_length(incoming: _Incoming, length: int) -> str:
    packet, layout, max_length, _ = incoming
    expected = f"{layout.size} to {max_length}" if max_length > layout.size else f"{layout.size}"
    return f"{packet.TYPE} of {length} bytes, not {expected}"


def _name(cap: Cap) -> str:
    return str(cap.name).lower()
