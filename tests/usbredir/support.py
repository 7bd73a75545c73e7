"""Connections for tests, and bytes split in every way."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from farplug.usb.types import Buffer
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Event, Role

OTHER = {Role.HOST: Role.GUEST, Role.GUEST: Role.HOST}


def hello(caps: int = ALL_CAPS, version: bytes = b"peer", extra: bytes | None = None) -> bytes:
    """Return a hello as a peer sends it; ``extra`` replaces the word of capabilities."""
    words = struct.pack("<I", caps) if extra is None else extra
    return struct.pack("<III64s", 0, 64 + len(words), 0, version) + words


def connect(role: Role, own: Cap = ALL_CAPS, peer: int = ALL_CAPS, **options: Any) -> Connection:
    """Return a connection after the hellos, with nothing left to read or to write."""
    connection = Connection(role, caps=own, **options)
    connection.start()
    connection.receive_data(hello(peer))
    assert len(drain(connection)) == 1
    connection.data_to_send()
    return connection


def drain(connection: Connection) -> list[Event]:
    """Return all pending events."""
    return list(iter(connection.next_event, None))


def written(connection: Connection) -> bytes:
    """Return all queued bytes."""
    return b"".join(connection.data_to_send())


def feed(connection: Connection, chunks: Iterable[Buffer]) -> list[Event]:
    """Pass in chunks, each from a buffer that is overwritten afterwards."""
    events = []
    for chunk in chunks:
        reused = bytearray(chunk)
        connection.receive_data(memoryview(reused))
        reused[:] = b"\xaa" * len(reused)
        events += drain(connection)
    return events


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """Return the bytes whole, byte by byte, and split in two at every offset."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


def each_way(make: Callable[[], Connection], data: bytes) -> list[Event]:
    """Return the events of ``data``, which must be the same however the bytes are split, and with bytes behind them."""
    expected = feed(make(), [data])
    for chunks in cuts(data):
        assert feed(make(), chunks) == expected
    undrained = make()
    for at in range(0, len(data), 7):
        undrained.receive_data(data[at : at + 7])
    assert drain(undrained) == expected
    return expected
