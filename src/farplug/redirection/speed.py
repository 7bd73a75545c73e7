"""Does the guest understand what it sees? A port that cannot take SuperSpeed shows only by what its driver does.

QEMU offers a SuperSpeed device to a USB 2.0 port as well, and calls it a high-speed device there. Linux then reads the
device descriptor, does not believe it (bMaxPacketSize0 is 9), resets the port and tries again; it never goes on to read
the configuration. A guest that understands goes on after the first or second reset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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


def lower_speed(device: Device) -> Speed | None:
    """The next lower speed that a device can run at."""
    current = device.identity.speed
    return next((speed for speed in device.speeds if speed < current), None)
