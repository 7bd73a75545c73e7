"""A websocket to a hostile server: frames by the ten thousand in one read, and pings without an end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
from websockets.client import ClientProtocol
from websockets.uri import parse_uri

from farplug.errors import FarplugError
from farplug.transport import websocket
from farplug.transport.connection import HIGH_WATER, RECEIVE_BUFFER
from farplug.transport.websocket import NotWebSocket, Refused, WebSocket

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class _Listener:
    """Stores what came, and the size of each delivery."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.sizes: list[int] = []
        self.paused = False
        self.stream: WebSocket | None = None
        """Is paused after each delivery; None: it is not."""
        self.lost: list[FarplugError | str] = []

    def data_received(self, data: memoryview) -> None:
        assert self.stream is None or not self.paused
        self.data += data
        self.sizes.append(len(data))
        if self.stream is not None:
            self.paused = True
            self.stream.pause_reading()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def stream_lost(self, what: FarplugError | str) -> None:
        self.lost.append(what)


@contextmanager
def _sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our socket, which a websocket closes, and the server's."""
    ours, server = socket.socketpair()
    with server:
        for sock in (ours, server):
            sock.setblocking(False)
        yield ours, server


@asynccontextmanager
async def _connected(early: bytes = b"") -> AsyncIterator[tuple[WebSocket, socket.socket]]:
    """A websocket, and the server's socket; what is early comes together with the answer to the handshake."""
    loop = asyncio.get_running_loop()
    with _sockets() as (ours, server):
        stream = WebSocket(parse_uri("ws://host/path"), "binary", [])

        async def answer() -> None:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await loop.sock_recv(server, 65536)
            key = next(line[19:] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: "))
            accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())
            await loop.sock_sendall(
                server,
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Protocol: binary\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n" + early,
            )

        answering = asyncio.ensure_future(answer())
        await stream.connect(ours, tls=None, server_hostname="host", timeout=10)
        await answering
        try:
            yield stream, server
        finally:
            stream.abort()
            await asyncio.sleep(0)


def _frames(count: int) -> tuple[bytes, bytes]:
    """Frames of one byte each, and their bytes."""
    data = bytes(index % 251 for index in range(count))
    return b"".join(bytes((0x82, 1, each)) for each in data), data


@pytest.mark.parametrize("pauses", [False, True], ids=["reads", "pauses"])
@pytest.mark.parametrize("when", ["early", "later"])
async def test_small_frames_are_parsed_in_many_turns(when: str, pauses: bool) -> None:
    frames, data = _frames(RECEIVE_BUFFER // 3 - 100)  # one read, also with the answer to the handshake
    most = websocket.TURN_FRAMES + websocket.PARSE_AT_ONCE // 2
    assert len(data) > 10 * most
    async with _connected(frames if when == "early" else b"") as (stream, server):
        listener = _Listener()
        listener.stream = stream if pauses else None
        stream.start(listener)
        if when == "later":
            await asyncio.get_running_loop().sock_sendall(server, frames)
        while len(listener.data) < len(data):
            await asyncio.sleep(0)
            if pauses and listener.paused:
                before = len(listener.data)
                for _ in range(3):
                    await asyncio.sleep(0)
                assert len(listener.data) == before, "nothing is delivered while reading is paused"
                listener.paused = False
                stream.resume_reading()
        assert listener.data == data
        assert max(listener.sizes) <= most
        assert not listener.lost


async def test_what_came_before_the_end_of_the_connection_is_delivered() -> None:
    frames, data = _frames(20_000)  # one read
    async with _connected() as (stream, server):
        listener = _Listener()
        stream.start(listener)
        await asyncio.get_running_loop().sock_sendall(server, frames)
        while not listener.data:
            await asyncio.sleep(0)
        assert len(listener.data) < len(data)
        stream._connection.connection_lost(None)  # as TLS does although reading is paused
        assert not listener.lost
        while not listener.lost:
            await asyncio.sleep(0)
        assert listener.data == data
        assert listener.lost == ["closed the connection"]


@pytest.mark.parametrize(
    "frame",
    [b"\x8a\x00", b"\x82\x00", b"\x02\x00" + b"\x00\x00" * 30 + b"\x80\x00"],
    ids=["pong", "empty", "fragments"],
)
async def test_frames_without_bytes_do_not_occupy_a_turn(frame: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    turns: list[int] = []
    process = WebSocket._process

    def counted(self: WebSocket) -> int:
        frames = process(self)
        parsed.append(frames)
        return frames

    monkeypatch.setattr(WebSocket, "_process", counted)
    async with _connected() as (stream, server):
        listener = _Listener()
        stream.start(listener)
        flood = frame * (RECEIVE_BUFFER // len(frame))
        sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(server, flood + b"\x82\x01!"))
        while not listener.data:
            await asyncio.sleep(0)
            turns.append(sum(parsed))
            parsed.clear()
        await sending
        assert listener.data == b"!"
        assert sum(turns) >= len(flood) // 2
        # A turn of the test is one of the event loop, in which a read and a rest may both be parsed.
        assert max(turns) <= 2 * (websocket.TURN_FRAMES + websocket.PARSE_AT_ONCE // 2)


@pytest.mark.parametrize(
    ("size", "error"), [(1000, Refused), (websocket.MAX_ANSWER // 6 + 1, NotWebSocket)], ids=["short", "long"]
)
async def test_a_refusal_in_chunks_of_one_byte(
    size: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    pieces: list[int] = []
    receive = ClientProtocol.receive_data

    def counted(self: ClientProtocol, data: bytes | bytearray) -> None:
        pieces.append(len(data))
        receive(self, data)

    monkeypatch.setattr(ClientProtocol, "receive_data", counted)
    loop = asyncio.get_running_loop()
    with _sockets() as (ours, server):
        stream = WebSocket(parse_uri("ws://host/path"), "binary", [])
        connecting = asyncio.ensure_future(stream.connect(ours, tls=None, server_hostname="host", timeout=20))
        assert await loop.sock_recv(server, 65536)
        answer = b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * size + b"0\r\n\r\n"

        async def send() -> None:
            with suppress(OSError):  # the client closes the connection
                await loop.sock_sendall(server, answer)

        sending = asyncio.ensure_future(send())
        while not connecting.done():
            await asyncio.sleep(0)
            turns.append(sum(pieces))
            pieces.clear()
        with pytest.raises(error) as caught:
            await connecting
        await sending
    if isinstance(caught.value, Refused):
        assert (caught.value.status, caught.value.body) == (500, b"x" * size)
    assert max(turns) <= 2 * websocket.PARSE_AT_ONCE
    assert sum(turns) <= websocket.MAX_ANSWER


async def test_only_the_newest_of_many_pings_is_answered_while_the_server_reads_nothing() -> None:
    loop = asyncio.get_running_loop()
    async with _connected() as (stream, server):
        listener = _Listener()
        stream.start(listener)
        count = 8 * HIGH_WATER // 131
        pings = b"".join(b"\x89\x7d" + index.to_bytes(125, "big") for index in range(count))
        await loop.sock_sendall(server, pings + b"\x82\x01!")
        while not listener.data:
            await asyncio.sleep(0)
        assert listener.paused
        stream.write([b"end"])
        answers = bytearray()
        numbers: list[int] = []
        while not numbers or numbers[-1] != count - 1:  # the last one follows when the output is written
            answers += await loop.sock_recv(server, 1 << 20)
            ended, numbers = _answers(answers)
        assert ended
        assert numbers[0] == 0
        assert len(numbers) < count // 2
        assert numbers == sorted(numbers)
        assert not listener.paused
        assert not listener.lost


def _answers(data: bytearray) -> tuple[bool, list[int]]:
    """Return whether a client's frames have "end", and the numbers in its pongs."""
    numbers, at, ended = [], 0, False
    while at + 6 <= len(data):
        size = data[at + 1] & 0x7F
        key, masked = bytes(data[at + 2 : at + 6]) * 32, data[at + 6 : at + 6 + size]
        payload = bytes(a ^ b for a, b in zip(masked, key, strict=False))
        if len(payload) == size:
            ended |= payload == b"end"
            if data[at] == 0x8A:
                numbers.append(int.from_bytes(payload, "big"))
        at += 6 + size
    return ended, numbers
