"""What is held back while a device's thread talks to it, and in which order it is said afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import cast

import pytest

from farplug.physical.device_thread import Worker
from farplug.physical.event_handler import Events
from farplug.physical.gate import Gate


class Bench:
    """A gate, and what happens at it, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.worker = Worker("gate", lambda: None)
        self.gate = Gate(self.worker, cast(Events, self))
        self.done = threading.Event()

    def pause(self) -> None:
        self.said.append("pause")

    def go_on(self) -> None:
        self.said.append("go on")

    def say(self, *words: str) -> None:
        for word in words:
            self.gate.when_open(word, partial(self.said.append, word))

    def talk(self) -> asyncio.Task[None]:
        """Have the thread talk until ``done`` is set."""
        return asyncio.create_task(self.gate.call(lambda: cast(None, self.done.wait(10))))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.done.set()
    await bench.worker.stop()


async def test_what_was_held_back_is_said_in_its_order_after_the_events_go_on(bench: Bench) -> None:
    bench.say("first")
    talking = bench.talk()
    await asyncio.sleep(0)
    assert bench.gate.shut
    bench.say("second", "third", "fourth")
    bench.gate.forget("third")
    bench.gate.forget("never said")
    assert bench.said == ["first", "pause"]
    bench.done.set()
    await talking
    bench.say("fifth")
    assert bench.said == ["first", "pause", "go on", "second", "fourth", "fifth"]


async def test_it_opens_after_the_last_of_several_calls(bench: Bench) -> None:
    first, open_at = bench.talk(), []
    await asyncio.sleep(0)
    second = asyncio.create_task(bench.gate.call(lambda: open_at.append(bench.gate.shut)))
    bench.say("later")
    bench.done.set()
    await first
    await second
    assert open_at == [True]
    assert bench.said == ["pause", "go on", "later"]


async def test_it_is_shut_until_the_thread_is_done_even_if_nobody_waits(bench: Bench) -> None:
    talking = bench.talk()
    await asyncio.sleep(0)
    talking.cancel()
    with suppress(asyncio.CancelledError):
        await talking
    bench.say("later")
    assert bench.said == ["pause"]
    bench.done.set()
    await bench.gate.call(lambda: None)
    assert bench.said == ["pause", "go on", "later"]


async def test_one_thing_is_held_back_about_each_subject(bench: Bench) -> None:
    talking = bench.talk()
    await asyncio.sleep(0)
    for number in range(3):
        bench.gate.when_open("subject", partial(bench.said.append, f"word {number}"))
    bench.done.set()
    await talking
    assert bench.said == ["pause", "go on", "word 2"]


async def test_what_is_said_may_have_something_else_forgotten(bench: Bench) -> None:
    talking = bench.talk()
    await asyncio.sleep(0)
    bench.gate.when_open("first", lambda: bench.gate.forget("second"))
    bench.say("second", "third")
    bench.done.set()
    await talking
    assert bench.said == ["pause", "go on", "third"]


async def test_a_call_that_fails(bench: Bench) -> None:
    def fail() -> None:
        raise OSError("stuck")

    with pytest.raises(OSError, match="stuck"):
        await bench.gate.call(fail)
    assert not bench.gate.shut


async def test_after_the_end_nothing_is_said(bench: Bench) -> None:
    talking = bench.talk()
    await asyncio.sleep(0)
    bench.say("never")
    bench.gate.end()
    bench.done.set()
    await talking
    assert bench.said == ["pause"]
    assert bench.gate.shut


async def test_what_is_said_may_shut_it_again(bench: Bench) -> None:
    talking, again = bench.talk(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    def reset() -> None:
        tasks.append(asyncio.ensure_future(bench.gate.call(lambda: cast(None, again.wait(10)))))

    await asyncio.sleep(0)
    bench.gate.when_open("reset", reset)
    bench.say("later")
    bench.done.set()
    await talking
    await asyncio.sleep(0)
    assert bench.said == ["pause", "go on", "later", "pause"]
    again.set()
    await tasks[0]
    assert bench.said == ["pause", "go on", "later", "pause", "go on"]
    assert not bench.gate.shut


async def test_what_cannot_be_said_holds_nothing_up(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    talking = bench.talk()
    await asyncio.sleep(0)
    bench.gate.when_open("broken", lambda: cast(None, 1 / 0))
    bench.say("later")
    bench.done.set()
    await talking
    assert bench.said == ["pause", "go on", "later"]
    assert "ZeroDivisionError" in caplog.text
    assert not bench.gate.shut
