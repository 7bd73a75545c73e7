"""The waist of the program: what every device is, whether it is real or made of software.

Everything above knows only :class:`Device` and :class:`~farplug.usb.transfer.Transfer`. Everything below answers them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from farplug.usb.figures import Figures
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Interface, Speed, TransferType


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device says it is (its device descriptor), at the speed it runs at now."""

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
        without: the optional part that the device leaves out at this speed, as its specification calls it. Empty:
            the device is complete.
    """

    speed: Speed
    without: str = ""

    def __str__(self) -> str:
        return f"{self.speed} speed{f' without {self.without}' if self.without else ''}"

    def is_less_than(self, other: Offer) -> bool:
        """Return whether the device needs less of a guest than in ``other``, and in nothing more."""
        return self != other and self.speed <= other.speed and other.without in ("", self.without)


@dataclass(frozen=True, slots=True)
class Reception:
    """How a device is to receive by itself on an endpoint, without being asked for each packet.

    Interrupt IN, isochronous (IN and OUT) and buffered bulk IN work this way: a question per packet would come too
    late over a network.

    Attributes:
        endpoint: bEndpointAddress.
        type: interrupt, isochronous, or bulk for buffered bulk receiving.
        transfers: how many transfers to keep queued at the device.
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
    """Something that happens in a device and concerns people. ``str(event)`` is one line for them.

    Attributes:
        name: of this kind of event; stable, for programs.
    """

    name: ClassVar[str]


class DeviceListener(Protocol):
    """What a device reports by itself."""

    def happened(self, event: DeviceEvent) -> None:
        """Something happened in the device; the listener passes the event on."""

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        """One packet (or one buffered bulk transfer) of a running reception. On an error ``data`` is what arrived."""

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """A reception ended by itself (``STALL``), or has an error to report while it runs on (any other)."""

    def lost(self, error: Exception | None) -> None:
        """The device is gone: nothing will be answered any more."""


class Device(ABC):
    """Something that answers USB transfers.

    All calls come from one thread, the one that runs the event loop. Nothing here blocks: what may take long (real
    hardware) is a coroutine. Between :meth:`open` and :meth:`close` the device belongs to one listener. It can be
    opened again after it was closed.
    """

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """What it says it is, at the selected speed."""

    @property
    @abstractmethod
    def configuration(self) -> int:
        """bConfigurationValue of the current configuration; 0 while it has none."""

    @property
    @abstractmethod
    def interfaces(self) -> Sequence[Interface]:
        """The interfaces of the current configuration, each in its current alternate setting.

        Before a configuration was chosen: those of the first one, because guests filter by interface classes.
        """

    @property
    def offers(self) -> Sequence[Offer]:
        """The ways to offer the device to a guest, the best first."""
        return (Offer(self.identity.speed),)

    @property
    def offer(self) -> Offer:
        """The selected one of :attr:`offers`."""
        return Offer(self.identity.speed)

    @property
    def used_at_once(self) -> bool:
        """Whether a guest that has a driver for the device uses it as soon as the guest has found it.

        If so, and the guest leaves the device alone, the device is offered in the next lesser way of :attr:`offers`.
        """
        return False

    @property
    def has_streams(self) -> bool:
        """Whether a setting of the device has bulk streams, in the selected offer."""
        return any(endpoint.max_streams for interface in self.interfaces for endpoint in interface.endpoints)

    def select(self, offer: Offer) -> None:
        """Be what ``offer`` says, one of :attr:`offers`, from the next :meth:`open` on. Only while it is not open.

        Raises:
            ValueError: the device has no such offer.
        """
        if offer not in self.offers:
            raise ValueError(f"{self.identity} cannot be offered at {offer}")

    @property
    def figures(self) -> Figures | None:
        """Return the device's own counters; None if it has none, and its transfers count."""
        return None

    async def open(self, listener: DeviceListener) -> None:
        """Take the device.

        Raises:
            DeviceError: it cannot be taken.
        """

    @abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """Take a transfer and complete it once, now or later. A device never raises because of what a guest asks."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Complete a submitted transfer soon: as ``CANCELLED``, or as it ends if that comes first.

        A transfer that is already completed is left alone.
        """

    @abstractmethod
    async def reset(self) -> Status:
        """A port reset: back to no configuration, every pending transfer cancelled, receptions ended silently."""

    @abstractmethod
    async def set_configuration(self, value: int) -> Status:
        """Choose a configuration by bConfigurationValue; 0 for none. Cancels everything that is pending."""

    @abstractmethod
    async def set_interface(self, number: int, alternate: int) -> Status:
        """Choose an alternate setting by bInterfaceNumber and bAlternateSetting.

        Returns:
            ``INVALID`` if there is no such interface, ``STALL`` if it has no such setting.
        """

    def start_receiving(self, reception: Reception) -> Status:
        """Receive on an endpoint without being asked. ``INVALID`` if it already runs, ``STALL`` if it cannot."""
        return Status.STALL

    def stop_receiving(self, endpoint: int) -> Status:
        """Stop what :meth:`start_receiving` began; success also when nothing runs."""
        return Status.SUCCESS

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        """Allocate ``count`` bulk streams on each of the endpoints, all or none."""
        return Status.STALL

    async def free_streams(self, endpoints: Sequence[int]) -> Status:
        """Give the bulk streams of these endpoints back."""
        return Status.STALL

    async def close(self) -> None:
        """Give the device back: pending transfers are cancelled, what was written is on stable storage.

        Raises:
            DeviceError: what was written could not be made durable (``IO_ERROR``).
        """
