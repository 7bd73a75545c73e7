"""Carry out commands about the screen and the inputs: through a running session, or with a connection of their own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer

from farplug.app.app import App
from farplug.app.codec import encode
from farplug.app.commands import Command
from farplug.app.settings import TargetSettings
from farplug.cli.options import ask_on_terminal
from farplug.cli.session_client import run
from farplug.control.names import open_session
from farplug.errors import FarplugError

_ALONE = (
    "note: SPICE serves one client at a time: this connection has ended the session of any other client of the VM; "
    "for a running session of farplug, name it instead of the target (-s NAME)"
)


def carry_out(session: str | None, target: TargetSettings | None, commands: Sequence[Command]) -> list[Any]:
    """Carry commands out, one after the other; return their results.

    Args:
        session: the name of the session; None: the only one.
        target: where the VM is; None: the session carries them out.
        commands: what to do.

    Raises:
        FarplugError: a command cannot be carried out; those after it are not.
    """
    if target is None:
        return run(_through_session(session, commands))
    try:
        return run(_alone(target, commands))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _through_session(session: str | None, commands: Sequence[Command]) -> list[Any]:
    async with open_session(session) as client:
        return [await client.call(command.name, encode(command)) for command in commands]


async def _alone(target: TargetSettings, commands: Sequence[Command]) -> list[Any]:
    task = asyncio.current_task()
    assert task is not None
    # However often they come: the link of a display must not be interrupted, and closing the session waits for it.
    for number in ("SIGINT", "SIGTERM", "SIGHUP"):
        with suppress(NotImplementedError, AttributeError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(getattr(signal, number), task.cancel)
    # A .vv file has its own password, which expires: another one does not help.
    async with App(_ask if target.target.startswith("spice") else None) as app:
        guest = await app.connect_screen(target)
        if guest.session.exclusive:
            typer.echo(_ALONE, err=True)
        return [await app.do(command) for command in commands]


async def _ask(error: FarplugError) -> str | None:
    return ask_on_terminal(error.message)
