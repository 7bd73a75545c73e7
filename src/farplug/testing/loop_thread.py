"""A thread with an event loop, for callers that are not coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from farplug.errors import StateError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines on an event loop of its own, while the caller waits.

    QEMU ends with the thread that started it: all guests of a test process are started and used on one such thread.
    """

    def __init__(self, name: str = "farplug") -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: a call that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine returns, or raise what it raises. It is cancelled when the caller is interrupted.

        Raises:
            StateError: the caller runs on this loop, which would wait for itself; or the thread was closed.
        """
        __tracebackhide__ = True
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            coroutine.close()
            raise StateError(
                "this call waits, and cannot be made on farplug's event loop"
                if self._thread.is_alive()
                else "farplug's event loop was closed at the end of the test session"
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs, and end the thread. A second call has no effect."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
