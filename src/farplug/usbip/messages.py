"""USB/IP messages, version 1.1.1: the operations that list and import devices, and the commands that carry URBs.

A connection begins with one operation. After a successful import it carries commands until it is closed: the client
sends :class:`Submit` and :class:`Unlink`, the server :class:`Submitted` and :class:`Unlinked`. Numbers are big-endian.

Source: Linux, Documentation/usb/usbip_protocol.rst, and drivers/usb/usbip/usbip_common.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Generic, TypeAlias, TypeVar

from farplug.errors import RemoteProtocolError
from farplug.usb.types import Buffer, Speed

PORT: Final = 3240
"""The TCP port of USB/IP."""
VERSION: Final = 0x0111
MAX_TRANSFER: Final = 16 << 20
"""Bytes of one URB that are stored; those of a longer one are skipped."""
MAX_ISO_PACKETS: Final = 1024
"""Packets of an isochronous URB (USBIP_MAX_ISO_PACKETS)."""
MAX_INTERFACES: Final = 32
"""Interfaces of an imported device."""

ZERO_PACKET: Final = 0x0040
"""URB_ZERO_PACKET: an OUT transfer of whole packets ends with an empty one."""

_OPERATION = struct.Struct(">HHI")
_BUSID_SIZE = 32
_DEVICE = struct.Struct(">256s32sIIIHHHBBBBBB")
_INTERFACE = struct.Struct(">BBBx")
_COUNT = struct.Struct(">I")
_BASIC = struct.Struct(">5I")
_SUBMIT = struct.Struct(">IiIII8s")
_SUBMITTED = struct.Struct(">iiIIi8x")
_PACKET = struct.Struct(">IIIi")
_HEADER = 48
_OUT, _IN = 0, 1


class Errno(IntEnum):
    """Linux's error numbers, which replies have with a minus sign (include/uapi/asm-generic/errno.h)."""

    ENOENT = 2
    ENOMEM = 12
    EINVAL = 22
    EPIPE = 32
    ETIME = 62
    EPROTO = 71
    EOVERFLOW = 75
    EMSGSIZE = 90
    ECONNRESET = 104
    ESHUTDOWN = 108
    ETIMEDOUT = 110
    EREMOTEIO = 121


class Operation(IntEnum):
    """The code of an operation, bit 15 set in requests."""

    REQUEST_IMPORT = 0x8003
    REPLY_IMPORT = 0x0003
    REQUEST_LIST = 0x8005
    REPLY_LIST = 0x0005


class Refusal(IntEnum):
    """Why an operation failed: its status (tools/usb/usbip/libsrc/usbip_common.h). 0 is success."""

    NOT_AVAILABLE = 1
    BUSY = 2
    DEVICE_ERROR = 3
    NO_DEVICE = 4
    ERROR = 5

    @classmethod
    def _missing_(cls, value: object) -> Refusal:
        return cls.ERROR


class Command(IntEnum):
    """The code of a command or its reply."""

    SUBMIT = 1
    UNLINK = 2
    SUBMITTED = 3
    UNLINKED = 4


SPEEDS: Final = {
    Speed.LOW: 1,
    Speed.FULL: 2,
    Speed.HIGH: 3,
    Speed.SUPER: 5,
    Speed.SUPER_PLUS: 6,
}
"""enum usb_device_speed (Linux, include/uapi/linux/usb/ch9.h)."""


@dataclass(frozen=True, slots=True)
class ExportedDevice:
    """A device that a server offers.

    Attributes:
        busid: its name, such as ``1-1``; at most 31 bytes.
        bus: the number of its bus.
        address: its number on the bus. Commands name the device by both.
        speed: its speed.
        vendor_id: idVendor.
        product_id: idProduct.
        device_version: bcdDevice.
        device_class: bDeviceClass.
        device_subclass: bDeviceSubClass.
        device_protocol: bDeviceProtocol.
        configuration: bConfigurationValue of the current configuration; 0: none.
        configurations: bNumConfigurations.
        interfaces: class, subclass and protocol of each interface. The reply to an import does not have them.
        path: in the server's sysfs.
    """

    busid: str
    bus: int
    address: int
    speed: Speed
    vendor_id: int
    product_id: int
    device_version: int = 0
    device_class: int = 0
    device_subclass: int = 0
    device_protocol: int = 0
    configuration: int = 0
    configurations: int = 1
    interfaces: tuple[tuple[int, int, int], ...] = ()
    path: str = ""

    def encode(self) -> bytes:
        """Return the description without the interfaces."""
        return _DEVICE.pack(
            self.path.encode()[:255],
            self.busid.encode()[: _BUSID_SIZE - 1],
            self.bus,
            self.address,
            SPEEDS[self.speed],
            self.vendor_id,
            self.product_id,
            self.device_version,
            self.device_class,
            self.device_subclass,
            self.device_protocol,
            self.configuration,
            self.configurations,
            len(self.interfaces),
        )


@dataclass(frozen=True, slots=True)
class ListRequest:
    """A client requests the list of devices."""


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """A client requests a device by its bus id."""

    busid: str


@dataclass(frozen=True, slots=True)
class IsoPacket:
    """A packet of an isochronous URB.

    Attributes:
        offset: of its data in the URB's buffer.
        length: its bytes; IN: the most.
        actual: the bytes that moved.
        status: 0, or a negative error number.
    """

    offset: int
    length: int
    actual: int = 0
    status: int = 0


@dataclass(slots=True)
class Submit:
    """An URB of the client.

    Attributes:
        number: of the command, chosen by the client.
        device: the device, as :attr:`ExportedDevice.bus` times 65536, plus :attr:`ExportedDevice.address`.
        endpoint: bEndpointAddress; of a control transfer bit 7 is the direction of the data stage.
        length: IN: the most bytes to receive; OUT: the bytes of ``data``.
        data: OUT: the payload; empty if it was longer than :data:`MAX_TRANSFER`.
        setup: eight bytes, of a control transfer.
        packets: of an isochronous transfer; otherwise empty.
        flags: URB_ZERO_PACKET and others.
        interval: of a periodic endpoint, for information.
    """

    number: int
    device: int
    endpoint: int
    length: int
    data: Buffer = b""
    setup: bytes = bytes(8)
    packets: Sequence[IsoPacket] = ()
    flags: int = 0
    interval: int = 0

    @property
    def stored(self) -> bool:
        """Return whether the URB is within the bound, and so ``data`` is complete."""
        return self.length <= MAX_TRANSFER

    def encode(self) -> list[Buffer]:
        """Return the message, as buffers to send in order."""
        inwards = _IN if self.endpoint & 0x80 else _OUT
        head = _BASIC.pack(Command.SUBMIT, self.number, self.device, inwards, self.endpoint & 0x0F)
        # usbip_protocol.rst: 0xffffffff packets for a transfer that is not isochronous; Linux sends and accepts 0.
        head += _SUBMIT.pack(self.flags, self.length, 0, len(self.packets), self.interval, self.setup)
        return _buffers(head, b"" if inwards else self.data, self.packets)


@dataclass(slots=True)
class Unlink:
    """The client cancels an URB.

    Attributes:
        number: of this command.
        device: as in :class:`Submit`.
        unlinked: the number of the URB.
    """

    number: int
    device: int
    unlinked: int

    def encode(self) -> list[Buffer]:
        """Return the message."""
        head = _BASIC.pack(Command.UNLINK, self.number, self.device, 0, 0)
        return [(head + _COUNT.pack(self.unlinked)).ljust(_HEADER, b"\0")]


@dataclass(slots=True)
class Submitted:
    """An URB has ended.

    Attributes:
        number: of the URB.
        status: 0, or a negative error number.
        actual: the bytes that moved.
        data: IN: these bytes; of an isochronous URB those of all packets, without gaps.
        packets: of an isochronous URB.
    """

    number: int
    status: int
    actual: int
    data: Buffer = b""
    packets: Sequence[IsoPacket] = ()

    def encode(self) -> list[Buffer]:
        """Return the message, as buffers to send in order."""
        errors = sum(packet.status != 0 for packet in self.packets)
        head = _BASIC.pack(Command.SUBMITTED, self.number, 0, 0, 0)
        head += _SUBMITTED.pack(self.status, self.actual, 0, len(self.packets), errors)
        return _buffers(head, self.data, self.packets)


@dataclass(slots=True)
class Unlinked:
    """The reply to :class:`Unlink`.

    Attributes:
        number: of the unlink command.
        status: -ECONNRESET if the URB was cancelled; 0 if it had ended before.
    """

    number: int
    status: int

    def encode(self) -> list[Buffer]:
        """Return the message."""
        head = _BASIC.pack(Command.UNLINKED, self.number, 0, 0, 0)
        return [(head + struct.pack(">i", self.status)).ljust(_HEADER, b"\0")]


def _buffers(head: bytes, data: Buffer, packets: Sequence[IsoPacket]) -> list[Buffer]:
    buffers: list[Buffer] = [head]
    if len(data):
        buffers.append(data)
    if packets:
        buffers.append(b"".join(_PACKET.pack(p.offset, p.length, p.actual, p.status) for p in packets))
    return buffers


# Operations -----------------------------------------------------------------------------------------------------------


def encode_request(request: ImportRequest) -> bytes:
    """Return the message of a request."""
    name = request.busid.encode()[: _BUSID_SIZE - 1].ljust(_BUSID_SIZE, b"\0")
    return _OPERATION.pack(VERSION, Operation.REQUEST_IMPORT, 0) + name


def encode_list(devices: Sequence[ExportedDevice]) -> bytes:
    """Return the reply to a :class:`ListRequest`."""
    parts = [_OPERATION.pack(VERSION, Operation.REPLY_LIST, 0), _COUNT.pack(len(devices))]
    for device in devices:
        parts.append(device.encode())
        parts += (_INTERFACE.pack(*interface) for interface in device.interfaces)
    return b"".join(parts)


def encode_import(device: ExportedDevice | Refusal) -> bytes:
    """Return the reply to an :class:`ImportRequest`."""
    if isinstance(device, Refusal):
        return _OPERATION.pack(VERSION, Operation.REPLY_IMPORT, device)
    return _OPERATION.pack(VERSION, Operation.REPLY_IMPORT, 0) + device.encode()


T = TypeVar("T")


class Parser(Generic[T]):
    """Bytes in, messages out. A caller that stops calling :meth:`next_message` must stop passing bytes in, too."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skipped = 0
        """Bytes to skip: the payload of an URB that is too large."""

    def receive_data(self, data: Buffer) -> None:
        """Pass in bytes from the peer, split anywhere. They are copied: ``data`` may be reused afterwards."""
        if self._skipped:
            count = min(self._skipped, len(data))
            self._skipped -= count
            data = memoryview(data)[count:]
        self._buffer += data

    def _take(self, size: int) -> bytes:
        """Remove bytes from the beginning of the buffer, which has them."""
        with memoryview(self._buffer) as view:
            taken = bytes(view[:size])
        del self._buffer[:size]
        return taken

    def _skip(self, size: int) -> None:
        count = min(size, len(self._buffer))
        del self._buffer[:count]
        self._skipped = size - count

    def rest(self) -> bytes:
        """Remove and return the bytes that no message has consumed."""
        return self._take(len(self._buffer))

    def next_message(self) -> T | None:
        """Return the next message; None if more bytes are needed.

        Raises:
            RemoteProtocolError: the peer violates the protocol: the connection cannot go on.
        """
        raise NotImplementedError


class RequestParser(Parser[ListRequest | ImportRequest]):
    """Parses the operation with which a client begins."""

    def next_message(self) -> ListRequest | ImportRequest | None:
        if len(self._buffer) < _OPERATION.size:
            return None
        version, code, _ = _OPERATION.unpack_from(self._buffer)
        if code not in (Operation.REQUEST_LIST, Operation.REQUEST_IMPORT):
            raise RemoteProtocolError(f"{code:#06x} is not a USB/IP request")
        if version >> 8 != VERSION >> 8:
            raise RemoteProtocolError(f"USB/IP version {version:#06x} is not supported, only {VERSION:#06x}")
        if code == Operation.REQUEST_LIST:
            self._take(_OPERATION.size)
            return ListRequest()
        if len(self._buffer) < _OPERATION.size + _BUSID_SIZE:
            return None
        return ImportRequest(_text(self._take(_OPERATION.size + _BUSID_SIZE)[_OPERATION.size :]))


class ImportParser(Parser["ExportedDevice | Refusal"]):
    """Parses the reply to an :class:`ImportRequest`."""

    def next_message(self) -> ExportedDevice | Refusal | None:
        status = _reply(self._buffer, Operation.REPLY_IMPORT)
        if status:
            self._take(_OPERATION.size)
            return Refusal(status)
        if len(self._buffer) < _OPERATION.size + _DEVICE.size:
            return None
        return _device(self._take(_OPERATION.size + _DEVICE.size)[_OPERATION.size :])


def _reply(buffer: Buffer, expected: Operation) -> int:
    """Return the status of a reply, or 0 if it is not complete."""
    if len(buffer) < _OPERATION.size:
        return 0
    version, code, status = _OPERATION.unpack_from(buffer)
    if version >> 8 != VERSION >> 8 or code != expected:
        raise RemoteProtocolError("the peer does not use the USB/IP protocol")
    return int(status)


def _device(data: bytes) -> ExportedDevice:
    path, busid, bus, address, speed, *ids, configuration, configurations, interfaces = _DEVICE.unpack(data)
    found = next((known for known, code in SPEEDS.items() if code == speed), None)
    if found is None:
        raise RemoteProtocolError(f"{speed} is not a USB/IP speed")
    if interfaces > MAX_INTERFACES:
        raise RemoteProtocolError(f"a device with {interfaces} interfaces, at most {MAX_INTERFACES} are possible")
    vendor, product, version, class_, subclass, protocol = ids
    return ExportedDevice(
        _text(busid),
        bus,
        address,
        found,
        vendor,
        product,
        version,
        class_,
        subclass,
        protocol,
        configuration,
        configurations,
        path=_text(path),
    )


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")


# Commands -------------------------------------------------------------------------------------------------------------

ClientCommand: TypeAlias = Submit | Unlink
ServerReply: TypeAlias = Submitted | Unlinked


class CommandParser(Parser[ClientCommand]):
    """Parses the commands of a client."""

    def next_message(self) -> ClientCommand | None:
        buffer = self._buffer
        if self._skipped or len(buffer) < _HEADER:
            return None
        command, number, device, direction, endpoint = _BASIC.unpack_from(buffer)
        if command == Command.UNLINK:
            (unlinked,) = _COUNT.unpack_from(buffer, _BASIC.size)
            self._take(_HEADER)
            return Unlink(number, device, unlinked)
        if command != Command.SUBMIT:
            raise RemoteProtocolError(f"{command} is not a USB/IP command")
        flags, length, _, count, interval, setup = _SUBMIT.unpack_from(buffer, _BASIC.size)
        count = _packet_count(count)
        if length < 0 or direction > 1 or endpoint > 15:
            raise RemoteProtocolError(
                f"an URB of {length} bytes in direction {direction} on endpoint {endpoint} is not valid"
            )
        payload = 0 if direction == _IN else length
        urb = Submit(number, device, endpoint | direction << 7, length, setup=setup, flags=flags, interval=interval)
        if length > MAX_TRANSFER:
            self._take(_HEADER)
            self._skip(payload + count * _PACKET.size)
            return urb
        if len(buffer) < _HEADER + payload + count * _PACKET.size:
            return None
        self._take(_HEADER)
        urb.data = self._take(payload) if payload else b""
        urb.packets = _packets(self._take(count * _PACKET.size)) if count else ()
        if any(packet.offset + packet.length > length for packet in urb.packets):
            raise RemoteProtocolError(f"a packet of an isochronous URB exceeds its {length} bytes")
        if sum(packet.length for packet in urb.packets) > length:
            raise RemoteProtocolError(f"the packets of an isochronous URB have more than its {length} bytes")
        return urb


class ReplyParser(Parser[ServerReply]):
    """Parses the replies of a server.

    Args:
        pending: returns the URB that has a number; None if there is none. The reply alone does not have its direction.
    """

    def __init__(self, pending: Callable[[int], Submit | None]) -> None:
        super().__init__()
        self._pending = pending

    def next_message(self) -> ServerReply | None:
        buffer = self._buffer
        if len(buffer) < _HEADER:
            return None
        command, number, *_ = _BASIC.unpack_from(buffer)
        if command == Command.UNLINKED:
            (status,) = struct.unpack_from(">i", buffer, _BASIC.size)
            self._take(_HEADER)
            return Unlinked(number, status)
        if command != Command.SUBMITTED:
            raise RemoteProtocolError(f"{command} is not a USB/IP reply")
        urb = self._pending(number)
        if urb is None:
            raise RemoteProtocolError(f"the reply to URB {number}, which is not pending")
        status, actual, _, count, _ = _SUBMITTED.unpack_from(buffer, _BASIC.size)
        count = _packet_count(count)
        if not 0 <= actual <= urb.length or count not in (0, len(urb.packets)):
            raise RemoteProtocolError(
                f"the reply to URB {number} has {actual} bytes and {count} packets, "
                f"the URB {urb.length} and {len(urb.packets)}"
            )
        payload = actual if urb.endpoint & 0x80 else 0
        if len(buffer) < _HEADER + payload + count * _PACKET.size:
            return None
        self._take(_HEADER)
        data = self._take(payload) if payload else b""
        packets = _packets(self._take(count * _PACKET.size)) if count else ()
        if any(packet.actual > asked.length for packet, asked in zip(packets, urb.packets, strict=False)):
            raise RemoteProtocolError(f"a packet of URB {number} has more bytes than were requested")
        if payload and packets and sum(packet.actual for packet in packets) != actual:
            raise RemoteProtocolError(f"the packets of URB {number} do not have the {actual} bytes of the URB")
        return Submitted(number, status, actual, data, packets)


def _packet_count(count: int) -> int:
    """Return the number of isochronous packets: none for 0xffffffff."""
    if count == 0xFFFFFFFF:
        return 0
    if count > MAX_ISO_PACKETS:
        raise RemoteProtocolError(f"an URB of {count} isochronous packets, at most {MAX_ISO_PACKETS} are possible")
    return int(count)


def _packets(data: bytes) -> tuple[IsoPacket, ...]:
    return tuple(IsoPacket(*numbers) for numbers in _PACKET.iter_unpack(data))
