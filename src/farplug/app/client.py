"""A client of the application: what one connection watches, holds down and types. It ends with the connection.

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
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from farplug.app import commands
from farplug.app.attachment import Attachment
from farplug.app.commands import Command
from farplug.app.guest import Guest
from farplug.app.lines import OpenLine
from farplug.app.media import PREFIX, Offer
from farplug.app.outlet import ClientEvent, Outlet
from farplug.app.screen import check_distances
from farplug.app.seat import Hands, not_driving, taken
from farplug.app.settings import Names, Source
from farplug.app.watch import InputsWatch, Pacing, ScreenWatch
from farplug.errors import FarplugError, GuestGoneError, Reason, StateError, UsageError
from farplug.keymap.layout import characters
from farplug.spice.inputs import Button
from farplug.spice.physical_keys import physical_key
from farplug.text import printable, shown
from farplug.threads import off_loop
from farplug.usb.types import Buffer

if TYPE_CHECKING:
    from farplug.app.app import App

MAX_WATCHES: Final = 16
"""Displays that a client watches at a time."""
MAX_OFFERS: Final = 8
"""Files that a client offers at a time."""
MAX_SHELLS: Final = 4
"""Devices for commands in guests that a client has plugged in at a time."""
MAX_LINES: Final = 8
"""Serial lines that a client has open at a time."""
MAX_NAME: Final = 64
"""Characters of the name of a client."""
TYPING_INTERVAL: Final = 0.2
"""Seconds from one event ``typing`` to the next, at least."""


class AppClient:
    """A client of the application. Made by :meth:`farplug.app.app.App.client`.

    Args:
        app: the application.
        outlet: the connection of the client.

    Attributes:
        name: of the client, for people; empty: unknown.
        outlet: as above.
    """

    def __init__(self, app: App, outlet: Outlet) -> None:
        self.name = ""
        self.outlet = outlet
        self._app = app
        self._pacing = Pacing()
        self._screens: dict[tuple[Guest, int], ScreenWatch] = {}
        self._inputs: dict[Guest, InputsWatch] = {}
        self._hands: dict[Guest, Hands] = {}
        """Those of the guests whose keyboard and mouse this client has asked for."""
        self._typing: dict[asyncio.Task[None], Guest] = {}
        self._offers: dict[str, Offer] = {}
        self._shells: dict[Attachment, Guest] = {}
        self._plugging_shells = 0
        self._lines: dict[int, OpenLine] = {}
        self._last_line = 0
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
        if self._is_closed and command.name in commands.CLIENT_COMMANDS:
            raise GuestGoneError("the client has gone", reason=Reason.SESSION_GONE)
        if isinstance(command, commands.MediaData):
            self._media_data(command, payload)
            return None
        if isinstance(command, commands.SerialWrite):
            await self._line(command.line).write(bytes(payload or b""))
            return None
        handler = _DISPATCH.get(type(command))
        if handler is None:
            return await self._app.do(self._with_offers(command), self.name)
        return await handler(self, command)

    def close(self) -> None:
        """End all that belongs to this client. A second call has no effect."""
        self._is_closed = True
        self._interrupt(None)
        for guest in {*self._hands, *(guest for guest, _ in self._screens)}:
            guest.seat.leave(self)  # and what is held down is released, before the channel is not used any more
        for screen in self._screens.values():
            self._end(screen.close())
        for inputs in self._inputs.values():
            self._end(inputs.close())
        self._screens.clear()
        self._inputs.clear()
        for offer in self._offers.values():
            self._app.media.withdraw(offer)
        self._offers.clear()
        for attachment, guest in self._shells.items():
            if not attachment.over:
                self._end(self._unplug(guest, attachment))
        self._shells.clear()
        for line in self._lines.values():
            line.close()
        self._lines.clear()

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
        watch = self._screens[key] = ScreenWatch(guest, command.display, self.outlet, self._pacing)
        self._follow_inputs(guest)
        guest.seat.join(self)
        return watch.result

    async def _unwatch_screen(self, command: commands.UnwatchScreen) -> None:
        guest = self._app.guest(command.guest)
        watch = self._screens.pop((guest, command.display), None)
        if watch is not None:
            self._end(watch.close())
            self._follow_inputs(guest)
            if guest in self._hands or self.watches(guest):
                guest.seat.changed()
            else:
                guest.seat.leave(self)

    async def _screen_ack(self, command: commands.ScreenAck) -> None:
        self._pacing.acknowledge(command.serial)

    def watches(self, guest: Guest) -> bool:
        """Return whether the client watches a screen of a guest."""
        return any(watched is guest for watched, _ in self._screens)

    def _follow_inputs(self, guest: Guest) -> None:
        """Follow the inputs of a guest whose screen the client watches, or whose keyboard it holds, and no others."""
        if self.watches(guest) or guest.seat.holder is self:
            if guest not in self._inputs:
                self._inputs[guest] = InputsWatch(guest, self.outlet)
        elif guest in self._inputs:
            self._end(self._inputs.pop(guest).close())

    # Keyboard and mouse -------------------------------------------------------------------------------------------

    async def _drive(self, command: commands.Drive) -> Any:
        guest = self._app.guest(command.guest)
        if command.client:
            self.name = printable(command.client, MAX_NAME)
        self._hands.setdefault(guest, Hands(guest))
        holder = guest.seat.holder
        if command.take and command.if_free and holder is not None and holder is not self:
            guest.seat.join(self)
            raise taken(holder.name)
        if command.take:
            guest.seat.take(self)
        else:
            guest.seat.release(self)
            guest.seat.join(self)
        self._follow_inputs(guest)
        return {"holder": None if guest.seat.holder is None else guest.seat.holder.name}

    def unseated(self, guest: Guest) -> None:
        """Release what the client holds down, and interrupt what it types: it holds the keyboard no more."""
        self._end(self._hands[guest].release())
        self._interrupt(guest)
        self._follow_inputs(guest)

    def _driven(self, guest: Guest) -> Hands:
        if guest.seat.holder is not self:
            raise not_driving()
        return self._hands[guest]

    async def _key(self, command: commands.Key) -> None:
        code = physical_key(command.code)
        await self._driven(self._app.guest(command.guest)).key(code, down=command.down)

    async def _keys_up(self, command: commands.KeysUp) -> None:
        hands = self._hands.get(self._app.guest(command.guest))
        if hands is not None:
            await hands.release()

    async def _pointer(self, command: commands.Pointer) -> None:
        hands = self._driven(self._app.guest(command.guest))
        x, y, dx, dy = command.x, command.y, command.dx, command.dy
        if (x is None) != (y is None):
            raise UsageError("x and y belong together", reason=Reason.BAD_SETTING)
        check_distances(*(value for value in (x, y, dx, dy) if value is not None))
        position = None if x is None or y is None else (x, y)
        distance = None if dx is None and dy is None else (dx or 0, dy or 0)
        buttons = None if command.buttons is None else [Button[one.name] for one in dict.fromkeys(command.buttons)]
        await hands.point(position, distance, buttons, command.wheel, command.display)

    def _check_may_type(self, guest: Guest) -> None:
        if guest in self._hands and guest.seat.holder is not self:
            raise not_driving()

    async def _type(self, command: commands.TypeText) -> Any:
        guest = self._app.guest(command.guest)
        self._check_may_type(guest)
        task = asyncio.ensure_future(self._typed(guest, command))
        self._typing[task] = guest
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise StateError("the typing was interrupted", reason=Reason.INTERRUPTED)
            return task.result()
        finally:
            task.cancel()  # if this call was cancelled
            del self._typing[task]

    async def _typed(self, guest: Guest, command: commands.TypeText) -> Any:
        total = await off_loop(lambda text: sum(1 for _ in characters(text)), command.text)
        return await self._app.do(command, self.name, _Progress(self.outlet, guest, total))

    async def _stop_typing(self, command: commands.StopTyping) -> None:
        self._interrupt(None)

    def _interrupt(self, guest: Guest | None) -> None:
        """Interrupt what the client types; in one guest, or in all (None)."""
        for task, typing in self._typing.items():
            if guest is None or typing is guest:
                task.cancel()

    async def _press_or_click(self, command: commands.Press | commands.Click) -> Any:
        self._check_may_type(self._app.guest(command.guest))
        return await self._app.do(command, self.name)

    # Files of this client -----------------------------------------------------------------------------------------

    async def _media_offer(self, command: commands.MediaOffer) -> Any:
        if len(self._offers) >= MAX_OFFERS:
            raise UsageError(f"a client offers {MAX_OFFERS} files at most", reason=Reason.BAD_SETTING)
        offer = self._app.media.offer(command.file, command.size, command.modified, self.outlet)
        self._offers[offer.id] = offer
        return {"media": offer.id}

    def _media_data(self, command: commands.MediaData, payload: Buffer | None) -> None:
        offer = self._offer(command.media)
        if payload is None and command.error is None:
            raise UsageError("media-data needs raw bytes, or an error", reason=Reason.BAD_SETTING)
        try:
            offer.file.answer(command.read, payload or b"", command.error)
        except ValueError as error:
            raise UsageError(str(error), reason=Reason.BAD_SETTING) from error

    async def _media_withdraw(self, command: commands.MediaWithdraw) -> None:
        offer = self._offer(command.media)
        del self._offers[offer.id]
        self._app.media.withdraw(offer)

    def _offer(self, id: str) -> Offer:
        """Return the file with an id, which may be followed by a slash and the name."""
        id = id.partition("/")[0]
        if id not in self._offers:
            known = ", ".join(self._offers) or "none"
            raise UsageError(
                f"this client offers no file {shown(id)}", reason=Reason.NOT_FOUND, remedy=f"files: {known}"
            )
        return self._offers[id]

    def _with_offers(self, command: Command) -> Command:
        """Return a command in which files of this client have their full path. Those of others cannot be used."""
        match command:
            case commands.Insert(path=path) if path.startswith(PREFIX):
                return replace(command, path=self._offer(path.removeprefix(PREFIX)).path)
            case commands.Attach(sources=sources):
                return replace(command, sources=tuple(map(self._with_offer, sources)))
        return command

    def _with_offer(self, source: Source) -> Source:
        if source.kind.names is not Names.FILE or not source.path.startswith(PREFIX):
            return source
        return replace(source, path=self._offer(source.path.removeprefix(PREFIX)).path)

    # Commands in the guest ----------------------------------------------------------------------------------------

    async def _plug_shell(self, command: commands.PlugShell) -> Any:
        guest = self._app.guest(command.guest)
        self._shells = {one: where for one, where in self._shells.items() if not one.over}
        if len(self._shells) + self._plugging_shells >= MAX_SHELLS:
            raise UsageError(f"a client plugs {MAX_SHELLS} shells in at most", reason=Reason.BAD_SETTING)
        self._plugging_shells += 1
        try:
            attachment = await guest.plug_shell(command.lines, command.serial_number)
        finally:
            self._plugging_shells -= 1
        if self._is_closed:
            await self._unplug(guest, attachment)
            raise GuestGoneError("the client has gone", reason=Reason.SESSION_GONE)
        self._shells[attachment] = guest
        return {"attachment": attachment.id, "label": attachment.label}

    @staticmethod
    async def _unplug(guest: Guest, attachment: Attachment) -> None:
        with suppress(FarplugError):  # the guest is gone
            await guest.unplug(attachment)

    # Serial lines -------------------------------------------------------------------------------------------------

    async def _serial_open(self, command: commands.SerialOpen) -> Any:
        if len(self._lines) >= MAX_LINES:
            raise UsageError(f"a client has {MAX_LINES} serial lines open at most", reason=Reason.BAD_SETTING)
        end = self._app.guest(command.guest).line(command.device)
        self._last_line += 1
        line = self._lines[self._last_line] = OpenLine(self._last_line, end, self.outlet)
        return {"line": self._last_line, "position": line.position}

    async def _serial_ack(self, command: commands.SerialAck) -> None:
        self._line(command.line).acknowledge(command.position)

    async def _serial_close(self, command: commands.SerialClose) -> None:
        self._line(command.line).close()
        del self._lines[command.line]

    def _line(self, number: int) -> OpenLine:
        if number not in self._lines:
            raise UsageError(f"this client has no serial line {number} open", reason=Reason.NOT_FOUND)
        return self._lines[number]


class _Progress:
    """Reports to a client how much of a text was typed, at most once in TYPING_INTERVAL, and when all was."""

    def __init__(self, outlet: Outlet, guest: Guest, total: int) -> None:
        self._outlet = outlet
        self._guest = guest
        self._done, self._total = 0, total
        self._next_at = 0.0

    def __call__(self, done: int) -> None:
        """Take the number of characters that were typed."""
        self._done = done
        now = asyncio.get_running_loop().time()
        if now >= self._next_at or done == self._total:
            self._next_at = now + TYPING_INTERVAL
            self._outlet.post(("typing", self), self._event)

    def _event(self) -> ClientEvent:
        return ClientEvent("typing", {"guest": self._guest.id, "done": self._done, "total": self._total})


_DISPATCH: dict[type[Command], Callable[[AppClient, Any], Awaitable[Any]]] = {
    commands.WatchScreen: AppClient._watch_screen,
    commands.UnwatchScreen: AppClient._unwatch_screen,
    commands.ScreenAck: AppClient._screen_ack,
    commands.Drive: AppClient._drive,
    commands.Key: AppClient._key,
    commands.KeysUp: AppClient._keys_up,
    commands.Pointer: AppClient._pointer,
    commands.TypeText: AppClient._type,
    commands.StopTyping: AppClient._stop_typing,
    commands.MediaOffer: AppClient._media_offer,
    commands.MediaWithdraw: AppClient._media_withdraw,
    commands.PlugShell: AppClient._plug_shell,
    commands.SerialOpen: AppClient._serial_open,
    commands.SerialAck: AppClient._serial_ack,
    commands.SerialClose: AppClient._serial_close,
    commands.Press: AppClient._press_or_click,
    commands.Click: AppClient._press_or_click,
}
