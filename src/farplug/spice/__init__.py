"""The client side of SPICE, sans-IO: links, channels, SpiceVMC and ``.vv`` files.

Sources: spice-protocol 0.14.3 (headers), ``spice.proto`` of spice-common, and libspice-server 0.15.1.
"""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.spice.channel import Channel, Message
    from farplug.spice.link import LinkClient, LinkFailure, LinkResult
    from farplug.spice.types import ChannelType, LinkError
    from farplug.spice.vmc import VmcChannel
    from farplug.spice.vv import VvFile

__all__ = [
    "Channel",
    "ChannelType",
    "LinkClient",
    "LinkError",
    "LinkFailure",
    "LinkResult",
    "Message",
    "VmcChannel",
    "VvFile",
]

lazy_import(
    globals(),
    {
        "Channel": ".channel",
        "ChannelType": ".types",
        "LinkClient": ".link",
        "LinkError": ".types",
        "LinkFailure": ".link",
        "LinkResult": ".link",
        "Message": ".channel",
        "VmcChannel": ".vmc",
        "VvFile": ".vv",
    },
)
