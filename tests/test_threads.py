from __future__ import annotations

import asyncio
import threading

import pytest
from tests.physical.support import until

from farplug.threads import run_in_daemon_thread


async def test_a_result_for_a_cancelled_caller_is_abandoned() -> None:
    go = threading.Event()
    abandoned: list[str] = []

    def call() -> str:
        go.wait(60)
        return "result"

    calling = asyncio.ensure_future(run_in_daemon_thread(call, abandoned.append))
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert abandoned == []
    go.set()
    await until(lambda: abandoned == ["result"])
    assert await run_in_daemon_thread(call, abandoned.append) == "result"
    assert abandoned == ["result"]


def test_a_result_after_the_end_of_the_loop_is_abandoned() -> None:
    go, released = threading.Event(), threading.Event()

    def call() -> str:
        go.wait(60)
        return "result"

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await run_in_daemon_thread(call, lambda result: released.set())

    asyncio.run(give_up())
    go.set()
    assert released.wait(60)
