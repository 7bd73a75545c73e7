from __future__ import annotations

import random
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.capture import wireshark
from tests.capture.blocks import USB_HEADER
from tests.redirection.scripted import ScriptedDevice

from farplug.capture import descriptors as descriptors_module
from farplug.capture.descriptors import read_descriptors
from farplug.capture.recording import Recording
from farplug.capture.usb import Layout, UsbTap
from farplug.errors import RemoteProtocolError
from farplug.store import MemoryStore
from farplug.testing.memory import MemoryGuest
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import Buffer, DescriptorType, Setup, Speed, StandardRequest
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS
from farplug.usbredir.protocol import Oversized, Violation
from farplug.usbredir.wire import PACKET_FORMATS, Flow
from farplug.virtual.disk import disk_device
from farplug.virtual.storage_transport import StorageTransport

CONNECT = p.DeviceConnect(
    speed=2, device_class=0, device_subclass=0, device_protocol=0, vendor_id=0x1D6B, product_id=0x104
)
KEYBOARD = bytes.fromhex(
    "09022200010100a032"  # configuration
    "0904000001030101 00"  # interface: HID, boot, keyboard
    "092111010001223f00"  # HID, report descriptor of 63 bytes
    "07058103080001"  # endpoint 1 IN, interrupt
)
REPORT = bytes.fromhex(
    "05010906a101050719e029e71500250175019508810295017508810195057501050819012905910295017503910195067508150025650507"
    "190029658100c0"
)


@dataclass
class Frame:
    header: tuple[Any, ...]
    rest: bytes
    length: int
    comment: str
    head: bytes

    @property
    def kind(self) -> str:
        return chr(self.header[1])

    @property
    def device(self) -> int:
        return int(self.header[4])

    @property
    def setup(self) -> bytes:
        return bytes(self.header[13])

    @property
    def status(self) -> int:
        return int(self.header[10])

    @property
    def urb_length(self) -> int:
        return int(self.header[11])


@dataclass
class Sink:
    max_transfer: int = 1 << 24
    frames: list[Frame] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    full: bool = False

    def has_room(self, size: int) -> bool:
        return not self.full

    def usb_packet(self, time: int, parts: tuple[Buffer, ...], length: int, *, comment: str = "") -> None:
        data = b"".join(parts)
        header = USB_HEADER.unpack_from(data)
        assert (header[8], header[9]) == (time // 10**9, time // 1000 % 10**6)
        assert header[12] == len(data) - 64, "the length of what is kept"
        self.frames.append(Frame(header, data[64:], length, comment, data[:64]))

    def event(self, message: str, fields: Mapping[str, str]) -> None:
        self.events.append(message)


def tap(**settings: Any) -> tuple[Sink, UsbTap]:
    sink = Sink(**settings)
    usb = UsbTap(sink, 3)
    usb.sent(CONNECT)
    return sink, usb


def control(setup: Setup, id: int, data: bytes = b"", status: Status = Status.SUCCESS) -> p.ControlPacket:
    return p.ControlPacket(
        id=id,
        endpoint=setup.request_type & 0x80,
        request=setup.request,
        request_type=setup.request_type,
        status=status,
        value=setup.value,
        index=setup.index,
        length=len(data) or setup.length,
        data=data,
    )


def bulk(
    id: int, endpoint: int, length: int = 0, data: bytes = b"", status: Status = Status.SUCCESS, stream: int = 0
) -> p.BulkPacket:
    return p.BulkPacket(
        id=id, endpoint=endpoint, status=status, length=len(data) or length, data=data, stream_id=stream
    )


def read_descriptor(usb: UsbTap, id: int, kind: int, data: bytes, *, request_type: int = 0x80, index: int = 0) -> None:
    setup = Setup(request_type, StandardRequest.GET_DESCRIPTOR, kind << 8, index, len(data))
    usb.received(control(setup, id))
    usb.sent(control(setup, id, data))


def test_a_control_transfer_byte_by_byte() -> None:
    sink, usb = tap()
    setup = Setup(0x80, 6, 0x100, 0, 18)
    usb.received(control(setup, 0x1122334455667788))
    usb.sent(control(setup, 0x1122334455667788, bytes(range(18))))
    submit, complete = sink.frames
    assert submit.head[:16] == bytes.fromhex("8877665544332211 53 02 80 01 0300 00 3c")
    assert submit.head[28:] == bytes.fromhex(
        "8dffffff 12000000 00000000 8006000100001200 00000000 00000000 00000000 00000000"
    )
    assert complete.head[:16] == bytes.fromhex("8877665544332211 43 02 80 01 0300 2d 00")
    assert complete.head[28:] == bytes.fromhex(
        "00000000 12000000 12000000 0000000000000000 00000000 00000000 00000000 00000000"
    )
    assert (complete.rest, complete.length, submit.length) == (bytes(range(18)), 82, 64)


def test_a_bulk_transfer_byte_by_byte() -> None:
    sink, usb = tap()
    usb.received(bulk(1, 0x02, data=b"abc"))
    usb.sent(bulk(1, 0x02, 3))
    usb.received(bulk(2, 0x81, 512))
    usb.sent(bulk(2, 0x81, data=b"defg", status=Status.STALL))
    assert [frame.head[8:16] for frame in sink.frames] == [
        bytes.fromhex(text) for text in ("5303020103002d00", "4303020103002d3e", "5303810103002d3c", "4303810103002d00")
    ]
    assert [(frame.status, frame.rest) for frame in sink.frames] == [
        (-115, b"abc"),
        (0, b""),
        (-115, b""),
        (-32, b"defg"),
    ]
    assert [frame.urb_length for frame in sink.frames] == [3, 3, 512, 4]


@pytest.mark.parametrize(
    ("status", "errno"),
    [
        (Status.SUCCESS, 0),
        (Status.CANCELLED, -104),
        (Status.INVALID, -22),
        (Status.IO_ERROR, -71),
        (Status.STALL, -32),
        (Status.TIMEOUT, -110),
        (Status.BABBLE, -75),
        (Status(200), -71),
    ],
)
def test_a_status_is_an_error_number_of_linux(status: Status, errno: int) -> None:
    sink, usb = tap()
    usb.received(bulk(1, 0x81, 512))
    usb.sent(bulk(1, 0x81, status=status))
    assert [frame.status for frame in sink.frames] == [-115, errno]


def test_an_isochronous_packet_has_a_descriptor() -> None:
    sink, usb = tap()
    usb.received(p.IsoPacket(id=1, endpoint=0x02, status=Status.SUCCESS, length=4, data=b"abcd"))
    usb.sent(p.IsoPacket(id=2, endpoint=0x81, status=Status.BABBLE, length=2, data=b"ef"))
    out, arrived = sink.frames
    assert (out.kind, out.rest) == ("S", struct.pack("<iIII", -18, 0, 4, 0) + b"abcd")
    assert (arrived.kind, arrived.rest) == ("C", struct.pack("<iIII", -75, 0, 2, 0) + b"ef")
    assert (out.setup, arrived.setup) == (struct.pack("<ii", 0, 1), struct.pack("<ii", 1, 1))
    assert [frame.header[17] for frame in sink.frames] == [1, 1]


def test_settings_are_control_transfers() -> None:
    sink, usb = tap()
    usb.received(p.SetConfiguration(id=1, configuration=1))
    usb.sent(p.ConfigurationStatus(id=1, status=Status.SUCCESS, configuration=1))
    usb.received(p.SetAltSetting(id=2, interface=3, alt=4))
    usb.sent(p.AltSettingStatus(id=2, status=Status.STALL, interface=3, alt=0))
    usb.received(p.GetConfiguration(id=3))
    usb.sent(p.ConfigurationStatus(id=3, status=Status.SUCCESS, configuration=1))
    usb.received(p.GetAltSetting(id=4, interface=3))
    usb.sent(p.AltSettingStatus(id=4, status=Status.SUCCESS, interface=3, alt=4))
    assert [frame.setup.hex() for frame in sink.frames[::2]] == [
        "0009010000000000",
        "010b040003000000",
        "8008000000000100",
        "810a000003000100",
    ]
    assert [frame.rest for frame in sink.frames[1::2]] == [b"", b"", b"\1", b"\4"]
    assert [frame.status for frame in sink.frames[1::2]] == [0, -32, 0, 0]
    assert all(frame.header[0] >> 63 for frame in sink.frames)


def test_an_answer_without_a_request_is_left_out() -> None:
    sink, usb = tap()
    usb.sent(p.ConfigurationStatus(id=9, status=Status.SUCCESS, configuration=1))
    assert sink.frames == []


def test_each_offer_has_a_device_number_of_its_own() -> None:
    sink, usb = tap()
    for _ in range(130):
        usb.received(bulk(1, 0x81, 1))
        usb.sent(CONNECT)
    numbers = [frame.device for frame in sink.frames]
    assert numbers == [*range(1, 128), 1, 2, 3]
    assert sink.events[0] == "USB device 3.1: 1d6b:0104 offered at High speed"


def test_a_reset_after_use_gives_another_number_and_one_before_does_not() -> None:
    sink, usb = tap()
    usb.received(p.Reset())
    usb.received(bulk(1, 0x81, 1))
    usb.received(p.Reset())
    usb.received(p.Reset())
    usb.received(bulk(2, 0x81, 1))
    assert [frame.device for frame in sink.frames] == [1, 2]


def test_the_limit_cuts_payloads_and_no_descriptor() -> None:
    sink, usb = tap(max_transfer=4)
    read_descriptor(usb, 1, DescriptorType.CONFIGURATION, KEYBOARD)
    usb.received(bulk(2, 0x02, data=b"abcdefgh"))
    cut = sink.frames[-1]
    assert sink.frames[1].rest == KEYBOARD
    assert (cut.rest, cut.length, cut.urb_length) == (b"abcd", 72, 8)


def test_a_full_queue_leaves_headers() -> None:
    sink, usb = tap(full=True)
    usb.received(bulk(2, 0x02, data=b"abcdefgh"))
    assert (sink.frames[0].rest, sink.frames[0].length, sink.frames[0].urb_length) == (b"", 72, 8)


def test_an_oversized_transfer_has_its_size_and_a_violation_nothing() -> None:
    sink, usb = tap()
    usb.received(Oversized(bulk(1, 0x02, 1 << 26)))
    usb.received(Violation(RemoteProtocolError("x"), 99, 0))
    assert [frame.urb_length for frame in sink.frames] == [1 << 26]


def test_data_that_a_device_changes_afterwards_stays_as_it_was() -> None:
    sink, usb = tap()
    data = bytearray(b"first")
    usb.sent(p.InterruptPacket(id=0, endpoint=0x81, status=Status.SUCCESS, length=5, data=memoryview(data)))
    data[:] = b"other"
    assert sink.frames[0].rest == b"first"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        KEYBOARD[:9],
        KEYBOARD[:20],
        bytes(40),
        b"\x09\x02\x22\x00" + b"\xff" * 30,
        bytes.fromhex("09020900") + bytes(5),
    ],
)
def test_a_malformed_descriptor_does_no_harm(data: bytes) -> None:
    layout = Layout(data)
    assert layout.bulk_only({}) == frozenset()
    sink, usb = tap()
    read_descriptor(usb, 1, DescriptorType.CONFIGURATION, data)
    usb.received(bulk(2, 0x02, data=b"x"))
    assert sink.frames[-1].rest == b"x"


def any_packet(rng: random.Random, kind: type[p.Packet]) -> p.Packet:
    """Return a packet with random fields, as far as a parser lets them through."""
    packet_format = PACKET_FORMATS[kind.TYPE]
    layout = packet_format.type_header(ALL_CAPS)
    values = layout.unpack(rng.randbytes(layout.size))
    payload = rng.randbytes(rng.choice((0, 1, 9, 40, 300)))
    if issubclass(kind, p.ControlPacket) and rng.random() < 0.7:
        values = (0x80, 6, 0x80, 0, rng.choice((1, 2)) << 8, 0, rng.choice((9, 40, 0xFFFF)))
        payload = rng.choice((KEYBOARD, bytes.fromhex("0902400001010080fa090400000208065000") + payload, payload))
    return kind.decode(rng.choice((1, 2, (1 << 64) - 1)), values, payload)


def test_no_packet_of_a_guest_makes_a_tap_raise() -> None:
    rng = random.Random(1)
    to_host = [kind for kind in p.PACKETS if PACKET_FORMATS[kind.TYPE].flow is not Flow.TO_GUEST]
    to_guest = [kind for kind in p.PACKETS if PACKET_FORMATS[kind.TYPE].flow is not Flow.TO_HOST]
    written = 0
    for _ in range(200):
        sink, usb = tap(max_transfer=rng.choice((0, 16, 1 << 24)))
        for _ in range(50):
            try:
                if rng.random() < 0.5:
                    packet = any_packet(rng, rng.choice(to_host))
                    usb.received(
                        Oversized(packet) if isinstance(packet, p.DataPacket) and rng.random() < 0.1 else packet
                    )
                else:
                    usb.sent(any_packet(rng, rng.choice(to_guest)))
            except RemoteProtocolError:
                continue  # the parser drops it
        written += len(sink.frames)
    assert written > 3000


# What Wireshark makes of it -------------------------------------------------------------------------------------------


async def test_the_letters_of_a_keyboard(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)) as recording:
        usb = recording.port(0)
        usb.sent(CONNECT)
        read_descriptor(usb, 1, DescriptorType.CONFIGURATION, KEYBOARD)
        usb.received(p.SetConfiguration(id=2, configuration=1))
        usb.sent(p.ConfigurationStatus(id=2, status=Status.SUCCESS, configuration=1))
        read_descriptor(usb, 3, 0x22, REPORT, request_type=0x81)
        usb.received(p.StartInterruptReceiving(id=4, endpoint=0x81))
        for number, keys in enumerate(("0200080000000000", "0000000000000000", "0000040000000000")):
            data = bytes.fromhex(keys)
            usb.sent(p.InterruptPacket(id=number, endpoint=0x81, status=Status.SUCCESS, length=8, data=data))
    assert pressed_keys(path) == ["LeftShift", "e and E", "a and A"]
    assert not wireshark.count(path, "_ws.malformed")


def pressed_keys(path: Path) -> list[str]:
    """Return the keys that Wireshark shows as pressed, in order."""
    text = wireshark.run("-r", str(path), "-Y", "usb.transfer_type == 1", "-V")
    found = re.findall(r"Key: (\w+) \(0x..\): DOWN|Usage: Keyboard ([^(]*\w) \(", text)
    return [modifier or key for modifier, key in found]


class Keyboard(ScriptedDevice):
    """A keyboard that answers requests for its descriptors."""

    def submit(self, transfer: Transfer) -> None:
        setup = transfer.setup
        assert setup is not None
        device = bytes.fromhex("12010002000000406d1d0401000100000001")
        answers = {(0x80, 1): device, (0x80, 2): KEYBOARD, (0x81, 0x22): REPORT}
        answer = answers.get((setup.request_type, setup.value >> 8))
        if answer is None:
            transfer.complete(Status.STALL)
        else:
            transfer.complete(reply=answer[: setup.length])


async def test_the_letters_of_a_keyboard_that_was_plugged_in_before(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    keyboard = Keyboard()
    async with Recording(str(path)) as recording:
        usb = recording.port(0)
        descriptors = await read_descriptors(keyboard)
        usb.resume(CONNECT, descriptors, 1, {0: 0})
        data = bytes.fromhex("0000050000000000")
        usb.sent(p.InterruptPacket(id=7, endpoint=0x81, status=Status.SUCCESS, length=8, data=data))
    assert [data for _, data in descriptors][1:] == [KEYBOARD, REPORT]
    assert pressed_keys(path) == ["b and B"]
    assert wireshark.count(path, 'frame.comment contains "not on the bus"') == 8


async def test_descriptors_that_a_device_does_not_give_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors_module, "READ_TIMEOUT", 0.01)
    silent = ScriptedDevice()
    assert await read_descriptors(silent) == []
    assert all(transfer.status is Status.CANCELLED for transfer in silent.submitted)

    class Broken(ScriptedDevice):
        def submit(self, transfer: Transfer) -> None:
            raise ZeroDivisionError

    assert await read_descriptors(Broken()) == []


class Scsi:
    """A host's driver of a disk in a guest in memory: as Linux, with the order of its transfers."""

    def __init__(self, guest: MemoryGuest) -> None:
        self.guest = guest
        self.tag = 0

    async def bulk_only(self, cdb: bytes, *, receive: int = 0, send: bytes = b"") -> bytes:
        self.tag += 1
        size = receive or len(send)
        head = struct.pack("<4sIIBBB16s", b"USBC", self.tag, size, 0x80 if receive else 0, 0, len(cdb), cdb)
        await self.guest.bulk_out(0x02, head)
        data = await self.guest.bulk_in(0x81, receive) if receive else b""
        if send:
            await self.guest.bulk_out(0x02, send)
        assert await self.guest.bulk_in(0x81, 13) == struct.pack("<4sIIB", b"USBS", self.tag, 0, 0)
        return data

    async def attached(self, cdb: bytes, *, receive: int = 0, send: bytes = b"", streams: bool = True) -> bytes:
        guest = self.guest
        self.tag = 1
        stream = 1 if streams else 0
        status = guest.submit_in(0x83, 112, stream_id=stream)
        data = None
        if streams and receive:
            data = guest.submit_in(0x81, receive, stream_id=stream)
        elif streams and send:
            data = guest.submit_out(0x02, send, stream_id=stream)
        command = guest.submit_out(0x04, struct.pack(">BxHBxBx8s16s", 1, self.tag, 0, 0, bytes(8), cdb))
        if not streams and (receive or send):
            ready = await status
            assert bytes(ready.data) == struct.pack(">BxH", 6 if receive else 7, self.tag)
            data = guest.submit_in(0x81, receive) if receive else guest.submit_out(0x02, send)
            status = guest.submit_in(0x83, 112)
        await command
        answer = await data if data is not None else None
        sense = await status
        assert bytes(sense.data)[0] == 3
        return bytes(answer.data) if receive and answer is not None else b""


READ, WRITE = bytes.fromhex("28000000000700000800"), bytes.fromhex("2a000000000700000800")
INQUIRY = bytes.fromhex("120000002400")


async def commands(run: Any, **settings: Any) -> None:
    """Inquire twice (the first command after a change may report it), write and read 4 KiB."""
    data = bytes(range(256)) * 16
    await run(INQUIRY, receive=36, **settings)
    await run(WRITE, send=data, **settings)
    assert await run(READ, receive=4096, **settings) == data


def decoded(path: Path, over: str) -> list[str]:
    """Return the device number of each READ(10) that Wireshark decodes over a transport."""
    rows = wireshark.rows(path, f"{over} && scsi_sbc.opcode == 0x28 && scsi_sbc.rdwr10.lba == 7", "usb.device_address")
    return [row[0] for row in rows]


@pytest.mark.parametrize("streams", [True, False])
async def test_one_disk_over_both_transports(tmp_path: Path, streams: bool) -> None:
    path = tmp_path / "trace.pcapng"
    disk = disk_device(MemoryStore(1 << 20), speeds=(Speed.SUPER if streams else Speed.HIGH,))
    async with Recording(str(path)) as recording, MemoryGuest(disk, capture=recording) as guest:
        scsi = Scsi(guest)
        await guest.enumerate()
        for _round in range(2):
            await guest.set_interface(0, 0)
            await commands(scsi.bulk_only)
            await guest.set_interface(0, 1)
            if streams:
                await guest.allocate_streams((0x81, 0x02, 0x83), 16)
            await commands(scsi.attached, streams=streams)
    # Bulk-Only Transport under a number of its own; USB Attached SCSI under one with all descriptors again.
    assert decoded(path, "usbms") == ["2", "4"]
    assert decoded(path, "uasp") == ["3", "5"]
    data = wireshark.rows(path, "scsi_sbc.opcode == 0x28 && usb.data_len == 4096", "scsi.request_frame")
    assert len(data) == 4
    assert all(row[0] for row in data)
    assert not wireshark.count(path, "_ws.malformed")
    made_up = wireshark.count(path, 'uasp && frame.comment contains "not on the bus"')
    assert made_up == (6 if streams else 0)


async def test_bulk_only_transport_alone_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    disk = disk_device(MemoryStore(1 << 20), transport=StorageTransport.BOT)
    async with Recording(str(path)) as recording, MemoryGuest(disk, capture=recording) as guest:
        await guest.enumerate()
        scsi = Scsi(guest)
        await commands(scsi.bulk_only)
        await guest.get_descriptor(DescriptorType.CONFIGURATION, length=255)
        await commands(scsi.bulk_only)
    assert decoded(path, "usbms") == ["1", "1"]


async def test_descriptors_that_are_read_again_do_not_stop_the_decoding(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    async with (
        Recording(str(path)) as recording,
        MemoryGuest(disk_device(MemoryStore(1 << 20)), capture=recording) as guest,
    ):
        await guest.enumerate()
        await guest.set_interface(0, 1)
        await guest.allocate_streams((0x81, 0x02, 0x83), 16)
        scsi = Scsi(guest)
        await commands(scsi.attached)
        await guest.get_descriptor(DescriptorType.CONFIGURATION, length=255)
        await commands(scsi.attached)
    assert decoded(path, "uasp") == ["1", "1"]
