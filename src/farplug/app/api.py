"""The short form of the library: ``farplug.connect`` and what can be plugged."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any

from farplug.app.guest import Guest
from farplug.app.link import AskPassword
from farplug.app.settings import CaptureSettings, GuestSettings, Source, TargetSettings


class Connecting:
    """A VM that is being connected to: await it, or use it with ``async with``. Made by :func:`connect`."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def __await__(self) -> Generator[Any, None, Guest]:
        return self._connect().__await__()

    async def __aenter__(self) -> Guest:
        return await self._connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._guest.close()

    async def _connect(self) -> Guest:
        try:
            await self._guest.connect()
        except BaseException:
            await self._guest.close()
            raise
        return self._guest


def connect(
    target: str,
    *,
    password: str | None = None,
    ca_file: str | Path | None = None,
    host_subject: str | None = None,
    proxy: str | None = None,
    allow_plain: bool = False,
    capture: str | Path | CaptureSettings | None = None,
    ask_password: AskPassword | None = None,
) -> Connecting:
    """Connect to a VM.

    ::

        async with farplug.connect("vm.vv") as guest, guest.plug(farplug.disk("a.raw")) as attachment:
            await attachment.configured()

    Args:
        target: ``spice://host:port``, a ``.vv`` file, ``tcp://host:port`` and so on: see :mod:`farplug.target`.
        password: the SPICE password; None: that of the target.
        ca_file: certificates to trust, PEM.
        host_subject: the certificate's subject, checked instead of the host name.
        proxy: URL of an HTTP proxy.
        allow_plain: use the plain port where the server has no TLS, although there is a CA or a host subject.
        capture: a pcapng file for Wireshark: it will hold everything that the VM reads from and writes to the devices.
        ask_password: asks a user for a password when the server wants another one.

    Returns:
        What can be awaited, for a :class:`Guest`, or used with ``async with``, which closes the guest at the end.

    Raises:
        UsageError: the target or an argument is not valid, or the capture cannot be written.
        TargetError: the VM cannot be reached; the reason says at which stage.
    """
    settings = TargetSettings(
        target,
        password=password,
        ca_file=None if ca_file is None else str(ca_file),
        host_subject=host_subject,
        proxy=proxy,
        allow_plain=allow_plain,
    )
    if isinstance(capture, (str, Path)):
        capture = CaptureSettings(str(capture))
    return Connecting(Guest(GuestSettings(settings, capture=capture), ask_password=ask_password))


disk = Source.disk
cdrom = Source.cdrom
folder = Source.folder
usb_device = Source.usb_device
keyboard = Source.keyboard
tablet = Source.tablet
