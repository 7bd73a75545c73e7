"""usbredir protocol 0.7, both roles, sans-IO: bytes in, packets out, and the reverse.

:class:`Connection` is one end of a connection, :mod:`~farplug.usbredir.packets` has a class for each packet type.
"""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.usbredir.caps import Cap
    from farplug.usbredir.filter import Filter
    from farplug.usbredir.protocol import Connection, Oversized, Role, Violation

__all__ = ["Cap", "Connection", "Filter", "Oversized", "Role", "Violation"]

lazy_import(
    globals(),
    {
        "Cap": ".caps",
        "Connection": ".protocol",
        "Filter": ".filter",
        "Oversized": ".protocol",
        "Role": ".protocol",
        "Violation": ".protocol",
    },
)
