"""Fuzz the usbredir connection: a hostile peer, and an engine that replies to everything.

Polite are: violations among the events, and LocalProtocolError from what we try to send. Anything else is a bug. What
is kept must not exceed what was fed, and what one side sends the other must accept.
"""

from __future__ import annotations

import random
import struct

from farplug.errors import LocalProtocolError
from farplug.usbredir import ALL_CAPS, Cap, Connection, DataPacket, Hello, Oversized, PacketType, Role, Violation
from harness import run

MAX_PAYLOAD = 4096
CODES = (*PacketType, 28, 99, 105, 0xFFFFFFFF)
HELLO_SIZE = 80
SIZES = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 64, 68, 96, 132, 160, 288)


def some_packet(rng: random.Random, wide: bool) -> bytes:
    """A packet of any type: right, nearly right, or not at all."""
    body = rng.choice((rng.randbytes, bytes))(rng.choice(SIZES) + rng.choice((0, 0, 0, rng.randrange(9000))))
    code = rng.choice(CODES)
    if code == PacketType.FILTER_FILTER:
        body = b"|".join(rng.choice((b"-1,-1,-1,-1,1", b"3,0x1d6b,010,-1,0", b"")) for _ in range(4)) + b"\0"
    elif code == PacketType.BULK_PACKET:
        endpoint = rng.choice((1, 0x81))
        body = struct.pack("<BBHIH", endpoint, 0, max(0, len(body) - 10) & 0xFFFF, 0, 0) + body[10:]
    length = len(body) if rng.random() < 0.95 else rng.choice((0, rng.getrandbits(32), (1 << 27) + 1024))
    return struct.pack("<IIQ" if wide else "<III", code, length, rng.getrandbits(32)) + body


def one_case(rng: random.Random) -> None:
    role = rng.choice(list(Role))
    own, peer = (rng.choice((ALL_CAPS, Cap.NONE, Cap(rng.getrandbits(8)))) for _ in range(2))
    connection = Connection(role, caps=own, max_payload=MAX_PAYLOAD)
    mirror = Connection(Role.GUEST if role is Role.HOST else Role.HOST, caps=peer, max_payload=MAX_PAYLOAD)
    connection.start()
    mirror.start()
    stream = bytearray(b"".join(mirror.data_to_send()))
    wide = bool(own & peer & Cap.IDS_64_BITS)
    for _ in range(rng.randrange(12)):
        stream += some_packet(rng, wide)
    spared = rng.choice((HELLO_SIZE, HELLO_SIZE, HELLO_SIZE, 0))
    for _ in range(rng.choice((0, 0, 1, 5)) if len(stream) > spared else 0):
        stream[rng.randrange(spared, len(stream))] = rng.getrandbits(8)
    mirror.receive_data(b"".join(connection.data_to_send()))
    assert isinstance(mirror.next_event(), Hello)
    at = fed = 0
    while at < len(stream):
        size = rng.choice((1, 12, 100, 4096, len(stream)))
        connection.receive_data(memoryview(stream)[at : at + size])
        at += size
        fed += size
        if rng.random() < 0.2:
            continue  # the engine is busy
        while (event := connection.next_event()) is not None:
            assert len(str(event)) < 100_000
            if isinstance(event, Violation | Oversized):
                continue
            if isinstance(event, DataPacket):
                assert len(event.data) <= min(MAX_PAYLOAD, fed), "more payload than was fed or allowed"
            echo(connection, mirror if spared else None, event)


def echo(connection: Connection, mirror: Connection | None, event: object) -> None:
    """Send what was received, as our own word; what is not refused the peer must take, if its hello was intact."""
    try:
        connection.send(event)  # type: ignore[arg-type]
    except LocalProtocolError:
        assert connection.data_to_send() == [], "refused and queued"
        return
    data = b"".join(connection.data_to_send())
    if mirror is None:
        return
    mirror.receive_data(data)
    answer = mirror.next_event()
    assert type(answer) is type(event), f"we sent what the peer takes for {answer}"
    assert mirror.next_event() is None, "we sent more than a packet"


if __name__ == "__main__":
    run("usbredir", one_case)
