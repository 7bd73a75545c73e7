"""The base class of functions. A virtual device has one or several: a disk, a keyboard, a serial line.

A function receives transfers and completes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from farplug.usb.device import DeviceEvent
from farplug.usb.figures import Figures
from farplug.usb.share import NO_PORT, Share
from farplug.usb.transfer import Transfer
from farplug.usb.types import Speed

if TYPE_CHECKING:
    from farplug.usb.descriptors import InterfaceDescriptor


class FunctionHost(ABC):
    """The device, as one of its functions sees it."""

    @abstractmethod
    def halt(self, endpoint: int) -> None:
        """Halt an endpoint: every transfer on it stalls until the guest clears the halt or resets."""

    @abstractmethod
    def is_halted(self, endpoint: int) -> bool:
        """Return whether an endpoint is halted."""

    @abstractmethod
    def report(self, event: DeviceEvent) -> None:
        """Report an event to the listener of the device; drop the event while the device is closed."""


class Function(ABC):
    """A part of a virtual device: interfaces, their endpoints, and the requests to them.

    Attributes:
        share: what the guest may use, as :attr:`farplug.usb.device.Device.share`; set before :meth:`open`.
    """

    share: Share = NO_PORT

    @abstractmethod
    def interfaces(self, speed: Speed) -> Sequence[InterfaceDescriptor]:
        """Return the interface descriptors at this speed: every alternate setting, endpoints included.

        Interface numbers count from 0 within the function, and endpoint addresses are the function's own. The device
        renumbers both where functions collide; the function sees its own numbers in transfers and requests.
        """

    used_at_once: bool = False
    """See :attr:`farplug.usb.device.Device.used_at_once`."""

    def optional(self, speed: Speed) -> str:
        """Return the name of the part that the function can leave out at this speed; empty if there is none."""
        return ""

    def leave_out(self, optional: bool) -> None:
        """Leave the optional part out of :meth:`interfaces` from now on, or include it again."""

    def bind(self, host: FunctionHost) -> None:
        """Keep the host for later. Called once, when the function becomes a part of a device."""

    def configured(self, speed: Speed) -> None:
        """Start from the initial state: the guest selected the configuration, or an alternate setting."""

    def set_alternate(self, interface: int, alternate: int) -> None:
        """Select an alternate setting of one of the function's interfaces."""

    def control(self, transfer: Transfer) -> bool:
        """Complete a class or vendor request to the device, or to an interface or endpoint of the function.

        Returns:
            False if the function does not support the request: the request stalls.
        """
        return False

    @abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """Take a transfer on one of the function's endpoints, which is not halted. Complete it once, now or later."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Complete a transfer that is still pending as ``CANCELLED``; ignore a completed one."""

    def halt_cleared(self, endpoint: int) -> None:
        """Resume an endpoint: the guest cleared its halt, or the endpoint was not halted."""

    @abstractmethod
    def reset(self, *, port_reset: bool) -> None:
        """Complete all pending transfers as ``CANCELLED`` and return to the initial state of the protocol.

        Args:
            port_reset: the guest reset the port (SCSI units raise a unit attention); otherwise the configuration
                changed, or the device is being unplugged.
        """

    @property
    def figures(self) -> Figures | None:
        """Return the function's own counters; None if it has none."""
        return None

    async def open(self) -> None:
        """Begin to work: the device was opened.

        Raises:
            DeviceError, ImageError: the function cannot work.
        """

    async def close(self) -> None:
        """Make durable what was written: the device is being closed.

        Raises:
            DeviceError: what was written may be lost.
        """

    async def dispose(self) -> None:
        """Release what the constructor acquired, such as files: the device will not be plugged again."""
