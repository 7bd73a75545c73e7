"""The password of a SPICE server, which the ticket contains."""

from __future__ import annotations

from farplug.errors import Reason, UsageError

MAX_PASSWORD = 60
"""SPICE_MAX_PASSWORD_LENGTH: the longest password that QEMU accepts for its SPICE server, in UTF-8 bytes."""
MAX_TICKET = 59
"""The bytes of a password that libspice-server stores: its array of SPICE_MAX_PASSWORD_LENGTH includes the NUL.

Source: spice 0.15.1, ``server/reds.cpp``, ``spice_server_set_ticket``.
"""


def check_password(password: str) -> bytes:
    """Return a password as the ticket contains it: UTF-8, of a password of 60 bytes the 59 that the server compares.

    Raises:
        UsageError: the password is too long for SPICE, or contains a NUL character (``BAD_OPTION``).
    """
    encoded = password.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_PASSWORD:
        raise UsageError(
            f"the password has {len(encoded)} bytes in UTF-8: a SPICE password has at most {MAX_PASSWORD}",
            reason=Reason.BAD_OPTION,
            remedy="check that nothing but the password was given",
        )
    if b"\0" in encoded:
        raise UsageError(
            "the password contains a NUL character, which a SPICE password cannot contain",
            reason=Reason.BAD_OPTION,
            remedy="check that nothing but the password was given",
        )
    return encoded[:MAX_TICKET]
