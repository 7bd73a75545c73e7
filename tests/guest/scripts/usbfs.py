"""Runs in the guest: drives a USB device through usbfs, past all drivers (Linux, include/uapi/linux/usbdevice_fs.h).

``usbfs.py NODE`` reads a JSON list of operations, does one after the other, and writes a JSON list of their results:
the bytes that arrived in hexadecimal, or the name of the error (EPIPE is a stall).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

TIMEOUT = 5000
"""Milliseconds."""

_WRITE, _READ = 1, 2
_USBDEVFS = ord("U")


def _ioctl_number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _USBDEVFS << 8 | number


CONTROL = _ioctl_number(_READ | _WRITE, 0, 24)
BULK = _ioctl_number(_READ | _WRITE, 2, 24)
SET_INTERFACE = _ioctl_number(_READ, 4, 8)
SET_CONFIGURATION = _ioctl_number(_READ, 5, 4)
CLAIM_INTERFACE = _ioctl_number(_READ, 15, 4)
RELEASE_INTERFACE = _ioctl_number(_READ, 16, 4)
IOCTL = _ioctl_number(_READ | _WRITE, 18, 16)
RESET = _ioctl_number(0, 20, 0)
CLEAR_HALT = _ioctl_number(_READ, 21, 4)
DISCONNECT = _ioctl_number(0, 22, 0)
CONNECT = _ioctl_number(0, 23, 0)

USBTEST = struct.Struct("<IIIIIxxxxqq")
"""usbtest_param_64 (Linux, drivers/usb/misc/usbtest.c): test, iterations, length, vary, sglen, duration."""
USBTEST_REQUEST = _ioctl_number(_READ | _WRITE, 100, USBTEST.size)


class Device:
    """An open device. The operations are its methods: they return what arrived, and raise OSError."""

    def __init__(self, node: str) -> None:
        self._file = os.open(node, os.O_RDWR)

    def control(self, setup: str, data: str = "") -> bytes:
        """A control transfer: the setup packet, and the data stage if it goes out."""
        packet, sent = bytes.fromhex(setup), bytes.fromhex(data)
        length = int.from_bytes(packet[6:8], "little")
        buffer = ctypes.create_string_buffer(sent, max(length, len(sent), 1))
        request = struct.pack("<8sIxxxxQ", packet, TIMEOUT, ctypes.addressof(buffer))
        moved = fcntl.ioctl(self._file, CONTROL, bytearray(request))
        return buffer.raw[:moved] if packet[0] & 0x80 else b""

    def send(self, endpoint: int, data: str) -> bytes:
        """A bulk transfer out."""
        sent = bytes.fromhex(data)
        moved = self._bulk(endpoint, ctypes.create_string_buffer(sent, max(len(sent), 1)), len(sent))
        assert moved == len(sent), f"{moved} of {len(sent)} bytes were taken"
        return b""

    def receive(self, endpoint: int, length: int) -> bytes:
        """A bulk transfer in, of so many bytes at most."""
        buffer = ctypes.create_string_buffer(max(length, 1))
        moved = self._bulk(endpoint, buffer, length)
        return buffer.raw[:moved]

    def clear_halt(self, endpoint: int) -> bytes:
        """CLEAR_FEATURE(ENDPOINT_HALT), and the host controller starts the endpoint afresh."""
        return self._simple(CLEAR_HALT, struct.pack("<I", endpoint))

    def reset(self) -> bytes:
        """A port reset; the kernel chooses the configuration again."""
        return self._simple(RESET)

    def claim(self, interface: int) -> bytes:
        """Claim an interface that no driver has."""
        return self._simple(CLAIM_INTERFACE, struct.pack("<I", interface))

    def release(self, interface: int) -> bytes:
        """Give an interface back."""
        return self._simple(RELEASE_INTERFACE, struct.pack("<I", interface))

    def set_interface(self, interface: int, alternate: int) -> bytes:
        """Choose an alternate setting."""
        return self._simple(SET_INTERFACE, struct.pack("<II", interface, alternate))

    def set_configuration(self, value: int) -> bytes:
        """Choose a configuration; 0 for none."""
        return self._simple(SET_CONFIGURATION, struct.pack("<I", value))

    def detach(self, interface: int) -> bytes:
        """Take an interface from its kernel driver."""
        return self._of_interface(interface, DISCONNECT)

    def attach(self, interface: int) -> bytes:
        """Let a kernel driver bind to an interface."""
        return self._of_interface(interface, CONNECT)

    def usbtest(self, interface: int, test: int, iterations: int, length: int, vary: int, sglen: int) -> bytes:
        """Run a test case of the kernel's usbtest driver, which is bound to the interface."""
        buffer = ctypes.create_string_buffer(USBTEST.pack(test, iterations, length, vary, sglen, 0, 0))
        return self._of_interface(interface, USBTEST_REQUEST, ctypes.addressof(buffer))

    def _bulk(self, endpoint: int, buffer: ctypes.Array[ctypes.c_char], length: int) -> int:
        request = struct.pack("<IIIxxxxQ", endpoint, length, TIMEOUT, ctypes.addressof(buffer))
        return int(fcntl.ioctl(self._file, BULK, bytearray(request)))

    def _of_interface(self, interface: int, number: int, data: int = 0) -> bytes:
        return self._simple(IOCTL, struct.pack("<iiQ", interface, ctypes.c_int32(number).value, data))

    def _simple(self, number: int, argument: bytes = b"") -> bytes:
        fcntl.ioctl(self._file, number, bytearray(argument) if argument else 0)
        return b""


def result(operation: Callable[..., bytes], arguments: list[Any]) -> str:
    """What an operation came to."""
    try:
        return operation(*arguments).hex()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def main() -> None:
    """Do what standard input says."""
    device = Device(sys.argv[1])
    results = [result(getattr(device, name), arguments) for name, *arguments in json.load(sys.stdin)]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
