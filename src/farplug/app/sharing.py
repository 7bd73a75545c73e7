"""Which sources share a port of a guest, as parts of one device."""

from __future__ import annotations

from collections.abc import Sequence

from farplug.app.kinds import Medium, Whole
from farplug.app.sources import OpenSource
from farplug.errors import PortError, Reason
from farplug.virtual.storage import MAX_UNITS


def share(
    opened: Sequence[OpenSource], ports: int, *, separate: bool, remedy: str
) -> tuple[list[list[OpenSource]], str]:
    """Return sources in groups of one device each: one source each, or all of them if there are fewer ports.

    What is a device of its own is alone in its group. In another group images come first, in the order of their
    logical unit numbers.

    Args:
        opened: the sources.
        ports: how many are free.
        separate: each source must have a port of its own.
        remedy: says how the guest gets more ports.

    Returns:
        The groups, and what a user may want to know about them: empty if each source has a port.

    Raises:
        PortError: there are fewer ports, and each source must be ``separate``.
    """
    if len(opened) <= ports:
        return [[one] for one in opened], ""
    if separate:
        raise PortError(
            f"{len(opened)} devices need a port each, but the VM has {ports} for them",
            reason=Reason.NO_FREE_PORT,
            remedy=f"let them share a port, plug fewer, or {remedy}",
        )
    alone = [[one] for one in opened if isinstance(one.content, Whole)]
    opened = [one for one in opened if not isinstance(one.content, Whole)]
    count, ports = len(opened), ports - len(alone)
    has = "1 port" if ports == 1 else f"{ports} ports"
    media = [one for one in opened if isinstance(one.content, Medium)]
    parts = "logical units" if len(media) == count else "parts"
    note = f"the VM has {has} for {count} devices: they are plugged as {count} {parts} of one device"
    return [*alone, [*media, *(one for one in opened if one not in media)]], note


def least_ports(opened: Sequence[OpenSource]) -> int:
    """Return the ports that sources need at least: one has room for all of them, but for 16 logical units only."""
    media = sum(isinstance(one.content, Medium) for one in opened)
    alone = sum(isinstance(one.content, Whole) for one in opened)
    return alone + min(len(opened) - alone, 1) if media <= MAX_UNITS else len(opened)
