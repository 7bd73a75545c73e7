"""The base class of functions. A virtual device has one or several: a disk, a keyboard, a serial line.

A function receives transfers and completes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farplug.usb.device import DeviceEvent, Reception
from farplug.usb.figures import Figures
from farplug.usb.platform import WindowsDriver
from farplug.usb.share import NO_PORT, Share
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Speed

if TYPE_CHECKING:
    from farplug.usb.descriptors import InterfaceDescriptor


_MAX_STRINGS = 255
"""String descriptor indexes are bytes, and 0 is none."""


class Strings:
    """The strings of a device. Equal texts have one index."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def index(self, text: str) -> int:
        """Return the index of the string descriptor of a text, 1 or more; 0 for an empty text.

        Raises:
            ValueError: the device has 255 other strings.
        """
        if not text:
            return 0
        if text not in self._texts:
            if len(self._texts) == _MAX_STRINGS:
                raise ValueError(f"a device has at most {_MAX_STRINGS} strings")
            self._texts.append(text)
        return self._texts.index(text) + 1

    def text(self, index: int) -> str:
        """Return the text of an index; empty if there is none."""
        return self._texts[index - 1] if 0 < index <= len(self._texts) else ""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers that a device assigned to one of its functions.

    A function needs them where it writes such a number into class-specific descriptors or data: the union descriptor of
    a CDC function has interface numbers, the input header of a camera an endpoint address.

    Attributes:
        first_interface: the device's number of the function's interface 0.
        addresses: the device's endpoint address by the function's own; None: not assigned yet.
        strings: the strings of the device.
    """

    first_interface: int = 0
    addresses: Mapping[int, int] | None = None
    strings: Strings = field(default_factory=Strings)

    def interface(self, own: int) -> int:
        """Return the device's number of one of the function's interfaces."""
        return self.first_interface + own

    def endpoint(self, own: int) -> int:
        """Return the device's address of one of the function's endpoints."""
        return own if self.addresses is None else self.addresses[own]

    def string(self, text: str) -> int:
        """Return the index of a string descriptor of the device with this text; 0 for an empty text."""
        return self.strings.index(text)


class FunctionHost(ABC):
    """The device, as one of its functions sees it."""

    @property
    @abstractmethod
    def numbers(self) -> Numbers:
        """Return the function's numbers at the current speed."""

    @abstractmethod
    def send(self, endpoint: int, data: Buffer, status: Status = Status.SUCCESS) -> bool:
        """Send one packet on an interrupt or isochronous IN endpoint, without a request for it.

        Returns:
            False if the packet was dropped: the guest does not receive from the endpoint, or does not take packets now.
        """

    @abstractmethod
    def halt(self, endpoint: int) -> None:
        """Halt an endpoint: every transfer on it stalls until the guest clears the halt or resets."""

    @abstractmethod
    def is_halted(self, endpoint: int) -> bool:
        """Return whether an endpoint is halted."""

    @abstractmethod
    def report(self, event: DeviceEvent) -> None:
        """Report an event to the listener of the device; drop the event while the device is closed."""

    @abstractmethod
    def raised(self, error: Exception) -> None:
        """Report an exception of a task of the function: in the log with its traceback, and as an event."""


class Function(ABC):
    """A part of a virtual device: interfaces, their endpoints, and the requests to them.

    Attributes:
        share: what the guest may use, as :attr:`farplug.usb.device.Device.share`; set before :meth:`open`.
    """

    share: Share = NO_PORT

    @abstractmethod
    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        """Return the interface descriptors at this speed: every alternate setting, endpoints included.

        Interface numbers count from 0 within the function, and endpoint addresses are the function's own. The device
        renumbers both where functions collide; the function sees its own numbers in transfers and requests.

        Args:
            speed: the speed that the device runs at.
            numbers: the device's numbers, for class-specific descriptors, which the device does not change. It calls
                the method twice: first to assign the numbers, then with the assigned ones. Both calls describe the same
                interfaces and endpoints.
        """

    association: tuple[int, int, int] | None = None
    """Class, subclass and protocol of the interface association, which a function of several interfaces has.

    None: those of its first interface. A camera and a sound card have values of their own.
    """

    windows_driver: WindowsDriver | None = None
    """The driver that Windows uses for the function, without an INF file; None: that of its class, if there is one."""

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
        """Start from the initial state: the guest selected the configuration. Every interface has its setting 0."""

    def set_alternate(self, interface: int, alternate: int) -> None:
        """Select an alternate setting of one of the function's interfaces.

        Complete the pending transfers of this interface as ``CANCELLED``; its receptions have ended. The default resets
        the whole function.
        """
        self.reset(port_reset=False)

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

    def receiving(self, endpoint: int, reception: Reception) -> Status:
        """Begin to send on an interrupt or isochronous IN endpoint, or to receive on an isochronous OUT endpoint.

        Until :meth:`stopped`, a reset, or a new setting of the interface, packets sent with :meth:`FunctionHost.send`
        reach the guest. An isochronous OUT endpoint receives transfers, which have no answer.

        Returns:
            ``SUCCESS``, or ``STALL`` if the endpoint does not work now.
        """
        return Status.STALL

    def stopped(self, endpoint: int) -> None:
        """Stop what :meth:`receiving` began: the guest stopped it, or the endpoint was halted."""

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
        """Release what the constructor acquired, such as files: the device will not be plugged again. Twice is once."""
