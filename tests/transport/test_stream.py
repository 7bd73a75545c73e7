from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

import pytest
from tests.transport.fake_spice import Recorder, free_port

from farplug.errors import FarplugError, GuestGoneError, InternalError, Reason, StateError, TargetError
from farplug.exit_codes import exit_code
from farplug.transport import connection
from farplug.transport.connection import TcpAddress, Timeouts, UnixAddress
from farplug.transport.stream import HELLO_SIZE, ListenPort, StreamPort


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_stream_port(family: str, tmp_path: Path) -> None:
    guests: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    hello = b"hello".ljust(HELLO_SIZE, b".")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guests.put_nowait((reader, writer))

    if family == "unix":
        server = await asyncio.start_unix_server(accept, tmp_path / "s")
        port = StreamPort(UnixAddress(str(tmp_path / "s")))
    else:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = StreamPort(TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1]))
    assert port.name == family
    assert str(port) == str(port.address)
    port.write([b"dropped: not open"])
    await port.close()
    port.abort()

    for end in ("close", "abort", "guest"):  # and open again after each
        recorder = Recorder()
        await port.open(recorder)
        with pytest.raises(StateError, match="open already"):
            await port.open(Recorder())
        reader, writer = await guests.get()
        writer.write(hello)
        await recorder.until(lambda recorder=recorder: bytes(recorder.data) == hello)  # type: ignore[misc]
        payload = os.urandom(1 << 20)
        port.write([b"head", payload])
        assert await reader.readexactly(4 + len(payload)) == b"head" + payload
        port.pause_reading()
        writer.write(b"!")
        await asyncio.sleep(0.02)
        assert bytes(recorder.data) == hello
        port.resume_reading()
        await recorder.until(lambda recorder=recorder: bytes(recorder.data) == hello + b"!")  # type: ignore[misc]
        if end == "guest":
            writer.close()
        elif end == "abort":
            port.abort()
        else:
            await port.close()
            assert recorder.closed == [None]
        await recorder.until(lambda recorder=recorder: bool(recorder.closed))  # type: ignore[misc]
        if end == "guest":
            (error,) = recorder.closed
            assert isinstance(error, GuestGoneError)
            assert str(error) == f"the guest at {port} closed the connection"
        else:
            assert recorder.closed == [None]
        writer.close()
    server.close()


@pytest.mark.parametrize(
    ("sent", "kind", "code", "text"),
    [
        (
            b"",
            TargetError,
            4,
            "the peer at {} broke the connection: Connection reset by peer: it sent no usbredir hello",
        ),
        (
            bytes(7),
            TargetError,
            4,
            "the peer at {} broke the connection: Connection reset by peer: it sent no usbredir",
        ),
        (bytes(HELLO_SIZE), GuestGoneError, 9, "the guest at {} broke the connection: Connection reset by peer"),
    ],
)
async def test_errors_of_broken_connections(sent: bytes, kind: type[FarplugError], code: int, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = StreamPort(TcpAddress("127.0.0.1", server.getsockname()[1]))
        recorder = Recorder()
        await port.open(recorder)
        guest, _ = server.accept()
        guest.sendall(sent)
        await recorder.until(lambda: bytes(recorder.data) == sent)
        # a reset instead of an end of stream
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        guest.close()
        await recorder.until(lambda: bool(recorder.closed))
    (error,) = recorder.closed
    assert isinstance(error, kind)
    assert str(error).startswith(text.format(port))
    assert exit_code(error) == code
    assert ("spice+tls://HOST:PORT" in error.remedy) is (code == 4)


async def test_an_exception_of_the_listener_is_an_internal_error() -> None:
    class Broken(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            raise AttributeError("no such thing\nat all")

    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = StreamPort(TcpAddress("127.0.0.1", server.getsockname()[1]))
        recorder = Broken()
        await port.open(recorder)
        guest, _ = server.accept()
        with guest:
            guest.sendall(b"hello")
            await recorder.until(lambda: bool(recorder.closed))
    (error,) = recorder.closed
    assert isinstance(error, InternalError)
    assert str(error) == "internal error: AttributeError: no such thing"
    assert isinstance(error.__cause__, AttributeError)
    assert exit_code(error) == 1
    assert not failures, "asyncio does not report it as well"


async def test_refused_port_can_be_opened_later() -> None:
    number = free_port()
    port = StreamPort(TcpAddress("127.0.0.1", number))
    with pytest.raises(TargetError) as caught:
        await port.open(Recorder())
    assert caught.value.reason is Reason.CONNECTION_REFUSED
    with socket.create_server(("127.0.0.1", number)):
        await port.open(Recorder())
        port.abort()
        await asyncio.sleep(0)


async def test_close_of_a_paused_guest_is_bounded() -> None:
    """The VM is paused: QEMU reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = TcpAddress("127.0.0.1", server.getsockname()[1])
        port = StreamPort(address, timeouts=Timeouts(flush=0.1))
        recorder = Recorder()
        await port.open(recorder)
        port.write([bytes(32 << 20)])
        assert recorder.pauses == 1
        async with asyncio.timeout(100):
            await port.close()
        assert recorder.closed == [None]


async def test_opening_can_be_cancelled_at_any_time(tmp_path: Path) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(100)
        port = StreamPort(UnixAddress(path))
        given_up = 0
        for steps in range(12):
            recorder = Recorder()
            opening = asyncio.create_task(port.open(recorder))
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            given_up += isinstance((await asyncio.gather(opening, return_exceptions=True))[0], asyncio.CancelledError)
            await port.close()
            await asyncio.sleep(0)
            assert recorder.closed in ([], [None])
        recorder = Recorder()
        await port.open(recorder)
        await port.close()
        assert recorder.closed == [None]
    assert given_up
    assert not failures


async def test_listen_port() -> None:
    listening: asyncio.Queue[TcpAddress] = asyncio.Queue()
    port = ListenPort(TcpAddress("127.0.0.1", 0), on_listening=listening.put_nowait)
    ports = set()
    for _ in range(2):
        recorder = Recorder()
        opening = asyncio.create_task(port.open(recorder))
        number = (await listening.get()).port
        ports.add(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", number)
        await opening
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", number)
        writer.write(b"hello")
        await recorder.until(lambda recorder=recorder: bytes(recorder.data) == b"hello")  # type: ignore[misc]
        port.write([b"answer"])
        assert await reader.readexactly(6) == b"answer"
        writer.close()
        await recorder.until(lambda recorder=recorder: bool(recorder.closed))  # type: ignore[misc]
        assert isinstance(recorder.closed[0], TargetError), "no hello came"
    assert len(ports) == 1


async def test_listen_port_can_be_cancelled() -> None:
    number = free_port()
    port = ListenPort(TcpAddress("127.0.0.1", number))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await port.open(Recorder())
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", number)


async def test_accept_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(sock: socket.socket) -> None:
        raise OSError(24, "Too many open files")

    port = ListenPort(TcpAddress("127.0.0.1", 0))
    monkeypatch.setattr(asyncio.get_running_loop(), "sock_accept", fails)
    with pytest.raises(TargetError, match=r"cannot accept a connection on 127\.0\.0\.1:\d+: Too many open files"):
        await port.open(Recorder())
    monkeypatch.undo()


async def test_sent_bytes_survive_a_close_with_unread_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel resets a socket that is closed with unread bytes, and the peer loses what it has not read."""
    monkeypatch.setattr(connection, "CLOSE_LINGER", 60)
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = StreamPort(TcpAddress("127.0.0.1", server.getsockname()[1]))
        recorder = Recorder()
        await port.open(recorder)
        guest, _ = server.accept()
        with guest:
            guest.setblocking(False)
            port.write([bytes(1 << 20)])
            closing = asyncio.create_task(port.close())
            for _ in range(3):
                guest.send(b"x" * 100)
                await asyncio.sleep(0.01)
            received = 0
            while data := await loop.sock_recv(guest, 1 << 20):
                received += len(data)
            guest.close()
            async with asyncio.timeout(100):  # the guest has closed: no need to linger
                await closing
    assert received == 1 << 20
    assert recorder.closed == [None]
    assert not recorder.data, "nothing is delivered after close()"


async def test_listen_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*args: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "")

    monkeypatch.setattr("farplug.transport.stream.socket.socket", no_socket)
    with pytest.raises(TargetError, match=r"cannot listen on \[::1\]:4000: Address family not supported"):
        await ListenPort(TcpAddress("::1", 4000)).open(Recorder())


@pytest.mark.parametrize("host", ["fe80::1", "fe80::1%no"])
async def test_listen_on_an_address_without_its_interface(host: str) -> None:
    with pytest.raises(TargetError, match="network interface") as caught:
        await ListenPort(TcpAddress(host, 0)).open(Recorder())
    assert caught.value.remedy


async def test_listen_on_an_invalid_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(TargetError, match=f"cannot listen on 127.0.0.1:{number}: Address already in use"):
            await ListenPort(TcpAddress("127.0.0.1", number)).open(Recorder())
    with pytest.raises(TargetError, match="cannot be resolved") as caught:
        await ListenPort(TcpAddress("no-such-host.invalid", 0)).open(Recorder())
    assert caught.value.reason is Reason.UNRESOLVABLE
