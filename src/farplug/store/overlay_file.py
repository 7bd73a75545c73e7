"""The file of a snapshot: create it, check it against its image, read and write its bits."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from farplug.errors import ImageError, Reason, Remedy
from farplug.shell import shell_word
from farplug.store.image import Image, image_error, lock, unsupported_error
from farplug.store.overlay_format import (
    CONTENT_SIZE,
    DIGEST_SIZE,
    HEADER_SIZE,
    SECTOR_SIZE,
    ClusterMap,
    Header,
    cluster_size,
    damaged_error,
    sector_offset,
)

log = logging.getLogger(__name__)

TEMPORARY_FOLDER = Path("/var/tmp")
"""Folder of snapshots without a name, unless TMPDIR is set: /tmp is often in memory."""

HEAD_SAMPLE, TAIL_SAMPLE, SAMPLE, SAMPLES = 4 << 20, 1 << 20, 4096, 32
"""The digest of an image covers these bytes at its start and its end, and samples of a page, evenly spread between."""

_NOT_COMMITTING = bytes(CONTENT_SIZE)
"""Content of sector 0 before a commit."""
_COMMITTING, _COMMITTING_UNCHECKED = b"\2", b"\1".ljust(CONTENT_SIZE, b"\0")
"""First byte of sector 0 once a commit was started, before the digest of :meth:`OverlayFile.unchanged_digest`; and the
content that older versions wrote, without a digest."""


class OverlayFile:
    """The open file of a snapshot. Every method may block.

    Attributes:
        image: the file; its clusters begin at ``header.data_offset``.
        header: identifies the image of the snapshot.
        clusters: which clusters are in the file.
        half_committed: a commit was started and not completed.
    """

    def __init__(
        self, image: Image, header: Header, clusters: ClusterMap, *, half_committed: bool = False, digest: bytes = b""
    ) -> None:
        self.image = image
        self.header = header
        self.clusters = clusters
        self.half_committed = half_committed
        self._recorded_digest = digest
        """What :meth:`unchanged_digest` was when the commit was started; empty if it was not recorded."""

    @property
    def path(self) -> Path:
        """Return the path as the caller gave it; of a temporary file, its folder."""
        return self.image.path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open and lock the file of a snapshot.

        Raises:
            ImageError: NOT_FOUND, NOT_A_FILE, NO_PERMISSION, IN_USE, IO_ERROR, WRONG_FORMAT, DAMAGED.
        """
        image = _open(path)
        with _closed_on_failure(image, path):
            _lock(image)
            return cls._load(image)

    @classmethod
    def open_for(cls, base: Image, path: Path, block_size: int) -> Self:
        """Open the file of a snapshot of an image, or create it if it does not exist or is empty.

        Raises:
            ImageError: as :meth:`open`, and WRONG_IMAGE, HALF_COMMITTED.
        """
        image = _open(path, os.O_CREAT)
        with _closed_on_failure(image, path):
            if os.path.samestat(os.fstat(image.fd), os.fstat(base.fd)):
                remedy = "name another file for the snapshot"
                raise ImageError(f"{path} is the image itself", reason=Reason.WRONG_FORMAT, remedy=remedy)
            _lock(image)
            if not image.size:
                return cls._create(image, base, block_size)
            file = cls._load(image)
            if file.half_committed:
                raise half_committed_error(f"a commit of {path} was interrupted", path, base.path)
            file.check_base(base, block_size)
            return file

    @classmethod
    def temporary(cls, base: Image, block_size: int) -> Self:
        """Create a snapshot in a file without a name, which is lost when it is closed.

        Raises:
            ImageError: NOT_FOUND, NO_PERMISSION, NO_SPACE, IO_ERROR.
        """
        folder = Path(os.environ.get("TMPDIR") or TEMPORARY_FOLDER)
        header = Header(bytes(16), base.size, block_size, cluster_size(base.size), 0, bytes(32), base.path)
        image = Image(folder, -1)
        with _closed_on_failure(image, folder):
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                image.fd = os.dup(file.fileno())
            _resize(image, header)
        return cls(image, header, _no_clusters(header))

    @classmethod
    def _create(cls, image: Image, base: Image, block_size: int) -> Self:
        """Create an empty snapshot in an empty file. The header is written last."""
        size = base.size
        where = Path(os.path.realpath(base.path))
        try:
            mtime_ns, digest = _fingerprint(base, size)
            header = Header(os.urandom(16), size, block_size, cluster_size(size), mtime_ns, digest, where)
            _resize(image, header)
            sectors = [header.seal(number, bytes(CONTENT_SIZE)) for number in range(header.map_sectors + 1)]
            image.write(memoryview(b"".join(sectors)), sector_offset(0))
            os.fsync(image.fd)
            image.write(memoryview(bytes(header)), 0)
            os.fsync(image.fd)
            _sync_folder(image.path)
        except BaseException:
            image.path.unlink(missing_ok=True)
            raise
        return cls(image, header, _no_clusters(header))

    @classmethod
    def _load(cls, image: Image) -> Self:
        size = image.size
        data = bytearray(min(HEADER_SIZE, size))
        image.read(memoryview(data), 0)
        header = Header.parse(bytes(data), image.path)
        if size < header.file_size:
            raise damaged_error(image.path, f"it has {size} bytes of {header.file_size}")
        data = bytearray((header.map_sectors + 1) * SECTOR_SIZE)
        image.read(memoryview(data), sector_offset(0))
        contents = [
            header.unseal(number, bytes(data[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]), image.path)
            for number in range(header.map_sectors + 1)
        ]
        half_committed, digest = _parse_state(contents[0], image.path)
        clusters = ClusterMap(header.clusters, bytearray(b"".join(contents[1:])))
        if clusters.has_stray_bits:
            raise damaged_error(image.path, "it has clusters after the end of the image")
        return cls(image, header, clusters, half_committed=half_committed, digest=digest)

    def check_base(self, base: Image, block_size: int, *, force: bool = False) -> None:
        """Check that an image is the image of the snapshot, and is unchanged.

        An image that was only copied or touched has another modification time, as one that was written to. Only the
        user knows which, so both are refused. After an interrupted commit, the clusters that are not in the snapshot
        are compared.

        Args:
            base: the image.
            block_size: of the disk, in bytes.
            force: only log a warning if a commit was interrupted and the image does not fit.

        Raises:
            ImageError: WRONG_IMAGE.
        """
        header, path = self.header, self.path
        if block_size != header.block_size:
            raise ImageError(
                f"{path} is a snapshot with blocks of {header.block_size} bytes, not {block_size}",
                reason=Reason.WRONG_IMAGE,
                remedy=Remedy("use blocks of that size", setting="storage.block_size", value=header.block_size),
            )
        other = f"name the image ({shell_word(header.base)} when the snapshot was created), or discard the snapshot"
        if base.size != header.size:
            raise ImageError(
                f"{base.path} has {base.size} bytes, the image of the snapshot {path} has {header.size}",
                reason=Reason.WRONG_IMAGE,
                remedy=other,
            )
        if self.half_committed:
            self._check_half_committed(base, other, force)
            return
        mtime_ns, digest = _fingerprint(base, header.size)
        if digest != header.digest:
            raise ImageError(
                f"{base.path} was changed after the snapshot {path} was created, or is another image",
                reason=Reason.WRONG_IMAGE,
                remedy=other,
            )
        if mtime_ns != header.mtime_ns:
            seconds, rest = divmod(header.mtime_ns, 10**9)
            command = f"touch --date=@{seconds}.{rest:09} {shell_word(base.path)}"
            raise ImageError(
                f"{base.path} has a newer modification time than the snapshot {path} recorded",
                reason=Reason.WRONG_IMAGE,
                remedy=Remedy(
                    "if it was only copied or touched, restore its time",
                    command=command,
                    alternative=Remedy("otherwise the snapshot no longer fits the image: discard it"),
                ),
            )

    def _check_half_committed(self, base: Image, remedy: str, force: bool) -> None:
        if not self._recorded_digest:
            what = f"an older version began the commit of {self.path} and recorded no digest of {base.path}"
            remedy = Remedy(
                "if it is the image of the snapshot, finish the commit without a check",
                command=f"farplug image commit {shell_word(self.path)} --image {shell_word(base.path)} --force",
            )
        elif self._recorded_digest != self.unchanged_digest(base):
            what = f"{base.path} was changed after the commit of {self.path} was interrupted, or is another image"
        else:
            return
        if not force:
            raise ImageError(what, reason=Reason.WRONG_IMAGE, remedy=remedy)
        log.warning("%s: written as it is", what)

    def unchanged_digest(self, base: Image) -> bytes:
        """Return a digest of samples of the clusters that are not in the snapshot, which no commit writes."""
        return _digest(base, self._unchanged_samples())

    def _unchanged_samples(self) -> Iterator[tuple[int, int]]:
        size = self.header.cluster_size
        for begin, end in _samples(self.header.size):
            for first, last, inside in self.clusters.runs(begin // size, -(-end // size)):
                if not inside:
                    yield max(first * size, begin), min(last * size, end)

    def flush(self, *, durable: bool = True) -> None:
        """Make new clusters durable, then write their bits and make these durable.

        Args:
            durable: False: write the bits only, and make nothing durable.
        """
        if durable:
            self.image.sync()
        if not self.clusters.changed:
            return
        for number in sorted(self.clusters.changed):
            self._write_sector(number, self.clusters.content(number))
        if durable:
            self.image.sync()
        self.clusters.changed.clear()

    def begin_commit(self, base: Image) -> None:
        """Record durably that a commit to an image was started, and what the rest of the image is."""
        self._write_sector(0, (_COMMITTING + self.unchanged_digest(base)).ljust(CONTENT_SIZE, b"\0"))
        self.image.sync()
        self.half_committed = True

    def _write_sector(self, number: int, content: bytes) -> None:
        self.image.write(memoryview(self.header.seal(number, content)), sector_offset(number))

    @property
    def changed_bytes(self) -> int:
        """Return the number of bytes in the snapshot, whole clusters."""
        header = self.header
        cut = -header.size % header.cluster_size if header.clusters - 1 in self.clusters else 0
        return self.clusters.count * header.cluster_size - cut

    def changed_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges (begin, end) of the image, in bytes, that are in the snapshot; long ones in parts."""
        header, step = self.header, CONTENT_SIZE * 8
        for window in range(0, header.clusters, step):
            for first, end, inside in self.clusters.runs(window, min(window + step, header.clusters)):
                if inside:
                    yield first * header.cluster_size, min(end * header.cluster_size, header.size)

    def remove(self) -> None:
        """Remove the file durably. It stays open."""
        path = Path(os.path.realpath(self.path))
        path.unlink()
        _sync_folder(path)

    def close(self) -> None:
        """Close the file without a flush, which also unlocks it. The second call does nothing."""
        self.image.close()


def half_committed_error(message: str, path: Path, image: Path | None) -> ImageError:
    """Return the error for a snapshot that can only be committed.

    Args:
        message: what happened.
        path: of the snapshot.
        image: path of the image as the caller gave it; None: the caller gave none. Never the path in the snapshot,
            which may come from another user.
    """
    remedy = Remedy("finish the commit", command=commit_command(path, image))
    return ImageError(message, reason=Reason.HALF_COMMITTED, remedy=remedy)


def commit_command(path: Path, image: Path | None) -> str:
    """Return the command that commits a snapshot to an image; ``IMAGE`` stands for an image that is not known."""
    return f"farplug image commit {shell_word(path)} --image {shell_word(image or 'IMAGE')}"


def _parse_state(content: bytes, path: Path) -> tuple[bool, bytes]:
    """Return from sector 0 whether a commit was started, and the digest that it recorded, empty if it has none.

    Raises:
        ImageError: DAMAGED.
    """
    digest, rest = content[1 : 1 + DIGEST_SIZE], content[1 + DIGEST_SIZE :]
    if content == _NOT_COMMITTING:
        return False, b""
    if content == _COMMITTING_UNCHECKED:
        return True, b""
    if not content.startswith(_COMMITTING) or any(rest):
        raise damaged_error(path, "its sector 0 has no valid content")
    return True, digest


@contextmanager
def _closed_on_failure(image: Image, path: Path) -> Iterator[None]:
    """Close the image if the block raises, and turn an ``OSError`` into an ``ImageError``."""
    try:
        yield
    except OSError as error:
        image.close()
        raise image_error(path, error, read_only=False) from error
    except BaseException:
        image.close()
        raise


def _open(path: Path, flags: int = 0) -> Image:
    if sys.platform == "win32":
        raise unsupported_error(path)
    try:
        image = Image(path, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600))
    except IsADirectoryError as error:
        raise _not_a_file_error(path) from error
    except (OSError, ValueError) as error:
        raise image_error(path, error, read_only=False) from error
    if not stat.S_ISREG(os.fstat(image.fd).st_mode):
        image.close()
        raise _not_a_file_error(path)
    return image


def _not_a_file_error(path: Path) -> ImageError:
    return ImageError(f"{path} is not a file", reason=Reason.NOT_A_FILE, remedy="name a file for the snapshot")


def _lock(image: Image) -> None:
    lock(image.fd, image.path, read_only=False)
    if not os.fstat(image.fd).st_nlink:  # between opening and locking it
        raise ImageError(f"{image.path} was just removed", reason=Reason.IN_USE, remedy="retry")


def _resize(image: Image, header: Header) -> None:
    try:
        os.ftruncate(image.fd, header.file_size)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise ImageError(
            f"{image.path} cannot be created: its file system does not support files of {header.file_size} bytes",
            reason=Reason.IO_ERROR,
            remedy="put the snapshot on another file system, xfs or btrfs for example",
        ) from error


def _no_clusters(header: Header) -> ClusterMap:
    return ClusterMap(header.clusters, bytearray(header.map_sectors * CONTENT_SIZE))


def _fingerprint(base: Image, size: int) -> tuple[int, bytes]:
    """Return what identifies an image: its modification time (0: a block device), and a digest of samples."""
    status = os.fstat(base.fd)
    return (0 if stat.S_ISBLK(status.st_mode) else status.st_mtime_ns), _digest(base, _samples(size))


def _samples(size: int) -> list[tuple[int, int]]:
    """Return the ranges (begin, end), in bytes, of the samples of an image."""
    between = range(HEAD_SAMPLE, max(size - TAIL_SAMPLE, HEAD_SAMPLE), max(size // SAMPLES, SAMPLE))
    samples = [(0, HEAD_SAMPLE), *((begin, SAMPLE) for begin in between), (max(size - TAIL_SAMPLE, 0), TAIL_SAMPLE)]
    return [(begin, min(begin + length, size)) for begin, length in samples]


def _digest(base: Image, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Return the SHA-256 of ranges (begin, end) of an image.

    Raises:
        ImageError: the image cannot be read.
    """
    digest = hashlib.sha256()
    for begin, end in ranges:
        data = bytearray(end - begin)
        try:
            base.read(memoryview(data), begin)
        except OSError as error:
            raise image_error(base.path, error, read_only=True) from error
        digest.update(data)
    return digest.digest()


def _sync_folder(path: Path) -> None:
    """Make the name of a file durable (fsync of its folder)."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
