from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.transport.fake_spice import Recorder, free_port

from farplug.errors import InternalError, Reason, TargetError
from farplug.transport.connection import (
    HIGH_WATER,
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE,
    KEEPALIVE_INTERVAL,
    RECEIVE_BUFFER,
    SEND_BUFFER,
    Address,
    Connection,
    TcpAddress,
    UnixAddress,
    dial,
    start,
    zone_fault,
)
from farplug.usb.types import Buffer


async def connected(recorder: Recorder, lost: list[Exception | None]) -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    connection = Connection(recorder, lost.append)
    await start(ours, connection, tls=None, server_hostname="", timeout=100)
    return connection, theirs


async def receive(sock: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = await asyncio.get_running_loop().sock_recv(sock, 1 << 20)
        if not data:
            break
        received += data
    return bytes(received)


@pytest.mark.parametrize(
    "sizes",
    [[1], [16, 0, 1], [6, 64, 1 << 20], [1 << 20] * 3, [100] * 2000, [70_000, 5, 70_000, 5], [300_000, 16_383, 16_384]],
)
async def test_everything_arrives_in_order(sizes: list[int]) -> None:
    recorder = Recorder()
    lost: list[Exception | None] = []
    connection, theirs = await connected(recorder, lost)
    buffers: list[Buffer] = [os.urandom(size) for size in sizes]
    with theirs:
        connection.write(buffers)
        assert await receive(theirs, sum(sizes)) == b"".join(buffers)
        await asyncio.get_running_loop().sock_sendall(theirs, b"answer")
        await recorder.until(lambda: bytes(recorder.data) == b"answer")
        await connection.close(1)
    assert lost == [None]


async def test_writer_is_paused_and_asyncio_holds_one_chunk() -> None:
    recorder = Recorder()
    connection, theirs = await connected(recorder, [])
    with theirs:
        connection.write([bytes(HIGH_WATER + 4 * SEND_BUFFER)])
        assert (recorder.pauses, recorder.resumes) == (1, 0)
        connection.write([b"more"])
        assert recorder.pauses == 1
        transport: Any = connection._transport
        assert transport.get_write_buffer_size() <= 256 << 10
        assert len(await receive(theirs, HIGH_WATER + 4 * SEND_BUFFER + 4)) == HIGH_WATER + 4 * SEND_BUFFER + 4
        assert (recorder.pauses, recorder.resumes) == (1, 1)
        await connection.close(1)


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="only Linux has TCP_QUICKACK")
async def test_data_without_an_answer_is_acknowledged_at_once() -> None:
    """QEMU's small writes wait for our ACK (Nagle); an answer carries the ACK."""

    class Answering(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            super().data_received(data)
            if bytes(data) == b"question":
                connection.write([b"answer"])

    class Options:
        def __init__(self) -> None:
            self.set: list[tuple[int, int, int]] = []

        def setsockopt(self, *option: int) -> None:
            self.set.append(option)  # type: ignore[arg-type]

    options: Any = Options()
    recorder = Answering()
    connection, theirs = await connected(recorder, [])
    connection._quick_ack_socket = options
    with theirs:
        theirs.send(b"question")
        assert await receive(theirs, 6) == b"answer"
        assert options.set == []
        theirs.send(b"statement")
        await recorder.until(lambda: bytes(recorder.data) == b"questionstatement")
        assert options.set == [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)]
        await connection.close(1)


async def test_an_exception_of_the_reader_ends_the_connection_as_an_internal_error() -> None:
    class Broken(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            super().data_received(data)
            raise ZeroDivisionError

        def resume_writing(self) -> None:
            raise ZeroDivisionError

    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    for callback in ("data_received", "resume_writing"):
        recorder, lost = Broken(), list[Exception | None]()
        connection, theirs = await connected(recorder, lost)
        with theirs:
            if callback == "data_received":
                theirs.send(b"x")
            else:
                connection.write([bytes(HIGH_WATER + 4 * SEND_BUFFER)])
                await receive(theirs, HIGH_WATER + 3 * SEND_BUFFER)
            async with asyncio.timeout(100):
                while not lost:
                    await asyncio.sleep(0.01)
        (error,) = lost
        assert isinstance(error, InternalError)
        assert isinstance(error.__cause__, ZeroDivisionError)
    assert not failures, "asyncio does not report it as well"


async def test_reading_can_be_paused() -> None:
    recorder = Recorder()
    connection, theirs = await connected(recorder, [])
    with theirs:
        connection.pause_reading()
        connection.pause_reading()
        theirs.send(b"early")
        await asyncio.sleep(0.05)
        assert not recorder.data
        connection.resume_reading()
        await recorder.until(lambda: bytes(recorder.data) == b"early")
        await connection.close(1)


async def test_connections_share_a_buffer_that_no_reader_keeps() -> None:
    """A reader that pauses keeps the bytes until it resumes."""

    class Keeping(Recorder):
        view = memoryview(b"")

        def data_received(self, data: memoryview, more: bool = False) -> None:
            super().data_received(data)
            self.view = data
            keeping.pause_reading()

    keeper, recorder = Keeping(), Recorder()
    keeping, to_keeping = await connected(keeper, [])
    other, to_other = await connected(recorder, [])
    with to_keeping, to_other:
        to_keeping.send(b"kept")
        await keeper.until(lambda: bytes(keeper.data) == b"kept")
        to_other.send(b"something else")
        await recorder.until(lambda: bytes(recorder.data) == b"something else")
        assert bytes(keeper.view) == b"kept"
        assert other._receive_buffer is None
        keeping.resume_reading()
        assert keeping._receive_buffer is None
        await keeping.close(1)
        await other.close(1)


async def test_reads_are_bounded_by_one_buffer() -> None:
    sizes: list[int] = []

    class Sizes(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            sizes.append(len(data))
            super().data_received(data)

    recorder = Sizes()
    connection, theirs = await connected(recorder, [])
    with theirs:
        await asyncio.get_running_loop().sock_sendall(theirs, bytes(2 << 20))
        await recorder.until(lambda: len(recorder.data) == 2 << 20)
        assert max(sizes) <= RECEIVE_BUFFER
        await connection.close(1)


async def test_close_flushes() -> None:
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    with theirs:
        payload = os.urandom(4 << 20)
        connection.write([payload])
        closing = asyncio.create_task(connection.close(10))
        await asyncio.sleep(0)
        connection.write([b"too late"])
        assert await receive(theirs, len(payload) + 1) == payload
        await closing
    assert lost == [None]
    await connection.close(1)


async def test_close_does_not_wait_forever() -> None:
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    with theirs:
        connection.write([bytes(4 << 20)])
        async with asyncio.timeout(100):
            await connection.close(0.05)
    assert lost == [None]


async def test_a_cancelled_close_closes_at_once() -> None:
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    with theirs:
        connection.write([bytes(4 << 20)])
        closing = asyncio.create_task(connection.close(10))
        await asyncio.sleep(0.02)
        assert not lost
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.sleep(0)
        assert lost == [None]


async def test_close_waits_a_little_for_a_peer_that_does_not_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.transport.connection.CLOSE_LINGER", 0.05)
    recorder = Recorder()
    lost: list[Exception | None] = []
    connection, theirs = await connected(recorder, lost)
    connection.pause_reading()
    with theirs:
        closing = asyncio.create_task(connection.close(10))
        assert await receive(theirs, 1) == b""
        theirs.send(b"dropped")
        assert not lost
        async with asyncio.timeout(100):
            await closing
    assert lost == [None]
    assert not recorder.data


async def test_a_peer_that_ends_its_stream_and_reads_nothing_ends_the_connection() -> None:
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    with theirs:
        connection.write([bytes(HIGH_WATER // 2)])
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(100):
            while not lost:
                await asyncio.sleep(0.01)
    assert lost == [None]
    assert not connection.closing


async def test_vanished_peers_are_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = await dial(TcpAddress("127.0.0.1", server.getsockname()[1]), 1)
        connection = Connection(Recorder(), lambda error: None)
        await start(sock, connection, tls=None, server_hostname="", timeout=100)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        found = [
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            if hasattr(socket, name)
        ]
        assert found == [KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT][: len(found)]
        connection.abort()
        await asyncio.sleep(0)


async def test_writing_to_a_dead_peer_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio logs every write to a transport after a write that broke it."""
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    theirs.close()
    connection.write([bytes(300 << 10) for _ in range(8)])
    await asyncio.sleep(0.01)
    assert len(lost) == 1
    assert not caplog.messages


async def test_abort() -> None:
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    with theirs:
        connection.write([bytes(4 << 20)])
        connection.abort()
        connection.write([b"nothing"])
        await connection.close(1)
        assert lost == [None]
        assert len(await receive(theirs, 4 << 20)) < 4 << 20


async def test_lost_while_writing() -> None:
    lost: list[Exception | None] = []
    connection, theirs = await connected(Recorder(), lost)
    connection.write([bytes(4 << 20)])
    theirs.close()
    await asyncio.sleep(0.05)
    assert len(lost) == 1
    assert not connection.closing
    connection.write([b"nothing"])


async def test_dial_tries_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        async def two(*args: Any, **kwargs: Any) -> list[Any]:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", free_port())),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
            ]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
        (await dial(TcpAddress("some.host", 1), 1)).close()


@pytest.mark.parametrize("first", [0, 1])
async def test_an_address_without_a_network_hides_no_other_error(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """A name with an IPv6 address, on a machine that has no IPv6."""
    refused = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", free_port()))
    nowhere = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 1, 0, 0))

    async def resolved(*args: Any, **kwargs: Any) -> list[Any]:
        return [refused, nowhere] if first == 0 else [nowhere, refused]

    async def connected(sock: socket.socket, address: Any) -> None:
        raise OSError(errno.ENETUNREACH, "") if len(address) == 4 else ConnectionRefusedError(errno.ECONNREFUSED, "")

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "getaddrinfo", resolved)
    monkeypatch.setattr(loop, "sock_connect", connected)
    with pytest.raises(TargetError, match="Connection refused") as caught:
        await dial(TcpAddress("vmhost", 5900), 5)
    assert caught.value.reason is Reason.CONNECTION_REFUSED


async def test_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = free_port()
    not_a_socket = tmp_path / "file"
    not_a_socket.touch()
    cases: list[tuple[Address, Reason, str]] = [
        (TcpAddress("127.0.0.1", refused), Reason.CONNECTION_REFUSED, f"127.0.0.1:{refused}: Connection refused"),
        (TcpAddress("no-such-host.invalid", 1), Reason.UNRESOLVABLE, "the name cannot be resolved"),
        (TcpAddress("x" * 70 + ".example", 1), Reason.UNRESOLVABLE, "the name cannot be resolved"),
        (
            TcpAddress("fe80::1", 1),
            Reason.UNRESOLVABLE,
            r"\[fe80::1\]:1: a link-local address needs a network interface",
        ),
        (TcpAddress("fe80::1%no", 1), Reason.UNRESOLVABLE, "this machine has no network interface 'no'"),
        (TcpAddress("fe80::1%99999", 1), Reason.UNRESOLVABLE, "this machine has no network interface '99999'"),
        (UnixAddress(str(tmp_path / "absent")), Reason.NOT_FOUND, "there is no such socket"),
        (UnixAddress(str(not_a_socket)), Reason.CONNECTION_REFUSED, "Connection refused"),
        (UnixAddress("/" + "x" * 200), Reason.UNREACHABLE, "AF_UNIX path too long"),
    ]
    for address, reason, expected_text in cases:
        with pytest.raises(TargetError, match=expected_text) as caught:
            await dial(address, 5)
        assert caught.value.reason is reason
        assert caught.value.remedy

    async def fails(sock: socket.socket, address: Any) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", fails)
    with pytest.raises(TargetError, match="Permission denied") as caught:
        await dial(UnixAddress("/run/x.sock"), 5)
    assert caught.value.reason is Reason.NO_PERMISSION
    assert "write permission" in caught.value.remedy


@pytest.mark.parametrize("host", ["vmhost", "192.0.2.1", "::1", "::1%1", "fe80::1%1", "a%b", "fe80::1%lo"])
def test_hosts_with_a_valid_zone(host: str) -> None:
    assert not zone_fault(host)


async def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(sock: socket.socket, address: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", hangs)
    with pytest.raises(TargetError, match=r"192\.0\.2\.1:5900: no answer within 0\.05 s") as caught:
        await dial(TcpAddress("192.0.2.1", 5900), 0.05)
    assert caught.value.reason is Reason.TIMED_OUT


def test_addresses_print() -> None:
    assert str(TcpAddress("::1", 5900)) == "[::1]:5900"
    assert str(TcpAddress("vmhost", 5900)) == "vmhost:5900"
    assert str(UnixAddress("/run/vm.sock")) == "/run/vm.sock"
