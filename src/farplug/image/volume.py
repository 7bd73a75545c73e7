"""The layout of a disk with one partition: format, partition table, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from farplug.errors import ImageError, Reason, UsageError

MIB = 1 << 20
GIB = 1 << 30
ALIGNMENT = MIB
"""Offset of the partition in bytes; its length is a multiple of it, too."""

BLOCK_SIZES = (512, 4096)


class Format(StrEnum):
    """A filesystem."""

    FAT32 = "fat32"
    EXFAT = "exfat"
    EXT4 = "ext4"
    NTFS = "ntfs"
    ISO9660 = "iso9660"

    @property
    def full_name(self) -> str:
        """Return the usual spelling of the name."""
        return _FULL_NAMES[self]

    @property
    def posix(self) -> bool:
        """Return whether it can hold symbolic links, devices and other special files."""
        return self in (Format.EXT4, Format.ISO9660)


_FULL_NAMES = {
    Format.FAT32: "FAT32",
    Format.EXFAT: "exFAT",
    Format.EXT4: "ext4",
    Format.NTFS: "NTFS",
    Format.ISO9660: "ISO 9660",
}


class Partition(StrEnum):
    """A partition table, with one partition."""

    MBR = "mbr"
    GPT = "gpt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A disk with one partition.

    Attributes:
        format: of the partition.
        partition: kind of the partition table.
        label: of the filesystem.
        block_size: of the disk, in bytes.
        length: of the partition, in bytes. It begins at :data:`ALIGNMENT`.
        disk_size: bytes.
    """

    format: Format
    partition: Partition
    label: str
    block_size: int
    length: int
    disk_size: int

    @property
    def cluster_size(self) -> int:
        """Return the bytes in a cluster of the filesystem."""
        return cluster_size(self.format, self.length, self.block_size)


MIN_FAT_CLUSTERS = 65525
"""A volume with fewer clusters is mounted as FAT16 (Microsoft's FAT specification, section 3.5)."""

_SPARE_CLUSTERS = 16
"""Some implementations compute the bound slightly wrong: the specification recommends this distance from it."""

MIN_LENGTH = {Format.EXFAT: 4 * MIB, Format.EXT4: 8 * MIB, Format.NTFS: 8 * MIB}


def cluster_size(format: Format, length: int, block_size: int) -> int:
    """Return the bytes in a cluster of a partition of ``length`` bytes: 4 KiB; in large partitions as on Windows."""
    match format:
        case Format.FAT32:
            if length > 8 * GIB:
                return 8192 if length <= 16 * GIB else 16384 if length <= 32 * GIB else 32768
            size = 4096
            while size > block_size and length < min_fat_length(size):
                size //= 2
            return size
        case Format.EXFAT:
            return 4096 if length <= 256 * MIB else 32768 if length <= 32 * GIB else 131072
        case _:
            return 4096


def min_fat_length(cluster: int) -> int:
    """Return the minimum bytes of a FAT32 partition with this cluster size."""
    return fat_length(0, cluster)


def fat_length(clusters: int, cluster: int) -> int:
    """Return the bytes of a FAT32 partition with n clusters, two tables, reserved blocks, and alignment."""
    count = max(clusters, MIN_FAT_CLUSTERS + _SPARE_CLUSTERS)
    return align_up(count * cluster + 2 * 4 * (count + 2) + 32 * 4096 + 4 * cluster)


def align_up(count: int) -> int:
    """Return a number of bytes rounded up to the alignment."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def largest_disk(format: Format, partition: Partition, block_size: int) -> int:
    """Return the bytes of the largest disk: an MBR and FAT32 have 32-bit block numbers."""
    if partition is Partition.MBR or format is Format.FAT32:
        return (2**32 - 1) * block_size // ALIGNMENT * ALIGNMENT
    return 2**63 // ALIGNMENT * ALIGNMENT - ALIGNMENT


def plan(
    *, format: Format, partition: Partition, label: str, block_size: int, size: int | None, needed: Callable[[int], int]
) -> Volume:
    """Return a volume with its sizes.

    Args:
        format: of the partition.
        partition: kind of the partition table.
        label: a valid label.
        block_size: of the disk.
        size: of the disk, in bytes; None: as large as needed.
        needed: returns the bytes that the content of the partition needs, for a cluster size.

    Raises:
        UsageError: the size is not a multiple of the block size.
        ImageError: TOO_LARGE: for the size or the format; EMPTY: too small for the format.
    """
    tail = ALIGNMENT if partition is Partition.GPT else 0  # the backup table
    if size is None:
        # The cluster size depends on the length, and the length on the cluster size; neither ever shrinks.
        length = min_length(format, block_size)
        while (want := needed(cluster_size(format, length, block_size))) > length:
            length = align_up(want)
        size = ALIGNMENT + length + tail
    elif size % block_size:
        raise UsageError(f"{size} bytes are not a multiple of {block_size}-byte blocks", reason=Reason.BAD_OPTION)
    else:
        length = (size - ALIGNMENT - tail) // ALIGNMENT * ALIGNMENT
        least = min_length(format, block_size)
        if length < least:
            wanted = _format_size(ALIGNMENT + least + tail)
            raise ImageError(
                f"{size} bytes are too small for {format.full_name}: it needs {wanted} at least",
                reason=Reason.EMPTY,
                remedy="make it larger, or use another format",
            )
    most = largest_disk(format, partition, block_size)
    if size > most:
        raise ImageError(
            f"{size} bytes are too large for {format.full_name} and {partition.upper()} in {block_size}-byte blocks: "
            f"{_format_size(most)} at most",
            reason=Reason.TOO_LARGE,
            remedy="use GPT" if format is not Format.FAT32 else "use exFAT and GPT",
        )
    volume = Volume(
        format=format, partition=partition, label=label, block_size=block_size, length=length, disk_size=size
    )
    want = needed(volume.cluster_size)
    if want > length:
        wanted = _format_size(ALIGNMENT + align_up(want) + tail)
        raise ImageError(
            f"the folder needs {wanted} as {format.full_name}, the disk has {_format_size(size)}",
            reason=Reason.TOO_LARGE,
            remedy="make the disk larger; without a size it is as large as needed",
        )
    return volume


def _format_size(size: int) -> str:
    """Return a size as a user writes it: ``34M``, ``2T``; in bytes if it is not a multiple of 1 KiB."""
    for unit, letter in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size % unit == 0 and size:
            return f"{size // unit}{letter}"
    return f"{size} bytes"


def min_length(format: Format, block_size: int) -> int:
    """Return the minimum bytes of a partition."""
    return min_fat_length(block_size) if format is Format.FAT32 else MIN_LENGTH[format]
