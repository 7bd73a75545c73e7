"""A real USB device of this machine, as a :class:`~farplug.usb.device.Device` for the engine.

Source: USB 2.0, chapter 9; usb-redirection-protocol.md, and usbredirhost.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Final

from farplug.errors import DeviceError, Reason, StateError
from farplug.libusb.binding import UsbDevice
from farplug.libusb.identity import read_configurations, read_identity
from farplug.libusb.library import Library
from farplug.machine.obstacles import REPLUG
from farplug.physical.device_session import DeviceSession
from farplug.physical.open_device import BusAddress, OpenDevice, unconfigured
from farplug.physical.receivers import IsoPlayer
from farplug.physical.transfers import MAX_PIECE
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.device import Device, DeviceListener, Identity, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Direction, Feature, Interface, StandardRequest, TransferType

OPEN_TIMEOUT = 10.0
"""Seconds in which a device must open."""
CLOSE_TIMEOUT = 10.0
"""Seconds that :meth:`PhysicalDevice.close` waits; the device is released even if that takes longer."""

_CLEAR_HALT: Final = (0x02, StandardRequest.CLEAR_FEATURE, Feature.ENDPOINT_HALT, 0)
"""bmRequestType, bRequest, wValue and wLength of the request that clears an endpoint's halt."""
_NOT_FOR_GUESTS: Final = frozenset(
    {
        (0x00, StandardRequest.SET_ADDRESS),
        (0x00, StandardRequest.SET_CONFIGURATION),
        (0x01, StandardRequest.SET_INTERFACE),
    }
)
"""bmRequestType and bRequest of requests that go to the device through this machine's kernel only."""


class PhysicalDevice(Device):
    """A real device. It can be opened, closed and opened again, as long as it stays plugged in.

    While the device is open, its kernel drivers are unbound. :meth:`close` restores its original state, and so does the
    exit of the process.

    Args:
        library: libusb.
        bus_address: of the device.
        identity: from the device descriptor.
        configurations: from the configuration descriptors.
    """

    def __init__(
        self,
        library: Library,
        bus_address: BusAddress,
        identity: Identity,
        configurations: Sequence[ConfigurationDescriptor],
    ) -> None:
        self.bus_address = bus_address
        self._library = library
        self._identity = identity
        self._configurations = {one.value: one for one in configurations}
        self._session: DeviceSession | None = None
        self._released: asyncio.Future[None] | None = None

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the errors in the device's configuration descriptors."""
        return tuple(warning for one in self._configurations.values() for warning in one.warnings)

    @property
    def configuration(self) -> int:
        return 0 if self._session is None else self._session.open_device.configuration

    @property
    def interfaces(self) -> Sequence[Interface]:
        return unconfigured(self._configurations) if self._session is None else self._session.open_device.interfaces

    @property
    def has_streams(self) -> bool:
        return any(configuration.has_streams for configuration in self._configurations.values())

    def __str__(self) -> str:
        return f"{self._identity} ({self.bus_address})"

    # Opening and closing

    async def open(self, listener: DeviceListener) -> None:
        """Open the device: unbind its kernel drivers, claim its interfaces, reset its port.

        Raises:
            DeviceError: as :class:`~farplug.physical.open_device.OpenDevice`; or it does not respond (``TIMED_OUT``).
            SetupError: libusb cannot work on this machine.
            StateError: the device is open.
        """
        if self._session is not None:
            raise StateError(f"{self} is already open")
        session = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                if self._released is not None:
                    await asyncio.shield(self._released)
                session = DeviceSession(self._library, listener, str(self.bus_address))
                await session.open(
                    lambda: OpenDevice(self._library, self.bus_address, self._identity, self._configurations)
                )
        except BaseException as error:
            if session is not None:
                self._released = session.close()
            if isinstance(error, TimeoutError):
                raise DeviceError(f"{self} does not respond", reason=Reason.TIMED_OUT, remedy=REPLUG) from error
            raise
        self._session = session

    async def close(self) -> None:
        """Release the device: cancel its transfers, restore its original configuration, bind its kernel drivers again.

        The device is released even if the caller is cancelled.

        Raises:
            DeviceError: the device does not respond; it is released when it does (``TIMED_OUT``).
        """
        session, self._session = self._session, None
        if session is None:
            return
        self._released = session.close()
        done, _ = await asyncio.wait([self._released], timeout=CLOSE_TIMEOUT)
        if not done:
            raise DeviceError(
                f"{self} does not respond: it is released when it does", reason=Reason.TIMED_OUT, remedy=REPLUG
            )

    async def reset(self) -> Status:
        """Reset the port. The device keeps its configuration, so that the guest's next SET_CONFIGURATION is quick."""
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        session.transfers.cancel_all()
        session.stop_receivers()
        status = await session.call(session.open_device.reset)
        if status is Status.STALL:  # the device was enumerated as another one
            session.lost()
            status = Status.IO_ERROR
        return status

    async def set_configuration(self, value: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        session.transfers.cancel_all()
        session.stop_receivers()
        if value and value not in self._configurations:
            return Status.STALL
        return await session.call(lambda: session.open_device.set_configuration(value))

    async def set_interface(self, number: int, alternate: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        current = [one for one in session.open_device.interfaces if one.number == number]
        if not current or not session.open_device.configuration:
            return Status.INVALID
        endpoints = {endpoint.address for endpoint in current[0].endpoints}
        session.transfers.cancel_all(endpoints)
        session.stop_receivers(endpoints)
        configuration = self._configurations.get(session.open_device.configuration)
        if configuration is None or alternate not in configuration.settings(number):
            return Status.STALL
        return await session.call(lambda: session.open_device.set_interface(number, alternate))

    # Transfers

    @property
    def _usable(self) -> DeviceSession | None:
        session = self._session
        return None if session is None or session.gone else session

    def submit(self, transfer: Transfer) -> None:
        session = self._usable
        if session is None:
            transfer.complete(Status.IO_ERROR)
        elif transfer.type is TransferType.CONTROL:
            self._control(session, transfer)
        else:
            endpoint = session.open_device.endpoints.get(transfer.endpoint)
            if endpoint is None or endpoint.type is not transfer.type or transfer.stream_id > endpoint.max_streams:
                transfer.complete(Status.INVALID)
            elif transfer.type is TransferType.ISOCHRONOUS:
                receiver = session.receivers.get(transfer.endpoint)
                if isinstance(receiver, IsoPlayer):
                    receiver.submit(transfer)
                else:
                    transfer.complete(Status.INVALID)
            else:
                session.transfers.submit(transfer)

    def _control(self, session: DeviceSession, transfer: Transfer) -> None:
        setup = transfer.setup
        if setup is None or transfer.endpoint & 0x0F or setup.direction != transfer.direction:
            transfer.complete(Status.INVALID)
        elif (setup.request_type, setup.request, setup.value, setup.length) == _CLEAR_HALT and (
            setup.index in session.open_device.endpoints
        ):
            session.start_clear_halt(transfer, setup.index)
        elif (setup.request_type, setup.request) in _NOT_FOR_GUESTS:
            transfer.complete(Status.STALL)
        else:
            session.transfers.submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        session = self._session
        if session is not None and not session.gone:
            session.complete_clear_halt(transfer, Status.CANCELLED)
            session.transfers.cancel(transfer)

    # Receptions and bulk streams

    def start_receiving(self, reception: Reception) -> Status:
        session = self._usable
        endpoint = None if session is None else session.open_device.endpoints.get(reception.endpoint)
        if session is None or endpoint is None or endpoint.type is not reception.type or not endpoint.max_packet_size:
            return Status.STALL
        if endpoint.type is not TransferType.ISOCHRONOUS and endpoint.direction is not Direction.IN:
            return Status.STALL
        if reception.bytes_per_transfer > MAX_PIECE or reception.stream_id:
            return Status.STALL  # farplug gives libusb no more at once, and receptions have no bulk streams
        if reception.endpoint in session.receivers:
            return Status.INVALID
        return session.start_receiver(reception, endpoint)

    def stop_receiving(self, endpoint: int) -> Status:
        if self._session is not None:
            self._session.stop_receivers([endpoint])
        return Status.SUCCESS

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        known = session.open_device.endpoints
        if not endpoints or not all(a in known and 0 < count <= known[a].max_streams for a in endpoints):
            return Status.INVALID
        return await session.call(lambda: session.open_device.allocate_streams(endpoints, count))

    async def free_streams(self, endpoints: Sequence[int]) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        if not endpoints or not all(address in session.open_device.endpoints for address in endpoints):
            return Status.INVALID
        return await session.call(lambda: session.open_device.free_streams(endpoints))


def physical_device(
    device: UsbDevice,
    *,
    library: Library | None = None,
    manufacturer: str = "",
    product: str = "",
    serial_number: str = "",
) -> PhysicalDevice:
    """Return the farplug device for a device that libusb listed (a ``usb1.USBDevice``).

    Args:
        device: libusb's device.
        library: libusb; None: load it.
        manufacturer: the device's string, which libusb cannot read without opening the device.
        product: likewise.
        serial_number: likewise.

    Raises:
        SetupError: there is no libusb.
    """
    identity = read_identity(device, manufacturer=manufacturer, product=product, serial_number=serial_number)
    return PhysicalDevice(library or Library(), BusAddress.of(device), identity, read_configurations(device))


def find_device(
    bus: int,
    address: int,
    *,
    library: Library | None = None,
    manufacturer: str = "",
    product: str = "",
    serial_number: str = "",
) -> PhysicalDevice:
    """Return the device with an address on a bus. May block for a moment.

    Args:
        bus: bus number.
        address: address on the bus.
        library: libusb; None: load it.
        manufacturer: the device's string, which libusb cannot read without opening the device.
        product: likewise.
        serial_number: likewise.

    Raises:
        DeviceError: there is no such device (``DEVICE_LOST``), or libusb does not list it because its descriptors are
            invalid (``DEVICE_FAULT``).
        SetupError: there is no libusb, or it cannot work on this machine.
    """
    library = library or Library()
    bus_address = BusAddress(bus, address)
    with library.devices() as devices:
        for device in devices:
            if BusAddress.of(device) == bus_address:
                return physical_device(
                    device,
                    library=library,
                    manufacturer=manufacturer,
                    product=product,
                    serial_number=serial_number,
                )
    if os.path.exists(bus_address.node):
        raise DeviceError(
            f"libusb cannot read the descriptors of the USB device {bus_address}",
            reason=Reason.DEVICE_FAULT,
            remedy=f"{REPLUG}; if that does not help, ask its manufacturer for newer firmware",
        )
    raise DeviceError(f"there is no USB device {bus_address}", reason=Reason.DEVICE_LOST)
