"""One linked SPICE channel: messages in and out, and the answers that every channel must send. No I/O.

The channel answers SET_ACK, PING and MIGRATE itself (:meth:`Channel.data_to_send` returns the answers), returns the
messages that the caller asked for, and skips all others without storing them.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from farplug.errors import LocalProtocolError, RemoteProtocolError
from farplug.spice.messages import (
    ClientMessage,
    Disconnecting,
    Migrate,
    MigrateFlags,
    Notify,
    ServerMessage,
    SetAck,
    WaitForChannels,
)
from farplug.usb.types import Buffer

log = logging.getLogger(__name__)

MAX_MESSAGE = 16 << 20
"""The largest message of most channels that we accept, stored or not, in bytes: as proxies do."""

_MINI_HEADER = struct.Struct("<HI")
_FULL_HEADER = struct.Struct("<QHII")
_U32 = struct.Struct("<I")
_PING = struct.Struct("<IQ")

_COMMON_LIMITS: dict[int, int] = {
    ServerMessage.MIGRATE: 64,
    ServerMessage.SET_ACK: 64,
    ServerMessage.WAIT_FOR_CHANNELS: 4096,
    ServerMessage.DISCONNECTING: 64,
    ServerMessage.NOTIFY: 64 << 10,
}
"""The messages that we store on every channel, and the largest body of each that we accept, in bytes."""


class Message(NamedTuple):
    """A complete message that the caller asked for. ``body`` is valid until the next ``receive_data``."""

    kind: int
    body: memoryview


Event: TypeAlias = Message | memoryview | Notify | Disconnecting | Migrate
"""A received event. A memoryview: the next bytes of a streamed message, never empty, valid until the next
``receive_data``."""


class Channel:
    """The messages of one channel.

    Pass received bytes to :meth:`receive_data`, call :meth:`next_event` until it returns None, then send
    :meth:`data_to_send`.

    Args:
        name: for logs and errors.
        mini_header: :attr:`LinkResult.mini_header`.
        stored: message types to return as a whole, and the largest body of each in bytes.
        streamed: the message type whose bytes are returned as they arrive; None: no type.
        largest: the largest message that we accept, stored or not, in bytes.
    """

    def __init__(
        self,
        name: str,
        *,
        mini_header: bool,
        stored: Mapping[int, int],
        streamed: int | None = None,
        largest: int = MAX_MESSAGE,
    ) -> None:
        self.name = name
        self._mini_header = mini_header
        self._limits = {**stored, **_COMMON_LIMITS}
        self._streamed = streamed
        self._largest = largest
        self._debug = log.isEnabledFor(logging.DEBUG)
        self._view = memoryview(b"")
        self._position = 0
        self._serial = 0
        self._ack_window = 0
        self._ack_left = 0
        self._output: list[Buffer] = []
        self._events = self._parse()

    def receive_data(self, data: memoryview) -> None:
        """Pass in bytes from the server. They are not copied: call :meth:`next_event` until None before they change.

        Raises:
            LocalProtocolError: not all of the last bytes have been processed.
        """
        if self.has_more:
            raise LocalProtocolError(f"{self.name}: {len(self._view) - self._position} bytes are not processed yet")
        self._view = data
        self._position = 0

    def next_event(self) -> Event | None:
        """Return the next event; None if more bytes are needed.

        Raises:
            RemoteProtocolError: the server violated the protocol. Nothing after that can be parsed: every later call
                returns None.
        """
        return next(self._events, None)

    @property
    def has_more(self) -> bool:
        """Return whether some of the received bytes are not processed yet."""
        return self._position < len(self._view)

    def send(self, kind: int, *body: Buffer) -> None:
        """Queue a message."""
        self._queue(kind, body, sum(map(len, body)))

    def _queue(self, kind: int, body: Sequence[Buffer], size: int) -> None:
        if self._debug:
            log.debug("> %s: %s, %d bytes", self.name, self._describe(ClientMessage, kind), size)
        self._output.append(self.header(kind, size))
        self._output += body

    def header(self, kind: int, size: int) -> bytes:
        """Return the header of the next message: the caller sends ``size`` bytes of body after it."""
        if self._mini_header:
            return _MINI_HEADER.pack(kind, size)
        self._serial += 1
        return _FULL_HEADER.pack(self._serial, kind, size, 0)

    def data_to_send(self) -> list[Buffer]:
        """Return the queued buffers, in order, and empty the queue."""
        output, self._output = self._output, []
        return output

    def _parse(self) -> Generator[Event | None, None, None]:
        mini_header, streamed = self._mini_header, self._streamed
        layout = _MINI_HEADER if mini_header else _FULL_HEADER
        header_size = layout.size
        while True:
            while not (header := self._take(header_size)):
                yield None
            if len(header) < header_size:
                header = yield from self._rest(header, header_size)
            if mini_header:
                kind, size = layout.unpack(header)
            else:
                _, kind, size, sub_list = layout.unpack(header)
                if sub_list:
                    raise RemoteProtocolError(f"{self.name}: a SPICE message with sub-messages is not supported")
            if size > self._largest:
                raise RemoteProtocolError(
                    f"{self.name}: SPICE message {kind} of {size} bytes, more than {self._largest} (MAX_MESSAGE)"
                )

            if kind == streamed:
                if self._debug:
                    log.debug("< %s: %s, %d bytes", self.name, self._describe(ServerMessage, kind), size)
                while size:
                    if data := self._take(size):
                        size -= len(data)
                        yield data
                    else:
                        yield None
            elif (limit := self._limits.get(kind)) is not None:
                if size > limit:
                    raise RemoteProtocolError(f"{self.name}: SPICE message {kind} of {size} bytes, more than {limit}")
                body = yield from self._read(size)
                if (event := self._handle(kind, body)) is not None:
                    yield event
            elif kind == ServerMessage.PING:
                if size < _PING.size:
                    raise RemoteProtocolError(f"{self.name}: SPICE PING of {size} bytes, fewer than {_PING.size}")
                stamp = bytes((yield from self._read(_PING.size)))
                yield from self._skip(size - _PING.size)  # its padding measures the bandwidth: answer after all of it
                if self._debug:
                    log.debug("< %s: PING %d, %d bytes", self.name, _PING.unpack(stamp)[0], size)
                self.send(ClientMessage.PONG, stamp)
            else:
                if self._debug:
                    log.debug("< %s: message %d, %d bytes, ignored", self.name, kind, size)
                if size:
                    yield from self._skip(size)

            if self._ack_left:
                self._ack_left -= 1
                if not self._ack_left:
                    self._ack_left = self._ack_window
                    self._queue(ClientMessage.ACK, (), 0)

    def _handle(self, kind: int, body: memoryview) -> Event | None:
        if kind not in _COMMON_LIMITS:
            if self._debug:
                log.debug("< %s: %s, %d bytes", self.name, self._describe(ServerMessage, kind), len(body))
            return Message(kind, body)
        event: SetAck | WaitForChannels | Event
        match kind:
            case ServerMessage.SET_ACK:
                event = SetAck.parse(body)
            case ServerMessage.WAIT_FOR_CHANNELS:
                event = WaitForChannels.parse(body)
            case ServerMessage.NOTIFY:
                event = Notify.parse(body)
            case ServerMessage.DISCONNECTING:
                event = Disconnecting.parse(body)
            case _:
                event = Migrate.parse(body)
        if self._debug:
            log.debug("< %s: %s", self.name, event)
        match event:
            case SetAck(generation, window):
                # This message is not counted in the new window.
                self._ack_window = window
                self._ack_left = window + 1 if window else 0
                self.send(ClientMessage.ACK_SYNC, _U32.pack(generation))
                return None
            case WaitForChannels():
                # It orders drawing on several display channels. Our channels do not depend on each other.
                return None
            case Migrate(flags) if MigrateFlags.NEED_FLUSH in flags:
                self.send(ClientMessage.MIGRATE_FLUSH_MARK)
        return event

    def _describe(self, names: type[ServerMessage] | type[ClientMessage], kind: int) -> str:
        if kind > ServerMessage.NOTIFY:  # from 101 on the meaning depends on the channel
            prefix = {"main": "MAIN_", "usbredir": "VMC_"}.get(self.name.partition(" ")[0], "-")
            for member, value in names.__members__.items():
                if value == kind and member.startswith(prefix):
                    return member.removeprefix(prefix)
            return f"message {kind}"
        return names(kind).name

    def _take(self, size: int) -> memoryview:
        """Take up to ``size`` of the bytes that have arrived."""
        start = self._position
        taken = self._view[start : start + size]
        self._position = start + len(taken)
        return taken

    def _read(self, size: int) -> Generator[None, None, memoryview]:
        data = self._take(size)
        return data if len(data) == size else (yield from self._rest(data, size))

    def _rest(self, data: memoryview, size: int) -> Generator[None, None, memoryview]:
        """Return ``size`` bytes, of which ``data`` are the first; wait for the others."""
        whole = bytearray(data)
        while len(whole) < size:
            yield None
            whole += self._take(size - len(whole))
        return memoryview(whole)

    def _skip(self, size: int) -> Generator[None, None, None]:
        while True:
            size -= len(self._take(size))
            if not size:
                return
            yield None
