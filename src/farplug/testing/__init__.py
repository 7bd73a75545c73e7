"""Test a device of your own: in the throw-away QEMU guest, or in memory.

The names here are the public ones of the QEMU guest, and of what the fixtures of the pytest plugin are. The in-memory
guest is :mod:`farplug.testing.memory`. Names are imported on first use: pytest loads the plugin in every run.
"""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.testing.fixtures import (
        GuestFactory,
        GuestFixture,
        KeyboardFixture,
        PlugFixture,
        PluggedDevice,
        ScreenFixture,
        ScreenMismatch,
        SerialFixture,
    )
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
    "GuestFactory",
    "GuestFixture",
    "GuestTimeout",
    "KeyboardFixture",
    "PlugFixture",
    "PluggedDevice",
    "QemuGuest",
    "Qmp",
    "QmpError",
    "ScreenFixture",
    "ScreenMismatch",
    "SerialFixture",
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

lazy_import(
    globals(),
    {
        "GATEWAY": "..vm.qemu_config",
        "Boot": "..vm.qemu_config",
        "CommandFailed": "..vm.agent",
        "CommandResult": "..vm.agent",
        "Controller": "..vm.qemu_config",
        "GuestConfig": "..vm.qemu_config",
        "GuestCrashed": "..vm.qemu",
        "GuestFactory": ".fixtures",
        "GuestFixture": ".fixtures",
        "GuestTimeout": "..vm.agent",
        "KeyboardFixture": ".fixtures",
        "PlugFixture": ".fixtures",
        "PluggedDevice": ".fixtures",
        "QemuGuest": "..vm.qemu",
        "Qmp": "..vm.qmp",
        "QmpError": "..vm.qmp",
        "ScreenFixture": ".fixtures",
        "ScreenMismatch": ".fixtures",
        "SerialFixture": ".fixtures",
        "Spice": "..vm.qemu_config",
        "SpiceAddress": "..vm.qemu_config",
        "SpicePort": "..vm.qemu_config",
        "SpiceTransport": "..vm.qemu_config",
        "TcpClientPort": "..vm.qemu_config",
        "TcpPort": "..vm.qemu_config",
        "UnixPort": "..vm.qemu_config",
        "UsbDisk": "..vm.qemu_config",
        "UsbPort": "..vm.qemu_config",
    },
)
