"""The engine: connects one device to one port, as the usb-host side of usbredir."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.redirection.engine import Redirection, State

__all__ = ["Redirection", "State"]

lazy_import(globals(), {"Redirection": ".engine", "State": ".engine"})
