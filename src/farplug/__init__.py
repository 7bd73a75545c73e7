"""farplug plugs USB devices into virtual machines from afar.

A *device* (real, or made of software) is plugged into a *port* of a *guest*: one usbredir byte stream, carried by a
SPICE usbredir channel or by a plain TCP or UNIX socket. See ARCHITECTURE.md for the words and the floors.
"""

from farplug.version import __version__

__all__ = ["__version__"]
