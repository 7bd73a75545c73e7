"""The capture of a guest: what begins it, what it sees, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from farplug.app.attachment import Attachment
from farplug.app.events import Event, Level
from farplug.app.guest_port import GuestPort
from farplug.app.settings import CaptureSettings
from farplug.capture.descriptors import read_descriptors
from farplug.capture.recording import CONTENTS, Recording
from farplug.capture.writer import STANDARD_OUTPUT
from farplug.errors import FarplugError, Reason, UsageError
from farplug.redirection.describe import device_connect
from farplug.transport.connection import Wire

if TYPE_CHECKING:
    from farplug.app.guest import Guest

_NOT_CAPTURED: Final = frozenset(("figures", "copying"))
"""Events that repeat all the time, and that the packets show as well."""


class Captures:
    """The capture of a guest: there is one at a time.

    Args:
        guest: whose events are captured, and which publishes those of the capture.

    Attributes:
        path: of the capture that runs, until its file is complete; None: none does.
    """

    def __init__(self, guest: Guest) -> None:
        self.path: str | None = None
        self._guest = guest
        self._capture: GuestCapture | None = None
        self._ending: asyncio.Future[FarplugError | None] | None = None
        """A capture whose file could not be written is being closed."""

    @property
    def has_begun(self) -> bool:
        """Return whether a capture runs, or its file is being opened."""
        return self._capture is not None

    @property
    def wire(self) -> Wire | None:
        """Return what taps new connections; None: nothing does."""
        return None if self._capture is None else self._capture.wire

    def watch(self, attachment: Attachment) -> None:
        """Capture the packets of an attachment's port from now on, if a capture runs."""
        if self._capture is not None and self._capture.is_open:
            self._capture.watch(attachment)

    async def start(self, settings: CaptureSettings) -> None:
        """Begin a capture, also of what is plugged in already.

        Raises:
            UsageError: a capture runs already (``IN_USE``); the settings are not valid (``BAD_SETTING``); the file
                cannot be used, or holds something else.
        """
        if self._capture is not None:
            raise UsageError(
                f"a capture to {self._capture.settings.path} runs already", reason=Reason.IN_USE, remedy="end it first"
            )
        if settings.bytes is not None and settings.bytes < 0:
            raise UsageError(f"{settings.bytes} bytes of each transfer: less than 0", reason=Reason.BAD_SETTING)
        capture = self._capture = GuestCapture(self._guest, settings, self._failed)
        try:
            await capture.open()
        except BaseException:
            self._capture = None
            raise
        for attachment in list(self._guest.attachments):
            if not attachment.over:
                await capture.resume(attachment)

    async def stop(self) -> None:
        """End the capture: the file is complete then.

        Raises:
            UsageError: no capture runs (``NOT_FOUND``); the file could not be written to its end.
        """
        capture, self._capture = self._capture, None
        if capture is None:
            raise UsageError("no capture runs", reason=Reason.NOT_FOUND)
        error = await capture.close()
        if error is not None:
            raise error

    async def end(self) -> None:
        """End the capture, if there is one, whether its file is complete or not."""
        capture, self._capture = self._capture, None
        if capture is not None:
            await capture.close()
        if self._ending is not None:
            await self._ending

    def _failed(self, capture: GuestCapture) -> None:
        if self._capture is capture:
            self._capture = None
            self._ending = asyncio.ensure_future(capture.close())


class GuestCapture:
    """A capture of a guest.

    Args:
        guest: whose events are captured, and which publishes those of the capture.
        settings: where to, and how much.
        on_failed: called when the file cannot be written any more; then call :meth:`close`.

    Attributes:
        is_open: whether the capture runs.
        settings: as above.
    """

    def __init__(self, guest: Guest, settings: CaptureSettings, on_failed: Callable[[GuestCapture], None]) -> None:
        self.is_open = False
        self.settings = settings
        self._guest = guest
        self._on_failed = on_failed
        self._error: FarplugError | None = None
        self._recording = Recording(settings.path, settings.bytes, on_failed=self._failed)
        self._ports: list[GuestPort] = []
        self._unsubscribe: Callable[[], None] | None = None

    @property
    def wire(self) -> Wire | None:
        """Return what taps new connections; None: nothing does."""
        return self._recording if self.is_open and self._recording.has_wire else None

    async def open(self) -> None:
        """Open the file, and begin to capture events.

        Raises:
            UsageError: the file cannot be used.
        """
        await self._recording.open(self._waiting)
        self.is_open = True
        self._guest.captures.path = self.settings.path
        self._guest.publish(
            "capture-started",
            f"capturing to {self._name}: {CONTENTS}",
            level=Level.DETAIL,
            path=self.settings.path,
            bytes=self.settings.bytes,
        )
        self._unsubscribe = self._guest.stream.subscribe(self._event)
        if not self._recording.has_wire:
            self._guest.note("the capture has no interface wire: Wireshark cannot decode parts of messages")

    async def resume(self, attachment: Attachment) -> None:
        """Capture an attachment that may be plugged in already: begin with the state of its device."""
        if attachment.offered:
            device = attachment.device
            descriptors = await read_descriptors(device)
            if not self.is_open:
                return
            if attachment.offered and attachment.port not in self._ports:
                alternates = {interface.number: interface.alternate for interface in device.interfaces}
                tap = self._recording.port(attachment.port.number)
                tap.resume(device_connect(device), descriptors, device.configuration, alternates)
        self.watch(attachment)

    def watch(self, attachment: Attachment) -> None:
        """Capture the packets of an attachment's port from now on."""
        port = attachment.port
        if port not in self._ports:
            self._ports.append(port)
            port.observe(self._recording.port(port.number))

    async def close(self) -> FarplugError | None:
        """End the capture, and publish that. Return why the file could not be written; None: it is complete."""
        self.is_open = False
        if self._unsubscribe is not None:
            self._unsubscribe()
        for port in self._ports:
            port.observe(None)
        recording = self._recording
        await recording.close()
        error = self._error
        dropped, cut = sum(recording.dropped), recording.cut
        text = f"the capture to {self._name} has ended"
        if error is not None:
            text = f"{text}: {error.message}"
        elif dropped or cut:
            text = f"{text}; it was written too slowly: {dropped} packets and the data of {cut} transfers are missing"
        self._guest.captures.path = None
        self._guest.publish(
            "capture-ended",
            text,
            level=Level.BAD if error is not None or dropped or cut else Level.INFO,
            path=self.settings.path,
            dropped=dropped,
            cut=cut,
            error=None if error is None else error.as_dict(),
        )
        return error

    @property
    def _name(self) -> str:
        return "standard output" if self.settings.path == STANDARD_OUTPUT else self.settings.path

    def _waiting(self) -> None:
        self._guest.note(f"waiting for a program that reads from the pipe {self.settings.path}")

    def _event(self, event: Event) -> None:
        if event.guest != self._guest.id or event.name in _NOT_CAPTURED:
            return
        message = str(event)
        if event.name == "stage":  # its address may hold a proxy's ticket
            message = f"{event.fields['stage']}: {event.fields['state']}"
        fields = {"FARPLUG_EVENT": event.name, "FARPLUG_DEVICE": event.device}
        warning = event.level is Level.BAD
        self._recording.event(message, {name: text for name, text in fields.items() if text}, warning=warning)

    def _failed(self, error: FarplugError) -> None:
        self._error = error
        self._on_failed(self)
