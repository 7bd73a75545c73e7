"""Files of sysfs, read so that nothing in them is trusted.

The kernel locks the device to read some attributes (``product``, ``bConfigurationValue``): a device that hangs in a
reset blocks the reader for seconds. So read them in a thread.

A file that cannot be read counts as empty, because a device may be unplugged at any time. But too many open files raise
a ``SetupError``: otherwise every device would seem to be unplugged.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from farplug.errors import TOO_MANY_OPEN_FILES, Reason, SetupError, open_files_remedy

MAX_ATTRIBUTE = 4096
"""Bytes of an attribute in sysfs, apart from binary files."""


def read_bytes(path: Path, limit: int = MAX_ATTRIBUTE) -> bytes:
    """Return the content of a file, up to ``limit`` bytes; empty if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise_if_too_many_open(error)
        return b""
    except ValueError:  # a NUL in a name
        return b""
    try:
        with open(descriptor, "rb") as file:
            return file.read(limit) or b""
    except OSError:  # the device was unplugged meanwhile
        return b""


def read(path: Path) -> str:
    """Return the text of an attribute without white space around it; empty if it cannot be read."""
    return read_bytes(path).decode(errors="replace").strip()


def number(path: Path, base: int = 10) -> int | None:
    """Return the number that an attribute holds; None if there is none."""
    return parse_number(read(path), base)


def parse_number(text: str, base: int = 10) -> int | None:
    """Parse a number without a sign, of at most 9 digits; return None if the text is not such a number."""
    if not text.isascii() or not text.isalnum() or len(text) > 9:
        return None
    try:
        return int(text, base)
    except ValueError:
        return None


def list_folder(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted; none if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise_if_too_many_open(error)
        return []


def raise_if_too_many_open(error: OSError) -> None:
    """Raise a ``SetupError`` if an error is one of :data:`TOO_MANY_OPEN_FILES`."""
    if error.errno in TOO_MANY_OPEN_FILES:
        whose = "this process" if error.errno == errno.EMFILE else "this machine"
        raise SetupError(
            f"the USB devices cannot be listed: {whose} has too many open files",
            reason=Reason.IO_ERROR,
            remedy=open_files_remedy(error),
        ) from error


def on_windows() -> bool:
    """Return whether this machine runs Windows, where :mod:`~farplug.machine.windows` replaces sysfs."""
    return sys.platform == "win32"


def bus_and_address(folder: Path) -> tuple[int, int] | None:
    """Return bus number and address of a USB device, by its folder; None if it was just unplugged.

    While a port is being reset, ``devnum`` is 0 (Linux, ``hub_port_reset``). The minor number of the device's node,
    ``(bus - 1) * 128 + address - 1``, holds as long as the device is plugged in (``usb_new_device``).
    """
    bus, address = number(folder / "busnum"), number(folder / "devnum")
    if bus is None or address is None:
        # Only then: this runs for each device at each look, and some kernels lock a device to show its uevent.
        event = dict(line.partition("=")[::2] for line in read(folder / "uevent").split("\n"))
        bus = parse_number(event.get("BUSNUM", "")) if bus is None else bus
        address = parse_number(event.get("DEVNUM", "")) if address is None else address
    if not address:
        minor = parse_number(read(folder / "dev").partition(":")[2])
        address = None if minor is None else minor % 128 + 1
    return None if bus is None or address is None else (bus, address)
