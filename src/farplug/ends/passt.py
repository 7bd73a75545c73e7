"""An end that is passt: a program that connects a VM with the network of this user, without root."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from contextlib import suppress
from typing import Final

from farplug.ends.base import End, Peer
from farplug.ends.frames import FramePeer
from farplug.errors import DeviceError, Reason
from farplug.programs import child_environment, find_program
from farplug.text import printable

DEFAULT_ARGUMENTS: Final = ("--no-map-gw",)
"""Services of this machine's loopback address stay out of the VM's reach."""

START_TIME: Final = 0.5
"""Seconds in which passt ends if it cannot work: then the end cannot be opened."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before passt is started again when it has ended; each time twice as long, until it has worked for longer."""

SOCKET_BUFFER: Final = 4 << 20
"""Bytes of frames that passt's socket is to hold; Linux grants up to net.core.wmem_max, which is 212992 by default."""

_END_TIMEOUT: Final = 2.0
_MAX_OUTPUT: Final = 4096
_MTU: Final = "1500"


class PasstEnd(End):
    """A passt of its own. When it ends, it is started again.

    Args:
        arguments: options of passt.
    """

    def __init__(self, arguments: tuple[str, ...] = DEFAULT_ARGUMENTS) -> None:
        super().__init__("passt")
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._output = b""

    async def _open(self) -> None:
        program = find_program("passt")
        peer = await self._start(str(program))
        assert self._process is not None
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(START_TIME):
                    await self._process.wait()
        except BaseException:
            peer.close()  # passt ends when its socket is closed
            raise
        if self._process.returncode is not None:
            peer.close()
            await self._read_output()
            raise DeviceError(
                f"passt cannot work: {self._last_words()}",
                reason=Reason.IO_ERROR,
                remedy="start passt -f to see more",
            )
        self.came(peer)
        self._watching = asyncio.get_running_loop().create_task(self._watch(str(program)))

    async def _close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self.peer is not None:
            self.peer.close()  # passt ends when its socket is closed
        process = self._process
        if process is not None and process.returncode is None:
            try:
                async with asyncio.timeout(_END_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def left(self, peer: Peer, reason: str = "") -> None:
        super().left(peer, reason or self._last_words())

    async def _start(self, program: str) -> Peer:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        try:
            self._process = await asyncio.create_subprocess_exec(
                program,
                *("--foreground", "--quiet", "--mtu", _MTU, "--fd", str(theirs.fileno()), *self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for farplug
            )
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=FramePeer.read_ahead)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return FramePeer(reader, writer, "passt")

    async def _watch(self, program: str) -> None:
        """Start passt again when it ends."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            assert self._process is not None
            began = loop.time()
            await self._read_output()
            await self._process.wait()
            if self.peer is not None:
                self.left(self.peer)
            if loop.time() - began > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                self.came(await self._start(program))
            except OSError:
                continue

    async def _read_output(self) -> None:
        """Read the diagnostics until passt ends; the last ones are kept."""
        assert self._process is not None
        assert self._process.stderr is not None
        self._output = b""
        while data := await self._process.stderr.read(_MAX_OUTPUT):
            self._output = (self._output + data)[-_MAX_OUTPUT:]

    def _last_words(self) -> str:
        """Return the last line that passt has written, without those about a missing system log."""
        lines = [
            line.strip()
            for line in os.fsdecode(self._output).splitlines()
            if line.strip() and not line.startswith("Failed to send")
        ]
        return printable(lines[-1], 200) if lines else "it has ended"
