from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext

import pytest
from tests.physical.support import until

from farplug.threads import LONG, off_loop, run_in_daemon_thread


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


@pytest.mark.parametrize("error", [False, True])
async def test_long_texts_are_handled_in_a_thread(error: bool) -> None:
    threads: list[int] = []

    def call(text: str) -> int:
        threads.append(threading.get_ident())
        if error:
            raise ValueError(text)
        return len(text)

    for length in (LONG - 1, LONG):
        with pytest.raises(ValueError, match="x") if error else nullcontext():
            assert await off_loop(call, "x" * length) == length
    assert threads[0] == threading.get_ident() != threads[1]
