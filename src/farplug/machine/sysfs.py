"""Files of sysfs, read so that nothing in them is trusted.

Reading some attributes waits for the device (``product``, ``bConfigurationValue``): one that hangs in a reset holds
them up for seconds. So do it in a thread.

What cannot be read is empty: devices come and go. But where nothing can be read, because there are too many open files,
a ``SetupError`` says so: otherwise every device would seem to have been pulled out.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from farplug.errors import TOO_MANY_OPEN_FILES, Reason, SetupError

MAX_ATTRIBUTE = 4096
"""Bytes of an attribute: sysfs has no longer ones, apart from binary files."""


def read_bytes(path: Path, limit: int = MAX_ATTRIBUTE) -> bytes:
    """The content of a file, up to ``limit`` bytes; empty if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        check(error)
        return b""
    except ValueError:  # a NUL in a name
        return b""
    try:
        with open(descriptor, "rb") as file:
            return file.read(limit) or b""
    except OSError:  # the device has left meanwhile
        return b""


def read(path: Path) -> str:
    """The text of an attribute without white space around it; empty if it cannot be read."""
    return read_bytes(path).decode(errors="replace").strip()


def number(path: Path, base: int = 10) -> int | None:
    """The number that an attribute holds; None if there is none."""
    return parse_number(read(path), base)


def parse_number(text: str, base: int = 10) -> int | None:
    """A number without a sign, of at most 9 digits; None if it is none."""
    if not text.isascii() or not text.isalnum() or len(text) > 9:
        return None
    try:
        return int(text, base)
    except ValueError:
        return None


def listed(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        check(error)
        return []


def check(error: OSError) -> None:
    """Raise the ``SetupError`` if an error is one of :data:`TOO_MANY_OPEN_FILES`."""
    if error.errno in TOO_MANY_OPEN_FILES:
        whose = "this process" if error.errno == errno.EMFILE else "this machine"
        raise SetupError(
            f"the USB devices cannot be looked at: {whose} has too many open files",
            reason=Reason.IO_ERROR,
            remedy=fewer_open_files(error),
        ) from error


def fewer_open_files(error: OSError) -> str:
    """What helps against one of :data:`TOO_MANY_OPEN_FILES`."""
    return "close some, or allow more: ulimit -n 4096" if error.errno == errno.EMFILE else "close some"


def on_windows() -> bool:
    """Whether this machine runs Windows, which has no sysfs: :mod:`~farplug.machine.windows` asks libusb instead."""
    return sys.platform == "win32"


def bus_and_address(folder: Path) -> tuple[int, int] | None:
    """The number of the bus and the address of a USB device, by its folder; None if it has just left.

    While a port is being reset, Linux tells the address 0 (``hub_port_reset``). The number of the device's node, which
    is ``(bus - 1) * 128 + address - 1``, holds as long as the device is plugged in (``usb_new_device``).
    """
    bus, address = number(folder / "busnum"), number(folder / "devnum")
    if bus is None or address is None:
        # Not otherwise: this is done for each device at each look, and some kernels lock a device to tell its uevent.
        event = dict(line.partition("=")[::2] for line in read(folder / "uevent").splitlines())
        bus = parse_number(event.get("BUSNUM", "")) if bus is None else bus
        address = parse_number(event.get("DEVNUM", "")) if address is None else address
    if not address:
        minor = parse_number(read(folder / "dev").partition(":")[2])
        address = None if minor is None else minor % 128 + 1
    return None if bus is None or address is None else (bus, address)
