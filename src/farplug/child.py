"""Run a program of this machine to its end, with limits for its time and its output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from farplug.programs import child_environment
from farplug.text import printable

MAX_ERRORS: Final = 64 << 10
"""Bytes of a program's standard error that are kept; the last line is shown."""


class ChildFailed(Exception):
    """A program did not end in time, or printed too much. The message follows the program's name."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended.

    Attributes:
        code: the exit code; less than 0: the number of the signal that ended the program.
        output: what it printed.
        complaint: the last line of its standard error, for a message; empty: there is none.
    """

    code: int
    output: bytes = field(repr=False)
    complaint: str

    @property
    def why(self) -> str:
        """Return how the program ended, and its last line, as they follow the program's name in a message."""
        ended = f"ended with exit code {self.code}" if self.code >= 0 else f"was ended by signal {-self.code}"
        return f"{ended}{f': {self.complaint}' if self.complaint else ''}"


async def run_child(
    *command: str, timeout: float, max_output: int, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a program, which has no standard input. If it takes too long or prints too much, kill it with its children.

    Args:
        command: the program and its arguments.
        timeout: seconds until it is killed.
        max_output: bytes that it may print.
        environment: variables beside those of :func:`~farplug.programs.child_environment`.

    Raises:
        ChildFailed: it took too long or printed too much.
        OSError: it cannot be started.
    """
    loop = asyncio.get_running_loop()
    starting = asyncio.ensure_future(
        loop.subprocess_exec(
            lambda: _Process(max_output),
            *command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment(**(environment or {})),
        )
    )
    try:
        transport, process = await asyncio.shield(starting)
    except asyncio.CancelledError:  # asyncio would kill the program, and leave its children
        await _end(*(await starting))
        raise
    try:
        async with asyncio.timeout(timeout):
            await process.ended
    except TimeoutError:
        raise ChildFailed(f"did not end within {timeout:g} s") from None
    finally:
        await _end(transport, process)
    last = printable(process.errors.decode("utf-8", "replace").strip().rpartition("\n")[2], 200)
    return Ended(transport.get_returncode() or 0, bytes(process.output), last)


async def _end(transport: asyncio.SubprocessTransport, process: _Process) -> None:
    """Kill the program and its children, and wait until it has ended."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(transport.get_pid(), signal.SIGKILL)
    transport.close()
    await process.over


class _Process(asyncio.SubprocessProtocol):
    """Takes the output of the program.

    Attributes:
        output: what the program printed.
        errors: the end of its standard error.
        over: resolves when the process and its output have ended.
        ended: the same, but raises ``ChildFailed`` as soon as it has printed too much.
    """

    def __init__(self, max_output: int) -> None:
        self.output = bytearray()
        self.errors = bytearray()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._max_output = max_output

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take output, up to the limit."""
        if fd == 1:
            self.output += data[: self._max_output + 1 - len(self.output)]
            if len(self.output) > self._max_output and not self.ended.done():
                self.ended.set_exception(ChildFailed(f"printed more than {self._max_output} bytes"))
        else:
            self.errors += data
            del self.errors[:-MAX_ERRORS]

    def connection_lost(self, error: Exception | None) -> None:
        """Take note that the program and its output have ended."""
        self.over.set_result(None)
        if not self.ended.done():
            self.ended.set_result(None)
