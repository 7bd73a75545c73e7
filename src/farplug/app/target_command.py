"""A command that prints a ``.vv`` file, for each attempt to connect: for tickets that live a minute."""

from __future__ import annotations

import logging
import sys
from typing import Final

from farplug.child import ChildFailed, run_child
from farplug.errors import Reason, TargetError
from farplug.spice.vv import MAX_VV_FILE

log = logging.getLogger(__name__)

COMMAND_TIMEOUT: Final = 60.0
"""Seconds that the command may take."""


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
    try:
        ended = await run_child("/bin/sh", "-c", command, timeout=COMMAND_TIMEOUT, max_output=MAX_VV_FILE)
    except ChildFailed as error:
        raise _failed(str(error)) from None
    if ended.code:
        raise _failed(ended.why)
    if not ended.output.strip():
        raise _failed(f"printed nothing{f': {ended.complaint}' if ended.complaint else ''}")
    if ended.complaint:
        log.info("target command: %s", ended.complaint)
    return ended.output


def _failed(what: str) -> TargetError:
    return TargetError(
        f"the target command {what}",
        reason=Reason.TARGET_COMMAND,
        remedy="run the command by hand: it must print a .vv file, and nothing else",
    )
