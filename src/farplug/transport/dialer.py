"""Connect SPICE channels: socket or proxy, TLS if required, link, ticket. One connection for each channel."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from cryptography import x509

from farplug.errors import FarplugError, InternalError, Reason, Remedy, TargetError
from farplug.spice.host import without_zone
from farplug.spice.link import SERVER_LOG, LinkClient, LinkFailure, LinkPhase, LinkResult
from farplug.spice.types import ChannelType, LinkError
from farplug.transport import tls
from farplug.transport.connection import (
    Connection,
    CurrentWire,
    LostCallback,
    Reader,
    Tap,
    TcpAddress,
    Timeouts,
    UnixAddress,
    Wire,
    dial,
    start,
    untapped,
)
from farplug.transport.proxy import HttpProxy, open_tunnel
from farplug.transport.spice_target import Progress, SpiceTarget, Stage
from farplug.usb.types import Buffer

FRAGILE_TIMEOUT = 40.0
"""Seconds that the connection of an abandoned link stays open for the server's first message.

QEMU waits for the client's first message of a display for up to 30 s.
"""


@dataclass(frozen=True, slots=True)
class LinkedChannel:
    """A linked channel. Reading is paused until :meth:`start`.

    Attributes:
        connection: the channel's.
        link: the result of the link.
        local: the channel uses a UNIX socket.
    """

    connection: Connection
    link: LinkResult
    local: bool

    def start(self, reader: Reader, on_lost: LostCallback) -> None:
        """Deliver received bytes, first those that arrived with the link. ``on_lost`` may be called at once."""
        connection = self.connection
        connection.reader, connection.on_lost = reader, on_lost
        connection.resume_reading()  # before the delivery, which may pause it again
        if self.link.trailing:
            connection.deliver(memoryview(self.link.trailing))
        if connection.lost:
            on_lost(None)


Opening: TypeAlias = Callable[[LinkResult], list[Buffer]]
"""Returns the messages with which a channel begins, once it is linked."""


class _Fragile:
    """The links that must not be interrupted now: see :meth:`ChannelDialer.link`."""

    def __init__(self) -> None:
        self._pending: set[asyncio.Future[None]] = set()

    def begin(self) -> asyncio.Future[None]:
        """Return a future; the link must not be interrupted until it is resolved."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def call_after(self, callback: Callable[[], None]) -> None:
        """Call a function once no link is fragile: at once, if none is."""
        pending = [future for future in self._pending if not future.done()]
        if not pending:
            callback()
            return
        pending[0].add_done_callback(lambda _: self.call_after(callback))

    async def settle(self) -> None:
        """Wait until no link is fragile. A cancellation is raised only then."""
        cancelled: asyncio.CancelledError | None = None
        while pending := [future for future in self._pending if not future.done()]:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


class _LinkReader:
    """The reader of a connection during the link.

    Nothing is processed before :meth:`begin`: bytes that arrive with the end of the TLS handshake come from a server
    whose subject is not checked yet.
    """

    def __init__(self, client: LinkClient, tap: Tap | None, opening: Opening | None, fragile: _Fragile) -> None:
        self.client = client
        self.connection = Connection(self, self.lost, tap)
        self.result: asyncio.Future[LinkResult] = asyncio.get_running_loop().create_future()
        self._opening = opening
        self._fragile = fragile
        self._settled: asyncio.Future[None] | None = None
        """Resolves when the connection may be closed; None: it may be closed, as no ticket was sent."""
        self._begun = False
        self._early = bytearray()
        """Bytes that arrived before :meth:`begin`: at most one read, which pauses reading."""

    def begin(self) -> None:
        """Start the link: the server has been checked."""
        self._begun = True
        self.connection.write([*self.client.data_to_send()])
        if self._early:
            self.connection.resume_reading()  # before the bytes, which may pause it again
            self.data_received(memoryview(self._early))

    def data_received(self, data: memoryview) -> None:
        if not self._begun:
            self._early += data
            self.connection.pause_reading()
            return
        if self._settled is None and self.result.done():
            return
        if self.client.result is not None:
            self._finish(self.client.result, bytes(data))
            return
        try:
            self.client.receive_data(data)
        except FarplugError as error:
            self._settle()  # a refused ticket made no channel
            self._fail(error)
            return
        if self._opening is not None and self._settled is None and self.client.phase is not LinkPhase.REPLY:
            self._settled = self._fragile.begin()
        self.connection.write([*self.client.data_to_send()])
        result = self.client.result
        if result is not None:
            if self._opening is not None:
                self.connection.write(self._opening(result))
            if self._opening is None or result.trailing:
                self._finish(result, result.trailing)

    def _finish(self, result: LinkResult, trailing: bytes) -> None:
        self.connection.pause_reading()
        self._settle()
        if self.result.done():  # abandoned
            self.connection.abort()
        else:
            self.result.set_result(replace(result, trailing=trailing))

    def _settle(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    def abandon(self) -> None:
        """Close the connection: at once, or when the server has answered, if it must not be interrupted."""
        if self._settled is None or self._settled.done():
            self.connection.abort()
            return
        self.result.cancel()
        timer = asyncio.get_running_loop().call_later(FRAGILE_TIMEOUT, self.connection.abort)
        self._settled.add_done_callback(lambda _: timer.cancel())

    def pause_writing(self) -> None:
        """Do nothing: a link is shorter than the queue."""

    def resume_writing(self) -> None:
        """Do nothing: a link is shorter than the queue."""

    def lost(self, error: Exception | None) -> None:
        self._settle()
        self._fail(error if isinstance(error, InternalError) else self.client.receive_eof())

    def _fail(self, error: FarplugError) -> None:
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # mark as retrieved: the caller may have been cancelled


class _ReplyReader:
    """The reader of a link that ends with the server's reply.

    Attributes:
        connection: to the server.
        replied: resolves to whether the server has replied.
    """

    def __init__(self, client: LinkClient) -> None:
        self.connection = Connection(self, self._lost)
        self.replied: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._client = client

    def data_received(self, data: memoryview) -> None:
        if self.replied.done():
            return
        try:
            self._client.receive_data(data)
        except LinkFailure as error:
            self._resolve(error.error is not None)  # it refuses the link, for example without TLS
        except FarplugError:
            self._resolve(False)
        else:
            if self._client.phase is not LinkPhase.REPLY:
                self._resolve(True)

    def pause_writing(self) -> None:
        """Do nothing: a link is shorter than the queue."""

    def resume_writing(self) -> None:
        """Do nothing: a link is shorter than the queue."""

    def _lost(self, error: Exception | None) -> None:
        self._resolve(False)

    def _resolve(self, replied: bool) -> None:
        if not self.replied.done():
            self.replied.set_result(replied)


class ChannelDialer:
    """Links channels of one target, with TLS if there is a TLS port.

    A server serves a channel without TLS only if it refuses the channel with NEED_UNSECURED (QEMU's
    ``-spice plaintext-channel``) before any password is sent.

    Args:
        target: the server.
        timeouts: for each stage.
        wire: taps the connections.

    Attributes:
        wire: as above.
        fragile: the links that must not be interrupted now.

    Raises:
        UsageError: the target's proxy, CA or host subject is malformed.
    """

    def __init__(self, target: SpiceTarget, timeouts: Timeouts, wire: CurrentWire = untapped) -> None:
        self.wire = wire
        self.fragile = _Fragile()
        self._target = target
        self._timeouts = timeouts
        self._proxy = HttpProxy.parse(target.proxy) if target.proxy else None
        self._host_subject = tls.HostSubject.parse(target.host_subject) if target.host_subject else None
        self._context: ssl.SSLContext | None = None
        if target.tls_port is not None:
            self._context = tls.client_context(ca=target.ca, check_hostname=self._host_subject is None)

    async def link(
        self,
        channel_type: ChannelType,
        number: int,
        *,
        connection_id: int,
        capabilities: Iterable[int],
        progress: Progress | None = None,
        wire: Wire | None = None,
        opening: Opening | None = None,
    ) -> LinkedChannel:
        """Connect, link and authenticate one channel.

        QEMU crashes if the connection of a display is closed between the ticket and the server's first message. So a
        link with an ``opening`` ends with that message. If the caller is cancelled, or a timeout ends the call, the
        connection is closed later, when the message has arrived; :attr:`fragile` waits for that.

        Args:
            channel_type: the type of the channel.
            number: its number among the channels of this type.
            connection_id: 0 for the main channel, otherwise the session id.
            capabilities: bit numbers of our capabilities of this channel type.
            progress: called at the start of each stage.
            wire: taps the connection; None: nothing does. (An argument, because ``capabilities`` depend on it.)
            opening: returns the messages that the client must send at once after the link; None: there are none.

        Raises:
            TargetError: a stage failed; LinkFailure if the server refused the link.
            UsageError: the host is not valid in a request to the proxy.
            RemoteProtocolError: the server violated the protocol.
        """
        client = LinkClient.for_channel(
            channel_type,
            number,
            connection_id=connection_id,
            capabilities=[*capabilities],
            password=self._target.password,
        )
        secured = self._uses_tls(channel_type)
        try:
            return await self._link(client, secured, progress, wire, opening)
        except LinkFailure as error:
            refused = error.error is LinkError.NEED_UNSECURED and error.phase is LinkPhase.REPLY
            if not secured or not refused or self._target.port is None:
                raise
            self._check_plain(channel_type, error)
        client = LinkClient(client.mess, client.password, client.name)  # a link can be used once
        return await self._link(client, False, progress, wire, opening)

    async def answers(self) -> bool:
        """Return whether the server replies to a link of the main channel. No ticket is sent, so it ends no session."""
        client = LinkClient.for_channel(ChannelType.MAIN, 0, connection_id=0, capabilities=(), password="")
        reader = _ReplyReader(client)
        try:
            secured = self._uses_tls(ChannelType.MAIN)
            address = self._address(secured)
            if secured:
                await self._start_tls(reader.connection, address, None)
            else:
                sock = await self._reach(address)
                await start(sock, reader.connection, tls=None, server_hostname="", timeout=self._timeouts.handshake)
            reader.connection.write([*client.data_to_send()])
            return await reader.replied
        except FarplugError:
            return False
        finally:
            reader.connection.abort()

    def _uses_tls(self, channel_type: ChannelType) -> bool:
        target = self._target
        if target.unix_path is not None or target.tls_port is not None:
            return target.unix_path is None
        if target.must_use_tls(channel_type):
            raise TargetError(
                f"{target}: secure-channels requires TLS for the channel {channel_type}, and there is no TLS port",
                reason=Reason.NEEDS_TLS,
                remedy="give the VM's SPICE server a TLS port, and the .vv file a tls-port",
            )
        if target.demands_tls and not target.allow_plain:
            raise TargetError(
                f"{target}: it has a CA or a host subject, but no TLS port: nothing would be checked",
                reason=Reason.NEEDS_TLS,
                remedy=_allow_plain_remedy("give the VM's SPICE server a TLS port, and the .vv file a tls-port"),
            )
        return False

    def _check_plain(self, channel_type: ChannelType, error: LinkFailure) -> None:
        """Raise an error if the target forbids that a channel uses the plain port."""
        target = self._target
        if target.must_use_tls(channel_type):
            raise TargetError(
                f"{target}: the server does not serve the channel {channel_type} over TLS, as secure-channels requires",
                reason=Reason.NEEDS_TLS,
                remedy="remove the channel from the server's plain-text channels",
            ) from error
        if target.demands_tls and not target.allow_plain:
            raise TargetError(
                f"{target}: the server does not serve the channel {channel_type} over TLS",
                reason=Reason.NEEDS_TLS,
                remedy=_allow_plain_remedy("remove the channel from the server's plain-text channels"),
            ) from error

    async def _link(
        self,
        client: LinkClient,
        secured: bool,
        progress: Progress | None,
        wire: Wire | None,
        opening: Opening | None,
    ) -> LinkedChannel:
        client.tls = secured
        address = self._address(secured)
        # Without the address: that of a proxy's target may hold a ticket.
        name = f"SPICE channel {client.name}{', below TLS' if secured else ''}"
        linker = _LinkReader(client, None if wire is None else wire.tap(name), opening, self.fragile)
        if progress is not None:
            progress(
                Stage.REACH,
                str(address) if self._proxy is None else f"{address} through the proxy {self._proxy.address}",
            )
        try:
            if secured:
                await self._start_tls(linker.connection, address, progress)
            else:
                sock = await self._reach(address)
                await start(sock, linker.connection, tls=None, server_hostname="", timeout=self._timeouts.handshake)
            if progress is not None:
                progress(Stage.TICKET, str(address))
            linker.begin()
            result = await self._result(linker)
        except BaseException:
            linker.abandon()
            raise
        return LinkedChannel(linker.connection, result, local=isinstance(address, UnixAddress))

    async def _result(self, linker: _LinkReader) -> LinkResult:
        client = linker.client
        try:
            async with asyncio.timeout(self._timeouts.handshake):
                return await linker.result
        except TimeoutError:
            missing = client.phase.removeprefix("a ").removeprefix("the ")
            raise LinkFailure(
                f"{client.name}: no {missing} within {self._timeouts.handshake:g} s",
                reason=Reason.TIMED_OUT,
                remedy=f"check that the port is the VM's SPICE port; {SERVER_LOG}",
                error=None,
                phase=client.phase,
            ) from None

    def _address(self, secured: bool) -> TcpAddress | UnixAddress:
        target = self._target
        if target.unix_path is not None:
            return UnixAddress(target.unix_path)
        port = target.tls_port if secured else target.port
        assert port is not None
        return TcpAddress(target.host, port)

    async def _reach(self, address: TcpAddress | UnixAddress) -> socket.socket:
        if self._proxy is None or isinstance(address, UnixAddress):
            return await dial(address, self._timeouts.connect)
        sock = await dial(self._proxy.address, self._timeouts.connect)
        try:
            await open_tunnel(sock, self._proxy, address, self._timeouts.handshake)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _start_tls(
        self, connection: Connection, address: TcpAddress | UnixAddress, progress: Progress | None
    ) -> None:
        host, where = self._target.host, str(address)
        subject = self._host_subject
        sock = await self._reach(address)
        if progress is not None:
            progress(Stage.TLS, where)
        try:
            # The host may not be a name, but a proxy's ticket: pass it to TLS only if TLS checks it.
            name = without_zone(host) if subject is None else ""
            await start(sock, connection, tls=self._context, server_hostname=name, timeout=self._timeouts.handshake)
        except ssl.SSLCertVerificationError as error:
            certificate = await self._read_certificate(address)
            raise tls.certificate_error(where, host, error, certificate) from error
        except OSError as error:
            raise tls.handshake_error(where, error) from error
        except ValueError as error:
            raise TargetError(
                f"TLS to {where}: {host[:200]!r} is not a valid name in a certificate",
                reason=Reason.TLS_WRONG_HOST,
                remedy=tls.subject_remedy("give"),
            ) from error
        if subject is not None:
            assert connection.tls is not None
            presented = tls.peer_certificate(connection.tls)
            if presented is None or not subject.matches(presented):
                raise tls.subject_error(where, subject, presented)

    async def _read_certificate(self, address: TcpAddress | UnixAddress) -> x509.Certificate | None:
        """Return the refused certificate, for the message: a failed handshake does not have it. None if unreadable."""
        connection = Connection(_DiscardReader(), lambda error: None)
        try:
            sock = await self._reach(address)
            context = tls.inspection_context()
            await start(sock, connection, tls=context, server_hostname="", timeout=self._timeouts.handshake)
            return None if connection.tls is None else tls.peer_certificate(connection.tls)
        except (OSError, FarplugError):
            return None
        finally:
            connection.abort()


def _allow_plain_remedy(otherwise: str) -> Remedy:
    """Return the remedy for a target that demands TLS, and a server without it."""
    plain = "or use the plain port, if no other server can answer there and read the password"
    return Remedy(otherwise, alternative=Remedy(plain, setting="target.allow_plain", value=True))


class _DiscardReader:
    """The reader of a connection whose data is not needed."""

    def data_received(self, data: memoryview) -> None:
        """Drop the data."""

    def pause_writing(self) -> None:
        """Do nothing: nothing is written."""

    def resume_writing(self) -> None:
        """Do nothing: nothing is written."""
