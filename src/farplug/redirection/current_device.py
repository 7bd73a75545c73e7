"""The device that the guest uses: the one owner of this fact for all parts of the engine."""

from __future__ import annotations

from collections.abc import Mapping

from farplug.usb.device import Device
from farplug.usb.types import Endpoint


class CurrentDevice:
    """The device that the guest uses now.

    Attributes:
        device: the device that gets the guest's transfers; None while no device is offered.
        usable: the same device until :meth:`retire`: then the guest can still request transfers, but nothing else.
        endpoints: the endpoints that the guest was sent last (ep_info), by address.
        touched: whether the guest has used the device since the device was offered or reset.
    """

    __slots__ = ("device", "endpoints", "touched", "usable")

    def __init__(self) -> None:
        self.device: Device | None = None
        self.usable: Device | None = None
        self.endpoints: Mapping[int, Endpoint] = {}
        self.touched = False

    def offer(self, device: Device) -> None:
        """Set the device that the guest uses from now on."""
        self.device = self.usable = device
        self.touched = False

    def retire(self) -> None:
        """Begin to detach the device."""
        self.usable = None

    def clear(self) -> None:
        """Forget the device: the guest has none."""
        self.device = self.usable = None
