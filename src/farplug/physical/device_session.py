"""A device that is open: its claim, transfers and streams, its thread for what may block, and the gate to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from farplug.errors import DeviceError
from farplug.libusb.binding import UsbTransfer
from farplug.libusb.library import Library, NoDevice, NotFound, UsbError
from farplug.physical.device_thread import Worker
from farplug.physical.event_handler import Events
from farplug.physical.gate import Gate
from farplug.physical.open_device import Claim
from farplug.physical.receivers import Stream, stream_kind
from farplug.physical.transfers import CONTROL_TIMEOUT, Owner, Transfers
from farplug.usb.device import DeviceListener, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Endpoint

log = logging.getLogger(__name__)


class Session:
    """A device that is open: what lives from :meth:`PhysicalDevice.open` to :meth:`PhysicalDevice.close`."""

    def __init__(self, library: Library, listener: DeviceListener, name: str) -> None:
        self.streams: dict[int, Stream] = {}
        self.gone = False
        """Closed, or unplugged: nothing is asked of it any more."""
        self._library = library
        self._listener = listener
        self._claim: Claim | None = None
        self._events: Events | None = None
        self._gate: Gate | None = None
        self._transfers: Transfers | None = None
        self._stray: list[UsbTransfer] = []
        """What may be in flight, and belongs to nobody any more."""
        self._clearing: dict[Transfer, asyncio.Task[None]] = {}
        """Requests to clear a halt, under way in the thread."""
        self._name = name
        self._worker = Worker(f"usb {name}", self._give_back)

    async def begin(self, take: Callable[[], Claim]) -> None:
        """Take the device. Raises what :class:`Claim` raises."""

        def in_thread() -> None:
            self._claim = take()

        await self._worker.call(in_thread)
        self._events = Events(self.claim.context, _deliver, self.lost)
        self._gate = Gate(self._worker, self._events)
        self._transfers = Transfers(
            self.claim.handle, self._gate, self._events.completed, self._library.streams.assign, self.lost
        )

    def end(self) -> asyncio.Future[None]:
        """Complete everything as cancelled, and give the device back: done when that is done."""
        self._part(Status.CANCELLED)
        return self._worker.stop()

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
        if self._gate is not None:
            self._gate.end()
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

    @property
    def gate(self) -> Gate:
        assert self._gate is not None
        return self._gate

    async def clear_halt(self, endpoint: int) -> None:
        await self.gate.call(lambda: self.claim.clear_halt(endpoint))

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
            await self.gate.call(function)
        except NoDevice:
            self.lost()
        except NotFound:
            return Status.STALL  # no such configuration, setting or endpoint
        except (UsbError, DeviceError) as error:
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
            if self.gate.shut:
                self.gate.when_open(stream, stream.begin)
            else:
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
