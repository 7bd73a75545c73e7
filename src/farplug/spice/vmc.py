"""SpiceVMC: a byte stream inside a SPICE channel, with LZ4 compression if both sides support it. No I/O.

Source: ``spice.proto`` (SpiceVmcChannel); spice-gtk 0.42, ``channel-usbredir.c``; libspice-server 0.15.1,
``spicevmc.cpp``. Message boundaries have no meaning in the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

import lz4.block

from farplug.errors import RemoteProtocolError
from farplug.spice.channel import MAX_MESSAGE, Channel, Event, Message
from farplug.spice.link import LinkResult
from farplug.spice.messages import ClientMessage, ServerMessage
from farplug.spice.types import VmcCapability, has_capability
from farplug.usb.types import Buffer

MAX_UNCOMPRESSED = 16 << 20
"""The largest uncompressed size of a COMPRESSED_DATA message that we accept, in bytes."""
MAX_SENT = (4 << 20) + (128 << 10)
"""The largest payload of a message that we send, in bytes: packets that are sent together are one message, unless
one of them has more than 4 MiB.

Proxies drop messages over 16 MiB.
"""
COMPRESS_ABOVE = 1000
"""Payloads up to this size, in bytes, are not compressed (COMPRESS_THRESHOLD of spice-gtk and the server)."""
PROBE_SIZE = 64 << 10
"""The part of a large payload that is compressed as a trial, in bytes.

To compress 1 MiB of random data takes ten times as long as the trial, and then a copy.
"""

_COMPRESSED_HEADER = struct.Struct("<BI")


class Compression(IntEnum):
    """SPICE_DATA_COMPRESSION_TYPE_*."""

    NONE = 0
    LZ4 = 1


class VmcChannel(Channel):
    """A byte stream over one channel.

    Pass received bytes to :meth:`receive_data`, call :meth:`next_event` until it returns None, then send
    :meth:`data_to_send`. A memoryview among the events is the next bytes of the stream.

    Args:
        name: the channel's, for logs and errors.
        link: the result of its link.
        may_compress: compress, if the server supports it.

    Attributes:
        compress: compress what becomes smaller. Set it to False for devices with isochronous endpoints, as spice-gtk
            does: compression delays their data.
    """

    capabilities = (VmcCapability.DATA_COMPRESS_LZ4,)

    def __init__(self, name: str, link: LinkResult, *, may_compress: bool) -> None:
        super().__init__(
            name,
            mini_header=link.mini_header,
            stored={ServerMessage.VMC_COMPRESSED_DATA: MAX_MESSAGE},
            streamed=ServerMessage.VMC_DATA,
        )
        self.compress = True
        self._may_compress = may_compress and has_capability(link.channel_caps, VmcCapability.DATA_COMPRESS_LZ4)

    def next_event(self) -> Event | None:
        event = next(self._events, None)
        return self._decompress(event.body) if type(event) is Message else event

    def send_data(self, buffers: Sequence[Buffer]) -> None:
        """Queue bytes of the stream. Large buffers are copied only if compression makes them smaller."""
        size = sum(map(len, buffers))
        if size <= MAX_SENT:
            self._send_message(buffers, size)
            return
        for piece, piece_size in _split(buffers):
            self._send_message(piece, piece_size)

    def _send_message(self, buffers: Sequence[Buffer], size: int) -> None:
        if size > COMPRESS_ABOVE and self.compress and self._may_compress and _looks_compressible(buffers, size):
            block: bytes = lz4.block.compress(b"".join(buffers), store_size=False)
            if _COMPRESSED_HEADER.size + len(block) < size:
                header = _COMPRESSED_HEADER.pack(Compression.LZ4, size)
                self.send(ClientMessage.VMC_COMPRESSED_DATA, header, block)
                return
        if size:
            self._queue(ClientMessage.VMC_DATA, buffers, size)

    def _decompress(self, body: memoryview) -> memoryview:
        if len(body) and body[0] == Compression.NONE:
            return body[1:]
        if len(body) < _COMPRESSED_HEADER.size:
            raise RemoteProtocolError(
                f"{self.name}: COMPRESSED_DATA of {len(body)} bytes, fewer than {_COMPRESSED_HEADER.size}"
            )
        kind, size = _COMPRESSED_HEADER.unpack_from(body)
        if kind != Compression.LZ4:
            raise RemoteProtocolError(f"{self.name}: COMPRESSED_DATA with unknown compression {kind}")
        if size > MAX_UNCOMPRESSED:
            raise RemoteProtocolError(
                f"{self.name}: COMPRESSED_DATA of {size} bytes uncompressed, more than {MAX_UNCOMPRESSED}"
            )
        try:
            data: bytes = lz4.block.decompress(body[_COMPRESSED_HEADER.size :], uncompressed_size=size)
        except lz4.block.LZ4BlockError as error:
            raise RemoteProtocolError(f"{self.name}: COMPRESSED_DATA is damaged: {error}") from None
        if len(data) != size:
            raise RemoteProtocolError(f"{self.name}: COMPRESSED_DATA announces {size} bytes and contains {len(data)}")
        return memoryview(data)


def _looks_compressible(buffers: Sequence[Buffer], size: int) -> bool:
    """Return whether a trial makes the beginning of the largest buffer smaller; True for small payloads."""
    if size <= 2 * PROBE_SIZE:
        return True
    probe = memoryview(max(buffers, key=len))[:PROBE_SIZE]
    return len(lz4.block.compress(probe, store_size=False)) < len(probe)


def _split(buffers: Sequence[Buffer]) -> list[tuple[list[Buffer], int]]:
    """Return the buffers in groups of up to MAX_SENT bytes, each with its size."""
    groups: list[tuple[list[Buffer], int]] = []
    group: list[Buffer] = []
    room = MAX_SENT
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view) > room:
            group.append(view[:room])
            groups.append((group, MAX_SENT))
            view = view[room:]
            group, room = [], MAX_SENT
        if view:
            group.append(view)
            room -= len(view)
    groups.append((group, MAX_SENT - room))
    return groups
