"""USB devices that this process plays, plugged into a guest's kernel over USB/IP.

The kernel's vhci_hcd takes them for real ones: isochronous endpoints, descriptors that lie, endpoints that never answer
and others that never stop, which no gadget of dummy_hcd can have. Source: Linux, Documentation/usb/usbip_protocol.rst.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from errno import ECONNRESET, EPIPE

import pytest

from farplug.testing import GATEWAY, QemuGuest
from farplug.usb import Speed
from farplug.usb.descriptors import DeviceDescriptor, EndpointDescriptor
from farplug.vm.qemu_config import LOOPBACK

SPEEDS = {Speed.LOW: 1, Speed.FULL: 2, Speed.HIGH: 3, Speed.SUPER: 5}
"""enum usb_device_speed (Linux, include/uapi/linux/usb/ch9.h)."""

_SUBMIT, _UNLINK, _SUBMITTED, _UNLINKED = 1, 2, 3, 4
_BASIC = struct.Struct(">5I")
"""Command, number, device, direction (1: in), endpoint."""
_REQUEST = struct.Struct(">Iiiii8s")
"""Flags, length, start frame, packets, interval, setup packet."""
_ANSWER = struct.Struct(">iiiiixxxxxxxx")
"""Status, actual length, start frame, packets, errors."""
_PACKET = struct.Struct(">IIIi")
"""Offset, length, actual length, status."""
_HEADER = 48

_devices = itertools.count(1)


@dataclass(eq=False, slots=True)
class Urb:
    """A transfer that the kernel wants.

    Attributes:
        endpoint: its address.
        length: bytes at most.
        data: what goes out, of an isochronous one all packets.
        packets: of an isochronous one their lengths.
        setup: of a control transfer.
    """

    number: int
    endpoint: int
    length: int
    data: bytes = b""
    packets: Sequence[int] = ()
    setup: bytes = bytes(8)


@dataclass(eq=False)
class UsbipDevice:
    """A device. What it does on its endpoints is what a subclass does in :meth:`submit`: nothing at all if it has none.

    Attributes:
        device: the device descriptor.
        configurations: the configuration descriptors with all that belongs to them.
        speed: low, full or high.
        strings: string descriptors by index.
        bos: the binary object store.
        configured: SET_CONFIGURATION requests that came, and SET_INTERFACE ones as pairs.
        pending: transfers that are not completed yet.
        submitted: number of transfers on other endpoints than 0 that came.
    """

    device: bytes
    configurations: Sequence[bytes] = ()
    speed: Speed = Speed.HIGH
    strings: Mapping[int, bytes] = field(default_factory=dict)
    bos: bytes | None = None
    configured: list[int | tuple[int, int]] = field(default_factory=list)
    pending: dict[int, Urb] = field(default_factory=dict)
    submitted: int = 0
    _writer: StreamWriter | None = None

    @property
    def ids(self) -> str:
        """Vendor and product, ``vvvv:pppp``."""
        vendor, product = struct.unpack_from("<HH", self.device, 8)
        return f"{vendor:04x}:{product:04x}"

    # What a subclass does

    def submit(self, urb: Urb) -> None:
        """A transfer on another endpoint than 0. To be completed now, later or never."""

    def control(self, setup: bytes, data: bytes) -> bytes | None:
        """A request; None stalls."""
        request_type, request, value, index, _ = struct.unpack("<BBHHH", setup)
        match request_type, request:
            case 0x80, 0x06:
                return self._descriptor(value >> 8, value & 0xFF)
            case 0x00, 0x09:
                self.configured.append(value)
                return b""
            case 0x01, 0x0B:
                self.configured.append((index, value))
                return b""
            case ((0x80 | 0x81 | 0x82), 0x00):
                return bytes(2)
            case ((0x00 | 0x01 | 0x02), (0x01 | 0x03)):
                return b""
        return None

    def _descriptor(self, kind: int, index: int) -> bytes | None:
        match kind:
            case 1:
                return self.device
            case 2 if index < len(self.configurations):
                return self.configurations[index]
            case 3:
                return self.strings.get(index)
            case 15:
                return self.bos
        return None

    def complete(self, urb: Urb, data: bytes = b"", *, status: int = 0, moved: Sequence[int] = ()) -> None:
        """Complete a transfer, once.

        Args:
            data: what came in.
            status: 0, or an error number, negative.
            moved: of an isochronous one the bytes of each packet; all of them if it is empty.
        """
        if self.pending.pop(urb.number, None) is None or self._writer is None:
            return
        moved = moved or urb.packets
        actual = sum(moved) if urb.packets else len(data) if urb.endpoint & 0x80 else urb.length
        answer = _BASIC.pack(_SUBMITTED, urb.number, 0, 0, 0)
        answer += _ANSWER.pack(status, 0 if status else actual, 0, len(urb.packets), 0)
        if urb.endpoint & 0x80:
            answer += data
        offset = 0
        for length, actual in zip(urb.packets, moved, strict=True):
            answer += _PACKET.pack(offset, length, actual, 0)
            offset += length
        self._writer.write(answer)

    # The wire

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer until the connection ends."""
        self._writer = writer
        with suppress(IncompleteReadError, ConnectionError):
            while True:
                header = await reader.readexactly(_HEADER)
                command, number, _, inwards, endpoint = _BASIC.unpack_from(header)
                if command == _UNLINK:
                    (unlinked,) = struct.unpack_from(">I", header, _BASIC.size)
                    found = self.pending.pop(unlinked, None) is not None
                    answer = _BASIC.pack(_UNLINKED, number, 0, 0, 0)
                    writer.write((answer + struct.pack(">i", -ECONNRESET if found else 0)).ljust(_HEADER, b"\0"))
                    continue
                _, length, _, count, _, setup = _REQUEST.unpack_from(header, _BASIC.size)
                data = b"" if inwards else await reader.readexactly(length)
                packets = [_PACKET.unpack(await reader.readexactly(_PACKET.size))[1] for _ in range(max(count, 0))]
                urb = Urb(number, endpoint | inwards << 7, length, data, packets, setup)
                self.pending[number] = urb
                if endpoint:
                    self.submitted += 1
                    self.submit(urb)
                else:
                    reply = self.control(setup, data)
                    self.complete(urb, (reply or b"")[:length], status=-EPIPE if reply is None else 0)
                await writer.drain()
        self._writer = None
        writer.close()

    @asynccontextmanager
    async def attached(self, guest: QemuGuest) -> AsyncIterator[None]:
        """Plugged into the guest's kernel during the block: it is being enumerated when that begins."""
        if (await guest.run("busybox modprobe vhci_hcd")).exit_code != 0:
            pytest.skip("the kernel of this distribution has no vhci_hcd")
        server = await asyncio.start_server(self.serve, LOOPBACK, 0)
        port = server.sockets[0].getsockname()[1]
        hub = "ss" if self.speed >= Speed.SUPER else "hs"
        # The connection is handed to the kernel: it must be the shell's own.
        script = f"""
            cd /sys/devices/platform/vhci_hcd.0
            free=$(awk '$1 == "{hub}" && $3 == 4 {{print int($2); exit}}' status)
            exec 3<>/dev/tcp/{GATEWAY}/{port}
            echo $free 3 {next(_devices)} {SPEEDS[self.speed]} >attach
            echo $free"""
        port = int(await guest.check("exec bash", stdin=script.encode()))
        try:
            yield
        finally:
            if guest.alive:
                await guest.check(f"""
                    cd /sys/devices/platform/vhci_hcd.0
                    echo {port} >detach
                    until grep -q '^{hub} *0*{port} 004' status; do sleep 0.05; done""")
            server.close()


def device_descriptor(ids: str, *, usb: int = 0x0200, device_class: int = 0, configurations: int = 1) -> bytes:
    """A device descriptor, whose endpoint 0 takes 64 bytes (USB 2.0, table 9-8)."""
    vendor, product = (int(part, 16) for part in ids.split(":"))
    size = 9 if usb >= 0x0300 else 64
    return bytes(
        DeviceDescriptor(
            usb_version=usb,
            vendor_id=vendor,
            product_id=product,
            device_version=0x0100,
            device_class=device_class,
            max_packet_size_0=size,
            configuration_count=configurations,
        )
    )


def interface(number: int, *endpoints: bytes, alternate: int = 0, kind: int = 0xFF) -> bytes:
    """An interface descriptor with its endpoints (table 9-12)."""
    return struct.pack("<9B", 9, 4, number, alternate, len(endpoints), kind, 0, 0, 0) + b"".join(endpoints)


def endpoint(address: int, attributes: int, max_packet_size: int, interval: int = 0) -> bytes:
    """An endpoint descriptor (table 9-13)."""
    return bytes(EndpointDescriptor(address, attributes, max_packet_size, interval))


def configuration(*parts: bytes, interfaces: int = 1, value: int = 1, total: int | None = None) -> bytes:
    """A configuration descriptor with its parts; ``total`` is a lie about their length (table 9-10)."""
    body = b"".join(parts)
    length = 9 + len(body) if total is None else total
    return struct.pack("<BBHBBBBB", 9, 2, length, interfaces, value, 0, 0x80, 50) + body
