from __future__ import annotations

import logging
import struct
from typing import Any

import pytest

from farplug.errors import LocalProtocolError, RemoteProtocolError
from farplug.spice.channel import MAX_MESSAGE, Channel, Message
from farplug.spice.messages import Disconnecting, Migrate, MigrateFlags, Notify
from farplug.spice.types import LinkError

STORED, STREAMED = 103, 101


def channel(mini_header: bool = True, name: str = "main") -> Channel:
    return Channel(name, mini_header=mini_header, stored={STORED: 100}, streamed=STREAMED)


def message(kind: int, body: bytes = b"", *, mini_header: bool = True, serial: int = 1) -> bytes:
    if mini_header:
        return struct.pack("<HI", kind, len(body)) + body
    return struct.pack("<QHII", serial, kind, len(body), 0) + body


def feed(peer: Channel, data: bytes, step: int) -> tuple[list[Any], bytes]:
    """Return events (streamed bytes joined, bodies copied) and answers, for data in pieces of ``step`` bytes."""
    events: list[Any] = []
    sent = b""
    for at in range(0, len(data), step):
        buffer = bytearray(data[at : at + step])
        peer.receive_data(memoryview(buffer))
        while (event := peer.next_event()) is not None:
            match event:
                case memoryview():
                    assert len(event)
                    if events and isinstance(events[-1], list):
                        events[-1][1] += bytes(event)
                    else:
                        events.append([STREAMED, bytes(event)])
                case Message(kind, view):
                    events.append((kind, bytes(view)))
                case _:
                    events.append(event)
        sent += b"".join(peer.data_to_send())
        buffer[:] = b"\xee" * len(buffer)  # a view that was kept would show it
    return events, sent


PING = struct.pack("<IQ", 7, 99)

STREAM: list[tuple[bytes, list[Any], bytes]] = [
    (message(STORED, b"body"), [(STORED, b"body")], b""),
    (message(STORED), [(STORED, b"")], b""),
    (message(STREAMED, b"0123456789"), [[STREAMED, b"0123456789"]], b""),
    (message(STREAMED), [], b""),
    (message(4, PING), [], message(3, PING)),
    (message(4, PING + bytes(256_000)), [], message(3, PING)),
    (message(200, bytes(70_000)) + message(STORED, b"x"), [(STORED, b"x")], b""),
    (message(2, bytes(5000)), [], b""),
    (message(5, b"\x01\x02\x00" + bytes(8)), [], b""),
    (message(6, struct.pack("<QI", 5, 7)), [Disconnecting(5, LinkError.PERMISSION_DENIED)], b""),
    (message(7, struct.pack("<QIIII", 1, 2, 3, 4, 2) + b"hi"), [Notify(1, 2, 3, 4, "hi")], b""),
    (message(1, struct.pack("<I", 2)), [Migrate(MigrateFlags.NEED_DATA_TRANSFER)], b""),
    (message(1, struct.pack("<I", 1)), [Migrate(MigrateFlags.NEED_FLUSH)], message(4)),
    (message(3, struct.pack("<II", 9, 0)), [], message(1, struct.pack("<I", 9))),
    (
        message(3, struct.pack("<II", 1, 2)) + message(200) * 4,
        [],
        message(1, struct.pack("<I", 1)) + message(2) * 2,
    ),
    (
        message(3, struct.pack("<II", 1, 2)) + message(STREAMED, b"ab") + message(4, PING),
        [[STREAMED, b"ab"]],
        message(1, struct.pack("<I", 1)) + message(3, PING) + message(2),
    ),
]


@pytest.mark.parametrize("step", [1, 3, 1000, 10**6])
@pytest.mark.parametrize("tail", [b"", message(STORED, b"tail")])
@pytest.mark.parametrize(("data", "events", "answer"), STREAM)
def test_messages(data: bytes, events: list[Any], answer: bytes, tail: bytes, step: int) -> None:
    got, sent = feed(channel(), data + tail, step)
    assert got == events + ([(STORED, b"tail")] if tail else [])
    assert sent == answer


@pytest.mark.parametrize("step", [1, 1000])
def test_full_header(step: int) -> None:
    peer = channel(mini_header=False)
    data = message(STORED, b"body", mini_header=False) + message(4, PING, mini_header=False) * 2
    events, sent = feed(peer, data, step)
    assert events == [(STORED, b"body")]
    assert sent == b"".join(message(3, PING, mini_header=False, serial=serial) for serial in (1, 2))


@pytest.mark.parametrize(
    ("data", "expected_text"),
    [
        (message(STORED, bytes(101)), "101 bytes, more than 100"),
        (struct.pack("<HI", 200, MAX_MESSAGE + 1), f"more than {MAX_MESSAGE} \\(MAX_MESSAGE\\)"),
        (struct.pack("<HI", STREAMED, 2**32 - 1), "MAX_MESSAGE"),
        (message(4, bytes(11)), "PING of 11 bytes, fewer than 12"),
        (message(3, bytes(7)), "SET_ACK of 7 bytes, fewer than 8"),
        (message(3, bytes(65)), "65 bytes, more than 64"),
        (message(7, struct.pack("<QIIII", 1, 2, 3, 4, 3) + b"hi"), "outside"),
    ],
)
def test_hostile(data: bytes, expected_text: str) -> None:
    peer = channel()
    peer.receive_data(memoryview(data))
    with pytest.raises(RemoteProtocolError, match=expected_text):
        peer.next_event()
    assert peer.next_event() is None


def test_sub_messages_are_refused() -> None:
    peer = channel(mini_header=False)
    peer.receive_data(memoryview(struct.pack("<QHII", 1, STORED, 4, 1) + bytes(4)))
    with pytest.raises(RemoteProtocolError, match="sub-messages"):
        peer.next_event()


def test_skipped_messages_are_not_stored() -> None:
    peer = channel()
    peer.receive_data(memoryview(struct.pack("<HI", 200, MAX_MESSAGE)))
    assert peer.next_event() is None
    piece = memoryview(bytes(1 << 20))
    for _ in range(MAX_MESSAGE >> 20):
        peer.receive_data(piece)
        assert peer.next_event() is None
    assert feed(peer, message(STORED, b"x"), 100) == ([(STORED, b"x")], b"")


def test_whole_messages_are_not_copied() -> None:
    data = bytearray(message(STORED, b"body"))
    peer = channel()
    peer.receive_data(memoryview(data))
    event = peer.next_event()
    assert isinstance(event, Message)
    data[-4:] = b"BODY"
    assert bytes(event.body) == b"BODY"


def test_unprocessed_bytes_are_not_overwritten() -> None:
    peer = channel()
    peer.receive_data(memoryview(message(STORED, b"1") * 2))
    assert peer.next_event() is not None
    with pytest.raises(LocalProtocolError, match="7 bytes are not processed"):
        peer.receive_data(memoryview(b"more"))


def test_logs_are_readable(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "farplug.spice")
    main, usb = channel(), channel(name="usbredir 0")
    set_ack = message(3, struct.pack("<II", 1, 2))
    feed(main, message(STORED, b"x") + message(4, PING) + message(200, b"x") + set_ack, 1000)
    feed(usb, message(STREAMED, bytes(5)) + message(STORED), 1000)
    assert caplog.messages == [
        "< main: INIT, 1 bytes",
        "< main: PING 7, 12 bytes",
        "> main: PONG, 12 bytes",
        "< main: message 200, 1 bytes, ignored",
        "< main: SetAck(generation=1, window=2)",
        "> main: ACK_SYNC, 4 bytes",
        "< usbredir 0: DATA, 5 bytes",
        "< usbredir 0: message 103, 0 bytes",
    ]
