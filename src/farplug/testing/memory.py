"""A guest without a VM: drives any :class:`~farplug.usb.device.Device` through the whole stack, in memory.

It speaks the usb-guest role of usbredir to a real :class:`~farplug.redirection.Redirection`, so a device is exercised
as QEMU would exercise it, in microseconds::

    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        await guest.bulk_out(0x02, b"hello")
        assert await guest.bulk_in(0x81, 512) == b"hello"
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from farplug.errors import FarplugError, GuestGoneError, RemoteProtocolError
from farplug.redirection import Redirection
from farplug.redirection.events import PortEvent
from farplug.transport.memory import memory_ports
from farplug.usb.device import Device
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, DescriptorType, Direction, Feature, Request, Setup
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Role, Violation

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


class TransferFailed(Exception):
    """A transfer ended with another status than success.

    Attributes:
        status: which.
        data: IN: the bytes that arrived all the same.
        actual: how many bytes moved.
    """

    def __init__(self, status: Status, data: bytes = b"", actual: int = 0) -> None:
        super().__init__(f"the transfer ended with status {status} after {actual} bytes")
        self.status = status
        self.data = data
        self.actual = actual


class Pending:
    """A transfer that was submitted: await it for its answer, or cancel it."""

    def __init__(self, guest: MemoryGuest, id: int, future: asyncio.Future[p.Packet]) -> None:
        self.id = id
        self._guest = guest
        self._future = future

    def __await__(self) -> Any:
        return self._future.__await__()

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self._future.done()

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

    Attributes:
        redirection: the engine.
        events: what it told.
        connected: what the device said it is; None while it is not plugged in.
        interfaces, endpoints: the guest's picture of the current setting.
        violations: what the engine said that it must not: packets that the C parser would drop, answers that nobody
            asked for, answers out of order (QEMU would abort). The ``async with`` block ends with the first of them.
    """

    def __init__(
        self,
        device: Device | None = None,
        *,
        caps: Cap = ALL_CAPS,
        filter: str | None = None,
        paused: bool = False,
        max_transfer: int = 16 * 2**20,
    ) -> None:
        self.device = device
        self.events: list[PortEvent] = []
        self.connected: p.DeviceConnect | None = None
        self.interfaces: p.InterfaceInfo | None = None
        self.endpoints: p.EndpointInfo | None = None
        self.received: list[p.Packet] = []
        self.violations: list[Violation] = []
        host_end, self._end = memory_ports()
        self.redirection = Redirection(host_end, self._happened, max_transfer=max_transfer)
        self._connection = Connection(Role.GUEST, caps=caps)
        self._filter = filter
        self._paused = paused
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[p.Packet]] = {}
        self._order: dict[int, deque[int]] = {}
        self._owed: Counter[int] = Counter()
        self._changed = asyncio.Event()
        self._streams: dict[tuple[type, int], asyncio.Queue[p.Packet]] = {}
        self.closed = False

    async def __aenter__(self) -> Self:
        await self._end.open(self)
        await self.redirection.open()
        if not self._paused:
            self.resume()
        if self.device is not None:
            if self._paused:
                raise ValueError("a paused guest takes no device: attach it to guest.redirection yourself")
            await self.redirection.attach(self.device)
            await self.wait(lambda: self.connected is not None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.redirection.close()
        await self._end.close()
        if self.violations and kind is None:
            raise self.violations[0].error

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
        self._pending[packet.id] = future
        if isinstance(packet, (p.BulkPacket, p.ControlPacket, p.InterruptPacket)):
            stream_id = packet.stream_id if isinstance(packet, p.BulkPacket) else 0
            if not stream_id:
                self._order.setdefault(_queue(packet.endpoint), deque()).append(packet.id)
        self.send(packet)
        return Pending(self, packet.id, future)

    def new_id(self) -> int:
        """An id that was not used before."""
        return next(self._ids)

    async def wait(self, condition: Callable[[], bool], timeout: float = 5) -> None:
        """Wait until something that the engine said makes ``condition`` true."""
        async with asyncio.timeout(timeout):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _happened(self, event: PortEvent) -> None:
        self.events.append(event)
        self._changed.set()

    # What a guest's driver does -----------------------------------------------------------------------------------

    async def enumerate(self, configuration: int | None = None) -> None:
        """Do as Linux does with a new device: reset it, read its descriptors, choose a configuration (the first)."""
        self.reset()
        await self.get_descriptor(DescriptorType.DEVICE, length=18)
        head = await self.get_descriptor(DescriptorType.CONFIGURATION, length=9)
        total = int.from_bytes(head[2:4], "little")
        await self.get_descriptor(DescriptorType.CONFIGURATION, length=total)
        await self.set_configuration(head[5] if configuration is None else configuration)

    def reset(self) -> None:
        """Reset the port. Nobody answers that."""
        self.send(p.Reset())

    async def set_configuration(self, value: int) -> None:
        """Choose a configuration. Raises :class:`TransferFailed`."""
        answer = await self._ask(p.SetConfiguration(id=self.new_id(), configuration=value), p.ConfigurationStatus)
        _check(answer.status)

    async def set_interface(self, number: int, alternate: int) -> None:
        """Choose an alternate setting. Raises :class:`TransferFailed`."""
        answer = await self._ask(p.SetAltSetting(id=self.new_id(), interface=number, alt=alternate), p.AltSettingStatus)
        _check(answer.status)

    async def allocate_streams(self, endpoints: Iterable[int], count: int) -> None:
        """Give bulk endpoints streams, 1 to ``count``; 0 frees them. Raises :class:`TransferFailed`."""
        mask = sum(1 << p.endpoint_index(endpoint) for endpoint in set(endpoints))
        answered = self.stream(p.BulkStreamsStatus, 0)
        self.send(p.AllocBulkStreams(endpoints=mask, streams=count) if count else p.FreeBulkStreams(endpoints=mask))
        _check((await answered()).status)

    async def control_in(self, setup: Setup) -> bytes:
        """A control transfer whose data stage comes from the device. Raises :class:`TransferFailed`."""
        answer = await self._ask(self._control_packet(setup, b""), p.ControlPacket)
        _check(answer.status, answer.data)
        return bytes(answer.data)

    async def control_out(self, setup: Setup, data: Buffer = b"") -> None:
        """A control transfer whose data stage, if any, goes to the device. Raises :class:`TransferFailed`."""
        answer = await self._ask(self._control_packet(setup, data), p.ControlPacket)
        _check(answer.status, actual=answer.length)

    async def get_descriptor(self, type: DescriptorType, index: int = 0, *, language: int = 0, length: int) -> bytes:
        """Read a descriptor. Raises :class:`TransferFailed`."""
        return await self.control_in(Setup(Direction.IN, Request.GET_DESCRIPTOR, type << 8 | index, language, length))

    async def clear_halt(self, endpoint: int) -> None:
        """CLEAR_FEATURE(ENDPOINT_HALT). Raises :class:`TransferFailed`."""
        await self.control_out(Setup(0x02, Request.CLEAR_FEATURE, Feature.ENDPOINT_HALT, endpoint))

    async def bulk_in(self, endpoint: int, length: int, *, stream_id: int = 0) -> bytes:
        """Read at most ``length`` bytes. Raises :class:`TransferFailed`."""
        answer = await self.submit_in(endpoint, length, stream_id=stream_id)
        assert isinstance(answer, p.BulkPacket)
        _check(answer.status, answer.data)
        return bytes(answer.data)

    async def bulk_out(self, endpoint: int, data: Buffer, *, stream_id: int = 0) -> int:
        """Write; how many bytes the device took. Raises :class:`TransferFailed`."""
        answer = await self.submit_out(endpoint, data, stream_id=stream_id)
        assert isinstance(answer, p.BulkPacket)
        _check(answer.status, actual=answer.length)
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
        answer = await self._ask(packet, p.InterruptPacket)
        _check(answer.status, actual=answer.length)

    def stream(self, kind: type[_Answer], endpoint: int) -> Callable[[], Awaitable[_Answer]]:
        """What the engine says by itself about an endpoint (data of a reception, its status), in order."""
        queue = self._stream(kind, endpoint)

        async def next_packet() -> _Answer:
            async with asyncio.timeout(5):
                packet = await queue.get()
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

    async def _ask(self, packet: p.Packet, kind: type[_Answer]) -> _Answer:
        answer = await self.request(packet)
        assert isinstance(answer, kind), answer
        return answer

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
                for future in self._pending.values():
                    future.cancel()
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
        future = self._pending.pop(packet.id, None)
        if future is not None and not future.done():
            future.set_result(packet)

    def _violate(self, packet: p.Packet, what: str) -> None:
        self.violations.append(Violation(RemoteProtocolError(f"{what}: {packet}"), packet.TYPE, packet.id))

    def pause_writing(self) -> None:
        """Memory takes everything."""

    def resume_writing(self) -> None:
        """Memory takes everything."""

    def port_closed(self, error: FarplugError | None) -> None:
        """The engine closed the port: nothing is answered any more."""
        self.closed = True
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error or GuestGoneError("the port was closed"))
                future.exception()
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


def _check(status: int, data: Buffer = b"", actual: int | None = None) -> None:
    if status != Status.SUCCESS:
        raise TransferFailed(Status(status), bytes(data), len(data) if actual is None else actual)
