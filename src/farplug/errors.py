"""Everything farplug raises on purpose.

::

    FarplugError
    ├── UsageError              an option, a path or a target is written wrong
    ├── SetupError              something is missing on this machine
    ├── ImageError              a disk image cannot be used
    ├── DeviceError             a device cannot be used, or broke its own contract
    ├── TargetError             the guest cannot be reached
    ├── PortError               the guest is reached, but has no port for this device
    ├── RefusedError            the guest refused the device
    ├── GuestGoneError          the connection to the guest ended while it was in use
    ├── InternalError           a bug in farplug, met where nobody can catch an exception
    └── ProtocolError
        ├── LocalProtocolError  we were asked to say what the protocol forbids
        └── RemoteProtocolError the peer said what the protocol forbids

Each carries one line that says what happened, a :class:`Reason` that a program can act on, a remedy for a person where
there is one, and the exit code that the command line ends with. Any other exception that leaves farplug is a bug, like
:class:`InternalError`.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of the command line. They are stable: scripts rely on them."""

    OK = 0
    DEFECT = 1
    """An internal error: an exception that farplug did not expect. Please report it."""
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
    INTERRUPTED = 130
    """Interrupted before a device was plugged in, or left at once, at a Ctrl-C while farplug was leaving."""


class Reason(StrEnum):
    """Why something cannot be done. The values are stable: they stand in ``--json`` output."""

    # usage
    BAD_OPTION = "bad-option"
    BAD_TARGET = "bad-target"
    BAD_VV_FILE = "bad-vv-file"
    # setup
    MISSING_PROGRAM = "missing-program"
    NO_LIBUSB = "no-libusb"
    # images
    NOT_FOUND = "not-found"
    NOT_A_FILE = "not-a-file"
    NO_PERMISSION = "no-permission"
    EMPTY = "empty"
    NOT_AN_ISO = "not-an-iso"
    NOT_RAW = "not-raw"
    IN_USE = "in-use"
    WRONG_FORMAT = "wrong-format"
    WRONG_IMAGE = "wrong-image"
    DAMAGED = "damaged"
    HALF_COMMITTED = "half-committed"
    IO_ERROR = "io-error"
    EXISTS = "exists"
    NO_SPACE = "no-space"
    NOT_A_FOLDER = "not-a-folder"
    BAD_NAME = "bad-name"
    TOO_LARGE = "too-large"
    CHANGED = "changed"
    # reaching a guest
    UNRESOLVABLE = "unresolvable"
    CONNECTION_REFUSED = "connection-refused"
    TIMED_OUT = "timed-out"
    UNREACHABLE = "unreachable"
    PROXY = "proxy"
    NOT_SPICE = "not-spice"
    NEEDS_TLS = "needs-tls"
    TLS_UNTRUSTED = "tls-untrusted"
    TLS_WRONG_HOST = "tls-wrong-host"
    TLS_FAILED = "tls-failed"
    WRONG_PASSWORD = "wrong-password"
    NO_PASSWORD = "no-password"
    LINK_REFUSED = "link-refused"
    # ports
    NO_USBREDIR_CHANNEL = "no-usbredir-channel"
    NO_FREE_PORT = "no-free-port"
    CHANNEL_IN_USE = "channel-in-use"
    # devices
    AMBIGUOUS = "ambiguous"
    HUB = "hub"
    NO_USB = "no-usb"
    NOT_AUTHORIZED = "not-authorized"
    BUSY = "busy"
    KERNEL_DRIVER = "kernel-driver"
    NO_WINUSB = "no-winusb"
    INPUT_DEVICE = "input-device"
    NETWORK_DEVICE = "network-device"
    FILTERED = "filtered"
    REJECTED = "rejected"
    CAPABILITY = "capability"
    DEVICE_LOST = "device-lost"
    DEVICE_FAULT = "device-fault"
    MEDIUM_LOCKED = "medium-locked"
    # while running
    GUEST_GONE = "guest-gone"
    PROTOCOL = "protocol"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    INTERNAL_ERROR = "internal-error"


class FarplugError(Exception):
    """Base of everything farplug raises on purpose.

    Args:
        message: what happened, in one line, without a final full stop.
        reason: what a program acts on.
        remedy: what the person can do about it; may be several lines (commands to copy); empty if there is nothing.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.DEFECT

    def __init__(self, message: str, *, reason: Reason, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.remedy = remedy


class UsageError(FarplugError):
    """An option, a path or a target is written wrong."""

    exit_code = ExitCode.USAGE


class SetupError(FarplugError):
    """Something is missing on this machine."""

    exit_code = ExitCode.SETUP


class ImageError(FarplugError):
    """A disk image cannot be used."""

    exit_code = ExitCode.IMAGE


class DeviceError(FarplugError):
    """A device cannot be used, or broke its own contract."""

    exit_code = ExitCode.DEVICE


class TargetError(FarplugError):
    """The guest cannot be reached. The exit code depends on the stage that failed."""

    @property
    def exit_code(self) -> ExitCode:  # type: ignore[override]
        return _TARGET_EXIT_CODES.get(self.reason, ExitCode.UNREACHABLE)


_TARGET_EXIT_CODES = {
    Reason.NEEDS_TLS: ExitCode.TLS,
    Reason.TLS_UNTRUSTED: ExitCode.TLS,
    Reason.TLS_WRONG_HOST: ExitCode.TLS,
    Reason.TLS_FAILED: ExitCode.TLS,
    Reason.WRONG_PASSWORD: ExitCode.DENIED,
    Reason.NO_PASSWORD: ExitCode.DENIED,
    Reason.NOT_SPICE: ExitCode.PROTOCOL,
}


class PortError(FarplugError):
    """The guest is reached, but it has no port for this device."""

    exit_code = ExitCode.NO_PORT


class RefusedError(FarplugError):
    """The guest refused the device."""

    exit_code = ExitCode.REFUSED


class GuestGoneError(FarplugError):
    """The connection to the guest ended while it was in use."""

    exit_code = ExitCode.GUEST_GONE

    def __init__(self, message: str, *, reason: Reason = Reason.GUEST_GONE, remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)


class InternalError(FarplugError):
    """A bug in farplug: an exception that nobody expected, in a callback of the event loop.

    It is raised where the callback's work is waited for. ``__cause__`` is the exception.
    """

    exit_code = ExitCode.DEFECT

    def __init__(self, cause: BaseException) -> None:
        text = str(cause).partition("\n")[0]
        super().__init__(
            f"internal error: {type(cause).__name__}: {text}",
            reason=Reason.INTERNAL_ERROR,
            remedy="please report it; --debug shows more",
        )
        self.__cause__ = cause


class ProtocolError(FarplugError):
    """Somebody left the protocol."""

    exit_code = ExitCode.PROTOCOL

    def __init__(self, message: str, *, reason: Reason = Reason.PROTOCOL, remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)


class LocalProtocolError(ProtocolError):
    """We were asked to say what the protocol forbids: nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer said what the protocol forbids."""
