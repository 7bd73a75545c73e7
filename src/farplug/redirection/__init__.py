"""The engine: connects one device to one port, as the usb-host side of usbredir."""

from farplug.redirection.engine import Redirection, State

__all__ = ["Redirection", "State"]
