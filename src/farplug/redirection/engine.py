"""One device on one port: hello, offers, disconnect: what begins and ends.

It knows packets and :class:`~farplug.usb.device.Device`, and no kind of device. What it guarantees, whatever the device
and the guest do (QEMU aborts its VM otherwise): every id has exactly one answer, answers keep their order on each
endpoint (:mod:`~farplug.redirection.ledger`), nothing is sent that the guest's parser would reject
(:mod:`farplug.usbredir`), and memory is bounded (:mod:`~farplug.redirection.conversation`).

Source: usb-redirection-protocol.md (protocol 0.7) and what usbredirhost and QEMU make of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from enum import Enum, auto

from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    LocalProtocolError,
    Reason,
    RefusedError,
    RemoteProtocolError,
)
from farplug.redirection import events
from farplug.redirection.acceptance import check_filter, rejected
from farplug.redirection.conversation import Conversation
from farplug.redirection.current import Current
from farplug.redirection.describe import connect
from farplug.redirection.events import Misfit, PortEvent
from farplug.redirection.figures import EndpointCounters
from farplug.redirection.ledger import MAX_TRANSFER, Ledger
from farplug.redirection.offers import OfferChoice, OfferWatch
from farplug.redirection.operations import Operations
from farplug.redirection.receptions import Receptions
from farplug.redirection.transfers import Transfers
from farplug.transport.port import Port
from farplug.usb.device import Device, DeviceEvent, Offer
from farplug.usb.figures import EndpointFigures
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, Endpoint, TransferType
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.filter import Filter
from farplug.usbredir.protocol import Oversized, Violation

MAX_REPORTED_VIOLATIONS = 20
"""Packets that break the protocol are reported this often for each port; further ones are dropped in silence."""
HELLO_PATIENCE = 1.5
"""Seconds after which a guest that has not said hello is reported as one that is waited for."""
UNUSED_AFTER = 10.0
"""Seconds after which a device is reported that the guest has not used since it was attached."""
ACK_PATIENCE = 5.0
"""Seconds to wait for the guest's answer to a disconnect; a paused VM gives none."""

SPICE_MAGIC = int.from_bytes(b"REDQ", "little")
"""What a SPICE server's answer begins with, read as the type of a packet."""

log = logging.getLogger("farplug.usbredir")


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
        self._device: Device | None = None
        self._offered = False
        self._loss: DeviceError | None = None
        self._guest_filter: Filter | None = None
        self._violations = 0
        self._port_error: FarplugError | None = None
        # Waiting and leaving.
        self._hello: asyncio.Future[None] | None = None
        self._acknowledged: asyncio.Future[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[FarplugError | None] | None = None
        self._unused: asyncio.TimerHandle | None = None
        # Its parts.
        self._figures = figures = EndpointCounters()
        self._current = current = Current()
        self._conversation = conversation = Conversation(port, self._port_closed, self._fault, caps, max_transfer)
        self._ledger = ledger = Ledger(conversation, current, figures, max_transfer)
        self._receptions = receptions = Receptions(conversation, current, figures, max_transfer)
        self._operations = operations = Operations(conversation, current, ledger, receptions, self._described)
        self._choice = OfferChoice(port.name, on_event, self._offer_again, self._cannot_offer)
        self._watch = OfferWatch(self._misfit)
        transfers = Transfers(current, ledger, self._watch)
        conversation.handlers = {
            p.BulkPacket: transfers.bulk,
            p.ControlPacket: transfers.control,
            p.InterruptPacket: transfers.interrupt_out,
            Oversized: transfers.oversized,
            p.CancelDataPacket: lambda packet: ledger.cancel(packet.id),
            p.IsoPacket: receptions.iso_out,
            p.StartIsoStream: self._start_receiving,
            p.StopIsoStream: receptions.stop,
            p.StartInterruptReceiving: self._start_receiving,
            p.StopInterruptReceiving: receptions.stop,
            p.StartBulkReceiving: self._start_receiving,
            p.StopBulkReceiving: receptions.stop,
            p.Reset: self._reset,
            p.SetConfiguration: self._set_configuration,
            p.GetConfiguration: operations.get_configuration,
            p.SetAltSetting: self._set_alt_setting,
            p.GetAltSetting: operations.get_alt_setting,
            p.AllocBulkStreams: operations.alloc_bulk_streams,
            p.FreeBulkStreams: operations.free_bulk_streams,
            p.Hello: self._on_hello,
            p.FilterFilter: self._on_filter,
            p.FilterReject: self._on_filter_reject,
            p.DeviceDisconnectAck: self._on_disconnect_ack,
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
        return self._figures.snapshot()

    async def open(self) -> None:
        """Open the port and say hello.

        Raises:
            TargetError: the port cannot be reached.
            PortError: somebody else uses it.
        """
        if self.state is not State.CLOSED:
            raise LocalProtocolError(f"port {self.port.name} is open already")
        loop = asyncio.get_running_loop()
        self._guest_filter = self._port_error = None
        self._violations = 0
        self._hello = loop.create_future()
        self._closed = loop.create_future()
        self.state = State.WAITING
        try:
            await self._conversation.open()
        except BaseException:
            self.state = State.CLOSED
            self._hello = self._closed = None
            raise

    async def attach(self, device: Device) -> None:
        """Offer ``device`` to the guest; wait for the guest's hello first, for as long as it takes.

        Returns once the device was offered. That the guest refuses it, or configures it, comes as an event.

        Raises:
            GuestGoneError: the port was closed before the guest was ready.
            RefusedError: the guest's filter rules the device out: it was not offered.
            DeviceError: the device cannot be taken.
        """
        if self._closed is not None and self._closed.done() and (gone := self._closed.result()) is not None:
            raise gone  # the guest left before it was asked for anything
        if self._device is not None or self.state not in (State.WAITING, State.EMPTY):
            raise LocalProtocolError(f"port {self.port.name} cannot take a device now: it is {self.state}")
        self._device = device  # reserved: no second one while we wait
        self._loss = None
        opened = False
        try:
            await self._wait_for_hello()
            check_filter(self._guest_filter, device)
            self._choice.first(device, streams=self._conversation.guest_has(Cap.BULK_STREAMS))
            await device.open(self)
            opened = True
            if self._closed is None or self._closed.done():
                raise self._gone()
            if self._loss is not None:
                raise self._loss
            check_filter(self._guest_filter, device)  # the guest may have told it only now
            self._figures.clear()
            self._unused = asyncio.get_running_loop().call_later(UNUSED_AFTER, self._report_unused)
            self._offer(device)
        except BaseException:
            self._cancel_unused()
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

    def _offer(self, device: Device) -> None:
        identity, connecting = device.identity, connect(device)
        self._operations.describe(device)
        self._conversation.send(connecting)
        self.state = State.ATTACHED
        self._offered = True
        self._current.offered(device)
        self._watch.offered(device)
        self._conversation.flush()
        if self.port.loses_wakeups:
            self._conversation.reminder.start()
        self._emit(events.Attached(self.port.name, identity, identity.speed))

    async def _offer_again(self, device: Device, offer: Offer) -> None:
        """Take a device from the guest and offer it again in another way, unless it is leaving by then."""
        await self._disconnect()
        if self.state is State.EMPTY and self._leaving is None:
            await device.close()
            device.select(offer)
            await device.open(self)
            if self.state is State.EMPTY and self._leaving is None:
                self._offer(device)

    def _described(self, endpoints: Collection[Endpoint]) -> None:
        """As spice-gtk: a device with isochronous endpoints sends as it is."""
        self.port.compress = not any(endpoint.type is TransferType.ISOCHRONOUS for endpoint in endpoints)

    def _report_unused(self) -> None:
        if not self._current.touched:
            self._emit(events.Unused(self.port.name))

    def _cancel_unused(self) -> None:
        if self._unused is not None:
            self._unused.cancel()

    def _start_leaving(self, error: FarplugError | None) -> asyncio.Task[None]:
        if self._leaving is None:
            self._cancel_unused()
            self._current.leaves()
            self._leaving = asyncio.get_running_loop().create_task(self._leave(error))
            self._leaving.add_done_callback(_retrieve)
        return self._leaving

    async def _leave(self, error: FarplugError | None) -> None:
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
                    self._fault(close_error)  # both are to be told
                error = error or close_error
                raise close_error
        finally:
            figures = self.figures
            self._device = None
            self._offered = False
            self._leaving = None
            self._emit(events.Detached(self.port.name, error, figures))

    async def _disconnect(self) -> None:
        """Out of the guest: pending transfers answered, the guest told, its acknowledgement awaited."""
        self._ledger.cancel_all()
        self._current.left()
        self._watch.left()
        self._receptions.forget()
        if self.state is not State.ATTACHED:
            self._conversation.reminder.stop()
            return
        self.state = State.LEAVING
        self._acknowledged = asyncio.get_running_loop().create_future()
        self._conversation.send(p.DeviceDisconnect())
        self._conversation.flush()
        self._conversation.pump()  # nothing is pending any more that could have held it back
        if self._conversation.guest_has(Cap.DEVICE_DISCONNECT_ACK):
            await self._acknowledgement(self._acknowledged)
        self._conversation.reminder.stop()
        if self.state is State.LEAVING:
            self.state = State.EMPTY

    async def _acknowledgement(self, acknowledged: asyncio.Future[None]) -> None:
        """Wait until the guest has acknowledged the disconnect.

        If the device is to leave, for :data:`ACK_PATIENCE`. If it is only to be offered again, for as long as it takes:
        a paused VM acknowledges when it goes on.
        """
        while not (await asyncio.wait([acknowledged], timeout=ACK_PATIENCE))[0]:
            if self._leaving is not None:
                log.warning("%s: the guest did not acknowledge that the device left; it may be paused", self.port.name)
                self.port.abort()  # what it would still say could not be told from the next device's
                return

    def _port_closed(self, error: FarplugError | None) -> None:
        """Nothing can be answered any more: give the device back."""
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

    # What the device reports (DeviceListener) ---------------------------------------------------------------------

    def happened(self, event: DeviceEvent) -> None:
        """Pass an event of the device on."""
        self._emit(events.DeviceReport(self.port.name, event))

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        """One packet of a running reception."""
        self._receptions.received(endpoint, status, data)
        self._conversation.said()

    def reception_ended(self, endpoint: int, status: Status) -> None:
        """A reception ended by itself (stall), or reports an error while it runs on."""
        self._receptions.ended(endpoint, status)
        self._conversation.said()

    def lost(self, error: Exception | None) -> None:
        """The device is gone: tell the guest."""
        message = "the device is gone" if error is None else f"the device is gone: {error}"
        if self._offered:
            self._start_leaving(DeviceError(message, reason=Reason.DEVICE_LOST))
        else:
            self._loss = DeviceError(message, reason=Reason.DEVICE_LOST)

    def _fault(self, error: Exception) -> None:
        log.warning("%s: the device misbehaved", self.port.name, exc_info=error)
        self._emit(events.DeviceFault(self.port.name, error))

    # Offers -------------------------------------------------------------------------------------------------------

    def _misfit(self, misfit: Misfit) -> None:
        """Have the device offered in another way, if there is one that the guest may take."""
        device = self._current.usable
        if device is not None:
            self._choice.fall_back(device, misfit)

    def _cannot_offer(self, error: Exception, why: DeviceError) -> None:
        self._fault(error)
        self._start_leaving(why)

    # The guest's words --------------------------------------------------------------------------------------------

    def _on_hello(self, packet: p.Hello) -> None:
        assert self._hello is not None
        if self.state is not State.WAITING:
            return
        self._conversation.hello_received()
        self.state = State.EMPTY
        self._emit(events.GuestReady(self.port.name, packet.version, packet.capabilities.names))
        if not self._hello.done():
            self._hello.set_result(None)

    def _reset(self, packet: p.Reset) -> None:
        self._watch.was_reset()
        self._cancel_unused()
        device = self._current.usable
        if device is not None and self._current.touched:  # else it was reset a moment ago
            self._current.touched = False
            self._operations.reset(device, lambda: self._emit(events.WasReset(self.port.name)))

    def _set_configuration(self, packet: p.SetConfiguration) -> None:
        self._current.touched = True
        self._operations.set_configuration(packet, self._configured)

    def _configured(self, configuration: int) -> None:
        self._watch.configured(configuration)
        self._emit(events.Configured(self.port.name, configuration))

    def _set_alt_setting(self, packet: p.SetAltSetting) -> None:
        if packet.alt:  # setting 0 is there without a driver that chooses it
            self._watch.used()
        self._operations.set_alt_setting(packet)

    def _start_receiving(self, packet: p.StartIsoStream | p.StartInterruptReceiving | p.StartBulkReceiving) -> None:
        self._watch.used()
        self._receptions.start(packet)

    def _on_filter(self, packet: p.FilterFilter) -> None:
        try:
            self._guest_filter = Filter.parse(packet.filter)
        except ValueError as error:
            log.warning("%s: the guest sent a filter that cannot be read, it is ignored: %s", self.port.name, error)
            return
        device = self._current.usable
        if device is not None:  # it came after the offer, or was changed
            try:
                check_filter(self._guest_filter, device)
            except RefusedError as refused:
                self._refused(refused)

    def _on_filter_reject(self, packet: p.FilterReject) -> None:
        device = self._current.usable
        if device is None:
            return
        try:
            check_filter(self._guest_filter, device)
        except RefusedError as filtered:
            self._refused(filtered)
        else:
            if not self._choice.fall_back(device, Misfit.SPEED):
                self._refused(rejected(device.identity))

    def _refused(self, error: RefusedError) -> None:
        self._emit(events.Refused(self.port.name, error))
        self._start_leaving(error)

    def _on_disconnect_ack(self, packet: p.DeviceDisconnectAck) -> None:
        if self._acknowledged is not None and not self._acknowledged.done():
            self._acknowledged.set_result(None)

    def _violation(self, event: Violation) -> None:
        if self.state is State.WAITING:
            if self._port_error is None:
                self._port_error = _not_usbredir(self.port, event)
            self.port.abort()
            return
        self._violations += 1
        if self._violations <= MAX_REPORTED_VIOLATIONS:  # a hostile guest must not flood a log
            self._emit(events.PeerViolation(self.port.name, event.error))


def _not_usbredir(port: Port, event: Violation) -> RemoteProtocolError:
    if event.type == SPICE_MAGIC:
        return RemoteProtocolError(
            f"a SPICE server answers at {port}, not a usbredir chardev",
            remedy="write the target as spice://HOST:PORT, or as spice+unix:///PATH",
        )
    return RemoteProtocolError(
        f"what answers at {port} does not speak usbredir: {event.error}",
        remedy="check that it is the address of a usbredir chardev",
    )


def _retrieve(task: asyncio.Task[None]) -> None:
    """An error of a detach that nobody awaits is told by its event; do not let asyncio complain as well."""
    if not task.cancelled():
        task.exception()
