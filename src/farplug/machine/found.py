"""A USB device of this machine, as it was found: what it is, and why it cannot be plugged in.

Nothing here is open: a device may have left since it was listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farplug.errors import DeviceError, Reason
from farplug.usb.classes import HUB, class_name
from farplug.usb.types import Speed
from farplug.usbredir.filter import Filter, FilterResult

SEE_INTERFACES: Final = (0x00, 0xEF)
"""Device classes that say: look at the interfaces."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a device cannot be plugged in.

    Attributes:
        reason: for programs.
        message: for people, without the device's name.
        remedy: what they can do about it; may be several lines.
        forceable: it is a danger and not an impossibility: ``--force`` plugs it in nevertheless.
    """

    reason: Reason
    message: str
    remedy: str = ""
    forceable: bool = False

    def __str__(self) -> str:
        return self.message

    def error(self, device: object) -> DeviceError:
        """As an error about a device."""
        return DeviceError(f"{device} cannot be plugged in: {self.message}", reason=self.reason, remedy=self.remedy)


@dataclass(frozen=True, slots=True)
class FoundInterface:
    """One interface, in its current setting.

    Attributes:
        number: bInterfaceNumber.
        codes: bInterfaceClass, bInterfaceSubClass, bInterfaceProtocol.
        driver: the kernel's driver that is bound to it; ``usbfs`` if a program claimed it; empty if there is none.
    """

    number: int
    codes: tuple[int, int, int]
    driver: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A USB device of this machine.

    Attributes:
        bus: the number of its bus, 1 and up.
        address: its address on the bus; it changes with every plug.
        port: the path of the port that it sits in: ``2-1.3`` is port 3 of the hub in port 1 of bus 2; ``usb2`` for the
            root hub of bus 2.
        peer_port: the path of the same socket at its other speeds (USB 2 against SuperSpeed), if it is known.
        speed: at which it runs; None if the kernel does not know it yet.
        vendor_id: idVendor.
        product_id: idProduct.
        device_version: bcdDevice.
        codes: bDeviceClass, bDeviceSubClass, bDeviceProtocol.
        manufacturer: by its own string, else the vendor's name in usb.ids.
        product: likewise.
        serial_number: empty if it has none.
        configuration: bConfigurationValue of the current configuration; 0: none.
        interfaces: of the current configuration; of the first one if there is none.
        node: what is opened to use it: ``/dev/bus/usb/002/005``.
        path: its folder in sysfs.
        obstacles: why it cannot be plugged in, the worst first.
        caution: why somebody may want to keep it: it is this machine's keyboard, mouse or network.
        warnings: what in its descriptors contradicts itself, or was cut short.
    """

    bus: int
    address: int
    port: str
    vendor_id: int
    product_id: int
    speed: Speed | None = None
    device_version: int = 0
    codes: tuple[int, int, int] = (0, 0, 0)
    manufacturer: str = ""
    product: str = ""
    serial_number: str = ""
    configuration: int = 0
    interfaces: tuple[FoundInterface, ...] = ()
    peer_port: str = ""
    node: Path = Path()
    path: Path = Path()
    obstacles: tuple[Obstacle, ...] = ()
    caution: Obstacle | None = None
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """``1050:0407``."""
        return f"{self.vendor_id:04x}:{self.product_id:04x}"

    @property
    def name(self) -> str:
        """Manufacturer and product; empty if neither is known."""
        if self.product.lower().startswith(self.manufacturer.lower()):
            return self.product
        return f"{self.manufacturer} {self.product}".strip()

    @property
    def obstacle(self) -> Obstacle | None:
        """The worst of what stands against plugging it in."""
        return self.obstacles[0] if self.obstacles else None

    @property
    def is_hub(self) -> bool:
        """Whether others are plugged into it: by its class, or by that of an interface, as the kernel finds out."""
        return HUB in (self.codes[0], *(interface.codes[0] for interface in self.interfaces))

    @property
    def key(self) -> tuple[int, int]:
        """Bus and address: what tells it from all others, as long as it stays plugged."""
        return self.bus, self.address

    @property
    def classes(self) -> tuple[str, ...]:
        """What kind of device it is: the names of its classes, each once."""
        codes = [self.codes[0]] if self.codes[0] not in SEE_INTERFACES else [i.codes[0] for i in self.interfaces]
        return tuple(dict.fromkeys(map(class_name, codes)))

    def __str__(self) -> str:
        return f"{self.id}{' ' if self.name else ''}{self.name} (port {self.port})"

    def judge(self, rules: Filter) -> FilterResult:
        """What a filter says about it, with the rule that decided.

        One whose interfaces are not known is of class 00: usbredir's rules would allow it whatever they are.
        """
        return rules.check(
            device_class=self.codes[0],
            vendor_id=self.vendor_id,
            product_id=self.product_id,
            device_version=self.device_version,
            interfaces=[interface.codes for interface in self.interfaces] or [(0, 0, 0)],
        )

    def filtered(self, rules: Filter) -> Obstacle | None:
        """The obstacle that a filter of this machine's is; None if it allows the device."""
        judgement = self.judge(rules)
        if judgement.allowed:
            return None
        return Obstacle(
            Reason.FILTERED,
            f"--filter does not allow it: {judgement}",
            "change the rules: the first one that matches counts, and what no rule matches is denied",
        )

    def standing_obstacles(self, *, force: bool = False) -> Iterator[Obstacle]:
        """What prevents plugging it in; with ``force`` without the dangers."""
        return (obstacle for obstacle in self.obstacles if not (force and obstacle.forceable))

    def check(self, *, force: bool = False) -> None:
        """Check that it can be plugged in.

        Raises:
            DeviceError: it cannot; the reason is the obstacle's.
        """
        for obstacle in self.standing_obstacles(force=force):
            raise obstacle.error(self)
