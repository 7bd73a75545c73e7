"""Zeros without writing them: Linux's fallocate(2), whose modes Python's os module lacks.

It works on files and on block devices. For a device the kernel uses the device's own command for zeros, and drops its
cached pages (blkdev_fallocate). A plain discard (BLKDISCARD) is not enough: afterwards a device may return any data.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from pathlib import Path

BLOCK_DEVICES = Path("/sys/dev/block")

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
"""FALLOC_FL_ in linux/falloc.h."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""EINVAL: the range does not consist of whole blocks of a block device."""

if sys.platform == "linux":
    _libc = ctypes.CDLL(None, use_errno=True)
    _fallocate64 = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
    _fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
else:

    def _fallocate64(fd: int, mode: int, offset: int, length: int) -> int:
        """Fail as on a file system without support: no other system has this call."""
        ctypes.set_errno(errno.ENOSYS)
        return -1


def zero_range(fd: int, offset: int, length: int, *, unmap: bool) -> bool:
    """Make a range read as zeros.

    Args:
        fd: of a file or block device that is open for writing.
        offset: bytes.
        length: bytes, at least 1.
        unmap: release the space; otherwise it stays allocated.

    Returns:
        False if the file system or device does not support it; nothing has changed then.

    Raises:
        OSError: it failed.
    """
    return _fallocate(fd, _KEEP_SIZE | (_PUNCH_HOLE if unmap else _ZERO_RANGE), offset, length)


def can_unmap(fd: int) -> bool:
    """Return whether space of a file or block device, open for writing, can be released. Nothing changes."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, status.st_size, 1)  # behind the end
    device = BLOCK_DEVICES / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for folder in (device, device.resolve().parent):  # a disk, or the disk whose partition it is
        try:
            return int((folder / "queue/write_zeroes_max_bytes").read_text()) > 0
        except (OSError, ValueError):
            continue
    return False


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    while _fallocate64(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
