"""A port: one usbredir byte stream into a guest. One device fits in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from farplug.errors import FarplugError
from farplug.usb.types import Buffer


class PortListener(Protocol):
    """Who reads a port's bytes. Called on the event loop, like :class:`asyncio.Protocol`."""

    def data_received(self, data: memoryview) -> None:
        """Bytes arrived. The view is valid only during the call."""

    def pause_writing(self) -> None:
        """The output queue is above its high-water mark: stop producing."""

    def resume_writing(self) -> None:
        """The output queue is below its low-water mark again."""

    def port_closed(self, error: FarplugError | None) -> None:
        """The port is closed; called once, last. None if we closed it or the guest closed it in good order."""


class Port(ABC):
    """One usbredir byte stream. SPICE: one per usbredir channel; TCP and UNIX sockets: one.

    A port may be opened again after it was closed, where its transport can: a SPICE channel, a socket that we connect.

    Attributes:
        name: short and unique in its guest, for people: ``usbredir 0``, ``tcp``.
        compress: a hint: False while what is sent must not wait for the processor (isochronous data).
        loses_wakeups: what was sent while the VM was paused lies there also when it goes on, until more is sent.
        keeps_unread: the first message that was sent while the VM was paused stays in the transport when the port is
            closed, and the guest reads it as the beginning of the next connection.
    """

    name: str
    compress: bool = True
    loses_wakeups: bool = False
    keeps_unread: bool = False

    def __str__(self) -> str:
        """Return where it leads, for messages: an address if it has one of its own."""
        return self.name

    @abstractmethod
    async def open(self, listener: PortListener) -> None:
        """Connect, and deliver everything that arrives to ``listener``.

        Raises:
            TargetError: it cannot be reached.
            PortError: somebody else uses it.
        """

    @abstractmethod
    def write(self, buffers: list[Buffer]) -> None:
        """Send buffers in order, as one message, without joining what need not be joined.

        Ignored once the port is closed.
        """

    @abstractmethod
    def pause_reading(self) -> None:
        """Deliver nothing until :meth:`resume_reading`: the guest's output backs up in the transport."""

    @abstractmethod
    def resume_reading(self) -> None:
        """Deliver again."""

    @abstractmethod
    async def close(self) -> None:
        """Send what is queued (within a bounded time), then close. Does nothing on a closed port."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once; what is queued is lost."""
