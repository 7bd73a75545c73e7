"""USB devices that are plugged in and unplugged while farplug runs.

A message of the kernel (uevent) only triggers a look at sysfs, which happens every second anyway. So this works without
permission, and in containers, which get no messages. Source: Documentation of the kernel's ``NETLINK_KOBJECT_UEVENT``;
libudev's monitor reads the same socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, Self, TypeAlias

from farplug.errors import Reason, SetupError
from farplug.machine.device_info import DeviceInfo
from farplug.machine.listing import DEVICE_NAME, DEVICES, list_devices
from farplug.machine.sysfs import bus_and_address, list_folder, on_windows
from farplug.threads import run_in_daemon_thread

INTERVAL: Final = 1.0
"""Seconds between two looks at sysfs when the kernel sends no message."""
PAUSE: Final = 0.05
"""Seconds between two looks at sysfs while a new device is being set up."""
SETUP_TIMEOUT: Final = 5.0
"""Seconds in which udev has to give permission, and the kernel to find out what a device is."""

HID: Final = 3
BOOT_PROTOCOLS: Final = ((1, 1), (1, 2))
"""bInterfaceSubClass and bInterfaceProtocol of keyboards and mice (HID 1.11, section 4.3)."""

_NETLINK_KOBJECT_UEVENT: Final = 15
_KERNEL_GROUP: Final = 1
_MAX_UEVENT: Final = 1 << 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A device was plugged in or changed its identity; or there is permission to use it, and was none before."""

    device: DeviceInfo


@dataclass(frozen=True, slots=True)
class Departed:
    """A device was unplugged. ``device`` describes it as it was last seen."""

    device: DeviceInfo


Change: TypeAlias = Arrived | Departed


@dataclass(slots=True)
class _Newcomer:
    """A new device that is not reported yet, or was reported while there was no permission to use it.

    Attributes:
        deadline: when the device is reported even if it is not usable (monotonic time).
        ready: the device was usable at the last look.
        reported: the device was reported.
    """

    deadline: float
    ready: bool = False
    reported: bool = False


class Watch:
    """Reports which devices are plugged in and unplugged, from ``async with`` on.

    A device is reported once it can be used: udev gives permission a little later than the kernel lists the device, and
    the kernel needs a moment to find out that it is a keyboard. A device that does not become usable is reported after
    :data:`SETUP_TIMEOUT`, with its obstacles; and again when there is permission.

    Args:
        root: where /sys and /dev are.

    Attributes:
        present: the devices that are plugged in, without those that are not reported yet.

    Raises:
        SetupError: the kernel has no USB here.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.present: list[DeviceInfo] = []
        self._socket: socket.socket | None = None
        self._uevent = asyncio.Event()
        self._newcomers: dict[tuple[int, int], _Newcomer] = {}
        self._ports: dict[tuple[int, int], tuple[str, int]] = {}
        """As :func:`_ports` returned them last."""
        self._failed = False
        """The last look at sysfs failed, which was logged."""

    async def __aenter__(self) -> Self:
        self._listen()
        try:
            self._ports = await run_in_daemon_thread(partial(_ports, self.root))
            devices = await run_in_daemon_thread(partial(list_devices, self.root))
            self.present = [device for device in devices if device.key in self._ports]
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
        if sys.platform != "linux":
            return
        try:
            uevents = socket.socket(
                socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
            )
        except OSError as error:
            log.debug("cannot receive the kernel's uevents: %s", error)
            return
        try:
            uevents.bind((0, _KERNEL_GROUP))
            asyncio.get_running_loop().add_reader(uevents, self._receive_uevent, uevents)
        except OSError as error:
            log.debug("cannot receive the kernel's uevents: %s", error)
            uevents.close()
        else:
            self._socket = uevents

    def _receive_uevent(self, uevents: socket.socket) -> None:
        try:
            message = uevents.recv(_MAX_UEVENT)
        except OSError:  # messages were lost: the socket's buffer was full
            message = b"SUBSYSTEM=usb"
        if b"SUBSYSTEM=usb" in message:
            self._uevent.set()

    async def __aiter__(self) -> AsyncIterator[Change]:
        """Yield every change from now on, without end."""
        while True:
            try:
                settling = any(not newcomer.reported for newcomer in self._newcomers.values())
                await asyncio.wait_for(self._uevent.wait(), PAUSE if settling else INTERVAL)
                await asyncio.sleep(PAUSE)  # messages come in bursts
            except TimeoutError:
                pass
            self._uevent.clear()
            for change in await self._poll():
                yield change

    async def _poll(self) -> list[Change]:
        """Look at sysfs, update :attr:`present`, and return the changes."""
        try:
            before, ports = self._ports, await run_in_daemon_thread(partial(_ports, self.root))
        except SetupError as error:  # too many open files: nothing is known, so nothing has changed
            if not self._failed:
                log.warning("%s", error)
            self._failed = True
            return []
        self._failed = False
        self._ports = ports
        same = {key for key, port in ports.items() if before.get(key) == port}
        changes: list[Change] = [Departed(device) for device in self.present if device.key not in same]
        self.present = [device for device in self.present if device.key in same]
        self._newcomers = {key: newcomer for key, newcomer in self._newcomers.items() if key in same}
        for key in ports.keys() - {device.key for device in self.present} - self._newcomers.keys():
            self._newcomers[key] = _Newcomer(monotonic() + SETUP_TIMEOUT)
        for device in await self._settled([ports[key][0] for key in self._newcomers]):
            self.present = [*(one for one in self.present if one.key != device.key), device]
            changes.append(Arrived(device))
        return changes

    async def _settled(self, ports: Sequence[str]) -> Sequence[DeviceInfo]:
        """Return the new devices to report now. Only their attributes are read: another device may hang."""
        if not ports:
            return ()
        try:
            devices = await run_in_daemon_thread(partial(list_devices, self.root, ports))
        except SetupError:  # usbcore was unloaded, or too many files are open
            return ()
        settled: list[DeviceInfo] = []
        for device in devices:
            newcomer = self._newcomers.get(device.key)
            if newcomer is None:
                continue
            was_ready, newcomer.ready = newcomer.ready, _is_ready(device)
            late = monotonic() >= newcomer.deadline
            if (was_ready and newcomer.ready) or (late and (_is_permitted(device) or not newcomer.reported)):
                settled.append(device)
                newcomer.reported = True
                if _is_permitted(device):
                    del self._newcomers[device.key]
        return settled


def _ports(root: Path) -> dict[tuple[int, int], tuple[str, int]]:
    """Return the port and the inode of the folder in sysfs of each device, by bus and address.

    Reading these does not wait for a device. A device that was unplugged and plugged in again has another inode, even
    at the same address.
    """
    if on_windows():
        from farplug.machine import windows

        return windows.ports()
    ports: dict[tuple[int, int], tuple[str, int]] = {}
    for folder in list_folder(root / DEVICES):
        if DEVICE_NAME.fullmatch(folder.name):
            key = bus_and_address(folder)
            with suppress(OSError):  # the device was just unplugged
                if key is not None:
                    ports[key] = folder.name, folder.stat().st_ino
    return ports


def _is_permitted(device: DeviceInfo) -> bool:
    """Return whether the device could be opened when it was listed."""
    return not any(obstacle.reason in (Reason.NO_PERMISSION, Reason.NO_USB) for obstacle in device.obstacles)


def _is_ready(device: DeviceInfo) -> bool:
    """Return whether udev and the kernel seem to have set the device up."""
    unknown = any(
        interface.codes[0] == HID
        and (not interface.driver or (interface.codes[1:] in BOOT_PROTOCOLS and device.in_use_as is None))
        for interface in device.interfaces
    )
    return _is_permitted(device) and bool(device.interfaces) and not unknown
