"""A pair of ports, connected in memory: the listener of each receives what the other writes.

They behave like sockets on purpose: bytes arrive later, in pieces of another size than written, and in a buffer that is
reused at once.
"""

from __future__ import annotations

import asyncio
from collections import deque

from farplug.errors import FarplugError, GuestGoneError, StateError
from farplug.transport.connection import HIGH_WATER, LOW_WATER
from farplug.transport.port import Port, PortListener
from farplug.usb.types import Buffer

PIECE = 64 << 10
"""The most bytes that are delivered at once."""


class MemoryPort(Port):
    """One end of a pair from :func:`memory_ports`. Both ends may be opened again after a close."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._peer: MemoryPort | None = None
        self._listener: PortListener | None = None
        self._inbox: deque[Buffer] = deque()
        self._inbox_size = 0
        self._delivery: asyncio.Handle | None = None
        self._reading_paused = False
        self._writer_paused = False
        self._piece = memoryview(bytearray(PIECE))

    async def open(self, listener: PortListener) -> None:
        if self._listener is not None:
            raise StateError(f"port {self.name} is open already")
        self._listener = listener
        self._reading_paused = self._writer_paused = False
        self._schedule()

    def write(self, buffers: list[Buffer]) -> None:
        if self._listener is None:
            return
        peer = self.peer
        for buffer in buffers:
            if size := len(buffer):
                peer._inbox.append(buffer)
                peer._inbox_size += size
        peer._schedule()
        if peer._inbox_size > HIGH_WATER and not self._writer_paused:
            self._writer_paused = True
            self._listener.pause_writing()

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._schedule()

    async def close(self) -> None:
        if self._listener is None:
            return
        peer = self.peer
        while peer._inbox and peer._listener is not None and not peer._reading_paused:
            peer._deliver()
        self._end(None)
        peer._end(GuestGoneError(f"{peer.name}: the guest closed the connection"))

    def abort(self) -> None:
        if self._listener is not None:
            self.peer._clear()
            self._end(None)
            self.peer._end(GuestGoneError(f"{self.peer.name}: the connection broke"))

    @property
    def peer(self) -> MemoryPort:
        """Return the other end."""
        assert self._peer is not None
        return self._peer

    def _schedule(self) -> None:
        if self._delivery is None and self._inbox and self._listener is not None and not self._reading_paused:
            self._delivery = asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivery = None
        listener = self._listener
        if listener is None or self._reading_paused:
            return
        size = 0
        while self._inbox and size < PIECE:
            view = memoryview(self._inbox.popleft())
            if len(view) > PIECE - size:
                self._inbox.appendleft(view[PIECE - size :])
                view = view[: PIECE - size]
            self._piece[size : size + len(view)] = view
            size += len(view)
        self._inbox_size -= size
        self._schedule()
        peer = self.peer
        if peer._writer_paused and self._inbox_size < LOW_WATER:
            peer._writer_paused = False
            if peer._listener is not None:
                peer._listener.resume_writing()
        if size:
            listener.data_received(self._piece[:size])

    def _end(self, error: FarplugError | None) -> None:
        self._clear()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.port_closed(error)

    def _clear(self) -> None:
        self._inbox.clear()
        self._inbox_size = 0
        if self._delivery is not None:
            self._delivery.cancel()
            self._delivery = None


def memory_ports(name: str = "memory") -> tuple[MemoryPort, MemoryPort]:
    """Return two connected ports, for the side of the device and the side of the guest.

    Bytes that are written before the other end is open are delivered when it opens.
    """
    device_side, guest_side = MemoryPort(name), MemoryPort(f"{name} (guest)")
    device_side._peer, guest_side._peer = guest_side, device_side
    return device_side, guest_side
