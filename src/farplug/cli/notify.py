"""Report the state of a session to systemd: ``sd_notify(3)``."""

from __future__ import annotations

import logging
import os
import socket
import sys

from farplug.text import printable

log = logging.getLogger(__name__)

VARIABLE = "NOTIFY_SOCKET"
"""Names the socket; systemd sets it for a service of ``Type=notify``."""


def notify(**fields: str) -> None:
    """Send fields such as ``READY="1"`` to systemd in one datagram; do nothing if it expects none.

    A failure is logged: the session does not depend on it.
    """
    address = os.environ.get(VARIABLE, "")
    if sys.platform == "win32" or not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # in the abstract namespace of Linux
        address = f"\0{address[1:]}"
    message = "\n".join(f"{name}={printable(value)}" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(errors="replace"), address)
    except OSError as error:
        log.debug("%s cannot be used: %s", VARIABLE, error)
