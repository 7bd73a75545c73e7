"""Ends on this machine: terminals, sockets, files, and their peers."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from farplug.ends import SERIAL_ENDS, parse_serial_end
from farplug.ends.base import End
from farplug.ends.client import ClientEnd
from farplug.ends.file import FileEnd
from farplug.ends.pty import PtyEnd
from farplug.ends.sockets import TcpEnd, TcpListenEnd, UnixEnd, UnixListenEnd
from farplug.ends.stdio import StdioEnd
from farplug.errors import DeviceError, Reason, UsageError

TIMEOUT = 100


@asynccontextmanager
async def opened(text: str) -> AsyncIterator[End]:
    end = parse_serial_end(text)
    await end.open()
    try:
        async with asyncio.timeout(TIMEOUT):
            yield end
    finally:
        await end.close()


async def until(end: End, connected: bool) -> None:
    while (end.peer is not None) is not connected:
        await end.changed()


async def received(end: End, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += b"".join(await end.read())
    return bytes(data)


# Addresses


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("pty", PtyEnd),
        ("pty:/tmp/vm1", PtyEnd),
        ("-", StdioEnd),
        ("tcp://localhost:4000", TcpEnd),
        ("tcp://[::1]:4000", TcpEnd),
        ("tcp-listen://:0", TcpListenEnd),
        ("tcp-listen://0.0.0.0:4000", TcpListenEnd),
        ("unix:/run/x", UnixEnd),
        ("unix:x", UnixEnd),
        ("unix-listen:/run/x", UnixListenEnd),
        ("file:log", FileEnd),
        ("client", ClientEnd),
    ],
)
def test_addresses(text: str, kind: type) -> None:
    assert type(parse_serial_end(text)) is kind
    assert text.partition(":")[0] in SERIAL_ENDS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-x",
        "pty:",
        "serial",
        "client:",
        "/dev/ttyS0",
        "tcp:localhost:4000",
        "tcp://",
        "tcp://:4000",
        "tcp://localhost",
        "tcp://localhost:0",
        "tcp://localhost:65536",
        "tcp://user@localhost:1",
        "tcp://localhost:4000/x",
        "tcp-listen://localhost",
        "unix:",
        "unix:///",
        "unix:" + "x" * 200,
        "unix-listen:\0",
        "file:",
        "http://localhost:80",
    ],
)
def test_addresses_that_are_not_valid(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid end") as caught:
        parse_serial_end(text)
    assert caught.value.reason is Reason.BAD_OPTION


# Terminals


async def test_a_pty_carries_bytes_unchanged_and_notices_who_opens_it() -> None:
    everything = bytes(range(256)) * 8
    async with opened("pty") as end:
        assert end.peer is None
        assert not await end.write((b"no peer gets this",))
        for _ in range(2):
            terminal = os.open(end.address, os.O_RDWR | os.O_NOCTTY)
            await until(end, True)
            assert end.peer is not None
            assert end.peer.name == f"a program at {end.address}"
            assert await end.write((everything,))
            assert await asyncio.to_thread(read_all, terminal, len(everything)) == everything
            os.write(terminal, everything)
            assert await received(end, len(everything)) == everything
            reading = asyncio.ensure_future(end.read())
            os.close(terminal)
            await until(end, False)
            reading.cancel()
            await asyncio.wait([reading])


def read_all(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += os.read(descriptor, size - len(data))
    return bytes(data)


async def test_what_a_program_wrote_before_it_left_arrives() -> None:
    async with opened("pty") as end:
        subprocess.run(["sh", "-c", f"echo hello >{end.address}"], check=True)
        assert await received(end, 6) == b"hello\n"  # raw: the newline is not changed
        reading = asyncio.ensure_future(end.read())
        await until(end, False)
        reading.cancel()
        await asyncio.wait([reading])


async def test_a_terminal_that_is_not_read_makes_the_guest_wait_until_it_is_closed() -> None:
    async with opened("pty") as end:
        terminal = os.open(end.address, os.O_RDWR | os.O_NOCTTY)
        await until(end, True)
        writing = asyncio.ensure_future(end.write((bytes(1 << 20),)))
        _, waiting = await asyncio.wait([writing], timeout=0.3)
        assert waiting
        os.close(terminal)  # the guest reads nothing meanwhile
        assert not await writing
        assert end.peer is None


async def test_a_link_to_a_pty(tmp_path: Path) -> None:
    link = tmp_path / "vm1"
    link.symlink_to("/dev/pts/999")  # left over
    async with opened(f"pty:{link}") as end:
        assert end.address == str(link)
        terminal = os.open(link, os.O_RDWR | os.O_NOCTTY)
        await until(end, True)
        os.close(terminal)
    assert not link.is_symlink()
    assert list(tmp_path.iterdir()) == []
    async with opened(f"pty:{link}"):
        link.unlink()
        link.symlink_to("/elsewhere")
    assert link.is_symlink()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
async def test_a_link_replaces_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "vm1"
    match kind:
        case "file":
            path.write_text("precious")
        case "link":
            path.symlink_to("/etc/passwd")
        case "folder":
            path.mkdir()
    with pytest.raises(DeviceError, match="is not a link to a pseudoterminal") as caught:
        await parse_serial_end(f"pty:{path}").open()
    assert caught.value.reason is Reason.EXISTS
    with pytest.raises(DeviceError, match="cannot be made a link: no such file") as caught:
        await parse_serial_end(f"pty:{tmp_path}/missing/vm1").open()
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("path", ["x" * 300, "loop/vm1"])
async def test_a_link_that_cannot_be_made(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DeviceError, match="cannot be made a link") as caught:
        await parse_serial_end(f"pty:{tmp_path}/{path}").open()
    assert caught.value.remedy


STDIO = """
import asyncio, os, sys
from farplug.ends import parse_serial_end
async def main():
    end = parse_serial_end("-")
    await end.open()
    os.write(2, b"open\\n")
    try:
        while True:
            data = b"".join(await end.read())
            await end.write((data.upper(),))
    finally:
        await end.close()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    os.write(2, b"interrupted\\n")
"""


async def test_standard_input_and_output_of_a_pipe() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STDIO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT):
        process.stdin.write(b"hello\x1d\x03\n")
        assert await process.stdout.readexactly(8) == b"HELLO\x1d\x03\n"
        process.stdin.close()  # does not end the output
        process.send_signal(signal.SIGINT)
        await process.wait()
    assert process.returncode == 0


async def test_standard_input_and_output_of_a_terminal() -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    session = "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", session + STDIO, stdin=slave, stdout=slave, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    async with asyncio.timeout(TIMEOUT):
        assert await process.stderr.readline() == b"open\n"
        while termios.tcgetattr(slave)[3] & termios.ICANON:
            await asyncio.sleep(0.01)
        os.write(master, b"a\x03\x1a\x1c\r\n")  # Ctrl-C, Ctrl-Z and Ctrl-\\ are the guest's
        assert await asyncio.to_thread(read_all, master, 6) == b"A\x03\x1a\x1c\r\n"
        os.write(master, b"\x1d")
        assert await process.stderr.readline() == b"interrupted\n"
        await process.wait()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


# Sockets


async def test_one_peer_at_a_time() -> None:
    async with opened("tcp-listen://127.0.0.1:0") as end:
        port = int(end.address.rpartition(":")[2])
        changes: list[str] = []
        end.on_change = changes.append
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await until(end, True)
        second, its_writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionResetError):
            assert await second.read() == b""
        its_writer.close()
        writer.write(b"the first one")
        assert await received(end, 13) == b"the first one"
        assert await end.write((b"an ", b"answer"))
        assert await reader.readexactly(9) == b"an answer"
        writer.close()
        reading = asyncio.ensure_future(end.read())
        await until(end, False)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"another one")
        assert await reading == (b"another one",)
        writer.close()
        assert len(changes) == 3
        assert changes[0].startswith("127.0.0.1:")
        assert changes[1].endswith(" is not connected any more")


async def test_a_peer_that_left_unnoticed_does_not_keep_others_out(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with opened(f"unix-listen:{path}") as end:
        assert path.stat().st_mode & 0o777 == 0o600
        _, writer = await asyncio.open_unix_connection(path)
        await until(end, True)
        writer.close()  # while the guest reads nothing
        await writer.wait_closed()
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"hello")
        while await end.read() != (b"hello",):
            pass
        writer.close()
    assert not path.exists()


async def test_a_peer_that_reads_nothing_makes_the_guest_wait(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with opened(f"unix-listen:{path}") as end:
        reader, writer = await asyncio.open_unix_connection(path)
        await until(end, True)
        sent = 0

        async def write() -> None:
            nonlocal sent
            while await end.write((bytes(10_000),)):
                sent += 10_000

        writing = asyncio.ensure_future(write())
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 2 << 20
        got, stalled = 0, sent
        while got <= stalled:
            got += len(await reader.read(1 << 20))
        writer.transport.abort()
        await writing


async def test_a_socket_that_a_program_listens_on_is_connected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farplug.ends.sockets.RETRY_INTERVAL", 0.01)
    path = tmp_path / "socket"
    arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda *streams: arrived.put_nowait(streams), path)
    async with opened(f"unix:{path}") as end:
        _, writer = await arrived.get()
        writer.write(b"hello")
        assert await end.read() == (b"hello",)
        reading = asyncio.ensure_future(end.read())
        server.close()
        path.unlink()
        writer.close()
        await until(end, False)
        await asyncio.sleep(0.05)
        assert not await end.write((b"lost",))
        server = await asyncio.start_unix_server(lambda *streams: arrived.put_nowait(streams), path)
        reader, writer = await arrived.get()
        writer.write(b"back")
        assert await reading == (b"back",)
        assert await end.write((b"welcome",))
        assert await reader.readexactly(7) == b"welcome"
        writer.close()
    server.close()


def _nothing(path: Path) -> None:
    """Leave the path free."""


def _left_over(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def _a_file(path: Path) -> None:
    path.write_text("precious")


@pytest.mark.parametrize(
    ("scheme", "prepare", "reason"),
    [
        ("unix", _nothing, Reason.NOT_FOUND),
        ("unix", _left_over, Reason.CONNECTION_REFUSED),
        ("unix", _a_file, Reason.CONNECTION_REFUSED),
        ("unix-listen", _a_file, Reason.EXISTS),
    ],
)
async def test_unix_sockets_that_cannot_be_used(
    tmp_path: Path, scheme: str, prepare: Callable[[Path], None], reason: Reason
) -> None:
    prepare(tmp_path / "socket")
    with pytest.raises(DeviceError, match="cannot be") as caught:
        await parse_serial_end(f"{scheme}:{tmp_path}/socket").open()
    assert caught.value.reason is reason
    assert caught.value.remedy


async def test_a_socket_without_a_listener_is_replaced(tmp_path: Path) -> None:
    _left_over(tmp_path / "socket")
    async with opened(f"unix-listen:{tmp_path}/socket"):
        with pytest.raises(DeviceError, match="address already in use") as caught:
            await parse_serial_end(f"unix-listen:{tmp_path}/socket").open()
        assert caught.value.reason is Reason.IN_USE


async def test_tcp_ports_that_cannot_be_used() -> None:
    async with opened("tcp-listen://127.0.0.1:0") as end:
        with pytest.raises(DeviceError, match="cannot be listened on: address already in use") as caught:
            await parse_serial_end(end.address).open()
        assert caught.value.reason is Reason.IN_USE
        address = end.address.replace("tcp-listen", "tcp")
    with pytest.raises(DeviceError, match="cannot be reached") as caught:
        await parse_serial_end(address).open()
    assert caught.value.reason is Reason.CONNECTION_REFUSED


@pytest.mark.parametrize("scheme", ["tcp", "tcp-listen"])
@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 64, "\udc80.example"])
async def test_host_names_that_cannot_be_resolved(scheme: str, host: str) -> None:
    with pytest.raises(DeviceError, match="the name cannot be resolved") as caught:
        await parse_serial_end(f"{scheme}://{host}:4000").open()
    assert caught.value.reason is Reason.UNRESOLVABLE


# Files


async def test_a_file_gets_what_the_guest_sends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for text in (b"one\n", b"two\n"):
        async with opened(f"file:{path}") as end:
            assert await end.write((text[:1], text[1:]))
    assert path.read_bytes() == b"one\ntwo\n"


async def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, Reason.NOT_A_FILE),
        (tmp_path / "pipe", Reason.NOT_A_FILE),
        (Path("/dev/null"), Reason.NOT_A_FILE),
        (tmp_path / "missing" / "log", Reason.NOT_FOUND),
    ):
        with pytest.raises(DeviceError) as caught:
            await parse_serial_end(f"file:{path}").open()
        assert caught.value.reason is reason
