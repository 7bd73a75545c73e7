"""libusb's functions for bulk streams, which python-libusb1 lacks.

Source: libusb-1.0, "Asynchronous device I/O": libusb_alloc_streams, libusb_free_streams and
libusb_transfer_set_stream_id.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import usb1

from farplug.libusb.binding import UsbHandle, UsbTransfer

_TYPE_BULK_STREAM: Final = 4
"""LIBUSB_TRANSFER_TYPE_BULK_STREAM"""


class BulkStreams:
    """Allocates, frees and assigns bulk streams.

    Args:
        functions: libusb, as ctypes loaded it.
    """

    def __init__(self, functions: Any) -> None:
        endpoints = ctypes.POINTER(ctypes.c_ubyte)
        self._allocate = functions.libusb_alloc_streams
        self._allocate.argtypes = [ctypes.c_void_p, ctypes.c_uint32, endpoints, ctypes.c_int]
        self._free = functions.libusb_free_streams
        self._free.argtypes = [ctypes.c_void_p, endpoints, ctypes.c_int]
        self._set_stream_id = functions.libusb_transfer_set_stream_id
        self._set_stream_id.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._set_stream_id.restype = None

    def allocate(self, handle: UsbHandle, count: int, endpoints: Sequence[int]) -> int:
        """Allocate bulk streams on all of the endpoints. Blocks.

        Returns:
            the number of streams of each endpoint, which may be less than ``count``.

        Raises:
            UsbError: no streams can be allocated.
        """
        return _check(
            self._allocate(_pointer(handle), count, (ctypes.c_ubyte * len(endpoints))(*endpoints), len(endpoints))
        )

    def free(self, handle: UsbHandle, endpoints: Sequence[int]) -> None:
        """Free the streams of the endpoints. Blocks. Raises ``UsbError`` if there are none."""
        _check(self._free(_pointer(handle), (ctypes.c_ubyte * len(endpoints))(*endpoints), len(endpoints)))

    def assign(self, transfer: UsbTransfer, stream_id: int) -> None:
        """Assign a bulk transfer that is not submitted yet to a stream."""
        pointer = _pointer(transfer)
        pointer.contents.type = _TYPE_BULK_STREAM
        self._set_stream_id(pointer, stream_id)


def _pointer(wrapper: UsbHandle | UsbTransfer) -> Any:
    """Return the C pointer in a USBDeviceHandle or a USBTransfer: a private attribute of python-libusb1."""
    names = {usb1.USBDeviceHandle: "_USBDeviceHandle__handle", usb1.USBTransfer: "_USBTransfer__transfer"}
    return getattr(wrapper, names[type(wrapper)])


def _check(result: int) -> int:
    if result < 0:
        raise usb1.STATUS_TO_EXCEPTION_DICT.get(result, usb1.USBError)(result)
    return result
