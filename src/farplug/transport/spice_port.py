"""A usbredir channel of a SPICE session, as a port."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Protocol

from farplug.errors import (
    FarplugError,
    GuestGoneError,
    InternalError,
    PortError,
    Reason,
    RemoteProtocolError,
    StateError,
    TargetError,
)
from farplug.rate_limit import limited_logger
from farplug.spice.link import SERVER_LOG, LinkFailure, LinkPhase
from farplug.spice.messages import Disconnecting, Migrate, Notify
from farplug.spice.types import ChannelType, LinkError
from farplug.spice.vmc import VmcChannel
from farplug.transport.connection import Timeouts
from farplug.transport.dialer import ChannelDialer, LinkedChannel
from farplug.transport.port import Port, PortListener
from farplug.usb.types import Buffer

log = limited_logger(__name__)

SETTLE_TIME = 0.3
"""Seconds that :meth:`SpicePort.open` waits for the first bytes of a channel.

A server links a channel that is in use, too, and then closes the connection without a message. The first bytes, mostly
a PING, show that the channel is ours. A server on a UNIX socket sends none while the VM is paused, and a slow proxy
delays the end: after this time the port is open, and an end before the first bytes still is ``CHANNEL_IN_USE``.
"""
SESSION_END_TIMEOUT = 1.0
"""Seconds from the end of a channel in which the session may end, too, and give the cause.

When another client takes over a server, the server closes the usbredir channels first, and the main channel later.
"""
BUSY_RETRIES = 5
"""The number of retries for a channel that we closed ourselves: the server may not have noticed the close yet."""


class PortSession(Protocol):
    """The session of a port, a :class:`~farplug.transport.spice_session.SpiceSession`.

    Attributes:
        session_id: the server's id of the session.
        ended: resolves when the session has ended: to None if we closed it, otherwise to the error.
    """

    session_id: int
    ended: asyncio.Future[FarplugError | None]

    def moved(self) -> None:
        """End the session: the VM migrated."""


class SpicePort(Port):
    """A usbredir channel of a session.

    Attributes:
        number: the channel's id.
        compress: compress what becomes smaller, if the server supports it. Set it to False, before :meth:`open` or
            later, for a device with isochronous endpoints.
    """

    loses_wakeups = True
    keeps_unread = True

    def __init__(self, number: int, session: PortSession, dialer: ChannelDialer, timeouts: Timeouts) -> None:
        self.name = f"usbredir {number}"
        self.number = number
        self._session = session
        self._dialer = dialer
        self._timeouts = timeouts
        self._compress = True
        self._listener: PortListener | None = None
        self._linked: LinkedChannel | None = None
        self._channel: VmcChannel | None = None
        self._settled: asyncio.Future[None] | None = None
        """Only while open() waits: resolves when bytes arrive, or the channel is closed."""
        self._answered = False
        """Bytes of the channel have arrived: no other client uses the channel."""
        self._was_open = False
        self._error: FarplugError | None = None
        self._close_reason = ""
        self._listener_paused = False
        """The listener has paused reading."""
        self._output_full = False
        """The output queue is full: reading is paused, as it could make more answers."""
        self._close_requested = False
        """close() or abort() was called after open()."""
        self._draining = False
        self._ending: asyncio.Handle | None = None
        """Calls _end() later: the channel has ended, and the session may end too."""

    @property
    def compress(self) -> bool:
        """Return whether data is compressed, if it becomes smaller and the server supports it."""
        return self._compress

    @compress.setter
    def compress(self, compress: bool) -> None:
        self._compress = compress
        if self._channel is not None:
            self._channel.compress = compress

    async def open(self, listener: PortListener) -> None:
        if self._listener is not None:
            raise StateError(f"port {self.name} is open already")
        self._listener = listener
        self._close_requested = False
        try:
            tries = 1 + (BUSY_RETRIES if self._was_open else 0)
            while not await self._try_open():
                tries -= 1
                if not tries:
                    await self._check_session()
                    raise self._in_use("the server closed the channel before it sent data")
                await asyncio.sleep(0.1)
        except BaseException:
            self._forget()
            raise
        self._settled = None
        self._was_open = True

    async def _try_open(self) -> bool:
        """Link the channel. Returns False if the server closed it after the link: the channel is in use."""
        self._check_open_allowed()
        wire = self._dialer.wire()
        try:
            linked = await self._dialer.link(
                ChannelType.USBREDIR,
                self.number,
                connection_id=self._session.session_id,
                capabilities=VmcChannel.capabilities if wire is None else (),
                wire=wire,
            )
        except TargetError as error:
            self._check_open_allowed()
            if not isinstance(error, LinkFailure):
                raise
            absent = error.error is None and error.phase is LinkPhase.REPLY and error.reason is Reason.LINK_REFUSED
            if absent:
                await self._check_session()
            if absent or error.error is LinkError.CHANNEL_NOT_AVAILABLE:
                raise self._in_use(error.message.removeprefix(f"{self.name}: ")) from error
            raise
        try:
            self._check_open_allowed()  # the session may have ended during the link: it does not close this channel
        except BaseException:
            linked.connection.abort()
            raise
        self._error, self._close_reason, self._listener_paused, self._output_full = None, "", False, False
        # On a UNIX socket compression only takes time; and Wireshark cannot decode compressed messages.
        self._channel = VmcChannel(self.name, linked.link, may_compress=not linked.local and wire is None)
        self._channel.compress = self._compress
        self._linked = linked
        self._answered = False
        self._settled = asyncio.get_running_loop().create_future()
        linked.start(self, self._lost)
        try:
            await asyncio.wait([self._settled], timeout=SETTLE_TIME)
        except BaseException:
            linked.connection.abort()
            raise
        if self._linked is not None:
            return True
        if self._error is not None and self._answered:
            if isinstance(self._error, GuestGoneError):
                await self._check_session()
            raise self._error
        self._check_open_allowed()
        return False

    def _in_use(self, why: str) -> PortError:
        return PortError(
            f"{self.name}: {why}: the channel is in use, or was removed from the VM",
            reason=Reason.CHANNEL_IN_USE,
            remedy="detach the device that uses the channel, or add a usbredir channel to the VM; if no client uses "
            f"the channel, {SERVER_LOG}",
        )

    async def _check_session(self) -> None:
        """Raise the error that ended the session, if the session ends within SESSION_END_TIMEOUT."""
        await asyncio.wait([self._session.ended], timeout=SESSION_END_TIMEOUT)
        self._check_open_allowed()

    def _check_open_allowed(self) -> None:
        """Raise the session's error if it has ended, or StateError if the port was closed during open()."""
        closed = self._session.ended
        if closed.done():
            raise closed.result() or GuestGoneError(f"{self.name}: the session is closed")
        if self._close_requested:
            raise StateError(f"port {self.name} was closed before it was open")

    def write(self, buffers: list[Buffer]) -> None:
        if self._channel is not None and self._linked is not None:
            self._channel.send_data(buffers)
            self._linked.connection.write(self._channel.data_to_send())

    def pause_reading(self) -> None:
        self._listener_paused = True
        if self._linked is not None:
            self._linked.connection.pause_reading()

    def resume_reading(self) -> None:
        if self._listener_paused:
            self._listener_paused = False
            # Not directly: the caller may be inside data_received.
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        # First the bytes from before the pause: new bytes would overwrite them.
        self._drain()
        if not self._listener_paused and not self._output_full and self._linked is not None:
            self._linked.connection.resume_reading()

    async def close(self) -> None:
        self._close_requested = True
        if self._ending is not None:
            self._end()
        if self._linked is not None:
            if self._settled is not None:  # open() still waits: no data was sent
                self._linked.connection.abort()
            await self._linked.connection.close(self._timeouts.flush)

    def abort(self) -> None:
        self._close_requested = True
        if self._ending is not None:
            self._end_after(0)
        elif self._linked is not None:
            self._linked.connection.abort()

    def session_ended(self, error: FarplugError | None) -> None:
        """Close the channel: the session has ended."""
        if self._ending is not None:
            self._error = error or self._error
            self._end_after(0)
        elif self._linked is not None:
            self._error = self._error or error
            self._linked.connection.abort()

    # the channel

    def data_received(self, data: memoryview) -> None:
        """Process bytes of the channel."""
        self._answered = True
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)
        if self._channel is not None:
            self._channel.receive_data(data)
            self._drain()

    def pause_writing(self) -> None:
        """Pause reading and the listener's writing: the output queue is full."""
        self._output_full = True
        if self._linked is not None:
            self._linked.connection.pause_reading()
        if self._listener is not None:
            self._listener.pause_writing()

    def resume_writing(self) -> None:
        """Resume reading and the listener's writing."""
        self._output_full = False
        asyncio.get_running_loop().call_soon(self._resume)  # later: the caller may be inside _drain()
        if self._listener is not None:
            self._listener.resume_writing()

    def _drain(self) -> None:
        channel, linked, listener = self._channel, self._linked, self._listener
        if channel is None or linked is None or listener is None or self._draining:
            return
        self._draining = True
        more = False
        try:
            while not self._listener_paused and linked.connection.is_open:
                event = channel.next_event()
                if event is None:
                    break
                match event:
                    case memoryview():
                        more = channel.has_more
                        listener.data_received(event, more)
                    case Disconnecting(_, reason):
                        self._close_reason = f", with {reason}"
                    case Notify():
                        log_notice(self.name, event)
                    case Migrate():
                        linked.connection.write(channel.data_to_send())
                        self._session.moved()
            if more and not self._listener_paused:  # no data followed
                listener.data_received(memoryview(b""))
        except RemoteProtocolError as error:
            self._fail(error)
        finally:
            self._draining = False
        if answers := channel.data_to_send():
            linked.connection.write(answers)

    def _fail(self, error: FarplugError) -> None:
        self._error = error
        if self._linked is not None:
            self._linked.connection.abort()

    def _lost(self, error: Exception | None) -> None:
        linked, listener, settled = self._linked, self._listener, self._settled
        if linked is None or listener is None:
            return
        why = error if isinstance(error, InternalError) else self._error
        if why is None and not linked.connection.closing and not self._answered:
            why = self._in_use("the server closed the channel before it sent data")
        elif why is None and not linked.connection.closing:
            how = "the SPICE server closed the channel" if error is None else describe_broken(error)
            why = GuestGoneError(
                f"{self.name}: {how}{self._close_reason}",
                remedy="check that the VM still runs and has the channel",
            )
        if settled is not None:  # open() still waits, and raises the error
            self._linked, self._channel, self._error = None, None, why
            if not settled.done():
                settled.set_result(None)
            return
        ended_by_server = why is not None and self._error is None
        self._error = why
        if ended_by_server and not self._session.ended.done():
            self._end_after(SESSION_END_TIMEOUT)
        else:
            self._end()

    def _end_after(self, seconds: float) -> None:
        """Report the end of the channel later; with 0 in the next turn of the event loop."""
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        """Report the end of the channel."""
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        listener = self._listener
        assert listener is not None
        self._forget()
        listener.port_closed(self._error)

    def _forget(self) -> None:
        self._listener = self._linked = self._channel = self._settled = None


def describe_broken(error: Exception) -> str:
    """Return the text for a connection that ended with an error."""
    code = error.errno if isinstance(error, OSError) else None
    return f"the connection broke: {os.strerror(code) if code else error}"


def log_notice(name: str, notice: Notify) -> None:
    """Log a notice of the server, with the name of its channel."""
    level = logging.INFO if notice.severity == 0 else logging.WARNING
    log.log(level, "%s: notice of the server: %s", name, notice.text)
