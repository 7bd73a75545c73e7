"""With the real libusb: what python-libusb1 hides is where we look for it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any, cast

import pytest
import usb1

from farplug.libusb.direct import Context, set_buffer
from farplug.libusb.library import Library


class Buffer(bytearray):
    """A buffer that a weak reference can watch."""


def memory(transfer: Any) -> bytes:
    """Return what libusb sees as the buffer."""
    structure = transfer._USBTransfer__transfer.contents
    return ctypes.string_at(structure.buffer, structure.length) if structure.length else b""


def test_libusb_gets_the_buffer_itself(transfer: Any) -> None:
    buffer = bytearray(b"abcd")
    set_buffer(transfer, memoryview(buffer)[1:3])
    buffer[1:3] = b"xy"
    assert memory(transfer) == b"xy"
    assert transfer.getBuffer() == b"xy"


def test_a_buffer_that_is_read_only_is_copied(transfer: Any) -> None:
    set_buffer(transfer, b"data")
    assert memory(transfer) == b"data"
    set_buffer(transfer, memoryview(b"datum"))
    assert memory(transfer) == b"datum"


def test_a_transfer_may_have_no_bytes(transfer: Any) -> None:
    set_buffer(transfer, b"data")
    set_buffer(transfer, bytearray())
    structure = transfer._USBTransfer__transfer.contents
    assert (structure.buffer, structure.length) == (None, 0)


def test_a_buffer_is_freed_without_the_garbage_collector(transfer: Any) -> None:
    buffer = Buffer(1 << 20)
    freed = weakref.ref(buffer)
    gc.disable()
    try:
        set_buffer(transfer, buffer)
        del buffer
        assert freed() is not None
        set_buffer(transfer, b"")
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_there_are_no_events_to_handle(context: Any, timeout: float) -> None:
    context.handleEventsTimeout(timeout)


def test_a_context_that_is_closed_has_no_events() -> None:
    context = cast(Any, Library().open_context())
    context.close()
    context.handleEventsTimeout(0)


def test_an_error_of_libusb_is_raised() -> None:
    class Function:
        argtypes: Any = None

        def __call__(self, context: int, time: int) -> int:
            return -10

    context = Context({"libusb_handle_events_timeout": Function()})
    context._USBContext__context_p = 0x1234
    with pytest.raises(usb1.USBErrorInterrupted):
        context.handleEventsTimeout(0)
    context._USBContext__context_p = None
