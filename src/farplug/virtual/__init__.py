"""Devices made of software: the kit, and the functions that a person wants to plug."""

from farplug.virtual.cdrom import Cdrom, CdromDevice, CdromDrive, cdrom_device
from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import Disk, disk_device
from farplug.virtual.function import Function, FunctionHost
from farplug.virtual.storage import MassStorage, StorageTransport

__all__ = [
    "Cdrom",
    "CdromDevice",
    "CdromDrive",
    "Disk",
    "Function",
    "FunctionHost",
    "MassStorage",
    "StorageTransport",
    "VirtualDevice",
    "cdrom_device",
    "disk_device",
]
