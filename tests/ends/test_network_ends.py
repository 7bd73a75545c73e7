"""Ends that carry frames: sockets, passt, TAP interfaces."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farplug.ends import NETWORK_ENDS, parse_network_end
from farplug.ends.base import End
from farplug.ends.frames import MAX_FRAME, FrameReader
from farplug.ends.passt import PasstEnd
from farplug.ends.sockets import TcpEnd, TcpListenEnd, UnixEnd, UnixListenEnd
from farplug.ends.tap import TapEnd
from farplug.errors import DeviceError, FarplugError, Reason, SetupError, UsageError
from farplug.programs import QEMU, find_program

TIMEOUT = 100
CLONE_NEWNET = 0x40000000
"""unshare(2): a network namespace."""
FRAMES = [bytes([number]) * (60 + number) for number in range(5)]

GUEST, BROADCAST = bytes.fromhex("02fa71000001"), b"\xff" * 6
DISCOVER = (
    bytes.fromhex("0101060011223344000080000000000000000000 0000000000000000".replace(" ", ""))
    + GUEST
    + bytes(10 + 64 + 128)
    + bytes.fromhex("63825363350101ff")
)
"""A message DHCPDISCOVER (RFC 2131)."""


@asynccontextmanager
async def opened(text: str) -> AsyncIterator[End]:
    end = parse_network_end(text)
    await end.open()
    try:
        async with asyncio.timeout(TIMEOUT):
            yield end
    finally:
        await end.close()


def on_wire(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("passt", PasstEnd),
        ("passt:", PasstEnd),
        ("passt:-t 2222:22", PasstEnd),
        ("unix:/run/gvproxy", UnixEnd),
        ("unix-listen:/run/x", UnixListenEnd),
        ("tcp://localhost:4000", TcpEnd),
        ("tcp-listen://:4000", TcpListenEnd),
        ("tap:tap0", TapEnd),
    ],
)
def test_addresses(text: str, kind: type) -> None:
    assert type(parse_network_end(text)) is kind
    assert text.partition(":")[0] in NETWORK_ENDS


@pytest.mark.parametrize(
    "text",
    ["", "pty", "-", "file:x", "slirp", "passt:'", "tap", "tap:", "tap:a/b", "tap:" + "x" * 16, "tap:tap%d", "unix:"],
)
def test_addresses_that_are_not_valid(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid end") as caught:
        parse_network_end(text)
    assert caught.value.reason is Reason.BAD_OPTION


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_a_stream_becomes_frames(step: int) -> None:
    source = random.Random(step)
    frames = [source.randbytes(source.choice((0, 14, 60, 1514, MAX_FRAME))) for _ in range(20)]
    stream = on_wire(*frames)
    reader = FrameReader()
    got = [frame for at in range(0, len(stream), step) for frame in reader.feed(stream[at : at + step])]
    assert got == frames


def test_a_frame_that_is_too_long() -> None:
    reader = FrameReader()
    assert reader.feed(on_wire(FRAMES[0])) == [FRAMES[0]]
    with pytest.raises(ValueError, match="a frame has 65537 bytes"):
        reader.feed(struct.pack(">I", MAX_FRAME + 1))


async def test_frames_over_a_socket(tmp_path: Path) -> None:
    async with opened(f"unix-listen:{tmp_path}/socket") as end:
        changes: list[str] = []
        end.on_change = changes.append
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(on_wire(*FRAMES))
        got: list[bytes] = []
        while len(got) < len(FRAMES):
            got += await end.read()
        assert got == FRAMES
        assert await end.write([memoryview(frame) for frame in FRAMES])
        assert await reader.readexactly(len(on_wire(*FRAMES))) == on_wire(*FRAMES)
        writer.write(b"GET / HTTP/1.1")  # a peer with another framing is disconnected
        reading = asyncio.ensure_future(end.read())
        assert await reader.read() == b""
        writer.close()
        assert changes[-1].endswith("a frame has 1195725856 bytes: the peer does not send 32-bit lengths and frames")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(on_wire(FRAMES[1]))
        assert await reading == [FRAMES[1]]
        writer.close()


async def test_a_queue_of_frames_for_a_guest_that_is_slower_than_its_peer(tmp_path: Path) -> None:
    """passt drops frames that its socket does not take: a window of TCP must fit."""
    sent = on_wire(bytes(1514)) * (3 * 2**20 // 1518)
    async with opened(f"unix-listen:{tmp_path}/socket") as end:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{tmp_path}/socket")
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(peer, sent)  # nothing reads meanwhile
            got = 0
            while got < len(sent) // 1518:
                got += len(await end.read())


# passt


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def dhcp_discover() -> bytes:
    udp = struct.pack(">HHHH", 68, 67, 8 + len(DISCOVER), 0) + DISCOVER
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
    return BROADCAST + GUEST + b"\x08\x00" + header + udp


async def offered(end: End) -> bool:
    """Ask for an address; return whether one is offered."""
    assert await end.write([dhcp_discover()])
    while True:
        for frame in await end.read():
            if frame[12:14] == b"\x08\x00" and frame[34:38] == struct.pack(">HH", 67, 68):
                return frame[42] == 2  # BOOTREPLY


@pytest.mark.usefixtures("passt")
async def test_passt_offers_an_address_and_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.ends.passt.FIRST_PAUSE", 0.05)
    async with opened("passt") as end:
        assert isinstance(end, PasstEnd)
        assert await offered(end)
        process = end._process
        assert process is not None
        process.send_signal(signal.SIGKILL)
        reading = asyncio.ensure_future(end.read())
        while end.peer is not None:
            await end.changed()
        while end.peer is None:
            await end.changed()
        reading.cancel()
        await asyncio.wait([reading])
        assert end._process is not process
        assert await offered(end)
        last = end._process
    assert last is not None
    assert last.returncode is not None


@pytest.mark.usefixtures("passt")
async def test_passt_ends_if_its_opening_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.ends.passt.START_TIME", 60.0)
    end = PasstEnd()
    opening = asyncio.ensure_future(end.open())
    async with asyncio.timeout(TIMEOUT):
        while end._process is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        await end._process.wait()


@pytest.mark.usefixtures("passt")
async def test_passt_that_cannot_work() -> None:
    with pytest.raises(DeviceError, match=r"passt cannot work: .*nowhere") as caught:
        await parse_network_end("passt:--interface nowhere0").open()
    assert caught.value.remedy


async def test_passt_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.programs.search_path", lambda: "/nowhere")
    with pytest.raises(SetupError, match="the program passt is not installed") as caught:
        await parse_network_end("passt").open()
    assert caught.value.reason is Reason.MISSING_PROGRAM
    assert caught.value.remedy.command == "sudo apt-get install passt"


# QEMU


def is_listening(path: Path) -> bool:
    """Return whether a program listens on a socket: its file is there a moment before."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(line[3] == "00010000" and line[-1] == str(path) for line in lines)  # __SO_ACCEPTCON


async def test_qemu_is_the_other_end_of_a_socket(tmp_path: Path) -> None:
    """A QEMU without a VM: a stream socket on a hub with its user network, which offers an address."""
    try:
        program = find_program(QEMU)
    except SetupError as error:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            raise
        pytest.skip(error.message)
    path = tmp_path / "socket"
    stream = f"stream,id=stream,server=on,addr.type=unix,addr.path={path}"
    hub = ("-netdev", "user,id=user", "-netdev", "hubport,hubid=0,id=h1,netdev=user")
    process = await asyncio.create_subprocess_exec(
        *(str(program), "-machine", "none", "-display", "none", "-nodefaults", "-netdev", stream),
        *(*hub, "-netdev", "hubport,hubid=0,id=h2,netdev=stream"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            while not is_listening(path):
                assert process.returncode is None
                await asyncio.sleep(0.02)
        async with opened(f"unix:{path}") as end:
            assert await offered(end)
    finally:
        process.kill()
        await process.communicate()


# TAP interfaces


@pytest.fixture
def tap() -> Iterator[str]:
    """Return the name of a TAP interface that this user may make; there is none for most.

    It is in a network of its own, in which this thread is meanwhile: browsers stop loading when the machine gets one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as machine:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network of its own can be made: {os.strerror(ctypes.get_errno())}")
        try:
            asyncio.run(_try(TapEnd("tap7", "tap:tap7")))
            yield "tap7"
        except FarplugError as error:
            pytest.skip(error.message)
        finally:
            assert libc.setns(machine.fileno(), CLONE_NEWNET) == 0


async def _try(end: End) -> None:
    await end.open()
    await end.close()


async def test_frames_of_an_interface(tap: str) -> None:
    async with opened(f"tap:{tap}") as end:
        assert await end.write(FRAMES)  # it is down: they are lost
        subprocess.run(["ip", "link", "set", "dev", tap, "up"], check=True)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as other:
            other.bind((tap, 0))
            other.settimeout(TIMEOUT)
            frame = BROADCAST + GUEST + b"\x88\xb5" + bytes(50)
            assert await end.write([frame])
            while await asyncio.to_thread(other.recv, 2000) != frame:
                pass
            other.send(frame[::-1])
            while frame[::-1] not in await end.read():
                pass
        with pytest.raises(DeviceError, match="in use by another program") as caught:
            await parse_network_end(f"tap:{tap}").open()
        assert caught.value.reason is Reason.IN_USE


async def test_an_interface_that_this_user_may_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("farplug.ends.tap.fcntl.ioctl", refuse)
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun cannot be opened")
    with pytest.raises(DeviceError, match="this user may not use the interface tap7") as caught:
        await parse_network_end("tap:tap7").open()
    assert caught.value.reason is Reason.NO_PERMISSION
    assert "ip tuntap add dev tap7 mode tap user $USER" in caught.value.remedy.command
