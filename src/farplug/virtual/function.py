"""A function is what a person wants to plug: a disk, a keyboard, a serial line. A virtual device is a bag of functions.

This is the fast grain: a function is handed transfers and completes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from farplug.usb.device import DeviceEvent
from farplug.usb.figures import Figures
from farplug.usb.transfer import Transfer
from farplug.usb.types import Speed

if TYPE_CHECKING:
    from farplug.usb.descriptors import InterfaceDescriptor


class FunctionHost(ABC):
    """What a function may ask of the device that it is a part of."""

    @abstractmethod
    def halt(self, endpoint: int) -> None:
        """Halt an endpoint: every transfer on it stalls until the guest clears the halt or resets."""

    @abstractmethod
    def is_halted(self, endpoint: int) -> bool:
        """Whether an endpoint is halted."""

    @abstractmethod
    def report(self, event: DeviceEvent) -> None:
        """Report an event to whoever has opened the device; dropped while it is closed."""


class Function(ABC):
    """A part of a virtual device: some interfaces, their endpoints, and the requests addressed to them."""

    @abstractmethod
    def interfaces(self, speed: Speed) -> Sequence[InterfaceDescriptor]:
        """The interface descriptors (every alternate setting, endpoints included) at this speed.

        Interface numbers count from 0 within the function and endpoint addresses are the function's own: the device
        moves both so that functions do not collide, and hands transfers back with the function's own numbers.
        """

    used_at_once: bool = False
    """See :attr:`farplug.usb.device.Device.used_at_once`."""

    def optional(self, speed: Speed) -> str:
        """Return the name of the part that the function can leave out at this speed. Empty: there is none."""
        return ""

    def leave_out(self, optional: bool) -> None:
        """Leave the optional part out of :meth:`interfaces` from now on, or put it in again."""

    def bind(self, host: FunctionHost) -> None:
        """Called once, when the function becomes a part of a device."""

    def configured(self, speed: Speed) -> None:
        """The guest chose the configuration, or an alternate setting changed: start afresh."""

    def set_alternate(self, interface: int, alternate: int) -> None:
        """The guest chose an alternate setting of one of the function's interfaces."""

    def control(self, transfer: Transfer) -> bool:
        """A class or vendor request to one of the function's interfaces or endpoints. False: not mine (it stalls)."""
        return False

    @abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """A transfer on one of the function's endpoints, which is not halted. Complete it once, now or later."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Complete a transfer that is still pending as ``CANCELLED``; leave a completed one alone."""

    def halt_cleared(self, endpoint: int) -> None:
        """The guest cleared the halt of an endpoint (also when it was not halted)."""

    @abstractmethod
    def reset(self, *, port_reset: bool) -> None:
        """Drop everything: complete all pending transfers as ``CANCELLED`` and forget the state of the protocol.

        Args:
            port_reset: the guest reset the port (a unit attention is due); otherwise the configuration changed or the
                device is leaving.
        """

    @property
    def figures(self) -> Figures | None:
        """Return the function's own counters; None if it has none."""
        return None

    async def open(self) -> None:
        """The device was taken. Raises ``DeviceError`` or ``ImageError`` if the function cannot work."""

    async def close(self) -> None:
        """The device is given back: make durable what was written. Raises ``DeviceError`` if that failed."""

    async def dispose(self) -> None:
        """The device will not be plugged again: give back what was taken when the function was made (files)."""
