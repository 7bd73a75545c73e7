"""The interface of all devices, real ones and those made of software.

The layers above use only :class:`Device` and :class:`~farplug.usb.transfer.Transfer`; the layers below implement them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from farplug.usb.figures import Figures
from farplug.usb.share import NO_PORT, Share
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Interface, Speed, TransferType


@dataclass(frozen=True, slots=True)
class Identity:
    """The fields of a device descriptor that identify a device, and its current speed."""

    speed: Speed
    vendor_id: int
    product_id: int
    device_version: int = 0
    """bcdDevice"""
    device_class: int = 0
    device_subclass: int = 0
    device_protocol: int = 0
    manufacturer: str = ""
    product: str = ""
    serial_number: str = ""

    def __str__(self) -> str:
        name = " ".join(part for part in (self.manufacturer, self.product) if part)
        return f"{self.vendor_id:04x}:{self.product_id:04x}{' ' if name else ''}{name}"


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to offer a device to a guest.

    Attributes:
        speed: the speed that the device runs at.
        without: the optional part that the device leaves out, named as in its specification; empty if it is complete.
    """

    speed: Speed
    without: str = ""

    def __str__(self) -> str:
        return f"{self.speed} speed{f' without {self.without}' if self.without else ''}"

    def is_less_than(self, other: Offer) -> bool:
        """Return whether the offer requires less of the guest than ``other``, and nothing more."""
        return self != other and self.speed <= other.speed and other.without in ("", self.without)


@dataclass(frozen=True, slots=True)
class Reception:
    """Parameters for receiving on an endpoint continuously, without a request for each packet.

    Interrupt IN, isochronous (IN and OUT) and buffered bulk IN work this way: over a network, a request for each
    packet would be too late.

    Attributes:
        endpoint: bEndpointAddress.
        type: interrupt, isochronous, or bulk for buffered bulk receiving.
        transfers: the number of transfers to keep queued at the device.
        packets_per_transfer: isochronous only.
        bytes_per_transfer: buffered bulk only, a multiple of the max packet size.
        stream_id: buffered bulk only.
    """

    endpoint: int
    type: TransferType
    transfers: int = 5
    packets_per_transfer: int = 1
    bytes_per_transfer: int = 0
    stream_id: int = 0


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """An event of a device that users should see. ``str(event)`` is one line of text.

    Attributes:
        name: the stable name of this kind of event, for programs.
        bounded: whether the number of these events is bounded by what a user does. Of others only the last one of many
            is certain to be reported.
    """

    name: ClassVar[str]
    bounded: ClassVar[bool] = False

    @property
    def kind(self) -> Hashable:
        """Return what the limit counts the event with."""
        return self.name


class DeviceListener(Protocol):
    """Receives what a device reports."""

    def happened(self, event: DeviceEvent) -> None:
        """Pass on an event of the device."""

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        """Take a packet (or a buffered bulk transfer) of a reception. On an error ``data`` is what arrived.

        Returns:
            False if the packet was dropped: the endpoint does not receive, or the guest does not take packets now.
        """

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """Note that a reception ended (``STALL``), or that it goes on after an error (any other status)."""

    def lost(self, error: Exception | None) -> None:
        """Note that the device is gone: it will not complete any more transfers."""


class Device(ABC):
    """A USB device.

    All methods are called from the thread that runs the event loop. None blocks: those that may take long (real
    hardware) are coroutines. Between :meth:`open` and :meth:`close` the device reports to one listener. A closed device
    can be opened again.

    Attributes:
        share: what the guest may use. The engine sets it before :meth:`open`. A device counts there the work that it
            does on the event loop, and the memory that it occupies besides transfers, if either can be large.
    """

    share: Share = NO_PORT

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Return the identity at the selected speed."""

    @property
    @abstractmethod
    def configuration(self) -> int:
        """Return bConfigurationValue of the current configuration; 0 while the device is not configured."""

    @property
    @abstractmethod
    def interfaces(self) -> Sequence[Interface]:
        """Return the interfaces of the current configuration, each in its current alternate setting.

        While the device is not configured: those of the first configuration, because guests filter by interface class.
        """

    @property
    def offers(self) -> Sequence[Offer]:
        """Return the ways to offer the device to a guest, the best first."""
        return (Offer(self.identity.speed),)

    @property
    def offer(self) -> Offer:
        """Return the selected one of :attr:`offers`."""
        return Offer(self.identity.speed)

    @property
    def used_at_once(self) -> bool:
        """Return whether a guest with a driver uses the device as soon as the guest has configured it.

        If so, and the guest does not use the device, the device is offered in the next way of :attr:`offers`.
        """
        return False

    @property
    def has_streams(self) -> bool:
        """Return whether an alternate setting has bulk streams, in the selected offer."""
        return any(endpoint.max_streams for interface in self.interfaces for endpoint in interface.endpoints)

    def select(self, offer: Offer) -> None:
        """Select one of :attr:`offers` for the next :meth:`open`.

        Raises:
            ValueError: the device has no such offer.
            StateError: the device is open.
        """
        if offer not in self.offers:
            raise ValueError(f"{self.identity} cannot be offered at {offer}")

    @property
    def figures(self) -> Figures | None:
        """Return the device's own counters; None if only its transfers are counted."""
        return None

    async def open(self, listener: DeviceListener) -> None:
        """Open the device.

        Raises:
            DeviceError: the device cannot be opened.
            StateError: the device is already open.
        """

    @abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """Take a transfer and complete it once, now or later. No transfer of a guest makes a device raise."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Complete a submitted transfer soon: as ``CANCELLED``, or with another status if it ends first.

        A completed transfer is ignored.
        """

    @abstractmethod
    async def reset(self) -> Status:
        """Reset the port: unconfigure the device, cancel all pending transfers, and end receptions silently."""

    @abstractmethod
    async def set_configuration(self, value: int) -> Status:
        """Select a configuration by bConfigurationValue; 0 for none. Cancels all pending transfers."""

    @abstractmethod
    async def set_interface(self, number: int, alternate: int) -> Status:
        """Select an alternate setting by bInterfaceNumber and bAlternateSetting.

        Returns:
            ``INVALID`` if there is no such interface, ``STALL`` if the interface has no such setting.
        """

    def start_receiving(self, reception: Reception) -> Status:
        """Start to receive on an endpoint continuously.

        Returns:
            ``INVALID`` if the endpoint already receives, ``STALL`` if it cannot.
        """
        return Status.STALL

    def stop_receiving(self, endpoint: int) -> Status:
        """Stop receiving on an endpoint. Returns ``SUCCESS`` also if it does not receive."""
        return Status.SUCCESS

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        """Allocate ``count`` bulk streams on each of the endpoints, or on none."""
        return Status.STALL

    async def free_streams(self, endpoints: Sequence[int]) -> Status:
        """Free the bulk streams of the endpoints."""
        return Status.STALL

    async def close(self) -> None:
        """Cancel all pending transfers, make durable what was written, and release the device.

        Raises:
            DeviceError: what was written could not be made durable (``IO_ERROR``).
        """
