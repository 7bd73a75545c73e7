"""Fuzz the whole engine: a hostile guest on a port that several devices use, one after the other.

The guest sends requests, cancels, resets, settings, streams, receptions and damaged packets, with any capabilities; it
pauses, and the connection breaks. The devices are disks whose store is late, and a device that completes transfers in
any order, raises exceptions, and leaves.

Every request is answered exactly once, in order on its endpoint; the bounds of the engine hold; nothing is pending at
the end; and what the engine sends is accepted by our parser and by libusbredirparser, where that is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from tests.redirection.scripted import ScriptedDevice
from tests.usbredir import oracle
from tests.usbredir.oracle import Oracle

from farplug.app.guest_port import GuestPort
from farplug.errors import FarplugError, LocalProtocolError
from farplug.redirection import Redirection
from farplug.redirection.events import DeviceFault, PortEvent
from farplug.redirection.port_protocol import MAX_PENDING
from farplug.transport import memory
from farplug.transport.memory import MemoryPort
from farplug.usb import Reception, Speed, Status
from farplug.usb.share import MAX_MEMORY
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Oversized, Role, Violation
from farplug.usbredir.wire import PacketType
from farplug.virtual import StorageTransport, VirtualDevice, disk_device
from farplug.virtual.storage import MassStorage
from harness import counts, raise_logged, run
from late_store import LateStore

BLOCKS = 64
LIBRARY = oracle.load()
MAX_TRANSFERS = (1 << 24, 1 << 14)

ANSWERS: dict[type[p.Packet], type[p.Packet]] = {
    p.BulkPacket: p.BulkPacket,
    p.ControlPacket: p.ControlPacket,
    p.InterruptPacket: p.InterruptPacket,
    p.SetConfiguration: p.ConfigurationStatus,
    p.GetConfiguration: p.ConfigurationStatus,
    p.SetAltSetting: p.AltSettingStatus,
    p.GetAltSetting: p.AltSettingStatus,
    p.AllocBulkStreams: p.BulkStreamsStatus,
    p.FreeBulkStreams: p.BulkStreamsStatus,
    p.StartIsoStream: p.IsoStreamStatus,
    p.StopIsoStream: p.IsoStreamStatus,
    p.StartInterruptReceiving: p.InterruptReceivingStatus,
    p.StopInterruptReceiving: p.InterruptReceivingStatus,
    p.StartBulkReceiving: p.BulkReceivingStatus,
    p.StopBulkReceiving: p.BulkReceivingStatus,
}
"""The answer of each request."""
STATUSES = (p.IsoStreamStatus, p.InterruptReceivingStatus, p.BulkReceivingStatus)
"""Answers that the engine also sends by itself, with the id 0."""


class Guest:
    """The guest's side of a connection. It knows which answers the engine owes, also to its damaged packets."""

    def __init__(self, rng: random.Random, end: MemoryPort, caps: Cap, max_transfer: int) -> None:
        self.owed: Counter[tuple[type[p.Packet], int, int]] = Counter()
        self.connected = self.closed = False
        self.failures: list[AssertionError] = []
        self._rng = rng
        self._end = end
        self._connection = Connection(Role.GUEST, caps=caps)
        self._mirror = Connection(Role.HOST, max_payload=max_transfer)
        """Parses what the guest sends, as the engine does."""
        self._oracle = Oracle(LIBRARY, Role.GUEST, caps) if LIBRARY is not None and rng.random() < 0.3 else None
        self._order: dict[int, deque[int]] = {}
        self._last_id = self._fences = 0
        self._unsent = bytearray()
        self._changed = asyncio.Event()
        self._paused = False

    @property
    def has_greeted(self) -> bool:
        """Return whether the engine's hello has arrived."""
        return self._connection.peer_caps is not None

    def greet(self) -> None:
        self._connection.start()
        self.write(b"".join(self._connection.data_to_send()))

    # the listener of the port

    def data_received(self, data: memoryview, more: bool = False) -> None:
        try:
            if self._oracle is not None:
                self._oracle.receive(data)
                assert not self._oracle.errors, self._oracle.errors
                self._oracle.delivered.clear()
            self._connection.receive_data(data)
            while (event := self._connection.next_event()) is not None:
                assert isinstance(event, p.Packet), event
                self._received(event)
        except AssertionError as failure:
            self.failures.append(failure)
        self._changed.set()

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass

    def port_closed(self, error: FarplugError | None) -> None:
        self.closed = True
        self.connected = False
        if self._oracle is not None:
            self._oracle.close()
            self._oracle = None
        self._changed.set()

    def pause(self) -> None:
        self._paused = not self._paused
        (self._end.pause_reading if self._paused else self._end.resume_reading)()

    def unpause(self) -> None:
        if self._paused:
            self.pause()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.closed and not self.failures:
            self._changed.clear()
            await self._changed.wait()

    # packets

    def _received(self, packet: p.Packet) -> None:
        match packet:
            case p.DeviceConnect():
                self.connected = True
            case p.DeviceDisconnect():
                self.connected = False
                self._acknowledge(self._rng.choice((0, 0, 3)))
            case p.InterruptPacket(endpoint=endpoint) if endpoint & 0x80:
                pass  # of a reception
            case p.BulkPacket() | p.ControlPacket() | p.InterruptPacket():
                self._answered(packet, packet.endpoint)
                if not isinstance(packet, p.BulkPacket) or not packet.stream_id:
                    order = self._order[_queue(packet.endpoint)]
                    # QEMU: assert(p->stream || QTAILQ_FIRST(&ep->queue) == p), cancelled packets excepted
                    assert packet.status is Status.CANCELLED or order[0] == packet.id, (
                        f"out of order, after {order[0]:x}: {packet}"
                    )
                    order.remove(packet.id)
            case _ if type(packet) in ANSWERS.values():
                if packet.id or not isinstance(packet, STATUSES):
                    self._answered(packet, 0)

    def _answered(self, packet: p.Packet, endpoint: int) -> None:
        key = (type(packet), packet.id, endpoint)
        self.owed[key] -= 1
        assert self.owed[key] >= 0, f"answered twice, or without a request: {packet}"
        if not self.owed[key]:
            del self.owed[key]
        counts["answers"] += 1

    def _acknowledge(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._acknowledge, turns - 1)
        elif not self.closed:
            self.send(p.DeviceDisconnectAck())
            self.flush()

    def new_id(self) -> int:
        if self._last_id and self._rng.random() < 0.02:
            return self._rng.randrange(1, self._last_id + 1)  # perhaps one in use
        self._last_id += 1
        return self._last_id

    def send(self, packet: p.Packet) -> None:
        with contextlib.suppress(LocalProtocolError):
            self._connection.send(packet)
            counts["packets"] += 1
        data = b"".join(self._connection.data_to_send())
        self._unsent += _damaged(self._rng, data) if self._rng.random() < 0.03 else data

    def flush(self) -> None:
        data, self._unsent = bytes(self._unsent), bytearray()
        self.write(data)

    def write(self, data: bytes) -> None:
        if self.closed or not data:
            return
        self._mirror.receive_data(data)
        while (event := self._mirror.next_event()) is not None:
            packet = event.packet if isinstance(event, Oversized) else event
            if isinstance(packet, Violation):
                counts["violations"] += 1
            elif (answer := ANSWERS.get(type(packet))) is not None:
                self._owe(packet, answer)
        self._end.write([data])

    def _owe(self, packet: p.Packet, answer: type[p.Packet]) -> None:
        endpoint = packet.endpoint if isinstance(packet, p.DataPacket) else 0
        if packet.id or answer not in STATUSES:
            self.owed[answer, packet.id, endpoint] += 1
        if isinstance(packet, p.DataPacket) and not (isinstance(packet, p.BulkPacket) and packet.stream_id):
            self._order.setdefault(_queue(endpoint), deque()).append(packet.id)

    async def fence(self) -> None:
        """Wait until the engine has handled all packets so far."""
        self.unpause()
        self.flush()
        self._fences += 1
        number = (1 << 20) + self._fences
        self._connection.send(p.GetConfiguration(id=number))
        self.write(b"".join(self._connection.data_to_send()))
        await self.until(lambda: not self.owed[p.ConfigurationStatus, number, 0])
        assert not self.failures, self.failures


def _queue(endpoint: int) -> int:
    return endpoint if endpoint & 0x0F else 0


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """Return a packet with some bits changed, not those of its length: the parser would wait for a long packet."""
    damaged = bytearray(data)
    if len(data) > 16:
        for _ in range(rng.randrange(3)):
            damaged[rng.randrange(16, len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


class RestlessDevice(ScriptedDevice):
    """A device with every kind of endpoint that does anything which the interface of devices allows, and raises."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng.choice(((Speed.HIGH,), (Speed.SUPER, Speed.HIGH))))
        self.cancels = rng.random() < 0.7
        self._rng = rng
        self._receiving: set[int] = set()
        self._leaves = rng.random() < 0.1

    def act(self) -> None:
        """Complete some transfers, and report packets of receptions."""
        rng = self._rng
        pending = [transfer for transfer in self.submitted if transfer.status is None]
        self.submitted = pending
        for transfer in rng.sample(pending, rng.randrange(len(pending) + 1)):
            if transfer.status is None:
                reply = bytes(rng.choice((0, 1, transfer.length, transfer.length + 1)) & 0xFFFF)
                status = rng.choice((Status.SUCCESS, Status.SUCCESS, *Status))
                transfer.complete(status, reply if transfer.endpoint & 0x80 else b"")
        if self.listener is None:
            return
        for endpoint in list(self._receiving):
            status = rng.choice((Status.SUCCESS, Status.SUCCESS, *Status))
            if rng.random() < 0.7:
                self.listener.received(endpoint, status, bytes(rng.choice((0, 1, 8, 1024, 70_000))))
            elif rng.random() < 0.2:
                self.listener.reception_ended(endpoint, status)
        if self._leaves and rng.random() < 0.02:
            self.listener.lost(rng.choice((None, OSError(19, "no such device"))))

    def start_receiving(self, reception: Reception) -> Status:
        self._receiving.add(reception.endpoint)
        return super().start_receiving(reception)

    def _disturb(self) -> None:
        self.raises = ValueError("the device is broken") if self._rng.random() < 0.05 else None
        self.operation_status = self._rng.choice((Status.SUCCESS, Status.SUCCESS, *Status))

    async def _take_time(self) -> None:
        self._disturb()
        for _ in range(self._rng.choice((0, 0, 1, 20))):
            await asyncio.sleep(0)

    async def open(self, listener: Any) -> None:
        self._receiving.clear()
        await super().open(listener)

    async def reset(self) -> Status:
        await self._take_time()
        return await super().reset()

    async def set_configuration(self, value: int) -> Status:
        await self._take_time()
        return await super().set_configuration(value)

    async def set_interface(self, number: int, alternate: int) -> Status:
        await self._take_time()
        return await super().set_interface(number, alternate & 1)

    async def allocate_streams(self, endpoints: Sequence[int], count: int) -> Status:
        await self._take_time()
        return await super().allocate_streams(endpoints, count)


def cdb(rng: random.Random) -> tuple[bytes, int, bool]:
    """Return a command, the bytes of its data, and whether the guest sends them."""
    operation = rng.choice((0x28, 0x2A, 0x88, 0x8A, 0x2E, 0x2F, 0x35, 0x41, 0x42, 0x93, 0x12, 0x1A, 0x00, 0x03, 0xA0))
    lba, count = rng.randrange(BLOCKS + 1), rng.choice((0, 1, 1, 2, 8, rng.randrange(BLOCKS + 2)))
    command = bytearray(16)
    command[0] = operation
    command[1] = rng.choice((0, 0, 0, 2, 8))
    if operation in (0x12, 0x1A, 0x03, 0xA0):
        count = 0
        command[4] = command[9] = rng.choice((0, 36, 64, 255))
    elif operation >> 5 in (1, 2):
        command[2:9] = struct.pack(">IxH", lba, 24 if operation == 0x42 else count)
    elif operation >> 5 == 4:
        command[2:14] = struct.pack(">QI", lba, count)
    if rng.random() < 0.1:
        command[rng.randrange(16)] = rng.randrange(256)
    out = operation in (0x2A, 0x8A, 0x2E, 0x41, 0x42, 0x93)
    length = 512 if operation in (0x41, 0x93) else 24 if operation == 0x42 else 512 * count or command[4]
    return bytes(command), rng.choice((length, length, length, 0, 8, 513, 4096)), out


class Requests:
    """What a guest may send."""

    def __init__(self, rng: random.Random, guest: Guest) -> None:
        self._rng = rng
        self._guest = guest
        self._tag = 0

    def act(self) -> None:
        """Send one packet, or a few that belong together."""
        rng, guest = self._rng, self._guest
        stream = rng.choice((0, 0, 1, 2, rng.randrange(40)))
        match rng.randrange(20):
            case 0 | 1 | 2 | 3 | 4 | 5:
                self._command(stream)
            case 6 | 7:
                length = rng.choice((0, 13, 512, 65536, 1 << 24, (1 << 24) + 1, 1 << 27))
                self._bulk(rng.choice((0x81, 0x83, 0x84, 0x87, 0x00)), length, stream=stream)
            case 8:
                length = rng.choice((0, 1, 31, 512, 5000, 70_000))
                self._bulk(rng.choice((2, 3, 4)), length, bytes(length), stream=stream)
            case 9 | 10 | 11:
                last = guest._last_id
                guest.send(p.CancelDataPacket(id=rng.choice((last, max(1, last - rng.randrange(30)), 1 << 31))))
            case 12:
                guest.send(p.Reset())
            case 13 | 14:
                self._operation()
            case 15 | 16:
                self._control()
            case 17 | 18:
                self._reception()
            case _:
                kind = rng.choice((*PacketType, 99))
                body = rng.randbytes(rng.choice((0, 1, 4, 8, 10, 300)))
                if kind is PacketType.FILTER_FILTER:
                    body = rng.choice((b"-1,-1,-1,-1,0\0", b"-1,-1,-1,-1,1\0", b"3,,|\0"))
                if guest.has_greeted and Cap.IDS_64_BITS in guest._connection.own_caps:
                    guest.flush()
                    guest.write(struct.pack("<IIQ", kind, len(body), guest.new_id()) + body)

    def flood(self) -> None:
        """Send more requests than may be pending."""
        for _ in range(MAX_PENDING + 100):
            self._bulk(0x81, 512)
        counts["floods"] += 1

    def _bulk(self, endpoint: int, length: int, data: bytes = b"", *, stream: int = 0) -> None:
        id = self._guest.new_id()
        self._guest.send(
            p.BulkPacket(id=id, endpoint=endpoint, status=Status.SUCCESS, length=length, data=data, stream_id=stream)
        )

    def _command(self, stream: int) -> None:
        rng = self._rng
        command, length, out = cdb(rng)
        lun = rng.choice((0, 0, 0, 1))
        if rng.random() < 0.5:
            tag, flags = rng.getrandbits(32), 0 if out else 0x80
            self._bulk(2, 31, struct.pack("<4sIIBBB16s", b"USBC", tag, length, flags, lun, 16, command))
        else:
            self._tag = stream or rng.choice((1, 2, 3, rng.randrange(65536)))
            attribute, address = rng.choice((0, 0, 0, 1, 2)), bytes((0, lun, *bytes(6)))
            self._bulk(4, 32, struct.pack(">BxHBxBx8s16s", 1, self._tag, attribute, 0, address, command))
        for _ in range(rng.randrange(3)):
            size = rng.choice((length, 512, 1024))
            self._bulk(2 if out else 0x81, size, bytes(size) if out else b"", stream=stream)
        self._bulk(rng.choice((0x81, 0x83)), rng.choice((13, 64, 96)), stream=stream)

    def _operation(self) -> None:
        rng, guest = self._rng, self._guest
        id = guest.new_id()
        endpoints = rng.choice((0, 1 << 17 | 1 << 2 | 1 << 19, 1 << 23 | 1 << 2, rng.getrandbits(32)))
        packet: p.Packet = rng.choice(
            (
                p.SetConfiguration(id=id, configuration=rng.choice((1, 1, 1, 0, 7))),
                p.SetAltSetting(id=id, interface=rng.choice((0, 0, 1, 255)), alt=rng.choice((0, 1, 1, 2))),
                p.GetConfiguration(id=id),
                p.GetAltSetting(id=id, interface=rng.choice((0, 255))),
                p.AllocBulkStreams(id=id, endpoints=endpoints, streams=rng.choice((0, 16, 32, 33, 2**32 - 1))),
                p.FreeBulkStreams(id=id, endpoints=endpoints),
                p.FilterReject(),
            )
        )
        guest.send(packet)

    def _control(self) -> None:
        rng = self._rng
        request_type = rng.choice((0x80, 0x00, 0x02, 0x21, 0xA1, 0x81, 0x01, rng.randrange(256)))
        length = rng.choice((0, 1, 18, 255, 65535))
        self._guest.send(
            p.ControlPacket(
                id=self._guest.new_id(),
                endpoint=request_type & 0x80,
                request=rng.choice((0, 1, 3, 6, 8, 9, 10, 11, 0xFE, 0xFF)),
                request_type=request_type,
                status=Status.SUCCESS,
                value=rng.choice((0, 1, 0x100, 0x200, 0x303, 0xF00)),
                index=rng.choice((0, 0x81, 2, 0x409)),
                length=length,
                data=b"" if request_type & 0x80 else bytes(length),
            )
        )

    def _reception(self) -> None:
        rng, guest = self._rng, self._guest
        id = guest.new_id()
        size = rng.choice((0, 512, 1000, 1 << 24))
        packet: p.Packet = rng.choice(
            (
                p.StartInterruptReceiving(id=id, endpoint=rng.choice((0x81, 0x83))),
                p.StopInterruptReceiving(id=id, endpoint=0x83),
                p.StartIsoStream(id=id, endpoint=rng.choice((0x85, 6, 2)), packets_per_urb=rng.randrange(9), urbs=4),
                p.StopIsoStream(id=id, endpoint=rng.choice((0x85, 6, 2))),
                p.StartBulkReceiving(id=id, stream_id=0, bytes_per_transfer=size, endpoint=0x81, transfers=4),
                p.StopBulkReceiving(id=id, stream_id=0, endpoint=0x81),
                p.IsoPacket(id=id, endpoint=6, status=Status.SUCCESS, length=3, data=b"abc"),
                p.InterruptPacket(id=id, endpoint=rng.choice((1, 4)), status=Status.SUCCESS, length=3, data=b"abc"),
            )
        )
        guest.send(packet)


class Case:
    """A port, the devices for it, and its guest."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        memory.PIECE = rng.choice((997, 4096, 65536, 65536))
        self.host, self.end = memory.memory_ports()
        self.port = GuestPort(0, self.host, lambda port: None, lambda port, event: self._happened(event))
        self.max_transfer = rng.choice(MAX_TRANSFERS)
        self.redirection = Redirection(self.host, self.port._happened, max_transfer=self.max_transfer)
        self.port._redirection = self.redirection
        self.store = LateStore(rng, BLOCKS, read_only=rng.random() < 0.2, alone=True)
        speeds = rng.choice(((Speed.SUPER, Speed.HIGH), (Speed.SUPER,), (Speed.HIGH,), (Speed.FULL,)))
        self.disk = disk_device(self.store, transport=rng.choice(tuple(StorageTransport)), speeds=speeds)
        self.restless = RestlessDevice(rng)
        self.faults: list[Exception] = []
        self.raised: list[dict[str, Any]] = []

    def _happened(self, event: PortEvent) -> None:
        if isinstance(event, DeviceFault):
            self.faults.append(event.error)

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.raised.append(context))
        for _ in range(self.rng.choice((1, 1, 2))):
            await self._connection()
        self.store.go_all()
        await self.disk.dispose()
        for _ in range(3):
            await asyncio.sleep(0)
        self._check_empty()
        assert not self.raised, self.raised

    async def _connection(self) -> None:
        rng = self.rng
        usual = Cap.DEVICE_DISCONNECT_ACK | Cap.EP_INFO_MAX_PACKET_SIZE
        caps = ALL_CAPS if rng.random() < 0.7 else Cap(rng.getrandbits(8)) & ALL_CAPS | usual
        guest = Guest(rng, self.end, caps.usable(), self.max_transfer)
        await self.end.open(guest)
        await self.port.open()
        if rng.random() < 0.02:
            self.end.write([struct.pack("<IIII", 99, 4, 0, 0)])  # no usbredir
        guest.greet()
        try:
            for _ in range(rng.randrange(1, 4)):
                if not await self._device(guest):
                    break
            if rng.random() < 0.1:
                self.end.abort()
        finally:
            await self.port.close()
            await self.end.close()
        assert not guest.failures, guest.failures
        protocol = self.redirection._protocol
        assert not protocol.pending
        assert not self.redirection._requests._by_id

    async def _device(self, guest: Guest) -> bool:
        """Attach a device, use it, detach it. Return whether the connection is still there."""
        rng = self.rng
        device = rng.choice((self.disk, self.disk, self.restless))
        self.faults.clear()
        self.port.claim(self._happened)
        try:
            await self.port.attach(device)
            await guest.until(lambda: guest.connected)
        except FarplugError as refused:
            counts[f"refused: {type(refused).__name__}"] += 1
        else:
            await self._use(guest, device)
        finally:
            self.port.release()
        guest.unpause()
        with contextlib.suppress(FarplugError):  # the device may be gone
            await self.port.detach()
        assert device is self.restless or not self.faults, self.faults
        self.restless.raises = None
        if self.port.ready is None or guest.closed:
            return False
        await guest.fence()
        assert guest.closed or not +guest.owed, f"not answered: {dict(guest.owed)}"
        counts["devices"] += 1
        return not guest.closed

    async def _use(self, guest: Guest, device: VirtualDevice | RestlessDevice) -> None:
        rng, requests = self.rng, Requests(self.rng, guest)
        guest.send(p.SetConfiguration(id=guest.new_id(), configuration=1))
        if rng.random() < 0.6:
            guest.send(p.SetAltSetting(id=guest.new_id(), interface=0, alt=1))
        for _ in range(rng.randrange(100)):
            requests.act()
            if isinstance(device, RestlessDevice):
                device.act()
            if rng.random() < 0.5:
                guest.flush()
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            if rng.random() < 0.02:
                guest.pause()
            self._check_bounds()
            if rng.random() < 0.002:
                self.end.abort()
                return
        if rng.random() < 0.01:
            requests.flood()
        guest.flush()
        for _ in range(rng.choice((0, 5, 30))):
            await asyncio.sleep(0)
            self._check_bounds()

    def _check_bounds(self) -> None:
        assert 0 <= self.redirection._protocol.pending <= MAX_PENDING
        assert 0 <= self.redirection.memory <= MAX_MEMORY + max(MAX_TRANSFERS), self.redirection.memory

    def _check_empty(self) -> None:
        assert not self.redirection.memory, self.redirection.memory
        storage = self.disk.functions[0]
        assert isinstance(storage, MassStorage)
        bot, uas = storage._bot, storage._uas
        assert not bot._unwritten
        assert not bot._unread
        assert not bot._queued
        assert not uas._unwritten
        assert not uas._unread
        assert not uas._writing
        assert not uas._commands
        assert not self.store.read_only or not any(self.store.content)


def one_case(rng: random.Random) -> None:
    asyncio.run(Case(rng).run())


if __name__ == "__main__":
    raise_logged()
    run("engine", one_case)
