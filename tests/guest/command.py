"""Run a ``farplug`` command during a guest test."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests import starter
from tests.guest.plugging import GUEST_TIMEOUT


def start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program: a ``farplug`` command as a copy of a process that has imported it, which takes less time."""
    quick = tuple(arguments[:3]) == starter.COMMAND and options["stdin"] in (subprocess.PIPE, subprocess.DEVNULL)
    program = starter.Popen if quick else subprocess.Popen  # a terminal needs a process of its own
    return program(arguments, **options)


class Running:
    """A running ``farplug`` command.

    Attributes:
        lines: the lines of standard output that were read.
        stderr: standard error, after the end of the command.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.stderr = ""

    async def until(self, text: str) -> str:
        """Read lines until one contains a text; return this line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(GUEST_TIMEOUT):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line)
                if text in line:
                    return line
        raise AssertionError((text, self.lines))

    async def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit code, the rest of standard output, and standard error."""
        async with asyncio.timeout(GUEST_TIMEOUT):
            out, err = await self.process.communicate()
        self.stderr = err.decode()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), self.stderr

    async def exit_code(self) -> int:
        """Wait for the end, and return the exit code."""
        return (await self.end())[0]

    @property
    def peak_memory(self) -> int:
        """Return the peak of the resident memory, in KiB."""
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())[0])


@asynccontextmanager
async def farplug_on_terminal(*arguments: object) -> AsyncIterator[Running]:
    """Run a ``farplug`` command on a terminal without a live table; kill it at the end if it still runs."""
    terminal, end = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *starter.COMMAND,
        *map(str, arguments),
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(end)
    process.stdout = reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(terminal, "rb", buffering=0)
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        transport.close()


@asynccontextmanager
async def farplug(
    *arguments: object, stdin: int = subprocess.DEVNULL, by: Sequence[str] = ()
) -> AsyncIterator[Running]:
    """Run a ``farplug`` command, perhaps by another program; kill it at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *by,
        *starter.COMMAND,
        *map(str, arguments),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
