"""Snapshots: writes go to another file, and the image stays as it is (:mod:`farplug.store.overlay_format`)."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from farplug.errors import ImageError, Remedy, from_oserror
from farplug.store import holes
from farplug.store.base import BLOCK_SIZE, CacheMode, ProgressCallback, Stopped
from farplug.store.content import Content
from farplug.store.image import CHUNK, Image, check_raw, image_error, serial_number
from farplug.store.overlay_file import OverlayFile, commit_command, half_committed_error
from farplug.store.threaded import ThreadedStore

log = logging.getLogger(__name__)

MAX_RUNS_INLINE = 32
"""Parts of a read, each a system call, that are read inside the call if the page cache has them."""


class OverlayStore(ThreadedStore):
    """A snapshot: blocks are read from the image until they are written. Opened by :meth:`open`.

    The first write to a part of a cluster copies the rest of the cluster from the image.

    A flush makes writes durable, as for a RAW image. When farplug is killed between flushes, a RAW image keeps nearly
    all writes (those that the kernel has); a snapshot keeps of those only writes to clusters that it already had.
    """

    def __init__(self, base: Image, file: OverlayFile, *, cache: CacheMode, temporary: bool) -> None:
        super().__init__()
        self.block_size = file.header.block_size
        self.block_count = file.header.size // file.header.block_size
        self.unmaps = holes.can_unmap(file.image.fd)
        self.write_cache = cache is not CacheMode.WRITETHROUGH
        self.temporary = temporary
        self.serial_number = serial_number(base.path)
        self.name = f"{base.path} (snapshot in {file.path})"
        self._base = base
        self._file = file
        self._header = file.header
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
        """Open a snapshot of an image, or create one.

        Args:
            base_path: of the image, which is opened for reading only and may be shared with other readers.
            path: of the snapshot's file, which is created if it does not exist or is empty. None: a temporary file
                without a name, which is lost when it is closed or farplug ends; so it is never made durable.
            block_size: bytes of a block.
            cache: when written data is durable. UNSAFE: a power cut may make the snapshot useless.
            force: use the image although this machine may change it meanwhile, or although it is not a RAW image.

        Raises:
            ImageError: the reasons of :meth:`Image.open` for either file; WRONG_FORMAT, DAMAGED, WRONG_IMAGE,
                HALF_COMMITTED for the snapshot.
        """
        base = Image.open(base_path, read_only=True, block_size=block_size, force=force)
        try:
            if path is None:
                file, cache = OverlayFile.temporary(base, block_size), CacheMode.UNSAFE
            else:
                file = OverlayFile.open_for(base, Path(path), block_size)
            try:
                return cls(base, file, cache=cache, temporary=path is None)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            base.close()
            raise image_error(base.path, error, read_only=True) from error
        except BaseException:
            base.close()
            raise

    def _read_cached(self, data: memoryview, offset: int) -> int:
        size = self._header.cluster_size
        if self._file.clusters.run_count(offset // size, -(-(offset + len(data)) // size)) > MAX_RUNS_INLINE:
            return 0
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
        """Yield the parts of a range: the file that has it, the offset in that file, the buffer."""
        size, end = self._header.cluster_size, offset + len(data)
        for first, last, inside in self._file.clusters.runs(offset // size, -(-end // size)):
            begin, stop = max(first * size, offset), min(last * size, end)
            part = data[begin - offset : stop - offset]
            if inside:
                yield self._file.image, self._header.data_offset + begin, part
            else:
                yield self._base, begin, part

    def _write_blocking(self, data: memoryview, offset: int) -> None:
        self._copy_around(offset, offset + len(data))
        self._file.image.write(data, self._header.data_offset + offset)
        self._mark(offset, offset + len(data))

    def _zero_blocking(self, offset: int, length: int, unmap: bool, stopped: Stopped) -> None:
        # Always as a hole: a snapshot is sparse anyway.
        if stopped():
            return
        self._copy_around(offset, offset + length)
        if self._file.image.zero(self._header.data_offset + offset, length, unmap=True, stopped=stopped):
            self._mark(offset, offset + length)

    def zero_step(self, *, unmap: bool) -> int:
        return self._file.image.zero_step(unmap=True)

    def _copy_around(self, start: int, end: int) -> None:
        """Copy the rest of the first and last cluster of a range from the image, if they are new in the snapshot."""
        size = self._header.cluster_size
        first, last = start // size, (end - 1) // size
        if first not in self._file.clusters:
            self._copy(first * size, start)
        if last not in self._file.clusters:
            self._copy(end, min((last + 1) * size, self._header.size))

    def _copy(self, start: int, end: int) -> None:
        for begin in range(start, end, CHUNK):
            data = memoryview(bytearray(min(CHUNK, end - begin)))
            self._base.read(data, begin)
            self._file.image.write(data, self._header.data_offset + begin)

    def _mark(self, start: int, end: int) -> None:
        size = self._header.cluster_size
        self._file.clusters.mark(start // size, -(-end // size))

    def _flush_blocking(self) -> None:
        self._file.flush(durable=not self._unsafe)

    def _free_space(self) -> int:
        return self._file.image.free_space

    def _close_files(self) -> None:
        try:
            self._flush_blocking()  # only this process has the bits
        except OSError as error:
            log.warning("%s: data written since the last flush is lost: %s", self.name, error.strerror or error)
        self._file.close()
        self._base.close()


@dataclass(frozen=True, slots=True)
class OverlayInfo:
    """The state of a snapshot.

    Attributes:
        base: path of the image.
        size: of the image, in bytes.
        block_size: bytes.
        changed: bytes in the snapshot, whole clusters.
        half_committed: a commit was started and not completed.
    """

    base: Path
    size: int
    block_size: int
    changed: int
    half_committed: bool


def info(path: str | os.PathLike[str]) -> OverlayInfo:
    """Return the state of a snapshot that is not in use.

    Raises:
        ImageError: the reasons of :meth:`OverlayFile.open`.
    """
    file = OverlayFile.open(Path(path))
    file.close()
    header = file.header
    return OverlayInfo(header.base, header.size, header.block_size, file.changed_bytes, file.half_committed)


def commit(
    path: str | os.PathLike[str],
    base_path: str | os.PathLike[str],
    *,
    progress: ProgressCallback | None = None,
    force: bool = False,
) -> int:
    """Write the content of a snapshot to its image, and remove the snapshot. Blocks.

    A commit that is interrupted (by an error, a crash, a power cut) leaves a part of the snapshot in the image. The
    snapshot records that, and can then only be committed again, which repeats the whole commit.

    Args:
        path: of the snapshot's file.
        base_path: of the image. The path that the snapshot recorded is not used: the snapshot may come from another
            user, and could name any file.
        progress: called repeatedly, and at the end.
        force: write to the image although this machine uses it, or it is not a RAW image, or does not fit a commit
            that was interrupted.

    Returns:
        The number of bytes that were in the snapshot, whole clusters.

    Raises:
        ImageError: the reasons of :meth:`Image.open` for either file; WRONG_FORMAT, DAMAGED, WRONG_IMAGE; NO_SPACE or
            IO_ERROR: the commit was interrupted.
    """
    file = OverlayFile.open(Path(path))
    header = file.header
    where = Path(base_path)
    try:
        check = _check_nothing if file.half_committed else check_raw
        base = Image.open(where, block_size=header.block_size, force=force, check=check)
        try:
            file.check_base(base, header.block_size, force=force)
            file.begin_commit(base)
            done = _apply(base, file, progress)
            base.sync()
            file.remove()  # while the image is locked: a second commit would overwrite later changes of others
        finally:
            base.close()
        return done
    except OSError as error:
        raise from_oserror(
            f"the commit of {path} to {where}",
            error,
            as_=ImageError,
            problem="was interrupted",
            remedy=Remedy(
                "do not use the image; fix the problem, then finish the commit",
                command=commit_command(Path(path), where),
            ),
        ) from error
    finally:
        file.close()


def _check_nothing(path: Path, content: Content) -> None:
    """Accept any content: a commit was interrupted, and has to be finished."""


def discard(path: str | os.PathLike[str]) -> None:
    """Remove a snapshot that is not in use, and its content.

    Raises:
        ImageError: the reasons of :meth:`OverlayFile.open`; HALF_COMMITTED: a part of it is already in the image,
            which needs the rest.
    """
    file = OverlayFile.open(Path(path))
    try:
        if file.half_committed:
            what = f"a part of {path} is already in its image, which needs the rest"
            raise half_committed_error(what, file.path, None)
        file.remove()
    except OSError as error:
        raise image_error(file.path, error, read_only=False) from error
    finally:
        file.close()


def _apply(base: Image, file: OverlayFile, progress: ProgressCallback | None) -> int:
    """Write every cluster of a snapshot to the image, holes as holes; return the number of bytes."""
    own, offset = file.image, file.header.data_offset
    total = file.changed_bytes
    done = 0
    for begin, end in file.changed_ranges():
        at = begin
        while at < end:
            data_begin, data_end = _next_data(own.fd, offset + at, offset + end)
            data_begin -= offset
            data_end -= offset
            if at < data_begin:
                base.zero(at, data_begin - at, unmap=True)
            for start in range(data_begin, data_end, CHUNK):
                data = memoryview(bytearray(min(CHUNK, data_end - start)))
                own.read(data, offset + start)
                base.write(data, start)
            at = data_end
        done += end - begin
        if progress is not None:
            progress(done, total)
    return done


def _next_data(fd: int, begin: int, end: int) -> tuple[int, int]:
    """Return the first data of a range, up to the next hole (lseek(2)); (end, end): the range is a hole."""
    try:
        first = min(os.lseek(fd, begin, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end, end
    return first, min(os.lseek(fd, first, os.SEEK_HOLE), end) if first < end else end
