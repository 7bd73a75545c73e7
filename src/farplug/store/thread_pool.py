"""Threads for calls that may block."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

from farplug.rate_limit import limited_logger
from farplug.store.base import WriteDone

log = limited_logger(__name__)

_Call: TypeAlias = tuple[Callable[[], None], WriteDone | None, asyncio.AbstractEventLoop]


class ThreadPool:
    """Threads with one queue: a pool of one thread keeps the order of the calls.

    A concurrent.futures executor would do the same, but takes twice as long for each call, and a disk makes one for
    each write.

    Args:
        count: number of threads; they start with the first call.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._count = count
        self._name = name
        self._threads: list[Thread] = []

    def run(self, work: Callable[[], None], finish: WriteDone) -> None:
        """Call ``work`` in a thread, then ``finish`` on the running loop: with None, or with the error of ``work``."""
        loop = asyncio.get_running_loop()
        try:
            while len(self._threads) < self._count:
                thread = Thread(target=self._work, name=self._name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:  # the system cannot start a thread
            if not self._threads:
                loop.call_soon(finish, OSError(errno.EAGAIN, str(error)))
                return
        self._calls.put((work, finish, loop))

    def post(self, work: Callable[[], None]) -> None:
        """Call ``work``, which must not raise, in a thread. :meth:`run` was called before."""
        self._calls.put((work, None, asyncio.get_running_loop()))

    def stop(self) -> None:
        """Wait for all calls, then end the threads. Blocks."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            work, finish, loop = call
            error = attempt(work)
            if finish is not None:
                try:
                    loop.call_soon_threadsafe(finish, error)
                except RuntimeError:
                    pass  # the event loop is closed: no caller is left
            del call, work, finish, loop, error  # they refer to buffers


def attempt(work: Callable[[], None]) -> OSError | None:
    """Call ``work``. Returns its error; an I/O error, with a record in the log, for an exception that is a bug."""
    try:
        work()
    except OSError as error:
        return error
    except Exception as error:
        log.exception("%s failed", work)
        return OSError(errno.EIO, repr(error))
    return None
