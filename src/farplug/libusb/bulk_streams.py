"""libusb's functions for bulk streams, which python-libusb1 lacks.

Source: libusb-1.0, "Asynchronous device I/O": libusb_alloc_streams, libusb_free_streams and
libusb_transfer_set_stream_id.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from farplug.libusb.binding import UsbHandle, UsbTransfer
from farplug.libusb.direct import check, pointer

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
        return check(
            self._allocate(pointer(handle), count, (ctypes.c_ubyte * len(endpoints))(*endpoints), len(endpoints))
        )

    def free(self, handle: UsbHandle, endpoints: Sequence[int]) -> None:
        """Free the streams of the endpoints. Blocks. Raises ``UsbError`` if there are none."""
        check(self._free(pointer(handle), (ctypes.c_ubyte * len(endpoints))(*endpoints), len(endpoints)))

    def assign(self, transfer: UsbTransfer, stream_id: int) -> None:
        """Assign a bulk transfer that is not submitted yet to a stream."""
        structure = pointer(transfer)
        structure.contents.type = _TYPE_BULK_STREAM
        self._set_stream_id(structure, stream_id)
