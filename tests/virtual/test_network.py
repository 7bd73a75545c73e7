"""A network adapter and its end, driven by a guest in memory."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.virtual.test_serial import ScriptedEnd, ScriptedPeer

from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Setup, Speed
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import DescriptorType
from farplug.virtual import NetworkAdapter, VirtualDevice, network_device, parse_mac
from farplug.virtual.ntb import BlockReader, BlockWriter

OUT, IN, STATE = 0x01, 0x81, 0x82
MAC = parse_mac("02:fa:71:00:00:01")
SPEED = bytes.fromhex("a12a000000000800") + struct.pack("<II", 10**9, 10**9)
FRAMES = [bytes([number]) * (60 + number) for number in range(5)]


def connection(value: int) -> bytes:
    return bytes((0xA1, 0, value, 0, 0, 0, 0, 0))


def block(*frames: bytes) -> bytes:
    (made,) = BlockWriter().blocks(frames, 16384)
    return made


def unpacked(data: bytes) -> list[bytes]:
    return [bytes(frame) for frame in BlockReader(1514).frames(data)]


@asynccontextmanager
async def plugged(adapter: NetworkAdapter) -> AsyncIterator[MemoryGuest]:
    async with MemoryGuest(VirtualDevice(adapter, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        await guest.set_interface(1, 1)
        yield guest


async def test_descriptors() -> None:
    async with MemoryGuest(network_device(mac=MAC)) as guest:
        await guest.enumerate()
        raw = await guest.get_descriptor(DescriptorType.CONFIGURATION, length=255)
        configuration = ConfigurationDescriptor.parse(raw)
        (association,) = configuration.associations
        assert bytes(association) == bytes.fromhex("080b0002020d0000")
        control, off, on = configuration.interfaces
        string = control.extra[13]
        assert control.extra == bytes.fromhex(
            f"0524001001 0524060001 0d240f{string:02x}00000000ea05000000 06241a000101"
        )
        text = await guest.get_descriptor(DescriptorType.STRING, string, language=0x409, length=255)
        assert text[2:].decode("utf-16-le") == "02FA71000001"
        assert [one.address for one in control.endpoints] == [STATE]
        assert (off.alternate, off.endpoints, off.interface_protocol) == (0, (), 1)
        assert (on.alternate, [one.address for one in on.endpoints], on.interface_protocol) == (1, [OUT, IN], 1)
        bos = await guest.get_descriptor(DescriptorType.BOS, length=255)
        assert bytes.fromhex("DF60DDD88945C74C9CD2659D9E648A9F") in bos
        reply = await guest.control_in(Setup(0xC0, 0x20, 0, 7, 255))
        assert b"WINNCM" in reply


async def test_requests() -> None:
    async with plugged(NetworkAdapter()) as guest:
        parameters = await guest.control_in(Setup(0xA1, 0x80, 0, 0, 28))
        assert parameters == bytes.fromhex(
            "1c00 0100 00400000 0400 0000 0400 0000 00400000 0400 0000 0400 0000".replace(" ", "")
        )
        assert await guest.control_in(Setup(0xA1, 0x85, 0, 0, 4)) == bytes.fromhex("00400000")
        await guest.control_out(Setup(0x21, 0x86, 0, 0, 4), bytes.fromhex("00080000"))
        assert await guest.control_in(Setup(0xA1, 0x85, 0, 0, 4)) == bytes.fromhex("00080000")
        await guest.control_out(Setup(0x21, 0x43, 0x0C, 0, 0))
        assert await guest.control_in(Setup(0xA1, 0x83, 0, 0, 2)) == bytes(2)
        await guest.control_out(Setup(0x21, 0x84, 0, 0, 0))
        for setup, data in (
            (Setup(0x21, 0x86, 0, 0, 4), "ff070000"),
            (Setup(0x21, 0x86, 0, 0, 4), "01400000"),
            (Setup(0x21, 0x86, 0, 0, 2), "0008"),
            (Setup(0x21, 0x86, 0, 0, 8), "0008000000000000"),
            (Setup(0x21, 0x86, 0, 0, 0), ""),
            (Setup(0x21, 0x84, 1, 0, 0), ""),
            (Setup(0x21, 0x8A, 1, 0, 0), ""),
        ):
            with pytest.raises(TransferFailed, match="stall"):
                await guest.control_out(setup, bytes.fromhex(data))
        await guest.set_interface(1, 0)
        assert await guest.control_in(Setup(0xA1, 0x85, 0, 0, 4)) == bytes.fromhex("00400000")


async def test_frames_through_an_end() -> None:
    end = ScriptedEnd()
    adapter = NetworkAdapter(end, mac=MAC)
    async with plugged(adapter) as guest:
        assert await guest.interrupt_in(STATE) == connection(0)
        await guest.bulk_out(OUT, block(*FRAMES))
        peer = ScriptedPeer()
        end.came(peer)
        assert [await guest.interrupt_in(STATE) for _ in range(2)] == [SPEED, connection(1)]
        assert adapter.dropped == sum(map(len, FRAMES))
        await guest.bulk_out(OUT, block(*FRAMES[:3]))
        await guest.bulk_out(OUT, block(FRAMES[3]))
        await guest.bulk_out(OUT, block(FRAMES[4]))
        peer.sent.put_nowait(FRAMES[2])
        assert unpacked(await guest.bulk_in(IN, 16384)) == [FRAMES[2]]
        assert bytes(peer.got) == b"".join(FRAMES)
        peer.sent.put_nowait(b"")
        assert await guest.interrupt_in(STATE) == connection(0)
        end.came(peer := ScriptedPeer())
        assert [await guest.interrupt_in(STATE) for _ in range(2)] == [SPEED, connection(1)]
        await guest.set_interface(1, 0)  # ifdown, as Windows resets an adapter
        peer.sent.put_nowait(FRAMES[0])
        await guest.set_interface(1, 1)
        assert unpacked(await guest.bulk_in(IN, 16384)) == [FRAMES[0]]


async def test_frames_of_a_program() -> None:
    async with plugged(adapter := NetworkAdapter()) as guest:
        sent = guest.submit_out(OUT, block(*FRAMES))
        assert [bytes(frame) for frame in await adapter.read_frames()] == FRAMES
        await sent
        await guest.control_out(Setup(0x21, 0x86, 0, 0, 4), bytes.fromhex("00080000"))
        many = [bytes([number]) * 1200 for number in range(4)]
        writing = asyncio.ensure_future(adapter.write_frames([b"short", *many, bytes(1519)]))
        blocks = [await guest.bulk_in(IN, 2048) for _ in range(4)]
        await writing
        assert [frame for one in blocks for frame in unpacked(one)] == many
        assert adapter.too_long == 2


async def test_blocks_that_are_not_valid_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async with plugged(adapter := NetworkAdapter()) as guest:
        reading = asyncio.ensure_future(adapter.read_frames())
        for bad in (b"NCMH", block(*FRAMES)[:-1], bytes(16384)):
            await guest.bulk_out(OUT, bad)
        await guest.bulk_out(OUT, b"")
        await guest.bulk_out(OUT, bytes.fromhex("4e434d480c00000000000000"))  # valid, without a frame
        await guest.bulk_out(OUT, block(FRAMES[0]))
        assert [bytes(frame) for frame in await reading] == [FRAMES[0]]
        assert adapter.refused == 3
    assert "a block of the guest is not valid and is dropped: it has 4 bytes" in caplog.text


@pytest.mark.parametrize("text", ["02fa71000001", "02:FA:71:00:00:01", "02-fa-71-00-00-01"])
def test_addresses(text: str) -> None:
    assert parse_mac(text) == MAC


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a valid MAC"),
        ("02:fa:71:00:00", "not a valid MAC"),
        ("02:fa:71:00:00:01:02", "not a valid MAC"),
        ("02:fa-71:00:00:01", "not a valid MAC"),
        ("02:fa:71:00:00:0g", "not a valid MAC"),
        ("01:00:5e:00:00:01", "address of a group"),
        ("ff:ff:ff:ff:ff:ff", "address of a group"),
        ("00:00:00:00:00:00", "not the MAC address of an adapter"),
    ],
)
def test_addresses_that_are_not_valid(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_mac(text)
    assert NetworkAdapter().mac[0] == 2
    with pytest.raises(ValueError, match="is not a MAC address"):
        NetworkAdapter(mac=b"\1\2\3\4\5\6")
