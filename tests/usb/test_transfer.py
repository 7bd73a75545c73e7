from __future__ import annotations

import pytest

from farplug.errors import DeviceError, Reason
from farplug.usb import Direction, Setup, Status, Transfer, TransferType


def bulk(endpoint: int, *, length: int = 0, data: bytes = b"") -> tuple[Transfer, list[Transfer]]:
    completed: list[Transfer] = []
    return Transfer(TransferType.BULK, endpoint, completed.append, length=length, data=data), completed


@pytest.mark.parametrize(
    ("status", "reply", "ends", "arrived"),
    [
        (Status.SUCCESS, b"abcd", Status.SUCCESS, b"abcd"),
        (Status.SUCCESS, b"", Status.SUCCESS, b""),
        (Status.SUCCESS, b"abcde", Status.BABBLE, b"abcd"),
        (Status.IO_ERROR, b"ab", Status.IO_ERROR, b"ab"),
        (Status.STALL, b"", Status.STALL, b""),
    ],
)
def test_in(status: Status, reply: bytes, ends: Status, arrived: bytes) -> None:
    transfer, completed = bulk(0x81, length=4)
    assert (transfer.direction, transfer.length, transfer.status) == (Direction.IN, 4, None)
    transfer.complete(status, reply)
    assert completed == [transfer]
    assert (transfer.status, bytes(transfer.reply), transfer.actual) == (ends, arrived, len(arrived))


@pytest.mark.parametrize(
    ("status", "given", "actual"),
    [
        (Status.SUCCESS, None, 3),
        (Status.SUCCESS, 2, 2),
        (Status.SUCCESS, 99, 3),
        (Status.SUCCESS, -1, 0),
        (Status.STALL, None, 0),
        (Status.CANCELLED, 1, 1),
    ],
)
def test_out(status: Status, given: int | None, actual: int) -> None:
    transfer, completed = bulk(0x02, data=b"abc", length=1000)
    assert (transfer.direction, transfer.length) == (Direction.OUT, 3)
    transfer.complete(status, b"ignored", actual=given)
    assert completed == [transfer]
    assert (transfer.status, transfer.actual, transfer.reply) == (status, actual, b"")


def test_completed_only_once() -> None:
    transfer, completed = bulk(0x81, length=4)
    transfer.complete(Status.SUCCESS, b"ab")
    with pytest.raises(DeviceError, match="completed twice") as caught:
        transfer.complete(Status.STALL)
    assert caught.value.reason is Reason.DEVICE_FAULT
    assert (transfer.status, transfer.reply, completed) == (Status.SUCCESS, b"ab", [transfer])


def test_text() -> None:
    transfer, _ = bulk(0x81, length=4)
    assert str(transfer) == "bulk transfer on endpoint 81, 4 bytes"
    transfer.complete(Status.IO_ERROR, b"ab")
    assert str(transfer) == "bulk transfer on endpoint 81, 4 bytes: io-error, 2 bytes"
    control = Transfer(TransferType.CONTROL, 0x80, print, length=2, setup=Setup(0x80, 0, 0, 0, 2))
    assert str(control).endswith("setup 80 00 value=0000 index=0000 length=2")
    stream = Transfer(TransferType.BULK, 0x83, print, length=2, stream_id=7)
    assert str(stream).endswith("2 bytes, stream 7")


def test_unknown_status() -> None:
    assert Status(99) is Status.IO_ERROR
