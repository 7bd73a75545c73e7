"""Devices made of software: the kit for functions, disks, CD-ROM drives and serial lines."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.usb.platform import WindowsDriver
    from farplug.virtual.async_function import (
        AsyncFunction,
        Setting,
        Stall,
        bulk_in,
        bulk_out,
        control_in,
        control_out,
        interrupt_in,
        interrupt_out,
        isochronous_in,
        isochronous_out,
    )
    from farplug.virtual.cdrom import CdromDrive, cdrom_device, drives_of
    from farplug.virtual.device import VirtualDevice
    from farplug.virtual.disk import Disk, disk_device
    from farplug.virtual.endpoints import (
        BulkIn,
        BulkOut,
        Detached,
        InterruptIn,
        InterruptOut,
        IsochronousIn,
        IsochronousOut,
    )
    from farplug.virtual.function import Function, FunctionHost, Numbers
    from farplug.virtual.network import NetworkAdapter, network_device, parse_mac
    from farplug.virtual.serial import LineCoding, LineState, Parity, SerialLine, serial_device
    from farplug.virtual.storage import MassStorage
from farplug.virtual.storage_transport import StorageTransport

__all__ = [
    "AsyncFunction",
    "BulkIn",
    "BulkOut",
    "CdromDrive",
    "Detached",
    "Disk",
    "Function",
    "FunctionHost",
    "InterruptIn",
    "InterruptOut",
    "IsochronousIn",
    "IsochronousOut",
    "LineCoding",
    "LineState",
    "MassStorage",
    "NetworkAdapter",
    "Numbers",
    "Parity",
    "SerialLine",
    "Setting",
    "Stall",
    "StorageTransport",
    "VirtualDevice",
    "WindowsDriver",
    "bulk_in",
    "bulk_out",
    "cdrom_device",
    "control_in",
    "control_out",
    "disk_device",
    "drives_of",
    "interrupt_in",
    "interrupt_out",
    "isochronous_in",
    "isochronous_out",
    "network_device",
    "parse_mac",
    "serial_device",
]

lazy_import(
    globals(),
    {
        "AsyncFunction": ".async_function",
        "Setting": ".async_function",
        "Stall": ".async_function",
        "bulk_in": ".async_function",
        "bulk_out": ".async_function",
        "control_in": ".async_function",
        "control_out": ".async_function",
        "interrupt_in": ".async_function",
        "interrupt_out": ".async_function",
        "isochronous_in": ".async_function",
        "isochronous_out": ".async_function",
        "BulkIn": ".endpoints",
        "BulkOut": ".endpoints",
        "Detached": ".endpoints",
        "InterruptIn": ".endpoints",
        "InterruptOut": ".endpoints",
        "IsochronousIn": ".endpoints",
        "IsochronousOut": ".endpoints",
        "WindowsDriver": "..usb.platform",
        "CdromDrive": ".cdrom",
        "Disk": ".disk",
        "Function": ".function",
        "FunctionHost": ".function",
        "LineCoding": ".serial",
        "LineState": ".serial",
        "MassStorage": ".storage",
        "NetworkAdapter": ".network",
        "Numbers": ".function",
        "Parity": ".serial",
        "SerialLine": ".serial",
        "StorageTransport": ".storage_transport",
        "VirtualDevice": ".device",
        "cdrom_device": ".cdrom",
        "disk_device": ".disk",
        "drives_of": ".cdrom",
        "network_device": ".network",
        "parse_mac": ".network",
        "serial_device": ".serial",
    },
)
