"""Carry out the commands of running sessions."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any, Final

import typer

from farplug.app.codec import encode
from farplug.app.events import Event, Level
from farplug.cli import log, output, session_views
from farplug.cli.device_options import Devices
from farplug.cli.output import Output
from farplug.cli.session_client import following, refreshing, run
from farplug.control import views
from farplug.control.names import list_sessions, open_session
from farplug.errors import FarplugError, GuestGoneError, Reason, Remedy, SessionError
from farplug.exit_codes import ExitCode
from farplug.shell import shell_word
from farplug.text import printable

GONE_INTERVAL: Final = 0.02
"""Seconds between two looks whether a session that ended has removed its socket."""


def ls(*, as_json: bool) -> None:
    """Print the running sessions."""
    entries = run(list_sessions())
    if as_json:
        typer.echo(dumps([views.list_json(entry) for entry in entries]))
    else:
        typer.echo("\n".join(session_views.list_lines(entries)))


def status(session: str | None, *, as_json: bool) -> None:
    """Print the state of a session."""

    async def ask() -> dict[str, Any]:
        async with open_session(session) as client:
            return views.status_of(client.hello, await client.call("status"))

    found = run(ask())
    typer.echo(dumps(found) if as_json else "\n".join(session_views.status_lines(found)))


def attach(session: str | None, devices: Devices, *, wait: bool, as_json: bool) -> None:
    """Plug devices in, and show what happens to them.

    Args:
        session: the name of the session; None: the only one.
        devices: what to plug in.
        wait: wait until the VM has configured them.
        as_json: print events as JSON.

    Raises:
        SessionError: a device cannot be plugged in, or the user interrupted the command.
    """
    if devices.uses_stdio:
        run(_attach_console(session, devices))
        return
    params = {**encode(devices.absolute()), "wait": wait}
    try:
        run(_attach(session, params, output.choose(as_json=as_json)))
    except KeyboardInterrupt:
        raise _left_attaching(session, devices) from None


def detach(session: str | None, names: Iterable[str], *, as_json: bool) -> None:
    """Take devices out, and show what happens to them."""
    run(_detach(session, names, output.choose(as_json=as_json)))


def media(session: str | None, method: str, params: Mapping[str, Any], *, as_json: bool) -> None:
    """Carry out the method ``insert`` or ``eject``, and show what happens to the medium."""
    show = _only(output.choose(as_json=as_json), ("medium-ejected", "medium-inserted", "note"))
    run(_call(session, method, params, show))


def reconnect(session: str | None, *, give_up: bool) -> None:
    """Make a session connect to its lost VM at once, or not any more."""

    def show(event: Event) -> None:
        if event.name == "note":
            log.say(printable(event.message))

    run(_call(session, "reconnect", {"give_up": give_up}, show))


def touch(session: str | None, key: str | None, *, refuse: bool, as_json: bool) -> None:
    """Answer what a program in the VM asks a security key for, and print what it was."""

    async def answer() -> dict[str, Any]:
        async with open_session(session) as client:
            params = {"answer": "refuse" if refuse else "allow", "attachment": key}
            result: dict[str, Any] = await client.call("presence", params)
            return result

    answered = run(answer())
    question = session_views.question_text(answered)
    typer.echo(dumps(answered) if as_json else f"{'refused' if refuse else 'allowed'}: {question}")


def capture(session: str | None, method: str, params: Mapping[str, Any], *, as_json: bool) -> None:
    """Carry out the method ``capture`` or ``stop-capture``, and show what happens to the capture."""
    shown = output.choose(as_json=as_json)
    only = _only(shown, ("capture-started", "capture-ended", "note"))

    def show(event: Event) -> None:
        if event.name == "capture-started":
            log.say(f"farplug: warning: {printable(event.message)}")
        only(event)

    try:
        run(_call(session, method, params, show))
    except FarplugError as error:
        if method != "stop-capture" or error.reason is not Reason.NOT_FOUND:
            raise
        _inform(shown, error.message)


def watch(session: str | None, *, as_json: bool) -> None:
    """Show a session, then its events, until it ends or the user interrupts the command."""
    try:
        run(_watch(session, output.choose(as_json=as_json), as_json=as_json))
    except KeyboardInterrupt:
        raise typer.Exit from None


def stop(session: str | None, shown: Output) -> None:
    """End a session, and wait until it has ended.

    Args:
        session: the name of the session; None: the only one.
        shown: shows what happens.

    Raises:
        SessionError: written data of a device could not be made durable.
    """
    run(_stop(session, shown))


async def _attach_console(session: str | None, devices: Devices) -> None:
    """Plug devices in, of which one is a serial line to this terminal. Take them out when the user leaves."""
    from farplug.cli.console import console

    shown = output.choose(as_json=False, between=True, stream=sys.stderr)
    async with console() as terminal:
        sources = [
            replace(source, path=terminal.end) if source.uses_stdio else source for source in devices.absolute().sources
        ]
        attached = await _attach(session, {**encode(replace(devices, sources=tuple(sources))), "wait": True}, shown)
        log.say("note: the serial line is connected to this terminal; Ctrl-] leaves, and takes it out of the VM")
        await terminal.relay()
        async with open_session(session) as client:
            for one in attached["attachments"]:
                await client.call("detach", {"device": one["id"]})


async def _attach(session: str | None, params: Mapping[str, Any], shown: Output) -> Any:
    """Plug devices in; return the result of the method ``attach``."""
    known: set[str] = set()
    """Devices that were there before."""
    skipped: list[Event] = []

    def show(event: Event) -> None:
        if event.name == "skipped":
            skipped.append(event)
        elif event.attachment not in known:
            shown.show(event)

    async with following(session, show) as follower, refreshing(shown):
        known.update(_attachments(follower.snapshot))
        failed: FarplugError | None = None
        try:
            result = await follower.call("attach", params)
        except FarplugError as error:
            failed = error
        for event in skipped:
            if failed is None or event.message != failed.message:
                shown.show(event)
        if failed is not None:
            raise failed
        return result


def _left_attaching(session: str | None, devices: Devices) -> SessionError:
    names = [Path(source.path).name for source in devices.sources]
    option = f" -s {shell_word(session)}" if session else ""
    return SessionError(
        "interrupted: the session continues to plug the devices in",
        reason=Reason.INTERRUPTED,
        exit_code=ExitCode.INTERRUPTED,
        remedy=Remedy(
            "to see them, or to take them out:",
            command="\n".join([f"farplug status{option}", *(f"farplug detach{option} {shell_word(n)}" for n in names)]),
        ),
    )


async def _detach(session: str | None, names: Iterable[str], shown: Output) -> None:
    wanted = ("detached", "removed", "note", "unfinished-writes")

    async with following(session, _only(shown, wanted)) as follower:
        _introduce(shown, follower.snapshot)
        for name in names:
            await follower.call("detach", {"device": name})


async def _call(session: str | None, method: str, params: Mapping[str, Any], show: Callable[[Event], None]) -> None:
    async with following(session, show) as follower:
        await follower.call(method, params)


async def _watch(session: str | None, shown: Output, *, as_json: bool) -> None:
    async with open_session(session) as client, refreshing(shown):
        async for data in client.subscribe():
            if as_json:
                typer.echo(dumps(data))
            elif data["event"] == "snapshot":
                typer.echo("\n".join(session_views.status_lines(views.status_of(client.hello, data))))
                _introduce(shown, data)
            elif data["event"] == "dropped":
                _inform(shown, f"{data['count']} events were dropped: this terminal is too slow")
            else:
                shown.show(Event.from_json(data))
        if not as_json:
            _inform(shown, f"the session {client.hello.session} has ended")


async def _stop(session: str | None, shown: Output) -> None:
    failed: list[Event] = []

    def show(event: Event) -> None:
        if event.name in ("detached", "unfinished-writes") or event.level is Level.BAD:
            shown.show(event)
        if event.name == "detached" and event.fields["error"] is not None:
            failed.append(event)

    async with following(session, show) as follower:
        name, path = follower.client.hello.session, follower.client.path
        _introduce(shown, follower.snapshot)
        try:
            await follower.call("quit")
        except GuestGoneError:
            pass  # it ended before it replied
        await follower.ended()
    while path.exists():  # noqa: ASYNC110  (another process removes it)
        await asyncio.sleep(GONE_INTERVAL)
    if failed:
        error = failed[0].fields["error"]
        raise SessionError(
            f"{failed[0].device}: {error['message']}", reason=Reason(error["reason"]), exit_code=ExitCode.DEVICE
        )
    _inform(shown, f"the session {name} has ended")


# Events -----------------------------------------------------------------------------------------------------------


def _attachments(snapshot: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the attachments of a snapshot, by their ids."""
    return {id: one for guest in snapshot["guests"].values() for id, one in guest["attachments"].items()}


def _only(shown: Output, names: Iterable[str]) -> Callable[[Event], None]:
    """Return a function that shows events with these names."""
    return lambda event: shown.show(event) if event.name in names else None


def _introduce(shown: Output, snapshot: Mapping[str, Any]) -> None:
    """Let an output know devices that were attached before."""
    if isinstance(shown, output.JsonOutput):
        return
    for id, one in _attachments(snapshot).items():
        for name in ("attaching", "figures"):
            fields = {**one, "read": 0, "written": 0, "commands": 0, "rate": 0, **one.get("figures", {})}
            shown.show(Event(0, 0.0, name, "", Level.DETAIL, attachment=id, device=one["label"], fields=fields))


def _inform(shown: Output, text: str, remedy: Remedy | None = None) -> None:
    """Show an information of this command, as an event ``note``."""
    shown.show(Event(0, time.time(), "note", text, fields={} if remedy is None else remedy.as_dict()))
