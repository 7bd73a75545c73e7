from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Callable

import pytest

from farplug.app.events import MAX_ERROR, MAX_QUEUED, Event, EventQueue, EventStream, Level


def recorder(stream: EventStream) -> list[tuple[int, str]]:
    seen: list[tuple[int, str]] = []
    stream.subscribe(lambda event: seen.append((event.id, event.name)))
    return seen


def test_events_are_numbered_without_a_gap_and_come_in_order() -> None:
    times = iter([1.5, 2.25, 3.0])
    stream = EventStream(clock=lambda: next(times))
    seen: list[Event] = []
    stream.subscribe(seen.append)
    stream.publish("a", "first", level=Level.BAD, guest="g1", attachment="g1.a1", device="disk", x=1, name="n")
    stream.publish("b", "second")
    stream.publish("c", "third")
    assert [event.id for event in seen] == [1, 2, 3]
    assert [event.time for event in seen] == [1.5, 2.25, 3.0]
    assert stream.last_id == 3
    assert seen[0].to_json() == {
        "id": 1,
        "time": 1.5,
        "event": "a",
        "level": "bad",
        "guest": "g1",
        "attachment": "g1.a1",
        "device": "disk",
        "x": 1,
        "name": "n",
        "message": "first",
    }
    assert seen[1].to_json() == {"id": 2, "time": 2.25, "event": "b", "level": "info", "message": "second"}
    assert [Event.from_json(event.to_json()) for event in seen] == seen
    assert Event.from_json({**seen[1].to_json(), "level": "of a later version"}) == seen[1]
    assert (str(seen[0]), str(seen[1])) == ("disk: first", "second")


def test_events_are_counted_also_without_a_listener() -> None:
    stream = EventStream()
    stream.publish("a", "")
    seen = recorder(stream)
    stream.publish("b", "")
    assert seen == [(2, "b")]


@pytest.mark.parametrize("error", [ValueError("no\n\x1b" + "x" * 10_000), asyncio.CancelledError(), RecursionError()])
def test_a_listener_that_raises(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    stream = EventStream()
    calls: list[int] = []

    def bad(event: Event) -> None:
        calls.append(event.id)
        raise error

    before = recorder(stream)
    stream.subscribe(bad)
    after = recorder(stream)
    messages: list[Event] = []
    stream.subscribe(messages.append)
    stream.publish("a", "")
    stream.publish("b", "")
    assert calls == [1]
    assert before == after == [(1, "a"), (2, "listener-failed"), (3, "b")]
    failed = messages[1]
    assert failed.level is Level.BAD
    assert failed.fields["error"].startswith(type(error).__name__)
    assert len(failed.fields["error"]) <= MAX_ERROR
    assert failed.message.isprintable()
    json.dumps(failed.to_json())
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_all_listeners_that_raise_leave_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    stream = EventStream()

    def bad(event: Event) -> None:
        raise ValueError

    for _ in range(3):
        stream.subscribe(bad)
    seen = recorder(stream)
    stream.publish("a", "")
    assert seen == [(1, "a"), (2, "listener-failed"), (3, "listener-failed"), (4, "listener-failed")]
    assert len(caplog.records) == 3


def test_a_listener_that_raises_at_listener_failed_leaves_too(caplog: pytest.LogCaptureFixture) -> None:
    stream = EventStream()

    def bad_at(name: str) -> Callable[[Event], None]:
        def bad(event: Event) -> None:
            if event.name == name:
                raise ValueError(name)

        return bad

    stream.subscribe(bad_at("listener-failed"))
    stream.subscribe(bad_at("a"))
    seen = recorder(stream)
    stream.publish("a", "")
    assert [name for _, name in seen] == ["a", "listener-failed", "listener-failed"]
    assert [id for id, _ in seen] == [1, 2, 3]


def test_an_interrupt_in_a_listener_leaves_the_stream_usable() -> None:
    stream = EventStream()

    def interrupted(event: Event) -> None:
        if event.name == "a":
            raise KeyboardInterrupt

    stream.subscribe(interrupted)
    seen = recorder(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.publish("a", "")
    stream.publish("b", "")
    assert seen == [(2, "b")]


def test_unsubscribing() -> None:
    stream = EventStream()
    seen: list[str] = []

    def listener(event: Event) -> None:
        seen.append(event.name)

    first = stream.subscribe(listener)
    second = stream.subscribe(listener)
    stream.publish("a", "")
    assert seen == ["a", "a"]
    first()
    first()
    stream.publish("b", "")
    assert seen == ["a", "a", "b"], "a second call does not end another subscription"
    second()
    stream.publish("c", "")
    assert seen == ["a", "a", "b"]


def test_unsubscribing_inside_a_listener_works_at_once() -> None:
    stream = EventStream()
    seen: list[str] = []
    ends: list[Callable[[], None]] = []

    def first(event: Event) -> None:
        seen.append("first")
        for end in ends:
            end()

    stream.subscribe(first)
    ends.append(stream.subscribe(lambda event: seen.append("second")))
    last: list[Callable[[], None]] = []

    def third(event: Event) -> None:
        seen.append("third")
        last[0]()

    last.append(stream.subscribe(third))
    stream.publish("a", "")
    stream.publish("b", "")
    assert seen == ["first", "third", "first"]


def test_subscribing_inside_a_listener_begins_with_the_next_event() -> None:
    stream = EventStream()
    inner: list[int] = []

    def listener(event: Event) -> None:
        if event.name == "a":
            stream.publish("nested", "")
            stream.subscribe(lambda event: inner.append(event.id))

    stream.subscribe(listener)
    stream.publish("a", "")
    stream.publish("b", "")
    assert inner == [3], "1 and 2 were published before"


def test_publishing_inside_a_listener_gives_all_listeners_the_same_order() -> None:
    stream = EventStream()
    before = recorder(stream)

    def echo(event: Event) -> None:
        if event.name in ("a", "b"):
            stream.publish(f"{event.name}1", "")
            stream.publish(f"{event.name}2", "")
        elif event.name == "a1":
            stream.publish("a11", "")

    stream.subscribe(echo)
    after = recorder(stream)
    stream.publish("a", "")
    stream.publish("b", "")
    assert before == after
    assert before == list(enumerate(["a", "a1", "a2", "a11", "b", "b1", "b2"], 1))


async def test_readers_each_get_all_events_from_the_call_on() -> None:
    stream = EventStream()
    stream.publish("before", "")
    first = stream.iterate()
    stream.publish("a", "")
    second = stream.iterate(lambda event: event.name != "b")
    for name in "bcd":
        stream.publish(name, "")
    assert [(await anext(first)).name for _ in range(4)] == ["a", "b", "c", "d"]
    assert [(await anext(second)).name for _ in range(2)] == ["c", "d"]
    waiting = [asyncio.ensure_future(anext(reader)) for reader in (first, second)]
    await asyncio.sleep(0)
    stream.publish("e", "")
    assert [event.id for event in await asyncio.gather(*waiting)] == [6, 6]


async def test_a_reader_ends_after_the_last_event() -> None:
    stream = EventStream()
    reader = stream.iterate(last=lambda event: event.name == "end")
    for name in ("a", "end", "b"):
        stream.publish(name, "")
    assert [event.name async for event in reader] == ["a", "end"]
    assert [event.name async for event in reader] == []
    assert not stream._listeners


async def test_a_slow_reader_loses_the_oldest_events_and_learns_how_many() -> None:
    stream = EventStream()
    reader = stream.iterate()
    for number in range(MAX_QUEUED + 5):
        stream.publish(f"e{number}", "", guest="g1")
    assert len(reader._queue._events) == MAX_QUEUED
    dropped = await anext(reader)
    assert dropped.to_json() == {
        "id": 5,
        "time": dropped.to_json()["time"],
        "event": "events-dropped",
        "level": "bad",
        "count": 5,
        "message": "5 events dropped: the reader is too slow",
    }
    assert [(await anext(reader)).id for _ in range(MAX_QUEUED)] == list(range(6, MAX_QUEUED + 6))
    stream.publish("next", "")
    assert (await anext(reader)).name == "next"


async def test_events_that_are_dropped_in_turns_are_counted_in_turns() -> None:
    queue = EventQueue(2)
    got: list[tuple[str, int]] = []

    def put(*ids: int) -> None:
        for id in ids:
            queue.put(Event(id, 0.0, str(id), ""))

    put(1, 2, 3)
    got += [((event := await queue.get()).name, event.id) for _ in range(2)]
    put(4, 5)
    got += [((event := await queue.get()).name, event.id) for _ in range(3)]
    assert got == [("events-dropped", 1), ("2", 2), ("events-dropped", 3), ("4", 4), ("5", 5)]
    put(6, 7, 8)
    assert (await queue.get()).message == "1 event dropped: the reader is too slow"


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    stream = EventStream()
    reader = stream.iterate()
    for late in (False, True):
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        if late:
            stream.publish("a", "")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert (await anext(reader)).name == "a"


async def test_a_reader_that_is_dropped_or_closed_is_unsubscribed() -> None:
    stream = EventStream()
    readers = [stream.iterate() for _ in range(3)]
    assert len(stream._listeners) == 3
    readers.pop().close()
    assert len(stream._listeners) == 2
    stream.publish("a", "")
    async for _ in readers.pop():
        break
    del readers
    gc.collect()
    assert not stream._listeners


async def test_a_filter_that_raises_ends_the_events_of_its_reader_only(caplog: pytest.LogCaptureFixture) -> None:
    stream = EventStream()
    stream.iterate(lambda event: 1 / 0 > 0)  # dropped at once
    reader = stream.iterate(lambda event: 1 / 0 > 0)
    seen = recorder(stream)
    stream.publish("a", "")
    assert [name for _, name in seen] == ["a", "listener-failed"]
    del reader
