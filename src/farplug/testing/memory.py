"""A guest without a VM: drives a :class:`~farplug.usb.device.Device` through the whole stack, in memory.

The guest is the usb-guest of a real :class:`~farplug.redirection.Redirection`, so it exercises a device as QEMU would,
in microseconds::

    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        await guest.bulk_out(0x02, b"hello")
        assert await guest.bulk_in(0x81, 512) == b"hello"
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from farplug.capture.recording import Recording
from farplug.errors import DeviceError, FarplugError, GuestGoneError, Reason, RemoteProtocolError
from farplug.redirection import Redirection
from farplug.redirection.events import DeviceFault, DeviceReport, PortEvent
from farplug.transport.memory import memory_ports
from farplug.usb.conformance import configuration_faults
from farplug.usb.descriptors import ConfigurationDescriptor, DeviceDescriptor
from farplug.usb.device import Device
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, DescriptorType, Direction, Feature, Setup, Speed, StandardRequest, TransferType
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Role, Violation
from farplug.virtual.events import FunctionRaised

_Reply = TypeVar("_Reply", bound=packets.Packet)

_REQUESTS = (
    packets.BulkPacket,
    packets.ControlPacket,
    packets.InterruptPacket,
    packets.SetConfiguration,
    packets.GetConfiguration,
    packets.SetAltSetting,
    packets.GetAltSetting,
)
_REPLIES = (
    packets.BulkPacket,
    packets.ControlPacket,
    packets.InterruptPacket,
    packets.ConfigurationStatus,
    packets.AltSettingStatus,
)
_NO_ENDPOINT = 0xFF
"""The type of an endpoint that does not exist in the current setting (usb_redir_type_invalid)."""


_RECEPTION_STATUS = (packets.InterruptReceivingStatus, packets.IsoStreamStatus)


class _Reception:
    """A reception that the guest started: what arrived and was not read yet, statuses included."""

    def __init__(self, type: TransferType) -> None:
        self.type = type
        self.packets: asyncio.Queue[packets.Packet] = asyncio.Queue()


class TransferFailed(Exception):
    """A transfer ended with a status other than success. ``__cause__`` is the exception that the device raised, if any.

    Attributes:
        status: the status of the transfer.
        data: IN: the bytes that arrived nevertheless.
        actual: number of bytes that were transferred.
    """

    def __init__(self, name: str, status: Status, data: bytes = b"", actual: int = 0, hint: str = "") -> None:
        super().__init__(f"the {name} ended with status {status} after {actual} bytes{hint and f': {hint}'}")
        self.status = status
        self.data = data
        self.actual = actual


class GuestTimeoutError(TimeoutError):
    """The device or the engine did not respond in time. The message names the pending transfers."""


class Pending:
    """A transfer that was submitted: await its reply, or cancel it.

    Attributes:
        id: the packet's id.
        packet: the request.
    """

    def __init__(self, guest: MemoryGuest, packet: packets.Packet, future: asyncio.Future[packets.Packet]) -> None:
        self.id = packet.id
        self.packet = packet
        self._guest = guest
        self._future = future
        self._faults_before = len(guest.faults)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._reply().__await__()

    async def _reply(self) -> packets.Packet:
        if not self._future.done():
            await asyncio.wait([self._future], timeout=self._guest.timeout)  # does not cancel the transfer
            if not self._future.done():
                raise self._guest._timed_out(f"the {_name(self.packet)} was not completed")
        return self._future.result()

    @property
    def done(self) -> bool:
        """Return whether the reply has arrived."""
        return self._future.done()

    @property
    def fault(self) -> Exception | None:
        """Return the last exception that the device raised since the transfer was submitted; None if there is none."""
        faults = self._guest.faults[self._faults_before :]
        return faults[-1] if faults else None

    def cancel(self) -> None:
        """Cancel the transfer, as a guest's driver does; its reply still arrives."""
        self._guest.send(packets.CancelDataPacket(id=self.id))


class MemoryGuest:
    """A guest with one port and a device in it.

    Args:
        device: the device to plug in; it is unplugged at the end of the ``async with`` block.
        caps: the guest's capabilities; QEMU has all.
        filter: a filter string that the guest sends after its hello packet.
        paused: send the hello packet only in :meth:`resume`.
        max_transfer: the engine's limit for one transfer, in bytes.
        capture: records the transfers for Wireshark; None: nothing does.
        timeout: seconds to wait for a reply until :class:`GuestTimeoutError` is raised; None: no limit.

    Attributes:
        redirection: the engine.
        events: the events of the engine.
        received: the packets of the engine.
        connected: the engine's device_connect packet; None while no device is plugged in.
        interfaces, endpoints: the engine's last interface_info and ep_info packets; None while no device is plugged in.
        violations: packets that the engine must not send: packets that the C parser would drop, replies without a
            request, replies out of order (QEMU would abort).
        faults: violations of the device's contract: exceptions that the device raised, in a call or in a callback or
            task of the event loop; a transfer that it completed twice; descriptors that the USB specification does not
            allow (found by :meth:`enumerate`).

    The ``async with`` block raises the first fault or violation when it ends. A test that provokes a fault clears the
    list: ``guest.faults.clear()``.
    """

    def __init__(
        self,
        device: Device | None = None,
        *,
        caps: Cap = ALL_CAPS,
        filter: str | None = None,
        paused: bool = False,
        max_transfer: int = 16 * 2**20,
        timeout: float | None = 5,
        capture: Recording | None = None,
    ) -> None:
        self.device = device
        self.timeout = timeout
        self.events: list[PortEvent] = []
        self.connected: packets.DeviceConnect | None = None
        self.interfaces: packets.InterfaceInfo | None = None
        self.endpoints: packets.EndpointInfo | None = None
        self.received: list[packets.Packet] = []
        self.violations: list[Violation] = []
        self.faults: list[Exception] = []
        host_end, self._end = memory_ports()
        self.redirection = Redirection(host_end, self._happened, max_transfer=max_transfer)
        if capture is not None:
            self.redirection.observer = capture.port(0)
        self._connection = Connection(Role.GUEST, caps=caps)
        self._filter = filter
        self._paused = paused
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._configuration = 0
        self._order: dict[int, deque[int]] = {}
        self._unanswered: Counter[int] = Counter()
        self._changed = asyncio.Event()
        self._streams: dict[tuple[type, int], asyncio.Queue[packets.Packet]] = {}
        self._receptions: dict[int, _Reception] = {}
        self.closed = False

    async def __aenter__(self) -> Self:
        if self._paused and self.device is not None:
            raise ValueError("a paused guest cannot have a device: attach the device to guest.redirection later")
        loop = asyncio.get_running_loop()
        self._handler_before = loop.get_exception_handler()
        loop.set_exception_handler(self._raised_on_the_loop)
        try:
            await self._end.open(self)
            await self.redirection.open()
            if not self._paused:
                self.resume()
            if self.device is not None:
                await self._in_time(self.redirection.attach(self.device), "the device was not opened")
                await self.wait(lambda: self.connected is not None)
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()
        faults = [*self.faults, *(violation.error for violation in self.violations)]
        if error is None and faults:
            error = faults.pop(0)
            _add_notes(error, faults)
            raise error
        if isinstance(error, Exception):
            _add_notes(error, faults)

    async def _leave(self) -> None:
        try:
            await self._in_time(self.redirection.close(), "the device was not closed")
        finally:
            await self._end.close()
            asyncio.get_running_loop().set_exception_handler(self._handler_before)

    async def _in_time(self, doing: Coroutine[Any, Any, None], complaint: str) -> None:
        """Await a coroutine that a device may never end. After a timeout, cancel it without waiting for its end."""
        task = asyncio.ensure_future(doing)
        try:
            await asyncio.wait([task], timeout=self.timeout)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise self._timed_out(complaint)
        task.result()

    def _timed_out(self, complaint: str) -> GuestTimeoutError:
        names = [_name(pending.packet) for pending in self._pending.values()]
        return GuestTimeoutError(f"{complaint} within {self.timeout:g} s; pending: {', '.join(names) or 'no transfer'}")

    def _raised_on_the_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Record the exception of a callback or a task: a device that completes transfers later raises there."""
        if isinstance(error := context.get("exception"), Exception):
            self.faults.append(error)
            self._changed.set()
        if self._handler_before is not None:
            self._handler_before(loop, context)
        else:
            loop.default_exception_handler(context)

    # Packets ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Send the hello packet, as a VM that runs does."""
        self._connection.start()
        self._flush()

    def send(self, *packets: packets.Packet) -> None:
        """Send packets that the protocol allows a guest to send."""
        for packet in packets:
            self._connection.send(packet)
            if isinstance(packet, _REQUESTS):
                self._unanswered[packet.id] += 1
        self._flush()

    def send_bytes(self, data: bytes) -> None:
        """Send any bytes."""
        self._end.write([data])

    def request(self, packet: packets.Packet) -> Pending:
        """Send a packet that has a reply with the same id; await the result for the reply."""
        if packet.id in self._pending:
            raise ValueError(f"id {packet.id:x} is in use")
        future: asyncio.Future[packets.Packet] = asyncio.get_running_loop().create_future()
        pending = self._pending[packet.id] = Pending(self, packet, future)
        if isinstance(packet, (packets.BulkPacket, packets.ControlPacket, packets.InterruptPacket)):
            stream_id = packet.stream_id if isinstance(packet, packets.BulkPacket) else 0
            if not stream_id:
                self._order.setdefault(_queue(packet.endpoint), deque()).append(packet.id)
        self.send(packet)
        return pending

    def new_id(self) -> int:
        """Return an id that was not used before."""
        return next(self._ids)

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true; it is checked after each packet and event of the engine."""
        try:
            async with asyncio.timeout(self.timeout):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise self._timed_out("the condition of the test did not become true") from None

    def _happened(self, event: PortEvent) -> None:
        self.events.append(event)
        match event:
            case DeviceFault(error=error) | DeviceReport(event=FunctionRaised(error=error)):
                self.faults.append(error)
        self._changed.set()

    # Operations of a guest's driver -------------------------------------------------------------------------------

    async def enumerate(self, configuration: int | None = None) -> None:
        """Enumerate the device as Linux does: reset it, read its descriptors, set a configuration (default: the first).

        Violations of the USB specification in the descriptors are added to :attr:`faults`.
        """
        self.reset()
        device = DeviceDescriptor.parse(await self.get_descriptor(DescriptorType.DEVICE, length=18))
        head = await self.get_descriptor(DescriptorType.CONFIGURATION, length=9)
        total = int.from_bytes(head[2:4], "little")
        descriptor = ConfigurationDescriptor.parse(
            await self.get_descriptor(DescriptorType.CONFIGURATION, length=total)
        )
        speed = self.connected.speed if self.connected is not None else 0xFF
        known = speed in list(Speed)  # 255: unknown
        for fault in (*device.warnings, *(configuration_faults(descriptor, Speed(speed)) if known else ())):
            self.faults.append(DeviceError(fault, reason=Reason.DEVICE_FAULT))
        await self.set_configuration(descriptor.value if configuration is None else configuration)

    def reset(self) -> None:
        """Reset the port. A reset has no reply."""
        self._configuration = 0
        self._receptions.clear()
        self.send(packets.Reset())

    async def set_configuration(self, value: int) -> None:
        """Set the configuration. Raises :class:`TransferFailed`."""
        request = self.request(packets.SetConfiguration(id=self.new_id(), configuration=value))
        reply = await _reply(request, packets.ConfigurationStatus)
        self._check(request, reply.status)
        self._configuration = reply.configuration
        self._receptions.clear()

    async def set_interface(self, number: int, alternate: int) -> None:
        """Set the alternate setting of an interface. Raises :class:`TransferFailed`."""
        request = self.request(packets.SetAltSetting(id=self.new_id(), interface=number, alt=alternate))
        self._check(request, (await _reply(request, packets.AltSettingStatus)).status)
        entries = self.endpoints.endpoints if self.endpoints is not None else ()
        for index, entry in enumerate(entries):
            if entry.interface == number or entry.type == _NO_ENDPOINT:
                self._receptions.pop(packets.endpoint_address(index), None)

    async def allocate_streams(self, endpoints: Iterable[int], count: int) -> None:
        """Allocate the streams 1 to ``count`` of bulk endpoints; 0 frees them. Raises :class:`TransferFailed`."""
        mask = sum(1 << packets.endpoint_index(endpoint) for endpoint in set(endpoints))
        next_status = self.stream(packets.BulkStreamsStatus, 0)
        self.send(
            packets.AllocBulkStreams(endpoints=mask, streams=count)
            if count
            else packets.FreeBulkStreams(endpoints=mask)
        )
        status = (await next_status()).status
        if status != Status.SUCCESS:
            raise TransferFailed("allocation of bulk streams", Status(status))

    async def control_in(self, setup: Setup) -> bytes:
        """Make a control transfer with an IN data stage, and return the data. Raises :class:`TransferFailed`."""
        request = self.request(packets.ControlPacket.of(self.new_id(), setup, b""))
        reply = await _reply(request, packets.ControlPacket)
        self._check(request, reply.status, reply.data)
        return bytes(reply.data)

    async def control_out(self, setup: Setup, data: Buffer = b"") -> None:
        """Make a control transfer with an OUT data stage, or none. Raises :class:`TransferFailed`."""
        request = self.request(packets.ControlPacket.of(self.new_id(), setup, data))
        reply = await _reply(request, packets.ControlPacket)
        self._check(request, reply.status, actual=reply.length)

    async def get_descriptor(self, type: DescriptorType, index: int = 0, *, language: int = 0, length: int) -> bytes:
        """Read a descriptor. Raises :class:`TransferFailed`."""
        return await self.control_in(
            Setup(Direction.IN, StandardRequest.GET_DESCRIPTOR, type << 8 | index, language, length)
        )

    async def clear_halt(self, endpoint: int) -> None:
        """Send CLEAR_FEATURE(ENDPOINT_HALT). Raises :class:`TransferFailed`."""
        await self.control_out(Setup(0x02, StandardRequest.CLEAR_FEATURE, Feature.ENDPOINT_HALT, endpoint))

    async def bulk_in(self, endpoint: int, length: int, *, stream_id: int = 0) -> bytes:
        """Read at most ``length`` bytes. Raises :class:`TransferFailed`."""
        request = self.submit_in(endpoint, length, stream_id=stream_id)
        reply = await _reply(request, packets.BulkPacket)
        self._check(request, reply.status, reply.data)
        return bytes(reply.data)

    async def bulk_out(self, endpoint: int, data: Buffer, *, stream_id: int = 0) -> int:
        """Write, and return the number of bytes that the device accepted. Raises :class:`TransferFailed`."""
        request = self.submit_out(endpoint, data, stream_id=stream_id)
        reply = await _reply(request, packets.BulkPacket)
        self._check(request, reply.status, actual=reply.length)
        return reply.length

    def submit_in(self, endpoint: int, length: int, *, stream_id: int = 0) -> Pending:
        """Begin to read; the reply is a :class:`~farplug.usbredir.packets.BulkPacket`."""
        return self.request(
            packets.BulkPacket(
                id=self.new_id(), endpoint=endpoint, status=Status.SUCCESS, length=length, stream_id=stream_id
            )
        )

    def submit_out(self, endpoint: int, data: Buffer, *, stream_id: int = 0) -> Pending:
        """Begin to write; the reply is a :class:`~farplug.usbredir.packets.BulkPacket`."""
        return self.request(
            packets.BulkPacket(
                id=self.new_id(),
                endpoint=endpoint,
                status=Status.SUCCESS,
                length=len(data),
                stream_id=stream_id,
                data=data,
            )
        )

    async def interrupt_out(self, endpoint: int, data: Buffer) -> None:
        """Write one interrupt packet. Raises :class:`TransferFailed`."""
        packet = packets.InterruptPacket(
            id=self.new_id(), endpoint=endpoint, status=Status.SUCCESS, length=len(data), data=data
        )
        request = self.request(packet)
        reply = await _reply(request, packets.InterruptPacket)
        self._check(request, reply.status, actual=reply.length)

    async def interrupt_in(self, endpoint: int) -> bytes:
        """Return the next packet of an interrupt IN endpoint, and start to receive from it if that has not begun.

        A device sends such packets without a request for each; between two calls they are queued.

        Raises:
            TransferFailed: the device does not send on the endpoint, it reported an error, or the reception ended.
        """
        return await self._next_packet(endpoint, TransferType.INTERRUPT)

    async def iso_in(self, endpoint: int) -> bytes:
        """Return the next packet of an isochronous IN endpoint, as :meth:`interrupt_in` does."""
        return await self._next_packet(endpoint, TransferType.ISOCHRONOUS)

    async def iso_out(self, endpoint: int, data: Buffer) -> None:
        """Send one packet to an isochronous OUT endpoint, and start the stream if that has not begun. It has no answer.

        Raises :class:`TransferFailed` if the stream cannot be started.
        """
        await self.start_receiving(endpoint, TransferType.ISOCHRONOUS)
        id = self.new_id()
        self.send(
            packets.IsoPacket(id=id, endpoint=endpoint, status=Status.SUCCESS, length=len(data), data=bytes(data))
        )

    async def stop_receiving(self, endpoint: int) -> None:
        """Stop to receive from an interrupt IN or isochronous endpoint; drop the packets that were not read."""
        reception = self._receptions.get(endpoint)
        if reception is None:
            return
        isochronous = reception.type is TransferType.ISOCHRONOUS
        self.send(
            packets.StopIsoStream(endpoint=endpoint)
            if isochronous
            else packets.StopInterruptReceiving(endpoint=endpoint)
        )
        while not isinstance(await self._from(reception.packets, endpoint), _RECEPTION_STATUS):
            pass
        self._receptions.pop(endpoint, None)

    async def _next_packet(self, endpoint: int, type: TransferType) -> bytes:
        await self.start_receiving(endpoint, type)
        packet = await self._from(self._receptions[endpoint].packets, endpoint)
        assert isinstance(packet, (packets.InterruptPacket, packets.IsoPacket, *_RECEPTION_STATUS))
        if isinstance(packet, _RECEPTION_STATUS):
            if packet.status == Status.STALL:
                self._receptions.pop(endpoint, None)
            raise TransferFailed(f"reception on endpoint {endpoint:02x}", Status(packet.status))
        if packet.status != Status.SUCCESS:
            raise TransferFailed(f"packet of endpoint {endpoint:02x}", Status(packet.status), bytes(packet.data))
        return bytes(packet.data)

    async def start_receiving(self, endpoint: int, type: TransferType = TransferType.INTERRUPT) -> None:
        """Start to receive from an endpoint that does not receive, without waiting for a packet.

        Raises :class:`TransferFailed`.
        """
        if endpoint in self._receptions:
            return
        reception = self._receptions[endpoint] = _Reception(type)
        start: packets.Packet
        if type is TransferType.ISOCHRONOUS:
            start = packets.StartIsoStream(endpoint=endpoint, packets_per_urb=8, urbs=2)
        else:
            start = packets.StartInterruptReceiving(endpoint=endpoint)
        self.send(start)
        status = await self._from(reception.packets, endpoint)
        assert isinstance(status, _RECEPTION_STATUS)
        if status.status != Status.SUCCESS:
            self._receptions.pop(endpoint, None)
            name = f"start of the reception on endpoint {endpoint:02x}"
            raise TransferFailed(name, Status(status.status), hint=self._endpoint_hint(endpoint))

    async def _from(self, queue: asyncio.Queue[packets.Packet], endpoint: int) -> packets.Packet:
        try:
            async with asyncio.timeout(self.timeout):
                return await queue.get()
        except TimeoutError:
            raise self._timed_out(f"no packet arrived on endpoint {endpoint:02x}") from None

    def stream(self, kind: type[_Reply], endpoint: int) -> Callable[[], Awaitable[_Reply]]:
        """Return a coroutine function for the packets about an endpoint that are not replies, in order.

        Such packets are the data and the status of interrupt IN, isochronous and buffered bulk endpoints. Each call of
        the function returns the next one.
        """
        queue = self._stream(kind, endpoint)

        async def next_packet() -> _Reply:
            try:
                async with asyncio.timeout(self.timeout):
                    packet = await queue.get()
            except TimeoutError:
                raise self._timed_out(f"no {kind.__name__} arrived for endpoint {endpoint:02x}") from None
            assert isinstance(packet, kind)
            return packet

        return next_packet

    def _stream(self, kind: type, endpoint: int) -> asyncio.Queue[packets.Packet]:
        return self._streams.setdefault((kind, endpoint), asyncio.Queue())

    def _check(self, request: Pending, status: int, data: Buffer = b"", actual: int | None = None) -> None:
        if status == Status.SUCCESS:
            return
        hint = self._hint(request.packet) if status == Status.INVALID else ""
        length = len(data) if actual is None else actual
        raise TransferFailed(_name(request.packet), Status(status), bytes(data), length, hint) from request.fault

    def _hint(self, packet: packets.Packet) -> str:
        """Return why a transfer is invalid, as far as the guest knows; an empty text otherwise."""
        if not isinstance(packet, (packets.BulkPacket, packets.InterruptPacket)):
            return ""
        return self._endpoint_hint(packet.endpoint)

    def _endpoint_hint(self, endpoint: int) -> str:
        if not self._configuration:
            return "the device is not configured: call enumerate() first"
        entries = self.endpoints.endpoints if self.endpoints is not None else ()
        there = [packets.endpoint_address(index) for index, entry in enumerate(entries) if entry.type != _NO_ENDPOINT]
        if endpoint not in there:
            names = ", ".join(f"{address:02x}" for address in there if address & 0x0F)
            return f"the current setting has no such endpoint, only {names or 'endpoint 0'}"
        return ""

    # PortListener -------------------------------------------------------------------------------------------------

    def data_received(self, data: memoryview, more: bool = False) -> None:
        """Parse the engine's data, and reply to its packets as QEMU does."""
        self._connection.receive_data(data)
        while (event := self._connection.next_event()) is not None:
            if isinstance(event, Violation):
                self.violations.append(event)
            elif isinstance(event, packets.Packet):
                self._packet_received(event)
        self._flush()
        self._changed.set()

    def _packet_received(self, packet: packets.Packet) -> None:
        self.received.append(packet)
        match packet:
            case packets.Hello():
                if self._filter is not None:
                    self.send(packets.FilterFilter(filter=self._filter))
            case packets.InterfaceInfo():
                self.interfaces = packet
            case packets.EndpointInfo():
                self.endpoints = packet
            case packets.DeviceConnect():
                self.connected = packet
            case packets.DeviceDisconnect():
                # As QEMU does: reset the state, then acknowledge.
                self.connected = self.interfaces = self.endpoints = None
                self._receptions.clear()
                self._configuration = 0
                for pending in self._pending.values():
                    pending._future.cancel()
                self._pending.clear()
                self._order.clear()
                if self._connection.own_caps & Cap.DEVICE_DISCONNECT_ACK:
                    self.send(packets.DeviceDisconnectAck())
            case _ if isinstance(packet, _REPLIES) and not _streamed(packet):
                self._reply_received(packet)
            case _:
                endpoint: int = getattr(packet, "endpoint", 0)
                reception = self._receptions.get(endpoint)
                queue = self._stream(type(packet), endpoint) if reception is None else reception.packets
                queue.put_nowait(packet)

    def _reply_received(self, packet: packets.Packet) -> None:
        self._unanswered[packet.id] -= 1
        if self._unanswered[packet.id] < 0:
            self._violate(packet, "a second reply, or a reply without a request")
            return
        if isinstance(packet, (packets.BulkPacket, packets.ControlPacket, packets.InterruptPacket)):
            order = self._order.get(_queue(packet.endpoint), deque())
            if packet.id in order:
                # QEMU: assert(p->stream || QTAILQ_FIRST(&ep->queue) == p), cancelled packets excepted.
                if packet.status != Status.CANCELLED and order[0] != packet.id:
                    self._violate(packet, "a reply out of order: QEMU would abort")
                order.remove(packet.id)
        pending = self._pending.pop(packet.id, None)
        if pending is not None and not pending.done:
            pending._future.set_result(packet)

    def _violate(self, packet: packets.Packet, what: str) -> None:
        self.violations.append(Violation(RemoteProtocolError(f"{what}: {packet}"), packet.TYPE, packet.id))

    def pause_writing(self) -> None:
        """Do nothing: the queue in memory is not bounded."""

    def resume_writing(self) -> None:
        """Do nothing: the queue in memory is not bounded."""

    def port_closed(self, error: FarplugError | None) -> None:
        """Fail all pending transfers: the engine closed the port."""
        self.closed = True
        for pending in self._pending.values():
            if not pending.done:
                pending._future.set_exception(error or GuestGoneError("the port was closed"))
                pending._future.exception()
        self._changed.set()

    def _flush(self) -> None:
        self._end.write(self._connection.data_to_send())


def _streamed(packet: packets.Packet) -> bool:
    """Return whether the engine chose the packet's id, so that the packet is not a reply."""
    return isinstance(packet, (packets.BufferedBulkPacket, packets.IsoPacket)) or (
        isinstance(packet, packets.InterruptPacket) and packet.endpoint & 0x80 != 0
    )


def _queue(endpoint: int) -> int:
    return endpoint if endpoint & 0x0F else 0


async def _reply(request: Pending, kind: type[_Reply]) -> _Reply:
    reply = await request
    assert isinstance(reply, kind), reply
    return reply


def _name(packet: packets.Packet) -> str:
    """Return the name of a request in USB terms."""
    match packet:
        case packets.BulkPacket():
            stream = f", stream {packet.stream_id}" if packet.stream_id else ""
            return f"bulk transfer on endpoint {packet.endpoint:02x}, {packet.length} bytes{stream}"
        case packets.InterruptPacket():
            return f"interrupt transfer on endpoint {packet.endpoint:02x}, {packet.length} bytes"
        case packets.ControlPacket():
            setup = Setup(packet.request_type, packet.request, packet.value, packet.index, packet.length)
            return f"control transfer {setup}"
        case packets.SetConfiguration():
            return f"request for configuration {packet.configuration}"
        case packets.SetAltSetting():
            return f"request for alternate setting {packet.alt} of interface {packet.interface}"
        case _:
            return f"request {type(packet).__name__}"


def _add_notes(error: Exception, faults: Iterable[Exception]) -> None:
    """Add other faults of the device to an exception, as notes."""
    for fault in dict.fromkeys(faults):
        if fault is not error and fault is not error.__cause__:
            error.add_note(f"another fault of the device: {''.join(traceback.format_exception_only(fault)).strip()}")
