"""The USB devices of a Windows machine, from libusb.

On Windows libusb opens a device if its driver is WinUSB, libusbK or libusb0; for another driver ``libusb_open`` returns
``LIBUSB_ERROR_NOT_SUPPORTED``. Source: libusb's wiki, page "Windows"; ``libusb/os/windows_winusb.c``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from farplug.errors import Reason, Remedy
from farplug.libusb.binding import UsbDevice
from farplug.libusb.identity import read_configurations, read_identity
from farplug.libusb.library import AccessDenied, Library, NotSupported, UsbError
from farplug.machine.device_info import DeviceInfo, InterfaceInfo, Obstacle
from farplug.machine.obstacles import IS_HUB, REPLUG


def refusal(error: Exception) -> Obstacle | None:
    """Return what libusb's error about opening a device means on Windows; None if it means the same everywhere."""
    if isinstance(error, NotSupported):
        return Obstacle(
            Reason.NO_WINUSB,
            "its driver is not WinUSB, which libusb needs on Windows",
            Remedy(
                "install the driver WinUSB for it with Zadig (https://zadig.akeo.ie); Windows and its programs cannot\n"
                "use the device then, until its own driver is installed again in the Device Manager"
            ),
        )
    if isinstance(error, AccessDenied):
        return Obstacle(Reason.BUSY, "another program uses it", Remedy("end that program first"))
    return None


def list_devices(ports: Collection[str] | None = None) -> list[DeviceInfo]:
    """Return the USB devices, hubs included. Each device is opened for a moment, to find out whether that works.

    Args:
        ports: the ports to list; None: all.

    Raises:
        SetupError: there is no libusb.
    """
    with Library().devices() as devices:
        infos = [_device_info(device) for device in devices if ports is None or _port(device) in ports]
    return sorted(infos, key=lambda info: info.key)


def ports() -> dict[tuple[int, int], tuple[str, int]]:
    """Return the port of each device, by bus and address, with 0 in place of an inode. Opens no device.

    Raises:
        SetupError: there is no libusb.
    """
    with Library().devices() as devices:
        return {(device.getBusNumber(), device.getDeviceAddress()): (_port(device), 0) for device in devices}


def _port(device: UsbDevice) -> str:
    ports = ".".join(map(str, device.getPortNumberList()))
    return f"{device.getBusNumber()}-{ports}" if ports else f"usb{device.getBusNumber()}"


def _device_info(device: UsbDevice) -> DeviceInfo:
    identity = read_identity(device)
    configuration = next(iter(read_configurations(device)), None)
    info = DeviceInfo(
        bus=device.getBusNumber(),
        address=device.getDeviceAddress(),
        port=_port(device),
        speed=identity.speed,
        vendor_id=identity.vendor_id,
        product_id=identity.product_id,
        device_version=identity.device_version,
        codes=(identity.device_class, identity.device_subclass, identity.device_protocol),
        interfaces=tuple(
            InterfaceInfo(one.number, (one.interface_class, one.interface_subclass, one.interface_protocol))
            for one in (configuration.select() if configuration else ())
        ),
        warnings=configuration.warnings if configuration else (),
    )
    if info.is_hub:
        return replace(info, obstacles=(IS_HUB,))
    try:
        device.open().close()
    except UsbError as error:
        obstacle = refusal(error) or Obstacle(Reason.DEVICE_FAULT, f"it cannot be opened: {error}", REPLUG)
        return replace(info, obstacles=(obstacle,))
    return info
