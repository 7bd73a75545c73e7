"""Carry out the commands of an application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from farplug.app import commands
from farplug.app.commands import Command
from farplug.app.events import Level
from farplug.app.media import eject_with_client
from farplug.app.png import check_path, write_png
from farplug.app.screen import Progress, check_distances, check_text
from farplug.app.settings import CaptureSettings
from farplug.capture.writer import STANDARD_OUTPUT
from farplug.errors import FarplugError, Reason, Remedy, UsageError
from farplug.keymap import find_layout, packaged_layouts
from farplug.spice.inputs import Button
from farplug.store.remote import open_remote_iso
from farplug.text import printable, shown
from farplug.threads import off_loop
from farplug.virtual.cdrom import CdromDrive

if TYPE_CHECKING:
    from farplug.app.app import App
    from farplug.app.guest import Guest

MAX_INPUT_TEXT: Final = 200
"""Characters of a typed text in the event ``input``."""


class Executor:
    """Carries out commands.

    Args:
        app: the application.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def do(self, command: Command, client: str, progress: Progress) -> Any:
        """Carry out a command: see :meth:`farplug.app.app.App.do`."""
        if isinstance(command, commands.TypeText):
            return await self._type(command, client, progress)
        result = await _DISPATCH[type(command)](self, command)
        if isinstance(command, (commands.Press, commands.Click)):
            self._publish_input(self._app.guest(command.guest), command, client)
        return result

    async def _attach(self, command: commands.Attach) -> Any:
        guest = self._app.guest(command.guest)
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
        return {"detached": await self._app.guest(command.guest).detach(command.device)}

    async def _insert(self, command: commands.Insert) -> None:
        _, drive = self._drive(command)
        offer = self._app.media.find(command.path)
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
            self._app.guest(command.guest).note(f"{label} is empty")
        await drive.eject(force=command.force)

    async def _reconnect(self, command: commands.Reconnect) -> None:
        self._app.guest(command.guest).reconnect(give_up=command.give_up)

    async def _capture(self, command: commands.Capture) -> None:
        if command.path == STANDARD_OUTPUT:
            raise UsageError(
                "a capture that begins on a running session cannot go to standard output",
                reason=Reason.BAD_OPTION,
                remedy="name a file, or a named pipe",
            )
        await self._app.guest(command.guest).start_capture(CaptureSettings(command.path, command.bytes))

    async def _stop_capture(self, command: commands.StopCapture) -> None:
        await self._app.guest(command.guest).stop_capture()

    async def _screenshot(self, command: commands.Screenshot) -> Any:
        check_path(command.path)
        frame = await self._app.guest(command.guest).screen_of(command.display).frame()
        png = await asyncio.to_thread(frame.png)
        await asyncio.to_thread(write_png, command.path, png)
        return {"path": command.path, "width": frame.width, "height": frame.height}

    async def _screen_text(self, command: commands.ScreenText) -> Any:
        text = await self._app.guest(command.guest).screen_of(command.display).text()
        return {"lines": [*text.lines], "columns": text.columns, "unknown": text.unknown}

    async def _type(self, command: commands.TypeText, client: str, progress: Progress) -> Any:
        await off_loop(lambda text: check_text(text, command.layout, secret=command.hidden), command.text)
        guest, has_begun, part = self._app.guest(command.guest), False, ", or a part"

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
        typed = await self._app.guest(command.guest).typing.press(command.keys, command.via)
        return {"confirmed": typed.confirmed, "via": str(typed.via)}

    async def _click(self, command: commands.Click) -> Any:
        guest, button = self._app.guest(command.guest), Button[command.button.name]
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
            "current": self._app.guest(command.guest).typing.layout,
        }

    async def _check_text(self, command: commands.CheckText) -> Any:
        missing = await off_loop(find_layout(command.layout).missing, command.text)
        return {
            "missing": [{"index": one.index, "char": one.character, "layouts": list(one.layouts)} for one in missing]
        }

    async def _presence(self, command: commands.Presence) -> Any:
        allow = command.answer is commands.PresenceAnswer.ALLOW
        attachment, question = self._app.guest(command.guest).answer(allow, command.attachment, command.request)
        return {
            "attachment": attachment.label,
            "answer": str(command.answer),
            "use": str(question.use),
            "site": question.site,
            "user": question.user,
        }

    async def _list(self, command: commands.ListDrives) -> Any:
        guest = self._app.guest(command.guest)
        drives = [
            {"label": label, "medium": drive.medium, "locked": drive.locked} for label, drive in guest.drives().items()
        ]
        for drive in drives:
            contents = drive["medium"] or "empty"
            text = f"{contents}{', locked by the guest' if drive['locked'] else ''}"
            guest.publish("drive", text, device=str(drive["label"]), medium=drive["medium"], locked=drive["locked"])
        if not drives:
            guest.note("no CD-ROM drive is plugged in")
        return drives

    async def _devices(self, command: commands.Devices) -> Any:
        from farplug.app.usb_devices import list_usb_devices  # which images do not need

        return await list_usb_devices(self._app.guests.values())

    async def _status(self, command: commands.Status) -> Any:
        return self._app.snapshot()

    async def _leave(self, command: commands.Quit) -> None:
        self._app.leave()

    def _drive(self, command: commands.Insert | commands.Eject) -> tuple[str, CdromDrive]:
        """Return the drive that a command means, and its label."""
        drives = self._app.guest(command.guest).drives()
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
        if not drives:
            raise UsageError(
                "no CD-ROM drive is plugged in",
                reason=Reason.NOT_FOUND,
                remedy=Remedy("plug one in", setting="usb_cdrom"),
            )
        what = "several drives are plugged in" if found else f"there is no drive {shown(wanted)}"
        names = ", ".join(
            f"{label} ({'empty' if drive.medium is None else os.path.basename(drive.medium)})"
            for label, drive in drives.items()
        )
        raise UsageError(what, reason=Reason.AMBIGUOUS if found else Reason.NOT_FOUND, remedy=f"name one of: {names}")


_DISPATCH: dict[type[Command], Callable[[Executor, Any], Awaitable[Any]]] = {
    commands.Attach: Executor._attach,
    commands.Detach: Executor._detach,
    commands.Insert: Executor._insert,
    commands.Eject: Executor._eject,
    commands.Capture: Executor._capture,
    commands.StopCapture: Executor._stop_capture,
    commands.Screenshot: Executor._screenshot,
    commands.ScreenText: Executor._screen_text,
    commands.Press: Executor._press,
    commands.Click: Executor._click,
    commands.Presence: Executor._presence,
    commands.Layouts: Executor._layouts,
    commands.CheckText: Executor._check_text,
    commands.ListDrives: Executor._list,
    commands.Devices: Executor._devices,
    commands.Status: Executor._status,
    commands.Reconnect: Executor._reconnect,
    commands.Quit: Executor._leave,
}
