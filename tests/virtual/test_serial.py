"""A serial line and its end, driven by a guest in memory."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from farplug.ends.base import End, Peer
from farplug.redirection.events import DeviceReport
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Setup, Speed
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import Buffer, DescriptorType
from farplug.virtual import VirtualDevice
from farplug.virtual.events import EndChanged, LineBreak, LineChanged
from farplug.virtual.serial import LineCoding, LineState, Parity, SerialLine, serial_device

OUT, IN, STATE = 0x01, 0x81, 0x82


class ScriptedPeer(Peer):
    """Sends what a test puts in, and keeps what it gets."""

    def __init__(self) -> None:
        self.name = "a test"
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()
        self.got = bytearray()
        self.reads = asyncio.Event()
        self.reads.set()
        self.changed = asyncio.Event()
        self.closed = False

    async def read(self) -> Sequence[bytes]:
        data = await self.sent.get()
        return (data,) if data else ()

    async def write(self, items: Sequence[Buffer]) -> None:
        self.got += b"".join(items)
        self.changed.set()
        await self.reads.wait()
        if self.closed:
            raise BrokenPipeError(32, "Broken pipe")

    def close(self) -> None:
        self.closed = True


class ScriptedEnd(End):
    def __init__(self) -> None:
        super().__init__("test:")
        self.opened = self.closed = 0

    async def _open(self) -> None:
        self.opened += 1

    async def _close(self) -> None:
        self.closed += 1


@asynccontextmanager
async def plugged(line: SerialLine) -> AsyncIterator[MemoryGuest]:
    async with MemoryGuest(VirtualDevice(line, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        yield guest


def state(bits: int) -> bytes:
    return struct.pack("<BBHHHH", 0xA1, 0x20, 0, 0, 2, bits)


async def test_descriptors() -> None:
    async with MemoryGuest(serial_device()) as guest:
        await guest.enumerate()
        raw = await guest.get_descriptor(DescriptorType.CONFIGURATION, length=255)
        assert len(raw) == 75
        configuration = ConfigurationDescriptor.parse(raw)
        (association,) = configuration.associations
        assert bytes(association) == bytes.fromhex("080b000202020000")
        control, data = configuration.interfaces
        assert control.extra == bytes.fromhex("0524001001 0524010001 04240206 0524060001")
        assert [(one.address, one.max_packet_size) for one in control.endpoints] == [(STATE, 16)]
        assert data.interface_class == 0x0A
        assert [(one.address, one.max_packet_size) for one in data.endpoints] == [(OUT, 512), (IN, 512)]


async def test_the_second_line_of_a_device_has_its_own_numbers() -> None:
    device = VirtualDevice(SerialLine(), SerialLine(), speeds=(Speed.HIGH,))
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        raw = await guest.get_descriptor(DescriptorType.CONFIGURATION, length=255)
        control = ConfigurationDescriptor.parse(raw).interfaces[2]
        assert control.extra.endswith(bytes.fromhex("0524010003 04240206 0524060203"))
        second = device.functions[1]
        assert isinstance(second, SerialLine)
        showing = asyncio.ensure_future(second.set_state(LineState.DCD))
        notification = await guest.interrupt_in(second.states.address_in_device)
        assert notification == struct.pack("<BBHHHH", 0xA1, 0x20, 0, 2, 2, 1)
        await showing


async def test_requests() -> None:
    async with plugged(line := SerialLine()) as guest:
        assert await guest.control_in(Setup(0xA1, 0x21, 0, 0, 7)) == bytes.fromhex("80250000000008")
        await guest.control_out(Setup(0x21, 0x20, 0, 0, 7), bytes.fromhex("00c20100020207"))
        assert line.coding == LineCoding(115200, 7, Parity.EVEN, 2)
        assert str(line.coding) == "115200 7E2"
        assert await guest.control_in(Setup(0xA1, 0x21, 0, 0, 7)) == bytes.fromhex("00c20100020207")
        await guest.control_out(Setup(0x21, 0x22, 3, 0, 0))
        await line.until(lambda: line.dtr and line.rts)
        await guest.control_out(Setup(0x21, 0x22, 2, 0, 0))
        assert (line.dtr, line.rts) == (False, True)
        await guest.control_out(Setup(0x21, 0x23, 0xFFFF, 0, 0))
        assert (line.in_break, line.breaks) == (True, 1)
        await guest.control_out(Setup(0x21, 0x23, 0, 0, 0))
        assert (line.in_break, line.breaks) == (False, 1)
        await guest.control_out(Setup(0x21, 0x23, 250, 0, 0))
        assert (line.in_break, line.breaks) == (False, 2)
        for data in ("", "00c201000202", "00c2010002020700", "00c20100030007", "00c20100000507", "00c20100000009"):
            with pytest.raises(TransferFailed, match="stall"):
                await guest.control_out(Setup(0x21, 0x20, 0, 0, len(data) // 2), bytes.fromhex(data))
        assert str(line.coding) == "115200 7E2"
        await guest.set_configuration(1)
        assert (str(line.coding), line.dtr, line.breaks) == ("9600 8N1", False, 0)


@pytest.mark.parametrize("coding", [LineCoding(), LineCoding(1_000_000, 5, Parity.MARK, 1.5), LineCoding(0, 16)])
def test_line_codings(coding: LineCoding) -> None:
    assert LineCoding.parse(bytes(coding)) == coding


async def test_a_program_is_the_other_end() -> None:
    async with plugged(line := SerialLine()) as guest:
        sent = guest.submit_out(OUT, b"hello")
        assert await line.received.read() == b"hello"
        await sent
        answering = asyncio.ensure_future(line.sent.write(b"world"))
        assert await guest.bulk_in(IN, 512) == b"world"
        await answering
        showing = asyncio.ensure_future(line.set_state(LineState.DCD | LineState.RING))
        assert [await guest.interrupt_in(STATE) for _ in range(2)] == [state(9), state(1)]
        await showing
        breaking = asyncio.ensure_future(line.send_break())
        assert [await guest.interrupt_in(STATE) for _ in range(2)] == [state(5), state(1)]
        await breaking
        await guest.stop_receiving(STATE)
        assert await guest.interrupt_in(STATE) == state(1)  # again to the next program that opens the line


async def test_a_peer_comes_and_leaves() -> None:
    line = SerialLine(end := ScriptedEnd())
    device = VirtualDevice(line, speeds=(Speed.HIGH,))
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        assert await guest.interrupt_in(STATE) == state(0)
        await guest.bulk_out(OUT, b"no peer gets this")
        peer = ScriptedPeer()
        end.came(peer)
        assert await guest.interrupt_in(STATE) == state(3)
        assert line.dropped == 17
        await guest.bulk_out(OUT, b"the peer gets this")
        peer.sent.put_nowait(b"an answer")
        assert await guest.bulk_in(IN, 512) == b"an answer"
        peer.sent.put_nowait(b"")
        assert await guest.interrupt_in(STATE) == state(0)
        assert bytes(peer.got) == b"the peer gets this"
        assert peer.closed
        end.came(second := ScriptedPeer())
        assert await guest.interrupt_in(STATE) == state(3)
        second.sent.put_nowait(b"again")
        assert await guest.bulk_in(IN, 512) == b"again"
        await guest.set_configuration(1)  # as a guest that reboots
        second.sent.put_nowait(b"still there")
        assert await guest.bulk_in(IN, 512) == b"still there"
        assert (end.opened, end.closed) == (1, 0)
    await device.dispose()
    assert (end.opened, end.closed) == (1, 1)
    assert second.closed


async def test_a_guest_waits_for_a_peer_that_does_not_read() -> None:
    line = SerialLine(end := ScriptedEnd())
    end.came(peer := ScriptedPeer())
    peer.reads.clear()
    async with plugged(line) as guest:
        assert await guest.interrupt_in(STATE) == state(3)
        await guest.bulk_out(OUT, b"one")
        await peer.changed.wait()
        waiting = [guest.submit_out(OUT, data) for data in (b"two", b"three")]
        await guest.control_in(Setup(0xA1, 0x21, 0, 0, 7))
        assert not any(one.done for one in waiting)
        peer.reads.set()
        for one in waiting:
            await one
        await guest.bulk_out(OUT, b"")
        assert bytes(peer.got) == b"onetwothree"
        peer.closed = True
        await guest.bulk_out(OUT, b"four")
        assert await guest.interrupt_in(STATE) == state(0)
        assert line.dropped == 4


async def test_everything_arrives_in_both_directions() -> None:
    line = SerialLine(end := ScriptedEnd())
    end.came(peer := ScriptedPeer())
    source = random.Random(1)
    async with plugged(line) as guest:
        there = source.randbytes(200_000)
        back = bytearray()

        async def send() -> None:
            for start in range(0, len(there), 10240):
                await guest.bulk_out(OUT, there[start : start + 10240])

        async def receive() -> None:
            while len(back) < len(there):
                back.extend(await guest.bulk_in(IN, 1024))

        async def echo() -> None:
            done = 0
            while done < len(there):
                await peer.changed.wait()
                peer.changed.clear()
                peer.sent.put_nowait(bytes(peer.got[done:]))
                done = len(peer.got)

        await asyncio.gather(send(), receive(), echo())
        assert bytes(back) == bytes(peer.got) == there


async def test_resets_at_any_moment_raise_nothing() -> None:
    line = SerialLine(end := ScriptedEnd())
    async with plugged(line) as guest:
        for round in range(30):
            if round % 3 == 0:
                end.came(peer := ScriptedPeer())
                peer.sent.put_nowait(b"x" * 3000)
            if round % 2:
                guest.submit_out(OUT, b"data").cancel()
            for _ in range(round % 5):
                await asyncio.sleep(0)
            await guest.set_configuration(round % 4 != 3)
            if round % 3 == 2:
                end.left(peer, "it is over")
        await guest.set_configuration(1)
        end.came(peer := ScriptedPeer())
        peer.sent.put_nowait(b"works")
        assert await guest.bulk_in(IN, 512) == b"works"


async def test_events() -> None:
    line = SerialLine(end := ScriptedEnd())
    end.came(peer := ScriptedPeer())
    async with MemoryGuest(VirtualDevice(line, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        await guest.control_out(Setup(0x21, 0x22, 3, 0, 0))
        await guest.control_out(Setup(0x21, 0x22, 3, 0, 0))
        await guest.control_out(Setup(0x21, 0x23, 0xFFFF, 0, 0))
        end.left(peer, "it broke")
        events = [event.event for event in guest.events if isinstance(event, DeviceReport)]
    assert events == [
        EndChanged("serial line", "test:", True, "a test is connected"),
        LineChanged("9600 8N1", True, True),
        LineBreak(),
        EndChanged("serial line", "test:", False, "a test is not connected any more: it broke"),
    ]
    assert [str(event) for event in events] == [
        "serial line: a test is connected",
        "line set to 9600 8N1, DTR and RTS on",
        "break sent by the guest",
        "serial line: a test is not connected any more: it broke",
    ]


async def test_a_program_that_opens_the_line_later_sees_the_state_of_now() -> None:
    """Show no drop of carrier for a peer that left and returned meanwhile: Linux would hang up."""
    shown: list[bool] = []

    class Line(SerialLine):
        async def show_connected(self, connected: bool) -> None:
            await super().show_connected(connected)
            shown.append(connected)

    line = Line(end := ScriptedEnd())
    end.came(first := ScriptedPeer())
    async with plugged(line) as guest:
        assert await guest.interrupt_in(STATE) == state(3)
        await guest.stop_receiving(STATE)
        end.left(first)
        for _ in range(20):
            await asyncio.sleep(0)
        end.came(ScriptedPeer())
        await guest.start_receiving(STATE)
        assert await guest.interrupt_in(STATE) == state(3)  # again, as to each program that opens the line
        for _ in range(20):
            await asyncio.sleep(0)
        assert shown == [True]
        end.left(end.peer or first)
        assert await guest.interrupt_in(STATE) == state(0)
