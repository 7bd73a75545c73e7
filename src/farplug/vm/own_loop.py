"""Coroutines that any event loop may await, of objects that belong to one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from farplug.errors import StateError

P = ParamSpec("P")
T = TypeVar("T")
O = TypeVar("O", bound="OwnLoop")  # noqa: E741


class OwnLoop:
    """An object whose connections and processes belong to the event loop that started them."""

    _loop: asyncio.AbstractEventLoop | None = None
    """That loop; None before the start: then it is the loop of the caller."""


def on_own_loop(
    method: Callable[Concatenate[O, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[O, P], Coroutine[Any, Any, T]]:
    """Let a coroutine run on the loop of its object, also when another loop, of another thread, awaits it.

    A caller that is cancelled cancels the coroutine. The coroutine raises ``StateError`` when the object's loop does
    not run: nothing would ever wake the caller.
    """

    @wraps(method)
    async def call(self: O, /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = self._loop
        if loop is None or loop is asyncio.get_running_loop():
            return await method(self, *args, **kwargs)
        if not loop.is_running():
            raise StateError(f"the event loop that started this {type(self).__name__} does not run")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(method(self, *args, **kwargs), loop))

    return call
