"""libusbredirparser through ctypes: the parser that QEMU and spice-gtk use, as the reference for ours."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import CDLL, CFUNCTYPE, POINTER, c_char_p, c_int, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from farplug.usb.types import Buffer
from farplug.usbredir.caps import Cap
from farplug.usbredir.filter import Filter, Rule, Verdict
from farplug.usbredir.packets import (
    PACKETS,
    DataPacket,
    DeviceConnect,
    DeviceDisconnect,
    DeviceDisconnectAck,
    EndpointInfo,
    FilterFilter,
    FilterReject,
    Hello,
    InterfaceInfo,
    Packet,
    Reset,
)
from farplug.usbredir.protocol import Role
from farplug.usbredir.wire import PACKET_FORMATS

LIBRARY = "libusbredirparser.so.1"

_LOG = CFUNCTYPE(None, c_void_p, c_int, c_char_p)
READ = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_PLAIN = CFUNCTYPE(None, c_void_p)
_WITH_HEADER = CFUNCTYPE(None, c_void_p, c_void_p)
_WITH_ID = CFUNCTYPE(None, c_void_p, c_uint64)
_WITH_BOTH = CFUNCTYPE(None, c_void_p, c_uint64, c_void_p)
DATA_PACKET = CFUNCTYPE(None, c_void_p, c_uint64, c_void_p, c_void_p, c_int)
_WITH_RULES = CFUNCTYPE(None, c_void_p, c_void_p, c_int)

# struct usbredirparser: the callbacks in the order of usbredirparser.h.
_CALLBACKS = (
    "device_connect",
    "device_disconnect",
    "reset",
    "interface_info",
    "ep_info",
    "set_configuration",
    "get_configuration",
    "configuration_status",
    "set_alt_setting",
    "get_alt_setting",
    "alt_setting_status",
    "start_iso_stream",
    "stop_iso_stream",
    "iso_stream_status",
    "start_interrupt_receiving",
    "stop_interrupt_receiving",
    "interrupt_receiving_status",
    "alloc_bulk_streams",
    "free_bulk_streams",
    "bulk_streams_status",
    "cancel_data_packet",
    "control_packet",
    "bulk_packet",
    "iso_packet",
    "interrupt_packet",
    "alloc_lock",
    "lock",
    "unlock",
    "free_lock",
    "hello",
    "filter_reject",
    "filter_filter",
    "device_disconnect_ack",
    "start_bulk_receiving",
    "stop_bulk_receiving",
    "bulk_receiving_status",
    "buffered_bulk_packet",
)
_LOCKS = {"alloc_lock", "lock", "unlock", "free_lock"}

WITHOUT_ID: tuple[type[Packet], ...] = (
    Hello,
    DeviceConnect,
    DeviceDisconnect,
    Reset,
    InterfaceInfo,
    EndpointInfo,
    FilterReject,
    FilterFilter,
    DeviceDisconnectAck,
)
"""Packets whose id the C interface neither accepts nor reports."""


class _Parser(ctypes.Structure):
    _fields_ = [
        ("priv", c_void_p),
        ("log", _LOG),
        ("read", READ),
        ("write", READ),
        *((name, c_void_p) for name in _CALLBACKS),
    ]


class _Rule(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("device_class", "vendor_id", "product_id", "device_version", "allow")]


def load() -> CDLL | None:
    """Return the library; None where it is not installed."""
    try:
        library = CDLL(LIBRARY)
    except OSError:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            raise
        return None
    library.usbredirparser_create.restype = POINTER(_Parser)
    library.usbredirparser_init.argtypes = [POINTER(_Parser), c_char_p, POINTER(c_uint32), c_int, c_int]
    library.usbredirparser_destroy.argtypes = [POINTER(_Parser)]
    for verb in ("do_read", "do_write", "has_data_to_write"):
        getattr(library, f"usbredirparser_{verb}").argtypes = [POINTER(_Parser)]
    library.usbredirparser_free_packet_data.argtypes = [POINTER(_Parser), c_void_p]
    library.usbredirparser_free_packet_data.restype = None
    library.usbredirfilter_string_to_rules.argtypes = [
        c_char_p,
        c_char_p,
        c_char_p,
        POINTER(POINTER(_Rule)),
        POINTER(c_int),
    ]
    library.usbredirfilter_rules_to_string.argtypes = [c_void_p, c_int, c_char_p, c_char_p]
    library.usbredirfilter_rules_to_string.restype = c_void_p
    library.usbredirfilter_free.argtypes = [c_void_p]
    library.usbredirfilter_free.restype = None
    bytes_ = POINTER(c_uint8)
    library.usbredirfilter_check.argtypes = [c_void_p, c_int, c_int, c_int, c_int, bytes_, bytes_, bytes_, *[c_int] * 5]
    return library


@dataclass(frozen=True)
class Delivered:
    """The arguments of a callback: the packet's class, its id if reported, its type header and payload, as bytes."""

    packet: type[Packet]
    id: int
    type_header: bytes
    payload: bytes


class Oracle:
    """One end of a connection, by libusbredirparser.

    Attributes:
        delivered: what its callbacks were given, the filter strings in canonical form.
        sent: what it wrote.
        errors: what it complained about.
    """

    def __init__(self, library: CDLL, role: Role, caps: Cap) -> None:
        self._library = library
        self._own_caps = caps if role is Role.HOST else caps | Cap.DEVICE_DISCONNECT_ACK
        self._own_caps = self._own_caps.usable()
        self._shared = Cap.NONE
        self._input = memoryview(b"")
        self.delivered: list[Delivered] = []
        self.sent = bytearray()
        self.errors: list[str] = []
        self.parser = library.usbredirparser_create()
        struct = self.parser.contents
        self._keep: list[Any] = []
        struct.log = self._held(_LOG(self._on_log))
        struct.read = self._held(READ(self._on_read))
        struct.write = self._held(READ(self._on_write))
        classes = {str(packet.TYPE): packet for packet in PACKETS}
        for name in _CALLBACKS:
            if name not in _LOCKS:
                setattr(struct, name, ctypes.cast(self._held(self._callback(classes[name])), c_void_p))
        words = (c_uint32 * 1)(caps)
        library.usbredirparser_init(self.parser, b"vec", words, 1, 1 if role is Role.HOST else 0)
        self.flush()

    def close(self) -> None:
        self._library.usbredirparser_destroy(self.parser)

    def receive(self, data: Buffer) -> None:
        """Parse a chunk to its end, past every error."""
        self._input = memoryview(data)
        while self._library.usbredirparser_do_read(self.parser) == -2 or len(self._input):
            pass

    def send(self, packet: Packet) -> bytes:
        """Return the bytes of a packet; none if the library refuses the packet."""
        name = str(packet.TYPE)
        function = getattr(self._library, f"usbredirparser_send_{name}")
        function.restype = None
        arguments: list[Any] = [self.parser]
        if isinstance(packet, FilterFilter):
            rules = Filter.parse(packet.filter).rules
            arguments += [_rules(rules), c_int(len(rules))]
        else:
            if not isinstance(packet, WITHOUT_ID):
                arguments.append(c_uint64(packet.id))
            # In memory a type header always has its longest form.
            layout = PACKET_FORMATS[packet.TYPE].type_header(~Cap.NONE)
            if layout.size:
                arguments.append(layout.pack(*packet.values()))
            if isinstance(packet, DataPacket):
                arguments += [bytes(packet.data) or None, c_int(len(packet.data))]
        before = len(self.sent)
        function(*arguments)
        self.flush()
        return bytes(self.sent[before:])

    def flush(self) -> None:
        while self._library.usbredirparser_has_data_to_write(self.parser):
            self._library.usbredirparser_do_write(self.parser)

    def _held(self, callback: Any) -> Any:
        self._keep.append(callback)
        return callback

    def _on_log(self, _: int, level: int, message: bytes) -> None:
        if level == 1:
            self.errors.append(message.decode())

    def _on_read(self, _: int, data: int, count: int) -> int:
        part = self._input[:count]
        ctypes.memmove(data, bytes(part), len(part))
        self._input = self._input[len(part) :]
        return len(part)

    def _on_write(self, _: int, data: int, count: int) -> int:
        self.sent += ctypes.string_at(data, count)
        return count

    def _callback(self, packet: type[Packet]) -> Any:
        packet_format = PACKET_FORMATS[packet.TYPE]

        def deliver(id_: int, header: int | None, payload: bytes = b"") -> None:
            size = packet_format.type_header(self._shared).size
            type_header = ctypes.string_at(header, size) if header else b""
            self.delivered.append(Delivered(packet, id_, type_header, payload))

        def hello(_: int, header: int) -> None:
            peer = self._library.usbredirparser_peer_has_cap
            self._shared = Cap(sum(cap for cap in Cap if peer(self.parser, cap.bit_length() - 1))) & self._own_caps
            deliver(0, header)

        def data(_: int, id_: int, header: int, payload: int | None, size: int) -> None:
            deliver(id_, header, ctypes.string_at(payload, size) if payload else b"")
            self._library.usbredirparser_free_packet_data(self.parser, payload)

        def rules(_: int, address: int, count: int) -> None:
            deliver(0, None, _to_string(self._library, address, count))
            self._library.usbredirfilter_free(address)

        plain: Callable[..., None]
        if packet is Hello:
            return _WITH_HEADER(hello)
        if packet is FilterFilter:
            return _WITH_RULES(rules)
        if issubclass(packet, DataPacket):
            return DATA_PACKET(data)
        if issubclass(packet, WITHOUT_ID):
            if packet_format.layout:
                plain = lambda _, header: deliver(0, header)  # noqa: E731
                return _WITH_HEADER(plain)
            plain = lambda _: deliver(0, None)  # noqa: E731
            return _PLAIN(plain)
        if packet_format.layout:
            plain = lambda _, id_, header: deliver(id_, header)  # noqa: E731
            return _WITH_BOTH(plain)
        plain = lambda _, id_: deliver(id_, None)  # noqa: E731
        return _WITH_ID(plain)


def parse_filter(library: CDLL, text: bytes, separator: bytes) -> str | None:
    """Return a filter in canonical form; None if the library refuses the filter."""
    rules = POINTER(_Rule)()
    count = c_int()
    if library.usbredirfilter_string_to_rules(text, separator, b"|", ctypes.byref(rules), ctypes.byref(count)):
        return None
    canonical = _to_string(library, ctypes.cast(rules, c_void_p), count.value).decode()
    library.usbredirfilter_free(rules)
    return canonical


def check_filter(
    library: CDLL,
    rules: tuple[Rule, ...],
    device: tuple[int, int, int, int],
    interfaces: list[tuple[int, int, int]],
) -> Verdict:
    """Return the library's verdict on a device of this class, vendor, product and version."""
    device_class, vendor_id, product_id, device_version = device
    columns = [(c_uint8 * len(interfaces))(*(codes[n] for codes in interfaces)) for n in range(3)]
    result = library.usbredirfilter_check(
        _rules(rules),
        len(rules),
        device_class,
        0,
        0,
        *columns,
        len(interfaces),
        vendor_id,
        product_id,
        device_version,
        0,
    )
    return {0: Verdict.ALLOWED, -1: Verdict.DENIED, -2: Verdict.NO_MATCH}[result]


def _rules(rules: tuple[Rule, ...]) -> Any:
    return (_Rule * len(rules))(
        *(_Rule(r.device_class, r.vendor_id, r.product_id, r.device_version, int(r.allow)) for r in rules)
    )


def _to_string(library: CDLL, rules: Any, count: int) -> bytes:
    text = library.usbredirfilter_rules_to_string(rules, count, b",", b"|")
    try:
        return ctypes.string_at(text)
    finally:
        library.usbredirparser_free_packet_data(None, text)
