"""Capabilities: what each side announces in its hello.

Source: usb-redirection-protocol.md, "usb_redir_hello".
"""

from __future__ import annotations

from enum import IntFlag


class Cap(IntFlag):
    """The bits of the first u32 word of capabilities. Unknown bits are kept, and have no effect.

    ``BULK_STREAMS``, ``CONNECT_DEVICE_VERSION``, ``EP_INFO_MAX_PACKET_SIZE``, ``IDS_64_BITS`` and
    ``BULK_LENGTH_32_BITS`` change the layout of packets: both sides must have them. The others permit packet types: the
    receiver must have them.
    """

    NONE = 0
    BULK_STREAMS = 1 << 0
    """Bulk streams; ep_info has max_streams. Has no effect without ``EP_INFO_MAX_PACKET_SIZE``."""
    CONNECT_DEVICE_VERSION = 1 << 1
    """device_connect has bcdDevice."""
    FILTER = 1 << 2
    """filter_reject and filter_filter."""
    DEVICE_DISCONNECT_ACK = 1 << 3
    """device_disconnect_ack."""
    EP_INFO_MAX_PACKET_SIZE = 1 << 4
    """ep_info has max_packet_size."""
    IDS_64_BITS = 1 << 5
    """Ids have 64 bits, not 32, in every packet but the hello."""
    BULK_LENGTH_32_BITS = 1 << 6
    """bulk_packet has length_high: transfers of more than 65535 bytes."""
    BULK_RECEIVING = 1 << 7
    """Buffered bulk receiving."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the known bits that are set, in lower case."""
        return tuple(name.lower() for name, bit in Cap.__members__.items() if bit and bit in self)

    def usable(self) -> Cap:
        """Return the capabilities; without ``BULK_STREAMS`` if ``EP_INFO_MAX_PACKET_SIZE`` is missing."""
        return self if self & Cap.EP_INFO_MAX_PACKET_SIZE else Cap(int(self) & ~int(Cap.BULK_STREAMS))


ALL_CAPS = Cap(0xFF)
"""Every capability of protocol 0.7."""
