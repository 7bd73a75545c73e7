"""Test a device of your own: in the throw-away QEMU guest, or in memory.

The names here are the public ones of the QEMU guest; the in-memory guest is :mod:`farplug.testing.memory`.
"""

from farplug.vm.agent import CommandFailed, CommandResult, GuestTimeout
from farplug.vm.qemu import GuestCrashed, QemuGuest
from farplug.vm.qemu_config import (
    GATEWAY,
    Boot,
    Controller,
    GuestConfig,
    Spice,
    SpiceAddress,
    SpicePort,
    SpiceTransport,
    TcpClientPort,
    TcpPort,
    UnixPort,
    UsbDisk,
    UsbPort,
)
from farplug.vm.qmp import Qmp, QmpError

__all__ = [
    "GATEWAY",
    "Boot",
    "CommandFailed",
    "CommandResult",
    "Controller",
    "GuestConfig",
    "GuestCrashed",
    "GuestTimeout",
    "QemuGuest",
    "Qmp",
    "QmpError",
    "Spice",
    "SpiceAddress",
    "SpicePort",
    "SpiceTransport",
    "TcpClientPort",
    "TcpPort",
    "UnixPort",
    "UsbDisk",
    "UsbPort",
]
