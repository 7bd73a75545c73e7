"""Calls in threads: blocking ones of devices that may hang, and those that would occupy the event loop for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Final, TypeVar

T = TypeVar("T")

LONG: Final = 4096
"""Characters of a text that are handled in a thread, at least: 1 Mi take 0.3 s."""


async def off_loop(call: Callable[[str], T], text: str) -> T:
    """Return what a call makes of a text, in a thread if the text has LONG characters or more."""
    return call(text) if len(text) < LONG else await asyncio.to_thread(call, text)


async def run_in_daemon_thread(function: Callable[[], T], on_abandoned: Callable[[T], None] | None = None) -> T:
    """Make a blocking call in a thread of its own, and return its result.

    Neither the event loop nor the exit of the process waits for the thread, as both do for ``asyncio.to_thread``.

    Args:
        function: the call.
        on_abandoned: called, in a thread too, with a result that arrives after the caller was cancelled.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    Thread(
        target=run_into_future, args=(function, future, loop, on_abandoned), name="farplug call", daemon=True
    ).start()
    return await future


def run_into_future(
    function: Callable[[], T],
    future: asyncio.Future[T],
    loop: asyncio.AbstractEventLoop,
    on_abandoned: Callable[[T], None] | None = None,
) -> None:
    """Make a call in this thread, and set a future of ``loop`` to its result or exception.

    Args:
        function: the call.
        future: ignored if it was cancelled meanwhile.
        loop: the event loop; it may be closed meanwhile.
        on_abandoned: as in :func:`run_in_daemon_thread`.
    """
    try:
        result = function()
    except Exception as error:
        _settle(loop, future, partial(future.set_exception, error), None)
    else:
        _settle(loop, future, partial(future.set_result, result), on_abandoned and partial(on_abandoned, result))


def _settle(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[T],
    settle: Callable[[], None],
    on_abandoned: Callable[[], None] | None,
) -> None:
    """Call ``settle`` on the loop; ``on_abandoned`` if the future was cancelled or the loop is closed."""

    def on_loop() -> None:
        if not future.cancelled():
            settle()
        elif on_abandoned is not None:
            Thread(target=on_abandoned, name="farplug call", daemon=True).start()

    try:
        loop.call_soon_threadsafe(on_loop)
    except RuntimeError:  # the loop is closed
        if on_abandoned is not None:
            on_abandoned()
