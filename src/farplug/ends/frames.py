"""Ethernet frames over a stream socket: each has its length in front, 32 bits in network order.

passt, gvproxy (``-listen-qemu``), socket_vmnet and QEMU (``-netdev stream``) use this framing.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Final

from farplug.ends.base import CHUNK
from farplug.ends.sockets import SocketPeer
from farplug.usb.types import Buffer

MAX_FRAME: Final = 64 << 10
"""The longest frame in bytes that a peer may send: above that it does not use this framing."""

READ_AHEAD: Final = 2 << 20
"""Bytes of frames that are received before the guest takes them; with twice that the peer waits.

passt does not wait: it drops frames when its socket is full. For the gap, and for each duplicate acknowledgement that
follows from it, it sends all again that was not acknowledged. So its window should fit: Linux offers up to 3 MiB.
"""

_LENGTH: Final = struct.Struct(">I")


class FrameReader:
    """Splits a stream into frames. Sans-IO.

    Raises:
        ValueError: a frame is longer than :data:`MAX_FRAME`.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes, and return the frames that are complete now."""
        data = self._rest + data
        frames = []
        start = 0
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > MAX_FRAME:
                raise ValueError(f"a frame has {length} bytes: the peer does not send 32-bit lengths and frames")
            end = start + _LENGTH.size + length
            if end > len(data):
                break
            frames.append(data[start + _LENGTH.size : end])
            start = end
        self._rest = data[start:]
        return frames


class FramePeer(SocketPeer):
    """A connected stream socket that carries frames."""

    read_ahead = READ_AHEAD

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        super().__init__(reader, writer, name)
        self._frames = FrameReader()

    async def read(self) -> Sequence[bytes]:
        while data := await self._reader.read(CHUNK):
            try:
                frames = self._frames.feed(data)
            except ValueError as error:
                raise OSError(str(error)) from error
            if frames:
                return frames
        return ()

    async def write(self, items: Sequence[Buffer]) -> None:
        lengths = (_LENGTH.pack(len(frame)) for frame in items)
        await super().write([part for pair in zip(lengths, items, strict=True) for part in pair])
