"""Find what a user names among the attachments of a guest."""

from __future__ import annotations

import os
from collections.abc import Iterable

from farplug.app.attachment import Attachment
from farplug.errors import Reason, Remedy, UsageError
from farplug.text import shown
from farplug.virtual.device import VirtualDevice
from farplug.virtual.fido.presence import AsksPresence


def find(attachments: Iterable[Attachment], name: str) -> Attachment | None:
    """Return the attachment that a user names; None if there is none under this name.

    Args:
        attachments: the ones that are not over.
        name: an id or a label; the path or the name of an image; the ids of a USB device (``1050:0407``), or how it
            was chosen.

    Raises:
        UsageError: the name fits several devices (``AMBIGUOUS``), or is one of several disks of a device.
    """
    attachments = list(attachments)
    for attachment in attachments:
        if name in (attachment.label, attachment.id):
            return attachment
    fitting = [attachment for attachment in attachments if name in _names_of(attachment)]
    if len(fitting) > 1:
        raise UsageError(
            f"{shown(name)} fits several devices",
            reason=Reason.AMBIGUOUS,
            remedy=f"name one of: {', '.join(attachment.label for attachment in fitting)}",
        )
    for attachment in fitting:
        if len(attachment.units) > 1:
            raise UsageError(
                f"{shown(name)} is one of {len(attachment.units)} parts of a device, which leave together",
                reason=Reason.AMBIGUOUS,
                remedy=f"to detach all of them, name the device: {shown(attachment.label)}",
            )
    return fitting[0] if fitting else None


def find_key(attachments: Iterable[Attachment], name: str | None) -> tuple[Attachment, AsksPresence]:
    """Return the security key that a user names, with its attachment; one that asks, if it is not the only one.

    Args:
        attachments: the ones that are not over.
        name: the key, by its label, id or path; None: the one that asks.

    Raises:
        UsageError: there is no such key (``NOT_FOUND``), or several ask (``AMBIGUOUS``).
    """
    keys = [
        (attachment, function)
        for attachment in attachments
        if name is None or name in (attachment.label, attachment.id, *attachment.units, *_names_of(attachment))
        if isinstance(attachment.device, VirtualDevice)
        for function in attachment.device.functions
        if isinstance(function, AsksPresence)
    ]
    if not keys:
        what = "no security key is plugged in" if name is None else f"{shown(name)} is not a security key"
        raise UsageError(what, reason=Reason.NOT_FOUND, remedy=Remedy("plug one in", setting="usb_fido"))
    asking = [key for key in keys if key[1].asks is not None]
    if len(asking) > 1:
        labels = ", ".join(attachment.label for attachment, _ in asking)
        raise UsageError(f"{len(asking)} security keys ask", reason=Reason.AMBIGUOUS, remedy=f"name one of: {labels}")
    return (asking or keys)[0]


def _names_of(attachment: Attachment) -> set[str]:
    """Return the names, beside label and id, by which a user may mean an attachment."""
    identity = attachment.device.identity
    paths = {name for source in attachment.sources for name in (source, os.path.basename(source))}
    return {f"{identity.vendor_id:04x}:{identity.product_id:04x}"} | paths | {*attachment.units}
