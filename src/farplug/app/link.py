"""The connection of a guest: its session and its ports; it is made again when the VM is back after it was lost."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

from farplug.app.events import Level
from farplug.app.guest_port import GuestPort, PortState, retrieve
from farplug.app.retry import GiveUp, Retry, Wait
from farplug.app.settings import GuestSettings, TargetSettings
from farplug.app.target_command import run_target_command
from farplug.errors import FarplugError, GuestGoneError, Reason, Remedy, StateError, TargetError
from farplug.redirection.events import PortEvent, fields_of
from farplug.target import Target, open_session, parse_vv
from farplug.transport.connection import CurrentWire, untapped
from farplug.transport.moved import moved_target
from farplug.transport.session import Session
from farplug.transport.spice_target import SpiceTarget, Stage

PASSWORD_ATTEMPTS = 3
"""Passwords that a user is asked for when the server does not accept the one that it was given."""

ONE_CLIENT = (
    "SPICE serves one client at a time: farplug has taken the VM from any other client, and a console "
    "(virt-viewer) that connects now takes it from farplug"
)

AskPassword: TypeAlias = Callable[[FarplugError], Awaitable[str | None]]
"""Asks a user for a password; called with the server's refusal. None: there is none."""


class GuestState(StrEnum):
    """How far a guest has come, as a user sees it."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    LOST = "lost"
    """the connection ended"""
    RECONNECTING = "reconnecting"
    """the connection ended; the VM is contacted again"""
    CLOSED = "closed"


class LinkOwner(Protocol):
    """What a link needs of its guest."""

    def publish(self, name: str, message: str, /, *, level: Level = Level.INFO, **details: Any) -> None:
        """Publish an event."""

    def note(self, text: str, remedy: Remedy | None = None) -> None:
        """Publish something that a user may want to know."""

    def listens(self) -> None:
        """Take note that the VM has to connect to this side."""

    async def was_lost(self) -> None:
        """Take note that the VM is gone, and is contacted again: the ports are closed."""

    def is_back(self) -> None:
        """Take note that the VM is connected again: there are new ports."""

    def is_gone(self, error: FarplugError) -> None:
        """Take note that the VM is gone for good, with this error."""


class Link:
    """The connection of a guest.

    Args:
        owner: the guest.
        settings: where the VM is; None: ``session`` is given, and is not made again.
        session: a connection to the VM that is open already.
        ask_password: asks a user for a password; None: there is no user.
        wire: taps the connections.

    Attributes:
        ports: those of the VM, in their order; empty before the VM is connected.
    """

    def __init__(
        self,
        owner: LinkOwner,
        settings: GuestSettings | None,
        session: Session | None = None,
        ask_password: AskPassword | None = None,
        wire: CurrentWire = untapped,
    ) -> None:
        self.ports: Sequence[GuestPort] = ()
        self._owner = owner
        self._settings = settings
        self._session: Session | None = None
        self._ask_password = ask_password
        self._wire = wire
        self._target: Target | None = None
        self._used_up = False
        """The file of the target was deleted when it was read: its ticket is for one connection."""
        self._stages = Stages(owner)
        self._retry = Retry(None if settings is None else settings.reconnect, time.monotonic)
        self._opening: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[FarplugError | None] | None = None
        self._at_once = asyncio.Event()
        """A user does not wait for the delay before an attempt."""
        self._attempting: asyncio.Task[FarplugError | None] | None = None
        self._given_up = False
        """A user wants no more attempts."""
        self._connected = asyncio.Event()
        self._connecting = False
        self._status: dict[str, Any] = {
            "state": str(GuestState.CONNECTING),
            "attempt": None,
            "name": "",
            "uuid": "",
            "ports": [],
        }
        """The state as the events have published it."""
        if session is not None:
            self._use(session)
            self._status |= self._connection()

    @property
    def session(self) -> Session:
        """Return the connection to the VM; the last one if the VM is lost.

        Raises:
            StateError: there is none yet.
        """
        if self._session is None:
            raise StateError("the guest is not connected")
        return self._session

    @property
    def is_connected(self) -> bool:
        """Return whether the VM was connected once."""
        return self._session is not None

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the connection as JSON's types."""
        return {**self._status, "ports": [dict(port) for port in self._status["ports"]]}

    def _connection(self) -> dict[str, Any]:
        """Return the state of a VM that is connected."""
        return {
            "state": str(GuestState.CONNECTED),
            "attempt": None,
            "name": self.session.name,
            "uuid": self.session.uuid,
            "ports": [port.snapshot() for port in self.ports],
        }

    def _publish(self, name: str, message: str, level: Level, status: dict[str, Any], **fields: Any) -> None:
        """Publish an event that changes the state of the connection."""
        self._status |= status
        self._owner.publish(name, message, level=level, **status, **fields)

    # Connecting ---------------------------------------------------------------------------------------------------

    def connect(self) -> Coroutine[Any, Any, None]:
        """Connect to the VM, and open its ports. A plain socket is still being connected at the end.

        Returns:
            What is to be awaited. It raises ``UsageError`` (the target or a setting of it is not valid),
            ``TargetError`` (the VM, or none of its ports, can be reached) or ``PortError`` (other clients use all
            ports).

        Raises:
            StateError: the VM is connected, or is being connected, or there is no target.
        """
        if self._settings is None:
            raise StateError("the guest has no target")
        if self.is_connected or self._connecting:
            raise StateError("the guest is connected already, or is being connected")
        self._connecting = True
        return self._connect_once(self._settings)

    async def _connect_once(self, settings: GuestSettings) -> None:
        try:
            await self._connect(settings)
        finally:
            self._connecting = False

    async def _connect(self, settings: GuestSettings) -> None:
        target = await self._first_target(settings)
        attempts = PASSWORD_ATTEMPTS
        while True:
            try:
                session = await open_session(target, self._begin, wire=self._wire, note=self._owner.note)
                break
            except TargetError as error:
                password = await self._password(error) if attempts else None
                if password is None or not isinstance(target, SpiceTarget):
                    self._stages.failed(error)
                    raise
                attempts -= 1
                target = replace(target, password=password)
            except BaseException as error:
                self._stages.failed(error)
                raise
        self._use(session)
        self._opening = asyncio.ensure_future(self._open_ports())
        self._opening.add_done_callback(retrieve)
        if session.reached:
            self._stages.reached()
            try:
                await self._opening
            except BaseException:
                await self._leave()
                self._session, self.ports = None, ()
                raise
        self._target = target
        self._retry = Retry(settings.reconnect, time.monotonic, exclusive=session.exclusive, used_up=self._used_up)
        self._keeping = asyncio.ensure_future(self._keep(settings))
        self._publish_connected()
        if session.exclusive:
            self._owner.note(ONE_CLIENT)
        if session.name:
            self._owner.note(f"the VM is called {session.name}")

    def _begin(self, stage: Stage, text: str) -> None:
        self._stages.begin(stage, text)
        if stage is Stage.LISTEN:
            self._owner.listens()

    async def _first_target(self, settings: GuestSettings) -> Target:
        where = settings.target
        if where.command is not None:
            return parse_vv(await run_target_command(where.command), where.options())
        target, self._used_up = _parse(where)
        return target

    async def _password(self, error: TargetError) -> str | None:
        """Return another password for a server that wants one; None if no user can be asked."""
        if error.reason not in (Reason.WRONG_PASSWORD, Reason.NO_PASSWORD) or self._ask_password is None:
            return None
        self._stages.failed(error)
        return await self._ask_password(error)

    def _use(self, session: Session) -> None:
        self._session = session
        self.ports = [
            GuestPort(number, port, self._port_changed, self._unclaimed) for number, port in enumerate(session.ports)
        ]

    async def _open_ports(self) -> None:
        """Open all ports, side by side, until one is open; the others go on. Of shared ports open the first one.

        Raises:
            TargetError: no port can be reached.
            PortError: all ports are in use by other clients.
        """
        ports = self.ports[:1] if self.session.shares_ports else self.ports
        opening = [asyncio.ensure_future(port.open()) for port in ports]
        error: BaseException | None = None
        for call in opening:
            call.add_done_callback(retrieve)
        for done in asyncio.as_completed(opening):
            try:
                await done
            except FarplugError as raised:
                error = error or raised
            else:
                return
        if error is not None:
            raise error

    def _publish_connected(self) -> None:
        count = len(self.ports)
        message = f"the VM has {count} port{'' if count == 1 else 's'}"
        self._connected.set()
        self._publish("connected", message, Level.DETAIL, self._connection(), exclusive=self.session.exclusive)

    def _port_changed(self, port: GuestPort) -> None:
        if port.state is not PortState.CLOSED:
            self._stages.reached()  # of a plain socket
        if self._connected.is_set() and port in self.ports:  # otherwise "connected" reports the state of all ports
            ports = [port.snapshot() for port in self.ports]
            self._status["ports"] = ports
            message = f"{port.name}: {port.state}"
            self._owner.publish("port", message, level=Level.DETAIL, number=port.number, **ports[port.number])

    def _unclaimed(self, port: GuestPort, event: PortEvent) -> None:
        self._owner.publish(event.name, f"{port.name}: {event}", level=Level.DETAIL, source=event, **fields_of(event))

    async def opened(self) -> None:
        """Wait until a port is open.

        Raises:
            TargetError: no port can be reached.
            PortError: all ports are in use by other clients.
        """
        if self._opening is not None:
            await asyncio.shield(self._opening)

    # Losing and connecting again ----------------------------------------------------------------------------------

    def comes_back(self, error: FarplugError | None) -> bool:
        """Return whether the connection ended with this error, and the VM will be contacted again."""
        if error is None or self._keeping is None or self._keeping.done():
            return False
        session = self.session
        return (session.over or session.ends_with_port) and self._retry.follows(error)

    async def connected(self) -> None:
        """Wait while the VM is lost.

        Raises:
            GuestGoneError: the VM is not contacted again.
        """
        if self._connected.is_set() or self._keeping is None:
            return
        waiting = asyncio.ensure_future(self._connected.wait())
        try:
            await asyncio.wait((waiting, self._keeping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not self._connected.is_set():
            error = None if self._keeping.cancelled() else self._keeping.result()
            raise error or GuestGoneError("the guest is closed")

    def reconnect(self, *, give_up: bool) -> None:
        """Make the next attempt at once, or no more attempts. If the VM is not lost, a ``note`` is published.

        Raises:
            StateError: the attempts are to end, and there are none.
        """
        state = self._status["state"]
        if state not in (GuestState.LOST, GuestState.RECONNECTING):
            if give_up:
                raise StateError("the VM is not lost: there is no attempt to give up", remedy="end the session instead")
            self._owner.note(f"the VM is not lost: it is {state}")
        elif give_up:
            self._given_up = True
            if self._attempting is not None:
                self._attempting.cancel()
        else:
            self._at_once.set()

    async def closed(self) -> FarplugError | None:
        """Wait until the guest is gone for good; return why, or None if :meth:`close` closed the connection."""
        if self._keeping is None:
            return await self._ended()
        await asyncio.wait([self._keeping])
        return None if self._keeping.cancelled() else self._keeping.result()

    async def _keep(self, settings: GuestSettings) -> FarplugError | None:
        """Connect again each time that the VM is lost; return why the guest is gone for good."""
        try:
            await self.opened()
        except FarplugError as failed:
            self._stages.failed(failed)  # of a plain socket, which is connected only now
            self._owner.is_gone(failed)
            return failed
        while (loss := await self._ended()) is not None:
            self._connected.clear()
            error = await self.session.explain(loss)
            self._at_once.clear()
            self._given_up = False
            step: Wait | GiveUp | None = self._retry.lost(error)
            lost = {"state": str(GuestState.LOST), "attempt": None}
            self._publish("lost", error.message, Level.BAD, lost, **error_fields(error))
            await self._leave()
            await self._owner.was_lost()
            while isinstance(step, Wait):
                step = await self._try_again(settings, step, error)
            if step is not None:
                self._owner.is_gone(step.error)
                return step.error
            self._retry.connected()
            self._publish_connected()
            self._owner.publish("back", "the VM is connected again", level=Level.GOOD)
            self._owner.is_back()
        return None

    async def _ended(self) -> FarplugError | None:
        """Wait until the session has ended; return why, or None if :meth:`close` ended it."""
        ends = [asyncio.ensure_future(self.session.closed())]
        if self.session.ends_with_port:
            ends += [asyncio.ensure_future(port.closed()) for port in self.ports]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return next(iter(done)).result()

    async def _try_again(self, settings: GuestSettings, step: Wait, loss: FarplugError) -> Wait | GiveUp | None:
        """Try to connect again, unless a user gives up; return what is to be done next, None after a success."""
        if not self._given_up:
            self._attempting = asyncio.ensure_future(self._attempt(settings, step))
            try:
                problem = await self._attempting
                return None if problem is None else self._retry.failed(problem)
            except asyncio.CancelledError:
                if not self._given_up:
                    raise  # the guest is closed
            finally:
                self._attempting = None
        return GiveUp(GuestGoneError(f"{loss.message}; a user stopped the attempts to connect again"))

    async def _attempt(self, settings: GuestSettings, step: Wait) -> FarplugError | None:
        """Try to connect again; return why that failed."""
        when = f"in {step.delay:.1f} s" if step.delay else "now"
        where = "" if step.moved is None else f" to {step.moved.where}"
        attempt = {"number": step.attempt, "time": round(time.time() + step.delay, 3)}
        self._publish(
            "reconnecting",
            f"connecting again{where} {when} (attempt {step.attempt})",
            Level.PROGRESS,
            {"state": str(GuestState.RECONNECTING), "attempt": attempt},
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(step.delay):
                await self._at_once.wait()
        self._at_once.clear()
        try:
            target = await self._next_target(settings, step)
            self._use(await open_session(target, wire=self._wire, note=self._owner.note))
            try:
                await self._open_ports()
            except BaseException:
                await self._leave()
                raise
        except FarplugError as error:
            return error
        self._target = target
        return None

    async def _next_target(self, settings: GuestSettings, step: Wait) -> Target:
        if step.moved is not None and isinstance(self._target, SpiceTarget):
            assert step.moved.where is not None
            return moved_target(self._target, step.moved.where)
        if settings.target.command is not None:
            return parse_vv(await run_target_command(settings.target.command), settings.target.options())
        assert self._target is not None
        return self._target

    # The end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the ports, then the session."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        await self._leave()

    def publish_closed(self) -> None:
        """Publish that the guest is closed, as its last event."""
        closed = {"state": str(GuestState.CLOSED), "attempt": None}
        self._publish("closed", "the guest is closed", Level.DETAIL, closed)

    async def _leave(self) -> None:
        await asyncio.gather(*(port.close() for port in self.ports), return_exceptions=True)
        if self._session is not None:
            await self._session.close()


def _parse(where: TargetSettings) -> tuple[Target, bool]:
    """Return the target of settings, and whether its file was deleted: its ticket is for one connection."""
    is_file = os.path.isfile(where.target)
    target = where.parse()
    return target, is_file and not os.path.exists(where.target)


class Stages:
    """Publishes the stages on the way to the guest: when each begins, and how it ends."""

    def __init__(self, owner: LinkOwner) -> None:
        self._owner = owner
        self._pending: tuple[str, str] | None = None

    def begin(self, stage: Stage, text: str) -> None:
        """Publish that a stage begins: the one before it is reached."""
        self.reached()
        self._pending = (str(stage), text)
        self._publish("begun", Level.PROGRESS)

    def reached(self) -> None:
        """Publish that the pending stage is reached. Does nothing if there is none."""
        self._publish("reached", Level.GOOD)
        self._pending = None

    def failed(self, error: BaseException) -> None:
        """Publish that the pending stage failed. Does nothing if there is none."""
        fields = error_fields(error) if isinstance(error, FarplugError) else {}
        self._publish("failed", Level.BAD, **fields)
        self._pending = None

    def _publish(self, state: str, level: Level, **fields: Any) -> None:
        if self._pending is not None:
            stage, text = self._pending
            self._owner.publish("stage", text, level=level, stage=stage, state=state, **fields)


def error_fields(error: FarplugError) -> dict[str, Any]:
    """Return the fields of an event that reports an error; the event has the message."""
    return {"reason": str(error.reason), **error.remedy.as_dict()}
