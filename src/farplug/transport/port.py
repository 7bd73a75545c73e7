"""A port: one usbredir byte stream into a guest, for one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from farplug.errors import FarplugError
from farplug.usb.types import Buffer


class PortListener(Protocol):
    """The receiver of a port's bytes. Its methods are called on the event loop, as in :class:`asyncio.Protocol`."""

    def data_received(self, data: memoryview, more: bool = False) -> None:
        """Process received bytes. The view is valid only during the call.

        Args:
            data: the bytes; may be empty after a call with ``more``.
            more: a call with the next bytes follows at once: process these together with them. Unless the listener
                pauses reading during the call.
        """

    def pause_writing(self) -> None:
        """Stop writing: the output queue is above its high-water mark."""

    def resume_writing(self) -> None:
        """Continue to write: the output queue is below its low-water mark again."""

    def port_closed(self, error: FarplugError | None) -> None:
        """Called once, last: the port is closed. None if we closed it, or the guest ended the stream regularly."""


class Port(ABC):
    """One usbredir byte stream. SPICE: one per usbredir channel; TCP and UNIX sockets: one.

    A port may be opened again after it was closed.

    Attributes:
        name: a short name, unique in its guest: ``usbredir 0``, ``tcp``.
        compress: a hint: False while the sent data must not be delayed by compression (isochronous data).
        loses_wakeups: data that is sent while the VM is paused stays unread after the pause, until more data is sent.
        keeps_unread: the first message that is sent while the VM is paused stays in the transport when the port is
            closed, and the guest reads it at the start of the next connection.
        offers_again: a device that the guest does not use may be disconnected and offered in another way. Otherwise a
            guest that has lost the device does not take it again.
        use: a command that makes the guest use an attached device; empty: the guest does that by itself.
    """

    name: str
    compress: bool = True
    loses_wakeups: bool = False
    keeps_unread: bool = False
    offers_again: bool = True
    use: str = ""

    def __str__(self) -> str:
        """Return the port for messages: its address, if it has its own, or its name."""
        return self.name

    @abstractmethod
    async def open(self, listener: PortListener) -> None:
        """Connect, and deliver received bytes to ``listener``.

        Raises:
            StateError: the port is open, or was closed before it was open.
            TargetError: the guest cannot be reached.
            PortError: another client uses the port.
            GuestGoneError: the session ended before the port was open.
        """

    @abstractmethod
    def write(self, buffers: list[Buffer]) -> None:
        """Send buffers in order, as one message, without unnecessary copies.

        Does nothing on a closed port.
        """

    @abstractmethod
    def pause_reading(self) -> None:
        """Stop reading until :meth:`resume_reading`: the guest's output is queued in the transport."""

    @abstractmethod
    def resume_reading(self) -> None:
        """Read again."""

    @abstractmethod
    async def close(self) -> None:
        """Send the queued data (within a bounded time), then close. Does nothing on a closed port."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once; queued data is lost."""
