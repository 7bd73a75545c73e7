from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.capture import blocks, wireshark

from farplug.capture.recording import MAX_PIPE_TRANSFER, Recording
from farplug.capture.writer import Writer
from farplug.errors import StateError
from farplug.store import MemoryStore
from farplug.testing.memory import MemoryGuest
from farplug.usb.transfer import Status
from farplug.usbredir import packets
from farplug.virtual.disk import disk_device


def bulk_in(id: int, data: bytes) -> packets.BulkPacket:
    return packets.BulkPacket(id=id, endpoint=0x81, status=Status.SUCCESS, length=len(data), data=data)


async def test_what_a_file_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)):
        pass
    section, usb, wire = blocks.read(path)
    assert section.options[4].startswith(b"farplug ")
    assert b"keys and PINs" in section.options[1]
    assert (usb.length, usb.options[2], usb.options[9]) == (220, b"usb", b"\x09")
    assert (wire.length, wire.options[2], wire.options[9]) == (101, b"wire", b"\x09")
    assert set(section.options) == {1, 4}, "not the name of this machine's kernel"


async def test_bytes_of_each_transfer_without_the_wire(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with (
        Recording(str(path), 16) as recording,
        MemoryGuest(disk_device(MemoryStore(1 << 20)), capture=recording) as guest,
    ):
        await guest.enumerate()
        recording.port(0).sent(bulk_in(1, bytes(5000)))
    read = blocks.read(path)
    assert [block.options[2] for block in read if block.kind == blocks.INTERFACE] == [b"usb"]
    cut = [block for block in read if block.kind == blocks.PACKET][-1]
    assert (len(cut.data), cut.length) == (64 + 16, 64 + 5000)
    assert wireshark.count(path, "usb.bDescriptorType == 5"), "descriptors are whole"
    assert not wireshark.count(path, "_ws.malformed")


async def test_a_large_transfer_is_whole_in_a_file_and_fits_into_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)) as recording:
        recording.port(0).sent(bulk_in(1, bytes(1 << 20)))
    *_, block = blocks.read(path)
    assert (len(block.data), block.length) == (64 + (1 << 20), 64 + (1 << 20))
    assert wireshark.count(path, "usb") == 1

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    recording = Recording(str(pipe))
    await recording.open()
    assert recording.max_transfer == MAX_PIPE_TRANSFER
    os.set_blocking(reader, True)
    recording.port(0).sent(bulk_in(1, bytes(1 << 20)))
    data = b""
    while len(data) < MAX_PIPE_TRANSFER + 500:
        data += os.read(reader, 1 << 16)
    await recording.close()
    os.close(reader)
    *_, block = blocks.parse(data)
    assert (len(block.data), block.length) == (64 + MAX_PIPE_TRANSFER, 64 + (1 << 20))
    assert len(block.data) + 1000 < 262_144, "above, Wireshark ends a live capture"


async def test_a_slow_file_loses_payloads_then_packets_and_counts_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.pcapng"
    room: list[int] = [1 << 30]
    monkeypatch.setattr(Writer, "has_room", lambda self, size, limit=16 << 20: size <= room[0] + limit - (16 << 20))
    async with Recording(str(path)) as recording:
        tap = recording.port(0)
        tap.sent(bulk_in(1, b"whole"))
        room[0] = -200_000
        tap.sent(bulk_in(2, b"without"))
        room[0] = -2_000_000
        tap.sent(bulk_in(3, b"nothing"))
        tap.sent(bulk_in(4, b"nothing"))
        assert (recording.cut, recording.dropped) == (3, [2, 0])
        room[0] = 1 << 30
    *_, whole, header, statistics = blocks.read(path)
    assert (whole.data[64:], header.data[64:], header.length) == (b"whole", b"", 64 + 7)
    assert (statistics.kind, statistics.interface) == (blocks.STATISTICS, 0)
    assert statistics.options[5] == (2).to_bytes(8, "little")
    assert wireshark.count(path) == 2


async def test_events_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)) as recording:
        recording.event("the VM has 2 ports", {"FARPLUG_EVENT": "connected"})
        recording.event("broken", {}, warning=True)
    rows = wireshark.rows(path, "systemd_journal", "systemd_journal.message", "systemd_journal.priority")
    assert rows == [["the VM has 2 ports", "6"], ["broken", "4"]]
    entry = blocks.frames(path)[1].fields
    assert (entry["SYSLOG_IDENTIFIER"], entry["FARPLUG_EVENT"]) == ("farplug", "connected")


async def test_a_recording_is_used_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="less than 0"):
        Recording("x", -1)
    recording = Recording(str(tmp_path / "x"))
    recording.event("too early", {})
    recording.port(0).sent(bulk_in(1, b"too early"))
    async with recording:
        with pytest.raises(StateError):
            await recording.open()
    await recording.close()
    recording.event("too late", {})
    recording.port(0).sent(bulk_in(1, b"too late"))
    wire = recording.tap("x")
    wire.sent([b"too late"])
    wire.closed()
    assert len(blocks.read(tmp_path / "x")) == 3
