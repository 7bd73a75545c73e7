"""Ends: what a serial line or a network adapter of a guest is connected to on this machine.

A user names an end by its address (:func:`farplug.ends.parse_serial_end`, :func:`farplug.ends.parse_network_end`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from farplug.usb.types import Buffer

CHUNK: Final = 64 << 10
"""Bytes that are read at once, at most."""

MAX_UNSENT: Final = 64 << 10
"""Bytes that wait for a peer that reads nothing; then :meth:`Peer.write` waits, and with it the guest."""

RETRY_INTERVAL: Final = 1.0
"""Seconds between two attempts to reach a peer that left."""


class Peer(ABC):
    """Who is at an end now: a program that has the terminal open, a connection.

    An item is a chunk of bytes, or an Ethernet frame.

    Attributes:
        name: for messages.
    """

    name = ""

    @abstractmethod
    async def read(self) -> Sequence[bytes]:
        """Return the next items, as soon as there is one; none if the peer has left.

        A call that is cancelled loses nothing.

        Raises:
            OSError: the peer is gone.
        """

    @abstractmethod
    async def write(self, items: Sequence[Buffer]) -> None:
        """Send items; return when the peer may be sent more.

        Raises:
            OSError: the peer is gone.
        """

    def has_left(self) -> bool:
        """Return whether the peer is gone, where that can be seen without reading all that it has sent."""
        return False

    def close(self) -> None:
        """Leave the peer."""


Change: TypeAlias = Callable[[str], None]
"""Called when a peer has come, or has left, with a line of text for people."""


class End(ABC):
    """What a function of a virtual device is connected to on this machine, with at most one peer at a time.

    Attributes:
        address: what a user needs to reach the end, such as the path of a terminal; known once the end is open.
        peer: who is there; None: no peer.
        on_change: called when a peer has come or left; may be replaced at any time.
    """

    address: str

    def __init__(self, address: str) -> None:
        self.address = address
        self.peer: Peer | None = None
        self.on_change: Change | None = None
        self.is_open = False
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Open the end. It stays open while the guest resets or reboots, or is lost and returns. Twice is once.

        Raises:
            DeviceError: the end cannot be opened.
            SetupError: this machine lacks what the end needs.
        """
        if not self.is_open:
            await self._open()
            self.is_open = True

    async def close(self) -> None:
        """Close the end, and leave its peer. Twice is once."""
        if self.is_open:
            self.is_open = False
            self.on_change = None
            await self._close()
            if self.peer is not None:
                self.peer.close()
                self.peer = None

    async def changed(self) -> None:
        """Wait until a peer comes or leaves."""
        self._changed.clear()
        await self._changed.wait()

    async def read(self) -> Sequence[bytes]:
        """Return the next items of a peer. Waits for a peer, if there is none."""
        while True:
            while self.peer is None:
                await self.changed()
            peer = self.peer
            try:
                if items := await peer.read():
                    return items
                reason = ""
            except OSError as error:
                reason = _text(error)
            self.left(peer, reason)

    async def write(self, items: Sequence[Buffer]) -> bool:
        """Send items to the peer; return when it may be sent more. Return False without a peer: the items are lost."""
        peer = self.peer
        if peer is None:
            return False
        try:
            await peer.write(items)
        except OSError as error:
            self.left(peer, _text(error))
            return False
        return True

    @abstractmethod
    async def _open(self) -> None:
        """Open the end."""

    @abstractmethod
    async def _close(self) -> None:
        """Close the end; its peer is left afterwards."""

    # Called by subclasses

    def came(self, peer: Peer) -> None:
        """Take note of a peer."""
        self.peer = peer
        self._changed.set()
        if self.on_change is not None:
            self.on_change(f"{peer.name} is connected")

    def left(self, peer: Peer, reason: str = "") -> None:
        """Take note that a peer has left; ignored if it is not the current one."""
        peer.close()
        if peer is not self.peer:
            return
        self.peer = None
        self._changed.set()
        if self.on_change is not None:
            self.on_change(f"{peer.name} is not connected any more{reason and f': {reason}'}")


def _text(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
