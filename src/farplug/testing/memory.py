"""A guest without a VM: drives any :class:`~farplug.usb.device.Device` through the whole stack, in memory.

It takes the usb-guest role of usbredir against a real :class:`~farplug.redirection.Redirection`, so that a device is
exercised as QEMU would exercise it, in microseconds::

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

from farplug.errors import DeviceError, FarplugError, GuestGoneError, Reason, RemoteProtocolError
from farplug.redirection import Redirection
from farplug.redirection.events import DeviceFault, DeviceReport, PortEvent
from farplug.transport.memory import memory_ports
from farplug.usb.conformance import configuration_faults
from farplug.usb.descriptors import ConfigurationDescriptor, DeviceDescriptor
from farplug.usb.device import Device
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, DescriptorType, Direction, Feature, Setup, Speed, StandardRequest
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Role, Violation
from farplug.virtual.events import FunctionRaised

_Answer = TypeVar("_Answer", bound=p.Packet)

_ASKS = (
    p.BulkPacket,
    p.ControlPacket,
    p.InterruptPacket,
    p.SetConfiguration,
    p.GetConfiguration,
    p.SetAltSetting,
    p.GetAltSetting,
)
_ANSWERS = (p.BulkPacket, p.ControlPacket, p.InterruptPacket, p.ConfigurationStatus, p.AltSettingStatus)
_NO_ENDPOINT = 0xFF
"""The type of an endpoint that the current setting does not have (usb_redir_type_invalid)."""


class TransferFailed(Exception):
    """A transfer ended with another status than success. If the device raised, that exception is the ``__cause__``.

    Attributes:
        status: how the transfer ended.
        data: IN: the bytes that arrived all the same.
        actual: how many bytes moved.
    """

    def __init__(self, name: str, status: Status, data: bytes = b"", actual: int = 0, hint: str = "") -> None:
        super().__init__(f"the {name} ended with status {status} after {actual} bytes{hint and f': {hint}'}")
        self.status = status
        self.data = data
        self.actual = actual


class GuestTimeoutError(TimeoutError):
    """The device or the engine did not do in time what the guest waits for. The message names what is pending."""


class Pending:
    """A transfer that was submitted: await it for its answer, or cancel it.

    Attributes:
        id: the packet's id.
        packet: the request.
    """

    def __init__(self, guest: MemoryGuest, packet: p.Packet, future: asyncio.Future[p.Packet]) -> None:
        self.id = packet.id
        self.packet = packet
        self._guest = guest
        self._future = future
        self._faults_before = len(guest.faults)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()

    async def _answer(self) -> p.Packet:
        if not self._future.done():
            await asyncio.wait([self._future], timeout=self._guest.timeout)  # the transfer goes on after that
            if not self._future.done():
                raise self._guest._timed_out(f"the {_name(self.packet)} was not completed")
        return self._future.result()

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self._future.done()

    @property
    def fault(self) -> Exception | None:
        """The last exception that the device raised since the transfer was submitted."""
        faults = self._guest.faults[self._faults_before :]
        return faults[-1] if faults else None

    def cancel(self) -> None:
        """Take the transfer back, as a guest's driver does; its answer still comes."""
        self._guest.send(p.CancelDataPacket(id=self.id))


class MemoryGuest:
    """A guest with one device in its port.

    Args:
        device: what to plug in. It is unplugged at the end of the ``async with`` block.
        caps: what the guest announces; QEMU announces everything.
        filter: a filter string that the guest sends after its hello.
        paused: say hello only when :meth:`resume` is called.
        max_transfer: the engine's bound for one transfer, in bytes.
        timeout: seconds that the guest waits for an answer before it raises :class:`GuestTimeoutError`; None for ever.

    Attributes:
        redirection: the engine.
        events: what the engine reported.
        connected: what the device said it is; None while it is not plugged in.
        interfaces, endpoints: the guest's picture of the current setting.
        violations: packets that the engine must not send: those that the C parser would drop, answers that nobody
            asked for, answers out of order (QEMU would abort).
        faults: what the device did against its contract: exceptions that it raised, in a call or in a callback or task
            of the event loop; a transfer that it completed twice; descriptors that the USB specification does not allow
            (found by :meth:`enumerate`).

    The ``async with`` block ends with the first fault or violation as its exception. A test that provokes one empties
    the list: ``guest.faults.clear()``.
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
    ) -> None:
        self.device = device
        self.timeout = timeout
        self.events: list[PortEvent] = []
        self.connected: p.DeviceConnect | None = None
        self.interfaces: p.InterfaceInfo | None = None
        self.endpoints: p.EndpointInfo | None = None
        self.received: list[p.Packet] = []
        self.violations: list[Violation] = []
        self.faults: list[Exception] = []
        host_end, self._end = memory_ports()
        self.redirection = Redirection(host_end, self._happened, max_transfer=max_transfer)
        self._connection = Connection(Role.GUEST, caps=caps)
        self._filter = filter
        self._paused = paused
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._configuration = 0
        self._order: dict[int, deque[int]] = {}
        self._owed: Counter[int] = Counter()
        self._changed = asyncio.Event()
        self._streams: dict[tuple[type, int], asyncio.Queue[p.Packet]] = {}
        self.closed = False

    async def __aenter__(self) -> Self:
        if self._paused and self.device is not None:
            raise ValueError("a paused guest takes no device: attach it to guest.redirection yourself")
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
        """Await what a device may never end; leave it alone then."""
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
        """Take the exception of a callback or a task: a device that completes its transfers later raises there."""
        if isinstance(error := context.get("exception"), Exception):
            self.faults.append(error)
            self._changed.set()
        if self._handler_before is not None:
            self._handler_before(loop, context)
        else:
            loop.default_exception_handler(context)

    # Talking ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Say hello: the VM runs."""
        self._connection.start()
        self._flush()

    def send(self, *packets: p.Packet) -> None:
        """Say anything the protocol allows a guest to say."""
        for packet in packets:
            self._connection.send(packet)
            if isinstance(packet, _ASKS):
                self._owed[packet.id] += 1
        self._flush()

    def send_bytes(self, data: bytes) -> None:
        """Say anything at all."""
        self._end.write([data])

    def request(self, packet: p.Packet) -> Pending:
        """Send a packet that has an answer; its id is the key. The answer is a packet."""
        if packet.id in self._pending:
            raise ValueError(f"id {packet.id:x} is in use")
        future: asyncio.Future[p.Packet] = asyncio.get_running_loop().create_future()
        pending = self._pending[packet.id] = Pending(self, packet, future)
        if isinstance(packet, (p.BulkPacket, p.ControlPacket, p.InterruptPacket)):
            stream_id = packet.stream_id if isinstance(packet, p.BulkPacket) else 0
            if not stream_id:
                self._order.setdefault(_queue(packet.endpoint), deque()).append(packet.id)
        self.send(packet)
        return pending

    def new_id(self) -> int:
        """An id that was not used before."""
        return next(self._ids)

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something that the engine sent or reported makes ``condition`` true."""
        try:
            async with asyncio.timeout(self.timeout):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise self._timed_out("what the test waits for did not happen") from None

    def _happened(self, event: PortEvent) -> None:
        self.events.append(event)
        match event:
            case DeviceFault(error=error) | DeviceReport(event=FunctionRaised(error=error)):
                self.faults.append(error)
        self._changed.set()

    # What a guest's driver does -----------------------------------------------------------------------------------

    async def enumerate(self, configuration: int | None = None) -> None:
        """Do as Linux does with a new device: reset it, read its descriptors, choose a configuration (the first).

        What the USB specification does not allow in the descriptors goes to :attr:`faults`.
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
        """Reset the port. Nobody answers that."""
        self._configuration = 0
        self.send(p.Reset())

    async def set_configuration(self, value: int) -> None:
        """Choose a configuration. Raises :class:`TransferFailed`."""
        request = self.request(p.SetConfiguration(id=self.new_id(), configuration=value))
        answer = await _answer(request, p.ConfigurationStatus)
        self._check(request, answer.status)
        self._configuration = answer.configuration

    async def set_interface(self, number: int, alternate: int) -> None:
        """Choose an alternate setting. Raises :class:`TransferFailed`."""
        request = self.request(p.SetAltSetting(id=self.new_id(), interface=number, alt=alternate))
        self._check(request, (await _answer(request, p.AltSettingStatus)).status)

    async def allocate_streams(self, endpoints: Iterable[int], count: int) -> None:
        """Give bulk endpoints streams, 1 to ``count``; 0 frees them. Raises :class:`TransferFailed`."""
        mask = sum(1 << p.endpoint_index(endpoint) for endpoint in set(endpoints))
        answered = self.stream(p.BulkStreamsStatus, 0)
        self.send(p.AllocBulkStreams(endpoints=mask, streams=count) if count else p.FreeBulkStreams(endpoints=mask))
        status = (await answered()).status
        if status != Status.SUCCESS:
            raise TransferFailed("allocation of bulk streams", Status(status))

    async def control_in(self, setup: Setup) -> bytes:
        """A control transfer whose data stage comes from the device. Raises :class:`TransferFailed`."""
        request = self.request(self._control_packet(setup, b""))
        answer = await _answer(request, p.ControlPacket)
        self._check(request, answer.status, answer.data)
        return bytes(answer.data)

    async def control_out(self, setup: Setup, data: Buffer = b"") -> None:
        """A control transfer whose data stage, if any, goes to the device. Raises :class:`TransferFailed`."""
        request = self.request(self._control_packet(setup, data))
        answer = await _answer(request, p.ControlPacket)
        self._check(request, answer.status, actual=answer.length)

    async def get_descriptor(self, type: DescriptorType, index: int = 0, *, language: int = 0, length: int) -> bytes:
        """Read a descriptor. Raises :class:`TransferFailed`."""
        return await self.control_in(
            Setup(Direction.IN, StandardRequest.GET_DESCRIPTOR, type << 8 | index, language, length)
        )

    async def clear_halt(self, endpoint: int) -> None:
        """CLEAR_FEATURE(ENDPOINT_HALT). Raises :class:`TransferFailed`."""
        await self.control_out(Setup(0x02, StandardRequest.CLEAR_FEATURE, Feature.ENDPOINT_HALT, endpoint))

    async def bulk_in(self, endpoint: int, length: int, *, stream_id: int = 0) -> bytes:
        """Read at most ``length`` bytes. Raises :class:`TransferFailed`."""
        request = self.submit_in(endpoint, length, stream_id=stream_id)
        answer = await _answer(request, p.BulkPacket)
        self._check(request, answer.status, answer.data)
        return bytes(answer.data)

    async def bulk_out(self, endpoint: int, data: Buffer, *, stream_id: int = 0) -> int:
        """Write; how many bytes the device took. Raises :class:`TransferFailed`."""
        request = self.submit_out(endpoint, data, stream_id=stream_id)
        answer = await _answer(request, p.BulkPacket)
        self._check(request, answer.status, actual=answer.length)
        return answer.length

    def submit_in(self, endpoint: int, length: int, *, stream_id: int = 0) -> Pending:
        """Begin to read; the answer is a :class:`~farplug.usbredir.packets.BulkPacket`."""
        return self.request(
            p.BulkPacket(id=self.new_id(), endpoint=endpoint, status=Status.SUCCESS, length=length, stream_id=stream_id)
        )

    def submit_out(self, endpoint: int, data: Buffer, *, stream_id: int = 0) -> Pending:
        """Begin to write; the answer is a :class:`~farplug.usbredir.packets.BulkPacket`."""
        return self.request(
            p.BulkPacket(
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
        packet = p.InterruptPacket(
            id=self.new_id(), endpoint=endpoint, status=Status.SUCCESS, length=len(data), data=data
        )
        request = self.request(packet)
        answer = await _answer(request, p.InterruptPacket)
        self._check(request, answer.status, actual=answer.length)

    def stream(self, kind: type[_Answer], endpoint: int) -> Callable[[], Awaitable[_Answer]]:
        """What the engine says by itself about an endpoint (data of a reception, its status), in order."""
        queue = self._stream(kind, endpoint)

        async def next_packet() -> _Answer:
            try:
                async with asyncio.timeout(self.timeout):
                    packet = await queue.get()
            except TimeoutError:
                raise self._timed_out(f"no {kind.__name__} came for endpoint {endpoint:02x}") from None
            assert isinstance(packet, kind)
            return packet

        return next_packet

    def _stream(self, kind: type, endpoint: int) -> asyncio.Queue[p.Packet]:
        return self._streams.setdefault((kind, endpoint), asyncio.Queue())

    def _control_packet(self, setup: Setup, data: Buffer) -> p.ControlPacket:
        return p.ControlPacket(
            id=self.new_id(),
            endpoint=setup.direction,
            request=setup.request,
            request_type=setup.request_type,
            status=Status.SUCCESS,
            value=setup.value,
            index=setup.index,
            length=setup.length,
            data=data,
        )

    def _check(self, request: Pending, status: int, data: Buffer = b"", actual: int | None = None) -> None:
        if status == Status.SUCCESS:
            return
        hint = self._hint(request.packet) if status == Status.INVALID else ""
        length = len(data) if actual is None else actual
        raise TransferFailed(_name(request.packet), Status(status), bytes(data), length, hint) from request.fault

    def _hint(self, packet: p.Packet) -> str:
        """Return why a device finds a transfer invalid, as far as the guest can tell."""
        if not isinstance(packet, (p.BulkPacket, p.InterruptPacket)):
            return ""
        if not self._configuration:
            return "the device is not configured: call enumerate() first"
        entries = self.endpoints.endpoints if self.endpoints is not None else ()
        there = [p.endpoint_address(index) for index, entry in enumerate(entries) if entry.type != _NO_ENDPOINT]
        if packet.endpoint not in there:
            names = ", ".join(f"{address:02x}" for address in there if address & 0x0F)
            return f"the current setting has no such endpoint, but {names or 'none'}"
        return ""

    # Listening (PortListener) -------------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:
        """What the engine says."""
        self._connection.receive_data(data)
        while (event := self._connection.next_event()) is not None:
            if isinstance(event, Violation):
                self.violations.append(event)
            elif isinstance(event, p.Packet):
                self._heard(event)
        self._flush()
        self._changed.set()

    def _heard(self, packet: p.Packet) -> None:
        self.received.append(packet)
        match packet:
            case p.Hello():
                if self._filter is not None:
                    self.send(p.FilterFilter(filter=self._filter))
            case p.InterfaceInfo():
                self.interfaces = packet
            case p.EndpointInfo():
                self.endpoints = packet
            case p.DeviceConnect():
                self.connected = packet
            case p.DeviceDisconnect():
                # As QEMU: a clean slate, then the acknowledgement.
                self.connected = self.interfaces = self.endpoints = None
                self._configuration = 0
                for pending in self._pending.values():
                    pending._future.cancel()
                self._pending.clear()
                self._order.clear()
                if self._connection.own_caps & Cap.DEVICE_DISCONNECT_ACK:
                    self.send(p.DeviceDisconnectAck())
            case _ if isinstance(packet, _ANSWERS) and not _streamed(packet):
                self._answered(packet)
            case _:
                self._stream(type(packet), getattr(packet, "endpoint", 0)).put_nowait(packet)

    def _answered(self, packet: p.Packet) -> None:
        self._owed[packet.id] -= 1
        if self._owed[packet.id] < 0:
            self._violate(packet, "answered twice, or never asked for")
            return
        if isinstance(packet, (p.BulkPacket, p.ControlPacket, p.InterruptPacket)):
            order = self._order.get(_queue(packet.endpoint), deque())
            if packet.id in order:
                # QEMU: assert(p->stream || QTAILQ_FIRST(&ep->queue) == p), cancelled packets excepted.
                if packet.status != Status.CANCELLED and order[0] != packet.id:
                    self._violate(packet, "answered out of order, QEMU would abort")
                order.remove(packet.id)
        pending = self._pending.pop(packet.id, None)
        if pending is not None and not pending.done:
            pending._future.set_result(packet)

    def _violate(self, packet: p.Packet, what: str) -> None:
        self.violations.append(Violation(RemoteProtocolError(f"{what}: {packet}"), packet.TYPE, packet.id))

    def pause_writing(self) -> None:
        """Memory takes everything."""

    def resume_writing(self) -> None:
        """Memory takes everything."""

    def port_closed(self, error: FarplugError | None) -> None:
        """The engine closed the port: nothing is answered any more."""
        self.closed = True
        for pending in self._pending.values():
            if not pending.done:
                pending._future.set_exception(error or GuestGoneError("the port was closed"))
                pending._future.exception()
        self._changed.set()

    def _flush(self) -> None:
        self._end.write(self._connection.data_to_send())


def _streamed(packet: p.Packet) -> bool:
    """Numbered by the engine: its id is no request's."""
    return isinstance(packet, (p.BufferedBulkPacket, p.IsoPacket)) or (
        isinstance(packet, p.InterruptPacket) and packet.endpoint & 0x80 != 0
    )


def _queue(endpoint: int) -> int:
    return endpoint if endpoint & 0x0F else 0


async def _answer(request: Pending, kind: type[_Answer]) -> _Answer:
    answer = await request
    assert isinstance(answer, kind), answer
    return answer


def _name(packet: p.Packet) -> str:
    """Return what a request is, in the words of USB."""
    match packet:
        case p.BulkPacket():
            stream = f", stream {packet.stream_id}" if packet.stream_id else ""
            return f"bulk transfer on endpoint {packet.endpoint:02x}, {packet.length} bytes{stream}"
        case p.InterruptPacket():
            return f"interrupt transfer on endpoint {packet.endpoint:02x}, {packet.length} bytes"
        case p.ControlPacket():
            setup = Setup(packet.request_type, packet.request, packet.value, packet.index, packet.length)
            return f"control transfer {setup}"
        case p.SetConfiguration():
            return f"request for configuration {packet.configuration}"
        case p.SetAltSetting():
            return f"request for alternate setting {packet.alt} of interface {packet.interface}"
        case _:
            return f"request {type(packet).__name__}"


def _add_notes(error: Exception, faults: Iterable[Exception]) -> None:
    """Name other faults of the device in an exception."""
    for fault in dict.fromkeys(faults):
        if fault is not error and fault is not error.__cause__:
            error.add_note(f"the device is at fault, too: {''.join(traceback.format_exception_only(fault)).strip()}")
