from __future__ import annotations

import asyncio
import threading

import pytest
from tests.physical.support import until

from farplug.threads import aside


async def test_what_nobody_waits_for_any_more_is_given_back() -> None:
    go = threading.Event()
    unwanted: list[str] = []

    def look() -> str:
        go.wait(60)
        return "found"

    looking = asyncio.ensure_future(aside(look, unwanted.append))
    await asyncio.sleep(0)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert unwanted == []
    go.set()
    await until(lambda: unwanted == ["found"])
    assert await aside(look, unwanted.append) == "found"
    assert unwanted == ["found"]


def test_what_comes_after_the_end_of_the_loop_is_given_back() -> None:
    go, given_back = threading.Event(), threading.Event()

    def look() -> str:
        go.wait(60)
        return "found"

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await aside(look, lambda found: given_back.set())

    asyncio.run(give_up())
    go.set()
    assert given_back.wait(60)
