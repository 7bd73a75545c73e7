from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest

from farplug.store.thread_pool import ThreadPool


async def test_one_thread_keeps_the_order_and_completes_on_the_loop() -> None:
    pool = ThreadPool(1, "test")
    order: list[int] = []
    threads: set[threading.Thread] = set()
    ended = asyncio.Event()

    def finish(error: OSError | None) -> None:
        assert error is None
        threads.add(threading.current_thread())

    for number in range(100):
        pool.run(partial(order.append, number), finish)
    pool.run(lambda: None, lambda error: ended.set())
    await ended.wait()
    assert order == list(range(100))
    assert threads == {threading.main_thread()}
    pool.stop()


async def test_stopping_waits() -> None:
    pool = ThreadPool(2, "test")
    before = threading.active_count()
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    for number in range(4):
        pool.run(partial(work, number), lambda error: None)
    pool.stop()
    assert sorted(done) == [0, 1, 2, 3]
    assert threading.active_count() <= before  # one of an earlier test may have ended meanwhile


@pytest.mark.parametrize(("raised", "text"), [(OSError(28, "full"), "full"), (ValueError("a bug"), "a bug")])
async def test_errors(raised: Exception, text: str, caplog: pytest.LogCaptureFixture) -> None:
    pool = ThreadPool(1, "test")
    answer: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()

    def fail() -> None:
        raise raised

    pool.run(fail, answer.set_result)
    error = await answer
    assert isinstance(error, OSError)
    assert text in str(error)
    assert ("Traceback" in caplog.text) is not isinstance(raised, OSError)
    pool.stop()
