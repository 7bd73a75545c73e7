"""A VM that migrated: the error that ends its session, and the target of its new host."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from farplug.errors import GuestGoneError, Reason, TargetError
from farplug.spice.host import plain_host

if TYPE_CHECKING:
    from farplug.spice.messages import SwitchHost
    from farplug.transport.spice_target import SpiceTarget


class GuestMoved(GuestGoneError):
    """The VM migrated to another host, and the session ended. A client can follow: :func:`moved_target`.

    Attributes:
        where: the new host, as the server reported it; None if the server did not report it.
    """

    def __init__(self, where: SwitchHost | None) -> None:
        super().__init__(
            f"the VM moved to {where or 'another host'}, and the session ended",
            reason=Reason.GUEST_MOVED,
            remedy="connect again, to the new host",
        )
        self.where = where


def moved_target(target: SpiceTarget, where: SwitchHost) -> SpiceTarget:
    """Return the target of a VM that migrated: the new address, with the ticket, CA and proxy of the old target.

    The new certificate is checked against the subject that the server reported, otherwise as that of the old target. A
    target with a TLS port never becomes one without, unless it has ``allow_plain``. One without a plain port stays so,
    and so does one without a TLS port, if the new host has a plain port.

    Args:
        target: the target of the old host.
        where: the new host; a host without a name is the old one.

    Raises:
        TargetError: the new host has no name or no SPICE port (``UNREACHABLE``), or it has only a plain port, and the
            old target had a TLS port (``NEEDS_TLS``).
    """
    has_plain = target.port is not None or target.unix_path is not None
    keeps_tls = where.tls_port is not None or target.tls_port is None or target.allow_plain
    port = where.port if has_plain and keeps_tls else None
    stays_plain = target.port is not None and target.tls_port is None and port is not None
    tls_port = None if stays_plain else where.tls_port
    host = plain_host(where.host) or target.host
    if not host or (port is None and tls_port is None):
        problem, reason = "the server reported no host and port", Reason.UNREACHABLE
        if host and where.port is not None:
            problem, reason = "its SPICE server has no TLS port, and this target has one", Reason.NEEDS_TLS
        raise TargetError(f"the VM moved to {where}: {problem}", reason=reason, remedy="find out its new address")
    return dataclasses.replace(
        target,
        host=host,
        port=port,
        tls_port=tls_port,
        host_subject=target.host_subject if tls_port is None else where.subject or target.host_subject,
        unix_path=None,
    )
