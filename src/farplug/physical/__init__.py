"""Real USB devices of this machine, through libusb."""

from farplug.physical.device import PhysicalDevice, find_device, physical_device
from farplug.physical.library import Library

__all__ = ["Library", "PhysicalDevice", "find_device", "physical_device"]
