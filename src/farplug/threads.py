"""Calls in a thread of their own, for what may hang."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def aside(function: Callable[[], T], unwanted: Callable[[T], None] | None = None) -> T:
    """Make a call in a thread of its own: for what may hang, because a device does.

    Neither the event loop nor the end of the process waits for it (for ``asyncio.to_thread`` both do).

    Args:
        function: the call.
        unwanted: called, in a thread too, with a result that nobody waits for any more.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    Thread(target=run, args=(function, future, loop, unwanted), name="usb look", daemon=True).start()
    return await future


def run(
    function: Callable[[], T],
    future: asyncio.Future[T],
    loop: asyncio.AbstractEventLoop,
    unwanted: Callable[[T], None] | None = None,
) -> None:
    """Make a call in this thread, and settle a future of ``loop`` with its result. ``unwanted``: as :func:`aside`."""
    try:
        result = function()
    except Exception as error:
        _settle(loop, future, partial(future.set_exception, error), None)
    else:
        _settle(loop, future, partial(future.set_result, result), unwanted and partial(unwanted, result))


def _settle(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[T],
    settle: Callable[[], None],
    unwanted: Callable[[], None] | None,
) -> None:
    """Tell on the loop how a call ended; ``unwanted`` is called if nobody waits for that any more."""

    def on_loop() -> None:
        if not future.cancelled():
            settle()
        elif unwanted is not None:
            Thread(target=unwanted, name="usb look", daemon=True).start()

    try:
        loop.call_soon_threadsafe(on_loop)
    except RuntimeError:  # the loop is closed
        if unwanted is not None:
            unwanted()
