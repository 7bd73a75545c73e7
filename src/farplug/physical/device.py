"""A real USB device of this machine, as farplug's engine sees every device.

Source: USB 2.0, chapter 9; usb-redirection-protocol.md, and what usbredirhost makes of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from farplug.errors import DeviceError, LocalProtocolError, Reason
from farplug.physical.binding import UsbDevice, UsbTransfer
from farplug.physical.claim import Claim, Place, unconfigured
from farplug.physical.describe import read_configurations, read_identity
from farplug.physical.events import Events
from farplug.physical.library import Library, NoDevice, NotFound, UsbError
from farplug.physical.receptions import IsoOutStream, Stream, stream_kind
from farplug.physical.transfers import CONTROL_TIMEOUT, Owner, Transfers
from farplug.physical.worker import Worker
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.device import Device, DeviceListener, Identity, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Endpoint, Feature, Interface, Request, TransferType

OPEN_PATIENCE = 10.0
"""Seconds that taking a device may last."""
CLOSE_PATIENCE = 10.0
"""Seconds that giving it back may last; after that it goes on without anybody waiting."""

NODES = Path("/dev/bus/usb")
"""Where Linux has the devices, by bus and address."""

log = logging.getLogger(__name__)


class _Session:
    """A device that is open: what lives from :meth:`PhysicalDevice.open` to :meth:`PhysicalDevice.close`."""

    def __init__(self, library: Library, listener: DeviceListener, name: str) -> None:
        self.streams: dict[int, Stream] = {}
        self.gone = False
        """Closed, or unplugged: nothing is asked of it any more."""
        self._library = library
        self._listener = listener
        self._claim: Claim | None = None
        self._events: Events | None = None
        self._transfers: Transfers | None = None
        self._stray: list[UsbTransfer] = []
        """What may be in flight, and belongs to nobody any more."""
        self._clearing: dict[Transfer, asyncio.Task[None]] = {}
        """Requests to clear a halt, under way in the thread."""
        self._name = name
        self.worker = Worker(f"usb {name}", self._give_back)

    async def begin(self, take: Callable[[], Claim]) -> None:
        """Take the device. Raises what :class:`Claim` raises."""

        def in_thread() -> None:
            self._claim = take()

        await self.worker.call(in_thread)
        self._events = Events(self.claim.context, _deliver, self.lost)
        self._transfers = Transfers(self.claim.handle, self._events.completed, self._library.streams.assign, self.lost)

    def end(self) -> asyncio.Future[None]:
        """Complete everything as cancelled, and give the device back: done when that is done."""
        self._part(Status.CANCELLED)
        return self.worker.stop()

    def lost(self) -> None:
        """The device was unplugged."""

        def tell() -> None:
            if not self.gone:
                self._part(Status.IO_ERROR)
                self._listener.lost(None)

        asyncio.get_running_loop().call_soon(tell)

    def _part(self, status: Status) -> None:
        """Nothing more comes from the device."""
        if self.gone:
            return
        self.gone = True
        if self._events is not None:
            self._events.stop()
        self.stop_streams()
        for transfer in list(self._clearing):
            self.cleared(transfer, status)
        if self._transfers is not None:
            self._stray += self._transfers.abandon(status)

    def _give_back(self) -> None:
        """The worker's last call; at the exit of the process maybe without :meth:`end` before."""
        if self._events is not None:
            self._events.stop()
            self._events.join()
        if self._claim is not None:
            in_flight = [usb for stream in self.streams.values() for usb in stream.in_flight]
            if self._transfers is not None:
                in_flight += self._transfers.in_flight
            self._claim.give_back([usb for usb in in_flight + self._stray if usb.isSubmitted()])

    # StreamHost

    def completed(self, usb: UsbTransfer) -> None:
        assert self._events is not None
        self._events.completed(usb)

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        self._listener.received(endpoint, status, data)

    def reception_ended(self, endpoint: int, status: Status) -> None:
        if status is Status.STALL:
            self.stop_streams([endpoint])
        self._listener.reception_ended(endpoint, status)

    async def clear_halt(self, endpoint: int) -> None:
        await self.worker.call(lambda: self.claim.clear_halt(endpoint))

    # Its parts

    @property
    def claim(self) -> Claim:
        assert self._claim is not None
        return self._claim

    @property
    def transfers(self) -> Transfers:
        assert self._transfers is not None
        return self._transfers

    async def call(self, function: Callable[[], None]) -> Status:
        """Have something done that may block; what libusb refuses becomes a status."""
        try:
            await self.worker.call(function)
        except NoDevice:
            self.lost()
        except NotFound:
            return Status.STALL  # no such configuration, setting or endpoint
        except UsbError as error:
            log.info("%s: %s", self._name, error)
        else:
            return Status.SUCCESS
        return Status.IO_ERROR

    def clear_feature_halt(self, transfer: Transfer, endpoint: int) -> None:
        """CLEAR_FEATURE(ENDPOINT_HALT): through libusb, so that this machine forgets its data toggle as well."""

        async def clear() -> None:
            try:
                async with asyncio.timeout(CONTROL_TIMEOUT):
                    status = await self.call(lambda: self.claim.clear_halt(endpoint))
            except TimeoutError:
                status = Status.TIMEOUT
            self.cleared(transfer, status)

        self._clearing[transfer] = asyncio.get_running_loop().create_task(clear())

    def cleared(self, transfer: Transfer, status: Status) -> None:
        """Complete a request to clear a halt; does nothing if ``transfer`` is none that is under way."""
        if self._clearing.pop(transfer, None) is not None:
            transfer.complete(status)

    def start_stream(self, reception: Reception, endpoint: Endpoint) -> Status:
        """Begin to receive, or to play."""
        try:
            stream = stream_kind(endpoint)(reception, endpoint, self.claim.handle, self)
            self.streams[endpoint.address] = stream
            stream.start()
        except UsbError as error:
            log.warning("endpoint %02x: receiving cannot begin: %s", endpoint.address, error)
            self.stop_streams([endpoint.address])
            return Status.STALL
        return Status.SUCCESS

    def stop_streams(self, endpoints: Collection[int] | None = None) -> None:
        """End receptions (of ``endpoints``), silently."""
        self._stray = [usb for usb in self._stray if usb.isSubmitted()]
        for address in list(self.streams):
            if endpoints is None or address in endpoints:
                stream = self.streams.pop(address)
                stream.stop()
                self._stray += stream.in_flight


def _deliver(usb: UsbTransfer) -> None:
    owner: Owner = usb.getUserData()
    owner.came_back(usb)


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
        self._session: _Session | None = None
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
                session = _Session(self._library, listener, str(self.place))
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
        if value and value not in self._configurations:
            return Status.STALL
        session.transfers.cancel_all()
        session.stop_streams()
        return await session.call(lambda: session.claim.set_configuration(value))

    async def set_interface(self, number: int, alternate: int) -> Status:
        session = self._usable
        if session is None:
            return Status.IO_ERROR
        current = [one for one in session.claim.interfaces if one.number == number]
        if not current or not session.claim.configuration:
            return Status.INVALID
        if alternate not in self._configurations[session.claim.configuration].settings(number):
            return Status.STALL
        endpoints = {endpoint.address for endpoint in current[0].endpoints}
        session.transfers.cancel_all(endpoints)
        session.stop_streams(endpoints)
        return await session.call(lambda: session.claim.set_interface(number, alternate))

    # Transfers

    @property
    def _usable(self) -> _Session | None:
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

    def _control(self, session: _Session, transfer: Transfer) -> None:
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
    if (NODES / f"{bus:03d}" / f"{address:03d}").exists():
        raise DeviceError(
            f"libusb cannot read the descriptors of the USB device {place}",
            reason=Reason.DEVICE_FAULT,
            remedy="unplug it and plug it in again; if that does not help, ask its maker for newer firmware",
        )
    raise DeviceError(f"there is no USB device {place}", reason=Reason.DEVICE_LOST)
