"""Human interface devices (HID 1.11): keyboard, pointers, gamepad, media keys, and the base class of others."""

from farplug.keymap import Key
from farplug.virtual.hid.controls import Gamepad, Hat, MediaKey, MediaKeys, Touchscreen
from farplug.virtual.hid.function import HidFunction
from farplug.virtual.hid.keyboard import Keyboard, Led, ReportsLost
from farplug.virtual.hid.pointer import Button, Mouse, Tablet

__all__ = [
    "Button",
    "Gamepad",
    "Hat",
    "HidFunction",
    "Key",
    "Keyboard",
    "Led",
    "MediaKey",
    "MediaKeys",
    "Mouse",
    "ReportsLost",
    "Tablet",
    "Touchscreen",
]
