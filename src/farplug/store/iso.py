"""A store in an image of a CD or DVD, read-only."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from farplug.errors import ImageError, Reason, Remedy
from farplug.store.content import CD_BLOCK_SIZE, Content, recognize
from farplug.store.file import FileStore
from farplug.store.image import force_remedy

log = logging.getLogger(__name__)

MAX_ISO_BLOCKS = 2**32 - 1
"""READ CAPACITY and READ TRACK INFORMATION of a CD-ROM drive have 32 bits for the number of blocks (MMC-3)."""

_PRIMARY_DESCRIPTOR = 16 * CD_BLOCK_SIZE
"""Offset of the primary volume descriptor (ECMA-119, chapter 6.7.1)."""


def open_iso(path: str | os.PathLike[str], *, force: bool = False) -> FileStore:
    """Open and lock an ISO image, in a file or a block device, for reading. Its blocks have 2048 bytes.

    Args:
        path: of the image.
        force: as in :meth:`Image.open`; also open an image without a volume of ISO 9660, High Sierra or UDF.

    Raises:
        ImageError: NOT_AN_ISO, TOO_LARGE, or as :meth:`FileStore.open`.
    """
    volume_blocks = 0

    def check(path: Path, content: Content) -> None:
        nonlocal volume_blocks
        check_iso(path, content)
        volume_blocks = _volume_size(content)

    path = Path(path)
    store = FileStore.open(path, read_only=True, block_size=CD_BLOCK_SIZE, force=force, check=check)
    try:
        check_iso_size(path, store.block_count)
    except ImageError:
        store.abandon()
        raise
    if volume_blocks > store.block_count:
        log.warning("%s is truncated: it has %d of the %d blocks of its volume", path, store.block_count, volume_blocks)
    return store


def _volume_size(content: Content) -> int:
    """Return the number of blocks of the primary volume (ECMA-119, chapter 8.4.8); 0: there is no volume."""
    has_volume = content.has(b"\1CD001", _PRIMARY_DESCRIPTOR)
    return content.little_endian(_PRIMARY_DESCRIPTOR + 80, 4) if has_volume else 0


def check_iso_size(path: Path, block_count: int) -> None:
    """Check that a CD-ROM drive has enough blocks for an image.

    Raises:
        ImageError: TOO_LARGE.
    """
    if block_count > MAX_ISO_BLOCKS:
        raise ImageError(
            f"{path} has {block_count} blocks, a CD-ROM drive {MAX_ISO_BLOCKS} at most",
            reason=Reason.TOO_LARGE,
            remedy=Remedy("plug it in as a disk", setting="usb_disk_ro", value=str(path)),
        )


def check_iso(path: Path, content: Content) -> None:
    """Check that a file is an image of a CD.

    Raises:
        ImageError: NOT_AN_ISO.
    """
    if content.is_cd:
        return
    force = force_remedy("to plug its bytes as a CD")
    message = f"{path} is {{}}, not an ISO image"
    remedy = Remedy("plug it in as a disk", setting="usb_disk", value=str(path), alternative=force)
    if (format := recognize(content)) is not None:
        message = message.format(format.name)
        remedy = format.remedy(path, content, "usb_cdrom", force)
    elif content.size <= _PRIMARY_DESCRIPTOR:
        message = f"{path} is too short for an ISO image ({content.size} bytes)"
        remedy = Remedy("check that it was copied or downloaded completely", alternative=force)
    elif any(content.has(b"EFI PART", block_size) for block_size in (512, 4096)):
        message = message.format("a disk image with a GPT")
    elif content.has_mbr:
        message = message.format("a disk image with an MBR or a FAT volume")
    elif _is_apple(content):
        message = message.format("an image with a partition map or volume of Apple")
    else:
        message = f"{path} is not an ISO image: it has no volume of ISO 9660 or UDF"
        remedy = Remedy("if it is the image of a disk", setting="usb_disk", value=str(path), alternative=force)
    raise ImageError(message, reason=Reason.NOT_AN_ISO, remedy=remedy)


def _is_apple(content: Content) -> bool:
    """Check for a partition map (Inside Macintosh: Devices, chapter 3), or a volume of HFS or HFS Plus (TN1150)."""
    map = content.has(b"ER") and any(content.has(b"PM\0\0", block_size) for block_size in (512, CD_BLOCK_SIZE))
    return map or any(content.has(signature, 1024) for signature in (b"BD", b"H+\0\4", b"HX\0\5"))
