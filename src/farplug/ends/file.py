"""An end that is a file, which gets what the guest sends."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from farplug.ends.base import End
from farplug.ends.threaded import ThreadedPeer
from farplug.errors import DeviceError, Reason, from_oserror


class FileEnd(End):
    """A regular file, to which what the guest sends is appended. It sends nothing to the guest.

    When the file cannot be written any more, what the guest sends is lost.
    """

    def __init__(self, path: Path, address: str) -> None:
        super().__init__(address)
        self._path = path

    async def _open(self) -> None:
        try:
            descriptor = os.open(
                self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666
            )
        except (OSError, ValueError) as error:
            raise from_oserror(self._path, error, as_=DeviceError) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DeviceError(
                f"{self._path} is not a regular file", reason=Reason.NOT_A_FILE, remedy="name a file, or a new one"
            )
        self.came(_FilePeer(descriptor, str(self._path)))

    async def _close(self) -> None:
        """Do nothing: the peer has the file."""


class _FilePeer(ThreadedPeer):
    async def read(self) -> Sequence[bytes]:
        never: asyncio.Future[Sequence[bytes]] = asyncio.get_running_loop().create_future()
        return await never

    def close(self) -> None:
        if self.writing is None or self.writing.done():
            os.close(self._descriptor)
        else:
            self.writing.add_done_callback(lambda written: os.close(self._descriptor))
