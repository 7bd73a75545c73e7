"""Real USB devices of this machine, through libusb."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.libusb.library import Library
    from farplug.physical.device import PhysicalDevice, find_device, physical_device

__all__ = ["Library", "PhysicalDevice", "find_device", "physical_device"]

lazy_import(
    globals(),
    {
        "Library": "farplug.libusb.library",
        "PhysicalDevice": ".device",
        "find_device": ".device",
        "physical_device": ".device",
    },
)
