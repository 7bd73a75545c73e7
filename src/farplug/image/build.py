"""Build a complete image."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farplug.errors import ImageError, Reason, UsageError, from_oserror
from farplug.image import filesystems
from farplug.image.fill import fill_in_guest
from farplug.image.names import check_label, check_names, joliet_changes, label_from_name
from farplug.image.tools import ImageBuild, check_room, no_space_error, unsupported_error
from farplug.image.tree import Tree, check_unchanged, describe_left_out, scan, settle, summarize
from farplug.image.volume import BLOCK_SIZES, Format, Partition, Volume, plan
from farplug.store.base import ProgressCallback

log = logging.getLogger(__name__)

_METADATA_ROOM = 8 << 20
"""Bytes of space that an image needs on this machine besides its content."""

DEFAULT_LABEL = "FARPLUG"


def no_progress(done: int, total: int) -> None:
    """Ignore the progress."""


def create_image(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    format: Format = Format.FAT32,
    partition: Partition = Partition.MBR,
    folder: str | os.PathLike[str] | None = None,
    label: str | None = None,
    block_size: int = 512,
    progress: ProgressCallback = no_progress,
) -> Volume:
    """Make a sparse RAW image with one partition, and copy a folder into it. Blocks until it is complete.

    The image gets its name at the end: a failure leaves no image behind, and neither does a kill of farplug (where the
    file system has files without a name, O_TMPFILE).

    exFAT, NTFS, and FAT32 with some names are made in the throw-away QEMU guest.

    Args:
        path: of the image; it must not exist.
        size: of the disk, in bytes; None: as large as the folder needs.
        format: of the filesystem, any but ISO 9660.
        partition: the partition table.
        folder: the folder to copy; None: nothing.
        label: of the volume; None: derived from the folder's name.
        block_size: of the disk, 512 or 4096 bytes.
        progress: called with the progress.

    Raises:
        UsageError: an argument is not valid.
        SetupError: a program is missing.
        ImageError: EXISTS, TOO_LARGE, BAD_NAME, CHANGED, NO_SPACE, or the folder or the path cannot be used.
    """
    if size is None and folder is None:
        raise UsageError("an image without a folder needs a size", reason=Reason.BAD_OPTION)
    path = Path(path)
    _check_path(path, folder)
    tree = read_folder(folder, format, progress) if folder is not None else None
    volume = plan_volume(
        tree, format=format, partition=partition, label=label, block_size=block_size, size=size, free=0
    )
    with new_file(path, private=folder is not None) as fd:
        build_disk(ImageBuild(fd, tree, progress), volume, str(path.parent))
    return volume


def create_iso(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    label: str | None = None,
    progress: ProgressCallback = no_progress,
) -> None:
    """Make an ISO 9660 image of a folder, with Rock Ridge and Joliet names. Blocks until it is complete.

    Args:
        path: of the image; it must not exist.
        folder: the folder to copy.
        label: of the volume; None: derived from the folder's name.
        progress: called with the progress.

    Raises:
        UsageError: the label is not valid.
        SetupError: xorriso is missing.
        ImageError: as :func:`create_image`.
    """
    path = Path(path)
    _check_path(path, folder)
    tree = read_folder(folder, Format.ISO9660, progress)
    name = choose_label(label, tree, Format.ISO9660)
    if changes := joliet_changes(tree):
        log.warning("%s: Windows will show these with other names: %s", folder, summarize(changes))
    with new_file(path, private=True) as fd:
        check_room(fd, tree.size + _METADATA_ROOM, str(path.parent))
        build = ImageBuild(fd, tree, progress)
        with copying(build, posix=True):
            filesystems.make_iso(build, name)


def read_folder(folder: str | os.PathLike[str], format: Format, progress: ProgressCallback) -> Tree:
    """Scan a folder and check that the format can hold it. Log a warning for entries that are left out."""
    tree = scan(folder, posix=format.posix, tick=lambda: progress(0, 0))
    check_names(tree, format)
    for line in describe_left_out(tree):
        log.warning("%s: %s", folder, line)
    return tree


def choose_label(label: str | None, tree: Tree | None, format: Format) -> str:
    """Return the requested label, or one derived from the folder's name."""
    if label is not None:
        return check_label(label, format)
    return label_from_name(tree.root.name, format) if tree is not None else DEFAULT_LABEL


def plan_volume(
    tree: Tree | None,
    *,
    format: Format,
    partition: Partition,
    label: str | None,
    block_size: int,
    size: int | None,
    free: int,
) -> Volume:
    """Return the label and the sizes of a volume for a tree, with ``free`` bytes of free space.

    Raises:
        UsageError: an argument is not valid.
        ImageError: TOO_LARGE or EMPTY.
    """
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"{block_size} is not a valid block size: 512 or 4096 bytes", reason=Reason.BAD_OPTION)
    if format is Format.ISO9660:
        raise UsageError("ISO 9660 has no partitions", reason=Reason.BAD_OPTION)

    def needed(cluster: int) -> int:
        if tree is None:
            return 0
        match format:
            case Format.FAT32:
                return filesystems.fat32_needs(tree, cluster) + free
            case Format.EXFAT:
                return filesystems.exfat_needs(tree, cluster) + free
            case Format.NTFS:
                return filesystems.ntfs_needs(tree, cluster) + free
            case _:
                return filesystems.ext4_needs(tree) + free

    return plan(
        format=format,
        partition=partition,
        label=choose_label(label, tree, format),
        block_size=block_size,
        size=size,
        needed=needed,
    )


def build_disk(build: ImageBuild, volume: Volume, place: str) -> None:
    """Make the partition table and the filesystem in an empty file, and copy the tree.

    Raises:
        SetupError: a program is missing.
        ImageError: the disk cannot be made.
    """
    check_room(build.fd, build.total + _METADATA_ROOM, place)
    build.report_progress()
    try:
        os.ftruncate(build.fd, volume.disk_size)
    except OSError as error:
        raise ImageError(
            f"a file of {volume.disk_size} bytes cannot be created in {place}: {(error.strerror or '').lower()}",
            reason=Reason.TOO_LARGE if error.errno in (errno.EFBIG, errno.EINVAL) else Reason.IO_ERROR,
        ) from error
    filesystems.write_table(build, volume)
    with copying(build, posix=volume.format.posix):
        match volume.format:
            case Format.FAT32:
                filesystems.format_fat32(build, volume)
                if build.tree is not None and filesystems.mtools_can_write(build.tree, volume.cluster_size):
                    filesystems.copy_with_mtools(build, build.tree)
                elif build.tree is not None:
                    fill_in_guest(build, volume)
            case Format.EXT4:
                filesystems.make_ext4(build, volume)
            case _:
                fill_in_guest(build, volume)


@contextmanager
def copying(build: ImageBuild, *, posix: bool) -> Iterator[None]:
    """Check after the block that the folder has not changed: also if copying failed, because that may be the cause.

    Raises:
        ImageError: CHANGED.
    """
    if build.tree is not None:
        settle(build.tree)
    try:
        yield
    except ImageError:
        if build.tree is not None:
            check_unchanged(build.tree, posix=posix)
        raise
    if build.tree is not None:
        check_unchanged(build.tree, posix=posix, tick=build.report_progress)
    build.progress(build.total, build.total)


def _check_path(path: Path, folder: str | os.PathLike[str] | None) -> None:
    if sys.platform != "linux":
        raise unsupported_error(path)
    if os.path.lexists(path):
        raise _exists_error(path)
    if folder is not None and path.parent.resolve().is_relative_to(Path(folder).resolve()):
        raise ImageError(
            f"{path} is inside the folder that is copied",
            reason=Reason.BAD_OPTION,
            remedy="put the image into another folder",
        )


def _exists_error(path: Path) -> ImageError:
    remedy = "remove it, or choose another name: nothing is overwritten"
    return ImageError(f"{path} already exists", reason=Reason.EXISTS, remedy=remedy)


@contextmanager
def new_file(path: Path, *, private: bool = False) -> Iterator[int]:
    """Create a file, yield its descriptor, and name the file after the block; if the block raises, remove the file.

    Args:
        path: of the file.
        private: only its owner may read the file, for any umask.

    Raises:
        ImageError: EXISTS, the file cannot be created, or not on this system (``UNSUPPORTED_SYSTEM``).
    """
    if sys.platform != "linux":
        raise unsupported_error(path)
    flags, mode = os.O_RDWR | os.O_CLOEXEC, 0o600 if private else 0o666
    named = False
    try:
        try:
            fd = os.open(path.parent, flags | os.O_TMPFILE, mode)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)  # a file system without O_TMPFILE
            named = True
    except OSError as error:
        raise _create_error(path, error) from error
    try:
        yield fd
        try:
            os.fsync(fd)
            if not named:
                # With a folder's descriptor Python calls linkat(2), which can follow the link in /proc.
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        except OSError as error:
            raise _create_error(path, error) from error
    except BaseException:
        if named:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _create_error(path: Path, error: OSError) -> ImageError:
    if error.errno == errno.EEXIST:
        return _exists_error(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space_error(f"{path}: {(error.strerror or '').lower()}")
    return from_oserror(path, error, as_=ImageError, problem="cannot be created")
