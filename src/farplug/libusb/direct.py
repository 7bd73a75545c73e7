"""The calls of libusb that each transfer needs, without what python-libusb1 adds to them.

Measured with ``bench/native.py``: a command of a disk that reads 1 MiB takes half of the processor time.

Source: libusb-1.0, "Asynchronous device I/O": libusb_transfer, libusb_handle_events_timeout.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import usb1

from farplug.libusb.binding import UsbHandle, UsbTransfer
from farplug.usb.types import Buffer

_first_byte: Final = ctypes.c_char.from_buffer


def pointer(wrapper: UsbHandle | UsbTransfer) -> Any:
    """Return the C pointer in a USBDeviceHandle or a USBTransfer: a private attribute of python-libusb1."""
    names = {usb1.USBDeviceHandle: "_USBDeviceHandle__handle", usb1.USBTransfer: "_USBTransfer__transfer"}
    return getattr(wrapper, names[type(wrapper)])


def check(result: int) -> int:
    """Return the result of a function of libusb. Raise ``UsbError`` if it is negative."""
    if result < 0:
        raise usb1.STATUS_TO_EXCEPTION_DICT.get(result, usb1.USBError)(result)
    return result


def set_buffer(transfer: UsbTransfer, buffer: Buffer) -> None:
    """Set the buffer of a bulk or interrupt transfer that is not submitted. A buffer that is read-only is copied.

    ``USBTransfer.setBuffer`` does the same with ``ctypes.cast``, which makes a reference cycle of each buffer: only the
    garbage collector would free it, after dozens of transfers of 1 MiB. And ctypes keeps a type for each length.
    """
    structure = transfer._USBTransfer__transfer.contents  # type: ignore[attr-defined]
    if memoryview(buffer).readonly:
        buffer = bytearray(buffer)
    first = _first_byte(buffer) if buffer else None
    structure.buffer = None if first is None else ctypes.addressof(first)
    structure.length = len(buffer)
    transfer._USBTransfer__transfer_buffer = first  # type: ignore[attr-defined]
    transfer._USBTransfer__transfer_py_buffer = buffer  # type: ignore[attr-defined]


class Context(usb1.USBContext):  # type: ignore[misc]
    """A context of libusb that handles pending events with a single call.

    Args:
        functions: libusb, as ctypes loaded it.
    """

    def __init__(self, functions: Any) -> None:
        super().__init__()
        self._handle_events = functions["libusb_handle_events_timeout"]
        self._handle_events.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._no_time = usb1.libusb1.timeval(0, 0)
        self._now = ctypes.addressof(self._no_time)

    def handleEventsTimeout(self, tv: float = 0) -> None:
        """Handle events. Raises ``UsbError``.

        Args:
            tv: seconds to wait for an event. 0: only those that are pending, without the locks by which python-libusb1
                lets another thread close the context meanwhile. So no other thread may.
        """
        if tv:
            super().handleEventsTimeout(tv)
        elif context := self._USBContext__context_p:
            check(self._handle_events(context, self._now))
