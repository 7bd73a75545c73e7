"""What is at the other end on this machine: terminals, sockets and files for a serial line; passt, sockets that carry
frames, and TAP interfaces for a network adapter.
"""

from farplug.ends.address import NETWORK_ENDS, SERIAL_ENDS, parse_network_end, parse_serial_end
from farplug.ends.base import End, Peer

__all__ = ["NETWORK_ENDS", "SERIAL_ENDS", "End", "Peer", "parse_network_end", "parse_serial_end"]
