"""A store in a RAW image file or a block device."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Self

from farplug.errors import ImageError, Reason
from farplug.store import holes
from farplug.store.base import BLOCK_SIZE, ReadDone, Store, WriteDone
from farplug.store.workers import Workers
from farplug.usb.types import Buffer

log = logging.getLogger(__name__)

READER_THREADS = 4
"""Reads that wait for the medium at the same time."""

_CHUNK = 1 << 20
"""A worker moves at most so many bytes in one system call."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FLOCK = struct.Struct("@hhqqi0q")
"""struct flock: l_type, l_whence, l_start, l_len, l_pid (fcntl_locking(2))."""


class FileStore(Store):
    """A RAW image file, or a block device. Made by :meth:`open`.

    Reads of cached pages happen at once (preadv2 with RWF_NOWAIT), others in a few threads. Writes and flushes go
    through one thread, in order: a write may block for long (dirty throttling, a journal), and most file systems cannot
    promise otherwise. So a flush covers every write before it and overlapping writes keep their order; a read that
    overlaps a write under way queues behind it.

    If the file shrinks while it is open, what is lost reads as an error until :meth:`refresh` has seen the new size,
    and writing there is an error too: letting it grow again would turn the loss into zeros that nobody notices.

    Attributes:
        path: as it was given.
        ignored: bytes of a trailing part of a block, which the disk does not show.
    """

    def __init__(self, path: Path, fd: int, size: int, *, block_size: int, read_only: bool) -> None:
        self.path = path
        self.name = str(path)
        self.read_only = read_only
        self.block_size = block_size
        self.block_count, self.ignored = divmod(size, block_size)
        self.unmaps = not read_only and holes.can_unmap(fd)
        self.serial_number = serial_number(path)
        self._fd = fd
        self._readers: Workers | None = None
        self._writer: Workers | None = None
        self._nowait = os.RWF_NOWAIT
        self._writing: dict[int, tuple[int, int]] = {}
        """Ranges (start, end) of the writes under way, by an arbitrary key."""
        self._next_key = 0
        self._refreshing = False
        self._closing: asyncio.Future[None] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False, block_size: int = BLOCK_SIZE) -> Self:
        """Open and lock an image.

        The lock is an open file description lock on the whole file, exclusive unless ``read_only``: it also keeps
        QEMU from using the image at the same time, and us from using one that QEMU has.

        Raises:
            ImageError: NOT_FOUND, NOT_A_FILE, NO_PERMISSION, EMPTY, IN_USE or IO_ERROR.
        """
        path = Path(path)
        try:
            fd = _open(path, read_only)
        except (OSError, ValueError) as error:
            raise _image_error(path, error, read_only) from error
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise _not_a_file(path, "folder" if stat.S_ISDIR(kind) else "device or a pipe")
            _lock(fd, path, read_only)
            size = os.lseek(fd, 0, os.SEEK_END)
            if size < block_size:
                raise ImageError(
                    f"{path} is empty" if not size else f"{path} has {size} bytes, less than a block of {block_size}",
                    reason=Reason.EMPTY,
                    remedy=f"make a disk of 1 GiB, for example: truncate -s 1G {path}",
                )
            store = cls(path, fd, size, block_size=block_size, read_only=read_only)
        except OSError as error:
            os.close(fd)
            raise _image_error(path, error, read_only) from error
        except BaseException:
            os.close(fd)
            raise
        if store.ignored:
            log.warning("%s: the last %d bytes are no whole block and are not shown", path, store.ignored)
        return store

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        data = bytearray(length)
        got = 0
        if not self._overlaps(offset, offset + length):
            if self._nowait:
                try:
                    got = os.preadv(self._fd, [data], offset, self._nowait)
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        done(b"", error)
                        return
                    self._nowait = 0
                if got == length:
                    done(data, None)
                    return
            if self._readers is None:
                self._readers = Workers(READER_THREADS, "farplug-read")
            workers = self._readers
        else:
            workers = self._write_thread()

        def finish(error: OSError | None) -> None:
            done(b"" if error else data, error)

        workers.run(lambda: self._read_rest(memoryview(data), offset, got), finish)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        self._change(offset, len(data), lambda: self._write_all(memoryview(data), offset), done)

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool) -> None:
        self._change(offset, length, lambda: self._zero_all(offset, length, unmap), done)

    def _change(self, offset: int, length: int, work: Callable[[], None], done: WriteDone) -> None:
        """Have the thread for writes change a range, if the file still has it."""
        if self.read_only:
            done(OSError(errno.EROFS, f"{self.name} is read-only"))
            return
        key = self._next_key
        self._next_key += 1
        end = offset + length
        self._writing[key] = (offset, end)

        def change() -> None:
            if end > os.lseek(self._fd, 0, os.SEEK_END):
                raise OSError(errno.EIO, f"{self.name} ends before byte {end}, it has shrunk")
            work()

        def finish(error: OSError | None) -> None:
            del self._writing[key]
            done(error)

        self._write_thread().run(change, finish)

    def flush(self, done: WriteDone) -> None:
        if self.read_only:
            done(None)
            return
        self._write_thread().run(lambda: os.fdatasync(self._fd), done)

    def refresh(self) -> None:
        if self._refreshing:
            return
        self._refreshing = True
        size = 0

        def look() -> None:
            nonlocal size
            size = os.lseek(self._fd, 0, os.SEEK_END)

        def finish(error: OSError | None) -> None:
            self._refreshing = False
            block_count = size // self.block_size
            # A file that shrank lost blocks: they are errors of the medium, and the disk keeps its size.
            if block_count > self.block_count:
                log.info("%s: %d blocks now, %d before", self.name, block_count, self.block_count)
                self.block_count = block_count

        self._write_thread().run(look, finish)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        # A caller that gives up must not close the file under a write.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        running = [workers for workers in (self._writer, self._readers) if workers is not None]
        self._writer = self._readers = None
        for workers in running:
            await asyncio.to_thread(workers.stop)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _overlaps(self, start: int, end: int) -> bool:
        return any(start < other_end and other_start < end for other_start, other_end in self._writing.values())

    def _write_thread(self) -> Workers:
        if self._writer is None:
            self._writer = Workers(1, "farplug-write")
        return self._writer

    def _read_rest(self, data: memoryview, offset: int, got: int) -> None:
        """Runs in a thread."""
        while got < len(data):
            count = os.preadv(self._fd, [data[got : got + _CHUNK]], offset + got)
            if not count:
                raise OSError(errno.EIO, f"{self.name} ends at byte {offset + got}, it has shrunk")
            got += count

    def _write_all(self, data: memoryview, offset: int) -> None:
        """Runs in a thread."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done : done + _CHUNK], offset + done)

    def _zero_all(self, offset: int, length: int, unmap: bool) -> None:
        """Runs in a thread."""
        if not holes.zero_range(self._fd, offset, length, unmap=unmap):
            zeros = memoryview(bytes(min(length, _CHUNK)))
            for begin in range(0, length, _CHUNK):
                self._write_all(zeros[: length - begin], offset + begin)


def serial_number(path: Path) -> str:
    """Make the serial number of an image: 16 upper-case hex digits.

    They come from its resolved path on this machine (machine-id(5)). So it stays when the image is rewritten, resized
    or replaced by a newer one, and a guest that knows disks by serial number (drive letters, /dev/disk/by-id) finds
    the same disk again. Two images of one machine, or the same path on two machines, differ. An image that is moved
    becomes another disk: device and inode would follow it, but not survive its being replaced or restored.
    """
    try:
        machine = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        machine = b""
    where = os.fsencode(os.path.realpath(path))
    return hashlib.sha256(b"farplug image\0" + machine + b"\0" + where).hexdigest()[:16].upper()


def _open(path: Path, read_only: bool) -> int:
    # O_NONBLOCK: opening a pipe must not wait for its other end; files do not care
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    if read_only:
        try:
            return os.open(path, flags | os.O_NOATIME)
        except PermissionError:
            pass  # only its owner may leave the access time alone
    elif path.is_block_device():
        flags |= os.O_EXCL  # refused while it is mounted here (open(2))
    return os.open(path, flags)


def _lock(fd: int, path: Path, read_only: bool) -> None:
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning("%s cannot be locked (%s): keep others from using it", path, error.strerror)
            return
        raise ImageError(
            f"{path} is in use{' for writing' if read_only else ''}",
            reason=Reason.IN_USE,
            remedy="end the farplug or the virtual machine that uses it; only read-only disks can share an image",
        ) from error


def _not_a_file(path: Path, what: str) -> ImageError:
    return ImageError(
        f"{path} is a {what}, not a disk image",
        reason=Reason.NOT_A_FILE,
        remedy="name a RAW image file or a block device",
    )


_REASONS = {
    errno.ENOENT: Reason.NOT_FOUND,
    errno.ENOTDIR: Reason.NOT_FOUND,
    errno.ELOOP: Reason.NOT_FOUND,
    errno.ENAMETOOLONG: Reason.NOT_FOUND,
    errno.EACCES: Reason.NO_PERMISSION,
    errno.EPERM: Reason.NO_PERMISSION,
    errno.EROFS: Reason.NO_PERMISSION,
    errno.ETXTBSY: Reason.IN_USE,
    errno.EBUSY: Reason.IN_USE,
}


def _image_error(path: Path, error: OSError | ValueError, read_only: bool) -> ImageError:
    if isinstance(error, ValueError):  # a NUL in the path
        return ImageError(f"{str(path)!r} is no path", reason=Reason.NOT_FOUND)
    if error.errno == errno.EISDIR:
        return _not_a_file(path, "folder")
    if error.errno == errno.ENXIO:  # a socket, or a device node without a device
        return _not_a_file(path, "device or a pipe")
    reason = _REASONS.get(error.errno or 0, Reason.IO_ERROR)
    remedy = ""
    if reason is Reason.NOT_FOUND:
        remedy = "check the path"
    elif reason is Reason.IN_USE:
        remedy = "unmount it and end what uses it, or plug it read-only"
    elif reason is Reason.NO_PERMISSION:
        remedy = f"ask for the permission ({'r' if read_only else 'rw'}) for the user who runs farplug"
        if not read_only and os.access(path, os.R_OK):
            remedy = "plug it read-only, or get the permission to write to it"
    return ImageError(
        f"{path} cannot be opened: {(error.strerror or str(error)).lower()}", reason=reason, remedy=remedy
    )
