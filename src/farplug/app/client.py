"""A client of the application: what one connection watches. It ends with the connection.

::

    client = app.client(outlet)
    await client.do(WatchScreen())
    ...
    client.close()
    await client.closed()
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from farplug.app import commands
from farplug.app.commands import Command
from farplug.app.guest import Guest
from farplug.app.watch import InputsWatch, Outlet, Pacing, ScreenWatch
from farplug.errors import GuestGoneError, Reason, UsageError
from farplug.usb.types import Buffer

if TYPE_CHECKING:
    from farplug.app.app import App

MAX_WATCHES: Final = 16
"""Displays that a client watches at a time."""


class AppClient:
    """A client of the application. Made by :meth:`farplug.app.app.App.client`.

    Args:
        app: the application.
        outlet: the connection of the client.

    Attributes:
        name: of the client, for people; empty: unknown.
    """

    def __init__(self, app: App, outlet: Outlet) -> None:
        self.name = ""
        self._app = app
        self._outlet = outlet
        self._pacing = Pacing()
        self._screens: dict[tuple[Guest, int], ScreenWatch] = {}
        self._inputs: dict[Guest, InputsWatch] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def do(self, command: Command, payload: Buffer | None = None) -> Any:
        """Carry out a command of this client, or of the application; return its result as JSON's types.

        Args:
            command: what to do.
            payload: the raw bytes that came with it.

        Raises:
            FarplugError: the command cannot be carried out.
        """
        if payload is not None and not command.takes_payload:
            raise UsageError(f"{command.name} takes no raw bytes", reason=Reason.BAD_SETTING)
        handler = _DISPATCH.get(type(command))
        if handler is None:
            return await self._app.do(command)
        if self._is_closed:
            raise GuestGoneError("the client has gone", reason=Reason.SESSION_GONE)
        return await handler(self, command)

    def close(self) -> None:
        """End all that belongs to this client. A second call has no effect."""
        self._is_closed = True
        for screen in self._screens.values():
            self._end(screen.close())
        for inputs in self._inputs.values():
            self._end(inputs.close())
        self._screens.clear()
        self._inputs.clear()

    async def closed(self) -> None:
        """Wait until all that was ended has ended."""
        if self._ending:
            await asyncio.wait(self._ending)

    def _end(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(call)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # Screens ------------------------------------------------------------------------------------------------------

    async def _watch_screen(self, command: commands.WatchScreen) -> Any:
        guest = self._app.guest(command.guest)
        key = guest, command.display
        if key in self._screens:
            self._end(self._screens.pop(key).close())
        elif len(self._screens) >= MAX_WATCHES:
            raise UsageError(f"a client watches {MAX_WATCHES} displays at most", reason=Reason.BAD_SETTING)
        watch = self._screens[key] = ScreenWatch(guest, command.display, self._outlet, self._pacing)
        self._follow_inputs(guest)
        return watch.result

    async def _unwatch_screen(self, command: commands.UnwatchScreen) -> None:
        guest = self._app.guest(command.guest)
        watch = self._screens.pop((guest, command.display), None)
        if watch is not None:
            self._end(watch.close())
            self._follow_inputs(guest)

    async def _screen_ack(self, command: commands.ScreenAck) -> None:
        self._pacing.acknowledge(command.serial)

    def _watches(self, guest: Guest) -> bool:
        return any(watched is guest for watched, _ in self._screens)

    def _follow_inputs(self, guest: Guest) -> None:
        """Follow the inputs of a guest whose screen is watched, and no others."""
        if self._watches(guest):
            if guest not in self._inputs:
                self._inputs[guest] = InputsWatch(guest, self._outlet)
        elif guest in self._inputs:
            self._end(self._inputs.pop(guest).close())


_DISPATCH: dict[type[Command], Callable[[AppClient, Any], Awaitable[Any]]] = {
    commands.WatchScreen: AppClient._watch_screen,
    commands.UnwatchScreen: AppClient._unwatch_screen,
    commands.ScreenAck: AppClient._screen_ack,
}
