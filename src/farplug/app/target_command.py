"""A command that prints a ``.vv`` file, for each attempt to connect: for tickets that live a minute."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from typing import Final

from farplug.errors import Reason, TargetError
from farplug.programs import child_environment
from farplug.spice.vv import MAX_VV_FILE
from farplug.text import printable

log = logging.getLogger(__name__)

COMMAND_TIMEOUT: Final = 60.0
"""Seconds that the command may take."""
MAX_ERRORS: Final = 64 << 10
"""Bytes of the command's standard error that are read; the last line is shown."""


async def run_target_command(command: str) -> bytes:
    """Return what a command of the shell prints.

    The command has no standard input. If it takes too long or prints too much, it is killed with its children.

    Args:
        command: for ``sh -c``.

    Raises:
        TargetError: ``target-command``: the command failed, printed nothing or too much, or took too long.
    """
    if sys.platform == "win32":
        raise _failed("cannot run: Windows has no sh")
    loop = asyncio.get_running_loop()
    starting = asyncio.ensure_future(
        loop.subprocess_shell(
            _Process, command, stdin=subprocess.DEVNULL, start_new_session=True, env=child_environment()
        )
    )
    try:
        transport, process = await asyncio.shield(starting)
    except asyncio.CancelledError:  # asyncio would kill the shell, and leave its children
        await _end(*(await starting))
        raise
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            await process.ended
    except TimeoutError:
        raise _failed(f"did not end within {COMMAND_TIMEOUT:g} s") from None
    finally:
        await _end(transport, process)
    code = transport.get_returncode() or 0
    last = printable(process.errors.decode("utf-8", "replace").strip().rpartition("\n")[2], 200)
    if code:
        ended = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        raise _failed(f"{ended}{f': {last}' if last else ''}")
    if not process.output.strip():
        raise _failed(f"printed nothing{f': {last}' if last else ''}")
    if last:
        log.info("target command: %s", last)
    return bytes(process.output)


async def _end(transport: asyncio.SubprocessTransport, process: _Process) -> None:
    """Kill the command and its children, and wait until it has ended."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(transport.get_pid(), signal.SIGKILL)
    transport.close()
    await process.over


class _Process(asyncio.SubprocessProtocol):
    """Takes the output of the command.

    Attributes:
        output: what the command printed.
        errors: the end of its standard error.
        over: resolves when the process and its output have ended.
        ended: the same, but raises ``TargetError`` as soon as it has printed too much.
    """

    def __init__(self) -> None:
        self.output = bytearray()
        self.errors = bytearray()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take output, up to the limit."""
        if fd == 1:
            self.output += data
            if len(self.output) > MAX_VV_FILE and not self.ended.done():
                self.ended.set_exception(_failed(f"printed more than {MAX_VV_FILE} bytes"))
        else:
            self.errors += data
            del self.errors[:-MAX_ERRORS]

    def connection_lost(self, error: Exception | None) -> None:
        """Take note that the command and its output have ended."""
        self.over.set_result(None)
        if not self.ended.done():
            self.ended.set_result(None)


def _failed(what: str) -> TargetError:
    return TargetError(
        f"the target command {what}",
        reason=Reason.TARGET_COMMAND,
        remedy="run the command by hand: it must print a .vv file, and nothing else",
    )
