"""One farplug for each device: a lock on the device's own node.

A lock on the node needs no folder that all users share, holds in containers that share /dev, ends with the process
however that ends, and a device that is plugged in anew is not locked.
"""

from __future__ import annotations

import os
from pathlib import Path

from farplug.errors import TOO_MANY_OPEN_FILES, DeviceError, Reason
from farplug.machine.found import Found
from farplug.machine.obstacles import busy, gone, no_permission
from farplug.machine.sysfs import fewer_open_files


class DeviceLock:
    """A device that no other farplug takes, until :meth:`release`.

    Opening a node waits for a device that hangs: take and release it in a thread.

    Raises:
        DeviceError: another farplug has it (``BUSY``), it is not there any more (``DEVICE_LOST``), there is no
            permission (``NO_PERMISSION``), or there are too many open files (``IO_ERROR``).
    """

    def __init__(self, found: Found) -> None:
        self.node: Path = found.node
        try:
            self._descriptor = os.open(found.node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as error:
            raise no_permission(found.vendor_id, found.product_id).error(found) from error
        except OSError as error:
            why = os.strerror(error.errno or 0)
            if error.errno in TOO_MANY_OPEN_FILES:
                raise DeviceError(
                    f"{found} cannot be plugged in: {why}",
                    reason=Reason.IO_ERROR,
                    remedy=fewer_open_files(error),
                ) from error
            raise gone(found, why, "plug it in again; --wait waits for it") from error
        import fcntl  # Windows has none

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise busy(found.node, "another farplug").error(found) from error

    def release(self) -> None:
        """Let others have the device. Does nothing the second time."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
