"""RAW images: opened, locked, and read and written by calls that block."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeAlias

from farplug.errors import ImageError, Reason
from farplug.shell import shell_word
from farplug.store import holes
from farplug.store.base import BLOCK_SIZE
from farplug.store.content import Content, recognize
from farplug.store.usage import host_uses

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""One system call moves at most so many bytes."""

MAX_USES_REPORTED = 3
"""An error names so many uses of an image on this machine."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FLOCK = struct.Struct("@hhqqi0q")
"""struct flock: l_type, l_whence, l_start, l_len, l_pid (fcntl_locking(2))."""
_BLKROGET, _INT = 0x125E, struct.Struct("@i")
"""In linux/fs.h."""

Check: TypeAlias = Callable[[Path, Content], None]
"""Raises an :class:`ImageError` for what is not to be plugged."""


def check_raw(path: Path, content: Content) -> None:
    """Check that a file is not an image of another format, or compressed: its bytes are not those of a disk.

    Raises:
        ImageError: NOT_RAW.
    """
    if (format := recognize(content)) is not None:
        raise ImageError(
            f"{path} is {format.name}, not a RAW disk image",
            reason=Reason.NOT_RAW,
            remedy=f"{format.remedy_for(path, content, '--usb-disk')}\nto plug its bytes as they are: --force",
        )
    if content.is_cd and not content.has_mbr:
        log.warning("%s is an image of a CD: --usb-cdrom plugs it as one", path)


class Image:
    """An image file or a block device, open. Every method may block, but :meth:`read_cached`.

    Args:
        path: for messages.
        fd: belongs to it from now on.

    Attributes:
        path: as it was given.
        fd: the file descriptor, -1 when it is closed.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._nowait = os.RWF_NOWAIT
        self._sync_failed = 0
        """The errno of the first failure."""

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
        """Open and lock an image of one block or more.

        The lock is an open file description lock on the whole file, exclusive unless ``read_only``: it also keeps
        QEMU from using the image at the same time, and us from using one that QEMU has.

        What this machine itself uses (mounts, swap, LVM, loop devices) is refused. Only if ``read_only``, a use that
        changes nothing does no harm.

        Args:
            path: of the image.
            read_only: whether it is only read.
            block_size: bytes of a block.
            force: log a warning where this machine uses the image, or ``check`` refuses it.
            check: refuses content.

        Raises:
            ImageError: NOT_FOUND, NOT_A_FILE, NO_PERMISSION, EMPTY, IN_USE, IO_ERROR, or of ``check``: NOT_RAW.
        """
        path = Path(path)
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
                raise ImageError(f"{path} is write-protected", reason=Reason.NO_PERMISSION, remedy="plug it read-only")
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
        """Bytes, now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def read_cached(self, data: memoryview, offset: int) -> int:
        """Read what is in the page cache (preadv2 with RWF_NOWAIT): how many bytes, from the beginning."""
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
        """Fill ``data``."""
        got = 0
        while got < len(data):
            count = os.preadv(self.fd, [data[got : got + CHUNK]], offset + got)
            if not count:
                raise OSError(errno.EIO, f"{self.path} ends at byte {offset + got}, it has shrunk")
            got += count

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data``, which never makes the file longer.

        Letting a file that shrank grow again would turn the loss into zeros that nobody notices.
        """
        self._check_end(offset + len(data))
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done : done + CHUNK], offset + done)

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros, by a hole if ``unmap`` and if that can be."""
        self._check_end(offset + length)
        if not holes.zero_range(self.fd, offset, length, unmap=unmap):
            zeros = memoryview(bytes(min(length, CHUNK)))
            for begin in range(0, length, CHUNK):
                self.write(zeros[: length - begin], offset + begin)

    def _check_end(self, end: int) -> None:
        if end > self.size:
            raise OSError(errno.EIO, f"{self.path} ends before byte {end}, it has shrunk")

    def sync(self) -> None:
        """Make everything durable that was written (fdatasync(2)).

        Once that has failed it always fails: Linux forgets what it could not write, and the next fdatasync would
        succeed without it.
        """
        if self._sync_failed:
            raise OSError(self._sync_failed, f"{self.path}: an earlier flush failed")
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._sync_failed = error.errno or errno.EIO
            raise

    def close(self) -> None:
        """Close the file, which also unlocks it. Does nothing the second time."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


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


def _check_unused(path: Path, read_only: bool, force: bool) -> None:
    used = [use for use in host_uses(path) if use.changes or not read_only]
    if not used:
        return
    what = "; ".join(str(use) for use in used[:MAX_USES_REPORTED])
    if force:
        log.warning("%s is used by this machine: %s", path, what)
        return
    commands = [use.end for use in used[:MAX_USES_REPORTED] if use.end]
    danger = "the VM may read what is half written" if read_only else "which will damage what is on it"
    raise ImageError(
        f"{path} is used by this machine: {what}",
        reason=Reason.IN_USE,
        remedy="\n".join(["end that, as root:", *commands] if commands else ["end that"])
        + f"\nor plug it all the same with --force, {danger}",
    )


def _open(path: Path, read_only: bool, force: bool) -> int:
    # O_NONBLOCK: opening a pipe must not wait for its other end; files do not care
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    if read_only:
        try:
            return os.open(path, flags | os.O_NOATIME)
        except PermissionError:
            pass  # only its owner may leave the access time alone
    elif not force and path.is_block_device():
        flags |= os.O_EXCL  # refused while the kernel uses it, and keeps it from being mounted meanwhile (open(2))
    return os.open(path, flags)


def _write_protected(fd: int) -> bool:
    """Of a block device. Linux opens it for writing all the same, and then no write succeeds."""
    return bool(_INT.unpack(fcntl.ioctl(fd, _BLKROGET, bytes(_INT.size)))[0])


def lock(fd: int, path: Path, read_only: bool) -> None:
    """Lock a file as :meth:`Image.open` tells. Where there are no locks, the log has a warning.

    Raises:
        ImageError: IN_USE.
    """
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


def _not_a_file_error(path: Path, what: str) -> ImageError:
    folder = what == "folder"
    return ImageError(
        f"{path} is a {what}, not an image",
        reason=Reason.NOT_A_FILE,
        remedy=f"plug a copy of it: --usb-folder {shell_word(path)}"
        if folder
        else "name an image file or a block device",
    )


def _too_small_error(path: Path, size: int, block_size: int) -> ImageError:
    if not size:
        message = f"{path} is empty"
        remedy = f"make a disk of 1 GiB, for example: truncate -s 1G {shell_word(path)}"
    else:
        message = f"{path} has {size} bytes, less than a block of {block_size}"
        remedy = "check that it was copied or downloaded whole"
    return ImageError(message, reason=Reason.EMPTY, remedy=remedy)


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


def image_error(path: Path, error: OSError | ValueError, read_only: bool) -> ImageError:
    """Tell why a file could not be opened."""
    if isinstance(error, ValueError):  # a NUL in the path
        return ImageError(f"{str(path)!r} is no path", reason=Reason.NOT_FOUND)
    if error.errno == errno.EISDIR:
        return _not_a_file_error(path, "folder")
    if error.errno == errno.ENXIO:  # a socket, or a device node without a device
        return _not_a_file_error(path, "device or a pipe")
    reason = _REASONS.get(error.errno or 0, Reason.IO_ERROR)
    remedy = ""
    if reason is Reason.NOT_FOUND:
        remedy = "check the path"
    elif reason is Reason.IN_USE:
        remedy = "end what uses it on this machine"
        if error.errno == errno.EBUSY:
            remedy += "; a container may have it mounted"
    elif reason is Reason.NO_PERMISSION:
        access = "r" if read_only else "rw"
        remedy = f"ask for the permission ({access}) for the user who runs farplug"
        folders = reversed(path.absolute().parents)
        if closed := next((folder for folder in folders if not os.access(folder, os.X_OK)), None):
            remedy = f"ask for the permission to look into {shell_word(closed)} (x) for the user who runs farplug"
        elif path.is_block_device():
            remedy = f"get it until the device is plugged in again: sudo setfacl -m u:$USER:{access} {shell_word(path)}"
        elif not read_only and os.access(path, os.R_OK):
            remedy = "plug it read-only, or get the permission to write to it"
    return ImageError(
        f"{path} cannot be opened: {(error.strerror or str(error)).lower()}", reason=reason, remedy=remedy
    )
