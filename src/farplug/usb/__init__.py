"""USB types, and the interface of all devices: :class:`Transfer` and :class:`Device`. No I/O."""

from farplug.usb.device import Device, DeviceEvent, DeviceListener, Identity, Offer, Reception
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, Direction, Endpoint, Interface, Recipient, RequestType, Setup, Speed, TransferType

__all__ = [
    "Buffer",
    "Device",
    "DeviceEvent",
    "DeviceListener",
    "Direction",
    "Endpoint",
    "Identity",
    "Interface",
    "Offer",
    "Reception",
    "Recipient",
    "RequestType",
    "Setup",
    "Speed",
    "Status",
    "Transfer",
    "TransferType",
]
