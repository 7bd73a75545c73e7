"""libusb: finds and loads the library, once.

python-libusb1 has no types; :mod:`~farplug.libusb.binding` has those of the part that farplug uses.

Source: libusb-1.0's documentation (https://libusb.sourceforge.io/api-1.0/).
"""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final, cast

import libusb_package
import usb1

from farplug.errors import Reason, Remedy, SetupError
from farplug.libusb.binding import UsbContext, UsbDevice
from farplug.libusb.bulk_streams import BulkStreams
from farplug.libusb.direct import Context, set_buffer
from farplug.usb.transfer import Status
from farplug.usb.types import Speed

UsbError: Final[type[Exception]] = usb1.USBError
"""The base class of libusb's errors."""
AccessDenied: Final[type[Exception]] = usb1.USBErrorAccess
Busy: Final[type[Exception]] = usb1.USBErrorBusy
Interrupted: Final[type[Exception]] = usb1.USBErrorInterrupted
NoDevice: Final[type[Exception]] = usb1.USBErrorNoDevice
NoMemory: Final[type[Exception]] = usb1.USBErrorNoMem
NotFound: Final[type[Exception]] = usb1.USBErrorNotFound
NotSupported: Final[type[Exception]] = usb1.USBErrorNotSupported
InvalidParameter: Final[type[Exception]] = usb1.USBErrorInvalidParam

TRANSFER_NO_DEVICE: Final[int] = usb1.TRANSFER_NO_DEVICE

_STATUS: Final = {
    usb1.TRANSFER_COMPLETED: Status.SUCCESS,
    usb1.TRANSFER_ERROR: Status.IO_ERROR,
    usb1.TRANSFER_TIMED_OUT: Status.TIMEOUT,
    usb1.TRANSFER_CANCELLED: Status.CANCELLED,
    usb1.TRANSFER_STALL: Status.STALL,
    usb1.TRANSFER_NO_DEVICE: Status.IO_ERROR,
    usb1.TRANSFER_OVERFLOW: Status.BABBLE,
    -errno.EXDEV: Status.SUCCESS,  # of a packet: Linux could move only a part of it in its interval
}

_SPEED: Final = {
    usb1.SPEED_LOW: Speed.LOW,
    usb1.SPEED_FULL: Speed.FULL,
    usb1.SPEED_HIGH: Speed.HIGH,
    usb1.SPEED_SUPER: Speed.SUPER,
    usb1.SPEED_SUPER_PLUS: Speed.SUPER_PLUS,
    usb1.SPEED_SUPER_PLUS_X2: Speed.SUPER_PLUS,
}

_SYSTEM_LIBRARY: Final = {"win32": "libusb-1.0.dll", "darwin": "libusb-1.0.0.dylib"}


def transfer_status(code: int) -> Status:
    """Return the status for libusb's code of a transfer or an isochronous packet.

    On Linux a packet may have a negative error number of the kernel instead: an I/O error.
    """
    return _STATUS.get(code, Status.IO_ERROR)


def speed_of(code: int) -> Speed:
    """Return a device's speed; an unknown one is full speed, as in QEMU."""
    return _SPEED.get(code, Speed.FULL)


@cache
def _load() -> ctypes.CDLL:
    kind = getattr(ctypes, "WinDLL", ctypes.CDLL)
    names = [_SYSTEM_LIBRARY.get(sys.platform, "libusb-1.0.so.0"), libusb_package.get_library_path()]
    errors: list[str] = []
    for name in names:
        if name is None:
            continue
        try:
            library = kind(str(name), use_errno=True, use_last_error=True)
            usb1.loadLibrary(library)
        except (OSError, AttributeError) as error:  # AttributeError: libusb is too old
            errors.append(str(error))
        else:
            return library
    raise SetupError(
        f"libusb-1.0 cannot be loaded: {'; '.join(errors)}",
        reason=Reason.NO_LIBUSB,
        remedy=Remedy(
            "install libusb with one of these commands",
            command="sudo apt install libusb-1.0-0  # Debian, Ubuntu\n"
            "sudo dnf install libusb1  # Fedora\n"
            "pip install --force-reinstall libusb-package",
        ),
    )


class Library:
    """The loaded libusb.

    Attributes:
        bulk_streams: libusb's functions for bulk streams.
        set_buffer: sets the buffer of a bulk or interrupt transfer, see :func:`~farplug.libusb.direct.set_buffer`.

    Raises:
        SetupError: neither the system nor the package libusb-package has libusb (``NO_LIBUSB``).
    """

    def __init__(self) -> None:
        self._functions = _load()
        self.bulk_streams = BulkStreams(self._functions)
        self.set_buffer = set_buffer

    def open_context(self) -> UsbContext:
        """Return a new context of libusb; the caller closes it. libusb lists the devices, which may block.

        Raises:
            SetupError: libusb cannot work on this machine (``NO_LIBUSB``).
        """
        context = Context(self._functions)
        try:
            context.open()
        except UsbError as error:
            raise SetupError(
                f"libusb cannot be used on this machine: {error}",
                reason=Reason.NO_LIBUSB,
                remedy="make USB available: in a container, mount /dev/bus/usb and /sys/bus/usb",
            ) from error
        return cast(UsbContext, context)

    @contextmanager
    def devices(self) -> Iterator[list[UsbDevice]]:
        """Yield the devices of the machine, which are valid in the ``with`` block. May block.

        Raises:
            SetupError: libusb cannot work on this machine (``NO_LIBUSB``).
        """
        context = self.open_context()
        try:
            yield list(context.getDeviceIterator(skip_on_error=True))
        finally:
            context.close()
