"""The application: guests, one stream of events, and one dispatcher of commands.

::

    async with App() as app:
        app.subscribe(lambda event: print(event))
        guest = await app.connect(GuestSettings(TargetSettings("vm.vv")))
        await app.do(Attach(Source.disk("a.raw")))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from farplug.app.events import EventReader, EventStream, Level, Listener
from farplug.app.guest import Guest
from farplug.app.link import PASSWORD_ATTEMPTS, AskPassword
from farplug.app.media import Media
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.errors import FarplugError, Reason, StateError, TargetError, UsageError
from farplug.target import open_session
from farplug.text import shown
from farplug.transport.spice_target import SpiceTarget

if TYPE_CHECKING:
    from farplug.app.client import AppClient
    from farplug.app.commands import Command
    from farplug.app.outlet import Outlet
    from farplug.app.screen import Progress


class App:
    """The application.

    Args:
        ask_password: asks a user for the password of a guest; None: there is no user.
        quit: what :class:`~farplug.app.commands.Quit` does.

    Attributes:
        events: the stream of everything that happens.
        guests: the guests, by their ids.
        media: the files that clients offer.
    """

    def __init__(self, ask_password: AskPassword | None = None, quit: Callable[[], None] | None = None) -> None:
        self.events = EventStream()
        self.guests: dict[str, Guest] = {}
        self.media = Media(self.events)
        self._ask_password = ask_password
        self._quit = quit
        self._count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each event; see :meth:`EventStream.subscribe`."""
        return self.events.subscribe(listener)

    def iterate(self) -> EventReader:
        """Return an iterator over the events from now on; see :meth:`EventStream.iterate`."""
        return self.events.iterate()

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the application as JSON's types.

        :func:`farplug.app.state.apply` turns it, with the events after ``last_event``, into any later one.
        """
        return {
            "last_event": self.events.last_id,
            "guests": {guest.id: guest.snapshot() for guest in self.guests.values()},
        }

    def add(self, settings: GuestSettings) -> Guest:
        """Make a guest. It is connected by its :meth:`~Guest.run` or :meth:`~Guest.connect`."""
        self._count += 1
        guest = Guest(
            settings,
            stream=self.events,
            id=f"g{self._count}",
            ask_password=self._ask_password,
            media=self.media,
        )
        self.guests[guest.id] = guest
        target = settings.target.public_target
        guest.publish("guest", f"the VM at {target}", level=Level.DETAIL, target=target)
        return guest

    async def connect(self, settings: GuestSettings) -> Guest:
        """Make a guest and connect to it.

        Raises:
            UsageError: a setting is not valid.
            TargetError: the VM cannot be reached.
        """
        guest = self.add(settings)
        try:
            await guest.connect()
        except BaseException:
            await self.remove(guest)
            raise
        return guest

    async def connect_screen(self, settings: TargetSettings) -> Guest:
        """Make a guest of which only the screen and the inputs are used: no port for a device is opened.

        Raises:
            UsageError: a setting is not valid.
            TargetError: the VM cannot be reached.
        """
        target, attempts = settings.parse(), PASSWORD_ATTEMPTS
        while True:
            try:
                session = await open_session(target)
                break
            except TargetError as error:
                refused = error.reason in (Reason.WRONG_PASSWORD, Reason.NO_PASSWORD)
                password = await self._ask_password(error) if refused and attempts and self._ask_password else None
                if password is None or not isinstance(target, SpiceTarget):
                    raise
                attempts -= 1
                target = replace(target, password=password)
        self._count += 1
        guest = Guest(session=session, stream=self.events, id=f"g{self._count}")
        self.guests[guest.id] = guest
        return guest

    async def remove(self, guest: Guest) -> None:
        """Close a guest, and forget it.

        Raises:
            DeviceError: written data of a device could not be made durable.
        """
        try:
            await guest.close()
        finally:
            if self.guests.pop(guest.id, None) is not None:
                guest.publish("guest-removed", "the guest is closed", level=Level.DETAIL)

    async def run(self, guest: Guest) -> None:
        """Do all that a guest's settings ask for (:meth:`Guest.run`), then forget the guest."""
        try:
            await guest.run()
        finally:
            await self.remove(guest)

    async def close(self) -> None:
        """Close all guests.

        Raises:
            DeviceError: written data of a device could not be made durable (the first one that failed).
        """
        failed: FarplugError | None = None
        for guest in list(self.guests.values()):
            try:
                await self.remove(guest)
            except FarplugError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    # Clients and commands -----------------------------------------------------------------------------------------

    def client(self, outlet: Outlet) -> AppClient:
        """Return a client of the application, whose watched screens end with it.

        Args:
            outlet: takes the events for this client alone.
        """
        from farplug.app.client import AppClient  # a large import, as that of the commands

        return AppClient(self, outlet)

    async def do(self, command: Command, client: str = "", progress: Progress = lambda done: None) -> Any:
        """Carry out a command; return its result as JSON's types.

        Args:
            command: what to do.
            client: the name of the client that asks, for people; empty: it has none.
            progress: called with the number of characters of a text that were typed.

        Raises:
            FarplugError: the command cannot be carried out.
        """
        from farplug.app.executor import Executor

        return await Executor(self).do(command, client, progress)

    def leave(self) -> None:
        """End the application, as :class:`~farplug.app.commands.Quit` asks for.

        Raises:
            StateError: it cannot be ended by a command.
        """
        if self._quit is None:
            raise StateError("this application cannot be ended by a command")
        self._quit()

    def guest(self, id: str | None = None) -> Guest:
        """Return a guest by its id; None: the only one.

        Raises:
            UsageError: there is no such guest, or several.
        """
        if id is not None and id in self.guests:
            return self.guests[id]
        if id is None and len(self.guests) == 1:
            return next(iter(self.guests.values()))
        known = ", ".join(self.guests) or "none"
        what = f"{shown(id)} is not a guest" if id is not None else f"which of {len(self.guests)} guests?"
        raise UsageError(what, reason=Reason.NOT_FOUND, remedy=f"guests: {known}")
