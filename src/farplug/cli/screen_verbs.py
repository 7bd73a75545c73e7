"""Carry out commands about the screen and the inputs: through a running session, or with a connection of their own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import typer

from farplug.app.app import App
from farplug.app.codec import encode
from farplug.app.commands import Command, TypeText, Via
from farplug.app.ducky import Delay
from farplug.app.settings import TargetSettings
from farplug.cli.options import ask_on_terminal
from farplug.cli.session_client import run
from farplug.control.names import open_session
from farplug.errors import DeviceError, FarplugError, Reason

_ALONE = (
    "note: SPICE serves one client at a time: this connection has ended the session of any other client of the VM; "
    "for a running session of farplug, name it instead of the target (-s NAME)"
)
_UNCONFIRMED = {
    Via.USB: "the text was typed, but the VM did not confirm it, as firmware does not",
    Via.SPICE: "the text was typed through SPICE, which confirms nothing: the VM has no free port for a USB keyboard, "
    "or does not use one",
}
_WITHOUT = "look at the screen of the VM; to type without a confirmation: --via spice"


def carry_out(session: str | None, target: TargetSettings | None, steps: Sequence[Command | Delay]) -> list[Any]:
    """Carry commands out, one after the other; return their results.

    Args:
        session: the name of the session; None: the only one.
        target: where the VM is; None: the session carries them out.
        steps: what to do.

    Raises:
        FarplugError: a command cannot be carried out; those after it are not. Or a text was typed that the VM did not
            confirm.
    """
    if target is None:
        return run(_through_session(session, steps))
    try:
        return run(_alone(target, steps))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _carry_out(steps: Sequence[Command | Delay], do: Callable[[Command], Awaitable[Any]]) -> list[Any]:
    results: list[Any] = []
    typed = 0
    unconfirmed: set[Via] = set()
    for step in steps:
        if isinstance(step, Delay):
            await asyncio.sleep(step.seconds)
            continue
        try:
            results.append(await do(step))
        except FarplugError:
            if typed:
                typer.echo(f"note: {typed} characters were typed before", err=True)
            raise
        if isinstance(step, TypeText):
            typed += len(step.text)
            if not results[-1]["confirmed"] and step.via is not Via.SPICE:
                unconfirmed.add(Via(results[-1]["via"]))
    if unconfirmed:
        raise DeviceError(_UNCONFIRMED[unconfirmed.pop()], reason=Reason.UNCONFIRMED, remedy=_WITHOUT)
    return results


async def _through_session(session: str | None, steps: Sequence[Command | Delay]) -> list[Any]:
    async with open_session(session) as client:
        return await _carry_out(steps, lambda command: client.call(command.name, encode(command)))


async def _alone(target: TargetSettings, steps: Sequence[Command | Delay]) -> list[Any]:
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
        return await _carry_out(steps, app.do)


async def _ask(error: FarplugError) -> str | None:
    return ask_on_terminal(error.message)
