"""The USB devices of a Windows machine: there is no sysfs, libusb alone knows them.

libusb opens a device there if its driver is WinUSB, libusbK or libusb0; for another driver ``libusb_open`` answers
``LIBUSB_ERROR_NOT_SUPPORTED``. Source: libusb's wiki, page "Windows"; ``libusb/os/windows_winusb.c``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from farplug.errors import Reason
from farplug.libusb.binding import UsbDevice
from farplug.libusb.identity import read_configurations, read_identity
from farplug.libusb.library import AccessDenied, Library, NotSupported, UsbError
from farplug.machine.device_info import Found, FoundInterface, Obstacle
from farplug.machine.obstacles import IS_HUB


def refusal(error: Exception) -> Obstacle | None:
    """What an error of libusb about opening a device means on Windows; None if it means the same everywhere."""
    if isinstance(error, NotSupported):
        return Obstacle(
            Reason.NO_WINUSB,
            "its driver is not WinUSB, which libusb needs on Windows",
            "give it the driver WinUSB with Zadig (https://zadig.akeo.ie); Windows and its programs cannot use the\n"
            "device then, until the Device Manager gives it its own driver back",
        )
    if isinstance(error, AccessDenied):
        return Obstacle(Reason.BUSY, "another program uses it", "end that program first")
    return None


def list_devices(ports: Collection[str] | None = None) -> list[Found]:
    """List the USB devices, hubs included. Each is opened for a moment, to see whether it can be.

    Args:
        ports: those that are looked at; None: all.

    Raises:
        SetupError: there is no libusb.
    """
    with Library().devices() as devices:
        found = [_found(device) for device in devices if ports is None or _port(device) in ports]
    return sorted(found, key=lambda one: one.key)


def places() -> dict[tuple[int, int], tuple[str, int]]:
    """By bus and address of all devices their ports; nothing is opened. The number is always 0.

    Raises:
        SetupError: there is no libusb.
    """
    with Library().devices() as devices:
        return {(device.getBusNumber(), device.getDeviceAddress()): (_port(device), 0) for device in devices}


def _port(device: UsbDevice) -> str:
    ports = ".".join(map(str, device.getPortNumberList()))
    return f"{device.getBusNumber()}-{ports}" if ports else f"usb{device.getBusNumber()}"


def _found(device: UsbDevice) -> Found:
    identity = read_identity(device)
    configuration = next(iter(read_configurations(device)), None)
    found = Found(
        bus=device.getBusNumber(),
        address=device.getDeviceAddress(),
        port=_port(device),
        speed=identity.speed,
        vendor_id=identity.vendor_id,
        product_id=identity.product_id,
        device_version=identity.device_version,
        codes=(identity.device_class, identity.device_subclass, identity.device_protocol),
        interfaces=tuple(
            FoundInterface(one.number, (one.interface_class, one.interface_subclass, one.interface_protocol))
            for one in (configuration.select() if configuration else ())
        ),
        warnings=configuration.warnings if configuration else (),
    )
    if found.is_hub:
        return replace(found, obstacles=(IS_HUB,))
    try:
        device.open().close()
    except UsbError as error:
        obstacle = refusal(error) or Obstacle(
            Reason.DEVICE_FAULT, f"it cannot be opened: {error}", "unplug it and plug it in again"
        )
        return replace(found, obstacles=(obstacle,))
    return found
