"""At which speed a device is offered: the best that the guest can take, found by trying.

A port that cannot take SuperSpeed shows only by what its driver does. QEMU offers a SuperSpeed device to a USB 2.0 port
as well, and calls it a high-speed device there. Linux then reads the device descriptor, does not believe it
(bMaxPacketSize0 is 9), resets the port and tries again; it never goes on to read the configuration. A guest that
understands goes on after the first or second reset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from farplug.errors import DeviceError, Reason
from farplug.redirection.acceptance import no_streams
from farplug.redirection.events import FellBack
from farplug.usb.device import Device
from farplug.usb.types import DescriptorType, Request, RequestType, Setup, Speed

FRUITLESS_RESETS = 2
"""Port resets, each after a look at the device descriptor and at nothing else, after which the guest is suspected not
to understand. If it does, it goes on at once after its next look."""
PATIENCE = 0.05
"""Seconds that a suspected guest has to go on. The device leaves between two tries then: to take it away in the middle
of one makes Linux wait 10 s for an answer to its SET_ADDRESS."""


class SpeedWatch:
    """Follows what the guest does with a device that was offered at one speed.

    Args:
        on_misunderstood: called, once for each offer at most, when the guest does not understand what it sees.
    """

    def __init__(self, on_misunderstood: Callable[[], None]) -> None:
        self._on_misunderstood = on_misunderstood
        self._looked = False
        self._fruitless = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The device is offered, or its configuration was read or chosen: nothing is suspicious."""
        self._looked = False
        self._fruitless = 0
        self._stop()

    def requested(self, setup: Setup) -> None:
        """The guest made a control request."""
        if setup.request != Request.GET_DESCRIPTOR or setup.type is not RequestType.STANDARD:
            return
        if setup.value >> 8 != DescriptorType.DEVICE:
            self.begin()
            return
        self._looked = True
        self._stop()
        if self._fruitless >= FRUITLESS_RESETS:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._on_misunderstood)

    def was_reset(self) -> None:
        """The guest reset the port."""
        self._stop()
        if self._looked:
            self._looked = False
            self._fruitless += 1

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class SpeedChoice:
    """Chooses the speed for each offer.

    Args:
        port: its name, for events.
        emit: told when a device falls back.
        offer_at: takes a device from the guest and offers it again at a lower speed.
        failed: called when that cannot be done, with the error, and with what it was.
    """

    def __init__(
        self,
        port: str,
        emit: Callable[[FellBack], None],
        offer_at: Callable[[Device, Speed], Awaitable[None]],
        failed: Callable[[Exception, DeviceError], None],
    ) -> None:
        self._port = port
        self._emit = emit
        self._offer_at = offer_at
        self._failed = failed
        self._task: asyncio.Task[None] | None = None

    def first(self, device: Device, *, streams: bool) -> None:
        """Select the best speed that a guest with or without bulk ``streams`` can take; a port before this one may have
        taken less.

        Raises:
            RefusedError: the device has streams at every speed (``CAPABILITY``).
        """
        device.select_speed(device.speeds[0])
        while not streams and device.has_streams:
            # A guest's driver would find them in the descriptors, and give up on the device when it gets none.
            lower = _lower(device)
            if lower is None:
                raise no_streams(device.identity)
            self._emit(FellBack(self._port, device.identity.speed, lower, needs_streams=True))
            device.select_speed(lower)

    def fall_back(self, device: Device) -> bool:
        """The guest does not take a device at this speed: have it offered at the next lower one. False: it has none."""
        lower = _lower(device)
        if lower is None:
            return False
        if self._task is None:
            self._emit(FellBack(self._port, device.identity.speed, lower))
            self._task = asyncio.get_running_loop().create_task(self._fall_back(device, lower))
        return True

    async def finished(self) -> None:
        """Wait until no device is falling back."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _fall_back(self, device: Device, speed: Speed) -> None:
        try:
            await self._offer_at(device, speed)
        except Exception as error:
            message = f"the device cannot run at {speed} speed: {error}"
            self._failed(error, DeviceError(message, reason=Reason.DEVICE_FAULT))
        finally:
            self._task = None


def _lower(device: Device) -> Speed | None:
    """The next lower speed that a device can run at."""
    current = device.identity.speed
    return next((speed for speed in device.speeds if speed < current), None)
