"""Devices made of software: the kit for functions, disks and CD-ROM drives."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.virtual.cdrom import CdromDrive, cdrom_device, drives_of
    from farplug.virtual.device import VirtualDevice
    from farplug.virtual.disk import Disk, disk_device
    from farplug.virtual.function import Function, FunctionHost, Numbers
    from farplug.virtual.storage import MassStorage
from farplug.virtual.storage_transport import StorageTransport

__all__ = [
    "CdromDrive",
    "Disk",
    "Function",
    "FunctionHost",
    "MassStorage",
    "Numbers",
    "StorageTransport",
    "VirtualDevice",
    "cdrom_device",
    "disk_device",
    "drives_of",
]

lazy_import(
    globals(),
    {
        "CdromDrive": ".cdrom",
        "Disk": ".disk",
        "Function": ".function",
        "FunctionHost": ".function",
        "MassStorage": ".storage",
        "Numbers": ".function",
        "StorageTransport": ".storage_transport",
        "VirtualDevice": ".device",
        "cdrom_device": ".cdrom",
        "disk_device": ".disk",
        "drives_of": ".cdrom",
    },
)
