"""Plug disk images, ISOs, folders and real USB devices into virtual machines.

::

    async with farplug.connect("spice://vmhost:5900") as guest, guest.plug(farplug.disk("drivers.raw")) as attachment:
        await attachment.configured()
        async for event in attachment.events():
            print(event)

The names of this package are its public interface. Other modules can be imported, and may change.
"""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.app.api import cdrom, connect, disk, folder, keyboard, tablet, usb_device
    from farplug.app.app import App
    from farplug.app.attachment import Attachment, AttachmentState
    from farplug.app.events import Event
    from farplug.app.guest import Guest
    from farplug.app.settings import (
        CaptureSettings,
        DeviceRules,
        GuestSettings,
        Source,
        StorageSettings,
        TargetSettings,
    )
    from farplug.errors import (
        DeviceError,
        FarplugError,
        GuestGoneError,
        ImageError,
        InternalError,
        LocalProtocolError,
        PortError,
        ProtocolError,
        Reason,
        RefusedError,
        Remedy,
        RemoteProtocolError,
        SetupError,
        StateError,
        TargetError,
        UsageError,
    )
    from farplug.machine.listing import list_devices
    from farplug.usb.device import Device
    from farplug.usb.transfer import Status, Transfer
    from farplug.usb.types import Speed
    from farplug.version import __version__
    from farplug.virtual.device import VirtualDevice
    from farplug.virtual.function import Function

__all__ = [
    "App",
    "Attachment",
    "AttachmentState",
    "CaptureSettings",
    "Device",
    "DeviceError",
    "DeviceRules",
    "Event",
    "FarplugError",
    "Function",
    "Guest",
    "GuestGoneError",
    "GuestSettings",
    "ImageError",
    "InternalError",
    "LocalProtocolError",
    "PortError",
    "ProtocolError",
    "Reason",
    "RefusedError",
    "Remedy",
    "RemoteProtocolError",
    "SetupError",
    "Source",
    "Speed",
    "StateError",
    "Status",
    "StorageSettings",
    "TargetError",
    "TargetSettings",
    "Transfer",
    "UsageError",
    "VirtualDevice",
    "__version__",
    "cdrom",
    "connect",
    "disk",
    "folder",
    "keyboard",
    "list_devices",
    "tablet",
    "usb_device",
]

lazy_import(
    globals(),
    {
        "App": ".app.app",
        "Attachment": ".app.attachment",
        "AttachmentState": ".app.attachment",
        "CaptureSettings": ".app.settings",
        "Device": ".usb.device",
        "DeviceError": ".errors",
        "DeviceRules": ".app.settings",
        "Event": ".app.events",
        "FarplugError": ".errors",
        "Function": ".virtual.function",
        "Guest": ".app.guest",
        "GuestGoneError": ".errors",
        "GuestSettings": ".app.settings",
        "ImageError": ".errors",
        "InternalError": ".errors",
        "LocalProtocolError": ".errors",
        "PortError": ".errors",
        "ProtocolError": ".errors",
        "Reason": ".errors",
        "RefusedError": ".errors",
        "Remedy": ".errors",
        "RemoteProtocolError": ".errors",
        "SetupError": ".errors",
        "Source": ".app.settings",
        "Speed": ".usb.types",
        "StateError": ".errors",
        "Status": ".usb.transfer",
        "StorageSettings": ".app.settings",
        "TargetError": ".errors",
        "TargetSettings": ".app.settings",
        "Transfer": ".usb.transfer",
        "UsageError": ".errors",
        "VirtualDevice": ".virtual.device",
        "__version__": ".version",
        "cdrom": ".app.api",
        "connect": ".app.api",
        "disk": ".app.api",
        "folder": ".app.api",
        "keyboard": ".app.api",
        "list_devices": ".machine.listing",
        "tablet": ".app.api",
        "usb_device": ".app.api",
    },
)
