"""What the commands of running sessions have in common: find the session, carry a method out, show what happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from farplug.app.events import Event
from farplug.cli.options import SESSION_VARIABLE
from farplug.cli.output import Output
from farplug.control.client import Client, Subscription
from farplug.control.names import open_session
from farplug.errors import FarplugError, Reason, Remedy, UsageError

_T = TypeVar("_T")

_START = Remedy("list the sessions, or start one:", command="farplug ls\nfarplug connect TARGET --detach")


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine, and return its result.

    Raises:
        UsageError: the session does not run, or which one is not clear; with the command that helps.
    """
    try:
        return asyncio.run(main)
    except UsageError as error:
        if error.reason is Reason.AMBIGUOUS and error.remedy:
            raise UsageError(
                error.message, reason=error.reason, remedy=f"{error.remedy} (-s NAME, or {SESSION_VARIABLE})"
            ) from error
        if error.reason is Reason.NO_SESSION:
            raise UsageError(error.message, reason=error.reason, remedy=_START) from error
        raise


@dataclass(slots=True)
class Follower:
    """Shows the events of a session while methods are carried out.

    Attributes:
        client: the connection to the session.
        snapshot: the state of the session at the beginning.
    """

    client: Client
    snapshot: Mapping[str, Any]
    _show: Callable[[Event], None]
    _events: Subscription
    _last: int = 0
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call a method; return its result when all events before it were shown.

        Raises:
            SessionError: the session refused it.
        """
        try:
            return await self.client.call(method, params)
        finally:
            await self._catch_up()

    async def _catch_up(self) -> None:
        try:
            last = (await self.client.call("status"))["last_event"]
        except FarplugError:
            return  # the session has ended: the call itself reports that
        while self._last < last and not self._over.is_set():
            self._moved.clear()
            await self._moved.wait()

    async def ended(self) -> None:
        """Wait until the session has ended."""
        await self._over.wait()

    async def read(self) -> None:
        """Show events until the session ends."""
        try:
            async for data in self._events:
                match data["event"]:
                    case "snapshot":  # events were dropped
                        self._last = data["last_event"]
                    case "dropped":
                        pass
                    case _:
                        self._show(Event.from_json(data))
                        self._last = data["id"]
                self._moved.set()
        finally:
            self._over.set()
            self._moved.set()


@asynccontextmanager
async def following(name: str | None, show: Callable[[Event], None]) -> AsyncIterator[Follower]:
    """Return a context manager that connects to a session, and shows its events from then on."""
    async with open_session(name) as client:
        events = client.subscribe()
        snapshot = await anext(events)
        follower = Follower(client, snapshot, show, events, snapshot["last_event"])
        reading = asyncio.ensure_future(follower.read())
        try:
            yield follower
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def refreshing(output: Output) -> AsyncIterator[None]:
    """Return a context manager that keeps an output current: the live table on a terminal."""

    async def refresh() -> None:
        while True:
            await asyncio.sleep(output.interval)
            output.refresh()

    task = asyncio.ensure_future(refresh())
    output.start()
    try:
        yield
    finally:
        task.cancel()
        output.stop()
