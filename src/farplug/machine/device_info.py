"""A USB device of this machine as it was listed: what it is, and what prevents plugging it in.

Nothing here is open: a device may have been unplugged since it was listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from farplug.errors import DeviceError, Reason, Remedy
from farplug.usb.classes import HUB, class_name
from farplug.usb.types import Speed
from farplug.usbredir.filter import Filter, FilterResult

SEE_INTERFACES: Final = (0x00, 0xEF)
"""Device classes of devices whose interfaces have the class (USB Interface Descriptors, Miscellaneous)."""


_NO_REMEDY: Final = Remedy()


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a device cannot be plugged in.

    Attributes:
        reason: for programs.
        message: for people, without the device's name.
        remedy: what the user can do.
        forceable: plugging the device in is possible, but dangerous: the setting ``force`` overrides the obstacle.
    """

    reason: Reason
    message: str
    remedy: Remedy = _NO_REMEDY
    forceable: bool = False

    def __str__(self) -> str:
        return self.message

    def to_json(self) -> dict[str, Any]:
        """Return the obstacle as JSON's types."""
        return {
            "reason": str(self.reason),
            "message": self.message,
            **self.remedy.as_dict(),
            "forceable": self.forceable,
        }

    def error(self, device: object) -> DeviceError:
        """Return the obstacle as an error about a device."""
        return DeviceError(f"{device} cannot be plugged in: {self.message}", reason=self.reason, remedy=self.remedy)


@dataclass(frozen=True, slots=True)
class InterfaceInfo:
    """One interface, in its current alternate setting.

    Attributes:
        number: bInterfaceNumber.
        codes: bInterfaceClass, bInterfaceSubClass, bInterfaceProtocol.
        driver: the kernel driver that is bound to the interface; ``usbfs`` if a program claimed it; empty: none.
    """

    number: int
    codes: tuple[int, int, int]
    driver: str = ""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A USB device of this machine.

    Attributes:
        bus: bus number, 1 and up.
        address: address on the bus; each time the device is plugged in, it gets a new one.
        port: path of the port: ``2-1.3`` is port 3 of the hub in port 1 of bus 2; ``usb2`` for the root hub of bus 2.
        peer_port: path of the port that the same socket has at its other speeds (USB 2 or SuperSpeed); empty: unknown.
        speed: the current speed; None if the kernel does not know it yet.
        vendor_id: idVendor.
        product_id: idProduct.
        device_version: bcdDevice.
        codes: bDeviceClass, bDeviceSubClass, bDeviceProtocol.
        manufacturer: the device's own string, else the vendor's name in usb.ids.
        product: the device's own string, else the product's name in usb.ids.
        serial_number: the device's own string; empty if it has none.
        configuration: bConfigurationValue of the current configuration; 0: none.
        interfaces: of the current configuration; of the first one if there is no current one.
        node: the device's file: ``/dev/bus/usb/002/005``.
        path: the device's folder in sysfs.
        obstacles: why the device cannot be plugged in, the worst first.
        in_use_as: keyboard, mouse or network of this machine, which the device is in use as; None if it is none.
        warnings: errors in the device's descriptors.
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
    interfaces: tuple[InterfaceInfo, ...] = ()
    peer_port: str = ""
    node: Path = Path()
    path: Path = Path()
    obstacles: tuple[Obstacle, ...] = ()
    in_use_as: Obstacle | None = None
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Return idVendor and idProduct as lsusb writes them: ``1050:0407``."""
        return f"{self.vendor_id:04x}:{self.product_id:04x}"

    @property
    def name(self) -> str:
        """Return manufacturer and product; empty if neither is known."""
        if self.product.lower().startswith(self.manufacturer.lower()):
            return self.product
        return f"{self.manufacturer} {self.product}".strip()

    @property
    def obstacle(self) -> Obstacle | None:
        """Return the worst obstacle."""
        return self.obstacles[0] if self.obstacles else None

    @property
    def is_hub(self) -> bool:
        """Return whether the device is a USB hub: by its class or by that of an interface, as Linux decides."""
        return HUB in (self.codes[0], *(interface.codes[0] for interface in self.interfaces))

    @property
    def key(self) -> tuple[int, int]:
        """Return bus and address, which identify the device as long as it stays plugged in."""
        return self.bus, self.address

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the device's classes, each once."""
        codes = [self.codes[0]] if self.codes[0] not in SEE_INTERFACES else [i.codes[0] for i in self.interfaces]
        return tuple(dict.fromkeys(map(class_name, codes)))

    def to_json(self) -> dict[str, Any]:
        """Return the device as JSON's types. IDs are text, as lsusb writes them."""
        return {
            "bus": self.bus,
            "address": self.address,
            "port": self.port,
            "vendor_id": f"{self.vendor_id:04x}",
            "product_id": f"{self.product_id:04x}",
            "device_version": f"{self.device_version:04x}",
            "manufacturer": self.manufacturer,
            "product": self.product,
            "serial_number": self.serial_number,
            "speed": None if self.speed is None else str(self.speed),
            "class": list(self.codes),
            "classes": list(self.classes),
            "configuration": self.configuration,
            "interfaces": [
                {"number": one.number, "class": list(one.codes), "driver": one.driver or None}
                for one in self.interfaces
            ],
            "node": str(self.node),
            "can_be_plugged": self.obstacle is None,
            "obstacles": [obstacle.to_json() for obstacle in self.obstacles],
            "caution": None if self.in_use_as is None else self.in_use_as.to_json(),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        return f"{self.id}{' ' if self.name else ''}{self.name} (port {self.port})"

    def judge(self, rules: Filter) -> FilterResult:
        """Return whether a filter allows the device, with the rule that decided.

        A device whose interfaces are not known is judged as one with an interface of class 00: without interfaces,
        usbredir's rules would allow it whatever they are.
        """
        return rules.check(
            device_class=self.codes[0],
            vendor_id=self.vendor_id,
            product_id=self.product_id,
            device_version=self.device_version,
            interfaces=[interface.codes for interface in self.interfaces] or [(0, 0, 0)],
        )

    def filtered(self, rules: Filter) -> Obstacle | None:
        """Return the obstacle that this machine's filter is; None if the filter allows the device."""
        judgement = self.judge(rules)
        if judgement.allowed:
            return None
        return Obstacle(
            Reason.FILTERED,
            f"the filter of this machine does not allow it: {judgement}",
            Remedy(
                "the first rule that matches decides, and a device that no rule matches is denied; change the rules",
                setting="rules.filter",
            ),
        )

    def check(self, *, force: bool = False) -> None:
        """Check that the device can be plugged in.

        Args:
            force: ignore obstacles that are :attr:`~Obstacle.forceable`.

        Raises:
            DeviceError: it cannot be plugged in; the reason is the obstacle's.
        """
        for obstacle in self.obstacles:
            if not (force and obstacle.forceable):
                raise obstacle.error(self)
