"""Show a folder as a disk."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from farplug.errors import ImageError, Reason
from farplug.image.build import build_disk, no_progress, plan_volume, read_folder
from farplug.image.names import MAX_FAT_FILE
from farplug.image.tools import ImageBuild, unsupported_error
from farplug.image.tree import scan, show
from farplug.image.volume import Format, Partition
from farplug.store.base import ProgressCallback
from farplug.store.file import FileStore
from farplug.store.image import serial_number

log = logging.getLogger(__name__)


def folder_store(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    partition: Partition = Partition.MBR,
    label: str | None = None,
    block_size: int = 512,
    free: int = 0,
    progress: ProgressCallback = no_progress,
) -> FileStore:
    """Copy a folder into a temporary disk image, and open that read-only. Blocks until it is complete.

    It is read-only because writes of the guest would not change the folder. The image is sparse and has no name: it is
    in the folder for temporary files (TMPDIR), and is lost when the store is closed or farplug ends, in whatever way.
    The disk's serial number is derived from the folder's path: it stays the same when the content changes.

    exFAT, NTFS, and FAT32 with some names are made in the throw-away QEMU guest.

    Args:
        path: of the folder.
        format: of the filesystem, any but ISO 9660; None: FAT32, or exFAT if a file is too large for FAT32.
        partition: the partition table.
        label: of the volume; None: derived from the folder's name.
        block_size: of the disk, 512 or 4096 bytes.
        free: minimum free space of the volume, in bytes.
        progress: called with the progress.

    Raises:
        UsageError: an argument is not valid.
        SetupError: a program is missing.
        ImageError: TOO_LARGE, BAD_NAME, CHANGED, NO_SPACE, or the folder cannot be used.
    """
    if sys.platform != "linux":
        raise unsupported_error(Path(path))
    if format is None:
        format = _choose_format(path, progress)
    tree = read_folder(path, format, progress)
    volume = plan_volume(
        tree, format=format, partition=partition, label=label, block_size=block_size, size=None, free=free
    )
    place = tempfile.gettempdir()
    try:
        image = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
    except OSError as error:
        raise ImageError(
            f"no image can be created in {place}: {(error.strerror or str(error)).lower()}",
            reason=Reason.IO_ERROR,
            remedy="set TMPDIR to another folder for temporary files",
        ) from error
    with image:
        build_disk(ImageBuild(image.fileno(), tree, progress), volume, place)
        store = FileStore.open(f"/proc/self/fd/{image.fileno()}", read_only=True, block_size=block_size)
    store.path = Path(path)
    store.name = str(path)
    store.serial_number = serial_number(tree.root)
    return store


def _choose_format(path: str | os.PathLike[str], progress: ProgressCallback) -> Format:
    """Return FAT32, which every system reads, if every file fits; otherwise exFAT."""
    large = [entry for entry in scan(path, tick=lambda: progress(0, 0)).entries if entry.size > MAX_FAT_FILE]
    if not large:
        return Format.FAT32
    log.warning(
        "%s: the disk is exFAT: %s has %d bytes, a file on FAT32 at most %d",
        *(path, show(large[0].path), large[0].size, MAX_FAT_FILE),
    )
    return Format.EXFAT
