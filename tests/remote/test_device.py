"""Devices of USB/IP servers: farplug's own server at the other end, and servers that violate the protocol."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from tests.transport.test_usbip_session import IN, OUT, Periodic, Store, device
from tests.usbip.client import TIMEOUT, Server, serving

from farplug.errors import DeviceError, Reason, UsageError
from farplug.redirection import events
from farplug.remote import RemoteDevice, connection, parse_remote
from farplug.remote.connection import UrbConnection
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.transport.connection import TcpAddress
from farplug.usb import Reception, Setup, Status
from farplug.usb.types import TransferType
from farplug.usbip.messages import Errno, Submit, Submitted
from farplug.virtual import VirtualDevice


@asynccontextmanager
async def redirected(local: VirtualDevice) -> AsyncIterator[tuple[MemoryGuest, RemoteDevice, Server]]:
    """Serve a device, import it, and plug it into a guest in memory."""
    async with serving(local) as server:
        remote = await RemoteDevice.connect(TcpAddress("127.0.0.1", server.port), "1-1")
        try:
            async with MemoryGuest(remote) as guest:
                yield guest, remote, server
        finally:
            await remote.dispose()


async def test_a_device_is_as_at_the_server() -> None:
    local = device(Store())
    async with redirected(local) as (guest, remote, server):
        assert remote.identity == local.identity
        assert remote.interfaces == local.interfaces
        assert remote.configuration == 0
        assert server.session.ports[0].exporter.in_use
        await guest.enumerate()
        assert (remote.configuration, local.configuration) == (1, 1)
        await guest.set_configuration(0)
        assert (remote.configuration, local.configuration) == (0, 0)
    assert not local.configuration


async def test_transfers() -> None:
    store = Store()
    async with redirected(device(store)) as (guest, _, _):
        await guest.enumerate()
        sent = [random.Random(number).randbytes(number * 5000) for number in range(1, 20)]
        await asyncio.gather(*(guest.bulk_out(OUT, data) for data in sent))
        assert store.items == sent
        for data in sent:
            store.output.put_nowait(data)
        assert [await guest.bulk_in(IN, 1 << 20) for _ in sent] == sent
        with pytest.raises(TransferFailed) as raised:
            await guest.control_in(Setup(0xC0, 0x77, length=8))
        assert raised.value.status is Status.STALL


async def test_thousands_of_urbs_are_unlinked_without_looking_at_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looked(int):
        looks = 0

        def __eq__(self, other: object) -> bool:
            Looked.looks += 1
            return int(self) == other

        __hash__ = int.__hash__

    connection = UrbConnection(TcpAddress("host", 3240), "1-1")
    sent: list[bytes] = []
    monkeypatch.setattr(type(connection._connection), "is_open", True)
    monkeypatch.setattr(connection._connection, "write", lambda buffers: sent.append(b"".join(buffers)))
    numbers = [Looked(connection.submit(Submit(0, 0, 0x81, 64), lambda reply: None)) for _ in range(300)]
    sent.clear()
    for number in [*numbers, *numbers]:
        connection.unlink(number)
    assert len(sent) == 300
    assert Looked.looks < 3000


async def test_a_cancelled_transfer_is_unlinked() -> None:
    store = Store()
    async with redirected(device(store)) as (guest, remote, server):
        await guest.enumerate()
        first, second = guest.submit_in(IN, 100), guest.submit_in(IN, 100)
        first.cancel()
        store.output.put_nowait(b"for the second")
        assert (await second).data == b"for the second"
        async with asyncio.timeout(TIMEOUT):
            while remote._numbers:
                await asyncio.sleep(0.01)
        assert server.guest.attachments[0].memory == 0


async def test_interrupt_endpoints() -> None:
    periodic = Periodic()
    async with redirected(device(periodic)) as (guest, _, _):
        await guest.enumerate()
        await guest.start_receiving(0x81)
        for number in range(20):
            await periodic.report.write(bytes((number,)))
        assert [await guest.interrupt_in(0x81) for _ in range(20)] == [bytes((number,)) for number in range(20)]
        await guest.interrupt_out(OUT, b"command")
        assert periodic.commands == [b"command"]
        await guest.stop_receiving(0x81)
        async with asyncio.timeout(TIMEOUT):
            while periodic.report.is_read:
                await asyncio.sleep(0.01)
        await guest.start_receiving(0x81)
        await periodic.report.write(b"again")
        assert await guest.interrupt_in(0x81) == b"again"
        periodic.report.halt()
        with pytest.raises(TransferFailed) as raised:
            await guest.interrupt_in(0x81)
        assert raised.value.status is Status.STALL
        await guest.clear_halt(0x81)
        await guest.start_receiving(0x81)
        await periodic.report.write(b"cleared")
        assert await guest.interrupt_in(0x81) == b"cleared"


async def test_isochronous_endpoints_of_an_alternate_setting() -> None:
    periodic = Periodic()
    async with redirected(device(periodic)) as (guest, remote, _):
        await guest.enumerate()
        await guest.set_interface(0, 1)
        assert remote.interfaces[0].alternate == 1
        numbers = [int.from_bytes(await guest.iso_in(0x82), "little") for _ in range(40)]
        assert numbers == list(range(numbers[0], numbers[0] + 40))
        for number in range(10):
            await guest.iso_out(0x02, bytes((number,)))
        async with asyncio.timeout(TIMEOUT):
            while not periodic.packets:
                await asyncio.sleep(0.01)
        await guest.set_interface(0, 0)
        assert remote.interfaces[0].alternate == 0
        assert not remote._receivers
        assert not remote._iso_out


async def test_an_isochronous_transfer_that_failed_as_a_whole_has_no_data() -> None:
    """Its data are those of several packets: together they do not fit one packet of the guest."""
    periodic = Periodic()
    async with redirected(device(periodic)) as (guest, remote, _):
        await guest.enumerate()
        await guest.set_interface(0, 1)
        await guest.iso_in(0x82)
        receiver, seen = remote._receivers[0x82], list[tuple[Status, bytes]]()
        receiver._received = lambda endpoint, status, data: seen.append((status, bytes(data)))
        receiver._done(Submitted(0, -Errno.EPROTO, 100_000, bytes(100_000)))
        assert seen == [(Status.IO_ERROR, b"")]


async def test_a_reset_unconfigures_the_device() -> None:
    local = device(Store())
    async with redirected(local) as (guest, remote, _):
        await guest.enumerate()
        pending = guest.submit_in(IN, 100)
        guest.reset()
        assert (await pending).status is Status.CANCELLED
        await guest.wait(lambda: any(isinstance(event, events.PortReset) for event in guest.events))
        assert (remote.configuration, local.configuration) == (0, 0)
        await guest.enumerate()
        assert local.configuration == 1


async def test_requests_for_settings_that_do_not_exist() -> None:
    async with redirected(device(Store())) as (guest, remote, _):
        await guest.enumerate()
        assert await remote.set_interface(0, 7) is Status.STALL
        assert await remote.set_interface(7, 0) is Status.INVALID
        assert await remote.set_configuration(9) is Status.STALL
        assert remote.configuration == 1
        assert remote.start_receiving(Reception(0x8F, TransferType.INTERRUPT)) is Status.STALL
        assert await remote.allocate_streams([IN], 1) is Status.STALL


async def test_after_a_close_another_client_has_the_device_and_it_can_be_opened_again() -> None:
    store = Store()
    async with redirected(device(store)) as (guest, remote, server):
        await guest.redirection.detach()
        async with asyncio.timeout(TIMEOUT):
            while server.session.ports[0].exporter.in_use:
                await asyncio.sleep(0.01)
        await guest.redirection.attach(remote)
        assert server.session.ports[0].exporter.in_use
        await guest.enumerate()
        await guest.bulk_out(OUT, b"again")
        assert store.items == [b"again"]


async def test_a_bus_id_that_has_become_another_device_is_not_opened() -> None:
    imports = 0

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay the connection to the server; in the reply to a later import the product is another one."""
        nonlocal imports
        imports += 1
        theirs, to_server = await asyncio.open_connection("127.0.0.1", server.port)
        sending = asyncio.ensure_future(relay(reader, to_server))
        reply = bytearray(await theirs.readexactly(320))
        if imports > 1:
            reply[310] ^= 1
        writer.write(reply)
        await relay(theirs, writer)
        await sending

    async with serving(device(Store())) as server, playing(play) as where:
        remote = await RemoteDevice.connect(where, "1-1")
        await remote.close()
        for _ in range(2):
            async with asyncio.timeout(TIMEOUT):
                while server.session.ports[0].exporter.in_use:
                    await asyncio.sleep(0.01)
            with pytest.raises(DeviceError, match="is another device now") as raised:
                async with MemoryGuest(remote):
                    pass
            assert raised.value.reason is Reason.DEVICE_LOST
        assert imports == 3


async def test_the_server_leaves() -> None:
    async with redirected(device(Store())) as (guest, _, server):
        await guest.enumerate()
        pending = guest.submit_in(IN, 100)
        await server.guest.attachments[0].unplug()
        assert (await pending).status is not Status.SUCCESS
        await guest.wait(lambda: any(isinstance(event, events.Detached) for event in guest.events))
        detached = next(event for event in guest.events if isinstance(event, events.Detached))
        assert detached.error is not None
        assert detached.error.reason is Reason.DEVICE_LOST


async def test_devices_that_the_server_refuses() -> None:
    async with serving(device(Store())) as server:
        where = TcpAddress("127.0.0.1", server.port)
        first = await RemoteDevice.connect(where, "1-1")
        for busid, reason, text in (("1-1", Reason.BUSY, "another client"), ("9-9", Reason.NOT_FOUND, "not exported")):
            with pytest.raises(DeviceError, match=text) as raised:
                await RemoteDevice.connect(where, busid)
            assert raised.value.reason is reason
            assert raised.value.remedy
        await first.dispose()
    with pytest.raises(DeviceError, match="cannot connect") as raised:
        await RemoteDevice.connect(where, "1-1")
    assert raised.value.reason is Reason.CONNECTION_REFUSED
    assert "usbipd" in raised.value.remedy


# Servers that violate the protocol

IMPORTED = struct.pack(
    ">HHI256s32sIIIHHHBBBBBB", 0x0111, 3, 0, b"/x", b"1-1", 1, 2, 3, 0x1209, 1, 0x0100, 0, 0, 0, 1, 1, 1
)
Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def playing(play: Play) -> AsyncIterator[TcpAddress]:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await play(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def submitted(number: int, status: int, data: bytes, actual: int | None = None) -> bytes:
    head = struct.pack(">5IiiIIi", 3, number, 0, 0, 0, status, len(data) if actual is None else actual, 0, 0, 0)
    return head.ljust(48, b"\0") + data


@pytest.mark.parametrize(
    ("reply", "reason", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Reason.PROTOCOL, "does not use the USB/IP protocol"),
        (b"", Reason.DEVICE_LOST, "closed the connection"),
        (IMPORTED[:100], Reason.DEVICE_LOST, "closed the connection"),
        (struct.pack(">HHI", 0x0111, 3, 3), Reason.DEVICE_FAULT, "its status is 3"),
        (IMPORTED[:304] + b"\0\0\0\x09" + IMPORTED[308:], Reason.PROTOCOL, "9 is not a USB/IP speed"),
        (IMPORTED + submitted(99, 0, b""), Reason.DEVICE_FAULT, "no configuration"),
        (IMPORTED + bytes(48), Reason.DEVICE_FAULT, "no configuration"),
    ],
)
async def test_replies_to_an_import(reply: bytes, reason: Reason, text: str) -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(40)
        writer.write(reply)
        await writer.drain()

    async with playing(play) as where:
        with pytest.raises(DeviceError, match=text) as raised:
            await RemoteDevice.connect(where, "1-1")
    assert raised.value.reason is reason


async def test_a_server_without_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IMPORT_TIMEOUT", 0.05)

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with playing(play) as where:
        with pytest.raises(DeviceError, match="did not answer") as raised:
            await RemoteDevice.connect(where, "1-1")
    assert raised.value.reason is Reason.TIMED_OUT


async def test_a_server_that_sends_more_than_was_requested_is_left() -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(40)
        writer.write(IMPORTED)
        for _ in range(2):
            head = await reader.readexactly(48)
            (number,) = struct.unpack_from(">I", head, 4)
            writer.write(submitted(number, 0, bytes(4000), actual=4000))
            await reader.read()

    async with playing(play) as where:
        with pytest.raises(DeviceError):
            await RemoteDevice.connect(where, "1-1")


@pytest.mark.parametrize(("unlinks", "size", "count"), [(10, 1000, 10), (1000, 4000, 4)])
async def test_a_server_that_answers_no_cancellation_is_left(
    unlinks: int, size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has the answers, and sends more: what waits for the server has a bound."""
    monkeypatch.setattr(connection, "MAX_UNLINKS", unlinks)
    monkeypatch.setattr(connection, "MAX_UNLINKED_BYTES", 16000)
    ended = asyncio.Event()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(40)
        writer.write(IMPORTED)
        await ended.wait()

    async with playing(play) as where:
        imported = await UrbConnection.open(where, "1-1")
        lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        imported.on_lost = lost.set_result
        statuses: list[int] = []
        for number in range(count + 1):
            assert imported.is_open, number
            imported.unlink(imported.submit(Submit(0, 0, 0x02, size, bytes(size)), lambda r: statuses.append(r.status)))
        assert not imported.is_open
        assert "does not answer when transfers are cancelled" in str(await lost)
        assert statuses == [-Errno.ESHUTDOWN] * (count + 1)
        await imported.close()
        ended.set()


async def test_answered_cancellations_count_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_UNLINKS", 1)
    monkeypatch.setattr(connection, "MAX_UNLINKED_BYTES", 100)

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(40)
        writer.write(IMPORTED)
        while True:
            command, number = struct.unpack_from(">II", await reader.readexactly(48))
            if command == 1:
                await reader.readexactly(100)
            else:
                writer.write(struct.pack(">5Ii", 4, number, 0, 0, 0, -Errno.ECONNRESET).ljust(48, b"\0"))

    async with playing(play) as where:
        imported = await UrbConnection.open(where, "1-1")
        for _ in range(5):
            done: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
            imported.unlink(imported.submit(Submit(0, 0, 0x02, 100, bytes(100)), done.set_result))
            assert (await done).status == -Errno.ECONNRESET
        assert imported.is_open
        await imported.close()


@pytest.mark.parametrize(
    ("text", "address", "busid"),
    [
        ("usbip://raspi/1-1", TcpAddress("raspi", 3240), "1-1"),
        ("usbip://raspi:3241/1-1.4.2", TcpAddress("raspi", 3241), "1-1.4.2"),
        ("usbip://[fe80::1%eth0]:3240/3-2", TcpAddress("fe80::1%eth0", 3240), "3-2"),
    ],
)
def test_addresses(text: str, address: TcpAddress, busid: str) -> None:
    assert parse_remote(text) == (address, busid)


@pytest.mark.parametrize(
    "text",
    [
        *("usbip://", "usbip:///1-1", "usbip://raspi", "usbip://raspi/", "usbip://raspi/a b", "usbip://raspi:0/1-1"),
        *("usbip://raspi:x/1-1", "usbip://raspi/../1-1", "usbip://raspi/" + "1" * 32, "http://raspi/1-1"),
    ],
)
def test_addresses_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid USB/IP device") as raised:
        parse_remote(text)
    assert raised.value.reason is Reason.BAD_SETTING
