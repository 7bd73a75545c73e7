"""Exceptions that farplug raises.

::

    FarplugError
    ├── UsageError              an option, a path or a target is not valid
    ├── SetupError              a program, a package or a permission is missing on this machine
    ├── ImageError              a disk image cannot be used
    ├── DeviceError             a device cannot be used, or violated the contract of a device
    │   └── CommandFailed       a command in the throw-away guest failed (farplug.vm.agent)
    ├── TargetError             the guest cannot be reached
    │   ├── LinkFailure         the SPICE link failed (farplug.spice.link)
    │   └── GuestTimeout        the throw-away guest did not respond in time (farplug.vm.agent)
    ├── PortError               the guest has no free port for the device
    ├── RefusedError            the guest refused the device
    │   └── QmpError            QEMU refused a QMP command (farplug.vm.qmp)
    ├── StateError              a call that is not possible now, such as plugging a device twice
    ├── GuestGoneError          the connection to the guest ended while it was in use
    │   └── GuestCrashed        the QEMU of the throw-away guest ended by itself (farplug.vm.qemu)
    ├── InternalError           a bug in farplug, in a callback of the event loop
    └── ProtocolError           a protocol was violated
        ├── LocalProtocolError  the caller asked to send something the protocol does not allow
        └── RemoteProtocolError the peer sent something the protocol does not allow

Each exception has a message of one line, a :class:`Reason` for programs, and a :class:`Remedy` if there is one. A wrong
argument is a ``ValueError``. Any other exception is a bug, like :class:`InternalError`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self


class Reason(StrEnum):
    """The reason of an error. The values are stable: they are part of JSON output."""

    # usage
    BAD_SETTING = "bad-setting"
    BAD_OPTION = "bad-option"
    UNKNOWN_COMMAND = "unknown-command"
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
    WRONG_STATE = "wrong-state"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    INTERNAL_ERROR = "internal-error"


class Remedy(str):
    """Advice to the user about an error: text, and optionally a setting or a command that a client can offer.

    The text does not name options of the command line or buttons of a page: a client makes these from ``setting``.

    Args:
        text: one or more lines of text.
        setting: name of a setting in :mod:`farplug.app.settings` that solves the problem; empty: none.
        value: value for the setting; None: the user chooses one.
        command: a shell command to copy; empty: none.
    """

    __slots__ = ("command", "setting", "value")

    setting: str
    value: str | int | bool | None
    command: str

    def __new__(
        cls, text: str = "", *, setting: str = "", value: str | int | bool | None = None, command: str = ""
    ) -> Self:
        """Make the text."""
        remedy = super().__new__(cls, text)
        remedy.setting, remedy.value, remedy.command = setting, value, command
        return remedy

    def __bool__(self) -> bool:
        return bool(len(self) or self.setting or self.command)

    def as_dict(self) -> dict[str, Any]:
        """Return the remedy as JSON types: ``remedy``, and ``setting``, ``value`` and ``command`` if they are set."""
        data: dict[str, Any] = {"remedy": str(self)}
        if self.setting:
            data |= {"setting": self.setting, "value": self.value}
        if self.command:
            data["command"] = self.command
        return data


class FarplugError(Exception):
    """Base class of farplug's exceptions.

    Args:
        message: what happened, in one line, without a final full stop.
        reason: the reason, for programs.
        remedy: advice to the user; empty: none.
    """

    def __init__(self, message: str, *, reason: Reason, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.remedy = remedy if isinstance(remedy, Remedy) else Remedy(remedy)

    def as_dict(self) -> dict[str, Any]:
        """Return the error as JSON types: ``reason``, ``message``, and the fields of :meth:`Remedy.as_dict`."""
        return {"reason": str(self.reason), "message": self.message, **self.remedy.as_dict()}


class UsageError(FarplugError):
    """An option, a path or a target is not valid."""


class SetupError(FarplugError):
    """A program, a package or a permission is missing on this machine."""


class ImageError(FarplugError):
    """A disk image cannot be used."""


class DeviceError(FarplugError):
    """A device cannot be used, or violated the contract of :class:`~farplug.usb.device.Device`."""


class TargetError(FarplugError):
    """The guest cannot be reached. The reason gives the stage that failed."""


class PortError(FarplugError):
    """The guest is reached, but has no free port for the device."""


class RefusedError(FarplugError):
    """The guest refused the device."""


class StateError(FarplugError):
    """A call that is not possible in the present state: the caller's mistake."""

    def __init__(self, message: str, *, reason: Reason = Reason.WRONG_STATE, remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)


class GuestGoneError(FarplugError):
    """The connection to the guest ended while it was in use."""

    def __init__(self, message: str, *, reason: Reason = Reason.GUEST_GONE, remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)


class InternalError(FarplugError):
    """A bug in farplug: an unexpected exception in a callback of the event loop.

    It is raised to the caller that waits for the callback's result. ``__cause__`` is the unexpected exception.
    """

    def __init__(self, cause: BaseException) -> None:
        text = str(cause).partition("\n")[0]
        super().__init__(
            f"internal error: {type(cause).__name__}: {text}",
            reason=Reason.INTERNAL_ERROR,
            remedy=Remedy("please report this bug, with the debug log", setting="debug", value=True),
        )
        self.__cause__ = cause


class ProtocolError(FarplugError):
    """A protocol was violated."""

    def __init__(self, message: str, *, reason: Reason = Reason.PROTOCOL, remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)


class LocalProtocolError(ProtocolError):
    """The caller asked to send something the protocol does not allow. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol does not allow."""
