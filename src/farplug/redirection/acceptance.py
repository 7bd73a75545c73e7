"""What a guest does not take, and how that is told: its filter, its refusal, a device that it has no means for."""

from __future__ import annotations

from farplug.errors import Reason, RefusedError
from farplug.usb.device import Device, Identity
from farplug.usbredir.filter import Filter


def check_filter(filter: Filter | None, device: Device) -> None:
    """Judge a device as the guest does.

    Raises:
        RefusedError: the guest's filter rules it out (``FILTERED``).
    """
    if filter is None:
        return
    identity = device.identity
    judgement = filter.check(
        device_class=identity.device_class,
        vendor_id=identity.vendor_id,
        product_id=identity.product_id,
        device_version=identity.device_version,
        interfaces=[(i.interface_class, i.interface_subclass, i.interface_protocol) for i in device.interfaces],
    )
    if not judgement.allowed:
        raise RefusedError(
            f"the guest's filter does not allow {identity}: {judgement}",
            reason=Reason.FILTERED,
            remedy="allow it in the filter= property of QEMU's usb-redir device (libvirt: <redirfilter>)",
        )


def rejected(identity: Identity) -> RefusedError:
    """The guest refused a device that its filter allows, at its lowest speed."""
    return RefusedError(
        f"the guest refused {identity} at {identity.speed} speed",
        reason=Reason.REJECTED,
        remedy="the VM's USB controller may not take this speed: give it a qemu-xhci controller; "
        "QEMU's own log says why",
    )


def no_streams(identity: Identity) -> RefusedError:
    """The guest's side has no bulk streams, and the device does not do without."""
    return RefusedError(
        f"the guest's side has no bulk streams, which {identity} uses",
        reason=Reason.CAPABILITY,
        remedy="QEMU's usb-redir device has them, unless it has streams=off; "
        "virtual disks need none with --usb-storage bot",
    )
