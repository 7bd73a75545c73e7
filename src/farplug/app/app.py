"""The application: guests, one stream of events, and one dispatcher of commands.

::

    async with App() as app:
        app.subscribe(lambda event: print(event))
        guest = await app.connect(GuestSettings(TargetSettings("vm.vv")))
        await app.do(Attach(Source.disk("a.raw")))
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

from farplug.app import commands
from farplug.app.client import AppClient
from farplug.app.commands import Command
from farplug.app.events import EventReader, EventStream, Level, Listener
from farplug.app.guest import Guest
from farplug.app.link import PASSWORD_ATTEMPTS, AskPassword
from farplug.app.media import Media, eject_with_client
from farplug.app.png import check_path, write_png
from farplug.app.screen import Progress, check_distances, check_text
from farplug.app.settings import CaptureSettings, GuestSettings, TargetSettings
from farplug.app.watch import Outlet
from farplug.capture.writer import STANDARD_OUTPUT
from farplug.errors import FarplugError, Reason, StateError, TargetError, UsageError
from farplug.keymap import find_layout, packaged_layouts
from farplug.spice.inputs import Button
from farplug.store.remote import open_remote_iso
from farplug.target import open_session
from farplug.text import printable, shown
from farplug.transport.dialer import SpiceTarget
from farplug.virtual.cdrom import CdromDrive

MAX_INPUT_TEXT: Final = 200
"""Characters of a typed text in the event ``input``."""


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

    # Commands -----------------------------------------------------------------------------------------------------

    def client(self, outlet: Outlet) -> AppClient:
        """Return a client of the application, whose watched screens end with it.

        Args:
            outlet: takes the events for this client alone.
        """
        return AppClient(self, outlet)

    async def do(self, command: Command, client: str = "") -> Any:
        """Carry out a command; return its result as JSON's types.

        Args:
            command: what to do.
            client: the name of the client that asks, for people; empty: it has none.

        Raises:
            FarplugError: the command cannot be carried out.
        """
        if isinstance(command, commands.TypeText):
            return await self.type(command, client)
        result = await _DISPATCH[type(command)](self, command)
        if isinstance(command, (commands.Press, commands.Click)):
            self._publish_input(self.guest(command.guest), command, client)
        return result

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

    async def _attach(self, command: commands.Attach) -> Any:
        guest = self.guest(command.guest)
        attachments = await guest.attach(
            command.sources,
            command.storage,
            command.rules,
            separate=command.separate,
            wait=command.wait,
            port=command.port,
        )
        return {"attachments": [attachment.snapshot() for attachment in attachments]}

    async def _detach(self, command: commands.Detach) -> Any:
        return {"detached": await self.guest(command.guest).detach(command.device)}

    async def _insert(self, command: commands.Insert) -> None:
        _, drive = self._drive(command)
        offer = self.media.find(command.path)
        if offer is None:
            await drive.insert(command.path, force=command.force)
            return
        store = await open_remote_iso(offer.file, offer.path, force=command.force)
        try:
            await drive.insert(store, force=command.force)
        except FarplugError:
            await store.close()
            raise
        eject_with_client(drive, store)

    async def _eject(self, command: commands.Eject) -> None:
        label, drive = self._drive(command)
        if drive.medium is None:
            self.guest(command.guest).note(f"{label} is empty")
        await drive.eject(force=command.force)

    async def _reconnect(self, command: commands.Reconnect) -> None:
        self.guest(command.guest).reconnect(give_up=command.give_up)

    async def _capture(self, command: commands.Capture) -> None:
        if command.path == STANDARD_OUTPUT:
            raise UsageError(
                "a capture that begins on a running session cannot go to standard output",
                reason=Reason.BAD_OPTION,
                remedy="name a file, or a named pipe",
            )
        await self.guest(command.guest).start_capture(CaptureSettings(command.path, command.bytes))

    async def _stop_capture(self, command: commands.StopCapture) -> None:
        await self.guest(command.guest).stop_capture()

    async def _screenshot(self, command: commands.Screenshot) -> Any:
        check_path(command.path)
        frame = await self.guest(command.guest).screen_of(command.display).frame()
        png = await asyncio.to_thread(frame.png)
        await asyncio.to_thread(write_png, command.path, png)
        return {"path": command.path, "width": frame.width, "height": frame.height}

    async def _screen_text(self, command: commands.ScreenText) -> Any:
        text = await self.guest(command.guest).screen_of(command.display).text()
        return {"lines": [*text.lines], "columns": text.columns, "unknown": text.unknown}

    async def type(self, command: commands.TypeText, client: str = "", progress: Progress = lambda done: None) -> Any:
        """Type a text; return the result of the command.

        Args:
            command: the text.
            client: as in :meth:`do`.
            progress: called with the number of characters that were typed.

        Raises as :meth:`farplug.app.typing.Typing.type`.
        """
        check_text(command.text, command.layout, secret=command.hidden)
        guest, has_begun, part = self.guest(command.guest), False, ", or a part"

        def begin() -> None:
            nonlocal has_begun
            has_begun = True

        try:
            typed = await guest.typing.type(command.text, command.layout, command.via, progress, begin)
            part = ""
        finally:
            if has_begun:
                self._publish_input(guest, command, client, part)
        return {"confirmed": typed.confirmed, "via": str(typed.via)}

    def _publish_input(
        self, guest: Guest, command: commands.TypeText | commands.Press | commands.Click, client: str, part: str = ""
    ) -> None:
        """Publish that a client used the keyboard or the mouse of a guest.

        Args:
            guest: the guest.
            command: what the client did.
            client: its name.
            part: what the message adds if perhaps not all of the command was carried out.
        """
        fields: dict[str, Any]
        match command:
            case commands.TypeText(text=text, hidden=False):
                fields = {"text": text[:MAX_INPUT_TEXT], "characters": len(text)}
                what = f"typed {len(text)} character{'' if len(text) == 1 else 's'}"
            case commands.TypeText():
                fields, what = {}, "typed a text"
            case commands.Press(keys=keys):
                fields, what = {"keys": keys}, f"pressed {printable(keys)}"
            case commands.Click(x=x, y=y, button=button):
                fields, what = {"x": x, "y": y, "button": str(button)}, f"clicked with the {button} button"
        message = f"{client or 'a client'} {what}{part}"
        guest.publish("input", message, level=Level.DETAIL, action=command.name, client=client, **fields)

    async def _press(self, command: commands.Press) -> Any:
        typed = await self.guest(command.guest).typing.press(command.keys, command.via)
        return {"confirmed": typed.confirmed, "via": str(typed.via)}

    async def _click(self, command: commands.Click) -> Any:
        guest, button = self.guest(command.guest), Button[command.button.name]
        check_distances(command.x, command.y)
        if not command.relative:
            clicked = await guest.typing.click(command.x, command.y, button, display=command.display, via=command.via)
            return {"via": str(clicked.via)}
        clicked = await guest.typing.click_at_distance(command.x, command.y, button, via=command.via)
        return {"via": str(clicked.via)}

    async def _layouts(self, command: commands.Layouts) -> Any:
        titles = packaged_layouts()
        return {
            "layouts": [{"name": name, "title": title} for name, title in titles.items()],
            "current": self.guest(command.guest).typing.layout,
        }

    async def _check_text(self, command: commands.CheckText) -> Any:
        missing = find_layout(command.layout).missing(command.text)
        return {
            "missing": [{"index": one.index, "char": one.character, "layouts": list(one.layouts)} for one in missing]
        }

    async def _presence(self, command: commands.Presence) -> Any:
        allow = command.answer is commands.PresenceAnswer.ALLOW
        attachment, question = self.guest(command.guest).answer(allow, command.attachment, command.request)
        return {
            "attachment": attachment.label,
            "answer": str(command.answer),
            "use": str(question.use),
            "site": question.site,
            "user": question.user,
        }

    async def _list(self, command: commands.ListDrives) -> Any:
        guest = self.guest(command.guest)
        drives = [
            {"label": label, "medium": drive.medium, "locked": drive.locked} for label, drive in guest.drives().items()
        ]
        for drive in drives:
            contents = drive["medium"] or "empty"
            text = f"{contents}{', locked by the guest' if drive['locked'] else ''}"
            guest.publish("drive", text, device=str(drive["label"]), medium=drive["medium"], locked=drive["locked"])
        if not drives:
            guest.note("no drive is plugged in")
        return drives

    async def _devices(self, command: commands.Devices) -> Any:
        from farplug.app.usb_devices import list_usb_devices  # which images do not need

        return await list_usb_devices(self.guests.values())

    async def _status(self, command: commands.Status) -> Any:
        return self.snapshot()

    async def _leave(self, command: commands.Quit) -> None:
        if self._quit is None:
            raise StateError("this application cannot be ended by a command")
        self._quit()

    def _drive(self, command: commands.Insert | commands.Eject) -> tuple[str, CdromDrive]:
        """Return the drive that a command means, and its label."""
        drives = self.guest(command.guest).drives()
        wanted = command.drive
        found = [label for label in drives if wanted in (None, label)]
        if not found:
            found = [
                label
                for label, drive in drives.items()
                if drive.medium is not None and wanted in (drive.medium, os.path.basename(drive.medium))
            ]
        if len(found) == 1:
            return found[0], drives[found[0]]
        what = "which drive?" if found else "no drive is plugged in"
        if drives and not found:
            what = f"there is no drive {shown(wanted)}"
        names = ", ".join(
            f"{label} ({'empty' if drive.medium is None else os.path.basename(drive.medium)})"
            for label, drive in drives.items()
        )
        raise UsageError(
            f"{command.name}: {what}", reason=Reason.NOT_FOUND, remedy=f"the drives are: {names}" if names else ""
        )


_DISPATCH: dict[type[Command], Callable[[App, Any], Awaitable[Any]]] = {
    commands.Attach: App._attach,
    commands.Detach: App._detach,
    commands.Insert: App._insert,
    commands.Eject: App._eject,
    commands.Capture: App._capture,
    commands.StopCapture: App._stop_capture,
    commands.Screenshot: App._screenshot,
    commands.ScreenText: App._screen_text,
    commands.Press: App._press,
    commands.Click: App._click,
    commands.Presence: App._presence,
    commands.Layouts: App._layouts,
    commands.CheckText: App._check_text,
    commands.ListDrives: App._list,
    commands.Devices: App._devices,
    commands.Status: App._status,
    commands.Reconnect: App._reconnect,
    commands.Quit: App._leave,
}
