"""The usbredir guest that stands for USB/IP clients: it translates their URBs into usbredir packets, and replies back.

The engine sees a guest that configures and uses a device; the client sees the server of a device. So the engine's
guarantees hold for USB/IP, too: one reply for each URB, in order on its endpoint, within the bounds of memory and work.

The differences between the protocols are bridged here:

* Interrupt IN is an URB for each packet in USB/IP, and a continuous reception in usbredir. The reception runs while an
  URB waits, or the client is about to send the next one.
* Isochronous URBs have several packets, and their completion is the client's clock. IN: an URB is complete when its
  packets have arrived. OUT: after the time that its packets take on a cable.
* Standard requests that change configuration or alternate setting are packets of their own in usbredir.
* ``URB_ZERO_PACKET`` is a second, empty transfer, as that of QEMU's host controllers.

Sources: Linux, Documentation/usb/usbip_protocol.rst and drivers/usb/usbip; usb-redirection-protocol.md.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeAlias

from farplug.errors import RemoteProtocolError
from farplug.usb.endpoints import interval_microseconds
from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, DescriptorType, Setup, Speed, StandardRequest, TransferType
from farplug.usbip.messages import (
    ZERO_PACKET,
    Errno,
    ExportedDevice,
    IsoPacket,
    ServerReply,
    Submit,
    Submitted,
    Unlink,
    Unlinked,
)
from farplug.usbredir import packets
from farplug.usbredir.caps import ALL_CAPS, Cap

CAPS: Final = ALL_CAPS & ~(Cap.BULK_STREAMS | Cap.BULK_RECEIVING | Cap.FILTER)
"""The capabilities of this guest: USB/IP has no bulk streams."""
MAX_WAITING: Final = 1024
"""URBs of a client that wait for packets of interrupt or isochronous endpoints; a further one ends with ENOMEM."""
MAX_WAITING_PACKETS: Final = 32 << 10
"""Packets of isochronous URBs that wait."""
MAX_UNREAD: Final = 1000
"""Packets of an endpoint that wait for an URB: of more the newest is dropped, of isochronous ones the oldest."""
MAX_UNREAD_BYTES: Final = 1 << 20
"""Bytes of these packets."""
MAX_PARTS: Final = 1024
"""Packets of one interrupt OUT URB."""
_ISO_TRANSFERS: Final = 8
"""Transfers of an isochronous reception that are queued at the device."""
_ISO_PACKETS: Final = 32
"""The most packets of such a transfer."""
_DEVICE_DESCRIPTOR_SIZE: Final = 18
_PORT_RESET: Final = 4
"""The feature of a hub's port that resets the device."""

_ERRORS: Final = {
    Status.SUCCESS: 0,
    Status.CANCELLED: -Errno.ECONNRESET,
    Status.INVALID: -Errno.EPIPE,
    Status.IO_ERROR: -Errno.EPROTO,
    Status.STALL: -Errno.EPIPE,
    Status.TIMEOUT: -Errno.ETIME,
    Status.BABBLE: -Errno.EOVERFLOW,
}


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Cancel the call."""


class Clock(Protocol):
    """What isochronous OUT endpoints need of an event loop, which is one."""

    def time(self) -> float:
        """Return the time in seconds, from any origin."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call ``callback`` once at a time."""


Send: TypeAlias = Callable[[packets.Packet], None]
"""Sends a packet to the engine."""
Reply: TypeAlias = Callable[[ServerReply], None]
"""Sends a message to the client."""


@dataclass(slots=True, eq=False)
class _Urb:
    """An URB without a reply.

    Attributes:
        submit: the client's command.
        ids: of the packets that the engine has not answered: one, or several if the URB is split.
        status: of the first part that failed.
        actual: the bytes that moved.
        received: of a waiting IN URB the bytes so far.
        filled: of a waiting isochronous IN URB the packets so far.
        reply: IN: these bytes, if the engine has answered with them.
    """

    submit: Submit
    ids: set[int] = field(default_factory=set)
    status: int = 0
    actual: int = 0
    reply: Buffer = b""
    received: bytearray = field(default_factory=bytearray)
    filled: list[IsoPacket] = field(default_factory=list)


class _Receiver:
    """An interrupt or isochronous endpoint: URBs that wait for packets, or packets that wait for URBs."""

    def __init__(self, type: TransferType, packet_size: int) -> None:
        self.type = type
        self.packet_size = packet_size
        self.waiting: deque[_Urb] = deque()
        self.unread: deque[tuple[int, Buffer]] = deque()
        self.unread_bytes = 0
        self.running = False
        self.due = 0.0
        """Isochronous OUT: when the packets of the last URB end."""
        self.timer: Timer | None = None

    def add(self, status: int, data: Buffer) -> None:
        """Keep a packet for the next URB, within the bounds."""
        iso = self.type is TransferType.ISOCHRONOUS
        while self.unread and (len(self.unread) >= MAX_UNREAD or self.unread_bytes + len(data) > MAX_UNREAD_BYTES):
            if not iso:
                return
            self.unread_bytes -= len(self.unread.popleft()[1])
        self.unread.append((status, data))
        self.unread_bytes += len(data)

    def next(self) -> tuple[int, Buffer]:
        """Remove and return the oldest packet."""
        status, data = self.unread.popleft()
        self.unread_bytes -= len(data)
        return status, data

    def forget(self) -> None:
        """Drop the packets that no URB has read."""
        self.unread.clear()
        self.unread_bytes = 0


class Exporter:
    """Offers the device of one port to one USB/IP client at a time.

    Args:
        busid: the device's name for clients.
        address: the device's number on bus 1.
        send: sends a packet to the engine, which handles it later.
        clock: the event loop.

    Attributes:
        busid: as above.
        device: the device that clients can import; None: there is none.
        in_use: whether a client has imported the device.
    """

    def __init__(self, busid: str, address: int, send: Send, clock: Clock) -> None:
        self.busid = busid
        self.device: ExportedDevice | None = None
        self._address = address
        self._send = send
        self._clock = clock
        self._ids = itertools.count(1)
        self._reply: Reply | None = None
        self._left: Callable[[], None] = _ignore
        self._interfaces: tuple[packets.InterfaceEntry, ...] = ()
        self._endpoints: dict[int, packets.EndpointEntry] = {}
        self._connected: packets.DeviceConnect | None = None
        self._descriptor: int | None = None
        """The id of the request for the device descriptor."""
        self._urbs: dict[int, _Urb] = {}
        """The URBs without a reply, by their number."""
        self._by_id: dict[int, _Urb] = {}
        """Those that wait for the engine, by the id of the packet."""
        self._receivers: dict[int, _Receiver] = {}
        self._waiting = self._waiting_packets = 0

    @property
    def in_use(self) -> bool:
        return self._reply is not None

    # The client ---------------------------------------------------------------------------------------------------

    def attach(self, reply: Reply, left: Callable[[], None]) -> None:
        """Begin to serve a client.

        Args:
            reply: sends a message to the client.
            left: called when the device is gone: the client's connection must be closed.
        """
        self._reply, self._left = reply, left

    def detach(self) -> None:
        """End to serve the client: cancel its URBs, and reset the device for the next one."""
        if self._reply is None:
            return
        self._forget_client()
        if self._connected is not None:
            self._send(packets.Reset())

    def handle(self, command: Submit | Unlink) -> None:
        """Handle a command of the client.

        Raises:
            RemoteProtocolError: the client violates the protocol.
        """
        if isinstance(command, Unlink):
            self._unlink(command)
            return
        if command.number in self._urbs:
            raise RemoteProtocolError(f"URB {command.number} is submitted, and an URB with this number is pending")
        urb = _Urb(command)
        self._urbs[command.number] = urb
        if not command.stored:
            self._end(urb, -Errno.EMSGSIZE)
        elif not command.endpoint & 0x0F:
            self._control(urb)
        else:
            self._transfer(urb)

    def _transfer(self, urb: _Urb) -> None:
        submit = urb.submit
        entry = self._endpoints.get(submit.endpoint)
        if entry is None:
            self._end(urb, -Errno.EPIPE)
        elif (entry.type == TransferType.ISOCHRONOUS) is not bool(submit.packets):
            self._end(urb, -Errno.EINVAL)
        elif entry.type == TransferType.BULK:
            self._bulk(urb, entry)
        elif entry.type == TransferType.ISOCHRONOUS or submit.endpoint & 0x80:
            self._wait(urb, entry)
        else:
            self._interrupt_out(urb, entry)

    def _bulk(self, urb: _Urb, entry: packets.EndpointEntry) -> None:
        submit = urb.submit
        inwards = submit.endpoint & 0x80
        size = max(1, entry.max_packet_size)
        terminated = not inwards and submit.flags & ZERO_PACKET and submit.length and not submit.length % size
        parts = [(submit.length, submit.data), (0, b"")] if terminated else [(submit.length, submit.data)]
        submit.data = b""
        for length, data in parts:
            self._send(
                packets.BulkPacket(
                    id=self._new_id(urb), endpoint=submit.endpoint, status=Status.SUCCESS, length=length, data=data
                )
            )

    def _interrupt_out(self, urb: _Urb, entry: packets.EndpointEntry) -> None:
        submit = urb.submit
        size = max(1, entry.max_packet_size)
        count = max(1, -(-submit.length // size))
        if count > MAX_PARTS:
            self._end(urb, -Errno.EMSGSIZE)
            return
        data, submit.data = memoryview(submit.data), b""
        for number in range(count):
            part = bytes(data[number * size : (number + 1) * size])
            self._send(
                packets.InterruptPacket(
                    id=self._new_id(urb),
                    endpoint=submit.endpoint,
                    status=Status.SUCCESS,
                    length=len(part),
                    data=part,
                )
            )

    def _control(self, urb: _Urb) -> None:
        submit = urb.submit
        setup = Setup.parse(submit.setup)
        if setup.length != submit.length or (submit.length and setup.direction != submit.endpoint & 0x80):
            self._end(urb, -Errno.EINVAL)
            return
        match setup.request_type, setup.request:
            case 0x00, StandardRequest.SET_ADDRESS:  # the client's host controller has addressed the device
                self._end(urb, 0)
            case 0x23, StandardRequest.SET_FEATURE if setup.value == _PORT_RESET:  # as Linux's stub_rx.c
                self._stop_receiving(self._receivers)
                self._send(packets.Reset())
                self._end(urb, 0)
            case 0x00, StandardRequest.SET_CONFIGURATION if setup.value < 256:
                self._stop_receiving(self._receivers)
                self._send(packets.SetConfiguration(id=self._new_id(urb), configuration=setup.value))
            case 0x01, StandardRequest.SET_INTERFACE if setup.value < 256 and setup.index < 256:
                known = self._endpoints
                self._stop_receiving([e for e in self._receivers if e in known and known[e].interface == setup.index])
                self._send(packets.SetAltSetting(id=self._new_id(urb), interface=setup.index, alt=setup.value))
            case _:
                self._send(packets.ControlPacket.of(self._new_id(urb), setup, submit.data))
        submit.data = b""

    def _unlink(self, command: Unlink) -> None:
        urb = self._urbs.pop(command.unlinked, None)
        if urb is not None:
            for id in urb.ids:
                del self._by_id[id]
                self._send(packets.CancelDataPacket(id=id))
            receiver = self._receivers.get(urb.submit.endpoint)
            if receiver is not None and urb in receiver.waiting:
                receiver.waiting.remove(urb)
                self._counted(urb, -1)
                if not receiver.waiting and urb.submit.endpoint & 0x80:
                    self._stop(urb.submit.endpoint, receiver)
        assert self._reply is not None
        self._reply(Unlinked(command.number, 0 if urb is None else -Errno.ECONNRESET))

    def _new_id(self, urb: _Urb) -> int:
        id = next(self._ids)
        self._by_id[id] = urb
        urb.ids.add(id)
        return id

    def _end(self, urb: _Urb, status: int) -> None:
        """Reply to an URB."""
        submit = urb.submit
        del self._urbs[submit.number]
        filled = [*urb.filled, *(replace(packet, status=status) for packet in submit.packets[len(urb.filled) :])]
        reply = Submitted(submit.number, status, urb.actual, urb.reply or urb.received, filled)
        assert self._reply is not None
        self._reply(reply)

    # Receptions ---------------------------------------------------------------------------------------------------

    def _wait(self, urb: _Urb, entry: packets.EndpointEntry) -> None:
        """Let an URB of an interrupt IN or isochronous endpoint wait for its packets, or for its time."""
        submit = urb.submit
        endpoint, count = submit.endpoint, len(submit.packets)
        if self._waiting >= MAX_WAITING or self._waiting_packets + count > MAX_WAITING_PACKETS:
            self._end(urb, -Errno.ENOMEM)
            return
        receiver = self._receivers.get(endpoint)
        if receiver is None:
            receiver = self._receivers[endpoint] = _Receiver(TransferType(entry.type), max(1, entry.max_packet_size))
        receiver.waiting.append(urb)
        self._counted(urb, 1)
        if not receiver.running:
            receiver.running = True
            if submit.packets:
                self._send(
                    packets.StartIsoStream(
                        endpoint=endpoint, packets_per_urb=min(count, _ISO_PACKETS), urbs=_ISO_TRANSFERS
                    )
                )
            else:
                self._send(packets.StartInterruptReceiving(endpoint=endpoint))
        if not endpoint & 0x80:
            self._send_samples(urb)
            self._schedule(endpoint, receiver, entry)
            return
        self._fill(receiver)

    def _counted(self, urb: _Urb, by: int) -> None:
        self._waiting += by
        self._waiting_packets += by * len(urb.submit.packets)

    def _fill(self, receiver: _Receiver) -> None:
        """Give packets to URBs, as long as there are both."""
        while receiver.waiting and receiver.unread:
            urb = receiver.waiting[0]
            status, data = receiver.next()
            if self._take_packet(urb, receiver, status, data):
                receiver.waiting.popleft()
                self._counted(urb, -1)
                self._end(urb, urb.status)

    def _take_packet(self, urb: _Urb, receiver: _Receiver, status: int, data: Buffer) -> bool:
        """Add a packet to an URB; return whether the URB is complete."""
        submit = urb.submit
        if submit.packets:
            packet = submit.packets[len(urb.filled)]
            if len(data) > packet.length:
                status, data = -Errno.EOVERFLOW, memoryview(data)[: packet.length]
            urb.filled.append(replace(packet, actual=len(data), status=status))
            urb.received += data
            urb.actual += len(data)
            return len(urb.filled) == len(submit.packets)
        room = submit.length - len(urb.received)
        if len(data) > room:
            status, data = -Errno.EOVERFLOW, memoryview(data)[:room]
        urb.received += data
        urb.status = status
        urb.actual = len(urb.received)
        return bool(status) or len(data) < receiver.packet_size or urb.actual >= submit.length

    def _send_samples(self, urb: _Urb) -> None:
        """Send the packets of an isochronous OUT URB."""
        submit = urb.submit
        data, submit.data = memoryview(submit.data), b""
        for packet in submit.packets:
            part = bytes(data[packet.offset : packet.offset + min(packet.length, 0xFFFF)])
            self._send(packets.IsoPacket(endpoint=submit.endpoint, status=Status.SUCCESS, length=len(part), data=part))
            urb.filled.append(replace(packet, actual=len(part)))
            urb.actual += len(part)

    def _schedule(self, endpoint: int, receiver: _Receiver, entry: packets.EndpointEntry) -> None:
        """Complete the oldest isochronous OUT URB when its packets have taken their time."""
        if receiver.timer is not None or not receiver.waiting:
            return
        assert self._connected is not None
        speed = Speed(min(self._connected.speed, Speed.SUPER))
        each = interval_microseconds(min(max(1, entry.interval), 16), TransferType.ISOCHRONOUS, speed) / 1e6
        receiver.due = max(receiver.due, self._clock.time()) + each * len(receiver.waiting[0].submit.packets)

        def ended() -> None:
            receiver.timer = None
            if self._receivers.get(endpoint) is receiver and receiver.waiting:
                urb = receiver.waiting.popleft()
                self._counted(urb, -1)
                self._end(urb, 0)
                self._schedule(endpoint, receiver, entry)

        receiver.timer = self._clock.call_at(receiver.due, ended)

    def _stop(self, endpoint: int, receiver: _Receiver) -> None:
        """Stop a reception: no URB waits, so the device keeps what it has."""
        receiver.forget()
        if receiver.running:
            receiver.running = False
            if receiver.type is TransferType.ISOCHRONOUS:
                self._send(packets.StopIsoStream(endpoint=endpoint))
            else:
                self._send(packets.StopInterruptReceiving(endpoint=endpoint))

    def _stop_receiving(self, endpoints: Collection[int]) -> None:
        """End receptions that the engine ends as well: the settings change."""
        for endpoint in [e for e in self._receivers if e in endpoints]:
            self._drop_receiver(endpoint, -Errno.ESHUTDOWN)

    def _drop_receiver(self, endpoint: int, status: int) -> None:
        receiver = self._receivers.pop(endpoint)
        if receiver.timer is not None:
            receiver.timer.cancel()
        for urb in receiver.waiting:
            self._counted(urb, -1)
            self._end(urb, status)

    # The engine ---------------------------------------------------------------------------------------------------

    def received(self, packet: object) -> None:
        """Handle a packet of the engine."""
        match packet:
            case packets.BulkPacket() | packets.ControlPacket():
                self._answered(packet.id, packet.status, packet.length, packet.data)
            case packets.InterruptPacket() if not packet.endpoint & 0x80:
                self._answered(packet.id, packet.status, packet.length)
            case packets.InterruptPacket() | packets.IsoPacket():
                self._arrived(packet)
            case packets.InterruptReceivingStatus() | packets.IsoStreamStatus():
                if packet.status is Status.STALL and packet.endpoint in self._receivers:
                    self._drop_receiver(packet.endpoint, -Errno.EPIPE)
            case packets.ConfigurationStatus():
                if packet.status is Status.SUCCESS and self.device is not None:
                    self.device = replace(self.device, configuration=packet.configuration)
                self._operation_ended(packet.id, packet.status)
            case packets.AltSettingStatus():
                self._operation_ended(packet.id, packet.status)
            case packets.InterfaceInfo():
                self._interfaces = packet.interfaces
            case packets.EndpointInfo():
                self._endpoints = {
                    packets.endpoint_address(index): entry
                    for index, entry in enumerate(packet.endpoints)
                    if entry.type in (TransferType.BULK, TransferType.INTERRUPT, TransferType.ISOCHRONOUS)
                }
            case packets.DeviceConnect():
                self._connect(packet)
            case packets.DeviceDisconnect():
                self.gone()
                self._send(packets.DeviceDisconnectAck())

    def _answered(self, id: int, status: Status, length: int, data: Buffer = b"") -> None:
        if id == self._descriptor:
            self._describe(bytes(data))
            return
        urb = self._by_id.pop(id, None)
        if urb is None:  # the client has unlinked the URB, or has left
            return
        urb.ids.discard(id)
        urb.actual += length
        urb.status = urb.status or _ERRORS[status]
        urb.reply = data
        if not urb.ids:
            self._end(urb, urb.status)

    def _operation_ended(self, id: int, status: Status) -> None:
        """Reply to a request that sets something: for a stall usbredir has only other errors."""
        self._answered(id, status if status is Status.SUCCESS else Status.STALL, 0)

    def _arrived(self, packet: packets.InterruptPacket | packets.IsoPacket) -> None:
        receiver = self._receivers.get(packet.endpoint)
        if receiver is not None and receiver.running:
            receiver.add(_ERRORS[packet.status], packet.data)
            self._fill(receiver)

    def _connect(self, packet: packets.DeviceConnect) -> None:
        """Read the device descriptor, which has the number of configurations; the device is listed then."""
        self._connected = packet
        self._descriptor = next(self._ids)
        setup = Setup(0x80, StandardRequest.GET_DESCRIPTOR, DescriptorType.DEVICE << 8, length=_DEVICE_DESCRIPTOR_SIZE)
        self._send(packets.ControlPacket.of(self._descriptor, setup, b""))

    def _describe(self, descriptor: bytes) -> None:
        connected = self._connected
        self._descriptor = None
        if connected is None:
            return
        self.device = ExportedDevice(
            self.busid,
            1,
            self._address,
            Speed(min(connected.speed, Speed.SUPER)),
            connected.vendor_id,
            connected.product_id,
            connected.device_version,
            connected.device_class,
            connected.device_subclass,
            connected.device_protocol,
            configurations=descriptor[17] if len(descriptor) == _DEVICE_DESCRIPTOR_SIZE else 1,
            interfaces=tuple((i.interface_class, i.interface_subclass, i.interface_protocol) for i in self._interfaces),
            path=f"/farplug/{self.busid}",
        )

    def gone(self) -> None:
        """Take note that the device, or the port, is gone."""
        self.device = self._connected = self._descriptor = None
        self._endpoints = {}
        left = self._left
        self._forget_client()
        left()

    def _forget_client(self) -> None:
        self._reply, self._left = None, _ignore
        for receiver in self._receivers.values():
            if receiver.timer is not None:
                receiver.timer.cancel()
        self._receivers.clear()
        self._urbs.clear()
        self._by_id.clear()
        self._waiting = self._waiting_packets = 0


def _ignore() -> None:
    """Do nothing: there is no client."""
