"""Exit codes of the command line. They are stable: scripts rely on them.

A running session reports them with its errors, so that a command that it refuses ends as ``farplug connect`` would.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    ImageError,
    PortError,
    ProtocolError,
    Reason,
    RefusedError,
    SessionError,
    SetupError,
    TargetError,
    UsageError,
)


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    INTERNAL_ERROR = 1
    USAGE = 2
    IMAGE = 3
    UNREACHABLE = 4
    TLS = 5
    DENIED = 6
    NO_PORT = 7
    REFUSED = 8
    GUEST_GONE = 9
    PROTOCOL = 10
    SETUP = 11
    DEVICE = 12
    PAUSED = 13
    """``farplug doctor`` reached the VM, and a port of it does not answer."""
    NO_PROMPT = 123
    """``farplug run``: no shell in the guest answered."""
    COMMAND_TIMED_OUT = 124
    """``farplug run``: the command did not end in time."""
    COMMAND_FAILED = 125
    """``farplug run`` failed itself. Other codes are those of the command in the guest."""
    INTERRUPTED = 130
    """Interrupted before a device was plugged in, or left at once, at a Ctrl-C while farplug was leaving."""


_BY_REASON: Mapping[Reason, ExitCode] = {
    Reason.NEEDS_TLS: ExitCode.TLS,
    Reason.TLS_UNTRUSTED: ExitCode.TLS,
    Reason.TLS_WRONG_HOST: ExitCode.TLS,
    Reason.TLS_FAILED: ExitCode.TLS,
    Reason.WRONG_PASSWORD: ExitCode.DENIED,
    Reason.NO_PASSWORD: ExitCode.DENIED,
    Reason.CHANNEL_DENIED: ExitCode.DENIED,
    Reason.CREDENTIALS: ExitCode.DENIED,
    Reason.FORBIDDEN: ExitCode.DENIED,
    Reason.NOT_SPICE: ExitCode.PROTOCOL,
    Reason.PAUSED: ExitCode.PAUSED,
    Reason.NO_PROMPT: ExitCode.NO_PROMPT,
    Reason.INTERRUPTED: ExitCode.INTERRUPTED,
}
_BY_CLASS: Mapping[type[FarplugError], ExitCode] = {
    UsageError: ExitCode.USAGE,
    SetupError: ExitCode.SETUP,
    ImageError: ExitCode.IMAGE,
    DeviceError: ExitCode.DEVICE,
    TargetError: ExitCode.UNREACHABLE,
    PortError: ExitCode.NO_PORT,
    RefusedError: ExitCode.REFUSED,
    GuestGoneError: ExitCode.GUEST_GONE,
    ProtocolError: ExitCode.PROTOCOL,
}


def exit_code(error: FarplugError) -> ExitCode:
    """Return the exit code of a command that ends with an error: that of its reason, else that of its class.

    The error of a session has its own; ``INTERNAL_ERROR`` if that is not an exit code of an error.
    """
    if isinstance(error, SessionError):
        return next((code for code in ExitCode if code == error.exit_code and code), ExitCode.INTERNAL_ERROR)
    if error.reason in _BY_REASON:
        return _BY_REASON[error.reason]
    return next((code for kind, code in _BY_CLASS.items() if isinstance(error, kind)), ExitCode.INTERNAL_ERROR)
