from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import pytest

from farplug.errors import GuestGoneError, RemoteProtocolError
from farplug.vm.agent import MAX_OUTPUT, Agent, CommandFailed, CommandResult, GuestTimeout, parse_reply


class Peer:
    """The guest's end of the channels."""

    def __init__(self, channels: int) -> None:
        self.agent = Agent()
        self._pairs = [socket.socketpair() for _ in range(channels)]
        self.streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Peer:
        await self.agent.connect([ours for ours, _ in self._pairs])
        self.streams = [await asyncio.open_connection(sock=theirs) for _, theirs in self._pairs]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agent.close()
        for index in range(len(self.streams)):
            await self.close(index)

    async def request(self, index: int = 0) -> tuple[int, bytes, bytes]:
        reader = self.streams[index][0]
        number, lines, input_size = map(int, (await reader.readline()).split())
        script = b"".join([await reader.readline() for _ in range(lines)])
        return number, script.removesuffix(b"\n"), await reader.readexactly(input_size)

    def reply(self, data: bytes, index: int = 0) -> None:
        self.streams[index][1].write(data)

    async def close(self, index: int = 0) -> None:
        self.streams[index][1].close()
        await self.streams[index][1].wait_closed()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer(1) as peer:
        yield peer


async def test_command_and_reply(peer: Peer) -> None:
    running = asyncio.create_task(peer.agent.run("cat\nexit 3", stdin=b"\0\n"))
    assert await peer.request() == (1, b"cat\nexit 3", b"\0\n")
    peer.reply(b"1 3 4\n\0\n\xffx")
    result = await running
    assert result == CommandResult(3, b"\0\n\xffx")
    assert result.output == "\0\n�x"
    assert "exit code 3" in str(CommandFailed("cat", result))


async def test_late_reply_frees_the_channel(peer: Peer) -> None:
    with pytest.raises(GuestTimeout, match=r"'first' did not end within 0.05 s \(1 of 8 channels busy\)"):
        await peer.agent.run("first", timeout=0.05)
    with pytest.raises(GuestTimeout, match="'second' did not end"):
        await peer.agent.run("second", timeout=0.05)
    assert (await peer.request())[:2] == (1, b"first")
    peer.reply(b"1 0 4\nlate")
    running = asyncio.create_task(peer.agent.run("third"))
    number, script, _ = await peer.request()
    assert script == b"third"
    peer.reply(f"{number} 0 2\nok".encode())
    assert (await running).output == "ok"


async def test_cancelled_caller_leaves_the_channel_usable(peer: Peer) -> None:
    running = asyncio.create_task(peer.agent.run("first"))
    await peer.request()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    peer.reply(b"1 0 0\n")
    running = asyncio.create_task(peer.agent.run("second"))
    assert (await peer.request())[:2] == (2, b"second")
    peer.reply(b"2 0 0\n")
    assert (await running).exit_code == 0


async def test_guest_that_ends_fails_commands_at_once(peer: Peer) -> None:
    running = asyncio.create_task(peer.agent.run("x"))
    await peer.request()
    peer.reply(b"1 0 10\nhalf")
    await peer.close()
    started = time.monotonic()
    for command in (running, peer.agent.run("y")):
        with pytest.raises(GuestGoneError, match="the guest ended during a command"):
            await command
    assert time.monotonic() - started < 5


async def test_channel_is_not_used_again_after_a_protocol_error() -> None:
    async with Peer(2) as peer:
        running = asyncio.create_task(peer.agent.run("x"))
        await peer.request(0)
        peer.reply(b"9 0 0\n")
        with pytest.raises(RemoteProtocolError, match="replied to request 9, not 1"):
            await running
        for _ in range(2):
            running = asyncio.create_task(peer.agent.run("y"))
            number, *_ = await peer.request(1)
            peer.reply(f"{number} 0 0\n".encode(), 1)
            await running


async def test_endless_line_is_refused(peer: Peer) -> None:
    running = asyncio.create_task(peer.agent.run("x"))
    peer.reply(b"1" * (1 << 17))
    with pytest.raises(RemoteProtocolError, match="is not a line"):
        await running


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "invalid reply"),
        (b"1 0\n", "invalid reply"),
        (b"1 0 0 0\n", "invalid reply"),
        (b"1 x 0\n", "invalid reply"),
        (b"2 0 0\n", "replied to request 2, not 1"),
        (b"1 0 -1\n", f"-1 bytes exceeds the limit of {MAX_OUTPUT}"),
        (f"1 0 {MAX_OUTPUT + 1}\n".encode(), f"{MAX_OUTPUT + 1} bytes exceeds the limit"),
    ],
)
def test_bad_replies_are_refused(line: bytes, message: str) -> None:
    assert parse_reply(b"1 0 5\n", 1) == (0, 5)
    with pytest.raises(RemoteProtocolError, match=message):
        parse_reply(line, 1)
