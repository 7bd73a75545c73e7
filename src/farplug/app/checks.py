"""Checks of the way to a VM, stage by stage, without plugging anything in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

from farplug.app.guest import Guest
from farplug.app.settings import TargetSettings
from farplug.errors import FarplugError, Reason
from farplug.redirection import Redirection
from farplug.redirection.events import GuestReady
from farplug.shell import shell_quote
from farplug.target import ListenTarget, UsbipTarget, open_session
from farplug.transport.port import Port
from farplug.transport.spice_target import Stage

HELLO_SECONDS = 3.0
"""Seconds that a port may take to send its hello before it counts as paused."""


class CheckState(StrEnum):
    """How a check ended."""

    OK = "ok"
    NOTE = "note"
    """Not checked: the detail says what to do."""
    PAUSED = "paused"
    """The VM does not answer: it is paused, or the port serves another client."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check.

    Attributes:
        name: what was checked.
        state: how the check ended.
        detail: what was found, for people.
    """

    name: str
    state: CheckState
    detail: str = ""


async def check_target(settings: TargetSettings) -> AsyncIterator[Check]:
    """Yield the stages on the way to a VM, then its ports. Nothing is sent to a VM that is paused.

    Raises:
        FarplugError: a stage failed; the check of this stage was yielded before.
    """
    target = settings.parse(keep_file=True)
    if isinstance(target, ListenTarget):
        connect = f"farplug connect {shell_quote(settings.target)}"
        yield Check("reach", CheckState.NOTE, f"QEMU connects to {target.address}: run '{connect}', then start the VM")
        return
    if isinstance(target, UsbipTarget):
        serve = f"farplug serve --listen {shell_quote(str(target.address))}"
        yield Check("reach", CheckState.NOTE, f"USB/IP clients connect to {target.address}: run '{serve}'")
        return
    begun: list[tuple[str, str]] = []

    def begin(stage: Stage, text: str) -> None:
        begun.append((str(stage), text))

    try:
        session = await open_session(target, begin)
    except FarplugError:
        for name, text in begun[:-1]:
            yield Check(name, CheckState.OK, text)
        for name, text in begun[-1:]:
            yield Check(name, CheckState.FAILED, text)
        raise
    try:
        if session.reached:
            for name, text in begun:
                yield Check(name, CheckState.OK, text)
            name = f"{session.name} {session.uuid}".strip()
            yield Check("VM", CheckState.OK, name or "unnamed")
            count = len(session.ports)
            if not count:
                yield Check("usbredir channels", CheckState.FAILED, "none")
            Guest(session=session).check_room(1)
            devices = f"{count} (up to {count} devices)" if count > 1 else "1 (1 device)"
            yield Check("usbredir channels", CheckState.OK, devices)
        for port in session.ports[:1] if session.shares_ports else session.ports:
            try:
                check = await _check_port(port)
            except FarplugError as error:
                failed = begun[-1] if not session.reached and error.reason is not Reason.PROTOCOL else (port.name, "")
                yield Check(failed[0], CheckState.FAILED, failed[1])
                raise
            if not session.reached:
                for name, text in begun:
                    yield Check(name, CheckState.OK, text)
            yield check
    finally:
        await session.close()


async def _check_port(port: Port) -> Check:
    """Return whether the guest answers at a port.

    Raises:
        FarplugError: the port cannot be opened, or was closed with an error.
    """
    ready: asyncio.Future[GuestReady] = asyncio.get_running_loop().create_future()

    def happened(event: object) -> None:
        if isinstance(event, GuestReady) and not ready.done():
            ready.set_result(event)

    redirection = Redirection(port, happened)
    await redirection.open()
    closed = asyncio.ensure_future(redirection.closed())
    try:
        await asyncio.wait((ready, closed), timeout=HELLO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return Check(port.name, CheckState.OK, f"ready: {ready.result().version or 'unknown version'}")
        if closed.done() and (error := closed.result()) is not None:
            raise error
        detail = f"no answer within {HELLO_SECONDS:g} s: the VM is paused, or the port serves another client"
        return Check(port.name, CheckState.PAUSED, detail)
    finally:
        closed.cancel()
        await redirection.close()
