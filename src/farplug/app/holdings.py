"""What a guest holds for the devices that it made or chose itself: open sources, and locks of USB devices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from farplug.app.attachment import Attachment, Description, Origin
from farplug.app.kinds import Medium
from farplug.app.sources import OpenSource, Sources, wait_for_all
from farplug.usb.device import Device
from farplug.virtual.device import VirtualDevice

if TYPE_CHECKING:
    from farplug.machine.lock import DeviceLock

log = logging.getLogger(__name__)


class Holdings:
    """The sources and locks behind devices. Each is closed once, by whichever caller releases its device first.

    Args:
        sources: knows the sources that are open, and their labels.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._groups: dict[Device, Sequence[OpenSource]] = {}
        self._locks: dict[Device, DeviceLock] = {}
        self._releasing: dict[Device, asyncio.Task[None]] = {}

    def hold(self, device: Device, group: Sequence[OpenSource]) -> None:
        """Keep the sources of a device that was made of them, until it is released."""
        self._groups[device] = group

    def hold_lock(self, device: Device, lock: DeviceLock) -> None:
        """Keep the lock of a USB device of this machine, until it is released."""
        self._locks[device] = lock

    def __contains__(self, device: Device) -> bool:
        return device in self._groups or device in self._locks

    @property
    def has_locks(self) -> bool:
        """Return whether USB devices of this machine are locked."""
        return bool(self._locks)

    def describe(self, device: Device) -> Description:
        """Return what a device that was made of sources is for people."""
        group = self._groups[device]
        units = [one.label for one in group]
        return Description(
            ", ".join(units),
            [one.title for one in group],
            units,
            [one.content.detail for one in group],
            [one.source.name for one in group],
            [Origin(str(one.source.kind), one.is_snapshot) for one in group],
        )

    def media(self, attachment: Attachment) -> int:
        """Return how many of the parts of an attachment are images; all of them, if a caller made the device."""
        group = self._groups.get(attachment.device)
        return len(attachment.titles) if group is None else sum(isinstance(one.content, Medium) for one in group)

    def sources(self) -> Iterator[OpenSource]:
        """Iterate over the sources of all devices."""
        return (one for group in self._groups.values() for one in group)

    def units(self) -> Iterator[tuple[str, Any]]:
        """Iterate over the labels and the logical units of all sources that have one."""
        return ((one.label, one.unit) for one in self.sources() if one.unit is not None)

    # Releasing ----------------------------------------------------------------------------------------------------

    def start_release(self, device: Device) -> None:
        """Begin to close what is held for a device. Errors are logged, unless :meth:`release` raises them."""
        group, lock = self._groups.pop(device, ()), self._locks.pop(device, None)
        task = self._releasing[device] = asyncio.ensure_future(self._close(device, group, lock))

        def released(task: asyncio.Task[None]) -> None:
            del self._releasing[device]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("what was opened for %s cannot be closed", device.identity, exc_info=error)

        task.add_done_callback(released)

    async def release(self, device: Device) -> None:
        """Close what is held for a device: images, or a lock. Wait for a release that has begun.

        Raises:
            DeviceError: written data could not be made durable.
        """
        if device in self:
            self.start_release(device)
        if device in self._releasing:
            await asyncio.shield(self._releasing[device])

    async def settle(self) -> None:
        """Wait until each release that has begun is over, whatever it raises."""
        await asyncio.gather(*map(asyncio.shield, self._releasing.values()), return_exceptions=True)

    async def close_sources(self, opened: Sequence[OpenSource]) -> None:
        """Close sources that no device is made of."""
        for one in opened:
            self._sources.release(one)
        await wait_for_all(one.close() for one in opened)

    async def close_images(self) -> None:
        """Release the devices that are made of sources, then all other sources.

        Raises:
            DeviceError: written data of a device could not be made durable (the first one that failed).
        """
        devices = {*self._groups, *self._releasing}
        await wait_for_all([*(self.release(device) for device in devices), self._sources.close()])

    async def release_locks(self) -> None:
        """Release the USB devices of this machine."""
        await wait_for_all(self.release(device) for device in list(self._locks))

    async def _close(self, device: Device, group: Sequence[OpenSource], lock: DeviceLock | None) -> None:
        async with AsyncExitStack() as steps:  # from the last one to the first one, each in any case
            if lock is not None:
                steps.push_async_callback(asyncio.to_thread, lock.release)
            for opened in group:
                steps.callback(self._sources.release, opened)
                steps.push_async_callback(opened.close)
            if isinstance(device, VirtualDevice):
                steps.push_async_callback(device.dispose)
