"""The USB/IP server, with clients of our own that follow the protocol or violate it."""

from __future__ import annotations

import asyncio
import random
import struct
from errno import ECONNRESET, EINVAL, EMSGSIZE, ENOMEM, EOVERFLOW, EPIPE, ESHUTDOWN
from pathlib import Path

import pytest
from tests.usbip.client import SET_CONFIGURATION, TIMEOUT, get_descriptor, serving, set_interface

from farplug.app.events import Event
from farplug.app.settings import Source
from farplug.errors import Reason, TargetError
from farplug.target import open_session, parse_target
from farplug.transport import usbip_session
from farplug.usb import Speed
from farplug.usbip import exporter
from farplug.virtual import (
    AsyncFunction,
    Setting,
    VirtualDevice,
    bulk_in,
    bulk_out,
    interrupt_in,
    interrupt_out,
    isochronous_in,
    isochronous_out,
)

OUT, IN = 0x01, 0x81
MIB = 1 << 20


class Store(AsyncFunction):
    """Keeps what comes in on its bulk endpoint, and sends what a test puts into it."""

    received = bulk_out()
    sent = bulk_in()

    def __init__(self) -> None:
        self.items: list[bytes] = []
        self.output: asyncio.Queue[bytes] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.send())
            while True:
                await self.reads.wait()
                self.items.append(await self.received.read())

    async def send(self) -> None:
        while True:
            await self.sent.write(await self.output.get())


class Periodic(AsyncFunction):
    """Interrupt and isochronous endpoints, which send what a test puts in."""

    settings = (Setting(), Setting(alternate=1))
    report = interrupt_in(8, microseconds=1000)
    command = interrupt_out(8, microseconds=1000)
    samples = isochronous_in(64, alternate=1)
    played = isochronous_out(64, alternate=1)

    def __init__(self) -> None:
        self.commands: list[bytes] = []
        self.packets: list[bytes] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.commanded())
            group.create_task(self.sample())
            async for packet in self.played:
                self.packets.append(packet)

    async def commanded(self) -> None:
        async for data in self.command:
            self.commands.append(data)

    async def sample(self) -> None:
        number = 0
        while True:
            number += await self.samples.write(number.to_bytes(4, "little"))


def device(function: AsyncFunction, speed: Speed = Speed.HIGH) -> VirtualDevice:
    return VirtualDevice(function, vendor_id=0x1209, product_id=0x0001, product="Test", speeds=(speed,))


async def test_devices_are_listed_and_imported_by_one_client_at_a_time() -> None:
    async with serving(device(Store()), device(Periodic(), Speed.FULL)) as server:
        ff = bytes((255, 0, 0, 0))
        assert await (await server.client()).list() == [
            ("1-1", 3, 0x1209, 1, [ff]),
            ("1-2", 2, 0x1209, 1, [ff]),
        ]
        first = await server.client()
        assert await first.import_() == 0
        assert [one[0] for one in await (await server.client()).list()] == ["1-2"]
        assert await (await server.client()).import_() == 2  # ST_DEV_BUSY
        assert await (await server.client()).import_("1-3") == 4  # ST_NODEV
        await first.close()
        await server.until("has left")
        again = await server.client()
        await again.configure()
        assert server.guest.attachments[0].state == "in use"
        await again.close()
        async with asyncio.timeout(TIMEOUT):
            while server.guest.attachments[0].state != "attached":
                await asyncio.sleep(0.01)


async def test_the_user_gets_the_command_of_each_device() -> None:
    events: list[Event] = []
    async with serving() as server:
        server.guest.stream.subscribe(events.append)
        await server.guest.plug(device(Store()))
        port = server.port
        command = f"usbip --tcp-port {port} attach -r 127.0.0.1 -b 1-1"
        assert [event.fields["command"] for event in events if event.name == "note"] == [command]


async def test_a_later_attach_does_not_wait_for_a_client(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(MIB))
    async with serving() as server, asyncio.timeout(TIMEOUT):
        (attachment,) = await server.guest.attach([Source.disk(image, read_only=True)])
        assert (attachment.label, attachment.state) == ("a.raw", "attached")


async def test_transfers_move_data_and_end_in_order() -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        answer = await client.do(0x80, 18, setup=get_descriptor(1, 18))
        assert (answer.status, answer.actual, answer.data[8:12]) == (0, 18, b"\x09\x12\x01\x00")
        answer = await client.do(0x80, 255, setup=get_descriptor(3, 255))
        assert answer.data == b"\x04\x03\x09\x04"
        assert (await client.do(0x80, 10, setup=get_descriptor(77, 10))).status == -EPIPE

        sent = [random.Random(number).randbytes(1 + number * 700) for number in range(60)]
        numbers = [client.submit(OUT, data=data) for data in sent]
        for number, data in zip(numbers, sent, strict=True):
            answer = await client.answer()
            assert (answer.number, answer.status, answer.actual) == (number, 0, len(data))
        assert store.items == sent

        numbers = [client.submit(IN, 50000) for _ in sent]
        for data in sent:
            store.output.put_nowait(data)
        for number, data in zip(numbers, sent, strict=True):
            answer = await client.answer()
            assert (answer.number, answer.status, answer.data) == (number, 0, data)


async def test_a_transfer_of_16_mib_in_both_directions() -> None:
    store = Store()
    data = random.Random(1).randbytes(16 * MIB)
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        assert (await client.do(OUT, data=data)).actual == len(data)
        assert store.items == [data]
        store.output.put_nowait(data)
        assert (await client.do(IN, len(data))).data == data


@pytest.mark.parametrize("endpoint", [OUT, IN])
async def test_a_larger_transfer_ends_with_an_error_and_the_next_one_works(endpoint: int) -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        data = bytes(16 * MIB + 1)
        answer = await client.do(endpoint, len(data), b"" if endpoint & 0x80 else data)
        assert (answer.status, answer.actual) == (-EMSGSIZE, 0)
        assert (await client.do(OUT, data=b"next")).status == 0
        assert store.items == [b"next"]


async def test_a_whole_packet_with_the_flag_for_it_is_followed_by_an_empty_one() -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        for size in (511, 512, 1024, 0):
            assert (await client.do(OUT, data=bytes(size), flags=0x40)).actual == size
        assert list(map(len, store.items)) == [511, 512, 0, 1024, 0, 0]


async def test_unlink() -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        first, second = client.submit(IN, 100), client.submit(IN, 100)
        command = client.unlink(first)
        answer = await client.answer()
        assert (answer.command, answer.number, answer.status) == (4, command, -ECONNRESET)
        store.output.put_nowait(b"for the second")
        answer = await client.answer()
        assert (answer.number, answer.data) == (second, b"for the second")
        for number in (first, second, 4711):  # unlinked, ended, unknown
            command = client.unlink(number)
            answer = await client.answer()
            assert (answer.command, answer.number, answer.status) == (4, command, 0)
        client.unlink(client.submit(OUT, data=bytes(512), flags=0x40))
        await client.answer()
        assert (await client.do(OUT, data=b"still works")).status == 0


async def test_a_storm_of_unlink_commands() -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        for _ in range(20):
            numbers = [client.submit(IN, 4096) for _ in range(300)]
            random.Random(1).shuffle(numbers)
            commands = [client.unlink(number) for number in numbers for _ in range(3)]
            answers = [await client.answer() for _ in commands]
            assert [answer.number for answer in answers] == commands
            assert [answer.status for answer in answers] == [-ECONNRESET, 0, 0] * 300
        assert server.guest.attachments[0].memory == 0
        store.output.put_nowait(b"alive")
        assert (await client.do(IN, 64)).data == b"alive"


async def test_more_urbs_than_the_engine_keeps_wait() -> None:
    store = Store()
    store.reads.clear()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        for number in range(6000):
            client.submit(OUT, data=number.to_bytes(4, "big"))
        await client.writer.drain()
        store.reads.set()
        answers = [await client.answer() for _ in range(6000)]
        assert all(answer.status == 0 for answer in answers)
        assert store.items == [number.to_bytes(4, "big") for number in range(6000)]


async def test_memory_is_bounded_while_the_device_does_not_read() -> None:
    store = Store()
    store.reads.clear()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        for _ in range(12):
            client.submit(OUT, data=bytes(8 * MIB))
        async with asyncio.timeout(TIMEOUT):
            while client.writer.transport.get_write_buffer_size():
                await asyncio.sleep(0.01)
        assert server.guest.attachments[0].memory <= 64 * MIB
        store.reads.set()
        statuses = [(await client.answer()).status for _ in range(12)]
        assert statuses.count(0) == len(store.items) >= 7
        assert (await client.do(OUT, data=b"again")).status == 0


async def test_a_client_that_does_not_read_is_not_served_on() -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        for _ in range(50):
            store.output.put_nowait(bytes(MIB))
            client.submit(IN, MIB)
        for _ in range(200000):
            client.unlink(1)
        async with asyncio.timeout(TIMEOUT):
            while not next(iter(server.session._clients))._reading_paused:
                await asyncio.sleep(0.01)
        assert client.writer.transport.get_write_buffer_size() > 4 * MIB
        assert server.guest.attachments[0].memory <= 64 * MIB
        answers = [await client.answer() for _ in range(200050)]
        assert sum(answer.actual for answer in answers) == 50 * MIB
        assert sum(answer.command == 4 for answer in answers) == 200000


NOT_A_COMMAND = struct.pack(">5I", 7, 1, 65537, 0, 0).ljust(48, b"\0")
NEGATIVE = struct.pack(">5IIi", 1, 1, 65537, 1, 1, 0, -1).ljust(48, b"\0")
DIRECTION = struct.pack(">5IIi", 1, 1, 65537, 2, 1, 0, 1).ljust(48, b"\0")
ENDPOINT = struct.pack(">5IIi", 1, 1, 65537, 1, 16, 0, 1).ljust(48, b"\0")
MANY_PACKETS = struct.pack(">5IIiII", 1, 1, 65537, 1, 1, 0, 64, 0, 1025).ljust(48, b"\0")
OUTSIDE = struct.pack(">5IIiII", 1, 1, 65537, 1, 1, 0, 64, 0, 1).ljust(48, b"\0") + struct.pack(">IIIi", 60, 5, 0, 0)


@pytest.mark.parametrize(
    ("message", "note"),
    [
        (NOT_A_COMMAND, "7 is not a USB/IP command"),
        (NEGATIVE, "an URB of -1 bytes in direction 1 on endpoint 1 is not valid"),
        (DIRECTION, "in direction 2"),
        (ENDPOINT, "on endpoint 16"),
        (MANY_PACKETS, "an URB of 1025 isochronous packets, at most 1024 are possible"),
        (OUTSIDE, "a packet of an isochronous URB exceeds its 64 bytes"),
    ],
)
async def test_a_violation_ends_the_connection_and_the_next_client_is_served(message: bytes, note: str) -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        await client.configure()
        client.submit(IN, 100)
        client.writer.write(message)
        await client.closed()
        await server.until("violated the protocol", note)
        await server.until("has left")
        again = await server.client()
        await again.configure()
        assert (await again.do(OUT, data=b"again")).status == 0


async def test_a_number_that_is_in_use_ends_the_connection() -> None:
    async with serving(device(Store())) as server:
        client = await server.client()
        await client.configure()
        client.submit(IN, 100, number=77)
        client.submit(IN, 100, number=77)
        await client.closed()
        await server.until("an URB with this number is pending")


async def test_a_client_that_leaves_in_the_middle_of_a_message() -> None:
    store = Store()
    async with serving(device(store)) as server:
        for size in (1, 47, 48, 60):
            client = await server.client()
            await client.configure()
            client.writer.write(
                struct.pack(">5IIi", 1, 9, 65537, 0, 1, 0, 100).ljust(48, b"\0")[:size].ljust(size, b"x")
            )
            await client.writer.drain()
            await client.close()
            async with asyncio.timeout(TIMEOUT):
                while server.session.ports[0].exporter.in_use:
                    await asyncio.sleep(0.01)
        assert store.items == []


@pytest.mark.parametrize(
    ("message", "note"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "is not a USB/IP request"),
        (struct.pack(">HHI", 0x0211, 0x8005, 0), "version 0x0211 is not supported"),
    ],
)
async def test_a_request_that_is_not_one(message: bytes, note: str) -> None:
    async with serving() as server:
        client = await server.client()
        client.writer.write(message)
        await client.closed()
        await server.until(note)


async def test_a_client_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usbip_session, "REQUEST_TIMEOUT", 0.05)
    async with serving() as server:
        client = await server.client()
        client.writer.write(b"\x01")
        await client.closed()


async def test_connections_are_bounded() -> None:
    async with serving(device(Store())) as server:
        clients = [await server.client() for _ in range(usbip_session.MAX_CLIENTS)]
        async with asyncio.timeout(TIMEOUT):
            while len(server.session._clients) < usbip_session.MAX_CLIENTS:
                await asyncio.sleep(0.01)
        await (await server.client()).closed()
        for client in clients:
            await client.close()
        async with asyncio.timeout(TIMEOUT):
            while server.session._clients:
                await asyncio.sleep(0.01)
        assert len(await (await server.client()).list()) == 1


async def test_a_device_that_is_unplugged_ends_the_connection() -> None:
    async with serving(device(Store())) as server:
        client = await server.client()
        await client.configure()
        client.submit(IN, 100)
        await server.guest.attachments[0].unplug()
        await client.closed()
        assert await (await server.client()).list() == []
        assert await (await server.client()).import_() == 4


async def test_interrupt_packets_wait_for_urbs() -> None:
    periodic = Periodic()
    async with serving(device(periodic)) as server:
        client = await server.client()
        await client.configure()
        numbers = [client.submit(0x81, 8) for _ in range(2)]
        for number, data in zip(numbers, (b"one", b"two"), strict=True):
            await periodic.report.write(data)
            answer = await client.answer()
            assert (answer.number, answer.status, answer.data) == (number, 0, data)
        for data in (b"three", b"four"):  # between two URBs
            await periodic.report.write(data)
        assert [(await client.do(0x81, 8)).data for _ in range(2)] == [b"three", b"four"]

        number = client.submit(0x81, 20)  # an URB of several packets ends with a short one
        await periodic.report.write_together(b"12345678", b"9")
        answer = await client.answer()
        assert (answer.number, answer.data) == (number, b"123456789")
        client.submit(0x81, 4)
        await periodic.report.write(b"123456")
        answer = await client.answer()
        assert (answer.status, answer.data) == (-EOVERFLOW, b"1234")

        number = client.submit(0x81, 8)
        async with asyncio.timeout(TIMEOUT):
            await periodic.report.read_by_guest()
        client.unlink(number)
        assert (await client.answer()).status == -ECONNRESET
        async with asyncio.timeout(TIMEOUT):
            while periodic.report.is_read:
                await asyncio.sleep(0.01)
        client.submit(0x81, 8)
        await periodic.report.write(b"after")
        assert (await client.answer()).data == b"after"

        client.submit(0x81, 8)
        await client.do(OUT, data=b"")
        periodic.report.halt()
        assert (await client.answer()).status == -EPIPE


async def test_interrupt_out_is_sent_in_packets() -> None:
    periodic = Periodic()
    async with serving(device(periodic)) as server:
        client = await server.client()
        await client.configure()
        assert (await client.do(OUT, data=b"0123456789")).actual == 10
        assert (await client.do(OUT, data=b"abcdefgh")).actual == 8
        assert periodic.commands == [b"01234567", b"89", b"abcdefgh"]
        answer = await client.do(OUT, data=bytes(8 * exporter.MAX_PARTS + 1))
        assert (answer.status, answer.actual) == (-EMSGSIZE, 0)


async def test_isochronous_endpoints() -> None:
    periodic = Periodic()
    async with serving(device(periodic)) as server:
        client = await server.client()
        await client.configure()
        assert (await client.do(0x81, 4, packets=(4,))).status == -EINVAL  # not an isochronous endpoint
        assert (await client.do(0, setup=set_interface(0, 1))).status == 0
        numbers = [client.submit(0x82, 4 * 64, packets=(64,) * 4) for _ in range(3)]
        samples = []
        for number in numbers:
            answer = await client.answer()
            assert (answer.number, answer.status, answer.actual) == (number, 0, 16)
            assert answer.packets == tuple((64 * place, 64, 4, 0) for place in range(4))
            samples += [int.from_bytes(answer.data[at : at + 4], "little") for at in range(0, 16, 4)]
        assert samples == list(range(samples[0], samples[0] + 12))

        answer = await client.do(0x02, data=b"abcdef", packets=(1, 2, 3))
        assert (answer.status, answer.actual) == (0, 6)
        assert answer.packets == ((0, 1, 1, 0), (1, 2, 2, 0), (3, 3, 3, 0))
        async with asyncio.timeout(TIMEOUT):
            while periodic.packets != [b"a", b"bc", b"def"]:
                await asyncio.sleep(0.01)
        assert (await client.do(0x82, 4)).status == -EINVAL  # without packets
        waiting = client.submit(0x82, 64 * 500, packets=(64,) * 500)
        client.submit(0, setup=set_interface(0, 0))
        answer = await client.answer()  # the setting without the endpoint ends what waits for it
        assert (answer.number, answer.status) == (waiting, -ESHUTDOWN)
        assert (await client.answer()).status == 0


async def test_waiting_urbs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "MAX_WAITING", 3)
    async with serving(device(Periodic())) as server:
        client = await server.client()
        await client.configure()
        for _ in range(3):
            client.submit(0x81, 8)
        assert (await client.do(0x81, 8)).status == -ENOMEM


async def test_requests_that_do_not_fit_their_urb() -> None:
    async with serving(device(Store())) as server:
        client = await server.client()
        await client.configure()
        assert (await client.do(0x80, 17, setup=get_descriptor(1, 18))).status == -EINVAL
        assert (await client.do(0, data=bytes(18), setup=get_descriptor(1, 18))).status == -EINVAL
        assert (await client.do(0x8F, 10)).status == -EPIPE
        assert (await client.do(0, setup=struct.pack("<BBHHH", 0, 5, 7, 0, 0))).status == 0  # SET_ADDRESS
        assert (await client.do(0, setup=struct.pack("<BBHHH", 0, 9, 2, 0, 0))).status != 0
        assert (await client.do(0, setup=SET_CONFIGURATION)).status == 0
        assert (await client.do(0, setup=set_interface(0, 9))).status != 0


async def test_an_address_that_cannot_be_used() -> None:
    async with serving() as server:
        with pytest.raises(TargetError, match="cannot listen on 127") as raised:
            await open_session(parse_target(f"usbip-listen://127.0.0.1:{server.port}"))
        assert raised.value.reason is Reason.UNREACHABLE


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]"])
async def test_an_address_that_others_reach_is_warned_about(address: str) -> None:
    notes: list[str] = []
    try:
        session = await open_session(parse_target(f"usbip-listen://{address}:0"), note=notes.append)
    except TargetError:
        pytest.skip("this machine has no IPv6")
    try:
        assert "anyone who reaches" in notes[1]
        assert "attach -r 0.0.0.0" not in session.ports[0].use
    finally:
        await session.close()


async def test_a_client_of_our_own_is_not_confused_by_pieces() -> None:
    store = Store()
    async with serving(device(store)) as server:
        client = await server.client()
        whole: list[bytes] = []
        write = client.writer.write
        client.writer.write = whole.append  # type: ignore[method-assign, assignment]
        importing = asyncio.ensure_future(client.import_())
        await asyncio.sleep(0)
        client.submit(0, setup=SET_CONFIGURATION)
        client.submit(OUT, data=b"in pieces")
        for byte in b"".join(whole):
            write(bytes((byte,)))
            await asyncio.sleep(0)
        assert await importing == 0
        assert [(await client.answer()).status for _ in range(2)] == [0, 0]
        assert store.items == [b"in pieces"]
