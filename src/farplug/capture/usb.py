"""The packets of one port as USB transfers in the format of Linux' usbmon. No I/O.

Wireshark decodes descriptors, mass storage, input devices and others from them, if it is helped a little. It keeps its
knowledge of a device by bus number and device number forever, so a device gets a new number when that knowledge
becomes wrong. And usbmon has no stream ids, which connect the data of USB Attached SCSI with its commands: a made-up
information unit stands before the data, as a device at High Speed sends it. All that is made up has a comment that
begins with :data:`MADE_UP`.

Source: Linux, Documentation/usb/usbmon.rst (struct usbmon_packet); Wireshark, packet-usb.c, packet-usb-masstorage.c,
packet-uasp.c.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from farplug.usb.transfer import Status
from farplug.usb.types import Buffer, DescriptorType, Setup, StandardRequest
from farplug.usbredir import packets
from farplug.usbredir.protocol import Oversized

MADE_UP: Final = "not on the bus: "

_ISOCHRONOUS, _INTERRUPT, _CONTROL, _BULK = 0, 1, 2, 3
_SUBMIT, _COMPLETE = ord("S"), ord("C")
_IN = 0x80
_NO_SETUP = ord("-")
_PRESENT, _TO_COME, _GONE = 0, ord("<"), ord(">")
"""Of the data: it follows; it comes with the completion; it came with the submission."""
_IN_PROGRESS = -115
_ISO_NOT_DONE = -18
_ERRNO: Final = {
    Status.SUCCESS: 0,
    Status.CANCELLED: -104,
    Status.INVALID: -22,
    Status.IO_ERROR: -71,
    Status.STALL: -32,
    Status.TIMEOUT: -110,
    Status.BABBLE: -75,
}

_HEADER = struct.Struct("<QBBBBHBBqiiII8siiII")
_ISO_COUNTS = struct.Struct("<ii")
_ISO_DESCRIPTOR = struct.Struct("<iIII")
_READY_IU = struct.Struct(">BxH")
_READ_READY, _WRITE_READY = 6, 7
_SETTING_ID = 1 << 63
"""Added to the ids of requests that usbredir has a packet of their own for: their ids are chosen separately."""
_MADE_UP_ID = 3 << 62
_MAX_DEVICE = 127

_MASS_STORAGE = b"\x08\x06"
"""bInterfaceClass and bInterfaceSubClass of SCSI over mass storage."""
_BULK_ONLY, _ATTACHED_SCSI = 0x50, 0x62
_PIPE_USAGE = 0x24
_STATUS_PIPE, _DATA_IN_PIPE, _DATA_OUT_PIPE = 2, 3, 4


class UsbSink(Protocol):
    """Takes the transfers of the interface ``usb``.

    Attributes:
        max_transfer: the most bytes of a transfer that are kept.
    """

    max_transfer: int

    def has_room(self, size: int) -> bool:
        """Return whether ``size`` bytes of a transfer can be kept now."""

    def usb_packet(self, time: int, parts: tuple[Buffer, ...], length: int, *, comment: str = "") -> None:
        """Take a transfer's submission or completion, whose buffers do not change any more.

        Args:
            time: in nanoseconds since 1970.
            parts: the bytes that are kept.
            length: the number of bytes of the whole.
            comment: for people; empty: none.
        """

    def event(self, message: str, fields: Mapping[str, str]) -> None:
        """Take an event, with fields of the journal besides its message."""


class UsbTap:
    """Writes the packets of one port: a :class:`~farplug.redirection.port_protocol.PacketObserver`.

    Args:
        sink: takes the transfers.
        bus: the bus number: that of the port, from 1.
    """

    def __init__(self, sink: UsbSink, bus: int) -> None:
        self._sink = sink
        self._bus = bus
        self._device = 0
        self._made_up = 0
        self._comment = ""
        self._settings: dict[int, Setup] = {}
        """The setup packets of requests that have a packet of their own, by id."""
        self._reading: dict[int, int] = {}
        """The index of the configuration descriptor that a control transfer reads, by id."""
        self._outgoing: dict[int, Buffer] = {}
        """OUT data on streams, by id: written with the completion, because Linux sends the data before the command."""
        self._alternates: dict[int, int] = {}
        self._layout = Layout(b"")
        self._known: frozenset[int] | None = None
        """The interfaces whose setting for USB Attached SCSI Wireshark does not know for this device number; None: it
        has seen no configuration descriptor."""
        self._settled = False
        """Whether :attr:`_known` fits the settings."""

    @property
    def name(self) -> str:
        """Return the device as Wireshark names it: bus and device number."""
        return f"{self._bus}.{self._device}"

    # What is observed ---------------------------------------------------------------------------------------------

    def received(self, event: object) -> None:
        """Write a packet of the guest."""
        packet = event.packet if isinstance(event, Oversized) else event
        if (write := _RECEIVED.get(type(packet))) is not None:
            write(self, packet)

    def sent(self, packet: packets.Packet) -> None:
        """Write a packet of ours."""
        if (write := _SENT.get(type(packet))) is not None:
            write(self, packet)

    def resume(
        self,
        connect: packets.DeviceConnect,
        descriptors: Iterable[tuple[Setup, bytes]],
        configuration: int,
        alternates: Mapping[int, int],
    ) -> None:
        """Write the state of a device that was plugged in before the capture began.

        Args:
            connect: as it was sent to the guest.
            descriptors: requests that read descriptors, and what the device answers.
            configuration: bConfigurationValue; 0: none.
            alternates: bAlternateSetting of the interfaces, by bInterfaceNumber.
        """
        self._connected(connect)
        why = f"{MADE_UP}the device was plugged in before the capture began"
        for setup, data in descriptors:
            if setup.value >> 8 == DescriptorType.CONFIGURATION:
                self._learn(data)
            self._pair(setup, data, why)
        if configuration:
            self._pair(Setup(0x00, StandardRequest.SET_CONFIGURATION, configuration), b"", why)
            self._alternates = dict(alternates)
            self._repeat_settings(why)

    # Transfers ----------------------------------------------------------------------------------------------------

    def _bulk_received(self, packet: packets.BulkPacket) -> None:
        self._settle()
        if packet.stream_id and not packet.endpoint & _IN:
            self._outgoing[packet.id] = packet.data
            self._submit(_BULK, packet, b"", data_flag=_GONE)
        else:
            self._submit(_BULK, packet, packet.data)

    def _bulk_sent(self, packet: packets.BulkPacket) -> None:
        outgoing = self._outgoing.pop(packet.id, None) if packet.stream_id else None
        if packet.stream_id and packet.length:
            status_pipe = self._layout.status_pipes.get(packet.endpoint)
            if status_pipe is not None:
                kind = _READ_READY if packet.endpoint & _IN else _WRITE_READY
                self._ready(status_pipe, kind, packet.stream_id)
        if outgoing is None:
            self._complete(_BULK, packet)
        else:
            data = memoryview(outgoing)[: packet.length]
            flag = _PRESENT if packet.length else _GONE
            self._transfer(_COMPLETE, _BULK, packet, data, status=_errno(packet.status), data_flag=flag)

    def _control_received(self, packet: packets.ControlPacket) -> None:
        setup = Setup(packet.request_type, packet.request, packet.value, packet.index, packet.length)
        if _reads_descriptor(setup, DescriptorType.CONFIGURATION):
            self._reading[packet.id] = packet.value & 0xFF
        self._submit(_CONTROL, packet, packet.data, setup=setup)

    def _control_sent(self, packet: packets.ControlPacket) -> None:
        reads = self._reading.pop(packet.id, None) is not None
        if reads:
            self._learn(bytes(packet.data))
        self._complete(_CONTROL, packet, whole=_is_descriptor(packet))
        if reads:
            self._repeat_settings(f"{MADE_UP}a configuration descriptor makes Wireshark forget the settings")

    def _interrupt_received(self, packet: packets.InterruptPacket) -> None:
        self._settle()
        self._submit(_INTERRUPT, packet, packet.data)

    def _interrupt_sent(self, packet: packets.InterruptPacket) -> None:
        self._complete(_INTERRUPT, packet)

    def _buffered_bulk_sent(self, packet: packets.BufferedBulkPacket) -> None:
        self._complete(_BULK, packet)

    def _iso_received(self, packet: packets.IsoPacket) -> None:
        descriptor = _ISO_DESCRIPTOR.pack(_ISO_NOT_DONE, 0, len(packet.data), 0)
        self._iso(_SUBMIT, packet, _IN_PROGRESS, _ISO_COUNTS.pack(0, 1), descriptor, packet.data)

    def _iso_sent(self, packet: packets.IsoPacket) -> None:
        status = _errno(packet.status)
        descriptor = _ISO_DESCRIPTOR.pack(status, 0, len(packet.data), 0)
        self._iso(_COMPLETE, packet, 0, _ISO_COUNTS.pack(1 if status else 0, 1), descriptor, _lasting(packet.data))

    # Operations ---------------------------------------------------------------------------------------------------

    def _set_configuration(self, packet: packets.SetConfiguration) -> None:
        self._alternates.clear()
        self._settled = False
        self._setting(packet.id, Setup(0x00, StandardRequest.SET_CONFIGURATION, packet.configuration))

    def _set_alt_setting(self, packet: packets.SetAltSetting) -> None:
        self._alternates[packet.interface] = packet.alt
        self._settled = False
        self._setting(packet.id, Setup(0x01, StandardRequest.SET_INTERFACE, packet.alt, packet.interface))

    def _get_configuration(self, packet: packets.GetConfiguration) -> None:
        self._setting(packet.id, Setup(0x80, StandardRequest.GET_CONFIGURATION, length=1))

    def _get_alt_setting(self, packet: packets.GetAltSetting) -> None:
        self._setting(packet.id, Setup(0x81, StandardRequest.GET_INTERFACE, index=packet.interface, length=1))

    def _configuration_status(self, packet: packets.ConfigurationStatus) -> None:
        self._setting_done(packet.id, packet.status, packet.configuration)

    def _alt_setting_status(self, packet: packets.AltSettingStatus) -> None:
        self._setting_done(packet.id, packet.status, packet.alt)

    def _reset(self, packet: packets.Reset) -> None:
        self._alternates.clear()
        if self._settled:  # otherwise the driver of no interface has used the device
            self._renumber()
        self._report("reset by the guest")

    def _connected(self, packet: packets.DeviceConnect) -> None:
        for kept in (self._settings, self._reading, self._outgoing, self._alternates):
            kept.clear()
        self._layout = Layout(b"")
        self._renumber()
        self._report(
            f"{packet.vendor_id:04x}:{packet.product_id:04x} offered at {_SPEEDS.get(packet.speed, '?')} speed"
        )

    def _reported(self, packet: packets.Packet) -> None:
        self._report(str(packet))

    # What Wireshark knows -----------------------------------------------------------------------------------------

    def _renumber(self) -> None:
        self._device = self._device % _MAX_DEVICE + 1
        self._known = None
        self._settled = False

    def _learn(self, descriptor: bytes) -> None:
        layout = Layout(descriptor)
        if layout.is_complete:
            self._layout = layout
            self._known = frozenset()
            self._settled = False

    def _repeat_settings(self, why: str) -> None:
        for number, alternate in self._alternates.items():
            if alternate:
                self._pair(Setup(0x01, StandardRequest.SET_INTERFACE, alternate, number), b"", why)

    def _settle(self) -> None:
        """Give the device a number for which Wireshark knows the settings that the guest uses.

        Wireshark decodes no Bulk-Only Transport on a device number for which it has seen the descriptors of USB
        Attached SCSI. So Bulk-Only Transport goes on under a number of its own, with a configuration descriptor that
        has the settings in use alone.
        """
        if self._settled:
            return
        self._settled = True
        hidden = self._layout.bulk_only(self._alternates)
        if self._known == hidden or not self._layout.is_complete:
            return
        before = self.name
        if self._known is not None:
            self._renumber()
            self._settled = True
        why = f"{MADE_UP}device {before} is {self.name} from here on, with the setting that the guest uses"
        data = self._layout.without(hidden, self._alternates)
        read = StandardRequest.GET_DESCRIPTOR
        self._pair(Setup(0x80, read, DescriptorType.CONFIGURATION << 8, 0, len(data)), data, why)
        self._repeat_settings(why)
        self._known = hidden

    # Blocks -------------------------------------------------------------------------------------------------------

    def _report(self, text: str) -> None:
        self._sink.event(f"USB device {self.name}: {text}", {"FARPLUG_USB_DEVICE": self.name})

    def _setting(self, id: int, setup: Setup) -> None:
        self._settings[id] = setup
        self._control(_SUBMIT, setup, id | _SETTING_ID, _IN_PROGRESS)

    def _setting_done(self, id: int, status: Status, value: int) -> None:
        setup = self._settings.pop(id, None)
        if setup is not None:
            data = bytes((value,)) if setup.length else b""
            self._control(_COMPLETE, setup, id | _SETTING_ID, _errno(status), data)

    def _pair(self, setup: Setup, data: bytes, why: str) -> None:
        """Write a control transfer that is not on the bus."""
        self._made_up += 1
        for kind, status in ((_SUBMIT, _IN_PROGRESS), (_COMPLETE, 0)):
            self._comment = why
            self._control(kind, setup, _MADE_UP_ID | self._made_up, status, data if kind == _COMPLETE else b"")

    def _control(self, kind: int, setup: Setup, id: int, status: int, data: bytes = b"") -> None:
        reads = setup.request_type & _IN
        flag = _PRESENT
        if kind == _SUBMIT and reads:
            flag = _TO_COME
        elif kind == _COMPLETE and not reads:
            flag = _GONE
        self._emit(
            kind,
            _CONTROL,
            reads,
            id,
            status,
            data,
            length=setup.length if kind == _SUBMIT else len(data),
            setup=bytes(setup) if kind == _SUBMIT else None,
            data_flag=flag,
            whole=True,
        )

    def _ready(self, status_pipe: int, kind: int, stream_id: int) -> None:
        self._made_up += 1
        self._comment = f"{MADE_UP}the data that follows belongs to stream {stream_id}"
        self._emit(
            _COMPLETE, _BULK, status_pipe, _MADE_UP_ID | self._made_up, 0, _READY_IU.pack(kind, stream_id & 0xFFFF)
        )

    def _submit(
        self,
        transfer: int,
        packet: packets.DataPacket,
        data: Buffer,
        *,
        setup: Setup | None = None,
        data_flag: int = _PRESENT,
    ) -> None:
        flag = _TO_COME if packet.endpoint & _IN else data_flag
        raw = None if setup is None else bytes(setup)
        self._transfer(_SUBMIT, transfer, packet, data, status=_IN_PROGRESS, data_flag=flag, setup=raw)

    def _complete(self, transfer: int, packet: packets.DataPacket, *, whole: bool = False) -> None:
        flag = _PRESENT if packet.endpoint & _IN else _GONE
        data, status = _lasting(packet.data), _errno(packet.status)
        self._transfer(_COMPLETE, transfer, packet, data, status=status, data_flag=flag, whole=whole)

    def _transfer(
        self,
        kind: int,
        transfer: int,
        packet: packets.DataPacket,
        data: Buffer,
        *,
        status: int,
        data_flag: int,
        setup: bytes | None = None,
        whole: bool = False,
    ) -> None:
        self._emit(
            kind,
            transfer,
            packet.endpoint,
            packet.id,
            status,
            data,
            length=packet.length,
            setup=setup,
            data_flag=data_flag,
            whole=whole,
        )

    def _iso(
        self, kind: int, packet: packets.IsoPacket, status: int, counts: bytes, descriptor: bytes, data: Buffer
    ) -> None:
        self._emit(kind, _ISOCHRONOUS, packet.endpoint, packet.id, status, data, counts=counts, descriptors=descriptor)

    def _emit(
        self,
        kind: int,
        transfer: int,
        endpoint: int,
        id: int,
        status: int,
        data: Buffer,
        *,
        length: int | None = None,
        setup: bytes | None = None,
        counts: bytes = bytes(8),
        descriptors: bytes = b"",
        data_flag: int = _PRESENT,
        whole: bool = False,
    ) -> None:
        sink, size = self._sink, len(data)
        kept = size if whole else min(size, sink.max_transfer)
        if kept and not sink.has_room(kept):
            kept = 0
        now = time.time_ns()
        head = _HEADER.pack(
            id,
            kind,
            transfer,
            endpoint,
            self._device,
            self._bus,
            _NO_SETUP if setup is None else 0,
            data_flag,
            now // 1_000_000_000,
            now // 1000 % 1_000_000,
            status,
            size if length is None else length,
            len(descriptors) + kept,
            counts if setup is None else setup,
            0,
            0,
            0,
            1 if descriptors else 0,
        )
        comment, self._comment = self._comment, ""
        parts: tuple[Buffer, ...] = (head + descriptors,)
        if kept:
            parts = (head + descriptors, data if kept == size else memoryview(data)[:kept])
        sink.usb_packet(now, parts, len(head) + len(descriptors) + size, comment=comment)


_RECEIVED: Final[Mapping[type, Callable[[UsbTap, Any], None]]] = {
    packets.BulkPacket: UsbTap._bulk_received,
    packets.ControlPacket: UsbTap._control_received,
    packets.InterruptPacket: UsbTap._interrupt_received,
    packets.IsoPacket: UsbTap._iso_received,
    packets.SetConfiguration: UsbTap._set_configuration,
    packets.GetConfiguration: UsbTap._get_configuration,
    packets.SetAltSetting: UsbTap._set_alt_setting,
    packets.GetAltSetting: UsbTap._get_alt_setting,
    packets.Reset: UsbTap._reset,
    packets.AllocBulkStreams: UsbTap._reported,
    packets.FreeBulkStreams: UsbTap._reported,
    packets.StartIsoStream: UsbTap._reported,
    packets.StopIsoStream: UsbTap._reported,
    packets.StartInterruptReceiving: UsbTap._reported,
    packets.StopInterruptReceiving: UsbTap._reported,
    packets.StartBulkReceiving: UsbTap._reported,
    packets.StopBulkReceiving: UsbTap._reported,
    packets.FilterReject: UsbTap._reported,
}
_SENT: Final[Mapping[type, Callable[[UsbTap, Any], None]]] = {
    packets.BulkPacket: UsbTap._bulk_sent,
    packets.ControlPacket: UsbTap._control_sent,
    packets.InterruptPacket: UsbTap._interrupt_sent,
    packets.BufferedBulkPacket: UsbTap._buffered_bulk_sent,
    packets.IsoPacket: UsbTap._iso_sent,
    packets.ConfigurationStatus: UsbTap._configuration_status,
    packets.AltSettingStatus: UsbTap._alt_setting_status,
    packets.DeviceConnect: UsbTap._connected,
    packets.DeviceDisconnect: UsbTap._reported,
    packets.BulkStreamsStatus: UsbTap._reported,
}
_SPEEDS: Final = {0: "Low", 1: "Full", 2: "High", 3: "Super"}


def _errno(status: Status) -> int:
    return _ERRNO.get(status, -71)


def _lasting(data: Buffer) -> Buffer:
    """Return data that a device does not change: it may use its buffers again when they are sent."""
    return data if type(data) is bytes else bytes(data)


def _reads_descriptor(setup: Setup, kind: DescriptorType) -> bool:
    reads = setup.request_type == 0x80 and setup.request == StandardRequest.GET_DESCRIPTOR
    return reads and setup.value >> 8 == kind


def _is_descriptor(packet: packets.ControlPacket) -> bool:
    """Return whether an answer is a descriptor, without which Wireshark decodes no class: it is never cut."""
    return packet.request == StandardRequest.GET_DESCRIPTOR and packet.request_type in (0x80, 0x81)


class Layout:
    """What a configuration descriptor says about the storage of a device.

    Attributes:
        is_complete: the descriptor is not a part of one.
        status_pipes: for each endpoint with data of USB Attached SCSI, the endpoint of its status pipe.
    """

    def __init__(self, descriptor: bytes) -> None:
        self._descriptor = descriptor
        self.status_pipes: dict[int, int] = {}
        self._protocols: dict[int, dict[int, int]] = {}
        """bInterfaceProtocol of the settings of mass storage, by interface and alternate setting."""
        self.is_complete = len(descriptor) >= 9 and len(descriptor) >= int.from_bytes(descriptor[2:4], "little")
        if self.is_complete:
            self._parse()

    def _parse(self) -> None:
        pipes: dict[int, int] = {}
        endpoint = 0
        for one in descriptors_in(self._descriptor):
            if one[1] == DescriptorType.INTERFACE and len(one) >= 9:
                pipes = {}
                if one[5:7] == _MASS_STORAGE:
                    self._protocols.setdefault(one[2], {})[one[3]] = one[7]
            elif one[1] == DescriptorType.ENDPOINT and len(one) >= 7:
                endpoint = one[2]
            elif one[1] == _PIPE_USAGE and len(one) == 4:
                pipes[one[2]] = endpoint
                if _STATUS_PIPE in pipes:
                    data = [pipes[usage] for usage in (_DATA_IN_PIPE, _DATA_OUT_PIPE) if usage in pipes]
                    self.status_pipes |= dict.fromkeys(data, pipes[_STATUS_PIPE])

    def bulk_only(self, alternates: Mapping[int, int]) -> frozenset[int]:
        """Return the interfaces that use Bulk-Only Transport and have a setting for USB Attached SCSI too."""
        return frozenset(
            number
            for number, protocols in self._protocols.items()
            if _ATTACHED_SCSI in protocols.values() and protocols.get(alternates.get(number, 0)) == _BULK_ONLY
        )

    def without(self, interfaces: frozenset[int], alternates: Mapping[int, int]) -> bytes:
        """Return the descriptor with only the settings in use of some interfaces."""
        kept = bytearray(self._descriptor[:9])
        hidden = False
        for one in descriptors_in(self._descriptor[9:]):
            if one[1] == DescriptorType.INTERFACE and len(one) >= 4:
                hidden = one[2] in interfaces and one[3] != alternates.get(one[2], 0)
            if not hidden:
                kept += one
        kept[2:4] = len(kept).to_bytes(2, "little")
        return bytes(kept)


def descriptors_in(data: bytes) -> Iterator[bytes]:
    """Yield the descriptors that stand one after the other in ``data``, up to one that is not valid."""
    at = 0
    while at + 2 <= len(data) and data[at] >= 2 and at + data[at] <= len(data):
        yield data[at : at + data[at]]
        at += data[at]
