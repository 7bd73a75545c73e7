"""The methods of the control protocol: those of the connection, and the commands."""

from __future__ import annotations

from typing import Final

from farplug.app import commands
from farplug.app.commands import Command
from farplug.control.messages import HELLO, SUBSCRIBE, UNSUBSCRIBE
from farplug.errors import Reason, UsageError
from farplug.text import shown

_COMMANDS: Final = {**commands.COMMANDS, **commands.CLIENT_COMMANDS}
METHODS: Final = (HELLO, SUBSCRIBE, UNSUBSCRIBE, *_COMMANDS)
"""The names of all methods."""


def parse_command(method: str, params: object) -> Command:
    """Return the command that a request asks for.

    Raises:
        UsageError: there is no such method, or a parameter is not valid.
    """
    if method not in _COMMANDS:
        raise UsageError(
            f"{shown(method)} is not a method",
            reason=Reason.UNKNOWN_COMMAND,
            remedy=f"methods: {', '.join(METHODS)}",
        )
    return commands.from_json(method, params, _COMMANDS, ignore_unknown=True)
