"""The framing of CTAPHID, report by report."""

from __future__ import annotations

import pytest

from farplug.virtual.fido.ctaphid import (
    MAX_MESSAGE,
    MESSAGE_TIMEOUT,
    REPORT_SIZE,
    Cancelled,
    CtapHid,
    HidCommand,
    HidError,
    KeepaliveStatus,
    Request,
)

NONCE = b"12345678"
BROADCAST = 0xFFFFFFFF


def report(channel: int, command: int, data: bytes = b"", size: int | None = None) -> bytes:
    """Return an initialization packet."""
    head = channel.to_bytes(4, "big") + bytes((0x80 | command,))
    return head + (len(data) if size is None else size).to_bytes(2, "big") + data


def more(channel: int, sequence: int, data: bytes = b"") -> bytes:
    """Return a continuation packet."""
    return channel.to_bytes(4, "big") + bytes((sequence,)) + data


def opened(count: int = 1) -> CtapHid:
    """Return the end of a key with channels 1 to ``count``."""
    hid = CtapHid(5, (1, 2, 3))
    for _ in range(count):
        assert hid.receive(report(BROADCAST, HidCommand.INIT, NONCE), 0) is None
    hid.take_reports()
    return hid


def replies(hid: CtapHid) -> list[tuple[int, int, bytes]]:
    """Return channel, command and data of the short messages that are queued."""
    found = []
    for raw in hid.take_reports():
        assert len(raw) == REPORT_SIZE
        size = int.from_bytes(raw[5:7], "big")
        assert not any(raw[7 + size :])
        found.append((int.from_bytes(raw[:4], "big"), raw[4] & 0x7F, raw[7 : 7 + size]))
    return found


def errors(hid: CtapHid) -> list[tuple[int, HidError]]:
    found = replies(hid)
    assert all(command == HidCommand.ERROR for _, command, _ in found)
    return [(channel, HidError(data[0])) for channel, _, data in found]


def test_channels() -> None:
    hid = CtapHid(5, (1, 2, 3))
    for number in (1, 2):
        assert hid.receive(report(BROADCAST, HidCommand.INIT, NONCE), 0) is None
        assert replies(hid) == [
            (BROADCAST, HidCommand.INIT, NONCE + number.to_bytes(4, "big") + bytes((2, 1, 2, 3, 5)))
        ]
    hid.receive(report(2, HidCommand.INIT, NONCE), 0)  # a channel that exists
    assert replies(hid) == [(2, HidCommand.INIT, NONCE + bytes((0, 0, 0, 2, 2, 1, 2, 3, 5)))]


@pytest.mark.parametrize(
    ("raw", "channel", "error"),
    [
        (report(0, HidCommand.INIT, NONCE), 0, HidError.INVALID_CHANNEL),
        (report(9, HidCommand.INIT, NONCE), 9, HidError.INVALID_CHANNEL),
        (report(0, HidCommand.PING), 0, HidError.INVALID_CHANNEL),
        (report(9, HidCommand.PING), 9, HidError.INVALID_CHANNEL),
        (report(9, HidCommand.CANCEL), 9, HidError.INVALID_CHANNEL),
        (report(BROADCAST, HidCommand.PING), BROADCAST, HidError.INVALID_CHANNEL),
        (report(BROADCAST, HidCommand.INIT, b"short"), BROADCAST, HidError.INVALID_LEN),
        (report(1, HidCommand.CBOR, size=MAX_MESSAGE + 1), 1, HidError.INVALID_LEN),
        (report(1, HidCommand.CBOR, size=0xFFFF), 1, HidError.INVALID_LEN),
        (report(1, HidCommand.CBOR), 1, HidError.INVALID_LEN),
        (report(1, HidCommand.MSG), 1, HidError.INVALID_LEN),
        (report(1, HidCommand.WINK, b"x"), 1, HidError.INVALID_LEN),
        (report(1, 0x04, b"\1"), 1, HidError.INVALID_CMD),  # LOCK, which is optional
        (report(1, 0x40), 1, HidError.INVALID_CMD),
        (report(1, HidCommand.KEEPALIVE), 1, HidError.INVALID_CMD),
        (b"", 0, None),
        (b"\0\0\0\1", 1, None),
        (more(1, 0), 1, None),
    ],
)
def test_reports_that_are_refused(raw: bytes, channel: int, error: HidError | None) -> None:
    hid = opened()
    assert hid.receive(raw, 0) is None
    assert errors(hid) == ([] if error is None else [(channel, error)])
    hid.receive(report(1, HidCommand.PING, b"still there"), 0)
    assert replies(hid) == [(1, HidCommand.PING, b"still there")]


@pytest.mark.parametrize("size", [0, 1, 57, 58, 116, 117, MAX_MESSAGE])
def test_long_messages(size: int) -> None:
    hid = opened()
    data = bytes(n % 251 for n in range(size))
    packets = [report(1, HidCommand.PING, data[:57], size)]
    packets += [more(1, n, data[at : at + 59]) for n, at in enumerate(range(57, size, 59))]
    for packet in packets:
        assert hid.take_reports() == []
        hid.receive(packet, 0)
    assert hid.take_reports() == [packet.ljust(REPORT_SIZE, b"\0") for packet in packets]
    assert len(packets) <= 129


def test_a_message_out_of_sequence() -> None:
    for packet in (more(1, 1), more(1, 0x7F), report(1, HidCommand.PING)):
        hid = opened()
        hid.receive(report(1, HidCommand.CBOR, bytes(57), 200), 0)
        hid.receive(packet, 0)
        assert errors(hid) == [(1, HidError.INVALID_SEQ)]
        assert hid.receive(more(1, 0), 0) is None  # what follows of the message is ignored
        assert errors(hid) == []


def test_a_message_that_is_late() -> None:
    hid = opened()
    hid.receive(report(1, HidCommand.CBOR, bytes(57), 200), 10)
    hid.receive(more(1, 0), 11)
    assert hid.due == 11 + MESSAGE_TIMEOUT
    hid.check_time(hid.due - 0.01)
    assert errors(hid) == []
    hid.check_time(hid.due)
    assert errors(hid) == [(1, HidError.MSG_TIMEOUT)]
    assert hid.due is None


def test_requests_in_parallel() -> None:
    hid = opened(2)
    hid.receive(report(1, HidCommand.CBOR, bytes(57), 60), 0)
    hid.receive(report(2, HidCommand.CBOR, b"x"), 0)  # while a message is incomplete
    assert errors(hid) == [(2, HidError.CHANNEL_BUSY)]
    request = hid.receive(more(1, 0, b"end"), 0)
    assert isinstance(request, Request)
    assert (request.channel, request.command, request.data) == (1, HidCommand.CBOR, bytes(57) + b"end")
    for channel in (1, 2):  # while a request is processed
        hid.receive(report(channel, HidCommand.CBOR, b"x"), 0)
        assert errors(hid) == [(channel, HidError.CHANNEL_BUSY)]
    hid.receive(report(BROADCAST, HidCommand.INIT, NONCE), 0)  # a third client may get a channel
    assert replies(hid)[0][1] == HidCommand.INIT
    hid.keep_alive(request, KeepaliveStatus.USER_PRESENCE)
    hid.reply(request, b"\0reply")
    hid.reply(request, b"\0again")
    hid.keep_alive(request, KeepaliveStatus.PROCESSING)
    assert replies(hid) == [(1, HidCommand.KEEPALIVE, b"\2"), (1, HidCommand.CBOR, b"\0reply")]
    assert isinstance(hid.receive(report(2, HidCommand.CBOR, b"x"), 0), Request)


def test_cancel() -> None:
    hid = opened(2)
    assert hid.receive(report(1, HidCommand.CANCEL), 0) is None
    request = hid.receive(report(1, HidCommand.CBOR, b"x"), 0)
    assert isinstance(request, Request)
    assert hid.receive(report(2, HidCommand.CANCEL), 0) is None  # that of another client
    assert hid.receive(report(1, HidCommand.CANCEL), 0) == Cancelled(request)
    assert replies(hid) == []
    hid.reply(request, b"\x2d")  # CANCEL has no reply, the request has
    assert replies(hid) == [(1, HidCommand.CBOR, b"\x2d")]


def test_init_abandons_a_request() -> None:
    hid = opened()
    hid.receive(report(1, HidCommand.CBOR, bytes(57), 200), 0)
    assert hid.receive(report(1, HidCommand.INIT, NONCE), 0) is None
    assert hid.due is None
    request = hid.receive(report(1, HidCommand.CBOR, b"x"), 0)
    assert isinstance(request, Request)
    assert hid.receive(report(1, HidCommand.INIT, NONCE), 0) == Cancelled(request)
    assert [command for _, command, _ in replies(hid)] == [HidCommand.INIT] * 2
    assert not hid.is_current(request)
    hid.reply(request, b"late")
    hid.fail(request, HidError.INVALID_CMD)
    assert replies(hid) == []


def test_a_reply_that_is_too_long() -> None:
    hid = opened()
    request = hid.receive(report(1, HidCommand.CBOR, b"x"), 0)
    assert isinstance(request, Request)
    with pytest.raises(ValueError, match="longer"):
        hid.reply(request, bytes(MAX_MESSAGE + 1))
