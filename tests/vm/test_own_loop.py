"""Coroutines of an object that belongs to another event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Self

import pytest

from farplug.errors import StateError
from farplug.testing.loop_thread import LoopThread
from farplug.vm.own_loop import OwnLoop, on_own_loop


class Waiter(OwnLoop):
    """Waits on its own loop."""

    def __init__(self) -> None:
        self.thread = ""
        self.outcome: asyncio.Future[str] | None = None
        self.was_cancelled = threading.Event()

    async def start(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.outcome = self._loop.create_future()
        return self

    @on_own_loop
    async def wait(self, suffix: str = "") -> str:
        assert self.outcome is not None
        self.thread = threading.current_thread().name
        try:
            return await self.outcome + suffix
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise

    @on_own_loop
    async def end(self, value: str) -> None:
        assert self.outcome is not None
        self.outcome.set_result(value)

    @on_own_loop
    async def fail(self) -> None:
        raise ZeroDivisionError


async def test_another_loop_awaits_them() -> None:
    thread = LoopThread("own")
    try:
        waiter = thread.call(Waiter().start())
        waiting = asyncio.create_task(waiter.wait(suffix="!"))
        await waiter.end("done")
        assert (await waiting, waiter.thread) == ("done!", "own")
        with pytest.raises(ZeroDivisionError):
            await waiter.fail()
        assert thread.call(waiter.wait()) == "done", "its own loop"
    finally:
        thread.close()
    with pytest.raises(StateError, match="the event loop that started this Waiter does not run"):
        await waiter.wait()


async def test_a_caller_that_is_cancelled_cancels_them() -> None:
    thread = LoopThread("own")
    try:
        waiter = thread.call(Waiter().start())
        waiting = asyncio.create_task(waiter.wait())
        while not waiter.thread:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(waiter.was_cancelled.wait, 30)
    finally:
        thread.close()


async def test_before_the_start_the_loop_of_the_caller_is_used() -> None:
    with pytest.raises(ZeroDivisionError):
        await Waiter().fail()
