"""The USB devices of this machine, from sysfs, which needs no permission and opens no device.

Descriptors are not trusted: from descriptors that are cut short, loop or contradict themselves, the valid part is
listed. Sources: Documentation/ABI/stable/sysfs-bus-usb and sysfs-devices-usb of Linux.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from farplug.errors import Reason, Remedy, SetupError
from farplug.machine.device_info import DeviceInfo, InterfaceInfo
from farplug.machine.obstacles import Uses, in_use_as, obstacles
from farplug.machine.sysfs import bus_and_address, list_folder, number, on_windows, read, read_bytes
from farplug.machine.usb_ids import UsbIds, usb_ids
from farplug.text import printable
from farplug.usb.descriptors import MAX_WARNINGS, ConfigurationDescriptor, DeviceDescriptor
from farplug.usb.types import DescriptorType, Speed

DEVICES = Path("sys/bus/usb/devices")
"""The folder of the devices, below the root."""

MAX_CONFIGURATIONS = 8
"""The limit of Linux (USB_MAXCONFIG)."""
MAX_DESCRIPTORS = 18 + MAX_CONFIGURATIONS * 0xFFFF
"""Bytes of a device descriptor and :data:`MAX_CONFIGURATIONS` configurations."""

DEVICE_NAME = re.compile(r"usb\d{1,4}|\d{1,4}-\d{1,3}(?:\.\d{1,3}){0,6}")
_INTERFACE_NAME = re.compile(r"(.+):(\d{1,3})\.(\d{1,3})")
_PORT_NAME = re.compile(r"(?:usb(\d{1,4})|(\d{1,4}-[\d.]{1,32}))-port(\d{1,3})")

_SPEEDS = {
    "1.5": Speed.LOW,
    "12": Speed.FULL,
    "480": Speed.HIGH,
    "5000": Speed.SUPER,
    "10000": Speed.SUPER_PLUS,
    "20000": Speed.SUPER_PLUS,
}


def list_devices(root: Path = Path("/"), ports: Collection[str] | None = None) -> list[DeviceInfo]:
    """Return the USB devices of this machine, hubs included, by bus and port.

    A device that hangs blocks the call: make it in a thread.

    Args:
        root: where /sys, /dev and /usr are.
        ports: the ports to list; None: all.

    Raises:
        SetupError: the kernel has no USB here (``NO_USB``); on Windows: there is no libusb; this is
            macOS (``UNSUPPORTED_SYSTEM``).
    """
    if on_windows():
        from farplug.machine import windows

        return windows.list_devices(ports)
    if sys.platform == "darwin":
        raise SetupError("farplug cannot use this machine's USB devices on macOS", reason=Reason.UNSUPPORTED_SYSTEM)
    folder = root / DEVICES
    if not folder.is_dir():
        raise SetupError(
            f"this machine has no USB: there is no {folder}",
            reason=Reason.NO_USB,
            remedy=Remedy(
                "mount /sys into a container; add a USB controller to a VM; elsewhere, load the kernel's USB support",
                command="sudo modprobe usbcore",
            ),
        )
    ids = usb_ids(root)
    paths = (path for path in list_folder(folder) if DEVICE_NAME.fullmatch(path.name))
    devices = (_read_device(path, root, ids) for path in paths if ports is None or path.name in ports)
    return sorted((device for device in devices if device is not None), key=_order)


def _order(device: DeviceInfo) -> tuple[int, list[int], int]:
    """Return a key that sorts root hubs before other devices of their bus, and ports by their numbers."""
    ports = [] if device.port.startswith("usb") else list(map(int, re.findall(r"\d+", device.port)))
    return device.bus, ports, device.address


def _read_device(path: Path, root: Path, ids: UsbIds) -> DeviceInfo | None:
    """Return one device; None if it was just unplugged."""
    key = bus_and_address(path)
    if key is None:
        return None
    bus, address = key
    raw = read_bytes(path / "descriptors", MAX_DESCRIPTORS)
    descriptor = DeviceDescriptor.parse(raw[:18])
    configuration = number(path / "bConfigurationValue") or 0
    configurations = list(islice(_configurations(raw), MAX_CONFIGURATIONS))
    layout = next((one for one in configurations if one.value == configuration), None)
    layout = layout or next(iter(configurations), None)
    warnings = [*descriptor.warnings, *(warning for one in configurations for warning in one.warnings)]
    if len(configurations) != descriptor.configuration_count:
        warnings.append(f"bNumConfigurations is {descriptor.configuration_count}, but there are {len(configurations)}")
    vendor_id = _descriptor_or(descriptor.vendor_id, path / "idVendor")
    product_id = _descriptor_or(descriptor.product_id, path / "idProduct")
    device = DeviceInfo(
        bus=bus,
        address=address,
        port=path.name,
        peer_port=_peer_port(path),
        speed=_SPEEDS.get(read(path / "speed")),
        vendor_id=vendor_id,
        product_id=product_id,
        device_version=_descriptor_or(descriptor.device_version, path / "bcdDevice"),
        codes=(
            _descriptor_or(descriptor.device_class, path / "bDeviceClass") & 0xFF,
            _descriptor_or(descriptor.device_subclass, path / "bDeviceSubClass") & 0xFF,
            _descriptor_or(descriptor.device_protocol, path / "bDeviceProtocol") & 0xFF,
        ),
        manufacturer=printable(read(path / "manufacturer").strip()) or ids.vendor(vendor_id),
        product=printable(read(path / "product").strip()) or ids.product(vendor_id, product_id),
        serial_number=printable(read(path / "serial").strip()),
        configuration=configuration,
        interfaces=tuple(_interfaces(path, layout)),
        node=root / f"dev/bus/usb/{bus:03}/{address:03}",
        path=path,
        warnings=tuple(warnings[:MAX_WARNINGS]),
    )
    uses = Uses.of(device)
    return replace(device, obstacles=tuple(obstacles(device, root, uses)), in_use_as=in_use_as(uses))


def _first(*numbers: int | None) -> int | None:
    return next((value for value in numbers if value is not None), None)


def _descriptor_or(value: int, attribute: Path) -> int:
    """Return a field of the device descriptor, or the kernel's attribute if the descriptor is cut short."""
    return value or min(number(attribute, 16) or 0, 0xFFFF)


def _configurations(raw: bytes) -> Iterator[ConfigurationDescriptor]:
    position = 18
    while position + 9 <= len(raw) and raw[position + 1] == DescriptorType.CONFIGURATION:
        total = max(9, int.from_bytes(raw[position + 2 : position + 4], "little"))
        yield ConfigurationDescriptor.parse(raw[position : position + total])
        position += total


def _interfaces(path: Path, layout: ConfigurationDescriptor | None) -> Iterator[InterfaceInfo]:
    """Return the interfaces with the kernel's settings and drivers; those that it has not set up from descriptors."""
    described = {} if layout is None else {one.number: one for one in layout.select()}
    known: dict[int, InterfaceInfo] = {}
    for folder in list_folder(path):
        match = _INTERFACE_NAME.fullmatch(folder.name)
        if match is None or match[1].removesuffix("-0") != path.name.replace("usb", ""):
            continue
        interface = int(match[3])
        one = described.get(interface)
        codes = (0, 0, 0) if one is None else (one.interface_class, one.interface_subclass, one.interface_protocol)
        names = ("bInterfaceClass", "bInterfaceSubClass", "bInterfaceProtocol")
        class_code, subclass, protocol = (
            min(_first(number(folder / name, 16), code) or 0, 0xFF) for name, code in zip(names, codes, strict=True)
        )
        known[interface] = InterfaceInfo(interface, (class_code, subclass, protocol), _driver(folder))
    for interface, one in described.items():
        codes = (one.interface_class, one.interface_subclass, one.interface_protocol)
        known.setdefault(interface, InterfaceInfo(interface, codes))
    return (known[interface] for interface in sorted(known))


def _driver(folder: Path) -> str:
    try:
        return printable(os.path.basename(os.readlink(folder / "driver")))
    except OSError:
        return ""


def _peer_port(path: Path) -> str:
    """Return the port that the same socket has at its other speeds, which the kernel knows for USB 3 sockets."""
    try:
        match = _PORT_NAME.fullmatch((path / "port/peer").resolve(strict=True).name)
    except (OSError, RuntimeError):  # no such link, or a loop of links
        return ""
    if match is None:
        return ""
    return f"{match[1]}-{match[3]}" if match[1] else f"{match[2]}.{match[3]}"
