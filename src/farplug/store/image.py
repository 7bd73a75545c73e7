"""RAW images: open, lock, read and write them, with calls that block."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeAlias

from farplug.errors import ImageError, Reason, Remedy, from_oserror
from farplug.shell import shell_word
from farplug.store import holes
from farplug.store.base import BLOCK_SIZE, ZERO_STEP, Stopped, never_stopped
from farplug.store.content import Content, recognize
from farplug.store.usage import host_uses

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Maximum number of bytes of one system call."""

FAST_ZERO_STEP = 128 << 20
"""Bytes to zero at once where the file system zeroes ranges without writing."""

MAX_USES_REPORTED = 3
"""Maximum number of uses on this machine that an error names."""

if sys.platform == "linux":
    _RWF_NOWAIT, _O_NOATIME = os.RWF_NOWAIT, os.O_NOATIME
else:
    _RWF_NOWAIT, _O_NOATIME = 0, 0

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FLOCK = struct.Struct("@hhqqi0q")
"""struct flock: l_type, l_whence, l_start, l_len, l_pid (fcntl_locking(2))."""
_BLKROGET, _INT = 0x125E, struct.Struct("@i")
"""In linux/fs.h."""

Check: TypeAlias = Callable[[Path, Content], None]
"""Raises an :class:`ImageError` for content that must not be plugged."""


def check_raw(path: Path, content: Content) -> None:
    """Check that a file is not compressed, and not an image of another format: its bytes must be those of a disk.

    Raises:
        ImageError: NOT_RAW.
    """
    if (format := recognize(content)) is not None:
        raise ImageError(
            f"{path} is {format.name}, not a RAW disk image",
            reason=Reason.NOT_RAW,
            remedy=format.remedy(path, content, "usb_disk", force_remedy("to plug its bytes as they are")),
        )
    if content.is_cd and not content.has_mbr:
        log.warning("%s is an ISO image: plug it in as a CD-ROM", path)


def force_remedy(text: str) -> Remedy:
    """Return the remedy that an image is plugged in spite of an error."""
    return Remedy(text, setting="storage.force", value=True)


def read_only_remedy(path: Path, alternative: Remedy | None = None) -> Remedy:
    """Return the remedy that an image is plugged read-only."""
    return Remedy("plug it in read-only", setting="usb_disk_ro", value=str(path), alternative=alternative)


class Image:
    """An open image file or block device. Every method but :meth:`read_cached` may block, unless it says otherwise.

    Args:
        path: for messages.
        fd: file descriptor, which the image owns from now on.

    Attributes:
        path: as the caller gave it.
        fd: the file descriptor; -1 after :meth:`close`.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._nowait = _RWF_NOWAIT
        self._zeroes_ranges = {True: False, False: False}
        """Whether the last range was zeroed without writing, with and without ``unmap``."""
        self._sync_failed = 0
        """The errno of the first failure; 0: none."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        block_size: int = BLOCK_SIZE,
        force: bool = False,
        check: Check = check_raw,
    ) -> Self:
        """Open and lock an image of at least one block.

        The lock is an open file description lock on the whole file, exclusive unless ``read_only``. It conflicts with
        the locks of QEMU, so that QEMU and farplug never use one image at the same time.

        An image that this machine uses (mounts, swap, LVM, loop devices) is refused, except uses that change nothing
        if ``read_only``.

        Args:
            path: of the image.
            read_only: open it for reading only.
            block_size: bytes in a block.
            force: only log a warning if this machine uses the image, or if ``check`` refuses it.
            check: refuses files by their content.

        Raises:
            ImageError: NOT_FOUND, NOT_A_FILE, NO_PERMISSION, EMPTY, IN_USE, IO_ERROR, or of ``check``: NOT_RAW.
        """
        path = Path(path)
        if sys.platform == "win32":
            raise unsupported_error(path)
        try:
            _check_unused(path, read_only, force)
            image = cls(path, _open(path, read_only, force))
        except (OSError, ValueError) as error:
            raise image_error(path, error, read_only) from error
        try:
            kind = os.fstat(image.fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise _not_a_file_error(path, "folder" if stat.S_ISDIR(kind) else "device or a pipe")
            if not read_only and stat.S_ISBLK(kind) and _write_protected(image.fd):
                remedy = read_only_remedy(path)
                raise ImageError(f"{path} is write-protected", reason=Reason.NO_PERMISSION, remedy=remedy)
            lock(image.fd, path, read_only)
            image._check(check, force)
            if image.size < block_size:
                raise _too_small_error(path, image.size, block_size)
        except OSError as error:
            image.close()
            raise image_error(path, error, read_only) from error
        except BaseException:
            image.close()
            raise
        return image

    def _check(self, check: Check, force: bool) -> None:
        try:
            check(self.path, Content.read(self.fd))
        except (ImageError, OSError) as error:
            if not force:
                raise
            log.warning("%s: plugged as it is", error)

    @property
    def size(self) -> int:
        """Return the current size in bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    @property
    def free_space(self) -> int:
        """Return how many bytes the file system of the image has for its holes; a block device has none."""
        if sys.platform == "win32":
            raise unsupported_error(self.path)
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            return sys.maxsize
        found = os.fstatvfs(self.fd)
        return found.f_bavail * found.f_frsize

    def read_cached(self, data: memoryview, offset: int) -> int:
        """Read what the page cache has (preadv2 with RWF_NOWAIT); return the number of bytes, from the start."""
        if self._nowait:
            try:
                return os.preadv(self.fd, [data], offset, self._nowait)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._nowait = 0
        return 0

    def read(self, data: memoryview, offset: int) -> None:
        """Read bytes until ``data`` is full."""
        got = 0
        while got < len(data):
            count = os.preadv(self.fd, [data[got : got + CHUNK]], offset + got)
            if not count:
                raise OSError(errno.EIO, f"{self.path} ends at byte {offset + got}: it has shrunk")
            got += count

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data``, without making the file longer.

        If a write made a shrunk file grow again, zeros would replace the lost data, and no error would show it.
        """
        self._check_end(offset + len(data))
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done : done + CHUNK], offset + done)

    def zero(self, offset: int, length: int, *, unmap: bool, stopped: Stopped = never_stopped) -> bool:
        """Write zeros to a range, as a hole if ``unmap`` and if the file system supports that.

        Returns:
            False if ``stopped`` returned True before the whole range was zeroed.
        """
        self._check_end(offset + length)
        if stopped():
            return False
        self._zeroes_ranges[unmap] = holes.zero_range(self.fd, offset, length, unmap=unmap)
        if not self._zeroes_ranges[unmap]:
            zeros = memoryview(bytes(min(length, CHUNK)))
            for begin in range(0, length, CHUNK):
                if stopped():
                    return False
                self.write(zeros[: length - begin], offset + begin)
        return True

    def zero_step(self, *, unmap: bool) -> int:
        """Return the bytes to zero at once, by how the last :meth:`zero` was done. Does not block."""
        return FAST_ZERO_STEP if self._zeroes_ranges[unmap] else ZERO_STEP

    def _check_end(self, end: int) -> None:
        if end > self.size:
            raise OSError(errno.EIO, f"{self.path} ends before byte {end}: it has shrunk")

    def sync(self) -> None:
        """Make all written data durable (fdatasync(2); on macOS F_FULLFSYNC of fcntl(2)).

        After one failure every call fails: Linux drops the pages that it could not write, and the next fdatasync would
        succeed without them.
        """
        if self._sync_failed:
            raise OSError(self._sync_failed, f"{self.path}: an earlier flush failed")
        try:
            _sync(self.fd)
        except OSError as error:
            self._sync_failed = error.errno or errno.EIO
            raise

    def close(self) -> None:
        """Close the file, which also unlocks it. The second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def serial_number(path: Path) -> str:
    """Return the serial number of an image: 16 upper-case hex digits.

    It is a digest of the resolved path and of the machine ID (machine-id(5)). So it stays the same when the image is
    rewritten, resized or replaced by a newer one, and a guest that identifies disks by serial number (drive letters,
    /dev/disk/by-id) finds the same disk again. Two images on one machine differ, and so do equal paths on two machines.
    An image that is moved becomes another disk: device and inode would stay the same then, but not when the image is
    replaced or restored.
    """
    try:
        machine = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        machine = b""
    where = os.fsencode(os.path.realpath(path))
    return hashlib.sha256(b"farplug image\0" + machine + b"\0" + where).hexdigest()[:16].upper()


def _check_unused(path: Path, read_only: bool, force: bool) -> None:
    used = [use for use in host_uses(path) if use.changes or not read_only]
    if not used:
        return
    what = "; ".join(str(use) for use in used[:MAX_USES_REPORTED])
    if force:
        log.warning("%s is used by this machine: %s", path, what)
        return
    commands = [use.end for use in used[:MAX_USES_REPORTED] if use.end]
    danger = "the VM may read half-written data" if read_only else "which will damage its content"
    raise ImageError(
        f"{path} is used by this machine: {what}",
        reason=Reason.IN_USE,
        remedy=Remedy(
            "end that, as root" if commands else "end that",
            command="\n".join(commands),
            alternative=force_remedy(f"or plug it in nevertheless, {danger}"),
        ),
    )


def _open(path: Path, read_only: bool, force: bool) -> int:
    # O_NONBLOCK: opening a pipe must not wait for its other end; it has no effect on files
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    if read_only:
        try:
            return os.open(path, flags | _O_NOATIME)
        except PermissionError:
            pass  # only the owner of a file may use O_NOATIME
    elif not force and path.is_block_device():
        flags |= os.O_EXCL  # fails while the kernel uses it, and prevents mounts until it is closed (open(2))
    return os.open(path, flags)


def _sync(fd: int) -> None:
    if sys.platform != "darwin":
        os.fdatasync(fd)
        return
    try:
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync(2) leaves data in the drive's cache there
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOTTY, errno.EINVAL):  # SMB, for example
            raise
        os.fsync(fd)


def _write_protected(fd: int) -> bool:
    """Return whether a block device is write-protected: Linux opens it for writing, but every write fails."""
    if sys.platform != "linux":
        return False
    return bool(_INT.unpack(fcntl.ioctl(fd, _BLKROGET, bytes(_INT.size)))[0])


def lock(fd: int, path: Path, read_only: bool) -> None:
    """Lock a file as :meth:`Image.open` does. Log a warning if its file system has no locks.

    Raises:
        ImageError: IN_USE.
    """
    try:
        if sys.platform == "linux":
            kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        else:  # flock(2) belongs to the open file, too
            fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning("%s cannot be locked (%s): make sure that no other program uses it", path, error.strerror)
            return
        raise ImageError(
            f"{path} is in use{' for writing' if read_only else ''}",
            reason=Reason.IN_USE,
            remedy="end the farplug or the virtual machine that uses it; only read-only disks can share an image",
        ) from error


def unsupported_error(path: Path) -> ImageError:
    """Return the error for an image on a system where images cannot be used."""
    return ImageError(f"{path}: farplug cannot use images on this system", reason=Reason.UNSUPPORTED_SYSTEM)


def _not_a_file_error(path: Path, what: str) -> ImageError:
    folder = what == "folder"
    return ImageError(
        f"{path} is a {what}, not an image",
        reason=Reason.NOT_A_FILE,
        remedy=Remedy("plug a copy of it", setting="usb_folder", value=str(path))
        if folder
        else "name an image file or a block device",
    )


def _too_small_error(path: Path, size: int, block_size: int) -> ImageError:
    if not size:
        message = f"{path} is empty"
        remedy = Remedy("make a disk of 1 GiB, for example", command=f"truncate -s 1G {shell_word(path)}")
    else:
        message = f"{path} has {size} bytes, less than a block of {block_size}"
        remedy = Remedy("check that it was copied or downloaded completely")
    return ImageError(message, reason=Reason.EMPTY, remedy=remedy)


def image_error(path: Path, error: OSError | ValueError, read_only: bool) -> ImageError:
    """Return the error for a file that could not be opened, because of an error of the system."""
    if isinstance(error, ValueError):
        return from_oserror(path, error, as_=ImageError)
    if error.errno == errno.EISDIR:
        return _not_a_file_error(path, "folder")
    if error.errno == errno.ENXIO:  # a socket, or a device node without a device
        return _not_a_file_error(path, "device or a pipe")
    result = from_oserror(path, error, as_=ImageError)
    if result.reason is Reason.IN_USE:
        in_container = "; a container may have it mounted" if error.errno == errno.EBUSY else ""
        result.remedy = Remedy(f"end what uses it on this machine{in_container}")
    elif result.reason is Reason.NO_PERMISSION:
        result.remedy = _permission_remedy(path, read_only)
    return result


def _permission_remedy(path: Path, read_only: bool) -> Remedy:
    access = "r" if read_only else "rw"
    folders = reversed(path.absolute().parents)
    if closed := next((folder for folder in folders if not os.access(folder, os.X_OK)), None):
        return Remedy(f"get permission to search {shell_word(closed)} (x) for the user who runs farplug")
    if path.is_block_device():
        return Remedy(
            "get permission until the device is plugged in again",
            command=f"sudo setfacl -m u:$USER:{access} {shell_word(path)}",
        )
    if not read_only and os.access(path, os.R_OK):
        return read_only_remedy(path, Remedy("or get permission to write to it"))
    return Remedy(f"get permission ({access}) for the user who runs farplug")
