"""A lock on a device's file, so that only one farplug uses the device.

Such a lock needs no folder that all users share, holds in containers that share /dev, ends with the process in any
case, and does not outlive the device: a device that is plugged in again has a new file.
"""

from __future__ import annotations

import os
from pathlib import Path

from farplug.errors import TOO_MANY_OPEN_FILES, DeviceError, Reason, Remedy, open_files_remedy
from farplug.machine.device_info import DeviceInfo
from farplug.machine.obstacles import busy, device_lost, no_permission


class DeviceLock:
    """A lock that keeps other farplugs from a device, until :meth:`release`.

    Opening the file of a device that hangs blocks: lock and release in a thread.

    Raises:
        DeviceError: another farplug uses the device (``BUSY``), it was unplugged (``DEVICE_LOST``), there is no
            permission (``NO_PERMISSION``), or there are too many open files (``IO_ERROR``).
    """

    def __init__(self, device: DeviceInfo) -> None:
        self.node: Path = device.node
        try:
            self._descriptor = os.open(device.node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as error:
            raise no_permission(device.vendor_id, device.product_id).error(device) from error
        except OSError as error:
            why = os.strerror(error.errno or 0)
            if error.errno in TOO_MANY_OPEN_FILES:
                raise DeviceError(
                    f"{device} cannot be plugged in: {why}",
                    reason=Reason.IO_ERROR,
                    remedy=open_files_remedy(error),
                ) from error
            remedy = Remedy("plug it in again, or wait until it is plugged in", setting="rules.wait", value=True)
            raise device_lost(device, why, remedy) from error
        import fcntl  # not on Windows

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise busy(device.node, "another farplug").error(device) from error

    def release(self) -> None:
        """Release the lock. Does nothing the second time."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
