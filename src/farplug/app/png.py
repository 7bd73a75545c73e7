"""PNG files of BGRX pixels. Source: the PNG specification (ISO/IEC 15948), sections 5 and 11."""

from __future__ import annotations

import os
import secrets
import stat
import struct
import zlib
from contextlib import suppress

from farplug.errors import Reason, UsageError, from_oserror

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 3
"""Of zlib: for a console the file is small and made in some 20 ms; higher levels only take longer."""


def encode_png(width: int, height: int, pixels: bytes | memoryview) -> bytes:
    """Return a PNG file of ``width * height`` BGRX pixels: 8 bits a colour, RGB, no filter."""
    row = 3 * width
    colours = bytearray(row * height)
    for target, source in ((0, 2), (1, 1), (2, 0)):
        colours[target::3] = pixels[source::4]
    packer = zlib.compressobj(LEVEL)
    packed = bytearray()
    for start in range(0, len(colours), row):
        packed += packer.compress(b"\0" + colours[start : start + row])
    packed += packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", bytes(packed)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def check_path(path: str) -> None:
    """Check that a path can become a PNG file: there is no file, an empty one, or a PNG file.

    Raises:
        UsageError: there is something else, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path} is not a file", reason=Reason.NOT_A_FILE, remedy="name a new file")
        with open(path, "rb") as file:
            first = file.read(len(SIGNATURE))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise from_oserror(path, error, as_=UsageError) from error
    if first not in (b"", SIGNATURE):
        raise UsageError(
            f"{path} exists, and is not a PNG file", reason=Reason.WRONG_FORMAT, remedy="name a new file, or remove it"
        )


def write_png(path: str, data: bytes) -> None:
    """Write a PNG file, in place of one that is there; a reader finds the old one or the new one.

    Raises:
        UsageError: the file cannot be written, or there is something else.
    """
    check_path(path)
    target = os.path.realpath(path)
    new = f"{target}.{secrets.token_hex(4)}"
    try:
        with open(new, "xb") as file:
            file.write(data)
        os.replace(new, target)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.unlink(new)
        raise from_oserror(path, error, as_=UsageError, problem="cannot be written") from error
