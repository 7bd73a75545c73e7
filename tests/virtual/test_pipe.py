from __future__ import annotations

from farplug.usb import Status, Transfer, TransferType
from farplug.virtual.pipe import MAX_RESPONSES, Pipe, StatusPipe


def transfer(stream: int, length: int = 128) -> Transfer:
    return Transfer(TransferType.BULK, 0x83, lambda _: None, length=length, stream_id=stream)


def test_first_in_first_out_in_each_stream() -> None:
    pipe = Pipe()
    first, other, second = transfer(1), transfer(2), transfer(1)
    for one in (first, other, second):
        pipe.put(one)
    assert [pipe.take(1), pipe.take(1), pipe.take(1), pipe.take(2), pipe.take(3)] == [first, second, None, other, None]
    assert pipe.clear() == []


def test_removed_with_or_without_followers() -> None:
    pipe = Pipe()
    waiting = [transfer(1) for _ in range(5)]
    for one in waiting:
        pipe.put(one)
    pipe.put(other := transfer(2))
    assert pipe.remove(waiting[1]) == [waiting[1]]
    assert pipe.remove(waiting[1]) == pipe.remove(transfer(1)) == pipe.remove(transfer(7)) == []
    assert pipe.remove(waiting[3], followers=True) == waiting[3:]
    assert pipe.remove(other, followers=True) == [other]
    assert pipe.clear() == [waiting[0], waiting[2]]
    assert pipe.take(1) is None


def test_ius_wait_for_transfers_and_transfers_for_ius() -> None:
    sent: list[str] = []
    pipe: StatusPipe[str] = StatusPipe(sent.append)
    pipe.read(early := transfer(1))
    pipe.send(1, b"one", "a")
    pipe.send(1, b"two", "b")
    pipe.send(1, b"three", None)
    pipe.send(2, b"four", "c")
    assert (early.status, early.reply, sent) == (Status.SUCCESS, b"one", ["a"])
    late = [transfer(1) for _ in range(3)]
    for one in late:
        pipe.read(one)
    assert [bytes(one.reply) for one in late] == [b"two", b"three", b""]
    assert sent == ["a", "b"]
    assert pipe.clear() == [late[2]]
    pipe.read(again := transfer(2))
    assert again.status is None  # the queued IUs are gone too


def test_the_ius_of_an_owner_are_discarded() -> None:
    pipe: StatusPipe[str] = StatusPipe(lambda _: None)
    for owner in ("a", "b", "a"):
        pipe.send(0, owner.encode(), owner)
    pipe.discard(0, "a")
    pipe.discard(5, "a")
    pipe.read(first := transfer(0))
    pipe.read(second := transfer(0))
    assert (first.reply, second.status) == (b"b", None)


def test_ius_that_the_guest_does_not_read_are_bounded() -> None:
    pipe: StatusPipe[str] = StatusPipe(lambda _: None)
    for number in range(MAX_RESPONSES + 10):
        pipe.send(number % 3, bytes((number & 0xFF,)), None)
    pipe.send(0, b"kept", "a")
    asked = [transfer(stream) for stream in (0, 1, 2) for _ in range(MAX_RESPONSES)]
    for one in asked:
        pipe.read(one)
    replies = [bytes(one.reply) for one in asked if one.status is not None]
    assert len(replies) == MAX_RESPONSES + 1
    assert b"kept" in replies
    pipe.send(1, b"again", None)
    assert bytes(next(one for one in asked if one.reply == b"again").reply) == b"again"
