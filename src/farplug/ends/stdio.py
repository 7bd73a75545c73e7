"""An end that is the standard input and output of this process, and the terminal there, if there is one."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from farplug.ends.base import CHUNK, End
from farplug.ends.threaded import ThreadedPeer
from farplug.threads import run_in_daemon_thread

if sys.platform != "win32":
    import termios
    import tty

LEAVE: Final = b"\x1d"
"""Ctrl-]: the only key that the guest does not get from a terminal. It interrupts, as Ctrl-C does elsewhere."""

_LFLAG, _CC = 3, 6
"""Places in the list of termios.tcgetattr()."""

_before: list[Any] = []
"""What the terminal was before it was made raw; empty: it is not raw."""


class StdioEnd(End):
    """Standard input and output. A terminal is raw while a guest uses it: every key is the guest's but Ctrl-].

    Ctrl-] raises SIGINT. The end of the input does not end the output.
    """

    def __init__(self) -> None:
        super().__init__("this terminal; Ctrl-] leaves" if os.isatty(0) else "standard input and output")

    async def _open(self) -> None:
        self.came(_StdioPeer())

    async def _close(self) -> None:
        restore()


class _StdioPeer(ThreadedPeer):
    def __init__(self) -> None:
        super().__init__(1, "standard input")
        self._reading: asyncio.Task[bytes] | None = None

    async def read(self) -> Sequence[bytes]:
        if self._reading is None:
            _make_raw()
            self._reading = asyncio.ensure_future(run_in_daemon_thread(partial(os.read, 0, CHUNK)))
        data = await asyncio.shield(self._reading)
        if not data:
            await asyncio.get_running_loop().create_future()  # until the function is reset
        self._reading = None
        return (data,)

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()


def _make_raw() -> None:
    """Make the terminal raw. A password can be asked for before, but not afterwards."""
    if sys.platform != "win32" and not _before and os.isatty(0):
        _before.extend(termios.tcgetattr(0))
        atexit.register(restore)
        tty.setraw(0, termios.TCSANOW)
        raw = termios.tcgetattr(0)
        disabled = bytes((os.fpathconf(0, "PC_VDISABLE") & 0xFF,))
        raw[_LFLAG] |= termios.ISIG | termios.NOFLSH
        raw[_CC][termios.VINTR] = LEAVE
        raw[_CC][termios.VQUIT] = raw[_CC][termios.VSUSP] = disabled
        termios.tcsetattr(0, termios.TCSANOW, raw)


def restore() -> None:
    """Make the terminal what it was before a guest used it."""
    if sys.platform != "win32" and _before:
        with suppress(termios.error):  # it is gone
            termios.tcsetattr(0, termios.TCSADRAIN, _before)
        _before.clear()
        atexit.unregister(restore)
