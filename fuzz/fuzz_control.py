"""Fuzz the control protocol: what a client and a session receive, and a session with clients that send damaged streams.

RemoteProtocolError is expected. Any other exception is a bug. A stream without damage must be decoded completely,
however it is cut. Each read of a file that a client offers is done once. After a damaged stream the session must serve
other clients, and no request may remain pending.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from typing import Any

from farplug.app.app import App
from farplug.control import names
from farplug.control.client import Client
from farplug.control.messages import (
    MAX_CLIENT_PAYLOAD,
    MAX_LINE,
    MAX_PAYLOAD,
    ErrorData,
    Failure,
    Hello,
    Message,
    Notification,
    Receiver,
    Reply,
    Request,
    encode,
    parse_reply,
    parse_request,
)
from farplug.control.methods import METHODS
from farplug.control.server import Server
from farplug.errors import FarplugError, Reason, Remedy, RemoteProtocolError, UsageError
from farplug.store.remote import CHUNK, MAX_ASKED, ChunkCache, RemoteFile
from farplug.usb.types import Buffer
from harness import check, run

WORDS = (
    *METHODS,
    *("path", "sources", "kind", "disk", "device", "events", "guest", "protocol_version", "1.0", "note", "ok", "id"),
    *("bytes", "display", "serial", "file", "size", "media", "read", "m1", "take", "code", "down", "text"),
)
HELLO = encode(Request(0, "hello", {"protocol_version": "1.0"}))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return a value of JSON's types."""
    match rng.randrange(8 if depth < 4 else 6):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice((0, 1, -1, 1 << 53, 10**30, rng.getrandbits(64)))
        case 3:
            return rng.choice((0.5, 1e308, -0.0))
        case 4:
            return rng.choice(WORDS)
        case 5:
            return rng.choice(("", "\0", "\ud800", "\x1b[2J", "é" * rng.randrange(100), "x" * rng.randrange(9000)))
        case 6:
            return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def fields(rng: random.Random) -> dict[str, Any]:
    return {rng.choice(WORDS): value(rng) for _ in range(rng.randrange(4))}


def damage(rng: random.Random, data: bytes) -> bytes:
    """Return the data with some bytes changed, removed or added; or unchanged."""
    damaged = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        at = rng.randrange(len(damaged) + 1)
        match rng.randrange(4):
            case 0:
                damaged[at : at + 1] = rng.randbytes(1)
            case 1:
                del damaged[at : at + rng.randrange(20)]
            case 2:
                nested = rng.choice((b"[", b'{"a":')) * rng.choice((1, 10_000))
                damaged[at:at] = rng.choice((rng.randbytes(rng.randrange(20)), b"\n", b"NaN", b"1e999", nested))
            case _:
                damaged[at:at] = rng.choice((b"9", b" ", b"x")) * rng.choice((1, 5000, MAX_LINE))
    return bytes(damaged)


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    step = rng.choice((1, 7, 100, 1 << 16)) if len(data) < 10_000 else 1 << 16
    return [data[at : at + step] for at in range(0, len(data), step)]


def payload(rng: random.Random) -> bytes | None:
    return rng.choice((None, None, b"", rng.randbytes(rng.randrange(2000)), bytes(MAX_CLIENT_PAYLOAD)))


def receive(rng: random.Random, receiver: Receiver[Any], data: bytes) -> list[Message]:
    messages = []
    for piece in pieces(rng, data):
        receiver.receive_data(piece)
        while (message := receiver.next_message()) is not None:
            messages.append(message)
        assert len(receiver._buffer) <= MAX_LINE + MAX_PAYLOAD + len(piece)
    receiver.receive_eof()
    return messages


def fuzz_requests(rng: random.Random) -> None:
    sent = [
        Request(rng.choice((1, -5, "é")), rng.choice(WORDS), fields(rng), payload(rng)) for _ in range(rng.randrange(6))
    ]
    stream = b"".join(map(encode, sent))
    damaged = damage(rng, stream)
    try:
        received = receive(rng, Receiver(parse_request, MAX_CLIENT_PAYLOAD), damaged)
    except RemoteProtocolError as refused:
        check(damaged != stream)
        check(len(str(refused)) < 500 and str(refused).isprintable())
    else:
        assert damaged != stream or received == sent


def fuzz_replies(rng: random.Random) -> None:
    remedy = Remedy(rng.choice(WORDS), setting="x", value=rng.choice((None, 1, "y")), alternative=Remedy("z"))
    error = UsageError(rng.choice(WORDS), reason=rng.choice(list(Reason)), remedy=remedy)
    choices: tuple[Message, ...] = (
        Reply(1, value(rng)),
        Reply("a", Hello("a", "b", 1, 2.0, None, "c", "1.0", METHODS, ()).to_json()),
        Failure(rng.choice((None, 1)), ErrorData.of(error)),
        Notification("note", fields(rng)),
        Notification("screen", fields(rng), payload(rng)),
        Reply(2, value(rng), payload(rng)),
    )
    sent = [rng.choice(choices) for _ in range(rng.randrange(6))]
    stream = b"".join(map(encode, sent))
    damaged = damage(rng, stream)
    try:
        received = receive(rng, Receiver(parse_reply, MAX_PAYLOAD), damaged)
    except RemoteProtocolError as refused:
        check(damaged != stream and str(refused).isprintable())
        return
    assert damaged != stream or received == sent
    for message in received:
        if isinstance(message, Failure):
            assert str(message.error.error()).isprintable()
        if isinstance(message, Reply):
            try:
                Hello.parse(message.result)
            except RemoteProtocolError as refused:
                check(str(refused).isprintable())


async def session(rng: random.Random, folder: str) -> None:
    app = App()
    server = Server(app, names.reserve("fuzz", environment={"XDG_RUNTIME_DIR": folder}), target="x")
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    await server.start()
    async with asyncio.timeout(60), Client.connect(server.path) as other:
        for _ in range(rng.randrange(1, 6)):
            requests = [
                Request(number, rng.choice(WORDS), fields(rng), payload(rng)) for number in range(1, rng.randrange(30))
            ]
            stream = HELLO + damage(rng, b"".join(map(encode, requests)))
            reader, writer = await asyncio.open_unix_connection(server.path, limit=2 * MAX_LINE)
            try:
                for piece in pieces(rng, stream):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                    if rng.random() < 0.1:
                        app.events.publish("note", "x" * rng.randrange(3000))
                if rng.random() < 0.7:
                    writer.write_eof()
                    while line := await reader.readline():
                        message = json.loads(line)
                        assert message.get("ok") is not None or "event" in message
                        if message.get("ok") is False:
                            assert message["error"]["code"] != "internal-error", message
            except ConnectionError:
                pass  # the session refused the stream, and did not read the rest
            finally:
                writer.transport.abort()
            assert "guests" in await other.call("status")
    await server.close()
    assert not server._requests
    assert not server._clients
    assert not failures, failures


def fuzz_session(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="farplug-", dir="/tmp") as folder:
        try:
            asyncio.run(session(rng, folder))
        except FarplugError as error:
            raise AssertionError from error


async def remote_file(rng: random.Random) -> None:
    """Read a file of a client that answers as it likes: each read is done once, with the right bytes or an error."""
    content = rng.randbytes(rng.randrange(1, 5 * CHUNK))
    asked: list[tuple[int, int, int]] = []
    file = RemoteFile("x", len(content), "", lambda *question: asked.append(question), ChunkCache(rng.randrange(1, 5)))
    reads: list[tuple[int, int, list[bytes | OSError]]] = []
    for _ in range(rng.randrange(60)):
        if rng.random() < 0.5:
            offset = rng.randrange(len(content))
            length = rng.randrange(1, min(3 * CHUNK, len(content) - offset) + 1)
            results: list[bytes | OSError] = []

            def done(data: Buffer, error: OSError | None, results: list[bytes | OSError] = results) -> None:
                results.append(bytes(data) if error is None else error)

            file.read(offset, length, done)
            reads.append((offset, length, results))
        elif asked:
            question, offset, length = asked[-1 - rng.randrange(min(6, len(asked)))]
            data, error = (
                rng.choice(
                    ((content[offset : offset + length],) * 5 + (b"", content[: length + 1])) if length else (b"",)
                ),
                rng.choice((None,) * 9 + ("it has changed",)),
            )
            try:
                file.answer(question + rng.choice((0,) * 9 + (1, -1, 99)), data, error)
            except ValueError as refused:
                check(str(refused).isprintable())
        check(len(file._asked) <= MAX_ASKED)
        if rng.random() < 0.02:
            file.close()
    file.close()
    for _, length, results in reads:
        (result,) = results
        check(isinstance(result, OSError) or len(result) == length)
    check(not file._timers and not file._waiting)


def fuzz_remote_file(rng: random.Random) -> None:
    asyncio.run(remote_file(rng))


def one_case(rng: random.Random) -> None:
    fuzzers = (fuzz_requests, fuzz_requests, fuzz_replies, fuzz_replies, fuzz_session, fuzz_remote_file)
    rng.choice(fuzzers)(rng)


if __name__ == "__main__":
    run("control", one_case)
