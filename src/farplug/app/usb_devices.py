"""The USB devices of this machine, as a client chooses among them."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

from farplug.app.guest import Guest
from farplug.machine.device_info import DeviceInfo
from farplug.machine.listing import list_devices
from farplug.physical.device import PhysicalDevice
from farplug.text import printable
from farplug.threads import run_in_daemon_thread


async def list_usb_devices(guests: Iterable[Guest]) -> dict[str, Any]:
    """Return the name of this machine, and its USB devices but root hubs, as JSON's types.

    Args:
        guests: what is plugged into these is ``attached``.

    Raises:
        SetupError: this machine has no USB, or farplug cannot list its devices.
    """
    found = await run_in_daemon_thread(list_devices)
    attached = {
        (device.bus_address.bus, device.bus_address.address): (guest.id, attachment.id)
        for guest in guests
        for attachment in guest.attachments
        if not attachment.over and isinstance(device := attachment.device, PhysicalDevice)
    }
    devices = [_device(one, attached.get(one.key)) for one in found if not one.port.startswith("usb")]
    return {"machine": printable(socket.gethostname()), "devices": devices}


def _device(found: DeviceInfo, attached: tuple[str, str] | None) -> dict[str, Any]:
    """Return a device, with the name under which it is attached, and its state."""
    data = {"id": found.port, "name": found.name or found.id, **found.to_json()}
    if attached is not None:
        guest, attachment = attached
        return {**data, "state": "attached", "guest": guest, "attachment": attachment}
    if found.obstacle is None:
        return {**data, "state": "free"}
    return {**data, "state": "refused", **found.obstacle.to_json()}
