"""An end that is a TAP interface: a network interface of this machine, whose cable leads to the guest. Linux only."""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Sequence
from typing import Final

from farplug.ends.base import End
from farplug.ends.descriptor import DescriptorPeer
from farplug.errors import DeviceError, Reason, Remedy, SetupError
from farplug.shell import shell_word
from farplug.usb.types import Buffer

if sys.platform != "win32":
    import fcntl

MAX_NAME: Final = 15
"""Bytes in the name of an interface (IFNAMSIZ)."""

MAX_FRAMES: Final = 64
"""Frames that are read at once, at most."""

_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_MAX_FRAME: Final = 64 << 10


class TapEnd(End):
    """A TAP interface, which is made if it does not exist and this user may do that."""

    def __init__(self, name: str, address: str) -> None:
        super().__init__(address)
        self._name = name
        self._descriptor = -1

    async def _open(self) -> None:
        if sys.platform != "linux":
            raise SetupError("only Linux has TAP interfaces", reason=Reason.UNSUPPORTED_SYSTEM)
        try:
            self._descriptor = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise self._fault(error, _DEVICE) from error
        try:
            request = struct.pack("16sH22x", self._name.encode(), _IFF_TAP | _IFF_NO_PI)
            fcntl.ioctl(self._descriptor, _TUNSETIFF, request)
        except OSError as error:
            os.close(self._descriptor)
            raise self._fault(error, f"the interface {self._name}") from error
        self.came(_TapPeer(self._descriptor, f"the interface {self._name}"))

    async def _close(self) -> None:
        if self.peer is not None:
            self.peer.close()
        os.close(self._descriptor)

    def _fault(self, error: OSError, what: str) -> DeviceError:
        if error.errno == errno.EBUSY:
            return DeviceError(
                f"{what} is in use by another program", reason=Reason.IN_USE, remedy="choose another interface"
            )
        if error.errno in (errno.EPERM, errno.EACCES):
            return DeviceError(
                f"this user may not use {what}",
                reason=Reason.NO_PERMISSION,
                remedy=Remedy(
                    "make the interface for this user",
                    command=f"sudo ip tuntap add dev {shell_word(self._name)} mode tap user $USER\n"
                    f"sudo ip link set dev {shell_word(self._name)} up",
                ),
            )
        reason = Reason.NOT_FOUND if error.errno in (errno.ENOENT, errno.ENODEV) else Reason.IO_ERROR
        text = os.strerror(error.errno or 0).lower()
        return DeviceError(
            f"{what} cannot be used: {text}",
            reason=reason,
            remedy=Remedy("load its module", command="sudo modprobe tun"),
        )


class _TapPeer(DescriptorPeer):
    async def read(self) -> Sequence[bytes]:
        frames: list[bytes] = []
        while True:
            try:
                while len(frames) < MAX_FRAMES:
                    frames.append(os.read(self.descriptor, _MAX_FRAME))
            except BlockingIOError:
                pass
            if frames:
                return frames
            await self.readable()

    async def write(self, items: Sequence[Buffer]) -> None:
        for frame in items:
            try:
                os.write(self.descriptor, frame)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EINVAL, errno.EAGAIN):  # the interface is down: it is lost
                    raise
