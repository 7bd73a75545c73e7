"""One device on one port: hello, offer, reset, configurations, settings, disconnect.

It knows packets and :class:`~farplug.usb.device.Device`, and no kind of device. What it guarantees, whatever the device
and the guest do (QEMU aborts its VM otherwise): every id has exactly one answer, answers keep their order on each
endpoint (:mod:`~farplug.redirection.ledger`), nothing is sent that the guest's parser would reject
(:mod:`farplug.usbredir`), and memory is bounded.

Source: usb-redirection-protocol.md (protocol 0.7) and what usbredirhost and QEMU make of it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Any

from farplug import events
from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    LocalProtocolError,
    Reason,
    RefusedError,
    RemoteProtocolError,
    UsageError,
)
from farplug.events import EndpointFigures, PortEvent
from farplug.redirection.describe import connect
from farplug.redirection.ledger import MAX_TRANSFER, Ledger
from farplug.redirection.operations import Operations
from farplug.redirection.receptions import Receptions, Start, Stop
from farplug.redirection.reminder import Reminder
from farplug.redirection.speed import SpeedWatch, lower_speed
from farplug.transport.port import Port
from farplug.usb.device import Device
from farplug.usb.transfer import Status
from farplug.usb.types import (
    Buffer,
    Endpoint,
    Setup,
    Speed,
    TransferType,
)
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.filter import Filter
from farplug.usbredir.protocol import Connection, Oversized, Role, Violation

MAX_PENDING = 4096
"""Pending transfers; with more than that nothing further is read from the guest until some are answered."""
PACKETS_AT_ONCE = 64
"""Packets of the guest that are looked at before the event loop has its turn: what the device has done meanwhile, and
other devices, must not wait for all that a guest can send at once."""
MAX_REPORTED_VIOLATIONS = 20
"""Packets that break the protocol are reported this often for each port; further ones are dropped in silence."""
FLUSH_ABOVE = 64 << 10
"""Bytes of answers that leave at once; fewer leave together, when all that was received is looked at."""
HELLO_PATIENCE = 1.5
"""Seconds after which a guest that has not said hello is reported as one that is waited for."""
ACK_PATIENCE = 5.0
"""Seconds to wait for the guest's answer to a disconnect; a paused VM gives none."""

log = logging.getLogger("farplug.usbredir")

_STATUS = re.compile(r" status=\S+")
"""In the log of requests: QEMU leaves the status of what it asks for uninitialised."""


class State(Enum):
    """Where a redirection is."""

    CLOSED = auto()
    """The port is not open."""
    WAITING = auto()
    """The port is open; the guest has not said hello."""
    EMPTY = auto()
    """The guest is ready; no device is in the port."""
    ATTACHED = auto()
    """A device was offered, or is in use."""
    LEAVING = auto()
    """A device was taken out; the guest has not acknowledged it yet."""

    def __str__(self) -> str:
        return self.name.lower()


class Redirection:
    """One device at a time on one port.

    Args:
        port: where the bytes go; it must be closed, :meth:`open` opens it.
        on_event: called with everything that happens, on the event loop. It must not block.
        max_transfer: see :data:`MAX_TRANSFER`.
        caps: what we announce.
    """

    def __init__(
        self,
        port: Port,
        on_event: Callable[[PortEvent], None] = lambda event: None,
        *,
        max_transfer: int = MAX_TRANSFER,
        caps: Cap = ALL_CAPS,
    ) -> None:
        self.port = port
        self.state = State.CLOSED
        self._emit = on_event
        self._caps = caps
        self._max_transfer = max_transfer
        self._connection = Connection(Role.HOST, caps=caps, max_payload=max_transfer)
        self._device: Device | None = None
        self._offered = False
        self._loss: DeviceError | None = None
        self._guest_filter: Filter | None = None
        self._ledger = Ledger(self._send, self._completed, self._fault, max_transfer)
        self._receptions = Receptions(self._send, self._fault, self._ledger.figures, max_transfer)
        self._operations = Operations(
            self._send, self._operated, self._fault, self._ledger, self._receptions, self._described
        )
        self._violations = 0
        self._port_error: FarplugError | None = None
        # Why nothing is pulled from the connection right now.
        self._output_full = False
        self._pumping = False
        self._yielding = False
        self._flushing = False
        """Soon, on the event loop."""
        self._reading_paused = False
        # What the guest did since the device was offered.
        self._traffic = False
        self._speed = SpeedWatch(self._misunderstood)
        self._reminder = Reminder(self._remind)
        # Waiting and leaving.
        self._hello: asyncio.Future[None] | None = None
        self._acknowledged: asyncio.Future[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._falling_back: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[FarplugError | None] | None = None
        self._debug = log.isEnabledFor(logging.DEBUG)
        self._handlers: dict[type, Callable[[Any], None]] = {
            p.BulkPacket: self._bulk,
            p.ControlPacket: self._control,
            p.InterruptPacket: self._interrupt_out,
            p.IsoPacket: lambda packet: self._receptions.iso_out(packet, self._usable_device),
            p.CancelDataPacket: lambda packet: self._ledger.cancel(packet.id),
            p.Reset: self._reset,
            p.SetConfiguration: self._set_configuration,
            p.GetConfiguration: self._operations.get_configuration,
            p.SetAltSetting: self._operations.set_alt_setting,
            p.GetAltSetting: self._operations.get_alt_setting,
            p.StartIsoStream: self._start_receiving,
            p.StopIsoStream: self._stop_receiving,
            p.StartInterruptReceiving: self._start_receiving,
            p.StopInterruptReceiving: self._stop_receiving,
            p.StartBulkReceiving: self._start_receiving,
            p.StopBulkReceiving: self._stop_receiving,
            p.AllocBulkStreams: self._operations.alloc_bulk_streams,
            p.FreeBulkStreams: self._operations.free_bulk_streams,
            p.Hello: self._on_hello,
            p.FilterFilter: self._on_filter,
            p.FilterReject: self._on_filter_reject,
            p.DeviceDisconnectAck: self._on_disconnect_ack,
            Oversized: self._oversized,
            Violation: self._violation,
        }

    # What the owner does -----------------------------------------------------------------------------------------

    @property
    def device(self) -> Device | None:
        """The device in the port."""
        return self._device

    @property
    def figures(self) -> tuple[EndpointFigures, ...]:
        """What moved since the device was attached, one entry for each endpoint that was used."""
        return self._ledger.figures.snapshot()

    @property
    def _usable_device(self) -> Device | None:
        """The device, while the guest may use it."""
        return self._device if self.state is State.ATTACHED and self._leaving is None else None

    async def open(self) -> None:
        """Open the port and say hello.

        Raises:
            TargetError: the port cannot be reached.
            PortError: somebody else uses it.
        """
        if self.state is not State.CLOSED:
            raise LocalProtocolError(f"port {self.port.name} is open already")
        loop = asyncio.get_running_loop()
        self._connection = Connection(Role.HOST, caps=self._caps, max_payload=self._max_transfer)
        self._guest_filter = self._port_error = None
        self._violations = 0
        self._output_full = self._receptions.output_full = self._reading_paused = False
        self._hello = loop.create_future()
        self._closed = loop.create_future()
        self.state = State.WAITING
        try:
            await self.port.open(self)
        except BaseException:
            self.state = State.CLOSED
            self._hello = self._closed = None
            raise
        if self._debug:
            log.debug("%s > hello caps=%s", self.port.name, self._connection.own_caps.names)
        self._connection.start()
        self._flush()

    async def attach(self, device: Device) -> None:
        """Offer ``device`` to the guest; wait for the guest's hello first, for as long as it takes.

        Returns once the device was offered. That the guest refuses it, or configures it, comes as an event.

        Raises:
            GuestGoneError: the port was closed before the guest was ready.
            RefusedError: the guest's filter rules the device out: it was not offered.
            DeviceError: the device cannot be taken.
        """
        if self._device is not None or self.state not in (State.WAITING, State.EMPTY):
            raise LocalProtocolError(f"port {self.port.name} cannot take a device now: it is {self.state}")
        self._device = device  # reserved: no second one while we wait
        self._loss = None
        opened = False
        try:
            await self._wait_for_hello()
            self._check_filter(device)
            self._select_speed(device)
            await device.open(self)
            opened = True
            if self._closed is None or self._closed.done():
                raise self._gone()
            if self._loss is not None:
                raise self._loss
            self._check_filter(device)  # the guest may have told it only now
            self._ledger.figures.clear()
            self._offer(device)
        except BaseException:
            self._device = None
            if opened:
                await device.close()
            raise

    async def detach(self) -> None:
        """Take the device out: cancel what is pending, tell the guest, wait for its answer, give the device back.

        Does nothing if there is no device. Raises ``DeviceError`` if what was written could not be made durable.
        """
        if self._offered:
            await asyncio.shield(self._start_leaving(None))

    async def close(self) -> None:
        """Detach, then close the port."""
        try:
            await self.detach()
        finally:
            await self.port.close()
            await self.closed()

    async def closed(self) -> FarplugError | None:
        """Wait until the port is closed and the device given back; the reason, if it was not us."""
        if self._closed is None:
            return None
        error = await asyncio.shield(self._closed)
        if self._leaving is not None:
            await asyncio.wait([self._leaving])
        return error

    # Attaching and leaving ---------------------------------------------------------------------------------------

    async def _wait_for_hello(self) -> None:
        assert self._hello is not None
        timer = asyncio.get_running_loop().call_later(
            HELLO_PATIENCE, lambda: self._emit(events.WaitingForGuest(self.port.name))
        )
        try:
            await asyncio.shield(self._hello)
        finally:
            timer.cancel()

    def _guest_has(self, cap: Cap) -> bool:
        return bool((self._connection.peer_caps or Cap(0)) & cap)

    def _check_filter(self, device: Device) -> None:
        if self._guest_filter is None:
            return
        identity = device.identity
        judgement = self._guest_filter.judge(
            device_class=identity.device_class,
            vendor_id=identity.vendor_id,
            product_id=identity.product_id,
            device_version=identity.device_version,
            interfaces=[(i.interface_class, i.interface_subclass, i.interface_protocol) for i in device.interfaces],
        )
        if not judgement.allowed:
            raise RefusedError(
                f"the guest's filter does not allow {identity}: {judgement}",
                reason=Reason.FILTERED,
                remedy="allow it in the filter= property of QEMU's usb-redir device (libvirt: <redirfilter>)",
            )

    def _select_speed(self, device: Device) -> None:
        """The best one that the guest can take; a port before this one may have taken less."""
        device.select_speed(device.speeds[0])
        while not self._guest_has(Cap.BULK_STREAMS) and device.has_streams:
            # A guest's driver would find them in the descriptors, and give up on the device when it gets none.
            identity, lower = device.identity, lower_speed(device)
            if lower is None:
                raise RefusedError(
                    f"the guest's side has no bulk streams, which {identity} uses",
                    reason=Reason.CAPABILITY,
                    remedy="QEMU's usb-redir device has them, unless it has streams=off; "
                    "virtual disks need none with --usb-storage bot",
                )
            self._emit(events.FellBack(self.port.name, identity.speed, lower, needs_streams=True))
            device.select_speed(lower)

    def _offer(self, device: Device) -> None:
        identity, connecting = device.identity, connect(device)
        self._operations.describe(device)
        self._send(connecting)
        self.state = State.ATTACHED
        self._offered = True
        self._ledger.device = self._operations.device = device
        self._traffic = False
        self._speed.begin()
        self._flush()
        if self.port.loses_wakeups:
            self._reminder.start()
        self._emit(events.Attached(self.port.name, identity, identity.speed))

    def _described(self, endpoints: Collection[Endpoint]) -> None:
        """As spice-gtk: a device with isochronous endpoints sends as it is."""
        self.port.compress = not any(endpoint.type is TransferType.ISOCHRONOUS for endpoint in endpoints)

    def _start_leaving(self, error: FarplugError | None) -> asyncio.Task[None]:
        if self._leaving is None:
            self._operations.device = None  # the guest begins nothing more
            self._leaving = asyncio.get_running_loop().create_task(self._leave(error))
            self._leaving.add_done_callback(_retrieve)
        return self._leaving

    async def _leave(self, error: FarplugError | None) -> None:
        device = self._device
        assert device is not None
        try:
            await self._operations.finished()
            if self._falling_back is not None:
                await asyncio.wait([self._falling_back])
            await self._disconnect(device)
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
                    self._fault(close_error)  # both are to be told
                error = error or close_error
                raise close_error
        finally:
            figures = self.figures
            self._device = None
            self._offered = False
            self._leaving = None
            self._emit(events.Detached(self.port.name, error, figures))

    async def _disconnect(self, device: Device) -> None:
        """Out of the guest: pending transfers answered, the guest told, its acknowledgement awaited."""
        self._ledger.cancel_all()
        self._ledger.device = self._operations.device = None
        self._speed.begin()
        self._reminder.stop()
        self._receptions.forget()
        if self.state is not State.ATTACHED:
            return
        self.state = State.LEAVING
        self._acknowledged = asyncio.get_running_loop().create_future()
        self._send(p.DeviceDisconnect())
        self._flush()
        self._pump()  # nothing is pending any more that could have held it back
        if self._guest_has(Cap.DEVICE_DISCONNECT_ACK):
            try:
                await asyncio.wait_for(self._acknowledged, ACK_PATIENCE)
            except TimeoutError:
                log.warning("%s: the guest did not acknowledge that the device left; it may be paused", self.port.name)
                self.port.abort()  # what it would still say could not be told from the next device's
        if self.state is State.LEAVING:
            self.state = State.EMPTY

    # The device's voice (DeviceListener) --------------------------------------------------------------------------

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        """One packet of a running reception."""
        self._receptions.received(endpoint, status, data)
        self._said()

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """A reception ended by itself (stall), or reports an error while it runs on."""
        self._receptions.ended(endpoint, status)
        self._said()

    def lost(self, error: Exception | None) -> None:
        """The device is gone: tell the guest."""
        message = "the device is gone" if error is None else f"the device is gone: {error}"
        if self._offered:
            self._start_leaving(DeviceError(message, reason=Reason.DEVICE_LOST))
        else:
            self._loss = DeviceError(message, reason=Reason.DEVICE_LOST)

    # The port's voice (PortListener) ------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:
        """Bytes from the guest."""
        self._reminder.heard = True
        self._connection.receive_data(data)
        self._pump()

    def pause_writing(self) -> None:
        """The port takes no more output: stop pulling requests."""
        self._output_full = self._receptions.output_full = True

    def resume_writing(self) -> None:
        """The port takes output again."""
        self._output_full = self._receptions.output_full = False
        self._pump()

    def port_closed(self, error: FarplugError | None) -> None:
        """The port is closed: nothing can be answered any more; give the device back."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        error = self._port_error or error
        assert self._hello is not None
        assert self._closed is not None
        if self._acknowledged is not None and not self._acknowledged.done():
            self._acknowledged.set_result(None)
        if not self._hello.done():
            self._hello.set_exception(error or self._gone())
            self._hello.exception()  # nobody need be waiting
        elif self._offered:
            self._start_leaving(error or self._gone())
        if not self._closed.done():
            self._closed.set_result(error)

    def _gone(self) -> GuestGoneError:
        return GuestGoneError(f"the connection to the guest was closed ({self.port.name})")

    # Pulling packets, sending answers -----------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        connection, handlers = self._connection, self._handlers
        next_event = connection.next_event
        ledger, operations = self._ledger, self._operations
        try:
            for _ in range(PACKETS_AT_ONCE):
                if held := self._output_full or operations.busy or len(ledger) >= MAX_PENDING:
                    break
                event = next_event()
                if event is None:
                    break
                if self._debug:
                    log.debug("%s < %s", self.port.name, _STATUS.sub("", str(event)))
                handler = handlers.get(type(event))
                if handler is not None:
                    handler(event)
                if connection.unsent > FLUSH_ABOVE:
                    self._flush()
            else:
                held = True
                if not self._yielding:
                    self._yielding = True
                    asyncio.get_running_loop().call_soon(self._go_on)
            self._flush()
        finally:
            self._pumping = False
        if held is not self._reading_paused:
            self._reading_paused = held
            if held:
                self.port.pause_reading()
            else:
                self.port.resume_reading()

    def _go_on(self) -> None:
        self._yielding = False
        if self.state is not State.CLOSED:
            self._pump()

    def _send(self, packet: p.Packet) -> bool:
        if self.state is State.CLOSED:
            return True
        if self._debug:
            log.debug("%s > %s", self.port.name, packet)
        try:
            self._connection.send(packet)
        except (LocalProtocolError, TypeError) as error:  # what the device gave us cannot be said in this protocol
            self._fault(error)
            return False
        return True

    def _flush(self) -> None:
        self._flushing = False
        buffers = self._connection.data_to_send()
        if buffers:
            self.port.write(buffers)

    def _completed(self) -> None:
        """The ledger answered a transfer. After the last one no other can go along: it is sent at once."""
        if not self._ledger and not self._pumping:
            self._flush()
        self._said()

    def _said(self) -> None:
        """Something was said outside of the pump: by the device, later. The next thing that it says goes along."""
        if self._pumping:
            return
        unsent = self._connection.unsent
        if unsent > FLUSH_ABOVE:
            self._flush()
        elif unsent and not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)
        if self._reading_paused and not self._yielding:
            self._pump()

    def _fault(self, error: Exception) -> None:
        log.warning("%s: the device misbehaved", self.port.name, exc_info=error)
        self._emit(events.DeviceFault(self.port.name, error))

    # Transfers ----------------------------------------------------------------------------------------------------

    def _bulk(self, packet: p.BulkPacket, *, stored: bool = True) -> None:
        self._traffic = True
        endpoint = self._operations.endpoints.get(packet.endpoint)
        self._ledger.submit(
            packet.id,
            TransferType.BULK,
            packet.endpoint,
            valid=stored and endpoint is not None and endpoint.type is TransferType.BULK,
            length=packet.length,
            data=packet.data,
            stream_id=packet.stream_id,
        )

    def _control(self, packet: p.ControlPacket, *, stored: bool = True) -> None:
        self._traffic = True
        setup = Setup(packet.request_type, packet.request, packet.value, packet.index, packet.length)
        self._speed.requested(setup)
        self._ledger.submit(
            packet.id,
            TransferType.CONTROL,
            packet.endpoint,
            valid=stored and not packet.endpoint & 0x0F,
            length=packet.length,
            data=packet.data,
            setup=setup,
        )

    def _interrupt_out(self, packet: p.InterruptPacket, *, stored: bool = True) -> None:
        self._traffic = True
        endpoint = self._operations.endpoints.get(packet.endpoint)
        self._ledger.submit(
            packet.id,
            TransferType.INTERRUPT,
            packet.endpoint,
            valid=stored
            and endpoint is not None
            and endpoint.type is TransferType.INTERRUPT
            and len(packet.data) <= endpoint.max_packet_size,
            data=packet.data,
        )

    def _oversized(self, event: Oversized) -> None:
        """A transfer whose body was too large to store: answered with an error, in its turn."""
        match event.packet:
            case p.BulkPacket():
                self._bulk(event.packet, stored=False)
            case p.ControlPacket():
                self._control(event.packet, stored=False)
            case p.InterruptPacket():
                self._interrupt_out(event.packet, stored=False)

    # The whole device ---------------------------------------------------------------------------------------------

    def _operated(self) -> None:
        """An operation on the device has ended."""
        self._flush()
        self._pump()

    def _reset(self, packet: p.Reset) -> None:
        self._speed.was_reset()
        device = self._usable_device
        if device is not None and self._traffic:  # else it was reset a moment ago
            self._traffic = False
            self._operations.reset(device, lambda: self._emit(events.WasReset(self.port.name)))

    def _misunderstood(self) -> None:
        """The guest does not understand the device at this speed."""
        device = self._usable_device
        lower = None if device is None else lower_speed(device)
        if device is not None and lower is not None:
            self._start_falling_back(device, lower)

    def _start_falling_back(self, device: Device, speed: Speed) -> None:
        async def fall_back() -> None:
            try:
                await self._disconnect(device)
                if self.state is State.EMPTY and self._leaving is None:
                    await device.close()
                    device.select_speed(speed)
                    await device.open(self)
                    if self.state is State.EMPTY and self._leaving is None:
                        self._offer(device)
            except Exception as error:
                self._fault(error)
                message = f"the device cannot run at {speed} speed: {error}"
                self._start_leaving(DeviceError(message, reason=Reason.DEVICE_FAULT))
            finally:
                self._falling_back = None

        if self._falling_back is None and self._leaving is None:
            self._emit(events.FellBack(self.port.name, device.identity.speed, speed))
            self._falling_back = asyncio.get_running_loop().create_task(fall_back())

    def _set_configuration(self, packet: p.SetConfiguration) -> None:
        self._traffic = True
        self._operations.set_configuration(packet, self._configured)

    def _configured(self, configuration: int) -> None:
        self._speed.begin()
        self._emit(events.Configured(self.port.name, configuration))

    # Receptions ---------------------------------------------------------------------------------------------------

    def _start_receiving(self, packet: Start) -> None:
        self._traffic = True
        self._receptions.start(packet, self._usable_device, self._operations.endpoints)

    def _stop_receiving(self, packet: Stop) -> None:
        self._receptions.stop(packet, self._usable_device)

    def _remind(self) -> None:
        """Say something that changes nothing: endpoint 0 does not receive."""
        if not self._output_full:
            self._send(p.InterruptReceivingStatus(endpoint=0x80, status=Status.SUCCESS))
            self._flush()

    # The guest's other words --------------------------------------------------------------------------------------

    def _on_hello(self, packet: p.Hello) -> None:
        assert self._hello is not None
        if self.state is not State.WAITING:
            return
        self.state = State.EMPTY
        self._emit(events.GuestReady(self.port.name, packet.version, packet.capabilities.names))
        if not self._hello.done():
            self._hello.set_result(None)

    def _on_filter(self, packet: p.FilterFilter) -> None:
        try:
            self._guest_filter = Filter.parse(packet.filter)
        except UsageError as error:
            log.warning("%s: the guest sent a filter that cannot be read, it is ignored: %s", self.port.name, error)
            return
        device = self._usable_device
        if device is not None:  # it came after the offer, or was changed
            try:
                self._check_filter(device)
            except RefusedError as refused:
                self._refused(refused)

    def _refused(self, error: RefusedError) -> None:
        self._emit(events.Refused(self.port.name, error))
        self._start_leaving(error)

    def _on_filter_reject(self, packet: p.FilterReject) -> None:
        device = self._device
        if device is None or self.state is not State.ATTACHED or self._leaving is not None:
            return
        identity = device.identity
        try:
            self._check_filter(device)
        except RefusedError as filtered:
            error = filtered
        else:
            lower = lower_speed(device)
            if lower is not None:
                self._start_falling_back(device, lower)
                return
            error = RefusedError(
                f"the guest refused {identity} at {identity.speed} speed",
                reason=Reason.REJECTED,
                remedy="the VM's USB controller may not take this speed: give it a qemu-xhci controller; "
                "QEMU's own log says why",
            )
        self._refused(error)

    def _on_disconnect_ack(self, packet: p.DeviceDisconnectAck) -> None:
        if self._acknowledged is not None and not self._acknowledged.done():
            self._acknowledged.set_result(None)

    def _violation(self, event: Violation) -> None:
        if self.state is State.WAITING:
            self._port_error = RemoteProtocolError(
                f"what answers at {self.port.name} does not speak usbredir: {event.error}",
                remedy="is the address the one of a usbredir chardev, or of a SPICE server (spice://)?",
            )
            self.port.abort()
            return
        self._violations += 1
        if self._violations <= MAX_REPORTED_VIOLATIONS:  # a hostile guest must not flood a log
            self._emit(events.PeerViolation(self.port.name, event.error))


def _retrieve(task: asyncio.Task[None]) -> None:
    """An error of a detach that nobody awaits is told by its event; do not let asyncio complain as well."""
    if not task.cancelled():
        task.exception()
