"""The reasons for which a guest does not accept a device: its filter, its refusal, a missing capability."""

from __future__ import annotations

from farplug.errors import Reason, RefusedError, Remedy
from farplug.usb.device import Device, Identity
from farplug.usbredir.filter import Filter


def check_filter(filter: Filter | None, device: Device) -> None:
    """Apply the guest's filter to a device, as the guest does.

    Raises:
        RefusedError: the guest's filter does not allow the device (``FILTERED``).
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
    """Return the error for a device that the guest's filter allows, and that the guest refused at its lowest speed."""
    return RefusedError(
        f"the guest refused {identity} at {identity.speed} speed",
        reason=Reason.REJECTED,
        remedy="the VM's USB controller may not support this speed: use a qemu-xhci controller; "
        "QEMU's log shows the reason",
    )


def no_streams(identity: Identity) -> RefusedError:
    """Return the error for a device that requires bulk streams, where the guest's side of the port has none."""
    return RefusedError(
        f"the guest's side of the port has no bulk streams, but {identity} requires them",
        reason=Reason.CAPABILITY,
        remedy=Remedy(
            "remove streams=off from QEMU's usb-redir device, or use a virtual disk without USB Attached SCSI",
            setting="storage.usb_storage",
            value="bot",
        ),
    )
