"""A command that prints a ``.vv`` file, for each attempt to connect: for tickets that live a minute."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from typing import Final

from farplug.errors import Reason, TargetError
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
    process = await asyncio.create_subprocess_shell(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            output, errors = await asyncio.gather(
                _read(process.stdout, MAX_VV_FILE), _read(process.stderr, MAX_ERRORS, cut=True)
            )
            code = await process.wait()
    except TimeoutError:
        raise _failed(f"did not end within {COMMAND_TIMEOUT:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    lines = printable(errors.decode("utf-8", "replace").strip().rpartition("\n")[2], 200)
    if code:
        ended = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        raise _failed(f"{ended}{f': {lines}' if lines else ''}")
    if lines:
        log.info("target command: %s", lines)
    if not output.strip():
        raise _failed(f"printed nothing{f': {lines}' if lines else ''}")
    return output


async def _read(stream: asyncio.StreamReader, most: int, *, cut: bool = False) -> bytes:
    """Return what a stream has until its end.

    Args:
        stream: what to read.
        most: bytes.
        cut: drop what is beyond ``most``; otherwise it is an error.
    """
    data = bytearray()
    while chunk := await stream.read(64 << 10):
        data += chunk
        if len(data) > most:
            if not cut:
                raise _failed(f"printed more than {most} bytes")
            del data[: len(data) - most]
    return bytes(data)


def _failed(what: str) -> TargetError:
    return TargetError(
        f"the target command {what}",
        reason=Reason.TARGET_COMMAND,
        remedy="run the command by hand: it must print a .vv file, and nothing else",
    )
