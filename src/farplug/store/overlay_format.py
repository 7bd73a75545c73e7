"""The format of a snapshot's file, which has only the changed clusters of an image.

::

    0        header: identifies the image; written once
    8192     sector 0: whether a commit was started; then also a digest of the image's other clusters
    8704     sectors 1 and up: a bit for each cluster of the image
    data     the clusters whose bit is set, each at its offset in the image; holes between them

``data`` begins at a multiple of 1 MiB and of the cluster size. A sector has 512 bytes: 508 of content, and a CRC-32 of
the identity of the file, the number of the sector and its content. Numbers are little-endian.

**Why it survives a crash at any point.** A set bit means that a cluster is read from the snapshot, not from the image.
Bits are set and never cleared. A bit is written after its cluster is durable, between two fdatasync(2). So every bit
that reached the medium is right, and a cluster whose bit did not is read from the image, with its old content. The
medium must only write each sector as a whole. There is no journal, because nothing has to be undone.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from farplug.errors import ImageError, Reason

MAGIC = b"farplug\xf5"
VERSION = 1

HEADER_SIZE = 8192
SECTOR_SIZE = 512
CONTENT_SIZE = SECTOR_SIZE - 4
DATA_ALIGNMENT = 1 << 20
DIGEST_SIZE = 32
"""Bytes of a SHA-256."""

BLOCK_SIZES = (512, 2048, 4096)
"""Block sizes of disks and CDs, in bytes: a smaller one would make any file an image."""

MIN_CLUSTER_SIZE = 4096
"""The physical block size of our disks: guests hardly ever write less."""

MAX_CLUSTERS = 1 << 26
"""All bits are in memory: 8 MiB, enough for 256 GiB in the smallest clusters. Larger images have larger clusters."""

_HEADER = struct.Struct("<8sII16sQIIq32sH")
"""magic, version, CRC-32 of everything else, identity, size, block size, cluster size, time, digest, length of path"""
_CRC_OFFSET = 12


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a snapshot, which identifies its image.

    Attributes:
        identity: random, of this snapshot.
        size: of the image, in bytes.
        block_size: of the disk, in bytes.
        cluster_size: bytes, a power of two.
        mtime_ns: modification time of the image, in nanoseconds; 0 for a block device.
        digest: SHA-256 of samples of the image.
        base: the absolute path of the image.
    """

    identity: bytes
    size: int
    block_size: int
    cluster_size: int
    mtime_ns: int
    digest: bytes
    base: Path

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Return the header in the first bytes of a file.

        Args:
            data: the first :data:`HEADER_SIZE` bytes of the file.
            path: of the file, for errors.

        Raises:
            ImageError: WRONG_FORMAT or DAMAGED.
        """
        if not data.startswith(MAGIC):
            what, remedy = "is not a snapshot", "name the file of a snapshot, or a new file"
            if not any(data):  # the header is written last
                what += ", or its creation was interrupted"
                remedy = "name another file, or remove this one if its content is not needed"
            raise ImageError(f"{path} {what}", reason=Reason.WRONG_FORMAT, remedy=remedy)
        if len(data) < HEADER_SIZE or _crc(data) != int.from_bytes(data[_CRC_OFFSET : _CRC_OFFSET + 4], "little"):
            raise damaged_error(path, "its header does not match its checksum")
        _, version, _, identity, size, block_size, cluster_size, mtime_ns, digest, length = _HEADER.unpack_from(data)
        if version != VERSION:
            raise ImageError(
                f"{path} is a snapshot of format {version}, this farplug supports format {VERSION}",
                reason=Reason.WRONG_FORMAT,
                remedy="use the version of farplug that created it",
            )
        base = data[_HEADER.size : _HEADER.size + length]
        if not base.startswith(b"/") or b"\0" in base:
            raise damaged_error(path, "it has no absolute path of an image")
        header = cls(identity, size, block_size, cluster_size, mtime_ns, digest, Path(os.fsdecode(base)))
        valid_cluster = cluster_size >= MIN_CLUSTER_SIZE and not cluster_size & (cluster_size - 1)
        valid_size = block_size in BLOCK_SIZES and size >= block_size
        if not (valid_cluster and valid_size and header.clusters <= MAX_CLUSTERS):
            raise damaged_error(path, f"{size} bytes cannot have clusters of {cluster_size} and blocks of {block_size}")
        return header

    def __bytes__(self) -> bytes:
        base = os.fsencode(self.base)
        fields = (self.identity, self.size, self.block_size, self.cluster_size, self.mtime_ns, self.digest, len(base))
        data = (_HEADER.pack(MAGIC, VERSION, 0, *fields) + base).ljust(HEADER_SIZE, b"\0")
        return data[:_CRC_OFFSET] + _crc(data).to_bytes(4, "little") + data[_CRC_OFFSET + 4 :]

    @property
    def clusters(self) -> int:
        """Return the number of clusters of the image, the last of which may be partial."""
        return -(-self.size // self.cluster_size)

    @property
    def map_sectors(self) -> int:
        """Return the number of sectors with bits."""
        return -(-self.clusters // (CONTENT_SIZE * 8))

    @property
    def data_offset(self) -> int:
        """Return the offset in the file of byte 0 of the image."""
        alignment = max(DATA_ALIGNMENT, self.cluster_size)
        return -(-(sector_offset(1) + self.map_sectors * SECTOR_SIZE) // alignment) * alignment

    @property
    def file_size(self) -> int:
        """Return the size of the whole file, in bytes."""
        return self.data_offset + self.size

    def seal(self, number: int, content: bytes) -> bytes:
        """Return a sector: its content and checksum."""
        return content + self._crc(number, content)

    def unseal(self, number: int, sector: bytes, path: Path) -> bytes:
        """Check a sector, and return its content.

        Raises:
            ImageError: DAMAGED.
        """
        content = sector[:CONTENT_SIZE]
        if sector[CONTENT_SIZE:] != self._crc(number, content):
            raise damaged_error(path, f"the sector at byte {sector_offset(number)} does not match its checksum")
        return content

    def _crc(self, number: int, content: bytes) -> bytes:
        return zlib.crc32(content, zlib.crc32(self.identity + struct.pack("<I", number))).to_bytes(4, "little")


class ClusterMap:
    """The bits of the clusters: a set bit means that the cluster is in the snapshot.

    Args:
        clusters: number of clusters.
        content: of the sectors, concatenated.

    Attributes:
        changed: numbers of the sectors, from 1, in which bits were set since the caller last cleared this set.
    """

    def __init__(self, clusters: int, content: bytearray) -> None:
        self._clusters = clusters
        self._bits = content
        self.changed: set[int] = set()

    @property
    def has_stray_bits(self) -> bool:
        """Return whether bits of clusters that do not exist are set."""
        return bool(int.from_bytes(self._bits[self._clusters >> 3 :], "little") >> (self._clusters & 7))

    @property
    def count(self) -> int:
        """Return the number of clusters in the snapshot."""
        return int.from_bytes(self._bits, "little").bit_count()

    def mark(self, first: int, end: int) -> None:
        """Set the bits of clusters that were added to the snapshot, at least one."""
        if self._between(first, end) == (1 << end - first) - 1:
            return
        begin, last = first >> 3, (end - 1) >> 3
        head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - ((end - 1) & 7))
        if begin == last:
            self._bits[begin] |= head & tail
        else:
            self._bits[begin] |= head
            self._bits[begin + 1 : last] = b"\xff" * (last - begin - 1)
            self._bits[last] |= tail
        self.changed.update(range(begin // CONTENT_SIZE + 1, last // CONTENT_SIZE + 2))

    def __contains__(self, cluster: int) -> bool:
        return bool(self._bits[cluster >> 3] >> (cluster & 7) & 1)

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the runs of a range of clusters: (first, end, whether they are in the snapshot)."""
        bits = self._between(first, end)
        while first < end:
            inside = bool(bits & 1)
            other = ~bits if inside else bits
            length = (other & -other).bit_length() - 1 if other else end - first
            length = min(length, end - first)
            yield first, first + length, inside
            first += length
            bits >>= length

    def run_count(self, first: int, end: int) -> int:
        """Return the number of runs of a range of clusters, at least one."""
        bits = self._between(first, end)
        return 1 + ((bits ^ bits >> 1) & ((1 << end - first - 1) - 1)).bit_count()

    def content(self, sector: int) -> bytes:
        """Return the content of a sector; the first one is 1."""
        return bytes(self._bits[(sector - 1) * CONTENT_SIZE : sector * CONTENT_SIZE])

    def _between(self, first: int, end: int) -> int:
        bits = int.from_bytes(self._bits[first >> 3 : (end + 7) >> 3], "little")
        return bits >> (first & 7) & ((1 << end - first) - 1)


def cluster_size(size: int) -> int:
    """Return the cluster size in bytes for a new snapshot.

    Args:
        size: of the image, in bytes.
    """
    chosen = MIN_CLUSTER_SIZE
    while -(-size // chosen) > MAX_CLUSTERS:
        chosen *= 2
    return chosen


def sector_offset(number: int) -> int:
    """Return the offset of a sector in the file."""
    return HEADER_SIZE + number * SECTOR_SIZE


def damaged_error(path: Path, what: str) -> ImageError:
    """Return the error for a snapshot that is no longer usable."""
    return ImageError(
        f"{path} is damaged: {what}",
        reason=Reason.DAMAGED,
        remedy="restore it from a backup, or remove it and lose its content",
    )


def _crc(data: bytes) -> int:
    return zlib.crc32(data[_CRC_OFFSET + 4 : HEADER_SIZE], zlib.crc32(data[:_CRC_OFFSET]))
