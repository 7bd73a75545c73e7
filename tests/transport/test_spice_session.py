from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lz4.block
import pytest
from tests.transport.fake_spice import (
    SESSION_ID,
    Certificates,
    Channel,
    FakeSpice,
    Recorder,
    channels_list,
    idle,
    message,
    ping,
    running,
)

from farplug.app.guest import Guest
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    InternalError,
    PortError,
    Reason,
    RemoteProtocolError,
    StateError,
    TargetError,
)
from farplug.exit_codes import ExitCode, exit_code
from farplug.rate_limit import BURST, release_logs
from farplug.spice.messages import SwitchHost
from farplug.spice.types import LinkError
from farplug.store import MemoryStore
from farplug.transport import spice_port, spice_session
from farplug.transport.connection import HIGH_WATER, Timeouts
from farplug.transport.dialer import LinkedChannel
from farplug.transport.moved import GuestMoved
from farplug.transport.spice_port import SpicePort
from farplug.transport.spice_session import SpiceSession
from farplug.transport.spice_target import SpiceTarget, Stage
from farplug.usbredir.caps import Cap
from farplug.usbredir.protocol import Connection, Role
from farplug.virtual.disk import disk_device

INIT = message(103, struct.pack("<8I", SESSION_ID, 0, 1, 1, 0, 10, 0, 0))
DATA, COMPRESSED = 101, 102


async def connect(port: int, **timeouts: float) -> SpiceSession:
    return await SpiceSession.connect(SpiceTarget(host="127.0.0.1", port=port), timeouts=Timeouts(**timeouts))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.005)


async def test_an_exception_of_the_listener_is_not_the_servers_fault() -> None:
    class Broken(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            raise ZeroDivisionError("our bug")

    async def speaks(channel: Channel) -> None:
        channel.send(message(DATA, b"hello"))
        await channel.reader.read()

    async with running(FakeSpice(usbredir=speaks, vmc_caps=0)) as port:
        session = await connect(port)
        for number in (0, 1):  # at once, or once the port is open
            recorder = Broken()
            with contextlib.suppress(InternalError):
                await session.ports[number].open(recorder)
                await recorder.until(lambda recorder=recorder: bool(recorder.closed))  # type: ignore[misc]
                raise recorder.closed[0] or AssertionError
        assert not session.ended.done(), "the session goes on"
        await session.close()


async def test_an_exception_of_the_main_channel_is_not_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.transport.spice_session.parse_name", lambda body: 1 // 0)
    async with running(FakeSpice()) as port:
        with pytest.raises(InternalError, match="internal error: ZeroDivisionError"):
            await (await connect(port)).closed()


async def test_connect() -> None:
    fake = FakeSpice()
    stages: list[Stage] = []
    async with running(fake) as port:
        target = SpiceTarget(host="127.0.0.1", port=port)
        session = await SpiceSession.connect(target, progress=lambda stage, where: stages.append(stage))
        assert stages == [Stage.REACH, Stage.TICKET, Stage.CHANNELS]
        assert (session.name, session.uuid) == ("testvm", "00010203-0405-0607-0809-0a0b0c0d0e0f")
        assert session.session_id == SESSION_ID
        assert [str(channel) for channel in session.channels] == ["inputs 0", "usbredir 0", "usbredir 1"]
        assert [port.name for port in session.ports] == ["usbredir 0", "usbredir 1"]
        await until(lambda: fake.pongs == [1, 2])
        assert fake.linked[0].mess.channel_caps == (0b0110,), "no migration"
        assert not session.ended.done()
        await session.close()
        await session.close()
        assert session.ended.result() is None


async def test_the_list_of_channels_may_grow() -> None:
    fake = FakeSpice(channels=((9, 3),))
    async with running(fake) as port:
        session = await connect(port)
        first = session.ports[0]
        fake.main_channel.send(channels_list([(9, 1), (9, 3)]))
        await until(lambda: len(session.ports) == 2)
        assert session.ports[0] is first
        assert session.ports[1].name == "usbredir 1"
        await session.close()


@pytest.mark.parametrize(
    ("sent", "error", "expected_text"),
    [
        (b"", TargetError, "accepted the ticket, then closed the connection"),
        (message(6, struct.pack("<QI", 1, 7)), TargetError, ", with link error 7"),
        (INIT, GuestGoneError, "the SPICE server closed the session"),
        (INIT + message(104, b"\xff\xff\xff\xff"), RemoteProtocolError, "4294967295 channels"),
        (message(103, bytes(31)), RemoteProtocolError, "MAIN_INIT of 31 bytes"),
        (INIT + message(113, bytes(3)), RemoteProtocolError, "MAIN_NAME of 3 bytes"),
    ],
)
async def test_sessions_that_fail_at_the_start(sent: bytes, error: type[FarplugError], expected_text: str) -> None:
    async def main(channel: Channel) -> None:
        channel.send(sent)
        if error is RemoteProtocolError:
            await channel.reader.read()

    async with running(FakeSpice(main=main)) as port:
        with pytest.raises(error, match=expected_text) as caught:
            await connect(port)
    if error is TargetError:
        assert caught.value.reason is Reason.LINK_REFUSED


async def test_silent_main_channel() -> None:
    async def main(channel: Channel) -> None:
        await channel.reader.read()

    async with running(FakeSpice(main=main)) as port:
        with pytest.raises(TargetError, match=r"sent no list of channels within 1 s") as caught:
            await connect(port, handshake=1)
    assert caught.value.reason is Reason.TIMED_OUT


async def test_port() -> None:
    fake = FakeSpice()

    async def echo(channel: Channel) -> None:
        channel.send(message(4, struct.pack("<IQ", 1, 2)))
        while True:
            kind, body = await channel.receive_other_than_pong()
            if kind == COMPRESSED:
                body = lz4.block.decompress(body[5:], uncompressed_size=struct.unpack_from("<I", body, 1)[0])
            kinds.append(kind)
            channel.send(message(DATA, body))

    kinds: list[int] = []
    fake.usbredir = echo
    async with running(fake) as number:
        session = await connect(number)
        port = session.ports[1]
        assert isinstance(port, SpicePort)
        port.write([b"dropped: not open"])
        await port.close()
        port.abort()
        for turn in range(3):
            recorder = Recorder()
            await port.open(recorder)
            with pytest.raises(StateError, match="open already"):
                await port.open(Recorder())
            assert fake.of(1).mess.connection_id == SESSION_ID
            payload = os.urandom(1 << 20) + bytes(1 << 20)
            port.write([b"head", payload])
            await recorder.until(lambda r=recorder, p=payload: len(r.data) == 4 + len(p))  # type: ignore[misc]
            assert bytes(recorder.data) == b"head" + payload
            assert kinds == [DATA, COMPRESSED][: len(kinds)]
            port.compress = False
            port.write([bytes(5000)])
            await recorder.until(lambda r=recorder, p=payload: len(r.data) == 5004 + len(p))  # type: ignore[misc]
            assert kinds.pop() == DATA
            kinds.clear()
            port.compress = True
            if turn == 1:
                port.abort()
            else:
                await port.close()
            await recorder.until(lambda r=recorder: bool(r.closed))  # type: ignore[misc]
            assert recorder.closed == [None]
        await session.close()


async def loss(session: SpiceSession) -> FarplugError:
    """Return the error with which a session ended."""
    error = await session.closed()
    assert error is not None
    return error


@pytest.mark.parametrize("refused", [False, True])
async def test_a_server_that_ended_the_session_and_answers(refused: bool) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        await fake.main_channel.close()
        if refused:  # another TLS setting, for example: it is a SPICE server
            fake.link_error = LinkError.NEED_SECURED
        error = await session.explain(await loss(session))
        assert error.reason is Reason.TAKEN_OVER
        assert exit_code(error) is ExitCode.GUEST_GONE
        assert str(error).endswith("closed the session, and still answers: another SPICE client has probably connected")
        assert len(fake.linked) == 1  # no ticket was sent
        await session.close()


async def test_a_server_that_is_gone() -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
    error = await session.explain(await loss(session))
    assert error.reason is Reason.GUEST_GONE
    assert str(error).endswith("closed the session, and answers no more")
    await session.close()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"REDQ" + bytes(5)])
async def test_something_else_that_answers_instead_of_the_server(greeting: bytes) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        fake.greeting = greeting
        await fake.main_channel.close()
        assert (await session.explain(await loss(session))).reason is Reason.GUEST_GONE
        await session.close()


async def test_a_server_that_accepts_and_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_session, "EXPLAIN_TIMEOUT", 0.1)
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        left = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: bool) -> None:
            await reader.read()
            writer.close()
            left.set()

        fake.serve = silent  # type: ignore[method-assign]
        await fake.main_channel.close()
        error = await loss(session)
        assert await session.explain(error) is error
        await left.wait()
        await session.close()


async def test_other_ends_of_a_session_are_not_explained() -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        fake.main_channel.send(message(103, b"too short"))
        error = await loss(session)
        assert await session.explain(error) is error
        await session.close()


async def test_two_ports_at_once_and_the_session_ends() -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorders = [Recorder(), Recorder()]
        for port, recorder in zip(session.ports, recorders, strict=True):
            await port.open(recorder)
        for channel in (0, 1):
            fake.of(channel).send(message(DATA, b"for %d" % channel))
        for channel, recorder in enumerate(recorders):
            await recorder.until(lambda r=recorder: bool(r.data))  # type: ignore[misc]
            assert bytes(recorder.data) == b"for %d" % channel
        await fake.main_channel.close()
        error = await session.ended
        assert isinstance(error, GuestGoneError)
        assert "the SPICE server closed the session" in str(error)
        assert "another client" in error.remedy
        for recorder in recorders:
            await recorder.until(lambda r=recorder: bool(r.closed))  # type: ignore[misc]
            assert recorder.closed == [error]
        with pytest.raises(GuestGoneError):
            await session.ports[0].open(Recorder())
        await session.close()


async def test_closing_the_session_closes_ports_regularly() -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        await session.close()
        assert recorder.closed == [None]
        with pytest.raises(GuestGoneError, match="the session is closed"):
            await session.ports[0].open(Recorder())


async def test_channel_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """libspice-server 0.15.1 links the channel, accepts the ticket, and then closes the connection."""
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 60)

    async def refuse(channel: Channel) -> None:
        await channel.close()

    fake = FakeSpice(usbredir=refuse)
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        with pytest.raises(PortError, match="is in use") as caught:
            await session.ports[0].open(recorder)
        assert caught.value.reason is Reason.CHANNEL_IN_USE
        assert not recorder.closed
        assert not session.ended.done()
        await session.close()


@pytest.mark.parametrize("ends", ["the channel", "the session", "by us"])
async def test_a_channel_in_use_that_ends_late(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy reports success before it links the channel of the VM: its end arrives when open() has returned."""
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 0)

    async def silent(channel: Channel) -> None:
        await go.wait()
        if ends == "the session":
            await fake.main_channel.close()

    go = asyncio.Event()
    fake = FakeSpice(usbredir=silent)
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        assert not recorder.closed
        if ends == "by us":
            await session.ports[0].close()
        go.set()
        await recorder.until(lambda: bool(recorder.closed))
        (error,) = recorder.closed
        if ends == "the channel":
            assert isinstance(error, PortError)
            assert error.reason is Reason.CHANNEL_IN_USE
            assert not session.ended.done()
        else:
            assert error is (session.ended.result() if ends == "the session" else None)
        await session.close()


async def test_a_channel_that_has_sent_data_was_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 0)

    async def sends_late(channel: Channel) -> None:
        await go.wait()
        channel.send(ping(1))

    go = asyncio.Event()
    async with running(FakeSpice(usbredir=sends_late)) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        go.set()
        await recorder.until(lambda: bool(recorder.closed))
        assert isinstance(recorder.closed[0], GuestGoneError)
        await session.close()


async def test_a_device_gets_the_next_port_if_its_channel_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the end of the channel that is in use."""
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 0)

    async def first_is_in_use(channel: Channel) -> None:
        if channel.mess.channel_id == 0:
            await asyncio.sleep(0.1)
            return
        peer = Connection(Role.GUEST, caps=Cap.NONE)
        peer.start()
        channel.send(message(DATA, b"".join(peer.data_to_send())))
        await idle(channel)

    async with running(FakeSpice(usbredir=first_is_in_use)) as number:
        guest = Guest(session=await connect(number))
        device = disk_device(MemoryStore(bytes(4096)))
        attachment = await guest.plug(device)
        assert attachment.port.name == "usbredir 1"
        await guest.close()
        await device.dispose()


async def test_a_channel_that_we_just_closed_is_retried() -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        await session.ports[0].open(Recorder())
        await session.ports[0].close()
        free, refusals = fake.usbredir, 0

        async def busy_twice(channel: Channel) -> None:
            nonlocal refusals
            refusals += 1
            await (channel.close() if refusals <= 2 else free(channel))

        fake.usbredir = busy_twice
        await session.ports[0].open(Recorder())
        assert refusals == 3
        await session.close()


async def test_absent_channel() -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        fake.channels = ()
        with pytest.raises(PortError, match="removed from the VM") as caught:
            await session.ports[0].open(Recorder())
        assert caught.value.reason is Reason.CHANNEL_IN_USE
        await session.close()


async def test_silent_channel_is_open() -> None:
    """A server on a UNIX socket, or behind a proxy, sends nothing while the VM is paused."""

    async def silent(channel: Channel) -> None:
        await channel.reader.read()

    fake = FakeSpice(usbredir=silent)
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        assert not recorder.closed
        await session.close()


@pytest.mark.parametrize(
    ("sent", "error", "expected_text"),
    [
        (b"", GuestGoneError, "usbredir 0: the SPICE server closed the channel$"),
        (message(6, struct.pack("<QI", 1, 1)), GuestGoneError, "closed the channel, with link error 1"),
        (
            message(COMPRESSED, b"\7\0\0\0\0"),
            RemoteProtocolError,
            "usbredir 0: COMPRESSED_DATA with unknown compression 7",
        ),
    ],
)
async def test_port_that_breaks(sent: bytes, error: type[FarplugError], expected_text: str) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        channel = fake.of(0)
        channel.send(sent)
        if error is GuestGoneError:
            await channel.close()
        await recorder.until(lambda: bool(recorder.closed))
        with pytest.raises(error, match=expected_text):
            raise recorder.closed[0] or AssertionError
        assert not session.ended.done()
        await session.close()
        assert len(recorder.closed) == 1


def _closed(port: SpicePort) -> bool:
    return port._linked is not None and port._linked.connection.lost


@pytest.mark.parametrize("ended", ["by the server", "by us", "at once", "not"])
async def test_a_session_that_ends_after_its_channels(monkeypatch: pytest.MonkeyPatch, ended: str) -> None:
    """Another client takes over: the usbredir channels end first. Each port reports what ended the session."""
    monkeypatch.setattr(spice_port, "SESSION_END_TIMEOUT", 0.05 if ended == "not" else 600)
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorders = []
        for port in session.ports:
            assert isinstance(port, SpicePort)
            recorders.append(Recorder())
            await port.open(recorders[-1])
            await fake.of(port.number).close()
            await until(lambda p=port: _closed(p))  # type: ignore[misc]
            port.write([b"dropped: the channel has ended"])
            port.pause_reading()
            port.resume_reading()
        match ended:
            case "by the server":
                assert not any(recorder.closed for recorder in recorders)
                await fake.main_channel.close()
            case "by us":
                await session.close()
            case "at once":
                for port in session.ports:
                    port.abort()
        for recorder in recorders:
            await recorder.until(lambda r=recorder: bool(r.closed))  # type: ignore[misc]
            assert len(recorder.closed) == 1
            error = recorder.closed[0]
            assert isinstance(error, GuestGoneError)
            if ended == "by the server":
                assert error is session.ended.result()
                assert "another client may have taken over the session" in error.remedy
            else:
                assert "the SPICE server closed the channel" in error.message
                assert "still runs and has the channel" in error.remedy
        if ended == "not":
            await session.ports[0].open(Recorder())
        await session.close()


@pytest.mark.parametrize("touched", [False, True])
async def test_a_session_that_ends_after_a_channel_that_opens(monkeypatch: pytest.MonkeyPatch, touched: bool) -> None:
    monkeypatch.setattr(spice_port, "SESSION_END_TIMEOUT", 600)

    async def closes(channel: Channel) -> None:
        if touched:
            channel.send(message(DATA, b"hello"))
        await channel.close()
        await asyncio.sleep(0.05)
        await fake.main_channel.close()

    fake = FakeSpice(usbredir=closes)
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        error: FarplugError | None
        try:
            await session.ports[0].open(recorder)
            await recorder.until(lambda: bool(recorder.closed))
            error = recorder.closed[0]
        except GuestGoneError as caught:
            error = caught
            assert not recorder.closed
        assert error is session.ended.result()
        await session.close()


@pytest.mark.parametrize(
    ("sent", "error"),
    [(message(COMPRESSED, b"\7\0\0\0\0"), RemoteProtocolError), (message(DATA, b"hello"), GuestGoneError)],
)
async def test_port_that_breaks_while_it_opens(sent: bytes, error: type[FarplugError]) -> None:
    """Either open() raises the error, or the listener gets it: exactly one of them."""

    async def breaks(channel: Channel) -> None:
        channel.send(sent)
        await channel.close()

    fake = FakeSpice(usbredir=breaks)
    async with running(fake) as number:
        session = await connect(number)
        port = session.ports[0]
        recorder = Recorder()
        try:
            await port.open(recorder)
            await recorder.until(lambda: bool(recorder.closed))
            assert isinstance(recorder.closed[0], error)
        except FarplugError as caught:
            assert isinstance(caught, error)  # noqa: PT017
            assert not recorder.closed
        await session.close()


def destination(kind: int, port: int = 5900, tls_port: int = 0xFFFF) -> bytes:
    """MIGRATE_BEGIN or MIGRATE_SWITCH_HOST, to ``other`` with the subject ``CN=o``."""
    return message(kind, struct.pack("<HHIIII", port, tls_port, 6, 20, 5, 26) + b"other\0CN=o\0")


OTHER = SwitchHost(5900, None, "other", "CN=o")
MIGRATE, MIGRATE_BEGIN, MIGRATE_CANCEL, SWITCH_HOST = 1, 101, 102, 111
NEED_FLUSH = message(MIGRATE, struct.pack("<I", 1))


@pytest.mark.parametrize(
    ("on_main", "on_usbredir", "where"),
    [
        (NEED_FLUSH, b"", None),
        (b"", NEED_FLUSH, None),
        (destination(SWITCH_HOST), b"", OTHER),
        (destination(SWITCH_HOST, 0, 5901), b"", SwitchHost(None, 5901, "other", "CN=o")),
        (destination(MIGRATE_BEGIN) + NEED_FLUSH, b"", OTHER),
        (destination(MIGRATE_BEGIN, 1) + destination(SWITCH_HOST), b"", OTHER),
        (destination(MIGRATE_BEGIN) + message(MIGRATE_CANCEL) + NEED_FLUSH, b"", None),
    ],
)
async def test_migration_ends_the_session(on_main: bytes, on_usbredir: bytes, where: SwitchHost | None) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        fake.main_channel.send(on_main)
        fake.of(0).send(on_usbredir)
        error = await session.closed()
        assert isinstance(error, GuestMoved)
        assert error.reason is Reason.GUEST_MOVED
        assert error.where == where
        assert str(error) == f"the VM moved to {where or 'another host'}, and the session ended"
        await recorder.until(lambda: bool(recorder.closed))
        assert recorder.closed == [error]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_migration_begins_and_the_vm_still_runs_here(cancelled: bool) -> None:
    """The server that asks for a connection to the destination gets an error, and the session goes on."""
    answers: list[int] = []

    async def main(channel: Channel) -> None:
        channel.send(INIT + channels_list(((9, 0),)) + destination(MIGRATE_BEGIN))
        while (kind := (await channel.receive_other_than_pong())[0]) != 103:
            answers.append(kind)
        channel.send(message(MIGRATE_CANCEL) if cancelled else b"")
        await go.wait()

    go = asyncio.Event()
    async with running(FakeSpice(main=main)) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        assert answers == [104]
        assert not session.ended.done()
        go.set()  # the VM is gone: the server ends
        error = await session.closed()
        assert isinstance(error, GuestGoneError)
        assert (error.where if isinstance(error, GuestMoved) else None) == (None if cancelled else OTHER)


async def test_notices_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        notice = message(7, struct.pack("<QIIII", 1, 1, 2, 3, 5) + b"take\x1b")
        fake.main_channel.send(notice)
        fake.of(0).send(notice)
        await until(lambda: caplog.text.count("notice of the server: take\N{REPLACEMENT CHARACTER}") == 2)
        await session.close()


@pytest.mark.parametrize("channel", ["main", "usbredir"])
async def test_a_flood_of_notices_is_limited(channel: str, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        count = 10 * BURST
        notices = message(7, struct.pack("<QIIII", 1, 1, 2, 3, 4) + b"take") * count
        if channel == "main":
            fake.main_channel.send(notices + ping(7))
            await until(lambda: 7 in fake.pongs)
        else:
            fake.of(0).send(notices + message(101, b"data"))
            await until(lambda: bytes(recorder.data) == b"data")
        assert len(caplog.messages) == BURST
        release_logs()
        (more,) = caplog.messages[BURST:]
        assert more.endswith(f"notice of the server: take ({count - BURST - 1} more like this)")
        await session.close()


async def test_messages_that_arrive_together_are_announced() -> None:
    """The listener learns what more follows, and gets an empty call if no data did."""
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        port = session.ports[0]
        calls: list[tuple[bytes, bool]] = []

        class Listener(Recorder):
            def data_received(self, data: memoryview, more: bool = False) -> None:
                super().data_received(data)
                calls.append((bytes(data), more))

        recorder = Listener()
        await port.open(recorder)
        fake.of(0).send(message(DATA, b"0") + message(DATA, b"1"))
        await recorder.until(lambda: bytes(recorder.data) == b"01")
        fake.of(0).send(message(DATA, b"2") + message(DATA, b"3") + ping(1))
        await recorder.until(lambda: len(calls) == 5)
        assert calls == [(b"0", True), (b"1", False), (b"2", True), (b"3", True), (b"", False)]
        await session.close()


async def test_reading_can_be_paused_in_the_middle() -> None:
    """Nothing is delivered after a pause, not even bytes that arrived before it."""
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        port = session.ports[0]

        class Pauser(Recorder):
            def data_received(self, data: memoryview, more: bool = False) -> None:
                super().data_received(data)
                port.pause_reading()

        recorder = Pauser()
        await port.open(recorder)
        fake.of(0).send(b"".join(message(DATA, b"%d" % number) for number in range(3)))
        for expected in (b"0", b"01", b"012"):
            await recorder.until(lambda e=expected: bytes(recorder.data) == e)  # type: ignore[misc]
            await asyncio.sleep(0.01)
            assert bytes(recorder.data) == expected
            port.resume_reading()
        fake.of(0).send(message(DATA, b"3"))
        await recorder.until(lambda: bytes(recorder.data) == b"0123")
        await session.close()


async def test_reading_can_be_paused_by_bytes_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSpice()
    async with running(fake) as number:
        session = await connect(number)
        port = session.ports[0]
        assert isinstance(port, SpicePort)
        link = port._dialer.link

        async def link_with_trailing(*args: Any, **options: Any) -> LinkedChannel:
            linked = await link(*args, **options)
            trailing = message(DATA, b"first") + message(DATA, b"second")
            return replace(linked, link=replace(linked.link, trailing=trailing))

        monkeypatch.setattr(port._dialer, "link", link_with_trailing)

        class Pauser(Recorder):
            def data_received(self, data: memoryview, more: bool = False) -> None:
                super().data_received(data)
                port.pause_reading()

        recorder = Pauser()
        await port.open(recorder)
        fake.of(0).send(message(DATA, b"third"))
        await asyncio.sleep(0.02)
        assert bytes(recorder.data) == b"first"
        port.resume_reading()
        await recorder.until(lambda: bytes(recorder.data) == b"firstsecond")
        port.resume_reading()
        await recorder.until(lambda: bytes(recorder.data) == b"firstsecondthird")
        await session.close()


@pytest.mark.parametrize("tls", [False, True])
async def test_writer_is_paused(tls: bool, tmp_path: Path) -> None:
    """The VM is paused: the server stops reading us."""
    go = asyncio.Event()
    received = hashlib.sha256()
    size = 0

    async def slow(channel: Channel) -> None:
        nonlocal size
        channel.send(message(4, struct.pack("<IQ", 1, 2)))
        await go.wait()
        while True:
            _, body = await channel.receive_other_than_pong()
            received.update(body)
            size += len(body)

    fake = FakeSpice(usbredir=slow, vmc_caps=0)
    certificates = Certificates(tmp_path)
    async with running(fake, tls=certificates.server_context() if tls else None) as number:
        ports: dict[str, Any] = {"tls_port": number, "ca": certificates.ca} if tls else {"port": number}
        session = await SpiceSession.connect(SpiceTarget(host="127.0.0.1", **ports))
        recorder = Recorder()
        await session.ports[0].open(recorder)
        sent = hashlib.sha256()
        written = 0
        while not recorder.pauses or written < 40 << 20:
            payload = os.urandom(1 << 20)
            session.ports[0].write([payload[:20], memoryview(payload)[20:]])
            sent.update(payload)
            written += len(payload)
            assert written < 64 << 20
        await asyncio.sleep(0.05)
        assert (recorder.pauses, recorder.resumes) == (1, 0)
        assert written >= HIGH_WATER
        go.set()
        await recorder.until(lambda: recorder.resumes == 1)
        await until(lambda: size == written)
        assert received.digest() == sent.digest()
        await session.close()


@pytest.mark.parametrize("tls", [False, True])
async def test_close_flushes_while_the_guest_still_sends(tls: bool, tmp_path: Path) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    go = asyncio.Event()
    received = 0

    async def talk(channel: Channel) -> None:
        nonlocal received
        channel.send(ping(1))
        await go.wait()
        for _ in range(10):
            channel.send(message(DATA, b"x" * 1000))
            await asyncio.sleep(0.005)
        while data := await channel.reader.read(1 << 16):
            received += len(data)

    fake = FakeSpice(usbredir=talk, vmc_caps=0)
    certificates = Certificates(tmp_path)
    async with running(fake, tls=certificates.server_context() if tls else None) as number:
        ports: dict[str, Any] = {"tls_port": number, "ca": certificates.ca} if tls else {"port": number}
        session = await SpiceSession.connect(SpiceTarget(host="127.0.0.1", **ports))
        recorder = Recorder()
        await session.ports[0].open(recorder)
        session.ports[0].write([bytes(12 << 20)])
        closing = asyncio.create_task(session.ports[0].close())
        await asyncio.sleep(0)
        go.set()
        await closing
        assert recorder.closed == [None]
        assert not recorder.data
        await until(lambda: received >= 12 << 20)
        await session.close()
    assert not failures


def limit(connected: socket.socket) -> None:
    """Let the kernel keep 64 KiB of each direction: its megabytes are hundreds of thousands of messages."""
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connected.setsockopt(socket.SOL_SOCKET, buffer, 1 << 16)


@pytest.mark.parametrize("kind", ["main", "usbredir"])
async def test_pings_of_a_server_that_reads_nothing(kind: str) -> None:
    """Our answers are bounded: we stop reading while the server does not read them."""
    go = asyncio.Event()
    pongs = 0
    sent = 0

    async def flood(channel: Channel) -> None:
        nonlocal pongs, sent
        limit(channel.writer.get_extra_info("socket"))
        if kind == "main":
            channel.send(INIT + channels_list(((9, 0),)))

        async def send() -> None:
            nonlocal sent
            while not go.is_set():
                channel.send(ping(7) * 5000)
                sent += 5000
                await channel.writer.drain()

        sending = asyncio.create_task(send())
        await go.wait()
        while pongs < sent or not sending.done():
            pongs += (await channel.receive())[0] == 3
        await channel.reader.read()

    fake = FakeSpice(channels=((9, 0),))
    setattr(fake, kind, flood)
    async with running(fake) as number:
        session = await connect(number)
        connection = session._connection
        if kind == "usbredir":
            port = session.ports[0]
            assert isinstance(port, SpicePort)
            await port.open(Recorder())
            assert port._linked is not None
            connection = port._linked.connection
        assert connection._transport is not None
        limit(connection._transport.get_extra_info("socket"))
        await until(lambda: connection._queued > HIGH_WATER)
        before = -1
        while sent != before:  # until the server cannot send any more
            before = sent
            await asyncio.sleep(0.2)
        assert connection._queued < HIGH_WATER + (1 << 20)
        go.set()
        await until(lambda: pongs >= sent)
        assert connection.is_open
        await session.close()


@pytest.mark.parametrize("when", ["linked", "refused", "gone later"])
async def test_session_that_ends_while_a_port_opens(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSpice(channels=((9, 0),))
    async with running(fake) as number:
        session = await connect(number)
        port = session.ports[0]
        assert isinstance(port, SpicePort)
        link = port._dialer.link
        links: list[LinkedChannel] = []

        async def link_and_end(*args: Any, **options: Any) -> LinkedChannel:
            if when != "linked":
                fake.channels = ()
            if when == "gone later":
                asyncio.get_running_loop().call_later(0.05, fake.main_channel.writer.close)
                return await link(*args, **options)
            try:
                links.append(await link(*args, **options))
                return links[0]
            finally:
                await fake.main_channel.close()
                await session.ended

        monkeypatch.setattr(port._dialer, "link", link_and_end)
        recorder = Recorder()
        with pytest.raises(GuestGoneError, match="the SPICE server closed the session"):
            await port.open(recorder)
        assert not recorder.closed
        assert all(linked.connection.closing for linked in links)


@pytest.mark.parametrize("waits", [0, 0.1])
async def test_session_that_we_close_while_a_port_opens(monkeypatch: pytest.MonkeyPatch, waits: float) -> None:
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 60)

    async def silent(channel: Channel) -> None:
        await channel.reader.read()

    async with running(FakeSpice(usbredir=silent)) as number:
        session = await connect(number)
        recorder = Recorder()
        opening = asyncio.create_task(session.ports[0].open(recorder))
        await asyncio.sleep(waits)
        await session.close()
        with pytest.raises((GuestGoneError, StateError), match=r"session is closed|closed before it was open"):
            await opening
        assert not recorder.closed


@pytest.mark.parametrize("waits", [0, 0.1])
async def test_port_that_is_closed_while_it_opens(monkeypatch: pytest.MonkeyPatch, waits: float) -> None:
    monkeypatch.setattr(spice_port, "SETTLE_TIME", 2)

    async def silent(channel: Channel) -> None:
        await channel.reader.read()

    async with running(FakeSpice(usbredir=silent)) as number:
        session = await connect(number)
        port, recorder = session.ports[0], Recorder()
        opening = asyncio.create_task(port.open(recorder))
        await asyncio.sleep(waits)
        await port.close()
        with pytest.raises(StateError, match="port usbredir 0 was closed before it was open"):
            await opening
        assert not recorder.closed
        await port.open(recorder)
        await port.close()
        assert recorder.closed == [None]
        await session.close()


async def test_a_cancelled_close_closes_the_session() -> None:
    stuck = asyncio.Event()

    async def reads_nothing(channel: Channel) -> None:
        channel.send(ping(1))
        await stuck.wait()

    async with running(FakeSpice(usbredir=reads_nothing, vmc_caps=0)) as number:
        session = await connect(number)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        session.ports[0].write([bytes(16 << 20)])
        closing = asyncio.create_task(session.close())
        await asyncio.sleep(0.05)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await session.ended is None
        await recorder.until(lambda: bool(recorder.closed))
        assert recorder.closed == [None]
        stuck.set()
