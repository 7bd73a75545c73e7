"""The blocks of a pcapng file. No I/O.

All numbers are little-endian, times are nanoseconds since 1970.

Source: PCAP Next Generation Capture File Format (draft-ietf-opsawg-pcapng); the systemd Journal Export Block is that of
the registry of block types, with the text format of ``journalctl -o export``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from farplug.usb.types import Buffer

LINKTYPE_RAW: Final = 101
"""IPv4 or IPv6, without a link layer."""
LINKTYPE_USB_LINUX_MMAPPED: Final = 220
"""A USB transfer as Linux' usbmon describes it, with a header of 64 bytes."""

MAGIC: Final = 0x1A2B3C4D
INBOUND: Final = 1
"""A packet that farplug received."""
OUTBOUND: Final = 2
"""A packet that farplug sent."""

_SECTION_HEADER, _INTERFACE, _STATISTICS, _PACKET, _JOURNAL = 0x0A0D0D0A, 1, 5, 6, 9
_COMMENT = 1
_USER_APPLICATION = 4
_NAME, _DESCRIPTION, _RESOLUTION = 2, 3, 9
_FLAGS = 2
_DROPPED = 5
_JOIN_BELOW = 4096
"""Bytes of a packet that is copied into one buffer with its block: cheaper than three buffers for a system call."""

_HEAD = struct.Struct("<II")
_U32 = struct.Struct("<I")
_SECTION = struct.Struct("<IHHq")
_LINK = struct.Struct("<HHI")
_PACKET_HEAD = struct.Struct("<IIIIIII")
_COUNT = struct.Struct("<Q")
_FLAGS_OPTION = {flags: struct.pack("<HHI", _FLAGS, 4, flags) for flags in (INBOUND, OUTBOUND)}
_END = bytes(4)
_PADDING = (b"", bytes(3), bytes(2), bytes(1))


def section_header(application: str, comment: str) -> bytes:
    """Return the block that begins a file.

    Args:
        application: the name and version of the program that writes the file.
        comment: what the file holds.
    """
    options = [(_COMMENT, comment.encode()), (_USER_APPLICATION, application.encode())]
    return _block(_SECTION_HEADER, _SECTION.pack(MAGIC, 1, 0, -1), options)


def is_capture(head: bytes) -> bool:
    """Return whether a file whose first 12 bytes are ``head`` is a pcapng file, in either byte order."""
    return head[:4] == b"\n\r\r\n" and head[8:12] in (MAGIC.to_bytes(4, "little"), MAGIC.to_bytes(4, "big"))


def interface(link_type: int, name: str, description: str) -> bytes:
    """Return the block that describes the next interface; they are numbered from 0.

    Args:
        link_type: what its packets are: a ``LINKTYPE_…``.
        name: for ``frame.interface_name``.
        description: for people.
    """
    options = [(_NAME, name.encode()), (_DESCRIPTION, description.encode()), (_RESOLUTION, b"\x09")]
    return _block(_INTERFACE, _LINK.pack(link_type, 0, 0), options)


def packet(
    interface: int, time: int, data: Sequence[Buffer], length: int, *, comment: str = "", flags: int = 0
) -> list[Buffer]:
    """Return the block of a packet, as buffers: large ones are not copied.

    Args:
        interface: its number.
        time: in nanoseconds since 1970.
        data: the bytes that are kept, in order.
        length: the number of bytes of the whole packet.
        comment: for people; empty: none.
        flags: :data:`INBOUND`, :data:`OUTBOUND`, or 0.
    """
    kept = sum(map(len, data))
    tail = _PADDING[kept & 3]
    if comment or flags:
        tail += b"".join(
            (
                _option(_COMMENT, comment.encode(errors="replace")) if comment else b"",
                _FLAGS_OPTION.get(flags, b""),
                _END,
            )
        )
    total = 28 + kept + len(tail) + 4
    head = _PACKET_HEAD.pack(_PACKET, total, interface, time >> 32, time & 0xFFFFFFFF, kept, length)
    tail += _U32.pack(total)
    if kept < _JOIN_BELOW:
        return [b"".join((head, *data, tail))]
    return [head, *data, tail]


def journal(time: int, fields: Mapping[str, str]) -> bytes:
    """Return the block of an event, which Wireshark shows as a row of its own.

    Args:
        time: in nanoseconds since 1970.
        fields: as in the journal, such as ``MESSAGE`` and ``PRIORITY``. Line breaks become spaces.
    """
    lines = [f"__REALTIME_TIMESTAMP={time // 1000}"]
    lines += [f"{name}={' '.join(value.splitlines())}" for name, value in fields.items()]
    data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
    return _block(_JOURNAL, data + _PADDING[len(data) & 3], [])


def statistics(interface: int, time: int, dropped: int) -> bytes:
    """Return the block with the number of packets of an interface that are missing in the file."""
    body = _PACKET_HEAD.pack(0, 0, interface, time >> 32, time & 0xFFFFFFFF, 0, 0)[8:20]
    return _block(_STATISTICS, body, [(_DROPPED, _COUNT.pack(dropped))])


def _block(kind: int, body: bytes, options: Sequence[tuple[int, bytes]]) -> bytes:
    tail = b"".join([*(_option(code, value) for code, value in options), _END]) if options else b""
    total = 12 + len(body) + len(tail)
    return b"".join((_HEAD.pack(kind, total), body, tail, _U32.pack(total)))


def _option(code: int, value: bytes) -> bytes:
    value = value[:0xFFFF]
    return struct.pack("<HH", code, len(value)) + value + _PADDING[len(value) & 3]
