"""A real USB device of this machine, as farplug's engine sees every device.

Source: USB 2.0, chapter 9; usb-redirection-protocol.md, and what usbredirhost makes of it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Final

from farplug.errors import DeviceError, LocalProtocolError, Reason
from farplug.libusb.binding import UsbDevice
from farplug.libusb.identity import read_configurations, read_identity
from farplug.libusb.library import Library
from farplug.physical.device_session import Session
from farplug.physical.open_device import Claim, Place, unconfigured
from farplug.physical.receivers import IsoOutStream
from farplug.physical.transfers import MAX_PIECE
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.device import Device, DeviceListener, Identity, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Direction, Feature, Interface, Request, TransferType

OPEN_PATIENCE = 10.0
"""Seconds that taking a device may last."""
CLOSE_PATIENCE = 10.0
"""Seconds that giving it back may last; after that it goes on without anybody waiting."""

_CLEAR_HALT: Final = (0x02, Request.CLEAR_FEATURE, Feature.ENDPOINT_HALT, 0)
"""bmRequestType, bRequest, wValue and wLength of the request that clears an endpoint's halt."""
_NOT_FOR_GUESTS: Final = frozenset(
    {(0x00, Request.SET_ADDRESS), (0x00, Request.SET_CONFIGURATION), (0x01, Request.SET_INTERFACE)}
)
"""bmRequestType and bRequest of what is said to this machine's kernel, never to the device behind its back."""


class PhysicalDevice(Device):
    """A real device. It can be opened, closed and opened again, as long as it stays plugged in.

    While it is open, it is taken from this machine: its drivers are unbound. :meth:`close` gives it back as it was
    found, and so does the exit of the process.

    Args:
        library: libusb.
        place: where it is plugged in.
        identity: what it says it is.
        configurations: what it can be.
    """

    def __init__(
        self,
        library: Library,
        place: Place,
        identity: Identity,
        configurations: Sequence[ConfigurationDescriptor],
    ) -> None:
        self.place = place
        self._library = library
        self._identity = identity
        self._configurations = {one.value: one for one in configurations}
        self._session: Session | None = None
        self._given_back: asyncio.Future[None] | None = None

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its descriptors say that makes no sense."""
        return tuple(warning for one in self._configurations.values() for warning in one.warnings)

    @property
    def configuration(self) -> int:
        return 0 if self._session is None else self._session.claim.configuration

    @property
    def interfaces(self) -> Sequence[Interface]:
        return unconfigured(self._configurations) if self._session is None else self._session.claim.interfaces

    @property
    def has_streams(self) -> bool:
        return any(configuration.has_streams for configuration in self._configurations.values())

    def __str__(self) -> str:
        return f"{self._identity} ({self.place})"

    # Its life

    async def open(self, listener: DeviceListener) -> None:
        """Take the device: unbind its drivers, claim its interfaces, reset it.

        Raises:
            DeviceError: it is gone, in use, not permitted, or does not answer.
            SetupError: libusb cannot work on this machine.
        """
        if self._session is not None:
            raise LocalProtocolError(f"{self} is plugged already")
        session = None
        try:
            async with asyncio.timeout(OPEN_PATIENCE):
                if self._given_back is not None:
                    await asyncio.shield(self._given_back)
                session = Session(self._library, listener, str(self.place))
                await session.begin(lambda: Claim(self._library, self.place, self._identity, self._configurations))
        except BaseException as error:
            if session is not None:
                self._given_back = session.end()
            if isinstance(error, TimeoutError):
                raise DeviceError(
                    f"{self} does not answer",
                    reason=Reason.TIMED_OUT,
                    remedy="unplug it and plug it in again",
                ) from error
            raise
        self._session = session

    async def close(self) -> None:
        """Give the device back: cancel everything, release it, choose its first configuration, bind its drivers again.

        Goes on to the end even if the caller does not wait for it.

        Raises:
            DeviceError: it does not answer: it is given back when it does (``TIMED_OUT``).
        """
        session, self._session = self._session, None
        if session is None:
            return
        self._given_back = session.end()
        done, _ = await asyncio.wait([self._given_back], timeout=CLOSE_PATIENCE)
        if not done:
            raise DeviceError(
                f"{self} does not answer: it is given back to this machine when it does",
                reason=Reason.TIMED_OUT,
                remedy="unplug it and plug it in again",
            )

    async def reset(self) -> Status:
        """Reset the port. The device keeps its configuration and settings: the guest's next choice is quick."""
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        session.transfers.cancel_all()
        session.stop_streams()
        status = await session.call(session.claim.reset)
        if status is Status.STALL:  # it came back as another device
            session.lost()
            status = Status.IO_ERROR
        return status

    async def set_configuration(self, value: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        session.transfers.cancel_all()
        session.stop_streams()
        if value and value not in self._configurations:
            return Status.STALL
        return await session.call(lambda: session.claim.set_configuration(value))

    async def set_interface(self, number: int, alternate: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        current = [one for one in session.claim.interfaces if one.number == number]
        if not current or not session.claim.configuration:
            return Status.INVALID
        endpoints = {endpoint.address for endpoint in current[0].endpoints}
        session.transfers.cancel_all(endpoints)
        session.stop_streams(endpoints)
        configuration = self._configurations.get(session.claim.configuration)
        if configuration is None or alternate not in configuration.settings(number):
            return Status.STALL
        return await session.call(lambda: session.claim.set_interface(number, alternate))

    # Transfers

    @property
    def _usable(self) -> Session | None:
        session = self._session
        return None if session is None or session.gone else session

    def submit(self, transfer: Transfer) -> None:
        session = self._usable
        if session is None:
            transfer.complete(Status.IO_ERROR)
        elif transfer.type is TransferType.CONTROL:
            self._control(session, transfer)
        else:
            endpoint = session.claim.endpoints.get(transfer.endpoint)
            if endpoint is None or endpoint.type is not transfer.type or transfer.stream_id > endpoint.max_streams:
                transfer.complete(Status.INVALID)
            elif transfer.type is TransferType.ISOCHRONOUS:
                stream = session.streams.get(transfer.endpoint)
                if isinstance(stream, IsoOutStream):
                    stream.submit(transfer)
                else:
                    transfer.complete(Status.INVALID)
            else:
                session.transfers.submit(transfer)

    def _control(self, session: Session, transfer: Transfer) -> None:
        setup = transfer.setup
        if setup is None or transfer.endpoint & 0x0F or setup.direction != transfer.direction:
            transfer.complete(Status.INVALID)
        elif (setup.request_type, setup.request, setup.value, setup.length) == _CLEAR_HALT and (
            setup.index in session.claim.endpoints
        ):
            session.clear_feature_halt(transfer, setup.index)
        elif (setup.request_type, setup.request) in _NOT_FOR_GUESTS:
            transfer.complete(Status.STALL)
        else:
            session.transfers.submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        session = self._session
        if session is not None and not session.gone:
            session.cleared(transfer, Status.CANCELLED)
            session.transfers.cancel(transfer)

    # Receptions and streams

    def start_receiving(self, reception: Reception) -> Status:
        session = self._usable
        endpoint = None if session is None else session.claim.endpoints.get(reception.endpoint)
        if session is None or endpoint is None or endpoint.type is not reception.type or not endpoint.max_packet_size:
            return Status.STALL
        if endpoint.type is not TransferType.ISOCHRONOUS and endpoint.direction is not Direction.IN:
            return Status.STALL
        if reception.bytes_per_transfer > MAX_PIECE or reception.stream_id:
            return Status.STALL  # libusb takes no more at once; and nobody receives by itself on a stream
        if reception.endpoint in session.streams:
            return Status.INVALID
        return session.start_stream(reception, endpoint)

    def stop_receiving(self, endpoint: int) -> Status:
        if self._session is not None:
            self._session.stop_streams([endpoint])
        return Status.SUCCESS

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        known = session.claim.endpoints
        if not endpoints or not all(a in known and 0 < count <= known[a].max_streams for a in endpoints):
            return Status.INVALID
        return await session.call(lambda: session.claim.allocate_streams(endpoints, count))

    async def free_streams(self, endpoints: Sequence[int]) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        if not endpoints or not all(address in session.claim.endpoints for address in endpoints):
            return Status.INVALID
        return await session.call(lambda: session.claim.free_streams(endpoints))


def physical_device(
    device: UsbDevice,
    *,
    library: Library | None = None,
    manufacturer: str = "",
    product: str = "",
    serial_number: str = "",
) -> PhysicalDevice:
    """Make the device that farplug plugs out of one that libusb listed (a ``usb1.USBDevice``).

    Its names are not in what libusb knows of a device that is not open: they may be given.

    Raises:
        SetupError: there is no libusb.
    """
    identity = read_identity(device, manufacturer=manufacturer, product=product, serial_number=serial_number)
    return PhysicalDevice(library or Library(), Place.of(device), identity, read_configurations(device))


def find_device(
    bus: int,
    address: int,
    *,
    library: Library | None = None,
    manufacturer: str = "",
    product: str = "",
    serial_number: str = "",
) -> PhysicalDevice:
    """The device with an address on a bus. Looks for it: may block for a moment.

    Raises:
        DeviceError: there is none (``DEVICE_LOST``), or libusb leaves it out because it cannot be understood
            (``DEVICE_FAULT``).
        SetupError: there is no libusb, or it cannot work on this machine.
    """
    library = library or Library()
    place = Place(bus, address)
    with library.devices() as devices:
        for device in devices:
            if Place.of(device) == place:
                return physical_device(
                    device,
                    library=library,
                    manufacturer=manufacturer,
                    product=product,
                    serial_number=serial_number,
                )
    if os.path.exists(place.node):
        raise DeviceError(
            f"libusb cannot read the descriptors of the USB device {place}",
            reason=Reason.DEVICE_FAULT,
            remedy="unplug it and plug it in again; if that does not help, ask its maker for newer firmware",
        )
    raise DeviceError(f"there is no USB device {place}", reason=Reason.DEVICE_LOST)
