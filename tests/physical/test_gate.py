"""Actions that the gate defers while the device's thread makes a call, and their order afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import cast

import pytest

from farplug.physical.device_thread import DeviceThread
from farplug.physical.event_handler import EventHandler
from farplug.physical.gate import Gate


class Bench:
    """A gate, and a log of what happens, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.worker = DeviceThread("gate", lambda: None)
        self.gate = Gate(self.worker, cast(EventHandler, self))
        self.done = threading.Event()

    def pause(self) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")

    def act(self, *names: str) -> None:
        for name in names:
            self.gate.run_or_defer(name, partial(self.log.append, name))

    def call(self) -> asyncio.Task[None]:
        """Have the thread make a call until ``done`` is set."""
        return asyncio.create_task(self.gate.call(lambda: cast(None, self.done.wait(100))))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.done.set()
    await bench.worker.stop()


async def test_deferred_actions_run_in_order_after_events_are_handled_again(bench: Bench) -> None:
    bench.act("first")
    calling = bench.call()
    await asyncio.sleep(0)
    assert bench.gate.shut
    bench.act("second", "third", "fourth")
    bench.gate.discard("third")
    bench.gate.discard("unknown")
    assert bench.log == ["first", "pause"]
    bench.done.set()
    await calling
    bench.act("fifth")
    assert bench.log == ["first", "pause", "resume", "second", "fourth", "fifth"]


async def test_the_gate_opens_after_the_last_of_several_calls(bench: Bench) -> None:
    first, open_at = bench.call(), []
    await asyncio.sleep(0)
    second = asyncio.create_task(bench.gate.call(lambda: open_at.append(bench.gate.shut)))
    bench.act("later")
    bench.done.set()
    await first
    await second
    assert open_at == [True]
    assert bench.log == ["pause", "resume", "later"]


async def test_the_gate_is_shut_until_the_thread_is_done_even_if_the_caller_is_cancelled(bench: Bench) -> None:
    calling = bench.call()
    await asyncio.sleep(0)
    calling.cancel()
    with suppress(asyncio.CancelledError):
        await calling
    bench.act("later")
    assert bench.log == ["pause"]
    bench.done.set()
    await bench.gate.call(lambda: None)
    assert bench.log == ["pause", "resume", "later"]


async def test_one_action_is_deferred_for_each_key(bench: Bench) -> None:
    calling = bench.call()
    await asyncio.sleep(0)
    for number in range(3):
        bench.gate.run_or_defer("key", partial(bench.log.append, f"action {number}"))
    bench.done.set()
    await calling
    assert bench.log == ["pause", "resume", "action 2"]


async def test_an_action_may_discard_another(bench: Bench) -> None:
    calling = bench.call()
    await asyncio.sleep(0)
    bench.gate.run_or_defer("first", lambda: bench.gate.discard("second"))
    bench.act("second", "third")
    bench.done.set()
    await calling
    assert bench.log == ["pause", "resume", "third"]


async def test_a_call_that_fails(bench: Bench) -> None:
    def fail() -> None:
        raise OSError("stuck")

    with pytest.raises(OSError, match="stuck"):
        await bench.gate.call(fail)
    assert not bench.gate.shut


async def test_after_the_end_no_action_runs(bench: Bench) -> None:
    calling = bench.call()
    await asyncio.sleep(0)
    bench.act("never")
    bench.gate.end()
    bench.done.set()
    await calling
    assert bench.log == ["pause"]
    assert bench.gate.shut


async def test_an_action_may_shut_the_gate_again(bench: Bench) -> None:
    calling, again = bench.call(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    def reset() -> None:
        tasks.append(asyncio.ensure_future(bench.gate.call(lambda: cast(None, again.wait(100)))))

    await asyncio.sleep(0)
    bench.gate.run_or_defer("reset", reset)
    bench.act("later")
    bench.done.set()
    await calling
    await asyncio.sleep(0)
    assert bench.log == ["pause", "resume", "later", "pause"]
    again.set()
    await tasks[0]
    assert bench.log == ["pause", "resume", "later", "pause", "resume"]
    assert not bench.gate.shut


async def test_an_action_that_raises_does_not_stop_the_others(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    calling = bench.call()
    await asyncio.sleep(0)
    bench.gate.run_or_defer("broken", lambda: cast(None, 1 / 0))
    bench.act("later")
    bench.done.set()
    await calling
    assert bench.log == ["pause", "resume", "later"]
    assert "ZeroDivisionError" in caplog.text
    assert not bench.gate.shut
