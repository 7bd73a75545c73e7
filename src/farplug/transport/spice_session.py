"""A SPICE session: the main channel. Its usbredir channels are ports; the others are linked while they are used.

:mod:`farplug.transport.dialer` connects channels, :mod:`farplug.transport.spice_port` has the ports.
"""

from __future__ import annotations

import asyncio
from typing import Self

from farplug.errors import FarplugError, GuestGoneError, InternalError, Reason, RemoteProtocolError, TargetError
from farplug.spice.channel import Channel, Message
from farplug.spice.inputs import MouseMode
from farplug.spice.link import SERVER_LOG
from farplug.spice.messages import (
    ChannelId,
    ClientMessage,
    Disconnecting,
    MainInit,
    Migrate,
    MouseModes,
    Notify,
    ServerMessage,
    SwitchHost,
    parse_channels_list,
    parse_name,
    parse_uuid,
)
from farplug.spice.types import ChannelType, MainCapability
from farplug.transport.connection import CurrentWire, Timeouts, untapped
from farplug.transport.dialer import ChannelDialer, LinkedChannel
from farplug.transport.moved import GuestMoved
from farplug.transport.port import Port
from farplug.transport.session import Session
from farplug.transport.spice_port import SpicePort, describe_broken, log_notice
from farplug.transport.spice_side import SideChannel, SpiceCursor, SpiceDisplay, SpiceInputs
from farplug.transport.spice_target import Progress, SpiceTarget, Stage

_MAIN_MESSAGES: dict[int, int] = {
    ServerMessage.MAIN_INIT: 256,
    ServerMessage.MAIN_CHANNELS_LIST: 64 << 10,
    ServerMessage.MAIN_MOUSE_MODE: 64,
    ServerMessage.MAIN_MIGRATE_BEGIN: 64 << 10,
    ServerMessage.MAIN_MIGRATE_CANCEL: 64,
    ServerMessage.MAIN_MIGRATE_SWITCH_HOST: 64 << 10,
    ServerMessage.MAIN_NAME: 64 << 10,
    ServerMessage.MAIN_UUID: 64,
}
"""The messages of the main channel that we read, and the largest body of each that we accept, in bytes."""


_NOT_ENCRYPTED = "keyboard channel is insecure"
"""Part of a notice of servers when the inputs are linked without TLS, which the target decides. It is not logged."""

EXPLAIN_TIMEOUT = 5.0
"""Seconds in which a server that closed the session answers, if it still runs."""

NO_CHANNEL_REMEDY = """\
add one to the VM, one for each device:
  QEMU:    -device qemu-xhci -chardev spicevmc,name=usbredir,id=usb0 -device usb-redir,chardev=usb0
  libvirt: <controller type='usb' model='qemu-xhci'/> <redirdev bus='usb' type='spicevmc'/>"""


class SpiceSession(Session):
    """A session with a VM's SPICE server. Made by :meth:`connect`.

    A SPICE server serves one client at a time: a new session ends the previous one.

    Attributes:
        target: the server.
        name: the VM's name; empty if the server does not send it.
        uuid: the VM's UUID; empty if the server does not send it.
        session_id: the server's id of the session.
        channels: all channels of the server, sorted.
        ports: one for each usbredir channel, in the order of their numbers.
        ended: resolves when the session has ended: to None if we closed it, otherwise to the error. It never raises.
        displays: one for each display channel, by its number; linked only while they are used.
        cursors: one for each cursor channel, by its number.
        inputs: None: the server has no such channel.
    """

    exclusive = True
    reached = True
    carries_screen = True
    no_port_remedy = NO_CHANNEL_REMEDY

    def __init__(self, target: SpiceTarget, dialer: ChannelDialer, main: LinkedChannel, timeouts: Timeouts) -> None:
        loop = asyncio.get_running_loop()
        self.target = target
        self.name = ""
        self.uuid = ""
        self.session_id = 0
        self.channels: tuple[ChannelId, ...] = ()
        self.ports: list[Port] = []
        self.ended: asyncio.Future[FarplugError | None] = loop.create_future()
        self._dialer = dialer
        self._timeouts = timeouts
        self._usbredir_ports: list[SpicePort] = []
        self.displays: dict[int, SpiceDisplay] = {}
        self.cursors: dict[int, SpiceCursor] = {}
        self.inputs: SpiceInputs | None = None
        self._mouse = MouseModes(0, 0)
        self._listed: asyncio.Future[None] = loop.create_future()
        self._close_reason = ""
        self._closed_by_server: GuestGoneError | None = None
        """The error with which the session ended, if the server closed it."""
        self._destination: SwitchHost | None = None
        """Where the VM migrates, while it does, if the server announced it."""
        self._channel = Channel("main", mini_header=main.link.mini_header, stored=_MAIN_MESSAGES)
        self._connection = main.connection
        main.start(self, self._lost)

    @classmethod
    async def connect(
        cls,
        target: SpiceTarget,
        *,
        progress: Progress | None = None,
        timeouts: Timeouts | None = None,
        wire: CurrentWire = untapped,
    ) -> Self:
        """Connect to a SPICE server and get its list of channels.

        Args:
            target: the server, and the credentials.
            progress: called at the start of each stage, with its address.
            timeouts: for each stage.
            wire: taps the connections.

        Raises:
            TargetError: the server cannot be reached, or refuses the connection.
            UsageError: the target's password, CA, host subject or proxy is malformed.
            RemoteProtocolError: the server violated the protocol.
        """
        timeouts = timeouts or Timeouts()
        dialer = ChannelDialer(target, timeouts, wire)
        capabilities = [MainCapability.NAME_AND_UUID, MainCapability.AGENT_CONNECTED_TOKENS]
        main = await dialer.link(
            ChannelType.MAIN, 0, connection_id=0, capabilities=capabilities, progress=progress, wire=wire()
        )
        if progress is not None:
            progress(Stage.CHANNELS, str(target))
        session = cls(target, dialer, main, timeouts)
        try:
            async with asyncio.timeout(timeouts.handshake):
                await session._listed
        except TimeoutError:
            session._connection.abort()
            raise TargetError(
                f"{target}: the server sent no list of channels within {timeouts.handshake:g} s",
                reason=Reason.TIMED_OUT,
                remedy=f"check that the VM's host responds; {SERVER_LOG}",
            ) from None
        except BaseException:
            session._connection.abort()
            raise
        return session

    @property
    def over(self) -> bool:
        return self.ended.done()

    async def closed(self) -> FarplugError | None:
        return await asyncio.shield(self.ended)

    async def close(self) -> None:
        """Close all ports (their queued data is sent within a bounded time), then the session.

        The link of a display is never interrupted: closing waits for it, also when cancelled.
        """
        try:
            for channel in self._side_channels():
                channel.session_closed()
            await asyncio.gather(*(channel.finished() for channel in self._side_channels()))
            await self._dialer.fragile.settle()
            await asyncio.gather(*(port.close() for port in self._usbredir_ports))
        except BaseException:  # cancelled: the ports have closed at once, and so does the session
            await self._dialer.fragile.settle()
            self._connection.abort()
            raise
        await self._connection.close(self._timeouts.flush)

    async def explain(self, error: FarplugError) -> FarplugError:
        """Return whether the server that closed the session still answers: then another client has probably connected.

        The protocol has no message for that: libspice-server closes the connections, as the end of QEMU does.
        """
        if error is not self._closed_by_server:
            return error
        try:
            async with asyncio.timeout(EXPLAIN_TIMEOUT):
                answers = await self._dialer.answers()
        except TimeoutError:
            return error
        if not answers:
            return GuestGoneError(
                f"{error.message}, and answers no more",
                remedy="check that the VM still runs, and that its host can be reached",
            )
        return GuestGoneError(
            f"{error.message}, and still answers: another SPICE client has probably connected",
            reason=Reason.TAKEN_OVER,
            remedy="a SPICE server serves one client at a time: end the other client before you connect again, or "
            "farplug ends its session; a SPICE proxy may have ended the session, too: read its log",
        )

    # the main channel

    def data_received(self, data: memoryview) -> None:
        """Process bytes of the main channel."""
        try:
            self._channel.receive_data(data)
            while (event := self._channel.next_event()) is not None:
                match event:
                    case Message(kind, body):
                        self._main_message(kind, body)
                    case Disconnecting(_, reason):
                        self._close_reason = f", with {reason}"
                    case Notify():
                        if _NOT_ENCRYPTED not in event.text:
                            log_notice("main", event)
                    case Migrate():
                        self._connection.write(self._channel.data_to_send())  # the flush mark, if the server needs it
                        self.moved()
        except RemoteProtocolError as error:
            self._fail(error)
            return
        self._connection.write(self._channel.data_to_send())

    def pause_writing(self) -> None:
        """Pause reading: the server does not read our answers."""
        self._connection.pause_reading()

    def resume_writing(self) -> None:
        """Resume reading: the server reads again."""
        self._connection.resume_reading()

    def _main_message(self, kind: int, body: memoryview) -> None:
        match kind:
            case ServerMessage.MAIN_INIT:
                init = MainInit.parse(body)
                self.session_id = init.session_id
                self._mouse = MouseModes(init.supported_mouse_modes, init.current_mouse_mode)
                self._channel.send(ClientMessage.MAIN_ATTACH_CHANNELS)
            case ServerMessage.MAIN_CHANNELS_LIST:
                self._list_channels(parse_channels_list(body))
            case ServerMessage.MAIN_MOUSE_MODE:
                self._set_mouse(MouseModes.parse(body))
            case ServerMessage.MAIN_NAME:
                self.name = parse_name(body)
            case ServerMessage.MAIN_UUID:
                self.uuid = parse_uuid(body)
            case ServerMessage.MAIN_MIGRATE_BEGIN:
                # The VM still runs here. The server asks for a second connection, to the destination; without it, the
                # server sends MIGRATE_SWITCH_HOST once the VM has moved.
                self._destination = SwitchHost.parse(body)
                self._channel.send(ClientMessage.MAIN_MIGRATE_CONNECT_ERROR)
            case ServerMessage.MAIN_MIGRATE_CANCEL:
                self._destination = None
            case ServerMessage.MAIN_MIGRATE_SWITCH_HOST:
                self.moved(SwitchHost.parse(body))

    def _list_channels(self, channels: tuple[ChannelId, ...]) -> None:
        self.channels = channels
        known = {port.number for port in self._usbredir_ports}
        for channel in channels:  # a server may send the list again when a channel was added
            if channel.channel_type is ChannelType.USBREDIR and channel.number not in known:
                port = SpicePort(channel.number, self, self._dialer, self._timeouts)
                self._usbredir_ports.append(port)
                self.ports.append(port)
            elif channel.channel_type is ChannelType.DISPLAY and channel.number not in self.displays:
                self.displays[channel.number] = SpiceDisplay(channel.number, self, self._dialer)
            elif channel.channel_type is ChannelType.CURSOR and channel.number not in self.cursors:
                self.cursors[channel.number] = SpiceCursor(channel.number, self, self._dialer)
            elif channel.channel_type is ChannelType.INPUTS and self.inputs is None:
                self.inputs = SpiceInputs(channel.number, self, self._dialer)
                self.inputs.set_mouse_mode(self._mouse.supported, self._mouse.current)
        if not self._listed.done():
            self._listed.set_result(None)

    def _side_channels(self) -> list[SideChannel]:
        inputs = [] if self.inputs is None else [self.inputs]
        return [*self.displays.values(), *self.cursors.values(), *inputs]

    def _set_mouse(self, modes: MouseModes) -> None:
        self._mouse = modes
        if self.inputs is not None:
            self.inputs.set_mouse_mode(modes.supported, modes.current)

    def prefer_client_mouse(self) -> None:
        """Ask for the mouse mode CLIENT, if the server supports it."""
        if self._mouse.supported & MouseMode.CLIENT and self._mouse.current != MouseMode.CLIENT:
            self._channel.send(ClientMessage.MAIN_MOUSE_MODE_REQUEST, MouseMode.CLIENT.to_bytes(2, "little"))
            self._connection.write(self._channel.data_to_send())

    def moved(self, where: SwitchHost | None = None) -> None:
        """End the session: the VM migrated.

        Args:
            where: the new host; None: that of the migration which the server announced, if it did.
        """
        self._fail(GuestMoved(where or self._destination))

    def _fail(self, error: FarplugError) -> None:
        """End the session at once; only the link of a display is not interrupted."""
        if not self.ended.done():
            self.ended.set_result(error)
        self._dialer.fragile.call_after(self._connection.abort)

    def _lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            if isinstance(error, InternalError):
                self.ended.set_result(error)
            elif self._connection.closing:
                self.ended.set_result(None)
            elif self._destination is not None:
                self.ended.set_result(GuestMoved(self._destination))
            else:
                # A server that has not read all that we sent resets the connection.
                if error is None or isinstance(error, ConnectionResetError | BrokenPipeError):
                    closed, how = True, "the SPICE server closed the session"
                else:
                    closed, how = False, describe_broken(error)
                gone = GuestGoneError(
                    f"{self.target}: {how}{self._close_reason}",
                    remedy="check that the VM still runs; another client may have taken over the session: a SPICE "
                    "server serves one client at a time; a SPICE proxy may have ended the session: read its log",
                )
                self._closed_by_server = gone if closed else None
                self.ended.set_result(gone)
        reason = self.ended.result()
        if not self._listed.done():
            if isinstance(reason, GuestGoneError) and not self.session_id:
                reason = TargetError(
                    f"{self.target}: the server accepted the ticket, then closed the connection{self._close_reason}",
                    reason=Reason.LINK_REFUSED,
                    remedy=f"behind a SPICE proxy: check that the VM runs; {SERVER_LOG}",
                )
            self._listed.set_exception(reason or GuestGoneError(f"{self.target}: the session was closed"))
            self._listed.exception()  # mark as retrieved: connect() may have been cancelled
        for port in self._usbredir_ports:
            port.session_ended(reason)
        for channel in self._side_channels():
            channel.session_closed()
