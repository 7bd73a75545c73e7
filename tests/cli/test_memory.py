"""The memory of a process that runs for hours."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from farplug.cli import memory


class Watch:
    """Holds a task that is cancelled, and is held by its frames."""

    def __init__(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_what_a_cancelled_task_has_left_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "INTERVAL", 0.01)
    gc.disable()
    collecting = asyncio.ensure_future(memory.collect_garbage())
    try:
        async with asyncio.timeout(60):
            await asyncio.sleep(0)  # it begins; what is made from now on is looked at
            watch = Watch()
            freed = asyncio.Event()
            weakref.finalize(watch, freed.set)
            await asyncio.sleep(0)
            await watch.close()
            del watch
            await freed.wait()
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        gc.enable()
