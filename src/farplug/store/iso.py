"""A store in an image of a CD or DVD: opened for reading, and only if it is one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from farplug.errors import ImageError, Reason
from farplug.store.file import FileStore

log = logging.getLogger(__name__)

CD_BLOCK_SIZE = 2048
MAX_CD_BLOCKS = 2**32 - 1
"""A drive tells the size of a disc and of its track in 32 bits (MMC-3, READ CAPACITY and READ TRACK INFORMATION)."""

_FIRST_DESCRIPTOR, _DESCRIPTORS = 16, 16
"""Blocks where volume descriptors stand (ECMA-119, chapter 6.7.1; ECMA-167, 2/8.3), as far as we look."""

_IDENTIFIERS = (b"CD001", b"BEA01", b"NSR02", b"NSR03")
"""ISO 9660, and UDF."""

_COMPRESSED = "it is compressed: unpack it first"
_CONVERTIBLE = "convert it first: qemu-img convert -O raw {path} disk.raw, and plug that as a disk: --usb-disk disk.raw"

_SIGNATURES = (
    (0, b"QFI\xfb", "a qcow2 image", _CONVERTIBLE),
    (0, b"KDMV", "a VMDK image", _CONVERTIBLE),
    (0, b"vhdxfile", "a VHDX image", _CONVERTIBLE),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image", _CONVERTIBLE),
    (0, b"\x1f\x8b", "gzip data", _COMPRESSED),
    (0, b"\xfd7zXZ\0", "xz data", _COMPRESSED),
    (0, b"BZh", "bzip2 data", _COMPRESSED),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", _COMPRESSED),
    (0, b"PK\x03\x04", "a zip archive", _COMPRESSED),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _COMPRESSED),
    (
        0,
        b"\0" + b"\xff" * 10 + b"\0",
        "a raw copy of a CD, of 2352-byte sectors",
        "make an ISO of it, for example: bchunk {path} FILE.cue name",
    ),
    (512, b"EFI PART", "a disk image with a GPT", "plug it as a disk: --usb-disk {path}"),
    (510, b"\x55\xaa", "a disk image with an MBR or a FAT volume", "plug it as a disk: --usb-disk {path}"),
)
"""What else it may look like: where, the bytes, its name, what to do."""


def open_iso(path: str | os.PathLike[str]) -> FileStore:
    """Open and lock an ISO image, or a block device that has one, for reading. Its blocks have 2048 bytes.

    Raises:
        ImageError: NOT_AN_ISO, TOO_LARGE, or as :meth:`FileStore.open`.
    """
    path = Path(path)
    begin, size = _begin(path)
    if begin is not None and not is_iso(begin):
        raise _not_an_iso(path, begin)
    if size // CD_BLOCK_SIZE > MAX_CD_BLOCKS:
        raise ImageError(
            f"{path} has {size // CD_BLOCK_SIZE} blocks, a CD-ROM drive counts to {MAX_CD_BLOCKS}",
            reason=Reason.TOO_LARGE,
            remedy=f"plug it as a disk: --usb-disk-ro {path}",
        )
    store = FileStore.open(path, read_only=True, block_size=CD_BLOCK_SIZE)
    if begin is not None and (blocks := _volume_size(begin)) > store.block_count:
        log.warning("%s has %d blocks, but its volume has %d: it is cut off", path, store.block_count, blocks)
    return store


def is_iso(begin: bytes) -> bool:
    """Tell whether an image that begins like this is one of ISO 9660 or UDF. 64 KiB are enough."""
    blocks = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + _DESCRIPTORS)
    return any(begin[block * CD_BLOCK_SIZE + 1 : block * CD_BLOCK_SIZE + 6] in _IDENTIFIERS for block in blocks)


def _volume_size(begin: bytes) -> int:
    """Blocks, as the primary volume descriptor says (ECMA-119, chapter 8.4); 0 if it is not where it is to be."""
    descriptor = begin[_FIRST_DESCRIPTOR * CD_BLOCK_SIZE :][:CD_BLOCK_SIZE]
    return int.from_bytes(descriptor[80:84], "little") if descriptor.startswith(b"\1CD001") else 0


def _begin(path: Path) -> tuple[bytes | None, int]:
    """Read as much of it as tells what it is, and its size; None and 0 if not: opening it as a store says why."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for its other end
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None, 0
    try:
        return os.pread(fd, (_FIRST_DESCRIPTOR + _DESCRIPTORS) * CD_BLOCK_SIZE, 0), os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return None, 0
    finally:
        os.close(fd)


def _not_an_iso(path: Path, begin: bytes) -> ImageError:
    for offset, signature, name, remedy in _SIGNATURES:
        if begin.startswith(signature, offset):
            return ImageError(
                f"{path} is no ISO image: it looks like {name}",
                reason=Reason.NOT_AN_ISO,
                remedy=remedy.format(path=path),
            )
    if len(begin) <= _FIRST_DESCRIPTOR * CD_BLOCK_SIZE:
        what, remedy = f"it has {len(begin)} bytes", "check that it was copied or downloaded whole"
    else:
        what = "it has no volume of ISO 9660 or UDF"
        remedy = f"if it is the image of a disk, plug it as one: --usb-disk {path}"
    return ImageError(f"{path} is no ISO image: {what}", reason=Reason.NOT_AN_ISO, remedy=remedy)
