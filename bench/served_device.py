"""Redirect the first USB device that libusb lists: farplug's side of ``bench/native.py``, in a process of its own.

``python bench/served_device.py PORT``: the port of 127.0.0.1 where the guest listens. libusb is loaded as always: the
bench puts its own first.
"""

from __future__ import annotations

import asyncio
import sys

from farplug.errors import FarplugError
from farplug.libusb.library import Library
from farplug.physical import physical_device
from farplug.redirection import Redirection
from farplug.transport.connection import TcpAddress
from farplug.transport.stream import StreamPort


async def _serve(port: int) -> None:
    library = Library()
    with library.devices() as devices:
        device = physical_device(devices[0], library=library)
    redirection = Redirection(StreamPort(TcpAddress("127.0.0.1", port)))
    await redirection.open()
    await redirection.attach(device)
    await redirection.closed()


if __name__ == "__main__":
    try:
        asyncio.run(_serve(int(sys.argv[1])))
    except FarplugError as error:
        sys.exit(f"served_device: {error}")
