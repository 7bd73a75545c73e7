"""USB devices of other machines, over USB/IP."""

from farplug.remote.device import RemoteDevice, parse_remote

__all__ = ["RemoteDevice", "parse_remote"]
