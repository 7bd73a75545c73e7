"""The engine: open a port, attach a device to it, detach the device, close the port.

The engine handles packets and a :class:`~farplug.usb.device.Device` of any kind. It guarantees, whatever the device and
the guest do (QEMU aborts its VM otherwise): every id has exactly one answer, answers keep their order on each endpoint
(:mod:`~farplug.redirection.pending_requests`), nothing is sent that the guest's parser would reject
(:mod:`farplug.usbredir`), and memory is bounded (:mod:`~farplug.redirection.port_protocol`).

Source: usb-redirection-protocol.md (protocol 0.7), and its implementations in usbredirhost and QEMU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from enum import Enum, auto

from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    Reason,
    RefusedError,
    RemoteProtocolError,
    StateError,
)
from farplug.rate_limit import Clock, limited_logger
from farplug.redirection import events
from farplug.redirection.acceptance import check_filter, rejected
from farplug.redirection.current_device import CurrentDevice
from farplug.redirection.describe import device_connect
from farplug.redirection.events import OfferProblem, PortEvent
from farplug.redirection.figures import EndpointCounters
from farplug.redirection.offers import OfferChoice, OfferWatch
from farplug.redirection.operations import Operations
from farplug.redirection.pending_requests import MAX_TRANSFER, PendingRequests
from farplug.redirection.port_protocol import PacketObserver, PortProtocol
from farplug.redirection.receptions import Receptions
from farplug.redirection.transfers import Transfers
from farplug.transport.port import Port
from farplug.usb.device import Device, DeviceEvent, Offer
from farplug.usb.figures import EndpointFigures
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, Endpoint, TransferType
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.filter import Filter
from farplug.usbredir.protocol import Oversized, Violation

HELLO_TIMEOUT = 1.5
"""Seconds after which a guest that has not sent its hello is reported (:class:`~events.WaitingForGuest`)."""
UNUSED_AFTER = 10.0
"""Seconds after which an attached device that the guest has not used is reported (:class:`~events.Unused`)."""
ACK_TIMEOUT = 5.0
"""Seconds that a detach waits for the guest's answer to a disconnect; a paused VM does not send it.

The next device on the port waits for that answer: the guest's late packets would be taken for requests to it.
"""

SPICE_MAGIC = int.from_bytes(b"REDQ", "little")
"""The first bytes of a SPICE server's answer, read as the type of a packet."""

log = limited_logger(__name__)


class State(Enum):
    """The state of a redirection."""

    CLOSED = auto()
    """The port is not open."""
    WAITING = auto()
    """The port is open; the guest has not sent its hello."""
    EMPTY = auto()
    """The guest is ready; no device is attached."""
    ATTACHED = auto()
    """A device was offered, or is used."""
    DISCONNECTING = auto()
    """A device was disconnected; the guest has not acknowledged that yet."""

    def __str__(self) -> str:
        return self.name.lower()


class Redirection:
    """Connects one device at a time to one port.

    Args:
        port: a closed port; :meth:`open` opens it.
        on_event: called with each event, on the event loop. It must not block. Events that the guest or the device can
            cause without an end are limited (:class:`~farplug.redirection.events.EventLimit`).
        max_transfer: bytes that one transfer may carry or request.
        caps: the capabilities that we announce.
        clock: of the limit for events; None: the running event loop.
    """

    def __init__(
        self,
        port: Port,
        on_event: Callable[[PortEvent], None] = lambda event: None,
        *,
        max_transfer: int = MAX_TRANSFER,
        caps: Cap = ALL_CAPS,
        clock: Clock | None = None,
    ) -> None:
        self.port = port
        self.state = State.CLOSED
        self._events = events.EventLimit(on_event, clock)
        self._emit = self._events.emit
        self._device: Device | None = None
        self._offered = False
        self._loss: DeviceError | None = None
        self._guest_filter: Filter | None = None
        self._port_error: FarplugError | None = None
        self._greeting: events.GuestReady | None = None
        self._hello: asyncio.Future[None] | None = None
        self._acknowledged: asyncio.Future[None] | None = None
        self._detaching: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[FarplugError | None] | None = None
        self._unused: asyncio.TimerHandle | None = None
        self._figures = figures = EndpointCounters()
        self._current = current = CurrentDevice()
        self._protocol = protocol = PortProtocol(port, self._port_closed, self._fault, caps, max_transfer)
        self._requests = requests = PendingRequests(protocol, current, figures, max_transfer)
        self._receptions = receptions = Receptions(protocol, current, figures, max_transfer)
        self._operations = operations = Operations(protocol, current, requests, receptions, self._described)
        self._choice = OfferChoice(port.name, self._emit, self._offer_again, self._cannot_offer)
        self._watch = OfferWatch(self._offer_failed)
        transfers = Transfers(current, requests, self._watch)
        protocol.handlers = {
            packets.BulkPacket: transfers.bulk,
            packets.ControlPacket: transfers.control,
            packets.InterruptPacket: transfers.interrupt_out,
            Oversized: transfers.oversized,
            packets.CancelDataPacket: lambda packet: requests.cancel(packet.id),
            packets.IsoPacket: receptions.iso_out,
            packets.StartIsoStream: self._start_receiving,
            packets.StopIsoStream: receptions.stop,
            packets.StartInterruptReceiving: self._start_receiving,
            packets.StopInterruptReceiving: receptions.stop,
            packets.StartBulkReceiving: self._start_receiving,
            packets.StopBulkReceiving: receptions.stop,
            packets.Reset: self._reset,
            packets.SetConfiguration: self._set_configuration,
            packets.GetConfiguration: operations.get_configuration,
            packets.SetAltSetting: self._set_alt_setting,
            packets.GetAltSetting: operations.get_alt_setting,
            packets.AllocBulkStreams: operations.alloc_bulk_streams,
            packets.FreeBulkStreams: operations.free_bulk_streams,
            packets.Hello: self._on_hello,
            packets.FilterFilter: self._on_filter,
            packets.FilterReject: self._on_filter_reject,
            packets.DeviceDisconnectAck: self._on_disconnect_ack,
            Violation: self._violation,
        }

    @property
    def device(self) -> Device | None:
        """The device that is attached, or being attached or detached."""
        return self._device

    @property
    def memory(self) -> int:
        """Return the bytes that the guest occupies: transfers, what the device holds, and answers not sent yet."""
        return self._protocol.share.memory.used

    @property
    def observer(self) -> PacketObserver | None:
        """Return what sees the packets of the port; None if nothing does."""
        return self._protocol.observer

    @observer.setter
    def observer(self, observer: PacketObserver | None) -> None:
        self._protocol.observer = observer

    @property
    def figures(self) -> tuple[EndpointFigures, ...]:
        """Return the counters since the device was attached, one entry for each endpoint that was used."""
        return self._figures.snapshot()

    async def open(self) -> None:
        """Open the port, and send our hello.

        Raises:
            TargetError: the port cannot be reached.
            PortError: another client uses the port.
            StateError: the port is already open.
        """
        if self.state is not State.CLOSED:
            raise StateError(f"port {self.port.name} is already open")
        loop = asyncio.get_running_loop()
        self._guest_filter = self._port_error = self._greeting = self._acknowledged = None
        self._hello = loop.create_future()
        self._closed = loop.create_future()
        self.state = State.WAITING
        try:
            await self._protocol.open()
        except BaseException:
            self.state = State.CLOSED
            self._hello = self._closed = None
            raise

    @property
    def ready(self) -> events.GuestReady | None:
        """Return what the guest announced in its hello; None if the port is closed or the hello has not arrived."""
        return self._greeting

    async def attach(self, device: Device) -> None:
        """Wait, without a timeout, for the guest's hello and its answer to the last disconnect; offer ``device`` to it.

        Returns once the device was offered. Whether the guest refuses or configures the device is reported by an event.

        Raises:
            GuestGoneError: the port was closed before the guest was ready.
            RefusedError: the guest's filter does not allow the device, or the guest lacks a capability: the device was
                not offered.
            DeviceError: the device cannot be opened.
            StateError: another device is attached, or the port was not opened.
        """
        if self._closed is None:
            raise StateError(f"port {self.port.name} was not opened")
        self._check_open()
        if self._device is not None:
            raise StateError(f"port {self.port.name} already has a device")
        self._device = device  # reserves the port while we wait
        self._events.restart()
        self._loss = None
        opened = False
        try:
            await self._wait_for_guest()
            check_filter(self._guest_filter, device)
            self._choice.select_first(device, streams=self._protocol.guest_has(Cap.BULK_STREAMS))
            device.share = self._protocol.share
            await device.open(self)
            opened = True
            self._check_open()
            if self._loss is not None:
                raise self._loss
            check_filter(self._guest_filter, device)  # the guest may have sent its filter only now
            self._figures.clear()
            if self.port.offers_again:
                self._unused = asyncio.get_running_loop().call_later(UNUSED_AFTER, self._report_unused)
            self._offer(device)
        except BaseException:
            self._cancel_unused()
            self._device = None
            if opened:
                await device.close()
            raise

    async def detach(self) -> None:
        """Detach the device: cancel its transfers, disconnect it, wait for the guest's answer, close the device.

        Does nothing if no device is attached.

        Raises:
            DeviceError: the device could not be closed: written data may not be on stable storage.
        """
        if self._offered:
            await asyncio.shield(self._start_detach(None))

    async def close(self) -> None:
        """Detach, then close the port."""
        try:
            await self.detach()
        finally:
            await self.port.close()
            await self.closed()

    async def closed(self) -> FarplugError | None:
        """Wait until the port and its device are closed. Return the reason; None if the caller closed the port."""
        if self._closed is None:
            return None
        error = await asyncio.shield(self._closed)
        if self._detaching is not None:
            await asyncio.wait([self._detaching])
        return error

    # Attach and detach --------------------------------------------------------------------------------------------

    async def _wait_for_guest(self) -> None:
        """Wait for the guest's hello, and for its answer to the disconnect of the device before."""
        assert self._hello is not None
        timer = asyncio.get_running_loop().call_later(
            HELLO_TIMEOUT, lambda: self._emit(events.WaitingForGuest(self.port.name))
        )
        try:
            await asyncio.shield(self._hello)
            if self._acknowledged is not None:
                await asyncio.shield(self._acknowledged)
        finally:
            timer.cancel()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed is None or self._closed.done():
            raise (self._closed.result() if self._closed is not None else None) or self._guest_gone()

    def _offer(self, device: Device) -> None:
        identity, connecting = device.identity, device_connect(device)
        self._operations.describe(device)
        self._protocol.send(connecting)
        self.state = State.ATTACHED
        self._offered = True
        self._current.offer(device)
        if self.port.offers_again:
            self._watch.start(device)
        self._protocol.flush()
        if self.port.loses_wakeups:
            self._protocol.reminder.start()
        self._emit(events.Attached(self.port.name, identity, identity.speed))

    async def _offer_again(self, device: Device, offer: Offer) -> None:
        """Disconnect a device and offer it again with another offer, unless the device is being detached by then."""
        await self._disconnect()
        if self.state is State.EMPTY and self._detaching is None:
            await device.close()
            device.select(offer)
            await device.open(self)
            if self.state is State.EMPTY and self._detaching is None:
                self._offer(device)

    def _described(self, endpoints: Collection[Endpoint]) -> None:
        """Disable compression for a device with isochronous endpoints, as spice-gtk."""
        self.port.compress = not any(endpoint.type is TransferType.ISOCHRONOUS for endpoint in endpoints)

    def _report_unused(self) -> None:
        if not self._current.touched:
            self._emit(events.Unused(self.port.name))

    def _cancel_unused(self) -> None:
        if self._unused is not None:
            self._unused.cancel()

    def _start_detach(self, error: FarplugError | None) -> asyncio.Task[None]:
        if self._detaching is None:
            self._cancel_unused()
            self._current.retire()
            self._detaching = asyncio.get_running_loop().create_task(self._detach(error))
            self._detaching.add_done_callback(_retrieve)
        return self._detaching

    async def _detach(self, error: FarplugError | None) -> None:
        device = self._device
        assert device is not None
        try:
            await self._operations.finished()
            await self._choice.finished()
            await self._disconnect()
            close_error: FarplugError | None = None
            try:
                await device.close()
            except FarplugError as raised:
                close_error = raised
            except Exception as raised:
                message = f"the device could not be closed: {type(raised).__name__}: {raised}"
                close_error = DeviceError(message, reason=Reason.DEVICE_FAULT)
                close_error.__cause__ = raised
            if close_error is not None:
                if error is not None:
                    self._fault(close_error)  # report both
                error = error or close_error
                raise close_error
        finally:
            figures = self.figures
            self._device = None
            self._offered = False
            self._detaching = None
            self._emit(events.Detached(self.port.name, error, figures))

    async def _disconnect(self) -> None:
        """Answer the pending requests, disconnect the device, and wait for the guest's acknowledgement."""
        self._requests.cancel_all()
        self._current.clear()
        self._watch.stop()
        self._receptions.drop()
        if self.state is not State.ATTACHED:
            return
        self.state = State.DISCONNECTING
        self._acknowledged = asyncio.get_running_loop().create_future()
        self._protocol.send(packets.DeviceDisconnect())
        self._protocol.flush()
        self._protocol.pump()  # no pending request pauses it any more
        if self._protocol.guest_has(Cap.DEVICE_DISCONNECT_ACK):
            await self._wait_for_ack(self._acknowledged)
        else:
            self._on_disconnect_ack(packets.DeviceDisconnectAck())

    async def _wait_for_ack(self, acknowledged: asyncio.Future[None]) -> None:
        """Wait until the guest has acknowledged the disconnect.

        The timeout :data:`ACK_TIMEOUT` holds only if the device is being detached, not if the device is to be offered
        again: a paused VM acknowledges when it continues.
        """
        while not (await asyncio.wait([acknowledged], timeout=ACK_TIMEOUT))[0]:
            if self._detaching is not None:
                log.warning("%s: the guest did not acknowledge the disconnect: the VM may be paused", self.port.name)
                return

    def _port_closed(self, error: FarplugError | None) -> None:
        """Detach the device: no request can be answered any more."""
        self._events.release()
        self.state = State.CLOSED
        self._greeting = None
        self._protocol.reminder.stop()
        error = self._port_error or error
        assert self._hello is not None
        assert self._closed is not None
        if self._acknowledged is not None and not self._acknowledged.done():
            self._acknowledged.set_result(None)
        if not self._hello.done():
            self._hello.set_exception(error or self._guest_gone())
            self._hello.exception()  # mark it as retrieved: perhaps no task waits
        elif self._offered:
            self._start_detach(error or self._guest_gone())
        if not self._closed.done():
            self._closed.set_result(error)

    def _guest_gone(self) -> GuestGoneError:
        return GuestGoneError(f"the connection to the guest was closed ({self.port.name})")

    # DeviceListener -----------------------------------------------------------------------------------------------

    def happened(self, event: DeviceEvent) -> None:
        """Emit an event of the device."""
        self._emit(events.DeviceReport(self.port.name, event))

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        """Send one packet of a running reception to the guest; return False if it was dropped."""
        sent = self._receptions.received(endpoint, status, data)
        self._protocol.schedule_flush()
        return sent

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """Send the status of a reception that ended by itself (``STALL``), or continues after an error (any other)."""
        self._receptions.ended(endpoint, status)
        self._protocol.schedule_flush()

    def lost(self, error: Exception | None) -> None:
        """Detach the device: it is gone."""
        message = "the device is gone" if error is None else f"the device is gone: {error}"
        if self._offered:
            self._start_detach(DeviceError(message, reason=Reason.DEVICE_LOST))
        else:
            self._loss = DeviceError(message, reason=Reason.DEVICE_LOST)

    def _fault(self, error: Exception) -> None:
        log.debug("%s: device error", self.port.name, exc_info=error)  # the event is for people
        self._emit(events.DeviceFault(self.port.name, error))

    # Offers -------------------------------------------------------------------------------------------------------

    def _offer_failed(self, problem: OfferProblem) -> None:
        """Offer the device in another way, if there is one that the guest may accept."""
        device = self._current.usable
        if device is not None:
            self._choice.offer_next(device, problem)

    def _cannot_offer(self, error: Exception, why: DeviceError) -> None:
        self._fault(error)
        self._start_detach(why)

    # Packets of the guest -----------------------------------------------------------------------------------------

    def _on_hello(self, packet: packets.Hello) -> None:
        assert self._hello is not None
        if self.state is not State.WAITING:
            return
        self._protocol.hello_received()
        self.state = State.EMPTY
        self._greeting = events.GuestReady(self.port.name, packet.version, packet.capabilities.names)
        self._emit(self._greeting)
        if not self._hello.done():
            self._hello.set_result(None)

    def _reset(self, packet: packets.Reset) -> None:
        self._watch.port_reset()
        self._cancel_unused()
        device = self._current.usable
        if device is not None and self._current.touched:  # otherwise the last reset still holds
            self._current.touched = False
            self._operations.reset(device, lambda: self._emit(events.PortReset(self.port.name)))

    def _set_configuration(self, packet: packets.SetConfiguration) -> None:
        self._current.touched = True
        self._operations.set_configuration(packet, self._configured)

    def _configured(self, configuration: int) -> None:
        self._watch.configured(configuration)
        self._emit(events.Configured(self.port.name, configuration))

    def _set_alt_setting(self, packet: packets.SetAltSetting) -> None:
        if packet.alt:  # setting 0 may be selected without a driver
            self._watch.used()
        self._operations.set_alt_setting(packet)

    def _start_receiving(
        self, packet: packets.StartIsoStream | packets.StartInterruptReceiving | packets.StartBulkReceiving
    ) -> None:
        self._watch.used()
        self._receptions.start(packet)

    def _on_filter(self, packet: packets.FilterFilter) -> None:
        rules = packet.rules
        if rules == self._guest_filter:
            return
        self._guest_filter = rules
        device = self._current.usable
        if device is not None:  # the filter came after the offer, or was changed
            try:
                check_filter(self._guest_filter, device)
            except RefusedError as refused:
                self._refused(refused)

    def _on_filter_reject(self, packet: packets.FilterReject) -> None:
        device = self._current.usable
        if device is None:
            return
        try:
            check_filter(self._guest_filter, device)
        except RefusedError as filtered:
            self._refused(filtered)
        else:
            if not self._choice.offer_next(device, OfferProblem.SPEED):
                self._refused(rejected(device.identity))

    def _refused(self, error: RefusedError) -> None:
        self._emit(events.Refused(self.port.name, error))
        self._start_detach(error)

    def _on_disconnect_ack(self, packet: packets.DeviceDisconnectAck) -> None:
        if self._acknowledged is not None and not self._acknowledged.done():
            self._acknowledged.set_result(None)
        if self.state is State.DISCONNECTING:
            self._protocol.reminder.stop()
            self.state = State.EMPTY

    def _violation(self, event: Violation) -> None:
        if self.state is State.WAITING:
            if self._port_error is None:
                self._port_error = _not_usbredir(self.port, event)
            self.port.abort()
            return
        self._emit(events.PeerViolation(self.port.name, event.error))


def _not_usbredir(port: Port, event: Violation) -> RemoteProtocolError:
    if event.type == SPICE_MAGIC:
        return RemoteProtocolError(
            f"a SPICE server answers at {port}, not a usbredir chardev",
            remedy="use a target of the form spice://HOST:PORT or spice+unix:///PATH",
        )
    return RemoteProtocolError(
        f"the peer at {port} does not use the usbredir protocol: {event.error}",
        remedy="check that the target is the address of a usbredir chardev",
    )


def _retrieve(task: asyncio.Task[None]) -> None:
    """Mark the error of a detach as retrieved: its event reports it, also if no task awaits the detach."""
    if not task.cancelled():
        task.exception()
