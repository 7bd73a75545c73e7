"""Snapshots: an image stays as it is, what is written goes to another file (:mod:`farplug.store.overlay_format`)."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

from farplug.errors import ImageError, Reason
from farplug.store import holes
from farplug.store.base import BLOCK_SIZE, CacheMode
from farplug.store.image import CHUNK, Image, image_error, lock, serial_number
from farplug.store.overlay_format import (
    CONTENT_SIZE,
    HEADER_SIZE,
    SECTOR_SIZE,
    ClusterMap,
    Header,
    cluster_size,
    damaged,
    sector_offset,
)
from farplug.store.threaded import ThreadedStore

log = logging.getLogger(__name__)

TEMPORARY_FOLDER = Path("/var/tmp")
"""Where a snapshot without a name is, unless TMPDIR is set: /tmp is often in memory."""

HEAD_SAMPLE, TAIL_SAMPLE, SAMPLE, SAMPLES = 4 << 20, 1 << 20, 4096, 32
"""Bytes at the beginning and at the end of an image that its digest covers, and those in between, evenly spread."""

_COMMITTING, _NOT_COMMITTING = b"\1".ljust(CONTENT_SIZE, b"\0"), bytes(CONTENT_SIZE)
"""Contents of sector 0."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class OverlayStore(ThreadedStore):
    """A snapshot: reads come from the image until something is written there. Made by :meth:`open`.

    The first write to a part of a cluster copies the rest of it from the image.

    A flush makes durable what it covers, as a RAW image's does. Between flushes a RAW image keeps what was written when
    farplug is killed (the kernel has it), a snapshot keeps it only where the cluster was in it before.
    """

    def __init__(self, base: Image, own: Image, header: Header, clusters: ClusterMap, *, cache: CacheMode) -> None:
        super().__init__()
        self.block_size = header.block_size
        self.block_count = header.size // header.block_size
        self.unmaps = holes.can_unmap(own.fd)
        self.write_cache = cache is not CacheMode.WRITETHROUGH
        self.serial_number = serial_number(base.path)
        self.name = f"{base.path} (snapshot in {own.path})"
        self._base = base
        self._own = own
        self._header = header
        self._clusters = clusters
        self._unsafe = cache is CacheMode.UNSAFE

    @classmethod
    def open(
        cls,
        base_path: str | os.PathLike[str],
        path: str | os.PathLike[str] | None = None,
        *,
        block_size: int = BLOCK_SIZE,
        cache: CacheMode = CacheMode.WRITEBACK,
        force: bool = False,
    ) -> Self:
        """Open a snapshot of an image, or make one.

        Args:
            base_path: the image, opened to read only: others may do so at the same time.
            path: the file of the snapshot. It is made if there is none, or an empty one. None: a temporary file
                    without a name, gone when it is closed or farplug is; so nothing is ever made durable.
            block_size: bytes of a block.
            cache: when what was written is durable. UNSAFE: a power cut may leave nothing that makes sense.
            force: use the image though this machine may change it meanwhile.

        Raises:
            ImageError: the reasons of :meth:`Image.open` for either file; WRONG_FORMAT, DAMAGED, WRONG_IMAGE,
                HALF_COMMITTED for the snapshot.
        """
        base = Image.open(base_path, read_only=True, block_size=block_size, force=force)
        try:
            if path is None:
                store = cls._open_temporary(base, block_size)
            else:
                store = cls._open_file(base, Path(path), block_size, cache)
        except BaseException:
            base.close()
            raise
        return store

    @classmethod
    def _open_temporary(cls, base: Image, block_size: int) -> Self:
        folder = Path(os.environ.get("TMPDIR") or TEMPORARY_FOLDER)
        header = Header(bytes(16), base.size, block_size, cluster_size(base.size), 0, bytes(32), base.path)
        own = Image(folder, -1)
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                own.fd = os.dup(file.fileno())
            _resize(own, header)
            return cls(base, own, header, _no_clusters(header), cache=CacheMode.UNSAFE)
        except OSError as error:
            own.close()
            raise image_error(folder, error, read_only=False) from error
        except BaseException:
            own.close()
            raise

    @classmethod
    def _open_file(cls, base: Image, path: Path, block_size: int, cache: CacheMode) -> Self:
        own = _open(path, os.O_CREAT)
        try:
            if os.path.samestat(os.fstat(own.fd), os.fstat(base.fd)):
                raise ImageError(
                    f"{path} is the image itself",
                    reason=Reason.WRONG_FORMAT,
                    remedy="name another file for the snapshot",
                )
            lock(own.fd, path, read_only=False)
            if not own.size:
                header, clusters = _create(own, base, block_size)
            else:
                header, committing = _read_header(own)
                if committing:
                    raise ImageError(
                        f"a commit of {path} was broken off",
                        reason=Reason.HALF_COMMITTED,
                        remedy=f"finish it: farplug image commit {path}",
                    )
                _check_base(base, header, path, block_size)
                clusters = _read_clusters(own, header)
            return cls(base, own, header, clusters, cache=cache)
        except OSError as error:
            own.close()
            raise image_error(path, error, read_only=False) from error
        except BaseException:
            own.close()
            raise

    def _read_cached(self, data: memoryview, offset: int) -> int:
        got = 0
        for image, begin, part in self._parts(data, offset):
            count = image.read_cached(part, begin)
            got += count
            if count < len(part):
                break
        return got

    def _read_blocking(self, data: memoryview, offset: int) -> None:
        for image, begin, part in self._parts(data, offset):
            image.read(part, begin)

    def _parts(self, data: memoryview, offset: int) -> Iterator[tuple[Image, int, memoryview]]:
        """Tell where each part of a range is: file, offset there, buffer."""
        size, end = self._header.cluster_size, offset + len(data)
        for first, last, inside in self._clusters.runs(offset // size, -(-end // size)):
            begin, stop = max(first * size, offset), min(last * size, end)
            part = data[begin - offset : stop - offset]
            if inside:
                yield self._own, self._header.data_offset + begin, part
            else:
                yield self._base, begin, part

    def _write_blocking(self, data: memoryview, offset: int) -> None:
        self._copy_around(offset, offset + len(data))
        self._own.write(data, self._header.data_offset + offset)
        self._mark(offset, offset + len(data))

    def _zero_blocking(self, offset: int, length: int, unmap: bool) -> None:
        # By holes, unmap or not: a snapshot is thin anyway.
        self._copy_around(offset, offset + length)
        self._own.zero(self._header.data_offset + offset, length, unmap=True)
        self._mark(offset, offset + length)

    def _copy_around(self, start: int, end: int) -> None:
        """Copy what the clusters at both ends of a range have outside of it, if they are new in the snapshot."""
        size = self._header.cluster_size
        first, last = start // size, (end - 1) // size
        if first not in self._clusters:
            self._copy(first * size, start)
        if last not in self._clusters:
            self._copy(end, min((last + 1) * size, self._header.size))

    def _copy(self, start: int, end: int) -> None:
        for begin in range(start, end, CHUNK):
            data = memoryview(bytearray(min(CHUNK, end - begin)))
            self._base.read(data, begin)
            self._own.write(data, self._header.data_offset + begin)

    def _mark(self, start: int, end: int) -> None:
        size = self._header.cluster_size
        self._clusters.mark(start // size, -(-end // size))

    def _flush_blocking(self) -> None:
        """Make the clusters durable, then their bits."""
        if not self._unsafe:
            self._own.sync()
        if not self._clusters.changed:
            return
        for number in sorted(self._clusters.changed):
            _write_sector(self._own, self._header, number, self._clusters.content(number))
        if not self._unsafe:
            self._own.sync()
        self._clusters.changed.clear()

    def _close_files(self) -> None:
        try:
            self._flush_blocking()  # nobody else knows the bits
        except OSError as error:
            log.warning("%s: what was written since the last flush is lost: %s", self.name, error.strerror or error)
        self._own.close()
        self._base.close()


@dataclass(frozen=True, slots=True)
class OverlayInfo:
    """What a snapshot is.

    Attributes:
        base: the image.
        size: of the image, in bytes.
        block_size: bytes.
        changed: bytes that are in the snapshot, in clusters.
        half_committed: a commit has begun.
    """

    base: Path
    size: int
    block_size: int
    changed: int
    half_committed: bool


def info(path: str | os.PathLike[str]) -> OverlayInfo:
    """Look at a snapshot that nobody uses.

    Raises:
        ImageError: as for :func:`commit`, except for what concerns the image.
    """
    own = _open_existing(Path(path))
    try:
        header, committing = _read_header(own)
        changed = _changed_bytes(header, _read_clusters(own, header))
        return OverlayInfo(header.base, header.size, header.block_size, changed, committing)
    except OSError as error:
        raise image_error(own.path, error, read_only=False) from error
    finally:
        own.close()


def commit(path: str | os.PathLike[str], *, progress: Progress | None = None, force: bool = False) -> int:
    """Write what is in a snapshot to its image, and remove the snapshot. Blocks.

    When it is broken off anywhere (by an error, a crash, a power cut), half of it is in the image. The snapshot says so
    and is not usable but for another commit, which does it all again.

    Args:
        path: the file of the snapshot.
        progress: called now and then, and at the end.
        force: write to the image though this machine uses it.

    Returns:
        How many bytes were in the snapshot, in clusters.

    Raises:
        ImageError: the reasons of :meth:`Image.open` for either file; WRONG_FORMAT, DAMAGED, WRONG_IMAGE; IO_ERROR: it
            was broken off.
    """
    own = _open_existing(Path(path))
    try:
        header, committing = _read_header(own)
        clusters = _read_clusters(own, header)
        base = Image.open(header.base, block_size=header.block_size, force=force)
        try:
            _check_base(base, header, own.path, header.block_size, committing=committing)
            _write_sector(own, header, 0, _COMMITTING)
            own.sync()
            done = _apply(base, own, header, clusters, progress)
            base.sync()
        finally:
            base.close()
        _remove(own.path)
        return done
    except OSError as error:
        raise ImageError(
            f"the commit of {path} to {header.base} was broken off: {(error.strerror or str(error)).lower()}",
            reason=Reason.IO_ERROR,
            remedy=f"mend that, then do it again: farplug image commit {path}; use the image for nothing else before",
        ) from error
    finally:
        own.close()


def discard(path: str | os.PathLike[str]) -> None:
    """Remove a snapshot that nobody uses, and all that is in it.

    Raises:
        ImageError: the reasons of :meth:`Image.open`; WRONG_FORMAT, DAMAGED; HALF_COMMITTED: a part of it is in the
            image, which needs the rest.
    """
    own = _open_existing(Path(path))
    try:
        _, committing = _read_header(own)
        if committing:
            raise ImageError(
                f"a part of {path} is in its image already, which is not usable without the rest",
                reason=Reason.HALF_COMMITTED,
                remedy=f"finish it: farplug image commit {path}",
            )
        _remove(own.path)
    except OSError as error:
        raise image_error(own.path, error, read_only=False) from error
    finally:
        own.close()


def _open(path: Path, flags: int = 0) -> Image:
    """Open the file of a snapshot. It is not locked yet."""
    try:
        own = Image(path, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600))
    except (OSError, ValueError) as error:
        raise image_error(path, error, read_only=False) from error
    if not stat.S_ISREG(os.fstat(own.fd).st_mode):
        own.close()
        raise ImageError(f"{path} is no file", reason=Reason.NOT_A_FILE, remedy="name a file for the snapshot")
    return own


def _open_existing(path: Path) -> Image:
    own = _open(path)
    try:
        lock(own.fd, path, read_only=False)
    except BaseException:
        own.close()
        raise
    return own


def _create(own: Image, base: Image, block_size: int) -> tuple[Header, ClusterMap]:
    """Make a snapshot without changes in an empty file. The header comes last."""
    size = base.size
    where = Path(os.path.realpath(base.path))
    try:
        mtime_ns, digest = _fingerprint(base, size)
        header = Header(os.urandom(16), size, block_size, cluster_size(size), mtime_ns, digest, where)
        _resize(own, header)
        sectors = [header.seal(number, bytes(CONTENT_SIZE)) for number in range(header.map_sectors + 1)]
        own.write(memoryview(b"".join(sectors)), sector_offset(0))
        os.fsync(own.fd)
        own.write(memoryview(bytes(header)), 0)
        os.fsync(own.fd)
        _sync_folder(own.path)
    except BaseException:
        own.path.unlink(missing_ok=True)
        raise
    return header, _no_clusters(header)


def _resize(own: Image, header: Header) -> None:
    try:
        os.ftruncate(own.fd, header.file_size)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise ImageError(
            f"{own.path} cannot be made: its file system takes no file of {header.file_size} bytes",
            reason=Reason.IO_ERROR,
            remedy="choose another file system for the snapshot, xfs or btrfs for example",
        ) from error


def _no_clusters(header: Header) -> ClusterMap:
    return ClusterMap(header.clusters, bytearray(header.map_sectors * CONTENT_SIZE))


def _read_header(own: Image) -> tuple[Header, bool]:
    """Read a header, and whether a commit has begun."""
    size = own.size
    data = bytearray(min(HEADER_SIZE, size))
    own.read(memoryview(data), 0)
    header = Header.parse(bytes(data), own.path)
    if size < header.file_size:
        raise damaged(own.path, f"it has {size} bytes of {header.file_size}")
    sector = bytearray(SECTOR_SIZE)
    own.read(memoryview(sector), sector_offset(0))
    state = header.unseal(0, bytes(sector), own.path)
    if state not in (_COMMITTING, _NOT_COMMITTING):
        raise damaged(own.path, "whether a commit has begun cannot be told")
    return header, state == _COMMITTING


def _read_clusters(own: Image, header: Header) -> ClusterMap:
    data = bytearray(header.map_sectors * SECTOR_SIZE)
    own.read(memoryview(data), sector_offset(1))
    content = bytearray()
    for number in range(1, header.map_sectors + 1):
        begin = (number - 1) * SECTOR_SIZE
        content += header.unseal(number, bytes(data[begin : begin + SECTOR_SIZE]), own.path)
    clusters = ClusterMap(header.clusters, content)
    if clusters.beyond:
        raise damaged(own.path, "it has clusters behind the end of the image")
    return clusters


def _write_sector(own: Image, header: Header, number: int, content: bytes) -> None:
    own.write(memoryview(header.seal(number, content)), sector_offset(number))


def _check_base(base: Image, header: Header, path: Path, block_size: int, *, committing: bool = False) -> None:
    """Refuse what is not the image of a snapshot, as it was.

    An image that was copied or touched has another time. That cannot be told from one that was written to, but the user
    can tell. What a commit that was broken off has changed is no objection to another.
    """
    if block_size != header.block_size:
        raise ImageError(
            f"{path} is a snapshot with blocks of {header.block_size} bytes, not {block_size}",
            reason=Reason.WRONG_IMAGE,
            remedy=f"use --block-size {header.block_size}",
        )
    other = f"name the image ({header.base} when the snapshot was made), or discard the snapshot"
    if base.size != header.size:
        raise ImageError(
            f"{base.path} has {base.size} bytes, the image of the snapshot {path} has {header.size}",
            reason=Reason.WRONG_IMAGE,
            remedy=other,
        )
    if committing:
        return
    mtime_ns, digest = _fingerprint(base, header.size)
    if digest != header.digest:
        raise ImageError(
            f"{base.path} is not what it was when the snapshot {path} was made, or is another image",
            reason=Reason.WRONG_IMAGE,
            remedy=other,
        )
    if mtime_ns != header.mtime_ns:
        seconds, rest = divmod(header.mtime_ns, 10**9)
        raise ImageError(
            f"{base.path} was changed after the snapshot {path} was made of it",
            reason=Reason.WRONG_IMAGE,
            remedy="if it was only copied or touched, give it back its time: "
            f"touch --date=@{seconds}.{rest:09} {base.path}\n"
            "otherwise the snapshot does not fit it any more, and can only be discarded",
        )


def _fingerprint(base: Image, size: int) -> tuple[int, bytes]:
    """Tell an image from others: when it was written to (0: a block device), and a digest of samples."""
    status = os.fstat(base.fd)
    digest = hashlib.sha256()
    between = range(HEAD_SAMPLE, max(size - TAIL_SAMPLE, HEAD_SAMPLE), max(size // SAMPLES, SAMPLE))
    samples = [(0, HEAD_SAMPLE), *((begin, SAMPLE) for begin in between), (max(size - TAIL_SAMPLE, 0), TAIL_SAMPLE)]
    for begin, length in samples:
        data = bytearray(min(length, size - begin))
        try:
            base.read(memoryview(data), begin)
        except OSError as error:
            raise image_error(base.path, error, read_only=True) from error
        digest.update(data)
    return (0 if stat.S_ISBLK(status.st_mode) else status.st_mtime_ns), digest.digest()


def _apply(base: Image, own: Image, header: Header, clusters: ClusterMap, progress: Progress | None) -> int:
    """Write every cluster of a snapshot to the image, holes as holes: how many bytes."""
    total = _changed_bytes(header, clusters)
    done = 0
    for begin, end in _changed_ranges(header, clusters):
        at = begin
        while at < end:
            data_begin, data_end = _next_data(own.fd, header.data_offset + at, header.data_offset + end)
            data_begin -= header.data_offset
            data_end -= header.data_offset
            if at < data_begin:
                base.zero(at, data_begin - at, unmap=True)
            for start in range(data_begin, data_end, CHUNK):
                data = memoryview(bytearray(min(CHUNK, data_end - start)))
                own.read(data, header.data_offset + start)
                base.write(data, start)
            at = data_end
        done += end - begin
        if progress is not None:
            progress(done, total)
    return done


def _changed_bytes(header: Header, clusters: ClusterMap) -> int:
    cut = -header.size % header.cluster_size if header.clusters - 1 in clusters else 0
    return clusters.count * header.cluster_size - cut


def _changed_ranges(header: Header, clusters: ClusterMap) -> Iterator[tuple[int, int]]:
    """Bytes (begin, end) of the image that are in the snapshot, in steps that are not too long."""
    size, step = header.cluster_size, CONTENT_SIZE * 8
    for window in range(0, header.clusters, step):
        for first, end, inside in clusters.runs(window, min(window + step, header.clusters)):
            if inside:
                yield first * size, min(end * size, header.size)


def _next_data(fd: int, begin: int, end: int) -> tuple[int, int]:
    """Find the first data of a range, behind which there is a hole (lseek(2)): (end, end) if it is all hole."""
    try:
        first = min(os.lseek(fd, begin, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end, end
    return first, min(os.lseek(fd, first, os.SEEK_HOLE), end) if first < end else end


def _remove(path: Path) -> None:
    path = Path(os.path.realpath(path))
    path.unlink()
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    """Make the name of a file durable."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
