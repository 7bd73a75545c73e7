"""The device that the guest has: the one place where the engine's parts look for it."""

from __future__ import annotations

from collections.abc import Mapping

from farplug.usb.device import Device
from farplug.usb.types import Endpoint


class CurrentDevice:
    """The device that the guest has now.

    Attributes:
        device: who has the guest's transfers; None while none is offered.
        usable: the same, until it begins to leave: from then on the guest begins nothing with it but transfers.
        endpoints: those of the setting that the guest was told last, by address.
        touched: the guest did something with it since it was offered or reset.
    """

    __slots__ = ("device", "endpoints", "touched", "usable")

    def __init__(self) -> None:
        self.device: Device | None = None
        self.usable: Device | None = None
        self.endpoints: Mapping[int, Endpoint] = {}
        self.touched = False

    def offer(self, device: Device) -> None:
        """The guest has it from here on."""
        self.device = self.usable = device
        self.touched = False

    def retire(self) -> None:
        """It begins to leave."""
        self.usable = None

    def clear(self) -> None:
        """The guest has none."""
        self.device = self.usable = None
