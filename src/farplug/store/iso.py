"""A store in an image of a CD or DVD: opened for reading, and only if it is one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from farplug.errors import ImageError, Reason
from farplug.shell import shell_word
from farplug.store.content import CD_BLOCK_SIZE, Content, recognize
from farplug.store.file import FileStore

log = logging.getLogger(__name__)

MAX_ISO_BLOCKS = 2**32 - 1
"""A drive tells the size of a disc and of its track in 32 bits (MMC-3, READ CAPACITY and READ TRACK INFORMATION)."""

_PRIMARY_DESCRIPTOR = 16 * CD_BLOCK_SIZE
"""Where the primary volume descriptor is (ECMA-119, chapter 6.7.1)."""


def open_iso(path: str | os.PathLike[str], *, force: bool = False) -> FileStore:
    """Open and lock an image of a CD, or a block device that has one, for reading. Its blocks have 2048 bytes.

    Args:
        path: of the image.
        force: as :meth:`Image.open`: also without a volume of ISO 9660, High Sierra or UDF.

    Raises:
        ImageError: NOT_AN_ISO, TOO_LARGE, or as :meth:`FileStore.open`.
    """
    volume_blocks = 0

    def check(path: Path, content: Content) -> None:
        nonlocal volume_blocks
        _check_iso(path, content)
        volume_blocks = _volume_size(content)

    path = Path(path)
    store = FileStore.open(path, read_only=True, block_size=CD_BLOCK_SIZE, force=force, check=check)
    if store.block_count > MAX_ISO_BLOCKS:
        store.abandon()
        raise ImageError(
            f"{path} has {store.block_count} blocks, a CD-ROM drive counts to {MAX_ISO_BLOCKS}",
            reason=Reason.TOO_LARGE,
            remedy=f"plug it as a disk: --usb-disk-ro {shell_word(path)}",
        )
    if volume_blocks > store.block_count:
        log.warning("%s has %d blocks, but its volume has %d: it is cut off", path, store.block_count, volume_blocks)
    return store


def _volume_size(content: Content) -> int:
    """Return the blocks of the primary volume (ECMA-119, chapter 8.4.8); 0 if there is none."""
    has_volume = content.has(b"\1CD001", _PRIMARY_DESCRIPTOR)
    return content.little_endian(_PRIMARY_DESCRIPTOR + 80, 4) if has_volume else 0


def _check_iso(path: Path, content: Content) -> None:
    if content.is_cd:
        return
    message = f"{path} is {{}}, not an ISO image"
    remedy = f"plug it as a disk: --usb-disk {shell_word(path)}"
    if (format := recognize(content)) is not None:
        message = message.format(format.name)
        remedy = format.remedy_for(path, content, "--usb-cdrom")
    elif content.size <= _PRIMARY_DESCRIPTOR:
        message = f"{path} is too short for an ISO image ({content.size} bytes)"
        remedy = "check that it was copied or downloaded whole"
    elif any(content.has(b"EFI PART", block_size) for block_size in (512, 4096)):
        message = message.format("a disk image with a GPT")
    elif content.has_mbr:
        message = message.format("a disk image with an MBR or a FAT volume")
    elif _is_apple(content):
        message = message.format("an image with a partition map or volume of Apple")
    else:
        message = f"{path} is not an ISO image: it has no volume of ISO 9660 or UDF"
        remedy = f"if it is the image of a disk: --usb-disk {shell_word(path)}"
    raise ImageError(message, reason=Reason.NOT_AN_ISO, remedy=f"{remedy}\nto plug its bytes as a CD: --force")


def _is_apple(content: Content) -> bool:
    """Check for a partition map (Inside Macintosh: Devices, chapter 3), or a volume of HFS or HFS Plus (TN1150)."""
    map = content.has(b"ER") and any(content.has(b"PM\0\0", block_size) for block_size in (512, CD_BLOCK_SIZE))
    return map or any(content.has(signature, 1024) for signature in (b"BD", b"H+\0\4", b"HX\0\5"))
