"""Real USB devices of this machine, through libusb."""

from farplug.libusb.library import Library
from farplug.physical.device import PhysicalDevice, find_device, physical_device

__all__ = ["Library", "PhysicalDevice", "find_device", "physical_device"]
