"""Exceptions that farplug raises.

::

    FarplugError
    ├── UsageError              an option, a path or a target is not valid
    │   ├── WrongOffset         a piece of an upload begins at a wrong place (farplug.web.uploads)
    │   └── BadValue            a value of JSON is not what a field takes (farplug.app.codec)
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
    │   ├── GuestMoved          the VM migrated to another host (farplug.transport.moved)
    │   └── GuestCrashed        the QEMU of the throw-away guest ended by itself (farplug.vm.qemu)
    ├── SessionError            a running session reported an error
    ├── InternalError           a bug in farplug, in a callback of the event loop
    └── ProtocolError           a protocol was violated
        ├── LocalProtocolError  the caller asked to send something the protocol does not allow
        └── RemoteProtocolError the peer sent something the protocol does not allow

Each exception has a message of one line, a :class:`Reason` for programs, and a :class:`Remedy` if there is one. A wrong
argument raises ``ValueError``. Any other exception is a bug, like :class:`InternalError`.
"""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from typing import Any, Self, TypeVar


class Reason(StrEnum):
    """The reason of an error. The values are stable: they are part of JSON output."""

    # usage
    BAD_SETTING = "bad-setting"
    BAD_OPTION = "bad-option"
    UNKNOWN_COMMAND = "unknown-command"
    BAD_KEY = "bad-key"
    BAD_TARGET = "bad-target"
    BAD_VV_FILE = "bad-vv-file"
    # setup
    MISSING_PROGRAM = "missing-program"
    NO_LIBUSB = "no-libusb"
    UNSUPPORTED_SYSTEM = "unsupported-system"
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
    TARGET_COMMAND = "target-command"
    NOT_SPICE = "not-spice"
    NEEDS_TLS = "needs-tls"
    TLS_UNTRUSTED = "tls-untrusted"
    TLS_WRONG_HOST = "tls-wrong-host"
    TLS_FAILED = "tls-failed"
    WRONG_PASSWORD = "wrong-password"
    NO_PASSWORD = "no-password"
    CHANNEL_DENIED = "channel-denied"
    LINK_REFUSED = "link-refused"
    KUBECONFIG = "kubeconfig"
    CREDENTIALS = "credentials"
    FORBIDDEN = "forbidden"
    API_ERROR = "api-error"
    # screen and inputs
    NO_DISPLAY = "no-display"
    NO_TEXT = "no-text"
    NO_INPUTS = "no-inputs"
    NO_TABLET = "no-tablet"
    NOT_DRIVING = "not-driving"
    UNCONFIRMED = "unconfirmed"
    NO_PROMPT = "no-prompt"
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
    NOT_ASKED = "not-asked"
    # sessions
    NO_SESSION = "no-session"
    NAME_TAKEN = "name-taken"
    SESSION_GONE = "session-gone"
    SESSION_ERROR = "session-error"
    # the page
    VIEW_ONLY = "view-only"
    OUTSIDE_WEB_ROOT = "outside-web-root"
    # agents
    NOT_ALLOWED = "not-allowed"
    SCREEN_CHANGED = "screen-changed"
    # while running
    GUEST_GONE = "guest-gone"
    GUEST_MOVED = "guest-moved"
    TAKEN_OVER = "taken-over"
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
        command: a shell command to copy, or several, one a line; empty: none. It comes before the setting.
        alternative: another remedy, which helps without this one.
    """

    __slots__ = ("alternative", "command", "setting", "value")

    setting: str
    value: str | int | bool | None
    command: str
    alternative: Remedy | None

    def __new__(
        cls,
        text: str = "",
        *,
        setting: str = "",
        value: str | int | bool | None = None,
        command: str = "",
        alternative: Remedy | None = None,
    ) -> Self:
        """Make the text."""
        remedy = super().__new__(cls, text)
        remedy.setting, remedy.value, remedy.command, remedy.alternative = setting, value, command, alternative
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
        if self.alternative is not None:
            data["alternative"] = self.alternative.as_dict()
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


class SessionError(FarplugError):
    """A running session reported an error: what a command of it failed with.

    Attributes:
        exit_code: of a command that ends with this error, as the session reported it.
    """

    def __init__(self, message: str, *, reason: Reason, exit_code: int, remedy: str = "") -> None:
        super().__init__(message, reason=reason, remedy=remedy)
        self.exit_code = exit_code


MAX_CAUSE = 1000
"""Characters of an unexpected exception in the message of an :class:`InternalError`."""


class InternalError(FarplugError):
    """A bug in farplug: an unexpected exception in a callback of the event loop.

    It is raised to the caller that waits for the callback's result. ``__cause__`` is the unexpected exception.
    """

    def __init__(self, cause: BaseException) -> None:
        text = str(cause)[:MAX_CAUSE].partition("\n")[0]
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
    """The caller asked to send something that the protocol does not allow. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow."""


TOO_MANY_OPEN_FILES = (errno.EMFILE, errno.ENFILE)
"""Errors about limits of this process and this machine, not about what was to be opened."""


def open_files_remedy(error: OSError) -> Remedy:
    """Return the remedy for one of :data:`TOO_MANY_OPEN_FILES`."""
    if error.errno == errno.EMFILE:
        return Remedy("close some files, or allow more", command="ulimit -n 4096")
    return Remedy("close some files")


_REASON_OF_ERRNO = {
    errno.ENOENT: Reason.NOT_FOUND,
    errno.ENOTDIR: Reason.NOT_FOUND,
    errno.ELOOP: Reason.NOT_FOUND,
    errno.ENAMETOOLONG: Reason.NOT_FOUND,
    errno.EACCES: Reason.NO_PERMISSION,
    errno.EPERM: Reason.NO_PERMISSION,
    errno.EROFS: Reason.NO_PERMISSION,
    errno.ETXTBSY: Reason.IN_USE,
    errno.EBUSY: Reason.IN_USE,
    errno.EEXIST: Reason.EXISTS,
    errno.EISDIR: Reason.NOT_A_FILE,
    errno.ENXIO: Reason.NOT_A_FILE,
    errno.ENOSPC: Reason.NO_SPACE,
    errno.EDQUOT: Reason.NO_SPACE,
}

_REMEDY_OF_REASON = {
    Reason.NOT_FOUND: "check the path",
    Reason.NO_PERMISSION: "check the permissions of the file and of its folder",
    Reason.NOT_A_FILE: "name a file",
}

_ErrorT = TypeVar("_ErrorT", bound=FarplugError)


def missing_file_remedy(path: str | os.PathLike[str]) -> str:
    """Return the remedy for a path that does not exist: no shell has replaced a ~ in quotes, or after a =."""
    if os.fspath(path).startswith("~"):
        return "write the path of the home folder in place of ~: a shell replaces it only at the beginning of a word"
    return _REMEDY_OF_REASON[Reason.NOT_FOUND]


def from_oserror(
    path: str | os.PathLike[str],
    error: OSError | ValueError,
    *,
    as_: type[_ErrorT],
    problem: str = "cannot be opened",
    remedy: str = "",
) -> _ErrorT:
    """Return the error for a system call on a file that failed. Its reason follows from ``errno``.

    Args:
        path: of the file, for the message.
        error: what Python raised; a ``ValueError``: the path has a NUL character.
        as_: the class of the error to return.
        problem: what failed, for the message: "cannot be opened".
        remedy: what the user can do; empty: what helps against the reason, if anything does.
    """
    if isinstance(error, ValueError):
        message, reason = f"{os.fspath(path)!r} is not a valid path", Reason.NOT_FOUND
    else:
        message = f"{os.fspath(path)} {problem}: {(error.strerror or str(error)).lower()}"
        reason = _REASON_OF_ERRNO.get(error.errno or 0, Reason.IO_ERROR)
    if not remedy:
        remedy = missing_file_remedy(path) if reason is Reason.NOT_FOUND else _REMEDY_OF_REASON.get(reason, "")
    return as_(message, reason=reason, remedy=remedy)
