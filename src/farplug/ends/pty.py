"""An end that is a pseudoterminal, which any terminal program opens like a serial port."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from farplug.ends.base import CHUNK, End
from farplug.ends.descriptor import DescriptorPeer
from farplug.errors import DeviceError, Reason, from_oserror
from farplug.usb.types import Buffer

if sys.platform != "win32":
    import tty

POLL_INTERVAL: Final = 0.1
"""Seconds between two looks whether a program has opened the terminal: the kernel reports no event for that."""

_TERMINALS: Final = ("/dev/pts/", "/dev/ttys")


class PtyEnd(End):
    """A pseudoterminal. A program that has it open is the peer.

    Args:
        link: a symbolic link to make, which has the same path each time; a link that was left over is replaced.
    """

    def __init__(self, link: Path | None = None) -> None:
        super().__init__("pty" if link is None else f"pty:{link}")
        self._link = link
        self._path = ""
        self._master = -1
        self._watching: asyncio.Task[None] | None = None

    async def _open(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise from_oserror("a pseudoterminal", error, as_=DeviceError) from error
        self._path = os.ttyname(slave)
        tty.setraw(slave)  # stays while the master is open: nothing is echoed to the guest
        os.close(slave)
        os.set_blocking(self._master, False)
        try:
            self._make_link()
        except BaseException:
            os.close(self._master)
            raise
        self.address = self._path if self._link is None else str(self._link)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _close(self) -> None:
        assert self._watching is not None
        self._watching.cancel()
        await asyncio.wait([self._watching])
        if self._link is not None and _target(self._link) == self._path:
            with suppress(OSError):
                self._link.unlink()
        if self.peer is not None:
            self.peer.close()
        os.close(self._master)

    async def _watch(self) -> None:
        """Take note of programs that open the terminal, and of those that close it while the guest reads nothing."""
        while True:
            used = not _is_unused(self._master)
            if self.peer is None and used:
                self.came(_PtyPeer(self._master, self._path))
            elif self.peer is not None and not used:
                self.left(self.peer)
            await asyncio.sleep(POLL_INTERVAL)

    def _make_link(self) -> None:
        """Make the symbolic link.

        Raises:
            DeviceError: it cannot be made, or something else has its path.
        """
        if self._link is None:
            return
        old = _target(self._link)
        if os.path.lexists(self._link) if old is None else not old.startswith(_TERMINALS):
            raise DeviceError(
                f"{self._link} exists, and is not a link to a pseudoterminal",
                reason=Reason.EXISTS,
                remedy="choose another path, or remove it",
            )
        new = self._link.with_name(f".{self._link.name}.{os.getpid()}")
        try:
            new.symlink_to(self._path)
            new.replace(self._link)
        except (OSError, ValueError) as error:
            with suppress(OSError, ValueError):
                new.unlink()
            raise from_oserror(self._link, error, as_=DeviceError, problem="cannot be made a link") from error


class _PtyPeer(DescriptorPeer):
    """The programs that have the terminal open."""

    def __init__(self, master: int, path: str) -> None:
        super().__init__(master, f"a program at {path}")

    async def read(self) -> Sequence[bytes]:
        while True:
            try:
                data = os.read(self.descriptor, CHUNK)
            except BlockingIOError:
                await self.readable()
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                data = b""  # the last program has closed the terminal
            return (data,) if data else ()

    async def write(self, items: Sequence[Buffer]) -> None:
        for item in items:
            rest = memoryview(item)
            while rest:
                try:
                    rest = rest[os.write(self.descriptor, rest) :]
                except BlockingIOError:
                    await self.writable()
                    if _is_unused(self.descriptor):
                        raise OSError(errno.EIO, "the terminal was closed") from None


def _is_unused(master: int) -> bool:
    """Return whether no program has the terminal open, and nothing that one has written is unread."""
    poll = select.poll()
    poll.register(master, select.POLLIN)
    events = dict(poll.poll(0)).get(master, 0)
    return bool(events & select.POLLHUP) and not events & select.POLLIN


def _target(link: Path) -> str | None:
    try:
        return os.readlink(link)
    except OSError:
        return None
