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
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

TIMEOUT = 60_000
"""Milliseconds for a transfer, unless the operation ``timeout`` chose another number: a busy machine needs seconds."""

_WRITE, _READ = 1, 2
_USBDEVFS = ord("U")


def _ioctl_number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _USBDEVFS << 8 | number


CONTROL = _ioctl_number(_READ | _WRITE, 0, 24)
BULK = _ioctl_number(_READ | _WRITE, 2, 24)
SET_INTERFACE = _ioctl_number(_READ, 4, 8)
SET_CONFIGURATION = _ioctl_number(_READ, 5, 4)
SUBMIT_URB = _ioctl_number(_READ, 10, 56)
REAP_URB = _ioctl_number(_WRITE, 12, 8)
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


URB = struct.Struct("<BBxxiIxxxxQiiiiiIQ")
"""usbdevfs_urb without its packets: type, endpoint, status, flags, buffer, length, actual length, start frame, packets,
errors, signal, context."""
PACKET = struct.Struct("<III")
"""usbdevfs_iso_packet_desc: length, actual length, status."""
ISOCHRONOUS, ISO_ASAP = 0, 2

_LIBC = ctypes.CDLL(None, use_errno=True)


class Isochronous:
    """One URB of isochronous packets."""

    def __init__(self, file: int, endpoint: int, lengths: list[int], data: bytes) -> None:
        self._file, self._endpoint, self._lengths = file, endpoint, lengths
        self._data = ctypes.create_string_buffer(data, max(len(data), sum(lengths)))
        self._urb = ctypes.create_string_buffer(URB.size + len(lengths) * PACKET.size)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._urb)

    def submit(self) -> None:
        count, total = len(self._lengths), sum(self._lengths)
        buffer = ctypes.addressof(self._data)
        URB.pack_into(
            self._urb, 0, ISOCHRONOUS, self._endpoint, 0, ISO_ASAP, buffer, total, 0, 0, count, 0, 0, self.address
        )
        for number, length in enumerate(self._lengths):
            PACKET.pack_into(self._urb, URB.size + number * PACKET.size, length, 0, 0)
        # The kernel keeps its address, and fcntl.ioctl() would hand it a copy's.
        if _LIBC.ioctl(self._file, ctypes.c_ulong(SUBMIT_URB), self._urb) < 0:
            raise OSError(ctypes.get_errno(), "no URB is taken")

    def packets(self) -> list[bytes]:
        """Return the data of each packet; empty for a failed packet."""
        arrived, offset = [], 0
        for length, actual, status in PACKET.iter_unpack(self._urb.raw[URB.size :]):
            arrived.append(self._data.raw[offset : offset + actual] if status == 0 else b"")
            offset += length
        return arrived


class Device:
    """An open device. Its methods are the operations: they return the data that arrived, and raise OSError."""

    def __init__(self, node: str) -> None:
        self._file = os.open(node, os.O_RDWR)
        self._threads = ThreadPoolExecutor()
        self._begun: list[Future[str]] = []
        self._timeout = TIMEOUT

    def timeout(self, milliseconds: int) -> bytes:
        """Choose the timeout of the transfers that follow."""
        self._timeout = milliseconds
        return b""

    def control(self, setup: str, data: str = "") -> bytes:
        """A control transfer: the setup packet, and the data stage if it goes out."""
        packet, sent = bytes.fromhex(setup), bytes.fromhex(data)
        length = int.from_bytes(packet[6:8], "little")
        buffer = ctypes.create_string_buffer(sent, max(length, len(sent), 1))
        request = struct.pack("<8sIxxxxQ", packet, self._timeout, ctypes.addressof(buffer))
        moved = fcntl.ioctl(self._file, CONTROL, bytearray(request))
        return buffer.raw[:moved] if packet[0] & 0x80 else b""

    def send(self, endpoint: int, data: str) -> bytes:
        """A bulk transfer out."""
        sent = bytes.fromhex(data)
        moved = self._bulk(endpoint, ctypes.create_string_buffer(sent, max(len(sent), 1)), len(sent))
        assert moved == len(sent), f"{moved} of {len(sent)} bytes were taken"
        return b""

    def receive(self, endpoint: int, length: int) -> bytes:
        """Make a bulk IN transfer of at most ``length`` bytes."""
        buffer = ctypes.create_string_buffer(max(length, 1))
        moved = self._bulk(endpoint, buffer, length)
        return buffer.raw[:moved]

    def listen(self, endpoint: int, size: int, packets: int, urbs: int, count: int) -> bytes:
        """Read at least ``count`` isochronous packets of at most ``size`` bytes, ``packets`` in each of ``urbs`` URBs.

        Returns:
            each packet after its length in two bytes. Empty packets do not count.
        """
        arrived: list[bytes] = []

        def back(urb: Isochronous) -> Isochronous | None:
            arrived.extend(filter(None, urb.packets()))
            return urb if len(arrived) < count else None

        self._stream([Isochronous(self._file, endpoint, [size] * packets, b"") for _ in range(urbs)], back)
        return b"".join(struct.pack("<H", len(packet)) + packet for packet in arrived)

    def play(self, endpoint: int, packets: int, urbs: int, *data: str) -> bytes:
        """Write isochronous packets, ``packets`` in each URB, with ``urbs`` URBs in flight."""
        sent = [bytes.fromhex(packet) for packet in data]
        parts = (sent[start : start + packets] for start in range(0, len(sent), packets))
        waiting = (Isochronous(self._file, endpoint, list(map(len, part)), b"".join(part)) for part in parts)
        self._stream(list(islice(waiting, urbs)), lambda _: next(waiting, None))
        return b""

    def _stream(self, urbs: list[Isochronous], back: Callable[[Isochronous], Isochronous | None]) -> None:
        """Submit URBs, and for each completed URB the one that ``back`` returns."""
        in_flight: dict[int, Isochronous] = {}

        def submit(urb: Isochronous) -> None:
            in_flight[urb.address] = urb
            urb.submit()

        for urb in urbs:
            submit(urb)
        while in_flight:
            address = ctypes.c_uint64()
            fcntl.ioctl(self._file, REAP_URB, address)
            following = back(in_flight.pop(address.value))
            if following is not None:
                submit(following)

    def begin(self, name: str, *arguments: Any) -> bytes:
        """Start an operation in parallel to those that follow; :meth:`join` waits for it."""
        self._begun.append(self._threads.submit(result, getattr(self, name), list(arguments)))
        time.sleep(0.2)  # the device has the transfer then
        return b""

    def join(self) -> bytes:
        """Return the results of all operations of :meth:`begin`, as this script writes them."""
        results = [future.result() for future in self._begun]
        self._begun.clear()
        return json.dumps(results).encode()

    def drain(self, endpoint: int, length: int, path: str) -> bytes:
        """Read bulk transfers of ``length`` bytes until a file exists."""
        while not os.path.exists(path):
            arrived = len(self.receive(endpoint, length))
            assert arrived == length, f"{arrived} of {length} bytes"
        return b""

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
        request = struct.pack("<IIIxxxxQ", endpoint, length, self._timeout, ctypes.addressof(buffer))
        return int(fcntl.ioctl(self._file, BULK, bytearray(request)))

    def _of_interface(self, interface: int, number: int, data: int = 0) -> bytes:
        return self._simple(IOCTL, struct.pack("<iiQ", interface, ctypes.c_int32(number).value, data))

    def _simple(self, number: int, argument: bytes = b"") -> bytes:
        fcntl.ioctl(self._file, number, bytearray(argument) if argument else 0)
        return b""


def result(operation: Callable[..., bytes], arguments: list[Any]) -> str:
    """Run an operation, and return its data or the name of its error."""
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
