"""The parts of an open device: its handle, transfers and receivers, its thread for blocking calls, and its gate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from farplug.errors import DeviceError
from farplug.libusb.binding import UsbTransfer
from farplug.libusb.library import Library, NoDevice, NotFound, UsbError
from farplug.physical.device_thread import DeviceThread
from farplug.physical.event_handler import EventHandler
from farplug.physical.gate import Gate
from farplug.physical.open_device import OpenDevice
from farplug.physical.receivers import Receiver, receiver_type
from farplug.physical.transfers import CONTROL_TIMEOUT, Owner, Transfers
from farplug.rate_limit import limited_logger
from farplug.usb.device import DeviceListener, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Endpoint

log = limited_logger(__name__)


class DeviceSession:
    """Everything that exists from :meth:`PhysicalDevice.open` to :meth:`PhysicalDevice.close`.

    Args:
        library: libusb.
        listener: of the device.
        name: of the device, for logs.
    """

    def __init__(self, library: Library, listener: DeviceListener, name: str) -> None:
        self.receivers: dict[int, Receiver] = {}
        self.gone = False
        """The device was closed or unplugged: it must not be used any more."""
        self._library = library
        self._listener = listener
        self._open_device: OpenDevice | None = None
        self._event_handler: EventHandler | None = None
        self._gate: Gate | None = None
        self._transfers: Transfers | None = None
        self._orphaned: list[UsbTransfer] = []
        """Transfers that may be in flight, of receivers and requests that have ended."""
        self._clear_halts: dict[Transfer, asyncio.Task[None]] = {}
        """Requests to clear a halt that the thread has not finished."""
        self._name = name
        self._thread = DeviceThread(f"usb {name}", self._release)

    async def open(self, make: Callable[[], OpenDevice]) -> None:
        """Open the device with ``make``. Raises as :class:`OpenDevice` does."""

        def in_thread() -> None:
            self._open_device = make()

        await self._thread.call(in_thread)
        self._event_handler = EventHandler(self.open_device.context, _deliver, self.lost)
        self._gate = Gate(self._thread, self._event_handler)
        self._transfers = Transfers(
            self.open_device.handle,
            self._gate,
            self._event_handler.completed,
            self._library.bulk_streams.assign,
            self._library.set_buffer,
            self.lost,
        )

    def close(self) -> asyncio.Future[None]:
        """Complete all transfers as cancelled, and release the device. The future is done when it is released."""
        self._shut_down(Status.CANCELLED)
        return self._thread.stop()

    def lost(self) -> None:
        """Shut down, and report the loss: the device was unplugged."""

        def report() -> None:
            if not self.gone:
                self._shut_down(Status.IO_ERROR)
                self._listener.lost(None)

        asyncio.get_running_loop().call_soon(report)

    def _shut_down(self, status: Status) -> None:
        """End everything on the event loop; pending transfers are completed with ``status``."""
        if self.gone:
            return
        self.gone = True
        if self._event_handler is not None:
            self._event_handler.stop()
        if self._gate is not None:
            self._gate.end()
        self.stop_receivers()
        for transfer in list(self._clear_halts):
            self.complete_clear_halt(transfer, status)
        if self._transfers is not None:
            self._orphaned += self._transfers.abandon(status)

    def _release(self) -> None:
        """Release the device: the thread's last call. At the exit of the process :meth:`close` may not have run."""
        if self._event_handler is not None:
            self._event_handler.stop()
            self._event_handler.join()
        if self._open_device is not None:
            in_flight = [usb for receiver in self.receivers.values() for usb in receiver.in_flight]
            if self._transfers is not None:
                in_flight += self._transfers.in_flight
            self._open_device.release([usb for usb in in_flight + self._orphaned if usb.isSubmitted()])

    # ReceiverHost

    def completed(self, usb: UsbTransfer) -> None:
        assert self._event_handler is not None
        self._event_handler.completed(usb)

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        self._listener.received(endpoint, status, data)

    def reception_ended(self, endpoint: int, status: Status) -> None:
        if status is Status.STALL:
            self.stop_receivers([endpoint])
        self._listener.reception_ended(endpoint, status)

    @property
    def gate(self) -> Gate:
        assert self._gate is not None
        return self._gate

    async def clear_halt(self, endpoint: int) -> None:
        await self.gate.call(lambda: self.open_device.clear_halt(endpoint))

    # Its parts

    @property
    def open_device(self) -> OpenDevice:
        assert self._open_device is not None
        return self._open_device

    @property
    def transfers(self) -> Transfers:
        assert self._transfers is not None
        return self._transfers

    async def call(self, function: Callable[[], None]) -> Status:
        """Make a blocking call in the thread, and return its result as a status."""
        try:
            await self.gate.call(function)
        except NoDevice:
            self.lost()
        except NotFound:
            return Status.STALL  # no such configuration, alternate setting or endpoint
        except (UsbError, DeviceError) as error:
            log.info("%s: %s", self._name, error)
        else:
            return Status.SUCCESS
        return Status.IO_ERROR

    def start_clear_halt(self, transfer: Transfer, endpoint: int) -> None:
        """Start CLEAR_FEATURE(ENDPOINT_HALT) through libusb, so that this machine resets its data toggle as well."""

        async def clear() -> None:
            try:
                async with asyncio.timeout(CONTROL_TIMEOUT):
                    status = await self.call(lambda: self.open_device.clear_halt(endpoint))
            except TimeoutError:
                status = Status.TIMEOUT
            self.complete_clear_halt(transfer, status)

        self._clear_halts[transfer] = asyncio.get_running_loop().create_task(clear())

    def complete_clear_halt(self, transfer: Transfer, status: Status) -> None:
        """Complete a request to clear a halt; does nothing if ``transfer`` is not such a request, or is complete."""
        if self._clear_halts.pop(transfer, None) is not None:
            transfer.complete(status)

    def start_receiver(self, reception: Reception, endpoint: Endpoint) -> Status:
        """Start a receiver."""
        try:
            receiver = receiver_type(endpoint)(reception, endpoint, self.open_device.handle, self)
            self.receivers[endpoint.address] = receiver
            if self.gate.shut:
                self.gate.run_or_defer(receiver, receiver.start_deferred)
            else:
                receiver.start()
        except UsbError as error:
            log.warning("endpoint %02x: cannot start receiving: %s", endpoint.address, error)
            self.stop_receivers([endpoint.address])
            return Status.STALL
        return Status.SUCCESS

    def stop_receivers(self, endpoints: Collection[int] | None = None) -> None:
        """Stop receivers (of ``endpoints``) without a report to the listener."""
        self._orphaned = [usb for usb in self._orphaned if usb.isSubmitted()]
        for address in list(self.receivers):
            if endpoints is None or address in endpoints:
                receiver = self.receivers.pop(address)
                receiver.stop()
                self._orphaned += receiver.in_flight


def _deliver(usb: UsbTransfer) -> None:
    owner: Owner = usb.getUserData()
    owner.handle_completion(usb)
