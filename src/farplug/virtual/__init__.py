"""Devices made of software: the kit, and the functions that a person wants to plug."""

from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import Disk, disk_device
from farplug.virtual.function import Function, FunctionHost
from farplug.virtual.storage import MassStorage, StorageTransport

__all__ = [
    "Disk",
    "Function",
    "FunctionHost",
    "MassStorage",
    "StorageTransport",
    "VirtualDevice",
    "disk_device",
]
