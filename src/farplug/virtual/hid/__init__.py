"""Human interface devices (HID 1.11): a keyboard, a tablet, a mouse, and the base class of others."""

from farplug.keymap import Key
from farplug.virtual.hid.function import HidFunction
from farplug.virtual.hid.keyboard import Keyboard, Led, ReportsLost
from farplug.virtual.hid.pointer import Button, Mouse, Tablet

__all__ = ["Button", "HidFunction", "Key", "Keyboard", "Led", "Mouse", "ReportsLost", "Tablet"]
