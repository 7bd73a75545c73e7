"""A reader of pcapng files, independent of the writer, for what tshark does not show."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTION, INTERFACE, STATISTICS, PACKET, JOURNAL = 0x0A0D0D0A, 1, 5, 6, 9
FRAMES = (PACKET, JOURNAL)
"""Blocks that Wireshark shows as frames."""
USB_HEADER = struct.Struct("<QBBBBHBBqiiII8siiII")


@dataclass
class Block:
    kind: int
    interface: int = 0
    time: int = 0
    data: bytes = b""
    length: int = 0
    options: dict[int, bytes] = field(default_factory=dict)

    @property
    def comment(self) -> str:
        return self.options.get(1, b"").decode()

    @property
    def fields(self) -> dict[str, str]:
        """Return the fields of an entry of the journal."""
        return dict(line.split("=", 1) for line in self.data.rstrip(b"\0").decode().splitlines())


def parse(data: bytes, *, incomplete: bool = False) -> Iterator[Block]:
    at = 0
    while at < len(data):
        if incomplete and (len(data) - at < 8 or len(data) - at < struct.unpack_from("<I", data, at + 4)[0]):
            return
        kind, total = struct.unpack_from("<II", data, at)
        assert total % 4 == 0
        assert struct.unpack_from("<I", data, at + total - 4) == (total,)
        yield block(kind, data[at + 8 : at + total - 4])
        at += total


def block(kind: int, body: bytes) -> Block:
    match kind:
        case 0x0A0D0D0A:
            magic, major, minor, length = struct.unpack_from("<IHHq", body)
            assert (magic, major, minor, length) == (0x1A2B3C4D, 1, 0, -1)
            return Block(kind, options=options(body[16:]))
        case 1:
            link_type, reserved, snaplen = struct.unpack_from("<HHI", body)
            assert (reserved, snaplen) == (0, 0)
            return Block(kind, length=link_type, options=options(body[8:]))
        case 5:
            interface, high, low = struct.unpack_from("<III", body)
            return Block(kind, interface, high << 32 | low, options=options(body[12:]))
        case 6:
            interface, high, low, kept, length = struct.unpack_from("<IIIII", body)
            rest = body[20 + kept + -kept % 4 :]
            return Block(kind, interface, high << 32 | low, body[20 : 20 + kept], length, options(rest))
        case 9:
            return Block(kind, data=body)
    raise AssertionError(f"block type {kind}")


def options(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        code, size = struct.unpack_from("<HH", data)
        if not code:
            assert (size, data[4:]) == (0, b"")
            break
        found[code] = data[4 : 4 + size]
        data = data[4 + size + -size % 4 :]
    return found


def read(path: Path) -> list[Block]:
    return list(parse(path.read_bytes()))


def frames(path: Path) -> dict[int, Block]:
    """Return the blocks that Wireshark shows as frames, by their numbers."""
    return dict(enumerate((block for block in read(path) if block.kind in FRAMES), start=1))
