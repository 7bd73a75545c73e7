"""The control socket of a session that ``farplug connect`` runs, and who waits until the session is ready."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from farplug.app.events import Event
from farplug.app.settings import GuestSettings
from farplug.cli import notify

if TYPE_CHECKING:
    from farplug.app.app import App
    from farplug.control.names import Reservation
    from farplug.control.server import Server


def _no_log(name: str) -> str | None:
    return None


def _ignore(name: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How a session is found and used by other commands.

    Attributes:
        name: of the session; None: that of the VM, else host and port.
        required: the session fails if it cannot have the name or a control socket.
        named: called with the name; returns the path of the log, None if there is none.
        ready: called with the name when the session is ready.
    """

    name: str | None = None
    required: bool = False
    named: Callable[[str], str | None] = _no_log
    ready: Callable[[str], None] = _ignore


UNNAMED: Final = ServiceOptions()
"""For a session whose user did not ask that other commands find it."""


class Service:
    """The control socket of a session.

    Args:
        options: as above.
        settings: of the guest.
        app: carries out what clients ask for.
    """

    def __init__(self, options: ServiceOptions, settings: GuestSettings, app: App) -> None:
        self._options = options
        self._target = settings.target.public_target
        self._app = app
        self._reservation: Reservation | None = None
        self._server: Server | None = None

    @property
    def name(self) -> str:
        """Return the name of the session; empty: it has none."""
        return "" if self._server is None or self._reservation is None else self._reservation.name

    async def start(self, vm: str = "") -> None:
        """Get the name, and listen on the control socket.

        Args:
            vm: the name of the VM; empty: it is not known.

        Raises:
            UsageError: the name is not valid, or another session has it.
            SetupError: the socket or the log cannot be made.
        """
        from farplug.control import names
        from farplug.control.server import Server

        self._reservation = names.reserve(self._options.name, names.default_name(vm, self._target))
        try:
            log = self._options.named(self._reservation.name)
            server = Server(self._app, self._reservation, target=self._target, log=log)
            await server.start()
        except BaseException:
            self._reservation.release()
            raise
        self._server = server

    async def close(self) -> None:
        """Send the last events to the clients, and let other sessions have the name."""
        if self._server is not None:
            await self._server.close()


class SystemdReporter:
    """Reports the state of a session to systemd; see :mod:`farplug.cli.notify`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._enabled = notify.VARIABLE in os.environ
        self._status = ""

    def ready(self) -> None:
        """Report that the session is ready."""
        notify.notify(READY="1")

    def show(self, event: Event) -> None:
        """Report the way to the VM, or the devices, if that has changed."""
        if not self._enabled or event.name == "figures":
            return
        attachments = [one for guest in self._app.guests.values() for one in guest.attachments]
        labels = ", ".join(one.label for one in attachments if not one.over)
        status = (
            event.message if event.name in ("stage", "lost", "reconnecting") else f"plugged in: {labels or 'nothing'}"
        )
        if status != self._status:
            self._status = status
            notify.notify(STATUS=status)

    def stopping(self) -> None:
        """Report that the session ends."""
        notify.notify(STOPPING="1")
