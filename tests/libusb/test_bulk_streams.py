from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import pytest
import usb1

from farplug.libusb.binding import UsbHandle
from farplug.libusb.bulk_streams import BulkStreams
from farplug.libusb.library import Library


class Function:
    """A function of libusb's that writes down how it was called."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.calls: list[tuple[Any, ...]] = []
        self.argtypes: Sequence[type] = ()
        self.restype: type | None = ctypes.c_int

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        self.calls.append(tuple(list(one) if isinstance(one, ctypes.Array) else one for one in arguments))
        return self.result


class Functions:
    def __init__(self, result: int = 0) -> None:
        self.libusb_alloc_streams = Function(result)
        self.libusb_free_streams = Function(result)
        self.libusb_transfer_set_stream_id = Function()


def handle() -> UsbHandle:
    opened = object.__new__(usb1.USBDeviceHandle)
    opened._USBDeviceHandle__handle = 0x1234
    return cast(UsbHandle, opened)


def test_streams_are_allocated_and_freed() -> None:
    functions = Functions(16)
    streams, device = BulkStreams(functions), handle()
    assert streams.allocate(device, 16, [0x81, 0x02]) == 16
    streams.free(device, [0x81])
    assert functions.libusb_alloc_streams.calls == [(0x1234, 16, [0x81, 0x02], 2)]
    assert functions.libusb_free_streams.calls == [(0x1234, [0x81], 1)]


@pytest.mark.parametrize(
    ("code", "error"), [(-5, usb1.USBErrorNotFound), (-12, usb1.USBErrorNotSupported), (-77, usb1.USBError)]
)
def test_errors_are_libusbs(code: int, error: type[Exception]) -> None:
    streams = BulkStreams(Functions(code))
    with pytest.raises(error):
        streams.allocate(handle(), 2, [0x81])
    with pytest.raises(error):
        streams.free(handle(), [0x81])


def test_a_transfer_becomes_one_of_a_stream_until_it_is_set_again(transfer: Any) -> None:
    """With the real libusb: that the pointers which python-libusb1 hides are where we look for them."""
    library = Library()
    transfer.setBulk(0x81, bytearray(8))
    library.bulk_streams.assign(transfer, 7)
    get = library.bulk_streams._set_stream_id.__class__(("libusb_transfer_get_stream_id", _library()))
    get.argtypes = [ctypes.c_void_p]
    get.restype = ctypes.c_uint32
    assert transfer.getType() == 4
    assert get(transfer._USBTransfer__transfer) == 7
    transfer.setBulk(0x81, bytearray(8))
    assert transfer.getType() == usb1.TRANSFER_TYPE_BULK


def _library() -> ctypes.CDLL:
    from farplug.libusb.library import _load

    return _load()
