"""A websocket (RFC 6455) to a server: a byte stream, the payloads of its binary frames. Their borders mean nothing."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Sequence
from typing import Final, Protocol

from websockets.client import ClientProtocol
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from farplug.errors import FarplugError, InternalError, RemoteProtocolError
from farplug.text import printable
from farplug.transport.connection import Connection, Tap, start
from farplug.usb.types import Buffer

MAX_FRAME: Final = 1 << 20
"""The largest payload of one frame that we accept, in bytes. A message may have any number of frames."""
MAX_ANSWER: Final = 256 << 10
"""Bytes of the answer to the handshake: headers, and the reason of a refusal, which may come in chunks of one byte."""
PARSE_AT_ONCE: Final = 4 << 10
"""Bytes that are parsed between two looks at the number of frames, which have 2 bytes at least."""
TURN_FRAMES: Final = 1024
"""Frames in one turn of the event loop, and those of PARSE_AT_ONCE bytes; the others are parsed in the next one."""
PING_INTERVAL: Final = 20.0
"""Seconds between two pings: load balancers close connections without traffic, some after 60 s.

No answer is awaited: a relay whose pipe to a paused VM is full does not read the ping.
"""
CLOSE_LINGER: Final = 1.0
"""Seconds for the server's answer to our close frame: a relay drops what is in flight when the connection ends."""
MAX_REASON: Final = 200
"""Characters of the server's reason for a close that a message quotes."""

_SILENT: Final = logging.Logger(__name__)
"""The logger of the websocket library. At the level DEBUG it would log the headers of the request: tokens."""
_SILENT.disabled = True


class Refused(Exception):
    """The server answered with another status than 101.

    Attributes:
        status: the HTTP status.
        body: of the answer, which has at most MAX_ANSWER bytes in all.
    """

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the server answered with the HTTP status {status}")
        self.status = status
        self.body = body


class NotWebSocket(Exception):
    """The server's answer is not that of a websocket server. The message has the reason."""


class StreamListener(Protocol):
    """The receiver of a websocket's bytes. Its methods are called on the event loop."""

    def data_received(self, data: memoryview) -> None:
        """Process received bytes. The view is valid only during the call."""

    def pause_writing(self) -> None:
        """Stop writing: the output queue is above its high-water mark."""

    def resume_writing(self) -> None:
        """Continue to write: the output queue is below its low-water mark again."""

    def stream_lost(self, what: FarplugError | str) -> None:
        """Called once, last, also after this side closed the websocket: with an error, or what the server did."""


class WebSocket:
    """A websocket to a server. Nothing is delivered before :meth:`start`.

    Args:
        uri: of the resource.
        subprotocol: the one that is offered.
        headers: of the request, beside those of the handshake. No log and no tap sees them.
        tap: sees the bytes of the stream; None: nothing does.
    """

    def __init__(
        self, uri: WebSocketURI, subprotocol: str, headers: Sequence[tuple[str, str]], tap: Tap | None = None
    ) -> None:
        self._protocol = ClientProtocol(
            uri, subprotocols=[Subprotocol(subprotocol)], max_size=(None, MAX_FRAME), logger=_SILENT
        )
        self._headers = headers
        self._tap = tap
        self._connection = Connection(self, self._lost)
        loop = asyncio.get_running_loop()
        self._answered: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        """Resolves when the server has closed the websocket, or the connection has ended."""
        self._listener: StreamListener | None = None
        self._received: list[Buffer] = []
        """What is not delivered yet: before :meth:`start` the rest of at most one read, which pauses reading."""
        self._unparsed = memoryview(b"")
        """The rest of a read. Reading is paused, so that the connection keeps it."""
        self._answer_size = 0
        """Bytes of the answer to the handshake that were parsed."""
        self._parsing: asyncio.Handle | None = None
        """Parses the rest in the next turn."""
        self._reading_paused = False
        """The listener, or the time before :meth:`start`, needs no bytes."""
        self._ended: tuple[Exception | None] | None = None
        """How the connection has ended before the rest was parsed; None: it has not."""
        self._pong: Buffer | None = None
        """The answer to the last ping, which waits until the output is written."""
        self._fault: FarplugError | str | None = None
        self._closing = self._writing_paused = False
        self._pinging: asyncio.TimerHandle | None = None

    async def connect(
        self, sock: socket.socket, *, tls: ssl.SSLContext | None, server_hostname: str, timeout: float
    ) -> None:
        """Connect over a socket.

        Args:
            sock: connected, non-blocking. It is closed on failure.
            tls: None: plain.
            server_hostname: the name for SNI and for the check of the certificate.
            timeout: seconds for the TLS handshake, and then for that of the websocket.

        Raises:
            Refused: the server answered with a status.
            NotWebSocket: its answer is not valid.
            OSError: as in asyncio; :class:`ssl.SSLError` and ``TimeoutError`` are OSErrors.
        """
        try:
            await start(sock, self._connection, tls=tls, server_hostname=server_hostname, timeout=timeout)
            request = self._protocol.connect()
            for name, value in self._headers:
                request.headers[name] = value  # appends: the names of headers may occur more than once
            self._protocol.send_request(request)
            self._flush()
            async with asyncio.timeout(timeout):
                await self._answered
        except BaseException:
            self.abort()
            raise
        self._ping_later()

    def start(self, listener: StreamListener) -> None:
        """Deliver received bytes, first those that arrived with the handshake. Call it once :meth:`connect` is done."""
        self._listener = listener
        if self._connection.lost:
            listener.stream_lost(self._fault or "closed the connection")
            return
        self._reading_paused = False  # before the delivery, which may pause it again
        if self._received:
            self._connection.deliver(self._unparsed)  # an exception of the listener aborts the connection
        self._read_on()

    def write(self, buffers: list[Buffer]) -> None:
        """Send buffers in order, as one frame. Does nothing if the websocket has ended, or is being closed."""
        if self._protocol.state is not State.OPEN:
            return
        if self._tap is not None:
            self._tap.sent(buffers)
        self._protocol.send_binary(b"".join(buffers))
        self._flush()

    def pause_reading(self) -> None:
        """Stop reading until :meth:`resume_reading`."""
        self._reading_paused = True
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._reading_paused = False
        self._read_on()

    async def close(self, timeout: float) -> None:
        """Send the queued data and a close frame, wait shortly for the server's, and close the connection.

        Args:
            timeout: seconds for the queued data.
        """
        self._closing = True
        try:
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
                self._flush()
                self.resume_reading()  # to drop data, and to see the server's close frame
                await asyncio.wait([self._over], timeout=min(timeout, CLOSE_LINGER))
            await self._connection.close(timeout)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Close the connection at once; queued data is lost."""
        self._closing = True
        self._connection.abort()

    # The connection ---------------------------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:
        """Process bytes of the server."""
        self._unparsed = data
        self._parse()

    def _parse(self) -> None:
        """Parse and deliver what was received, as far as one turn of the event loop permits."""
        self._parsing = None
        frames = 0
        while self._unparsed and frames < TURN_FRAMES:
            if not self._answered.done():
                frames = TURN_FRAMES  # the chunks of an answer are not counted
                self._answer_size += min(len(self._unparsed), PARSE_AT_ONCE)
                if self._answer_size > MAX_ANSWER:
                    self._unparsed = memoryview(b"")
                    self._fail(NotWebSocket(f"its answer is longer than {MAX_ANSWER} bytes"))
                    return
            piece, self._unparsed = self._unparsed[:PARSE_AT_ONCE], self._unparsed[PARSE_AT_ONCE:]
            self._protocol.receive_data(piece)  # type: ignore[arg-type]  # it only appends them to a bytearray
            frames += self._process()
        if self._unparsed:
            self._connection.pause_reading()
            self._read_on()
        if self._received and self._listener is not None:
            payload, self._received = b"".join(self._received), []
            if self._tap is not None:
                self._tap.received(memoryview(payload))
            if not self._closing:
                self._listener.data_received(memoryview(payload))

    def _read_on(self) -> None:
        """Parse the rest of what was received in the next turn, or read on; nothing of both while reading is paused."""
        if self._reading_paused or self._parsing is not None:
            return
        if self._unparsed:
            self._parsing = asyncio.get_running_loop().call_soon(self._parse_rest)
        else:
            self._connection.resume_reading()

    def _parse_rest(self) -> None:
        self._parsing = None
        ended = self._ended
        if not self._reading_paused and (self._connection.is_open or ended):
            self._connection.deliver(self._unparsed)  # an exception aborts the connection
        if ended and (self._reading_paused or not self._unparsed):
            self._unparsed = memoryview(b"")
            self._lost(*ended)
        else:
            self._read_on()

    def _process(self) -> int:
        """Handle what the library has parsed; return the number of frames."""
        events = self._protocol.events_received()
        for event in events:
            match event:
                case Frame(opcode=Opcode.BINARY | Opcode.CONT):
                    self._received.append(event.data)
                case Frame(opcode=Opcode.TEXT):
                    self._end(RemoteProtocolError("the server sent text over the websocket"))
                case Frame(opcode=Opcode.CLOSE):
                    self._end(_closed(self._protocol.close_rcvd))
                case Response() if event.status_code != 101:
                    self._fail(Refused(event.status_code, bytes(event.body)))
                case Response() if self._protocol.handshake_exc is None and not self._answered.done():
                    self._answered.set_result(None)
                    self.pause_reading()
        self._answer()
        if self._protocol.handshake_exc is not None:
            self._fail(NotWebSocket(printable(str(self._protocol.handshake_exc), MAX_REASON)))
        elif (broken := self._protocol.parser_exc) is not None:
            self._end(RemoteProtocolError(f"the server violated the websocket protocol: {printable(str(broken), 200)}"))
        return len(events)

    def pause_writing(self) -> None:
        """Pass this on."""
        self._writing_paused = True
        if self._listener is not None:
            self._listener.pause_writing()

    def resume_writing(self) -> None:
        """Pass this on."""
        self._writing_paused = False
        if self._pong is not None:
            pong, self._pong = self._pong, None
            self._connection.write([pong])
        if self._listener is not None:
            self._listener.resume_writing()

    def _lost(self, error: Exception | None) -> None:
        if self._unparsed and self._parsing is not None and not self._closing and self._fault is None:
            self._ended = (error,)  # _parse_rest() goes on
            return
        if self._pinging is not None:
            self._pinging.cancel()
        if self._parsing is not None:
            self._parsing.cancel()
        if self._tap is not None:
            self._tap.closed()
        if not self._answered.done():
            if error is None and self._connection.received:
                self._protocol.receive_eof()  # the body of an answer without a length ends here
                self._process()
            self._fail(error or ConnectionResetError(errno.ECONNRESET, "the server closed the connection"))
        if isinstance(error, InternalError):
            self._fault = error
        elif self._fault is None and error is not None:
            code = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
            self._fault = f"broke the connection: {os.strerror(code) if code else printable(str(error), MAX_REASON)}"
        self._set_over()
        if self._listener is not None:
            self._listener.stream_lost(self._fault or "closed the connection")

    # Details ----------------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Send the library's answers to what was received.

        While the server does not read them, only the pong for the newest ping is kept (RFC 6455, section 5.5.3).
        """
        if self._writing_paused and self._protocol.state is State.OPEN:
            pongs = self._protocol.data_to_send()
            self._pong = pongs[-1] if pongs else self._pong
        else:
            self._flush()

    def _flush(self) -> None:
        buffers: list[Buffer] = [data for data in self._protocol.data_to_send() if data]  # empty: the end of the stream
        if buffers:
            self._connection.write(buffers)

    def _fail(self, error: Exception) -> None:
        """Let :meth:`connect` raise an error. Does nothing after the handshake."""
        if not self._answered.done():
            self._answered.set_exception(error)
            self._answered.exception()  # mark it as retrieved: the caller may have been cancelled

    def _end(self, fault: FarplugError | str) -> None:
        """Close the connection: the server has closed the websocket, or violated the protocol."""
        self._set_over()
        if not self._closing and self._fault is None:
            self._fault = fault
            asyncio.get_running_loop().call_soon(self._connection.abort)  # what was received is delivered before

    def _set_over(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _ping_later(self) -> None:
        self._pinging = asyncio.get_running_loop().call_later(PING_INTERVAL, self._ping)

    def _ping(self) -> None:
        if self._protocol.state is State.OPEN and not self._writing_paused:
            self._protocol.send_ping(b"")
            self._flush()
        self._ping_later()


def _closed(close: Close | None) -> str:
    """Return what the server did, with the code and the reason of its close frame."""
    if close is None or close.code == CloseCode.NO_STATUS_RCVD:
        return "closed the connection"
    reason = f": {printable(close.reason, MAX_REASON)}" if close.reason else ""
    return f"closed the connection (code {close.code}{reason})"
