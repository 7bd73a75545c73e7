from __future__ import annotations

from itertools import product

import pytest

from farplug.errors import ImageError, Reason, UsageError
from farplug.image.volume import (
    BLOCK_SIZES,
    GIB,
    MIB,
    MIN_FAT_CLUSTERS,
    Format,
    Partition,
    Volume,
    cluster_size,
    fat_length,
    largest_disk,
    min_length,
    plan,
)

DISK_KINDS = list(product([format for format in Format if format is not Format.ISO9660], Partition, BLOCK_SIZES))


def planned(
    format: Format, size: int | None, needed: int = 0, *, partition: Partition = Partition.MBR, block_size: int = 512
) -> Volume:
    return plan(
        format=format, partition=partition, label="X", block_size=block_size, size=size, needed=lambda cluster: needed
    )


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_fat32_has_clusters_enough(block_size: int) -> None:
    length = min_length(Format.FAT32, block_size)
    assert length == (33 * MIB if block_size == 512 else 257 * MIB)
    while length < 4 << 40:
        cluster = cluster_size(Format.FAT32, length, block_size)
        tables = 2 * 4 * (length // cluster + 2) + 32 * 4096 + cluster
        assert (length - tables) // cluster > MIN_FAT_CLUSTERS
        assert block_size <= cluster <= 32768
        length = length * 3 // 2 // MIB * MIB


def test_cluster_sizes() -> None:
    fat = [cluster_size(Format.FAT32, length, 512) for length in (33 * MIB, 66 * MIB, 130 * MIB, 8 * GIB, 9 * GIB)]
    assert fat == [512, 1024, 2048, 4096, 8192]
    assert cluster_size(Format.FAT32, 20 * GIB, 512) == 16384
    assert cluster_size(Format.FAT32, 33 * GIB, 512) == 32768
    assert [cluster_size(Format.EXFAT, length, 512) for length in (256 * MIB, 257 * MIB, 33 * GIB)] == [
        4096, 32768, 131072,
    ]  # fmt: skip
    assert cluster_size(Format.NTFS, GIB, 512) == cluster_size(Format.EXT4, GIB, 512) == 4096
    assert fat_length(100_000, 4096) > 100_000 * 4104


@pytest.mark.parametrize(("format", "partition", "block_size"), DISK_KINDS)
def test_as_large_as_needed(format: Format, partition: Partition, block_size: int) -> None:
    tail = MIB if partition is Partition.GPT else 0
    small = planned(format, None, partition=partition, block_size=block_size)
    assert small.length == min_length(format, block_size)
    large = planned(format, None, 500 * MIB + 1, partition=partition, block_size=block_size)
    assert large.length == 501 * MIB
    for volume in (small, large):
        assert volume.disk_size == MIB + volume.length + tail
        same = planned(format, volume.disk_size, volume.length, partition=partition, block_size=block_size)
        assert same == volume


def test_length_and_cluster_size_settle() -> None:
    volume = plan(
        format=Format.FAT32,
        partition=Partition.MBR,
        label="X",
        block_size=512,
        size=None,
        needed=lambda cluster: fat_length(10 * GIB // cluster, cluster),
    )
    assert volume.cluster_size == 8192
    assert 10 * GIB < volume.length < 10 * GIB * 1.02


def test_a_size_that_was_asked_for() -> None:
    volume = planned(Format.EXT4, 100 * MIB + 512, partition=Partition.GPT)
    assert (volume.disk_size, volume.length) == (100 * MIB + 512, 98 * MIB)
    with pytest.raises(UsageError, match="104858112 bytes are not a multiple of 4096-byte blocks"):
        planned(Format.EXT4, 100 * MIB + 512, block_size=4096)


def parts(size: int) -> str:
    unit, letter = (1 << 40, "T") if size % (1 << 40) == 0 else (1 << 30, "G") if size % (1 << 30) == 0 else (MIB, "M")
    assert size % unit == 0
    return f"{size // unit}{letter}"


@pytest.mark.parametrize(("format", "partition", "block_size"), DISK_KINDS)
def test_bounds_of_sizes(format: Format, partition: Partition, block_size: int) -> None:
    least = planned(format, None, partition=partition, block_size=block_size).disk_size
    for size in (least - block_size, block_size, 0):
        with pytest.raises(
            ImageError, match=f"{size} bytes are too small for .*: it needs {parts(least)} at least"
        ) as caught:
            planned(format, size, partition=partition, block_size=block_size)
        assert caught.value.reason is Reason.EMPTY
    most = largest_disk(format, partition, block_size)
    if partition is Partition.MBR:
        assert most == 2**32 * block_size - MIB
    assert planned(format, most, partition=partition, block_size=block_size).disk_size == most
    with pytest.raises(
        ImageError, match=f"{most + block_size} bytes are too large for .*: {parts(most)} at most"
    ) as caught:
        planned(format, most + block_size, partition=partition, block_size=block_size)
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_folder_that_does_not_fit() -> None:
    with pytest.raises(ImageError, match="the folder needs 203M as ext4, the disk has 100M") as caught:
        planned(Format.EXT4, 100 * MIB, 200 * MIB + 1, partition=Partition.GPT)
    assert caught.value.reason is Reason.TOO_LARGE
    with pytest.raises(ImageError, match="too large for FAT32 and MBR"):
        planned(Format.FAT32, None, 3 << 40)
