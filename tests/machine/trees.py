"""Machines with USB devices, made of files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

from farplug.usb.descriptors import (
    ConfigurationDescriptor,
    DeviceDescriptor,
    EndpointDescriptor,
    InterfaceDescriptor,
)

STORAGE = (8, 6, 0x50)
BOOT_KEYBOARD = (3, 1, 1)
BOOT_MOUSE = (3, 1, 2)
HID = (3, 0, 0)
SMART_CARD = (11, 0, 0)

KEYBOARD_KEYS = "1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe"
MOUSE_KEYS = "ff0000 0 0 0 0"


def descriptors(
    vendor: int,
    product: int,
    *interfaces: tuple[int, int, int],
    codes: tuple[int, int, int] = (0, 0, 0),
    version: int = 0x0100,
    value: int = 1,
) -> bytes:
    """A device descriptor and one configuration, each interface with one endpoint."""
    device = DeviceDescriptor(
        usb_version=0x0200,
        vendor_id=vendor,
        product_id=product,
        device_version=version,
        device_class=codes[0],
        device_subclass=codes[1],
        device_protocol=codes[2],
    )
    configuration = ConfigurationDescriptor(
        value,
        tuple(
            InterfaceDescriptor(number, 0, *codes, endpoints=(EndpointDescriptor(0x81 + number, 2, 512),))
            for number, codes in enumerate(interfaces)
        ),
    )
    return bytes(device) + bytes(configuration)


class Machine:
    """A file system with /sys, /dev and /usr below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.devices = root / "sys/bus/usb/devices"
        self.devices.mkdir(parents=True)
        (root / "dev/bus/usb").mkdir(parents=True)

    def add(
        self,
        port: str,
        address: int,
        vendor: int = 0x1209,
        product: int = 1,
        interfaces: tuple[tuple[int, int, int], ...] = (STORAGE,),
        /,
        *,
        codes: tuple[int, int, int] = (0, 0, 0),
        raw: bytes | None = None,
        drivers: tuple[str, ...] = (),
        node: bool = True,
        **attributes: str,
    ) -> Path:
        """Plug a device in; its folder. ``drivers`` are those of the interfaces; the attributes are as in sysfs."""
        bus = int(port.removeprefix("usb").split("-")[0])
        folder = self.root / "sys/devices/pci0" / port
        folder.mkdir(parents=True)
        raw = descriptors(vendor, product, *interfaces, codes=codes) if raw is None else raw
        (folder / "descriptors").write_bytes(raw)
        values = {
            "busnum": str(bus),
            "devnum": str(address),
            "speed": "480",
            "bConfigurationValue": "1",
            "authorized": "1",
            **attributes,
        }
        for name, value in values.items():
            (folder / name).write_bytes(value.encode(errors="surrogateescape") + b"\n")
        self.link(folder / "driver", "usb")
        for number, (class_code, subclass, protocol) in enumerate(interfaces):
            interface = folder / f"{port.replace('usb', '') + '-0' if port[0] == 'u' else port}:1.{number}"
            interface.mkdir()
            for name, code in zip(("Class", "SubClass", "Protocol"), (class_code, subclass, protocol), strict=True):
                (interface / f"bInterface{name}").write_text(f"{code:02x}\n")
            if number < len(drivers):
                self.link(interface / "driver", drivers[number])
        (self.devices / port).symlink_to(folder)
        if node:
            self.node(bus, address)
        return folder

    def link(self, path: Path, driver: str) -> None:
        target = self.root / "sys/bus/usb/drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def node(self, bus: int, address: int) -> Path:
        path = self.root / f"dev/bus/usb/{bus:03}/{address:03}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return path

    def remove(self, port: str) -> None:
        """Pull a device out; its folder goes as a whole."""
        (self.devices / port).unlink()
        folder = self.root / "sys/devices/pci0" / port
        bus, address = ((folder / name).read_text().strip() for name in ("busnum", "devnum"))
        (self.root / f"dev/bus/usb/{int(bus):03}/{int(address):03}").unlink(missing_ok=True)
        folder.rename(self.root / f"gone-{port}-{address}")

    def keyboard(self, port: str, address: int) -> Path:
        """A keyboard that the kernel reads."""
        folder = self.add(port, address, 0x046D, 0xC31C, (BOOT_KEYBOARD,), drivers=("usbhid",))
        self.input(folder, f"{port}:1.0", key=KEYBOARD_KEYS)
        return folder

    def mouse(self, port: str, address: int) -> Path:
        """A mouse that the kernel reads."""
        folder = self.add(port, address, 0x046D, 0xC077, (BOOT_MOUSE,), drivers=("usbhid",))
        self.input(folder, f"{port}:1.0", key=MOUSE_KEYS, rel="903")
        return folder

    def input(self, folder: Path, interface: str, **capabilities: str) -> None:
        """Add the input device of a HID interface."""
        path = folder / interface / "0003:046D:C31C.0001/input/input7/capabilities"
        path.mkdir(parents=True)
        for name in ("key", "rel", "abs"):
            (path / name).write_text(capabilities.get(name, "0") + "\n")

    def network(self, port: str, address: int, name: str) -> Path:
        """A network adapter with an interface that the kernel made; the folder of the interface."""
        folder = self.add(port, address, 0x0525, 0xA4A2, ((2, 6, 0),), drivers=("cdc_ether",))
        interface = folder / f"{port}:1.0/net" / name
        interface.mkdir(parents=True)
        return interface

    def disk(self, port: str, address: int, number: str = "8:0") -> Path:
        """A stick with a disk that the kernel found."""
        folder = self.add(port, address, 0x46F4, 1, drivers=("usb-storage",))
        block = folder / f"{port}:1.0/host0/target0:0:0/0:0:0:0/block/sda"
        block.mkdir(parents=True)
        (block / "dev").write_text(number + "\n")
        return folder
