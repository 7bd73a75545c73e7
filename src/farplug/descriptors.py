"""Blocking calls on file descriptors."""

from __future__ import annotations

import os

from farplug.usb.types import Buffer


def write_all(descriptor: int, data: Buffer) -> None:
    """Write all of ``data``: the system may take a part at a time. Raise ``OSError`` as :func:`os.write`."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
