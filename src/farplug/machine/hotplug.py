"""USB devices that come and go.

The kernel's messages (uevents) only say when to look: sysfs is looked at after each of them, and every second besides.
So it works without permission, and in containers, which get no messages. Source: Documentation of the kernel's
``NETLINK_KOBJECT_UEVENT``; libudev's monitor reads the same socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, Self, TypeAlias

from farplug.errors import Reason, SetupError
from farplug.machine.device_info import Found
from farplug.machine.listing import DEVICE_NAME, DEVICES, list_devices
from farplug.machine.sysfs import bus_and_address, listed, on_windows
from farplug.threads import aside

INTERVAL: Final = 1.0
"""Seconds between two looks when nothing is heard from the kernel."""
PAUSE: Final = 0.05
"""Seconds between two looks while a device that has just come is being set up."""
PATIENCE: Final = 1.0
"""Seconds that udev has to give permission, and the kernel to find out what a device is."""

HID: Final = 3
BOOT_PROTOCOLS: Final = ((1, 1), (1, 2))
"""bInterfaceSubClass and bInterfaceProtocol of keyboards and mice (HID 1.11, section 4.3)."""

_NETLINK_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1
_MAX_UEVENT: Final = 1 << 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A device was plugged in, or came back as another one; or there is permission now, and was none."""

    found: Found


@dataclass(frozen=True, slots=True)
class Departed:
    """A device is gone. It is told as it was last seen."""

    found: Found


Change: TypeAlias = Arrived | Departed


@dataclass(slots=True)
class _Newcomer:
    """A device that came, and is not told yet; or was told before there was permission.

    Attributes:
        deadline: when it is told as it is.
        ready: it was usable when last looked at.
        told: it was told as it was then.
    """

    deadline: float
    ready: bool = False
    told: bool = False


@dataclass(slots=True)
class Watch:
    """Tells which devices come and go, from ``async with`` on; ``present`` are those that were there then.

    A device that comes is told once it can be used: udev gives permission a little later than the kernel shows it, and
    the kernel needs a moment to find out that it is a keyboard. One that does not become usable is told after
    :data:`PATIENCE`, with its obstacles; and again when there is permission.

    Args:
        root: where /sys and /dev are.

    Raises:
        SetupError: the kernel has no USB here.
    """

    root: Path = Path("/")
    present: list[Found] = field(default_factory=list)
    _socket: socket.socket | None = None
    _heard: asyncio.Event = field(default_factory=asyncio.Event)
    _newcomers: dict[tuple[int, int], _Newcomer] = field(default_factory=dict)
    _places: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    """Those of the last look."""
    _blind: bool = False
    """The last look failed, and that was told."""

    async def __aenter__(self) -> Self:
        self._listen()
        try:
            self._places = await aside(partial(_places, self.root))
            devices = await aside(partial(list_devices, self.root))
            self.present = [found for found in devices if found.key in self._places]
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _listen(self) -> None:
        try:
            uevents = socket.socket(
                socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
            )
        except (OSError, AttributeError) as error:
            log.debug("the kernel's messages cannot be heard: %s", error)
            return
        try:
            uevents.bind((0, _KERNEL_GROUP))
            asyncio.get_running_loop().add_reader(uevents, self._hear, uevents)
        except OSError as error:
            log.debug("the kernel's messages cannot be heard: %s", error)
            uevents.close()
        else:
            self._socket = uevents

    def _hear(self, uevents: socket.socket) -> None:
        try:
            message = uevents.recv(_MAX_UEVENT)
        except OSError:  # there were more than the socket holds
            message = b"SUBSYSTEM=usb"
        if b"SUBSYSTEM=usb" in message:
            self._heard.set()

    async def __aiter__(self) -> AsyncIterator[Change]:
        """Every change from now on; it never ends by itself."""
        while True:
            try:
                settling = any(not newcomer.told for newcomer in self._newcomers.values())
                await asyncio.wait_for(self._heard.wait(), PAUSE if settling else INTERVAL)
                await asyncio.sleep(PAUSE)  # messages come in bursts
            except TimeoutError:
                pass
            self._heard.clear()
            for change in await self._look():
                yield change

    async def _look(self) -> list[Change]:
        """Look once; :attr:`present` is right afterwards."""
        try:
            before, places = self._places, await aside(partial(_places, self.root))
        except SetupError as error:  # too many open files: what is there now cannot be known
            if not self._blind:
                log.warning("%s", error)
            self._blind = True
            return []
        self._blind = False
        self._places = places
        same = {key for key, place in places.items() if before.get(key) == place}
        changes: list[Change] = [Departed(found) for found in self.present if found.key not in same]
        self.present = [found for found in self.present if found.key in same]
        self._newcomers = {key: newcomer for key, newcomer in self._newcomers.items() if key in same}
        for key in places.keys() - {found.key for found in self.present} - self._newcomers.keys():
            self._newcomers[key] = _Newcomer(monotonic() + PATIENCE)
        for found in await self._settled([places[key][0] for key in self._newcomers]):
            self.present = [*(one for one in self.present if one.key != found.key), found]
            changes.append(Arrived(found))
        return changes

    async def _settled(self, ports: Sequence[str]) -> Sequence[Found]:
        """The newcomers that are to be told now. Only they are looked at: another device may hang."""
        if not ports:
            return ()
        try:
            devices = await aside(partial(list_devices, self.root, ports))
        except SetupError:  # the kernel's USB was unloaded, or too many files are open
            return ()
        settled: list[Found] = []
        for found in devices:
            newcomer = self._newcomers.get(found.key)
            if newcomer is None:
                continue
            was_ready, newcomer.ready = newcomer.ready, _is_ready(found)
            late = monotonic() >= newcomer.deadline
            if (was_ready and newcomer.ready) or (late and (_is_permitted(found) or not newcomer.told)):
                settled.append(found)
                newcomer.told = True
                if _is_permitted(found):
                    del self._newcomers[found.key]
        return settled


def _places(root: Path) -> dict[tuple[int, int], tuple[str, int]]:
    """By bus and address of all devices their ports, and the numbers of their folders: what waits for no device.

    A device that was plugged in anew has another folder, even if it is at the same address.
    """
    if on_windows():
        from farplug.machine import windows

        return windows.places()
    places: dict[tuple[int, int], tuple[str, int]] = {}
    for folder in listed(root / DEVICES):
        if DEVICE_NAME.fullmatch(folder.name):
            key = bus_and_address(folder)
            with suppress(OSError):  # it has just left
                if key is not None:
                    places[key] = folder.name, folder.stat().st_ino
    return places


def _is_permitted(found: Found) -> bool:
    """Whether it could be opened when it was looked at: what came later is not in its obstacles."""
    return not any(obstacle.reason in (Reason.NO_PERMISSION, Reason.NO_USB) for obstacle in found.obstacles)


def _is_ready(found: Found) -> bool:
    """Whether udev and the kernel seem to be done with it."""
    unknown = any(
        interface.codes[0] == HID
        and (not interface.driver or (interface.codes[1:] in BOOT_PROTOCOLS and found.caution is None))
        for interface in found.interfaces
    )
    return _is_permitted(found) and bool(found.interfaces) and not unknown
