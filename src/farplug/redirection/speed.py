"""Does the guest understand what it sees? A port that cannot take SuperSpeed shows only by what its driver does.

QEMU offers a SuperSpeed device to a USB 2.0 port as well, and calls it a high-speed device there. Linux then reads the
device descriptor, does not believe it (bMaxPacketSize0 is 9), resets the port and tries again; it never goes on to read
the configuration. A guest that understands goes on after the first or second reset.
"""

from __future__ import annotations

from farplug.usb.device import Device
from farplug.usb.types import DescriptorType, Request, RequestType, Setup, Speed

FALLBACK_RESETS = 3
"""Port resets in a row, each after a look at the device descriptor and at nothing else, that mean: not understood."""


class SpeedWatch:
    """Follows what the guest does with a device that was offered at one speed."""

    def __init__(self) -> None:
        self._looked = False
        self._fruitless = 0

    def understood(self) -> None:
        """Begin afresh: offered again, or configured."""
        self._looked = False
        self._fruitless = 0

    def requested(self, setup: Setup) -> None:
        """The guest made a control request."""
        if setup.request != Request.GET_DESCRIPTOR or setup.type is not RequestType.STANDARD:
            return
        if setup.value >> 8 == DescriptorType.DEVICE:
            self._looked = True
        else:
            self.understood()

    def was_reset(self) -> bool:
        """The guest reset the port; whether a lower speed should be tried."""
        if self._looked:
            self._looked = False
            self._fruitless += 1
        return self._fruitless >= FALLBACK_RESETS


def lower_speed(device: Device) -> Speed | None:
    """The next lower speed that a device can run at."""
    current = device.identity.speed
    return next((speed for speed in device.speeds if speed < current), None)
